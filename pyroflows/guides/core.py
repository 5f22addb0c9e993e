"""The globals of a model with crossed locals that are not normal: a few are drawn, the rest
integrated."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._random import forked
from ..distributions.elimination import Elimination
from ..distributions.elimination_tree import find_elimination_tree
from ..distributions.quadrature import HermiteNodes, quasi_normal
from ..distributions.sparse_normal import SparseNormal
from ..model.structure import Structure
from .leaves import DEEPEST, FromLaplace, Leaves, integrate_leaves
from .marginal import Conditional, Marginal
from .marginal_mode import MarginalMode
from .skew_noise import SkewNoise
from .warm_reference import FARTHEST, WarmReference

__all__ = ["CoreProposal", "SampledCore", "has_core", "make_core"]

# A larger core has too many directions for importance weights, and the rest of it is integrated on
# a grid, which deep blocks make dear.
LARGEST, DEEPEST_REST = 200, 2
# Draws of the core for each of the globals: an opposite pair.
DRAWS = 2
# Globals at which the proposal is fitted, how much wider they lie than the normal approximation at
# the mode, and how often it is fitted anew.
POINTS, WIDER, ROUNDS = 256, 1.3, 3
# Where slopes are so many times as steep as usual, they are not those of anything like a normal
# distribution.
STEEP = 3.0
# Nodes of the mean of slopes over the rest, which are smooth.
NODES_OF_SLOPES = 3
# The search of the core's mode: most steps, the longest one, and so short that it is over.
MOST_STEPS, LONGEST, SHORT = 12, 3.0, 0.05
# Steps to the place of the proposal, what the last one may gain, and how often one is cut to a
# quarter before it is given up.
STEPS, SETTLED, CUTS = 6, 1e-3, 4
# Entries of the core that the noise of another may depend on.
MOST_NEAR = 3
# The ridge of regressions.
RIDGE = 0.1


class CoreProposal(torch.nn.Module):
    r"""What is fitted of the distribution of which the core is drawn.

    Args:
        globals_: How many globals there are.
        locals_: How many locals.
        noise: The distribution of the core's noise.
    """

    centre: Tensor
    root: Tensor
    tilts: Tensor
    correction: Tensor

    def __init__(self, globals_: int, locals_: int, noise: SkewNoise) -> None:
        super().__init__()
        self.noise = noise
        self.register_buffer("centre", torch.zeros(globals_).double())
        self.register_buffer("root", torch.eye(globals_).double())
        self.register_buffer("tilts", torch.zeros(1 + globals_, locals_).double())
        self.register_buffer("correction", torch.zeros(1 + 2 * globals_).double())

    def tilt(self, g: Tensor) -> Tensor:
        """The slopes of the log joint density where the proposal lies, of shape ``(n, locals)``."""
        return WarmReference(self.centre, self.root, self.tilts[0], self.tilts[1:])(g)

    def correct(self, g: Tensor) -> Tensor:
        """What the middle of the proposal misses of the log density of globals, of shape
        ``(n,)``."""
        return self._terms(g) @ self.correction.to(g)

    def regress_correction(self, g: Tensor, missed: Tensor) -> None:
        """Regresses what is missed, of shape ``(n,)``, on the globals and their squares."""
        ridge = RIDGE * torch.eye(len(self.correction)).to(g)
        design = torch.cat([self._terms(g), ridge])
        wanted = torch.cat([missed, missed.new_zeros(len(ridge))]).unsqueeze(-1)
        self.correction.copy_(torch.linalg.lstsq(design, wanted).solution.squeeze(-1))

    def _terms(self, g: Tensor) -> Tensor:
        u = WarmReference(self.centre, self.root, self.centre, self.root).whiten(g)
        u = u.clamp(-FARTHEST, FARTHEST)
        return torch.cat([torch.ones_like(u[:, :1]), u, u.square()], -1)

    def regress_tilts(self, mode: MarginalMode, tilts: Tensor) -> None:
        """Regresses the tilt on the globals, as in
        :func:`pyroflows.guides.warm_reference.regress_reference`.

        Args:
            mode: The mode of the globals.
            tilts: The tilts there, and a whitened unit to both sides along each axis.
        """
        self.centre.copy_(mode.loc)
        self.root.copy_(mode.root)
        up, down = tilts[1:].chunk(2)
        self.tilts.copy_(torch.cat([tilts.mean(0, keepdim=True), (up - down) / 2]))


class SampledCore(FromLaplace):
    r"""The log density of a model's globals, with a few locals drawn and the rest integrated.

    Of crossed factors, such as persons and items, the locals of the smaller are the core
    :math:`c`: given it and the globals the others, :math:`x`, come in small blocks, which
    :class:`Leaves` integrates. The core is drawn:

    .. math:: p(g) = \mathbb{E}_{q(c \mid g)}\, \frac{p(g, c)}{q(c \mid g)}.

    The distribution :math:`q` is one of slightly skew noise, :class:`SkewNoise`, about the mode of
    :math:`p(c \mid g)`, with the curvature there. That is not where the joint density of core and
    rest has its mode: its slope at :math:`c` and the mean of :math:`x` is the *tilt*, which depends
    on the likelihood alone and so hardly on the globals. An affine function of them serves, and the
    place of the proposal is found as a mode is, by Newton's method.

    Means of slopes over the rest are those of the log density of globals and core, by Fisher's
    identity.

    Args:
        marginal: The marginal density by Laplace's approximation.
        proposal: What is fitted of the distribution of the core.
        count: Nodes along each axis of the rest; odd.

    Attributes:
        core: Which locals are drawn, of shape ``(c,)``.
        rest: Which are integrated.
        leaves: The log density of the globals and the core.

    Reference:
        Andrieu, Roberts, "The pseudo-marginal approach for efficient Monte Carlo computations",
        2009, https://doi.org/10.1214/07-AOS574
    """

    def __init__(self, marginal: Marginal, proposal: CoreProposal, count: int) -> None:
        self.marginal, self.proposal = marginal, proposal
        self.core, self.rest = _split(marginal)
        self.inner = Marginal(marginal.density, _without_core(marginal))
        self.leaves = Leaves(self.inner, count)

    @property
    def nodes(self) -> HermiteNodes:
        """The nodes of the rest."""
        return self.leaves.nodes

    @property
    def usable(self) -> bool:
        """Whether the integrals over the rest are known to be near enough for weights."""
        return self.leaves.usable

    def choose_nodes(self, g: Tensor, reference: Tensor) -> None:
        """Integrates the rest with as many nodes as it needs.

        Args:
            g: Globals of shape ``(n, globals)``.
            reference: Where the locals start, of shape ``(n, locals)``.
        """
        given = self.marginal.condition(g, reference)
        noise = quasi_normal(len(g), len(self.core)).to(given.mean)
        x = given.mean + given.normal.draw_centred(self._pad(noise))
        at = torch.cat([g.double(), x[:, self.core]], -1)
        self.leaves = integrate_leaves(self.inner, at, x[:, self.rest])

    @torch.no_grad()
    def condition(self, g: Tensor, reference: Tensor, steps: int | None = None) -> Conditional:
        """The locals given globals, where the proposal lies.

        Args:
            g: Globals of shape ``(n, globals)``.
            reference: Where the locals start, of shape ``(n, locals)``.
            steps: Most steps of Newton's method.

        Returns:
            The normal distributions of all locals about the mode of the core and the mean of the
            rest; the density of the globals is that of the core in the middle of its proposal.
        """
        placed = self._place(g, reference, steps or STEPS)
        values = self._middle(placed) + self.proposal.correct(g)
        return Conditional(values, placed.x, placed.normal, placed.gain)

    def evaluate(self, g: Tensor, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The log density of globals and the places of the locals.

        Args:
            g: Globals of shape ``(n, globals)``.
            reference: As in :meth:`log_prob`.

        Returns:
            Tensors of shape ``(n,)`` and ``(n, locals)``.
        """
        start = (self.reference if reference is None else reference).expand(len(g), -1)
        parts = [self.condition(few, near)[:2] for few, near in self._chunks(g, start)]
        values, means = map(torch.cat, zip(*parts, strict=True))
        return values, means

    def log_prob(self, g: Tensor, reference: Tensor) -> Tensor:
        """The log density of globals by that of the core in the middle of its proposal, which is
        smooth, and near the mean over draws.

        Args:
            g: Globals of shape ``(n, globals)``.
            reference: Where the locals start, of shape ``(locals,)`` or ``(n, locals)``.

        Returns:
            Tensor of shape ``(n,)``.
        """
        return self.evaluate(g, reference)[0].to(g)

    def sample(self, g: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Draws the locals given globals.

        One of a pair of draws of the core is taken by their weights.

        Args:
            g: Globals of shape ``(n, globals)``.
            reference: As in :meth:`log_prob`.

        Returns:
            The locals, of shape ``(n, locals)``, and an estimate of the log density of the globals,
            of shape ``(n,)``: its exponential is right on average, and weighs globals and locals
            together.
        """
        chunks = self._chunks(g, reference.expand(len(g), -1))
        found = []
        for few, near in chunks:
            placed = self._place(few, near)
            found.append(self._choose(self._draw(placed, self._pairs(placed))))
        x, values = map(torch.cat, zip(*found, strict=True))
        return x.to(g), values.to(g)

    def _choose(self, drawn: _Drawn) -> tuple[Tensor, Tensor]:
        """One of several draws by their weights, and the mean of these."""
        points, near = self._points(drawn)
        rest, values = self._near_by.sample(points, near)
        log_weights = _ratios(values, drawn)
        gumbel = -torch.rand_like(log_weights).log().neg().log()
        chosen = (log_weights + gumbel).argmax(0)
        x = drawn.x.clone()
        x[..., self.rest] = rest.reshape(*x.shape[:-1], -1)
        x = x[chosen, torch.arange(len(chosen), device=chosen.device)]
        values = _average(log_weights)
        return x.where(values.isfinite().unsqueeze(-1), self.reference.to(x)), values

    # The core

    def _pairs(self, placed: _Placed) -> Tensor:
        """Normal numbers in opposite pairs, of shape ``(k, n, core)``."""
        half = torch.randn(DRAWS // 2, len(placed.g), len(self.core)).to(placed.g)
        return torch.cat([half, -half])

    def _middle(self, placed: _Placed) -> Tensor:
        """The log density of globals by that of the core in the middle of its proposal."""
        return self._weigh(
            self._draw(placed, placed.g.new_zeros(1, len(placed.g), len(self.core)))
        )[0]

    @torch.no_grad()
    def _draw(self, placed: _Placed, noise: Tensor) -> _Drawn:
        """Draws of the core about its place, made of standard normal numbers of shape
        ``(k, n, core)``."""
        g, x, normal, _ = placed
        widths = normal.core_root.diagonal(dim1=-2, dim2=-1)
        epsilon, log_det = self.proposal.noise.transform(noise, 1 / widths)
        log_prob = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - log_det
        moved = x + normal.draw_centred(self._pad(epsilon))
        return _Drawn(g, moved, noise, normal.core_root, log_prob + widths.log().sum(-1))

    @torch.no_grad()
    def _place(self, g: Tensor, x: Tensor, steps: int = STEPS) -> _Placed:
        """Finds about where the core has its mode."""
        tilt = self.proposal.tilt(g)
        for _ in range(steps):
            value, slope, precision = self.marginal.differentiate(g, x)
            normal = SparseNormal(self.marginal.elimination, precision, repaired=True)
            step = normal.solve(slope - tilt)
            gain = ((slope - tilt) * step).sum(-1) / 2
            x = self._move(g, x, step, value, tilt)
            if gain.nan_to_num(0).amax() < SETTLED:
                break
        return _Placed(g, x, normal, gain)

    def _move(self, g: Tensor, x: Tensor, step: Tensor, value: Tensor, tilt: Tensor) -> Tensor:
        """The locals after a step, or a part of it, that does not lower the tilted density."""
        length = torch.ones_like(value).unsqueeze(-1)
        for _ in range(CUTS):
            moved = x + length * step
            after = self.marginal.log_joint(g, moved) - (tilt * length * step).sum(-1)
            rises = (after > value - SETTLED).unsqueeze(-1)
            if rises.all():
                return moved
            length = length.where(rises, length / 4)
        return moved.where(rises, x)

    def _weigh(self, drawn: _Drawn) -> Tensor:
        """The log of the density of globals and draws of the core over that of these, of shape
        ``(k, n)``."""
        return _ratios(self._near_by.log_prob(*self._points(drawn)), drawn)

    def _points(self, drawn: _Drawn) -> tuple[Tensor, Tensor]:
        """Globals with draws of the core, and the rest near its mean."""
        g, x = drawn.g.expand(*drawn.x.shape[:-1], -1), drawn.x
        return torch.cat([g, x[..., self.core]], -1).flatten(0, 1), x[..., self.rest].flatten(0, 1)

    @functools.cached_property
    def _near_by(self) -> Leaves:
        """The same integrals from where a step reaches the mode of the rest."""
        return Leaves(self.inner, self.nodes.count, 1)

    def _differentiate(self, g: Tensor, x: Tensor, leaves: Leaves) -> _Slopes:
        """The log density of globals and core, its slopes by the core, and the locals with the rest
        at its mean."""
        nodes, tree = HermiteNodes(NODES_OF_SLOPES), self.inner.tree
        axes = torch.cartesian_prod(*tree.depth * [torch.arange(nodes.count)])
        axes = axes.reshape(-1, tree.depth)
        weights = nodes.log_weights[axes].sum(-1).exp().to(g)
        noise = nodes.points[axes[:, tree.depths]].to(g).unsqueeze(1).expand(-1, len(g), -1)
        at = torch.cat([g, x[:, self.core]], -1)
        draws, values = leaves.sample(at, x[:, self.rest], noise)
        many = x.repeat(len(axes), 1, 1)
        many[..., self.rest] = draws
        _, slopes = self.marginal.value_and_slopes(g.repeat(len(axes), 1), many.flatten(0, 1))
        slopes = slopes.reshape(many.shape)[..., self.core]
        means = torch.einsum("k,kni->ni", weights, many)
        return _Slopes(values, torch.einsum("k,kni->ni", weights, slopes), means)

    def _pad(self, epsilon: Tensor) -> Tensor:
        """Noise of all locals, which is zero but for the core's."""
        padded = epsilon.new_zeros(*epsilon.shape[:-1], len(self.reference))
        padded[..., self.core] = epsilon
        return padded

    @property
    def _size(self) -> int:
        return self.marginal.density.batch_size

    def _chunks(self, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(value.double().split(self._size) for value in values), strict=True)

    # The fit

    def start(self, g: Tensor, reference: Tensor) -> None:
        """Finds the tilt at one point.

        Args:
            g: Globals of shape ``(1, globals)``.
            reference: Where the locals start, of shape ``(1, locals)``.
        """
        self.proposal.tilts[0] = self._find_tilts(g, reference)[0]

    @torch.no_grad()
    def fit(self, mode: MarginalMode, warm: WarmReference) -> None:
        """Fits the distribution of the core about a mode of the globals.

        Args:
            mode: The mode.
            warm: Where the locals start.
        """
        units = torch.eye(self.features).to(mode.root)
        design = mode.loc + torch.cat([0 * units[:1], units, -units]) @ mode.root.mT
        self.proposal.regress_tilts(mode, self._find_tilts(design, warm(design)))
        g = mode.loc + WIDER * quasi_normal(POINTS, self.features).to(mode.loc) @ mode.root.mT
        placed = [self._place(few, near) for few, near in self._chunks(g, warm(g))]
        with forked(0):
            self._fit_noise(placed)
            self._fit_correction(placed)

    def _find_tilts(self, g: Tensor, reference: Tensor) -> Tensor:
        """The slopes of the log joint density at the mode of the core and the mean of the rest."""
        chunks = self._chunks(g, reference)
        return torch.cat([self._find_mode(few, near).tilt for few, near in chunks])

    @torch.no_grad()
    def _find_mode(self, g: Tensor, x: Tensor) -> _Mode:
        """The mode of the core, with the rest integrated."""
        now, size = self._differentiate(g, x, self.leaves), g.new_ones(len(g), 1)
        for _ in range(MOST_STEPS):
            _, tilt, precision = self.marginal.differentiate(g, now.x)
            normal = SparseNormal(self.marginal.elimination, precision, repaired=True)
            step = _solve(normal.core_root, now.slopes)
            length = step.norm(dim=-1, keepdim=True)
            if (length < SHORT).all():
                break
            step = size * step * (LONGEST / length).clamp(max=1.0)
            moved = now.x + normal.draw_centred(self._pad(step))
            after = self._differentiate(g, moved, self.leaves)
            better = after.value > now.value - SHORT
            now = now.replaced_by(after, better)
            size = (2 * size).clamp(max=1.0).where(better.unsqueeze(-1), size / 4)
        return _Mode(now.x, tilt)

    def _fit_noise(self, placed: Sequence[_Placed]) -> None:
        for _ in range(ROUNDS):
            drawn = [self._draw(each, self._pairs(each)[:1]) for each in placed]
            roots = torch.cat([each.root for each in drawn])
            slopes = torch.cat([self._slopes_of_noise(each) for each in drawn])
            n = torch.cat([each.noise[0] for each in drawn])
            steepness = slopes.norm(dim=-1).nan_to_num(torch.inf)
            usable = steepness < STEEP * steepness.median()
            sizes = 1 / roots.diagonal(dim1=-2, dim2=-1)
            self.proposal.noise.regress(n[usable], sizes[usable], slopes[usable])

    def _fit_correction(self, placed: Sequence[_Placed]) -> None:
        """Compares the middle of the proposal with draws."""
        missed = []
        for each in placed:
            draws = _average(self._weigh(self._draw(each, self._pairs(each))))
            missed.append(draws - self._middle(each))
        g, missed_there = torch.cat([each.g for each in placed]), torch.cat(missed)
        usable = missed_there.isfinite()
        self.proposal.regress_correction(g[usable], missed_there[usable])

    def _slopes_of_noise(self, drawn: _Drawn) -> Tensor:
        """The slopes of the log density of globals and core by the noise of the core."""
        slopes = self._differentiate(drawn.g, drawn.x[0], self._near_by).slopes
        return _solve(drawn.root, slopes)


class _Slopes(NamedTuple):
    """The log density of globals and core, of shape ``(n,)``, its slopes by the core, of shape
    ``(n, c)``, and the locals with the rest at its mean."""

    value: Tensor
    slopes: Tensor
    x: Tensor

    def replaced_by(self, other: _Slopes, where: Tensor) -> _Slopes:
        """Those of another at some points."""
        value, slopes, x = zip(other, self, strict=True)
        column = where.unsqueeze(-1)
        return _Slopes(
            value[0].where(where, value[1]),
            slopes[0].where(column, slopes[1]),
            x[0].where(column, x[1]),
        )


class _Mode(NamedTuple):
    """The mode of the core and the mean of the rest, and the slopes of the log joint density
    there."""

    x: Tensor
    tilt: Tensor


class _Placed(NamedTuple):
    """Globals, where their core has its mode, the normal distributions there, and what the last
    step was to gain."""

    g: Tensor
    x: Tensor
    normal: SparseNormal
    gain: Tensor


class _Drawn(NamedTuple):
    """Draws of the core given globals: the locals, of shape ``(k, n, locals)``, the numbers they
    are made of, the lower root of the precision of the core, and the log density of the draws."""

    g: Tensor
    x: Tensor
    noise: Tensor
    root: Tensor
    log_prob: Tensor


def has_core(marginal: Marginal) -> bool:
    """Whether the locals of a model are not normal and come in large blocks, but in small ones
    given a few of them.

    Args:
        marginal: The marginal density of the globals.
    """
    if not 0 < len(marginal.elimination.core) <= LARGEST or marginal.is_normal:
        return False
    if marginal.tree.depth <= DEEPEST:
        return False
    structure = _without_core(marginal)
    elimination = Elimination(len(structure.locals), structure.local_edges)
    return 0 < find_elimination_tree(elimination).depth <= DEEPEST_REST


def make_core(marginal: Marginal) -> CoreProposal:
    """Makes the proposal of a core, which has to be fitted.

    Args:
        marginal: The marginal density of the globals, which has a core.
    """
    core = marginal.elimination.core
    places = torch.full((len(marginal.reference),), -1)
    places[core] = torch.arange(len(core))
    edges = places[marginal.structure.local_edges].sort(-1).values
    near: list[list[int]] = [[] for _ in core]
    for first, second in edges[(edges >= 0).all(-1)].tolist():
        near[second].append(first)
    width = min(MOST_NEAR, max(map(len, near)))
    rows = [(row + width * [-1])[:width] for row in near]
    noise = SkewNoise(torch.tensor(rows, dtype=torch.long).reshape(len(core), width))
    return CoreProposal(marginal.features, len(marginal.reference), noise)


def _split(marginal: Marginal) -> tuple[Tensor, Tensor]:
    """The places of the core among the locals, and those of the rest."""
    core = marginal.elimination.core
    others = torch.ones(len(marginal.reference), dtype=torch.bool)
    others[core] = False
    return core, others.nonzero().squeeze(-1)


def _without_core(marginal: Marginal) -> Structure:
    """The structure whose globals are the globals and the core."""
    structure, (core, rest) = marginal.structure, _split(marginal)
    globals_ = torch.cat([structure.globals, structure.locals[core]])
    return dataclasses.replace(structure, globals=globals_, locals=structure.locals[rest])


def _ratios(values: Tensor, drawn: _Drawn) -> Tensor:
    """Log densities at draws over those of the draws, of shape ``(k, n)``."""
    log_weights = values.reshape(drawn.log_prob.shape) - drawn.log_prob
    return log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def _average(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def _solve(root: Tensor, slopes: Tensor) -> Tensor:
    """The slopes by the noise of the core, from those by the core."""
    return torch.linalg.solve_triangular(root, slopes.unsqueeze(-1), upper=False).squeeze(-1)
