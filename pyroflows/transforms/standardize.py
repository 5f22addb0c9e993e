"""The frozen affine map that gives a flow the location and scale of its data."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_tensor
from .base import Transform

__all__ = ["Standardize"]


class Standardize(Transform):
    r"""Affine map with the means and standard deviations of data, :math:`y_i = \mu_i + \sigma_i x_i`.

    It goes last, next to the data, so that all layers before it see entries of mean zero and variance one. Its numbers
    are buffers: they are saved and moved with the module, and no optimiser touches them. It is the identity until it is
    fitted, by :meth:`fit`, :meth:`from_data` or :func:`pyroflows.fit_density`.

    Args:
        features: Entries of the vector.

    Raises:
        ValueError: If ``features`` is not positive.

    Example:
        >>> t = Standardize.from_data(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> t.loc
        tensor([ 2., 20.])
        >>> t(torch.zeros(2))
        tensor([ 2., 20.])
    """

    loc: Tensor
    scale: Tensor
    is_fitted: Tensor

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))
        self.register_buffer("is_fitted", torch.tensor(False))

    @classmethod
    def from_data(cls, x: Tensor) -> Standardize:
        """Makes the map of given data.

        Args:
            x: Points of shape ``(*, features)``, at least two.

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If ``x`` has too few points, a number that is not finite, or an entry that never varies.
        """
        if check_tensor("x", x, ()).dim() == 0:
            raise ValueError("Expected x of shape (*, features); got ().")
        return cls(x.shape[-1]).fit(x)

    @torch.no_grad()
    def fit(self, x: Tensor) -> Standardize:
        """Takes the means and standard deviations of data, once and for all later points.

        Args:
            x: Points of shape ``(*, features)``, at least two.

        Returns:
            This very transform.

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If ``x`` has too few points, a number that is not finite, or an entry that never varies.
        """
        # In float64 on the host, which no size of data or of numbers upsets.
        rows = (
            check_tensor("x", x, self.event_shape)
            .to("cpu", torch.float64)
            .reshape(-1, *self.event_shape)
        )
        if len(rows) < 2:
            raise ValueError(f"Expected at least 2 points to standardise by; got {len(rows)}.")
        if not bool(rows.isfinite().all()):
            raise ValueError(
                f"Expected finite numbers in x; got {int((~rows.isfinite()).any(-1).sum())} rows with others."
            )
        loc, scale = rows.mean(0), rows.std(0)
        constant = (scale.to(self.scale.dtype) < torch.finfo(self.scale.dtype).tiny) | (
            rows == rows[0]
        ).all(0)
        if bool(constant.any()):
            raise ValueError(
                f"Expected every entry of x to vary; got one value only in {constant.nonzero().flatten().tolist()}. "
                "Leave constant entries out."
            )
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        self.is_fitted.fill_(True)
        return self

    def _log_det(self, batch: torch.Size) -> Tensor:
        return self.scale.log().sum(-1).expand(batch)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y = torch.addcmul(self.loc, x, self.scale)
        return y, self._log_det(y.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = (y - self.loc) / self.scale
        return x, -self._log_det(x.shape[:-1])

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, score / self.scale
