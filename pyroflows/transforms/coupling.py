"""Coupling layers: one part of the vector stays and tells how to move the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ..nn.network import Network, make_network, mlp
from ..nn.startable import temper
from ..univariate import Affine, Shift, Univariate
from .base import Transform, vjp
from .elementwise import identity_table
from .masks import Mask, coupling_masks
from .permute import inverse_permutation

__all__ = ["AdditiveCoupling", "AffineCoupling", "Coupling"]


class Coupling(Transform):
    r"""Coupling of any univariate map.

    With a mask that splits :math:`x` in :math:`(x_A, x_B)`,

    .. math:: y_A = x_A, \quad y_B = f(x_B;\, \theta(x_A, c)), \quad
        \log|\det J| = \sum_{i \in B} \log \partial y_i / \partial x_i,

    where :math:`\theta` is a network. Both directions cost one evaluation of it. The layer starts
    at the identity.

    Images and series are split by their channels, and need a network that keeps positions, such as
    ``convnet()``. Their context has the same positions, or is a vector, which the network then
    finds at every position.

    Args:
        univariate: A monotone map, such as ``Affine()``.
        features: Entries of a vector, at least 2, or the shape of an event with as many channels:
            ``(channels, height, width)``, ``(channels, time)``.
        context_features: Entries of the context :math:`c`, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        mask: ``"half"``, ``"checkerboard"``, ``"random"`` or a boolean mask of shape
            ``(features,)``, or ``(channels,)``; ``True`` stays.
        network: Factory of the network :math:`\theta`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a size is not positive, the mask leaves nothing to condition on or to
            transform, or the network does not fit.

    Reference:
        Dinh, Krueger, Bengio, "NICE: Non-linear independent components estimation", 2014,
        https://arxiv.org/abs/1410.8516

    Example:
        >>> from pyroflows.univariate import Affine
        >>> from pyroflows.transforms import Coupling
        >>> t = Coupling(Affine(), 3, mask=[True, False, False])
        >>> t(torch.ones(5, 3)).shape
        torch.Size([5, 3])
        >>> from pyroflows.nn import convnet
        >>> t = Coupling(Affine(), (4, 8, 8), context_shape=(1, 8, 8), network=convnet())
        >>> t.condition(torch.zeros(1, 8, 8))(torch.ones(5, 4, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(
        self,
        univariate: Univariate,
        features: int | Sequence[int],
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        mask: Mask = "half",
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        self.univariate = univariate
        channels, self._positions = self.event_shape[:1].numel(), self.event_shape[1:]
        (chosen,) = coupling_masks(mask, channels, 1)
        stays, moves = chosen.nonzero().flatten().tolist(), (~chosen).nonzero().flatten().tolist()
        self._sizes = [len(stays), len(moves)]
        start = self._start()
        self._dim = -len(self.event_shape)
        self._contiguous = _contiguous_part(stays + moves)
        # The entries that stay, then those that move.
        self.register_buffer("order", torch.tensor(stays + moves))
        self.register_buffer("inverse_order", torch.tensor(inverse_permutation(stays + moves)))
        self.conditioner = make_network(
            network,
            univariate.codes * len(stays),
            start,
            self._context_size(),
            self._positions,
        )

    def _start(self) -> Tensor:
        return identity_table(self.univariate, self._sizes[1]).flatten()

    def temper(self, share: float) -> None:
        """Makes the network's outputs, before training, count by a share only.

        Args:
            share: The share, at most 1. A network without hidden layers, or one of the user's own,
                stays as it is.
        """
        temper(self.conditioner, share, self._start())

    def _context_size(self) -> int | None:
        """Entries of the context, or its channels where it has the positions of the event."""
        shape, positions = self.context_shape, self._positions
        if shape is None or len(shape) == 1 or not positions:
            return self.context_features
        if shape[1:] != positions:
            raise ValueError(
                f"Expected context_shape of a vector or with the positions {tuple(positions)} of the event; "
                f"got {tuple(shape)}."
            )
        return shape[0]

    @property
    def fast(self) -> str:
        return self.univariate.fast

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self.univariate.support, len(self.event_shape))

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.domain

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._contiguous == "moves":
            moves, stays = x.split(self._sizes[::-1], self._dim)
            return stays, moves
        x = x if self._contiguous else x.index_select(self._dim, self.order)
        stays, moves = x.split(self._sizes, self._dim)
        return stays, moves

    def _merge(self, stays: Tensor, moves: Tensor) -> Tensor:
        batch = moves.shape[: self._dim]
        stays = stays.expand(*batch, *stays.shape[self._dim :])
        if self._contiguous == "moves":
            return torch.cat([moves, stays], self._dim)
        x = torch.cat([stays, moves], self._dim)
        return x if self._contiguous else x.index_select(self._dim, self.inverse_order)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        order = state_dict.get(f"{prefix}order")
        if isinstance(order, Tensor) and not order.is_meta:
            self._contiguous = _contiguous_part(order.tolist())

    def _raw(self, stays: Tensor, context: Tensor | None) -> Tensor:
        """Raw parameters as univariate maps take them, of shape ``(*, parameters, features)``."""
        if not self._positions:
            out = self.conditioner(self.univariate.encode(stays), self.read_context(context))
            # Under autocast the network computes in 16 bits, and the map in its own precision.
            return out.to(stays.dtype).unflatten(-1, (self.univariate.parameters, -1))
        if context is not None and len(self.context_shape or ()) == 1:
            context = context.reshape(*context.shape, *[1] * len(self._positions))
            context = context.expand(*context.shape[: self._dim + 1], *self._positions)
        codes = self.univariate.encode(stays.flatten(self._dim))
        out = self.conditioner(codes.unflatten(-1, (-1, *self._positions)), context)
        return (
            out.to(stays.dtype).flatten(self._dim).unflatten(-1, (self.univariate.parameters, -1))
        )

    def _flat(self, moves: Tensor) -> Tensor:
        return moves.flatten(self._dim) if self._positions else moves

    def _unflat(self, moves: Tensor) -> Tensor:
        return moves.unflatten(-1, (-1, *self._positions)) if self._positions else moves

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        stays, moves = self._split(x)
        moved, log_slope = self.univariate.forward_and_log_det(
            self._flat(moves), self._raw(stays, context)
        )
        return self._merge(stays, self._unflat(moved)), log_slope.sum(-1)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        stays, moves = self._split(y)
        moved, log_slope = self.univariate.inverse_and_log_det(
            self._flat(moves), self._raw(stays, context)
        )
        return self._merge(stays, self._unflat(moved)), log_slope.sum(-1)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The Jacobian is triangular, so its transpose is solved by substitution: first the entries that move, whose
        # block is diagonal, then those that stay, by one vector-Jacobian product of the network.
        x = self.broadcast(x, context)
        score = score.expand(x.shape)
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            stays, moves = self._split(x)
            moved, log_slope = self.univariate.forward_and_log_det(
                self._flat(moves), self._raw(stays, context)
            )
            ones = torch.ones_like(log_slope)
            score_stays, score_moves = self._split(score)
            curvature = 0.0 if self.univariate.linear else vjp([(log_slope, ones)], moves)
            with torch.no_grad():
                pushed = (score_moves - curvature) * self._unflat(log_slope.neg().exp())
            correction = vjp([(moved, self._flat(pushed)), (log_slope, ones)], stays)
        return (
            self._merge(stays, self._unflat(moved)),
            log_slope.sum(-1),
            self._merge(score_stays - correction, pushed),
        )

    def extra_repr(self) -> str:
        return f"{self.univariate}, {super().extra_repr()}"


def _contiguous_part(order: list[int]) -> str | None:
    """Which part comes first in an event whose parts are slices of it, which cost less than gathered entries."""
    if order == sorted(order):
        return "stays"
    size = order.index(0)
    return "moves" if order[size:] + order[:size] == sorted(order) else None


class AdditiveCoupling(Coupling):
    r"""The coupling of NICE, :math:`y_B = x_B + t(x_A, c)`; it keeps volumes.

    Args:
        features: Entries of a vector, or the shape of an event; see :class:`Coupling`.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        mask: See :class:`Coupling`.
        network: Factory of the network.

    Raises:
        ValueError: As :class:`Coupling`.

    Reference:
        Dinh, Krueger, Bengio, "NICE: Non-linear independent components estimation", 2014,
        https://arxiv.org/abs/1410.8516

    Example:
        >>> AdditiveCoupling(3)
        AdditiveCoupling(
          Shift(), 3, fast: both directions
          (conditioner): MLP(
            (activation): SiLU()
            (input): Linear(in_features=1, out_features=64, bias=True)
            (layers): ModuleList(
              (0): Linear(in_features=64, out_features=64, bias=True)
              (1): Linear(in_features=64, out_features=2, bias=True)
            )
          )
        )
    """

    def __init__(
        self,
        features: int | Sequence[int],
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        mask: Mask = "half",
        network: Network = mlp(),
    ) -> None:
        super().__init__(
            Shift(),
            features,
            context_features,
            context_shape=context_shape,
            mask=mask,
            network=network,
        )


class AffineCoupling(Coupling):
    r"""The coupling of RealNVP, :math:`y_B = e^{s(x_A, c)} x_B + t(x_A, c)`.

    Args:
        features: Entries of a vector, or the shape of an event; see :class:`Coupling`.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        mask: See :class:`Coupling`.
        network: Factory of the network.
        scale: How raw parameters give scales: ``"softclip"``, ``"exp"``, ``"softplus"`` or
            ``"sigmoid"``; see :class:`Affine`.
        bound: Bound of the soft clip on the log-scale.

    Raises:
        ValueError: As :class:`Coupling`, or if ``scale`` is unknown or ``bound`` is not positive.

    Reference:
        Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2016,
        https://arxiv.org/abs/1605.08803

    Example:
        >>> t = AffineCoupling(3, context_features=2)
        >>> t.condition(torch.zeros(2))(torch.ones(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        mask: Mask = "half",
        network: Network = mlp(),
        scale: str = "softclip",
        bound: float = 3.0,
    ) -> None:
        super().__init__(
            Affine(scale, bound),
            features,
            context_features,
            context_shape=context_shape,
            mask=mask,
            network=network,
        )
