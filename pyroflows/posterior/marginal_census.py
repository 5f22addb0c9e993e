"""A census of the modes of a few globals, by the values of their log density alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._checks import check_size
from .._deadline import TimeOver
from .._random import forked
from ..guides.marginal import Marginal
from ..guides.marginal_mode import MarginalMode
from ..model import prediction as simulate
from ..transforms.roots import triangle
from .census import (
    DIP,
    FAR_OUT,
    SPREADS,
    UNIFORM,
    Census,
    LogProb,
    dips,
    find_flat_direction,
    first_fit_alone,
    list_different,
    pick_separate,
    weigh_fits,
    weigh_missed,
)
from .gaussian import Gaussian, Gaussians

__all__ = [
    "Ascend",
    "find_flat_ridge",
    "missed_globals",
    "prior_globals",
    "take_marginal_census",
]

#: From a point of shape ``(features,)`` to the mode above it.
Ascend = Callable[[Tensor], MarginalMode]

STARTS = 48
PRIOR_DRAWS = 16
# Points on the line from a start to the mode, whose distances from the mode fall by one factor.
POINTS = 8
MOST_ASCENTS = 6
# From so many starts one step is made upwards, by differences at a distance of so many widths.
STEPS_UP, WIDTH = 6, 0.3
LENGTHS = 2.0 ** torch.arange(1.0, -7.0, -1.0)
# Points on the lines that tell whether an ascent has been made from next to a point before.
NEXT_TO = 7
# Draws that weigh a fit.
DRAWS = 64
# Random choices of entries that change their signs, besides all entries and each alone.
FLIPS = 8
# A mode so many widths from zero may have a mirror image that is another.
MIRRORED = 3.0
# Most entries of every second start are those of the mode: about so many are not.
MOVED_ENTRIES = 2
# Where a scale is next to nothing its model fails, as far out as improper densities are looked for.
DISTANCES = (1e6, 1e4, 1e2)
# Distances at which the top of a ridge is found anew, each time by so many steps.
RIDGE, STEPS_ACROSS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6), 3
# Widths from which on a plateau shows.
PLATEAU = 20.0


@torch.no_grad()
def take_marginal_census(
    log_prob: LogProb,
    mode: MarginalMode,
    ascend: Ascend,
    prior: Tensor | None = None,
    starts: int = STARTS,
    seed: int = 0,
    improper: Sequence[int] = (),
) -> Census:
    r"""Looks for modes of a density whose values are dear and whose gradients are not known.

    From starts spread far and wide, straight lines run to the mode that is known. Where the density
    dips on a line, its start may lie in the basin of another mode. The densest points before such
    dips are ascended from, unless a line without a dip leads to an ascent that was made before.

    On a line along which many entries change at once a dip in one of them does not show. So in half
    of the starts most entries are those of the mode, and from a few points that are denser than the
    normal approximation says, one step of steepest ascent is made before lines run from there too.
    Some starts are the mode with some of its signs changed, because the density of a loading may
    not know its sign, and some lie on its axes.

    One mode costs about :math:`9\, \mathrm{starts} + 64` values, and a density that is not normal
    some :math:`100 + 8\, \mathrm{features}` more. A mode that is much narrower than the first is
    found only in few dimensions, or from a start near it.

    Args:
        log_prob: The log density, from points of shape ``(n, features)`` to ``(n,)``; not finite
            where it is zero.
        mode: A mode, the first to be known.
        ascend: From a point of shape ``(features,)`` to the mode above it.
        prior: Further starts, such as draws from the prior, of shape ``(n, features)``.
        starts: How many starts to take in all.
        seed: Seed of the starts.
        improper: Entries whose prior is improper, along which a plateau is looked for.

    Returns:
        The census; its modes are those that the ascents have found. If the time is over before it
        is finished, it has the first fit alone.

    Raises:
        TimeOver: If the time is over before the mode has been evaluated.

    Example:
        >>> def log_prob(z):
        ...     return -0.5 * ((z.squeeze(-1).abs() - 5) / 0.5).square()
        >>> def at(loc):
        ...     return MarginalMode(torch.tensor([loc]), torch.tensor([[0.5]]), torch.zeros(0), 1, True)
        >>> def ascend(start):
        ...     return at(5.0 * float(start.sign()))
        >>> census = take_marginal_census(log_prob, at(5.0), ascend)
        >>> census.modes.loc.sort(0).values.squeeze(-1), census.weights
        (tensor([-5.,  5.]), tensor([0.5000, 0.5000]))
    """

    def density(z: Tensor) -> Tensor:
        if not len(z):
            return z[..., 0]
        values = log_prob(z.reshape(-1, z.shape[-1])).reshape(z.shape[:-1])
        return values.where(values.isfinite(), -math.inf)

    first = _fits(density, [mode])
    try:
        with forked(seed):
            points = _spread_starts(mode, prior, check_size("starts", starts))
        others = _find_others(density, mode, ascend, points)
        census = _compare(density, [mode, *others])
        if census.flat_direction is None and improper:
            return census._replace(flat_direction=_find_plateau(density, mode, improper))
        return census
    except TimeOver:
        return first_fit_alone(first)


def prior_globals(marginal: Marginal, count: int = PRIOR_DRAWS) -> Tensor | None:
    """Draws globals from their prior.

    Args:
        marginal: The density of the globals.
        count: How many draws; they come from torch's random state.

    Returns:
        Tensor of shape ``(n, features)``, with the draws at which the model can be evaluated; or
        ``None``, as for an improper prior.
    """
    prior = simulate.prior_draws(marginal.density, count)
    if not prior:
        return None
    return marginal.density.unconstrain(prior)[:, marginal.structure.globals].double()


@torch.no_grad()
def find_flat_ridge(log_prob: LogProb, fit: Gaussian) -> Tensor | None:
    """Looks for a direction in which a density does not fall off, though it is known roughly.

    Curvatures by differences tell a direction to some digits, and a million widths out each of
    them is a wall. So from ten widths on, where the density has not fallen, each further
    point is moved to the top of the ridge, across it, before its height is read.

    Args:
        log_prob: The log density.
        fit: A fit of its bulk.

    Returns:
        The direction, of shape ``(features,)``, or ``None``.
    """
    found = find_flat_direction(log_prob, fit, DISTANCES)
    if found is not None:
        return found
    root = triangle(fit.scale_tril)
    axes = torch.cat([root.mT, -root.mT])
    top = log_prob(fit.loc.unsqueeze(0))
    for axis in axes[top - log_prob(fit.loc + RIDGE[0] * axes) < math.log(RIDGE[0])]:
        ridge = _follow_ridge(log_prob, fit, top, axis)
        if ridge is not None:
            return ridge
    return None


def _follow_ridge(log_prob: LogProb, fit: Gaussian, top: Tensor, axis: Tensor) -> Tensor | None:
    """The direction of a ridge that is as high far out as a density without bound."""
    root, direction = triangle(fit.scale_tril), axis
    for distance in RIDGE:
        point = fit.loc + distance * direction
        for _ in range(STEPS_ACROSS):
            near = log_prob(point + WIDTH * torch.cat([root.mT, -root.mT]))
            up, down = near.nan_to_num(0.0, 0.0, 0.0).chunk(2)
            point = point + root @ ((up - down) / (2 * WIDTH))
        height = log_prob(point.unsqueeze(0))
        if not height.isfinite():
            break
        if top - height >= math.log(distance):
            return None
        direction = (point - fit.loc) / distance
    return direction


def missed_globals(
    log_prob: LogProb, log_q: Callable[[Tensor], Tensor], log_evidence: float, fits: Gaussians
) -> Tensor:
    """Estimates the mass that a guide misses, as :func:`pyroflows.posterior.census.missed_mass`
    does, by fewer draws.

    Args:
        log_prob: The log density.
        log_q: Log density of the guide, from points of shape ``(n, features)`` to ``(n,)``.
        log_evidence: The guide's estimate of the log evidence.
        fits: The local fits of a census.

    Returns:
        For each fit the mass in units of the evidence, of shape ``(count,)``.
    """
    drawn = weigh_fits(log_prob, fits, DRAWS)
    return weigh_missed(drawn, log_q, log_evidence).exp().mean(-1).nan_to_num(nan=0.0)


def _compare(density: LogProb, found: list[MarginalMode]) -> Census:
    """Takes the census of all modes and ends of ascents."""
    fits = _fits(density, found)
    different = list_different(fits)
    is_mode = torch.tensor([mode.found for mode in found], device=different.device)[different]
    fits = fits.pick(different)
    _, log_p, log_c = weigh_fits(density, fits, DRAWS)
    log_weights = log_p - log_c
    fits = fits._replace(elbo=log_weights.mean(-1))
    evidence = log_weights.logsumexp(-1) - math.log(DRAWS)
    modes, weights = fits.pick(is_mode), evidence[is_mode]
    if bool(is_mode.any()):
        modes, weights = pick_separate(density, modes, weights)
    fits = fits.pick(fits.elbo.argsort(descending=True))
    return Census(fits, modes, weights, find_flat_ridge(density, fits.one(0)))


def _find_plateau(density: LogProb, mode: MarginalMode, entries: Sequence[int]) -> Tensor | None:
    """A direction along one of some entries in which the density stays at one height, however low:
    a proper one falls by more than one half from so many widths to twice as many."""
    units = torch.eye(len(mode.loc))[list(entries)].to(mode.loc)
    axes = mode.root.norm(dim=-1) * torch.cat([units, -units])
    near, far = (density(mode.loc + distance * axes) for distance in (PLATEAU, 2 * PLATEAU))
    flat = near.isfinite() & far.isfinite() & (near - far < math.log(2))
    return axes[flat.nonzero()[0, 0]] if bool(flat.any()) else None


def _fits(density: LogProb, found: list[MarginalMode]) -> Gaussians:
    """The fits by curvature, whose ELBOs are those of normal densities; ends come after modes."""
    loc = torch.stack([mode.loc for mode in found])
    root = torch.stack([mode.root for mode in found])
    constant = 0.5 * loc.shape[-1] * math.log(2 * math.pi)
    elbo = density(loc) + torch.linalg.slogdet(root)[1] + constant
    is_mode = torch.tensor([mode.found for mode in found], device=loc.device)
    return Gaussians(loc, root, elbo.where(is_mode, -math.inf))


def _find_others(
    density: LogProb, mode: MarginalMode, ascend: Ascend, starts: Tensor
) -> list[MarginalMode]:
    """Ascends from the densest points beyond dips, each in a region of its own."""
    ends: list[MarginalMode] = []
    begun = starts[:0]
    for point in _beyond_dips(density, mode, starts):
        if len(ends) == MOST_ASCENTS:
            break
        if ends:
            nearest = int(_distances(mode, begun, point).argmin())
            reached = (begun[nearest], ends[nearest].loc)
            if not all(dips(density, point, end, NEXT_TO) for end in reached):
                continue
        begun = torch.cat([begun, point.unsqueeze(0)])
        ends.append(ascend(point))
    return ends


def _beyond_dips(density: LogProb, mode: MarginalMode, starts: Tensor) -> Tensor:
    """The densest points from which the density dips on the way to the mode, densest first."""
    lines, values = _look(density, mode, starts)
    stepped = _step_up(density, mode, *_pick_excessive(mode, lines, values))
    more_lines, more_values = _look(density, mode, stepped)
    lines, values = torch.cat([lines, more_lines]), torch.cat([values, more_values])
    lowest_after = values.flip(-1).cummin(-1).values.flip(-1)
    return _pick_densest(lines, values, values - lowest_after > DIP)[0]


def _pick_densest(lines: Tensor, values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The densest of the chosen points of each line that has one, densest first."""
    height, index = values.where(chosen, -math.inf).max(-1)
    order = height.argsort(descending=True)[: int(height.isfinite().sum())]
    return lines[order, index[order]], height[order]


def _look(density: LogProb, mode: MarginalMode, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Points on the lines from starts to the mode, both included, and the density there."""
    at_starts = density(starts)
    starts, at_starts = starts[at_starts.isfinite()], at_starts[at_starts.isfinite()]
    # One width from the mode nothing is left to be told apart.
    shortest = 1 / _distances(mode, starts, mode.loc).clamp(min=2.0)
    powers = torch.arange(1, POINTS + 1).to(starts) / POINTS
    fractions = shortest.unsqueeze(-1) ** powers
    lines = mode.loc + fractions.unsqueeze(-1) * (starts - mode.loc).unsqueeze(-2)
    top = density(mode.loc.unsqueeze(0))
    points = torch.cat([starts.unsqueeze(-2), lines, mode.loc.expand(len(starts), 1, -1)], -2)
    values = [at_starts.unsqueeze(-1), density(lines), top.expand(len(starts), 1)]
    return points, torch.cat(values, -1)


def _pick_excessive(mode: MarginalMode, lines: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The points that are denser than the normal approximation at the mode says, one of a line, and
    the density there."""
    distances = _distances(mode, lines.flatten(0, 1), mode.loc).reshape(values.shape)
    excess = values - values[:, -1:] + distances.square() / 2
    points, values = _pick_densest(lines, values, excess > DIP)
    return points[:STEPS_UP], values[:STEPS_UP]


def _step_up(density: LogProb, mode: MarginalMode, points: Tensor, values: Tensor) -> Tensor:
    """Where a step of steepest ascent leads, in widths of the mode."""
    near = density(points.unsqueeze(-2) + WIDTH * mode.root.mT)
    slopes = ((near - values.unsqueeze(-1)) / WIDTH).nan_to_num(0.0, 0.0, 0.0)
    steps = LENGTHS.to(points).unsqueeze(-1) * (slopes @ mode.root.mT).unsqueeze(-2)
    tried = points.unsqueeze(-2) + steps
    return tried[torch.arange(len(points), device=points.device), density(tried).argmax(-1)]


def _distances(mode: MarginalMode, points: Tensor, centre: Tensor) -> Tensor:
    """Distances in widths of the mode."""
    offsets = (points - centre).mT
    return torch.linalg.solve_triangular(mode.root, offsets, upper=False).norm(dim=0)


def _spread_starts(mode: MarginalMode, prior: Tensor | None, count: int) -> Tensor:
    """Mirror images of the mode and points on its axes, and random points, most of them beside it
    in few entries."""
    n, like = len(mode.loc), mode.loc
    systematic = torch.cat([_mirror(mode), _axes(mode)])[: count // 2]
    share = (count - len(systematic)) // 5
    points = [
        size * (2 * torch.rand(share, n, device="cpu") - 1).to(like) for size in (UNIFORM, *FAR_OUT)
    ]
    if prior is not None:
        points.append(prior[:share].to(like))
    around = count - len(systematic) - sum(map(len, points))
    noise = torch.randn(around, n, device="cpu").to(like) @ mode.root.mT
    spreads = like.new_tensor(SPREADS).repeat(around)[:around]
    points.append(mode.loc + spreads.unsqueeze(-1) * noise)
    scattered = torch.cat(points)
    moved = torch.rand(scattered.shape, device="cpu").to(like) < MOVED_ENTRIES / n
    moved[::2] = True
    starts = torch.cat([systematic, scattered.where(moved, mode.loc)])
    return starts[starts.isfinite().all(-1)]


def _mirror(mode: MarginalMode) -> Tensor:
    """The mode with some of its signs changed, where that takes it far."""
    n, like = len(mode.loc), mode.loc
    everything = torch.ones(1, n, dtype=torch.bool)
    some = torch.rand(FLIPS, n, device="cpu") < 0.5
    flips = torch.cat([everything, torch.eye(n, dtype=torch.bool), some]).unique(dim=0)
    images = mode.loc.where(~flips.to(like.device), -mode.loc)
    return images[_distances(mode, images, mode.loc) > MIRRORED]


def _axes(mode: MarginalMode) -> Tensor:
    """Points on the axes of the mode, both ways, in random order."""
    axes = SPREADS[-1] * torch.cat([mode.root.mT, -mode.root.mT])
    return mode.loc + axes[torch.randperm(len(axes), device="cpu").to(axes.device)]
