"""The frozen affine map that gives a flow the location and scale of its data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_tensor
from .._outliers import outlying
from .base import Transform, channels_last

__all__ = ["Standardize"]


class Standardize(Transform):
    r"""Affine map with the means and standard deviations of data.

    .. math:: y_i = \mu_i + \sigma_i x_i.

    It goes last, next to the data, so that all layers before it see entries of mean zero and
    variance one. Its numbers are buffers: they are saved and moved with the module, and no
    optimiser touches them. It is the identity until it is fitted, by :meth:`fit`, :meth:`from_data`
    or :func:`pyroflows.fit_density`. Images and series are standardised channel by channel. A few
    numbers far beyond all others do not count.

    Args:
        features: Entries of a vector, or the shape of an event, whose first dimension holds the
            channels.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive.

    Example:
        >>> t = Standardize.from_data(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> t.loc
        tensor([ 2., 20.])
        >>> t(torch.zeros(2))
        tensor([ 2., 20.])
    """

    scales_down = True
    loc: Tensor
    scale: Tensor
    is_fitted: Tensor

    def __init__(self, features: int | Sequence[int]) -> None:
        super().__init__(features)
        shape = self.event_shape[:1] + (1,) * len(self.event_shape[1:])
        self.register_buffer("loc", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("is_fitted", torch.tensor(False))

    @classmethod
    def from_data(cls, x: Tensor) -> Standardize:
        """Makes the map of given data.

        Args:
            x: Points of shape ``(points, *event_shape)``, at least two.

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If ``x`` has too few points, a number that is not finite, or a channel that
                never varies.
        """
        if check_tensor("x", x, ()).dim() < 2:
            raise ValueError(f"Expected x of shape (points, *event_shape); got {tuple(x.shape)}.")
        return cls(x.shape[1:]).fit(x)

    @torch.no_grad()
    def fit(self, x: Tensor) -> Standardize:
        """Takes the means and standard deviations of data, once and for all later points.

        Args:
            x: Points of shape ``(*, *event_shape)``, at least two.

        Returns:
            This very transform.

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If ``x`` has too few points, a number that is not finite, or an entry that
                never varies.
        """
        # In float64 on the host, which no size of data or of numbers upsets.
        points = check_tensor("x", x, self.event_shape).to("cpu", torch.float64)
        points = points.reshape(-1, self.features)
        if len(points) < 2:
            raise ValueError(f"Expected at least 2 points to standardise by; got {len(points)}.")
        odd = (~points.isfinite()).any(-1)
        if bool(odd.any()):
            raise ValueError(
                f"Expected finite numbers in x; got {int(odd.sum())} rows with others."
            )
        values = channels_last(points, self.event_shape)
        loc, scale = _moments(values)
        tiny = scale.to(self.scale.dtype) < torch.finfo(self.scale.dtype).tiny
        constant = tiny | (values == values[0]).all(0)
        if bool(constant.any()):
            places = constant.nonzero().flatten().tolist()
            raise ValueError(
                f"Expected every entry of x to vary; got one value only in {places}. "
                "Leave constant entries out."
            )
        self.loc.copy_(loc.reshape(self.loc.shape))
        self.scale.copy_(scale.reshape(self.scale.shape))
        self.is_fitted.fill_(True)
        return self

    def _log_det(self, x: Tensor) -> Tensor:
        total = self.event_shape[1:].numel() * self.scale.log().sum()
        return total.expand(x.shape[: x.dim() - len(self.event_shape)])

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y = torch.addcmul(self.loc, x, self.scale)
        return y, self._log_det(y)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = (y - self.loc) / self.scale
        return x, -self._log_det(x)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, score / self.scale


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation of each column, without its outliers."""
    far = outlying(values)
    if not bool(far.any()):
        return values.mean(0), values.std(0)
    kept = values.masked_fill(far, torch.nan)
    mean = kept.nanmean(0)
    squares = (kept - mean).square().nansum(0)
    return mean, (squares / ((~far).sum(0) - 1)).sqrt()
