"""Maps that act on each entry by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .._checks import broadcast_batch
from ..nn import MLP
from ..univariate.base import Scale, Univariate, fast_of, support_of
from .base import Transform, vjp

__all__ = ["Elementwise", "Rescale"]


def identity_table(univariate: Univariate, features: int) -> Tensor:
    """Raw parameters of shape ``(parameters, features)`` that make the map the identity.

    Raises:
        TypeError: If ``univariate`` is no univariate map.
    """
    asked = ("parameters", "identity", "linear", "forward_and_log_det", "inverse_and_log_det")
    missing = [name for name in asked if not hasattr(univariate, name)]
    if isinstance(univariate, type) or missing:
        lack = f" without {', '.join(missing)}" if missing else ""
        raise TypeError(
            f"Expected univariate to be a monotone map such as Affine(); got {univariate!r}{lack}."
        )
    return torch.tensor(univariate.identity).unsqueeze(-1).repeat(1, features)


class Elementwise(Transform):
    r"""One univariate map per entry, :math:`y_i = f(x_i; \theta_i)`, with :math:`\theta_i` learned or given by the context.

    It starts at the identity.

    Args:
        univariate: A monotone map, such as ``Affine()``.
        features: Entries of the vector.
        context_features: Entries of the context; with them :math:`\theta` is the output of a network.
        hidden_features: Widths of that network.
        activation: Its activation.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> from pyroflows.univariate import Affine
        >>> from pyroflows.transforms import Elementwise
        >>> Elementwise(Affine(), 3)(torch.ones(3)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        univariate: Univariate,
        features: int,
        context_features: int | None = None,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(features, context_features)
        self.univariate = univariate
        table = identity_table(univariate, features)
        if context_features is None:
            self.raw = nn.Parameter(table)
        else:
            self.conditioner = MLP(0, table.numel(), hidden_features, context_features, activation)
            self.conditioner.start_at(table.flatten())

    @property
    def fast(self) -> str:  # type: ignore[override]
        return fast_of(self.univariate)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(support_of(self.univariate), 1)

    codomain = domain  # type: ignore[assignment]

    def _parameters_for(self, context: Tensor | None) -> Tensor:
        if self.context_features is None:
            return self.raw
        return self.conditioner(None, context).unflatten(-1, (self.univariate.parameters, -1))

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, log_det = self.univariate.forward_and_log_det(x, self._parameters_for(context))
        return y, log_det.sum(-1)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x, log_det = self.univariate.inverse_and_log_det(y, self._parameters_for(context))
        return x, log_det.sum(-1)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            x = x.expand(broadcast_batch(x.shape, 1, context))
            x = x if x.requires_grad else x.detach().requires_grad_()
            y, log_slope = self.univariate.forward_and_log_det(x, self._parameters_for(context))
            curvature = (
                0.0 if self.univariate.linear else vjp([(log_slope, torch.ones_like(log_slope))], x)
            )
        return y, log_slope.sum(-1), ((score - curvature) * log_slope.neg().exp()).detach()

    def extra_repr(self) -> str:
        return f"{self.univariate}, {super().extra_repr()}"


class Rescale(Elementwise):
    r"""The diagonal scaling that ends NICE, :math:`y_i = e^{s_i} x_i`.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context; with them :math:`s` is the output of a network.
        scale: How raw parameters give scales; see :class:`Affine`.
        bound: Bound of the soft clip.
        hidden_features: Widths of the network.
        activation: Its activation.

    Raises:
        ValueError: If a size is not positive or ``scale`` is unknown.

    Reference:
        Dinh, Krueger, Bengio, "NICE: Non-linear independent components estimation", 2014, https://arxiv.org/abs/1410.8516

    Example:
        >>> Rescale(2)(torch.ones(2))
        tensor([1., 1.], grad_fn=<MulBackward0>)
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        scale: str = "exp",
        bound: float = 3.0,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(
            Scale(scale, bound), features, context_features, hidden_features, activation
        )
