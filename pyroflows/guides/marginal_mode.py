"""The mode of a marginal density, found by its values alone."""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._checks import check_size, check_tensor
from .marginal import Conditional

__all__ = ["MarginalMode", "find_marginal_mode"]

# The distance of differences, in whitened units, and the width of the first ones.
DISTANCE, WIDTH = 0.3, 0.3
# A round changes no width by more: curvatures are known only within the present ones.
FLATTEST, SHARPEST = 0.05, 1e6
# The search is over when a step would gain so little, and when all curvatures are so near one.
GAIN, NEAR_ONE = 1e-2, 0.3
# It stands still after so many rounds in turn that raise the density by less than that gain, leave
# the locals further from their mode, or climb as steeply as before: to a pole. It has found a mode
# even so if no logarithm of a curvature is further from zero.
STILL_ROUNDS, UNSETTLED, STEEP, ROUGH = 3, 0.1, 1.0, 2.0
# Points of the lowest density count as so far below the best, or as far as its size if that is
# more: of many rows the density falls by far within a step.
DEEPEST = 1e4
LENGTHS = 2.0 ** torch.arange(1.0, -7.0, -1.0)
# More globals have their mixed differences on one side only, and anew after so many widths only.
FEW, FAR = 8, 1.0


class MarginalMode(NamedTuple):
    """The mode of a marginal density.

    Attributes:
        loc: The globals there, of shape ``(features,)``.
        root: The lower root of their covariance by the curvature there, of shape
            ``(features, features)``.
        reference: The mean of the locals there, of shape ``(locals,)``.
        rounds: How many rounds the search took.
        found: Whether it is a mode: not if the rounds were over before, or the search stood still.
    """

    loc: Tensor
    root: Tensor
    reference: Tensor
    rounds: int
    found: bool


class Integrated(Protocol):
    """The log density of globals with the locals integrated out, whose values take their mean with
    them, as that of :class:`pyroflows.guides.marginal.Marginal` does."""

    @property
    def features(self) -> int: ...
    @property
    def initial(self) -> Tensor: ...
    @property
    def reference(self) -> Tensor: ...
    @property
    def is_normal(self) -> bool: ...

    def evaluate(self, g: Tensor, reference: Tensor | None = ...) -> tuple[Tensor, Tensor]:
        """The log density and the means of the locals."""

    def condition(self, g: Tensor, reference: Tensor, steps: int | None = ...) -> Conditional:
        """The locals given globals."""


class _Point(NamedTuple):
    loc: Tensor
    value: Tensor
    reference: Tensor
    # Whether the locals are at their mode.
    settled: bool


def find_marginal_mode(
    marginal: Integrated,
    starts: int = 16,
    rounds: int = 25,
    seed: int = 0,
    start: Tensor | None = None,
    reference: Tensor | None = None,
) -> MarginalMode:
    r"""Finds the mode of the globals with the locals integrated out.

    The joint density of a centred hierarchy grows without bound as its groups come together, and
    has no mode worth the name; the marginal density has. Each round takes the gradient and the
    Hessian by central differences along the columns of the present root :math:`L`, renews the root,
    :math:`L \leftarrow L V |w|^{-1/2}`, and moves to the best of a series of steps. The locals
    start from their mean at the best point so far. Of more than eight globals the mixed differences
    are taken anew only when the search has gone far. It stops early if it stands still, and reads
    the deadline in every evaluation.

    Args:
        marginal: The marginal density.
        starts: Around the start of the density so many points are tried, of which the best is
            taken.
        rounds: Most rounds; about six are usual.
        seed: Seed of these points.
        start: Globals of shape ``(features,)`` to begin at in place of these points.
        reference: Where the locals begin, of shape ``(locals,)``; where the density does if
            ``None``.

    Returns:
        The mode, or the best point if the rounds are over before; `start` if the density is zero
        there.

    Raises:
        ValueError: If no `start` is given, and the density is zero at all points that are tried.

    Reference:
        Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio, "Identifying and attacking the saddle
        point problem in high-dimensional non-convex optimization", 2014,
        https://arxiv.org/abs/1406.2572

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows.guides.marginal import Marginal
        >>> from pyroflows.model import LogDensity
        >>> from pyroflows.model.structure import find_structure
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("groups", 3):
        ...         effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=y)
        >>> density = LogDensity(model, (torch.tensor([1.0, 2.0, 3.0]),))
        >>> mode = find_marginal_mode(Marginal(density, find_structure(density)))
        >>> mode.loc.round(decimals=3), mode.root.square().round(decimals=3)
        (tensor([1.2000], dtype=torch.float64), tensor([[0.4000]], dtype=torch.float64))
    """
    first = _first_points(marginal, check_size("starts", starts), seed, start)
    now = _best(marginal, first, marginal.reference if reference is None else reference)
    root = WIDTH * torch.eye(marginal.features).to(now.loc)
    if not now.value.isfinite():
        if start is not None:
            return MarginalMode(now.loc, root, now.reference, 0, False)
        raise ValueError("Expected a start near which the density is not zero; got none.")
    lengths = torch.cat([torch.zeros(1), LENGTHS]).to(now.loc)
    if not marginal.features:
        return MarginalMode(now.loc, root, now.reference, 0, now.settled)
    known: Tensor | None = None
    still, lowest = 0, torch.inf
    for number in range(1, check_size("rounds", rounds) + 1):
        mixed = known is None or _distance(root, now.loc - known) > FAR
        gradient, curvature = _differentiate(marginal, now, root, mixed)
        eigenvalues, vectors = torch.linalg.eigh(curvature)
        widths = eigenvalues.abs().clamp(FLATTEST, SHARPEST)
        step = vectors @ ((vectors.mT @ gradient) / widths)
        move, decrement = root @ step, float(gradient @ step)
        if mixed:
            known = now.loc if eigenvalues.amin() >= FLATTEST else None
        root = _lower(root @ (vectors * widths.rsqrt()))
        near = decrement < GAIN and (widths - 1).abs().amax() < NEAR_ONE
        if near and now.settled:
            return MarginalMode(now.loc + move, root, now.reference, number, True)
        before = now
        now = _best(marginal, now.loc + lengths.unsqueeze(-1) * move, now.reference)
        if not now.value.isfinite():
            return MarginalMode(before.loc, root, before.reference, number, False)
        steep = decrement > max(STEEP, lowest / 2)
        moving = now.settled and now.value - before.value > GAIN and not steep
        still, lowest = 0 if moving else still + 1, min(lowest, decrement)
        if still == STILL_ROUNDS:
            # Where it is flat, roots stay rough.
            rough = widths.log().abs().amax() < ROUGH
            found = now.settled and decrement < UNSETTLED and bool(rough)
            return MarginalMode(now.loc, root, now.reference, number, found)
    return MarginalMode(now.loc, root, now.reference, number, False)


def _first_points(marginal: Integrated, starts: int, seed: int, start: Tensor | None) -> Tensor:
    """The points of which the best is taken to start from."""
    first = marginal.initial.double()
    if start is not None:
        return check_tensor("start", start, (len(first),)).to(first).reshape(1, -1)
    noise = torch.randn(starts, len(first), generator=torch.Generator().manual_seed(seed))
    noise[0] = 0
    return first + noise.to(first)


def _distance(root: Tensor, move: Tensor) -> float:
    """The length of a move in units of a root."""
    units = torch.linalg.solve_triangular(root, move.unsqueeze(-1), upper=False)
    return float(units.norm())


def _lower(root: Tensor) -> Tensor:
    """The lower root of the same covariance."""
    upper = torch.linalg.qr(root.mT).R
    return upper.mT * upper.diagonal().sign()


def _best(marginal: Integrated, g: Tensor, reference: Tensor) -> _Point:
    """The point of the highest density."""
    values, means = marginal.evaluate(g, reference)
    best = values.argmax()
    loc, mean = g[best], means[best]
    settled = marginal.is_normal
    if not settled:
        gain = marginal.condition(loc.unsqueeze(0), mean.unsqueeze(0), steps=1).gain
        settled = bool(gain < UNSETTLED)
    return _Point(loc, values[best], mean, settled)


def _differentiate(
    marginal: Integrated, now: _Point, root: Tensor, mixed: bool
) -> tuple[Tensor, Tensor]:
    """The gradient and the negative Hessian in units of a root, by central differences; of more
    than eight globals mixed ones by forward differences, or none."""
    n = len(root)
    central = n <= FEW
    units = DISTANCE * torch.eye(n).to(root)
    chosen = list(itertools.combinations(range(n), 2)) if mixed or central else []
    first, second = torch.tensor(chosen, dtype=torch.long).reshape(-1, 2).unbind(-1)
    pairs = units[first] + units[second]
    design = [0 * units[:1], units, -units, pairs, -pairs if central else pairs[:0]]
    values, _ = marginal.evaluate(now.loc + torch.cat(design) @ root.mT, now.reference)
    values = values.clamp_min(now.value - now.value.abs().clamp_min(DEEPEST))
    middle, up, down, together, opposite = values.split(list(map(len, design)))
    gradient = (up - down) / (2 * DISTANCE)
    curvature = torch.diag_embed((2 * middle - up - down) / DISTANCE**2)
    corners = together - up[first] - up[second] + middle
    if central:
        corners = (corners + opposite - down[first] - down[second] + middle) / 2
    curvature[first, second] = curvature[second, first] = -corners / DISTANCE**2
    return gradient, curvature
