"""Autoregressive layers: every entry moves as those before it tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .._checks import broadcast_batch, check_size
from .._compat import transforming
from .._saturation import saturate
from ..nn import MADE
from ..nn.made import Weights
from ..nn.stages import Folding, Unfolding
from ..nn.startable import temper
from ..univariate import Affine, Univariate
from ._inputs import set_aside
from .base import Transform, vjp
from .elementwise import identity_table

__all__ = ["AffineAutoregressive", "Autoregressive"]

Order = str | Sequence[int] | Tensor

#: Multiplications that cost as much as what is fixed about one stage, and the least rounds that are worth a try.
_STAGE = 2e6
_TRY = 12


class Autoregressive(Transform):
    r"""Autoregressive layer of any univariate map.

    Let :math:`A_i` be the entries before :math:`i` in an order, or its parents in a graph without
    cycles. One direction moves every entry as those in its set tell,

    .. math:: u_i = f(v_i;\, \theta_i(v_{A_i}, c)), \quad
        \log\Bigl|\det \frac{\partial u}{\partial v}\Bigr| = \sum_i \log \frac{\partial u_i}{\partial v_i},

    by one evaluation of a masked network. With ``fast="inverse"`` it leads from event to base,
    :math:`v = y, u = x`: fast to score, as the masked autoregressive flow. With ``fast="forward"``
    it leads from base to event, :math:`v = x, u = y`: fast to sample, as the inverse autoregressive
    flow. The layer starts at the identity.

    The slow direction finds :math:`v_i` once :math:`v_{A_i}` is known. It is exact, by one of two
    ways:

    - *Stage by stage.* Hidden units are sorted by the entry that they wait for, and each is
      computed once, so that all stages cost little more arithmetic than one evaluation.
    - *Round by round*, for small networks and batches, where the number of steps is what costs. All
      entries are solved at once for the network's output at the last guess,
      :math:`v \leftarrow f^{-1}(u;\, \theta(v))`. Each round settles one more stage at least; the
      iteration ends when nothing changes, after some ten rounds as a rule. Rounds are taken where
      one costs no more than a stage, or where twelve or more cost less than half of all stages, and
      only so many. To see the end they read from the device.

    Derivatives come from the implicit function theorem: with the triangular Jacobian :math:`J` of
    the fast direction at the solution, backpropagation solves :math:`J^\top a = \bar v` by either
    of the two ways, mirrored, at the cost of one more solve. Derivatives of higher order, function
    transforms and compiled graphs go through the stages themselves.

    Args:
        univariate: A monotone map, such as ``Affine()``; its forward direction is what the fast
            direction evaluates.
        features: Entries of the vector.
        context_features: Entries of the context :math:`c`, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        hidden: Widths of the network; see :class:`pyroflows.nn.MADE`.
        activation: Its activation, a callable without arguments that makes a module.
        order: ``"natural"``, ``"reversed"``, ``"random"``, or the entries from first to last.
        residual: Whether the network is residual, with layers of one width.
        adjacency: Instead of an order a graph, as a boolean matrix of shape
            ``(features, features)``: entry ``i`` may depend on entry ``j`` where
            ``adjacency[i, j]``.
        fast: ``"inverse"`` for a layer that is fast to score, ``"forward"`` for one that is fast to
            sample.
        seed: Seed of the random order. It depends on nothing else, so that a flow made again, to
            load saved parameters, has the order that the parameters were trained with.

    Raises:
        TypeError: If a size or an order is not made of integers, or the adjacency is not boolean.
        ValueError: If a size is not positive, the order is no permutation, the adjacency has a
            cycle, or a name is unknown.

    Reference:
        Papamakarios, Pavlakou, Murray, "Masked autoregressive flow for density estimation", 2017,
        https://arxiv.org/abs/1705.07057

        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving variational inference
        with inverse autoregressive flow", 2016, https://arxiv.org/abs/1606.04934

        Song, Meng, Liao, Ermon, "Accelerating feedforward computation via parallel nonlinear
        equation solving", 2020, https://arxiv.org/abs/2002.03629

    Example:
        >>> from pyroflows.univariate import Affine
        >>> from pyroflows.transforms import Autoregressive
        >>> t = Autoregressive(Affine(), 3, order=[2, 0, 1])
        >>> t.fast, t(torch.ones(5, 3)).shape
        ('inverse', torch.Size([5, 3]))
    """

    vectors_only = True
    fast: str = "inverse"
    univariate: Univariate

    def __init__(
        self,
        univariate: Univariate,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        order: Order = "natural",
        residual: bool = False,
        adjacency: Tensor | Sequence[Sequence[bool]] | None = None,
        fast: str = "inverse",
        seed: int = 0,
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        if fast not in ("inverse", "forward"):
            raise ValueError(
                f"Expected fast to be inverse (fast to score) or forward (fast to sample); got {fast!r}."
            )
        self.fast = fast
        self.univariate = univariate
        table = identity_table(univariate, self.features)
        self.conditioner = MADE(
            self.features,
            len(table),
            hidden,
            self.context_features,
            activation,
            named_order(order, self.features, seed),
            residual,
            adjacency,
            univariate.codes,
        )
        self.conditioner.start_at(table)

    def temper(self, share: float) -> None:
        """Makes the network's outputs, before training, count by a share; see :class:`Coupling`."""
        temper(self.conditioner, share, identity_table(self.univariate, self.features))

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self.univariate.support, 1)

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.domain

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._move(x, context) if self.fast == "forward" else self._solve(x, context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._move(y, context) if self.fast == "inverse" else self._solve(y, context)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.fast == "inverse":
            return super().push_score(x, score, context)
        # The Jacobian at x is at hand, and triangular: no need to find x again.
        context = self.read_context(context)
        shape = broadcast_batch(x.shape, 1, context)
        with torch.enable_grad():
            x = (x if x.requires_grad else x.detach().requires_grad_()).expand(shape)
            here = _Linearized(self, x, context, self.conditioner.weights())
            log_det = here.log_slope.sum(-1)
            curvature = vjp([(log_det, torch.ones_like(log_det))], x)
            pushed = here.solve_transposed((score - curvature).detach())
        return here.value, log_det, pushed

    def _move(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The fast direction, by one evaluation of the network."""
        context = self.read_context(context)
        u, log_slope = self.univariate.forward_and_log_det(
            v, self._raw(v, context, self.conditioner.weights())
        )
        return u, log_slope.sum(-1)

    def _raw(
        self,
        v: Tensor,
        context: Tensor | None,
        weights: Weights,
        trace: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        raw = self.conditioner.evaluate(self.univariate.encode(v), context, weights, trace)
        # Under autocast the network computes in 16 bits, and the map in its own precision.
        return raw.to(v.dtype)

    # The slow direction

    def _solve(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Finds what the fast direction maps to ``u``."""
        u, context = set_aside(self, u, context)
        context = self.read_context(context)
        weights = self.conditioner.weights()
        if self.conditioner.stages == 1:
            v, log_slope = self.univariate.inverse_and_log_det(u, self._raw(u, context, weights))
            return v, log_slope.sum(-1)
        if transforming() or torch.jit.is_tracing():
            return self._unfold(u, context, weights, in_place=False)
        with torch.no_grad():
            solution = self._iterate(u, context, weights) or self._unfold(
                u, context, weights, in_place=True
            )
        inputs = [u, context, *weights.tensors(), *self._own_parameters()]
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs if t is not None):
            return solution
        here = _Linearized(self, solution[0].requires_grad_(), context, weights)
        return _Implicit.apply(here, *inputs)

    def _own_parameters(self) -> list[nn.Parameter]:
        """Parameters beside the weights of the network: of the activation, and of a univariate map that is a module."""
        modules = (
            self.univariate,
            self.conditioner.activation if self.conditioner.widths else None,
        )
        # A univariate map has an attribute of the name of this method.
        return [
            p
            for module in modules
            if isinstance(module, nn.Module)
            for p in nn.Module.parameters(module)
        ]

    def rounds(self, points: int) -> int:
        """The most rounds of iteration over so many points before it is better to go stage by stage."""
        stages = self.conditioner.stages
        cost = 0.5 + points * self.conditioner.size / _STAGE
        rounds = stages + 1 if cost <= 1 else int(0.5 * stages / cost)
        return rounds if rounds >= min(stages, _TRY) else 0

    def _iterate(
        self, u: Tensor, context: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor] | None:
        """Round by round; ``None`` if it does not settle, be it for overflow on the way."""
        v = u
        for _ in range(0 if u.is_meta else self.rounds(u.shape[:-1].numel())):
            before = v
            v, log_slope = self.univariate.inverse_and_log_det(u, self._raw(v, context, weights))
            v = self.keep_within(v)
            if torch.equal(v, before):
                return v, log_slope.sum(-1)
        return None

    def _unfold(
        self, u: Tensor, context: Tensor | None, weights: Weights, in_place: bool
    ) -> tuple[Tensor, Tensor]:
        """Stage by stage, on columns, one per point."""
        net, batch = self.conditioner, u.shape[:-1]
        given: Tensor | None = None
        if context is not None:
            given = nn.functional.linear(context, weights.context)  # type: ignore[arg-type]
            given = _columns(given.expand(*batch, -1))
        columns = _columns(u).index_select(0, net.entries)
        unfolding = Unfolding(net, weights, given, columns, in_place)
        found: list[tuple[Tensor, Tensor]] = []
        for low, high in net.slices:
            v, log_slope = self.univariate.inverse_and_log_det(
                columns[low:high], unfolding.parameters()
            )
            v = self.keep_within(v)
            unfolding.reveal(self.univariate.encode(v).unflatten(-1, (net.codes, -1)))
            found.append((v, log_slope))
        v, log_slope = (torch.cat(parts) for parts in zip(*found, strict=True))
        return v.index_select(0, net.places).mT.reshape(u.shape), log_slope.sum(0).reshape(batch)

    def extra_repr(self) -> str:
        return f"{self.univariate}, {super().extra_repr()}"


class AffineAutoregressive(Autoregressive):
    r"""Autoregressive layer of affine maps.

    .. math:: u_i = e^{s_i} v_i + t_i, \quad (s_i, t_i) = \theta_i(v_{A_i}, c).

    See :class:`Autoregressive` for the two directions. Where scoring is fast (:math:`v = y, u = x`)
    this is the masked autoregressive flow, whose paper writes the same maps as
    :math:`x_i = (y_i - \mu_i) e^{-\alpha_i}`; the shift here is in the units of the base, where
    gradients with respect to it do not grow with the precision.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        hidden: Widths of the network.
        activation: Its activation.
        order: ``"natural"``, ``"reversed"``, ``"random"``, or the entries from first to last.
        residual: Whether the network is residual, with layers of one width.
        adjacency: Instead of an order a graph; see :class:`Autoregressive`.
        fast: ``"inverse"`` for a layer that is fast to score, ``"forward"`` for one that is fast to
            sample.
        seed: Seed of the random order.
        scale: How raw parameters give scales: ``"softclip"``, ``"exp"``, ``"softplus"`` or
            ``"sigmoid"``; see :class:`Affine`.
        bound: Bound of the soft clip on the log-scale.

    Raises:
        TypeError: As :class:`Autoregressive`.
        ValueError: As :class:`Autoregressive`, or if ``scale`` is unknown or ``bound`` is not
            positive.

    Reference:
        Papamakarios, Pavlakou, Murray, "Masked autoregressive flow for density estimation", 2017,
        https://arxiv.org/abs/1705.07057

    Example:
        >>> t = AffineAutoregressive(3, context_features=2, fast="forward")
        >>> t.condition(torch.zeros(2))(torch.ones(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        order: Order = "natural",
        residual: bool = False,
        adjacency: Tensor | Sequence[Sequence[bool]] | None = None,
        fast: str = "inverse",
        seed: int = 0,
        scale: str = "softclip",
        bound: float = 3.0,
    ) -> None:
        univariate = Affine(scale, bound)
        super().__init__(
            univariate,
            features,
            context_features,
            context_shape=context_shape,
            hidden=hidden,
            activation=activation,
            order=order,
            residual=residual,
            adjacency=adjacency,
            fast=fast,
            seed=seed,
        )


class _Linearized:
    """The fast direction at a point, and the transpose of its Jacobian.

    The graph of one evaluation gives the derivatives of the univariate maps and of the activations,
    which are diagonal, so that nothing is computed again.
    """

    def __init__(
        self, transform: Autoregressive, at: Tensor, context: Tensor | None, weights: Weights
    ) -> None:
        self.transform, self.context, self.weights = transform, context, weights
        self.activations: list[tuple[Tensor, Tensor]] = []
        # The network sees the point by another name, which parts the Jacobian off the diagonal from that on it.
        self.at, self.seen = at, at.view_as(at)
        self.raw = transform._raw(self.seen, context, weights, self.activations)
        self.value, self.log_slope = transform.univariate.forward_and_log_det(at, self.raw)

    def solve_transposed(self, v: Tensor) -> Tensor:
        r"""Solves :math:`J^\top a = v`."""
        slope = self.log_slope.detach().exp()
        if self.transform.conditioner.stages == 1:
            return v / slope
        if v.is_meta or transforming() or torch.jit.is_tracing():
            return self._fold(v, slope, in_place=v.is_meta)
        solution = self._iterate(v, slope)
        return self._fold(v, slope, in_place=True) if solution is None else solution

    def _iterate(self, v: Tensor, slope: Tensor) -> Tensor | None:
        """Round by round, from the last stage: each entry answers for what those after it put on it."""
        a = v / slope
        for _ in range(self.transform.rounds(v.shape[:-1].numel())):
            before = a
            (pulled,) = torch.autograd.grad(self.value, self.seen, before, retain_graph=True)
            a = saturate((v - pulled) / slope)
            if torch.equal(a, before):
                return a
        return None

    def _fold(self, v: Tensor, slope: Tensor, in_place: bool) -> Tensor:
        """Stage by stage, from the last."""
        net = self.transform.conditioner
        by_raw = self._diagonal(self.value, self.raw)
        codes = (
            self.transform.univariate.encode(self.seen).unflatten(-1, (net.codes, -1)).unbind(-2)
        )
        by_seen = torch.stack([self._diagonal(code, self.seen) for code in codes], -2)
        slopes = [_columns(self._diagonal(h, z)) for z, h in self.activations]
        with torch.no_grad():
            by_raw, by_seen = (
                t.reshape(-1, *t.shape[-2:])
                .index_select(-1, net.entries)
                .permute(2, 1, 0)
                .contiguous()
                for t in (by_raw, by_seen)
            )
            cotangents, slope = (_columns(t).index_select(0, net.entries) for t in (v, slope))
            folding = Folding(net, self.weights, slopes, cotangents, in_place)
            parts: list[Tensor] = []
            for low, high in reversed(net.slices):
                a = (cotangents[low:high] - (folding.pulled() * by_seen[low:high]).sum(1)) / slope[
                    low:high
                ]
                a = saturate(a)
                folding.reveal(by_raw[low:high] * a.unsqueeze(1))
                parts.append(a)
            return torch.cat(parts[::-1]).index_select(0, net.places).mT.reshape(v.shape)

    def _diagonal(self, of: Tensor, by: Tensor) -> Tensor:
        """The derivative of what depends entry by entry."""
        return torch.autograd.grad(of, by, torch.ones_like(of), retain_graph=True)[0]


class _Implicit(torch.autograd.Function):
    r"""A solution :math:`v` of :math:`g(v, \phi) = u` and its log-determinant, derived by the implicit function theorem.

    With :math:`J = \partial g / \partial v` and :math:`a = J^{-\top} \bar v`, the cotangent
    :math:`\bar v` of the solution gives :math:`a` for :math:`u` and
    :math:`-(\partial g / \partial \phi)^\top a` for :math:`\phi`.
    """

    @staticmethod
    def forward(ctx: Any, here: _Linearized, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.here = here
        ctx.save_for_backward(*inputs)
        return here.at.detach(), -here.log_slope.detach().sum(-1)

    @staticmethod
    def backward(ctx: Any, by_v: Tensor, by_log_det: Tensor) -> tuple[Tensor | None, ...]:
        here, (u, context, *others) = ctx.here, ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more: by the stages themselves
            found = here.transform._unfold(u, context, here.weights, in_place=False)
            return None, *_vjp(
                zip(found, (by_v, by_log_det), strict=True),
                [u, context, *others],
                create_graph=True,
            )
        with torch.enable_grad():
            by_log_slope = -by_log_det.unsqueeze(-1).expand_as(by_v)
            a = here.solve_transposed(by_v + vjp([(here.log_slope, by_log_slope)], here.at))
            return (
                None,
                a,
                *_vjp([(here.value, -a), (here.log_slope, by_log_slope)], [context, *others]),
            )


def _vjp(
    outputs: Iterable[tuple[Tensor, Tensor]],
    inputs: list[Tensor | None],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Vector-Jacobian products by those of the inputs that require a gradient."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not wanted:
        return [None] * len(inputs)
    values, vectors = zip(
        *((value, vector) for value, vector in outputs if value.requires_grad), strict=True
    )
    products = iter(
        torch.autograd.grad(values, wanted, vectors, retain_graph=True, create_graph=create_graph)
    )
    return [next(products) if t is not None and t.requires_grad else None for t in inputs]


def _columns(rows: Tensor) -> Tensor:
    """Points of shape ``(*, n)`` as columns, of shape ``(n, batch)``."""
    return rows.reshape(-1, rows.shape[-1]).mT.contiguous()


def named_order(order: Any, features: int, seed: int) -> Any:
    """The entries from first to last; ``None`` for their natural order."""
    generator = torch.Generator().manual_seed(check_size("seed", seed, least=0))
    if not isinstance(order, str):
        return order
    if order == "natural":
        return None
    if order == "reversed":
        return list(reversed(range(check_size("features", features))))
    if order == "random":
        return torch.randperm(features, generator=generator, device="cpu").tolist()
    raise ValueError(
        f"Expected order to be natural, reversed, random or a permutation; got {order!r}."
    )
