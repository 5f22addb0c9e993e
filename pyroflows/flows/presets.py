"""Ready-made flows, by the names of their papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .._checks import check_size
from ..transforms import AdditiveCoupling, AffineCoupling, Rescale, Transform, coupling_masks
from .flow import Flow

__all__ = ["NICE", "RealNVP"]


class NICE(Flow):
    r"""NICE: additive couplings, then one diagonal scaling.

    .. math:: y_B = x_B + t_k(x_A, c) \ \text{for}\ k = 1 \dots K, \qquad y \leftarrow e^{s} \odot y.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context, or ``None``.
        transforms: Number of couplings.
        hidden_features: Widths of each coupling's network.
        activation: Its activation, a callable without arguments that makes a module.
        mask: Which entries stay; see :func:`pyroflows.transforms.coupling_masks`.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.

    Raises:
        ValueError: If an option is out of its range.

    Reference:
        Dinh, Krueger, Bengio, "NICE: Non-linear independent components estimation", 2014, https://arxiv.org/abs/1410.8516

    Example:
        >>> NICE(features=3, context_features=2)(torch.zeros(7, 2)).batch_shape
        torch.Size([7])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        mask: str | Tensor | Sequence[bool] = "random",
        base: torch.distributions.Distribution | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
    ) -> None:
        layers: list[Transform] = [
            AdditiveCoupling(features, context_features, chosen, hidden_features, activation)
            for chosen in coupling_masks(mask, features, check_size("transforms", transforms))
        ]
        layers.append(Rescale(features))
        super().__init__(layers, base, support, name)


class RealNVP(Flow):
    r"""RealNVP: affine couplings.

    .. math:: y_B = e^{s_k(x_A, c)} \odot x_B + t_k(x_A, c) \ \text{for}\ k = 1 \dots K.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context, or ``None``.
        transforms: Number of couplings.
        hidden_features: Widths of each coupling's network.
        activation: Its activation, a callable without arguments that makes a module.
        mask: Which entries stay; see :func:`pyroflows.transforms.coupling_masks`.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        scale: How raw parameters give scales; see :class:`pyroflows.transforms.Affine`.
        bound: Bound of the soft clip on the log-scale.
        name: Name in the param store.

    Raises:
        ValueError: If an option is out of its range.

    Reference:
        Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2016, https://arxiv.org/abs/1605.08803

    Example:
        >>> flow = RealNVP(features=3, support=constraints.positive)
        >>> bool((flow().sample((100,)) > 0).all())
        True
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        mask: str | Tensor | Sequence[bool] = "random",
        base: torch.distributions.Distribution | None = None,
        support: constraints.Constraint | None = None,
        scale: str = "softclip",
        bound: float = 3.0,
        name: str | None = None,
    ) -> None:
        layers = [
            AffineCoupling(features, context_features, chosen, hidden_features, activation, scale, bound)
            for chosen in coupling_masks(mask, features, check_size("transforms", transforms))
        ]
        super().__init__(layers, base, support, name)
