"""Maps that act on each entry by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from .._checks import check_flag
from ..nn.network import Network, mlp
from ..univariate import Scale, Univariate
from .base import vjp
from .parametric import Parametric

__all__ = ["Elementwise", "Rescale"]


def identity_table(univariate: Univariate, features: int) -> Tensor:
    """Raw parameters of shape ``(parameters, features)`` that make the map the identity.

    Raises:
        TypeError: If ``univariate`` is no univariate map.
    """
    if not isinstance(univariate, Univariate):
        raise TypeError(
            f"Expected univariate to be a monotone map such as Affine(); got {univariate!r}."
        )
    return torch.tensor(univariate.identity).unsqueeze(-1).repeat(1, features)


class Elementwise(Parametric):
    r"""One univariate map per entry, with parameters that are learned or given by the context.

    .. math:: y_i = f(x_i; \theta_i).

    Events have any shape. It starts at the identity.

    Args:
        univariate: A monotone map, such as ``Affine()``.
        features: Entries of a vector, or the shape of an event: ``(channels, height, width)``,
            ``(channels, time)``.
        context_features: Entries of the context; with them :math:`\theta` is the output of a
            network.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        per_channel: Whether all entries of a channel, the first dimension of an event, share their
            parameters.
        network: Factory of the network that reads the context. A context at the positions of the
            event, such as ``(1, height, width)``, is read by one that keeps positions, such as
            ``convnet()``, unless channels share.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a size is not positive.

    Example:
        >>> from pyroflows.univariate import Affine
        >>> from pyroflows.transforms import Elementwise
        >>> Elementwise(Affine(), 3)(torch.ones(3)).shape
        torch.Size([3])
        >>> Elementwise(Affine(), (4, 8, 8), per_channel=True).raw.shape
        torch.Size([2, 4, 1])
    """

    def __init__(
        self,
        univariate: Univariate,
        features: int | Sequence[int],
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        per_channel: bool = False,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        self.univariate = univariate
        shape = self.event_shape
        channels, positions = shape[:1].numel(), shape[1:]
        self.per_channel = check_flag("per_channel", per_channel) and len(positions) > 0
        if self.per_channel:
            self.start(network, raw=identity_table(univariate, channels).unsqueeze(-1))
            return
        beside = self.context_shape is not None and self.context_shape[1:] == positions
        table = identity_table(univariate, self.features)
        self.start(network, positions if beside else (), raw=table)

    @property
    def fast(self) -> str:
        return self.univariate.fast

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self.univariate.support, len(self.event_shape))

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.domain

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, log_slope = self.univariate.forward_and_log_det(self.entries(x), self._raw(context))
        return self.event(y), log_slope.sum(-1)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x, log_slope = self.univariate.inverse_and_log_det(self.entries(y), self._raw(context))
        return self.event(x), log_slope.sum(-1)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            x = self.broadcast(x, context)
            x = x if x.requires_grad else x.detach().requires_grad_()
            y, log_slope = self.univariate.forward_and_log_det(self.entries(x), self._raw(context))
            curvature = (
                0.0 if self.univariate.linear else vjp([(log_slope, torch.ones_like(log_slope))], x)
            )
        pushed = (score - curvature) * self.event(log_slope.neg().exp())
        return self.event(y), log_slope.sum(-1), pushed.detach()

    def _raw(self, context: Tensor | None) -> Tensor:
        """Raw parameters as univariate maps take them, of shape ``(*, parameters, features)``."""
        raw = self.parameters_for(context)
        if not self.per_channel:
            return raw
        return raw.expand(*raw.shape[:-1], self.event_shape[1:].numel()).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.univariate}, {super().extra_repr()}"


class Rescale(Elementwise):
    r"""The diagonal scaling that ends NICE, :math:`y_i = e^{s_i} x_i`.

    Args:
        features: Entries of a vector, or the shape of an event; see :class:`Elementwise`.
        context_features: Entries of the context; with them :math:`s` is the output of a network.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        scale: How raw parameters give scales; see :class:`pyroflows.univariate.Affine`.
        bound: Bound of the soft clip.
        per_channel: Whether all entries of a channel share their scale.
        network: Factory of the network that reads the context; see :class:`Elementwise`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a size is not positive or ``scale`` is unknown.

    Reference:
        Dinh, Krueger, Bengio, "NICE: Non-linear independent components estimation", 2014,
        https://arxiv.org/abs/1410.8516

    Example:
        >>> Rescale(2)(torch.ones(2))
        tensor([1., 1.], grad_fn=<MulBackward0>)
    """

    def __init__(
        self,
        features: int | Sequence[int],
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        scale: str = "exp",
        bound: float = 3.0,
        per_channel: bool = False,
        network: Network = mlp(),
    ) -> None:
        super().__init__(
            Scale(scale, bound),
            features,
            context_features,
            context_shape=context_shape,
            per_channel=per_channel,
            network=network,
        )
