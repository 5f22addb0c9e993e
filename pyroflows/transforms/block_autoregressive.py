"""The block autoregressive layer: one monotone network for all entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_hidden
from ..nn.made import check_order
from ..univariate._numeric import invert
from ..univariate.base import soft_clip
from ._inputs import set_aside
from .autoregressive import Order, named_order
from .base import Transform, vjp
from .permute import inverse_permutation

__all__ = ["BlockAutoregressive"]

#: The weights of an entry's own units, its shifts and log-gains, and the slopes in the middle less one.
Block = tuple[Tensor | None, Tensor, Tensor | None]
Increasing = Callable[[Tensor], tuple[Tensor, Tensor]]
Solver = Callable[[Increasing, Tensor, int], tuple[Tensor, Tensor]]


class BlockAutoregressive(Transform):
    r"""The layer of a block neural autoregressive flow, :math:`u = f(v; c)` with a triangular Jacobian.

    Every entry owns a few units of each hidden layer. They read the units of the same entry through
    positive weights, and those of earlier entries, and the context, through free ones. With
    :math:`h_i = v_i` and :math:`z_i = v_i` at first, a hidden layer is

    .. math:: (s_i, g_i) = \sum_{j < i} W_{ij} z_j + V_i c + b_i, \quad d_i = e^{g_i} \odot P_i h_i, \\
        a_i = d_i + s_i, \quad h_i \leftarrow d_i + (e^{r_i} - 1) \odot \tanh a_i, \quad z_i \leftarrow \tanh a_i,

    where the rows of :math:`P_i` are positive and sum to one, and the last layer gives
    :math:`u_i = a_i`. The derivative by the entry itself goes along by the chain rule; all its
    factors are positive, that of the activation being :math:`1 + (e^r - 1)(1 - \tanh^2 a)`. This
    activation is the tanh of the paper beside a line, so that every entry runs over the whole line
    and the density is normalised, where a network of plain tanh has a bounded range. Earlier
    entries move its scale as well as its place. The numbers :math:`g` are softly clipped to
    :math:`\pm 3` and :math:`r` to :math:`\pm 5`, so that no slope overflows or vanishes.

    With ``fast="inverse"`` the network leads from event to base, :math:`v = y, u = x`: fast to
    score. With ``fast="forward"`` it leads from base to event: fast to sample. The other direction
    finds one entry after the other by a numeric inverse of its own units, each hidden unit being
    settled once, with exact gradients by the implicit function theorem. The layer starts at the
    identity.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context :math:`c`, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        hidden: Units that every entry owns in each hidden layer.
        order: ``"natural"``, ``"reversed"``, ``"random"``, or the entries from first to last.
        fast: ``"inverse"`` for a layer that is fast to score, ``"forward"`` for one that is fast to
            sample.
        seed: Seed of the random order.

    Raises:
        TypeError: If a size or an order is not made of integers.
        ValueError: If a size is not positive, the order is no permutation, or a name is unknown.

    Reference:
        De Cao, Titov, Aziz, "Block neural autoregressive flow", 2019,
        https://arxiv.org/abs/1904.04676

    Example:
        >>> t = BlockAutoregressive(3, hidden=(4,))
        >>> t.fast, t.inv(torch.ones(5, 3)).shape
        ('inverse', torch.Size([5, 3]))
    """

    vectors_only = True
    fast: str = "inverse"
    order: Tensor
    places: Tensor

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        hidden: Sequence[int] = (8, 8),
        order: Order = "natural",
        fast: str = "inverse",
        seed: int = 0,
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        if fast not in ("inverse", "forward"):
            raise ValueError(
                f"Expected fast to be inverse (fast to score) or forward (fast to sample); got {fast!r}."
            )
        self.fast = fast
        entries = check_order(named_order(order, self.features, seed), self.features)
        self.register_buffer("order", torch.tensor(entries))
        self.register_buffer("places", torch.tensor(inverse_permutation(entries)))
        widths = (1, *check_hidden(hidden), 1)
        last = len(widths) - 2
        self.layers = nn.ModuleList(
            _Layer(self.features, i, o, self.context_features, layer == last)
            for layer, (i, o) in enumerate(pairwise(widths))
        )

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return (
            self._move(x, context) if self.fast == "forward" else self._solve(x, context, _search)
        )

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return (
            self._move(y, context) if self.fast == "inverse" else self._solve(y, context, _search)
        )

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.fast == "inverse":
            return super().push_score(x, score, context)
        # The point is known, so a step of Newton's from it, which does not move, takes the place of the search.
        y, log_det = self.forward_and_log_det(x, context)
        known = x.detach().expand(y.shape).index_select(-1, self.order)
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            back, inverse_log_det = self._solve(point, context, partial(_stay, known))
            pushed = vjp(
                [
                    (back, score.expand_as(back)),
                    (inverse_log_det, torch.ones_like(inverse_log_det)),
                ],
                point,
            )
        return y, log_det, pushed

    def _move(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The direction in which the network sees all entries at once."""
        context = self.read_context(context)
        h = seen = v.index_select(-1, self.order).unsqueeze(-1)
        slope = torch.ones_like(h)
        for layer in self._layers():
            h, slope, seen = _step(
                h, slope, layer.mixture(), layer.free(seen, context), layer.bend()
            )
        u, log_slope = h.squeeze(-1), slope.squeeze(-1).log()
        return u.index_select(-1, self.places), log_slope.expand(u.shape).sum(-1)

    def _solve(self, u: Tensor, context: Tensor | None, solve: Solver) -> tuple[Tensor, Tensor]:
        """The other direction, entry by entry, in which every unit is settled once."""
        u, context = set_aside(self, u, context)
        u = u.index_select(-1, self.order)
        context = self.read_context(context)
        readers = [_Reader(layer, context) for layer in self._layers()]
        found, log_det = [], u.new_zeros(())
        for entry, value in enumerate(u.unbind(-1)):
            blocks = [reader.block(entry) for reader in readers]
            v, log_slope = solve(partial(_through, blocks), value, entry)
            v = self.keep_within(v)
            found.append(v)
            log_det = log_det + log_slope
            h = slope = seen = v.unsqueeze(-1).unsqueeze(-1)
            for reader, block in zip(readers, blocks, strict=True):
                reader.seen.append(seen.squeeze(-2))
                h, slope, seen = _step(h, slope, *block)
        return torch.stack(found, -1).index_select(-1, self.places), log_det

    def _layers(self) -> Iterator[_Layer]:
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            yield layer


def _search(function: Increasing, value: Tensor, entry: int) -> tuple[Tensor, Tensor]:
    return invert(function, value, BlockAutoregressive.__name__)


def _stay(known: Tensor, function: Increasing, value: Tensor, entry: int) -> tuple[Tensor, Tensor]:
    at = known.select(-1, entry)
    reached, log_slope = function(at)
    root = at - (reached - value) * log_slope.neg().exp()
    return root, -function(root)[1]


class _Layer(nn.Module):
    """The weights of one layer.

    Args:
        features: Entries of the vector.
        inputs: Units per entry that the layer reads.
        outputs: Units per entry that it has.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        last: Whether it is the last layer, which is linear.
    """

    earlier: Tensor

    def __init__(
        self, features: int, inputs: int, outputs: int, context_features: int | None, last: bool
    ) -> None:
        super().__init__()
        # At the start nothing heeds the shifts of hidden layers yet. So they may differ from unit to unit, and the layer is
        # the identity nevertheless.
        spread = torch.tensor([[0.0 if last else 1.0], [0.0]]).expand(2, outputs).reshape(1, -1)
        size = spread * (features * inputs + (context_features or 0)) ** -0.5
        self.mixing = nn.Parameter(torch.zeros(features, outputs, inputs)) if inputs > 1 else None
        self.steepness = None if last else nn.Parameter(torch.zeros(features, outputs))
        self.bias = nn.Parameter(2 * spread * torch.randn(features, 2 * outputs))
        self.lower: nn.Parameter | None = None
        if features > 1:
            self.lower = nn.Parameter(
                size[..., None, None] * torch.randn(features, 2 * outputs, features, inputs)
            )
        self.context: nn.Parameter | None = None
        if context_features is not None:
            self.context = nn.Parameter(
                size[..., None] * torch.randn(features, 2 * outputs, context_features)
            )
        earlier = torch.ones(features, features).tril(-1)
        self.register_buffer(
            "earlier", earlier.bool().reshape(features, 1, features, 1), persistent=False
        )

    def mixture(self) -> Tensor | None:
        """The weights of an entry's own units, of shape ``(features, outputs, inputs)``, or ``None`` for a single one."""
        return None if self.mixing is None else self.mixing.softmax(-1)

    def bend(self) -> Tensor | None:
        """The slope in the middle of the activation less one, of shape ``(features, outputs)``."""
        return None if self.steepness is None else torch.expm1(soft_clip(self.steepness, 5.0))

    def fixed(self, context: Tensor | None) -> Tensor:
        """What the context adds to the bias, of shape ``(*, features, 2 * outputs)``."""
        if self.context is None:
            return self.bias
        assert context is not None
        return self.bias + F.linear(context, self.context.flatten(0, 1)).unflatten(
            -1, self.bias.shape
        )

    def free(self, seen: Tensor, context: Tensor | None) -> Tensor:
        """Shifts and log-gains, from units of shape ``(*, features, inputs)`` of all entries."""
        if self.lower is None:
            return self.fixed(context)
        # Not a product: far out the gradient of what is masked overflows, and infinity times zero is no number.
        weight = torch.where(self.earlier, self.lower, 0.0).flatten(2).flatten(0, 1)
        return self.fixed(context) + F.linear(seen.flatten(-2), weight).unflatten(
            -1, self.bias.shape
        )


class _Reader:
    """A layer that sees one entry after the other."""

    def __init__(self, layer: _Layer, context: Tensor | None) -> None:
        self.lower = layer.lower
        self.seen: list[Tensor] = []
        self.mixture, self.bend, self.fixed = layer.mixture(), layer.bend(), layer.fixed(context)

    def block(self, entry: int) -> Block:
        """What :func:`_step` takes for the units of one entry, once those before it are seen."""
        free = self.fixed.narrow(-2, entry, 1)
        if self.lower is not None and entry:
            weight = self.lower[entry, :, :entry].flatten(1)
            free = free + F.linear(torch.cat(self.seen, -1), weight).unsqueeze(-2)
        mixture = None if self.mixture is None else self.mixture.narrow(0, entry, 1)
        return mixture, free, None if self.bend is None else self.bend.narrow(0, entry, 1)


def _step(
    h: Tensor, slope: Tensor, mixture: Tensor | None, free: Tensor, bend: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer: its units, their derivatives by their own entry, and what later entries see of them."""
    shift, log_gain = free.chunk(2, -1)
    gain = soft_clip(log_gain, 3.0).exp()
    own, slope = (
        gain * (t if mixture is None else torch.einsum("...ik,iok->...io", t, mixture))
        for t in (h, slope)
    )
    if bend is None:
        return own + shift, slope, own
    squashed = torch.tanh(own + shift)
    return own + bend * squashed, slope * (1 + bend * (1 - squashed.square())), squashed


def _through(blocks: list[Block], v: Tensor) -> tuple[Tensor, Tensor]:
    """The function of one entry, with all before it fixed, and the logarithm of its derivative."""
    h = v.unsqueeze(-1).unsqueeze(-1)
    slope = torch.ones_like(h)
    for block in blocks:
        h, slope, _ = _step(h, slope, *block)
    return h.squeeze(-1).squeeze(-1), slope.squeeze(-1).squeeze(-1).log().expand(h.shape[:-2])
