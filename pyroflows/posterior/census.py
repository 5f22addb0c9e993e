"""A census of the modes of a log density: many ascents at once from starts spread far and wide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._deadline import TimeOver
from .._random import forked
from ..model import prediction as simulate
from ..model.density import LogDensity
from ..model.explanation import explain
from ..model.rounding import is_sound, without_noise
from ..transforms.low_rank import DENSE, TRIANGULAR
from ..transforms.roots import (
    is_finite,
    log_det,
    multiply_root,
    multiply_transposed,
    pick_root,
    solve_root,
)
from .gaussian import WIDEST, Gaussian, Gaussians, fit_gaussians
from .pathfinder import find_flat_axes, fit_low_rank, sharpen

__all__ = [
    "Census",
    "LogProb",
    "dips",
    "find_flat_direction",
    "find_start",
    "first_fit_alone",
    "has_missed",
    "list_different",
    "missed_mass",
    "pick_separate",
    "take_census",
    "weigh_fits",
    "weigh_missed",
    "widen_census",
]

#: From points of shape ``(*, features)`` to log densities of shape ``(*)``.
LogProb = Callable[[Tensor], Tensor]

STARTS = 96
# Gradient evaluations per iteration, over all ascents; a finite-difference Hessian costs 2D of
# them.
GRADIENTS = 24_576
# Draws for the evidence of a local fit.
DRAWS = 256
MOST_FITS = 24
# So many of a fit's draws of highest density are looked at, whether rounding has raised it.
HIGHEST = 4
# Spread of the starts around the first fit, in its standard deviations.
SPREADS = (3.0, 10.0)
# Stan's own: uniform numbers of the unconstrained space. Others lie further out, because the first
# fit may be of a mode so thin that nothing around it, in its widths, is far.
UNIFORM = 2.0
FAR_OUT = (6.0, 20.0)
# A mode has no slope, in units of its own width.
FLAT = 0.1
# Nats by which the density dips on the line between two modes.
DIP = 1.0
# Smallest share of the evidence at which a mode is reported.
LEAST_MASS = 0.01
# How far out a density must have fallen off, in widths of a fit.
FAR = 1e6
# Ends of ascents in many dimensions that get the whole curvature, and the steps that it takes.
MOST_REFINED, REFINING_STEPS = 6, 6
# A region is missed where the guide's density is below the posterior's by this factor.
MISSED = 20.0


class Census(NamedTuple):
    """Local Gaussian fits of a log density.

    Attributes:
        fits: All that differ, best ELBO first.
        modes: Those at separate maxima of the density that carry mass, heaviest first; there may be
            none.
        weights: Shares of their masses, of shape ``(modes,)``.
        flat_direction: A direction in which the density does not fall off, of shape
            ``(features,)``; ``None`` if the search has found none.
        finished: Whether there was time for all of the search; otherwise there is one fit.
    """

    fits: Gaussians
    modes: Gaussians
    weights: Tensor
    flat_direction: Tensor | None = None
    finished: bool = True

    @property
    def best(self) -> Gaussian:
        """The fit with the best ELBO."""
        return self.fits.one(0)


def take_census(
    density: LogDensity,
    start: Tensor,
    starts: int = STARTS,
    seed: int = 0,
) -> Census:
    """Fits Gaussians from many starts and tells which of them are separate modes.

    The starts are the given one, draws from the prior, uniform numbers, and points far around the
    first fit.

    Args:
        density: The log density.
        start: A point of shape ``(features,)`` with a finite log density.
        starts: How many starts besides the given one; fewer where there are many features.
        seed: Seed of the starts and of the draws that weigh the fits.

    Returns:
        The census. If the time is over before it is finished, it has the first fit alone.

    Raises:
        TimeOver: If the time is over before the start has been evaluated.
    """
    with forked(seed):
        first, first_end = _fit(density, start.unsqueeze(0), DRAWS)
        try:
            return _search(density, first, first_end, starts)
        except TimeOver:
            return first_fit_alone(first)


def first_fit_alone(first: Gaussians) -> Census:
    """Returns the census of which there was no time for more than the first fit."""
    none = first.pick(torch.zeros_like(first.elbo, dtype=torch.bool))
    return Census(first, none, none.elbo, finished=False)


def _search(density: LogDensity, first: Gaussians, first_end: Gaussians, starts: int) -> Census:
    """Takes the census from the first fit on."""
    count = max(12, min(starts, GRADIENTS // (2 * density.features + 36)))
    others = _spread_starts(density, first.one(0), count)
    best, end = _fit(density, others)
    found, ends = _sound(density, _join(first, best), _join(first_end, end))
    fits = _score(density, _drop_duplicates(found))
    modes, weights = _find_modes(density, ends)
    top = fits.one(0)
    axes = find_flat_axes(density, top.loc, top.scale_tril)
    return Census(fits, modes, weights, find_flat_direction(density.log_prob, top, axes=axes))


def widen_census(density: LogDensity, census: Census, points: Tensor) -> Census:
    """Adds ascents from more points, such as draws of a guide whose weights are large.

    Args:
        density: The log density.
        census: The census so far.
        points: Where to start, of shape ``(count, features)``, with finite log densities.

    Returns:
        The census of all ascents.
    """
    best, end = _fit(density, points)
    found, ends = _sound(density, _join(best), _join(end))
    fits = _score(density, _drop_duplicates(_join(census.fits, found)))
    modes, weights = _find_modes(density, _join(census.modes, ends))
    return Census(fits, modes, weights, census.flat_direction)


def find_start(density: LogDensity, tries: int = 256) -> Tensor:
    """Finds a point of finite density: the initial one, or the densest of some random ones.

    Args:
        density: The log density.
        tries: How many random points to try.

    Returns:
        A point of shape ``(features,)`` with a finite log density and gradient.

    Raises:
        ValueError: If there is none; the sentence names the site at fault.
    """
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(tries, density.features, generator=generator, device="cpu")
    spread = UNIFORM * (2 * uniform - 1)
    for points in (density.initial.unsqueeze(0), spread.to(density.initial)):
        values, slopes = density.value_and_grad(points)
        usable = values.isfinite() & slopes.isfinite().all(-1)
        if bool(usable.any()):
            return points[values.masked_fill(~usable, -math.inf).argmax()]
    raise ValueError(
        "Expected a model with a finite log density where it starts; "
        f"{explain(density, density.initial)}. Look for NaN in the data, and for data outside of a "
        "support."
    )


def find_flat_direction(
    log_prob: LogProb,
    fit: Gaussian,
    distances: Sequence[float] = (FAR,),
    axes: Tensor | None = None,
) -> Tensor | None:
    r"""Looks along the axes of a fit for a direction in which a density does not fall off.

    Along each axis, :math:`t =` a million widths out, a proper density has fallen to less than
    :math:`1 / t`, unless it has a horn that narrow.

    Args:
        log_prob: The log density.
        fit: A fit of its bulk.
        distances: The distances :math:`t`, furthest first; the first at which the density can be
            evaluated decides.
        axes: Directions to look along, of shape ``(count, features)``; those of the fit if
            ``None``.

    Returns:
        The direction, of shape ``(features,)``, or ``None``.
    """
    axes = fit.scale_tril.mT if axes is None else axes  # type: ignore[union-attr]
    axes = torch.cat([axes, -axes])
    # Without curvature Newton's steps widen a fit until rounding hides the density.
    flat = axes.abs().amax(-1) > WIDEST / FAR
    unknown = torch.ones_like(flat)
    top = log_prob(fit.loc.unsqueeze(0))
    for distance in distances:
        # A point so far out at which the density is not a number counts as zero density.
        far = log_prob(fit.loc + distance * axes[unknown])
        known = far.isfinite()
        flat[unknown.clone()] |= known & (top - far < math.log(distance))
        unknown[unknown.clone()] = ~known
    return axes[flat.nonzero()[0, 0]] if bool(flat.any()) else None


def missed_mass(
    density: LogDensity, log_q: Callable[[Tensor], Tensor], log_evidence: float, fits: Gaussians
) -> Tensor:
    r"""Mass of the posterior where a guide has next to none, as far as local fits reach it.

    For a local fit :math:`c` it is the estimate, by draws of :math:`c`, of

    .. math:: \frac{1}{Z} \int p(z)\, 1[p(z) > 20\, Z\, q(z)]\, \mathrm{d}z.

    Args:
        density: The log density.
        log_q: Log density of the guide, from points of shape ``(n, features)`` to ``(n,)``.
        log_evidence: The guide's estimate of :math:`\log Z`.
        fits: The local fits.

    Returns:
        For each fit the mass in units of the evidence, of shape ``(count,)``.
    """
    drawn = weigh_fits(density.log_prob, fits)
    log_ratio = weigh_missed(drawn, log_q, log_evidence)
    flat = without_noise(density, drawn[0].flatten(0, 1), log_ratio.flatten())
    return flat.reshape(log_ratio.shape).exp().mean(-1).nan_to_num(nan=0.0)


def weigh_missed(
    drawn: tuple[Tensor, Tensor, Tensor], log_q: Callable[[Tensor], Tensor], log_evidence: float
) -> Tensor:
    """Gives draws of local fits their weights where a guide has next to no density, else none.

    Args:
        drawn: What :func:`weigh_fits` returns.
        log_q: Log density of the guide, from points of shape ``(n, features)`` to ``(n,)``.
        log_evidence: The guide's estimate of the log evidence.

    Returns:
        Log weights in units of the evidence, of shape ``(count, draws)``.
    """
    z, log_p, log_c = drawn
    with torch.no_grad():
        log_guide = log_q(z.flatten(0, 1)).reshape(log_p.shape)
    missed = has_missed(log_p, log_guide, log_evidence)
    return (log_p - log_c - log_evidence).masked_fill(~missed, -math.inf)


def has_missed(log_p: Tensor, log_q: Tensor, log_evidence: float) -> Tensor:
    """Tells at which points a guide has next to none of the density that the posterior has.

    Args:
        log_p: Log joint at the points, of any shape.
        log_q: Log density of the guide there; NaN where the guide cannot reach.
        log_evidence: The guide's estimate of the log evidence.
    """
    return log_p - log_evidence - log_q.nan_to_num(nan=-math.inf) > math.log(MISSED)


def _fit(
    density: LogDensity, starts: Tensor, draws: int | None = None
) -> tuple[Gaussians, Gaussians]:
    """Fits Gaussians; of many features by ascents of linear cost, of which a few different ends get
    the whole curvature unless there are too many to write it down."""
    n = density.features
    # The fewest draws that give the ELBO of a normal density exactly.
    draws = draws or max(16, 2 * n)
    if n <= DENSE:
        return fit_gaussians(density, starts, draws=draws)
    best, last = fit_low_rank(density, starts)
    different = _drop_duplicates(_join(best, last))
    ends = different if len(different.elbo) else best
    ends = ends.pick(torch.arange(min(MOST_REFINED, len(ends.elbo)), device=starts.device))
    ends = sharpen(density, ends)
    if n > TRIANGULAR:
        return ends, ends
    widths = _widths(ends)
    try:
        return fit_gaussians(density, ends.loc, REFINING_STEPS, draws, root=widths)
    except TimeOver:
        ends = ends._replace(root=widths)
        return ends, ends


def _widths(fits: Gaussians) -> Tensor:
    """Standard deviations, as diagonal matrices."""
    identity = torch.eye(fits.loc.shape[-1]).to(fits.loc)
    return torch.diag_embed(multiply_transposed(fits.root, identity).norm(dim=-1))


def _spread_starts(density: LogDensity, fit: Gaussian, count: int) -> Tensor:
    n, like = density.features, fit.loc
    share = count // 6
    prior = simulate.prior_draws(density, share)
    around = count - share * (1 + len(FAR_OUT) + bool(prior))
    noise = multiply_root(fit.scale_tril, torch.randn(around, n, device="cpu").to(like))
    spreads = like.new_tensor(SPREADS).repeat(-(-around // len(SPREADS)))[:around]
    points = [
        UNIFORM * (2 * torch.rand(share, n, device="cpu") - 1).to(like),
        fit.loc + spreads.unsqueeze(-1) * noise,
    ]
    if prior:
        points.append(density.unconstrain(prior).to(like))
    for size in FAR_OUT:
        points.append(size * (2 * torch.rand(share, n, device="cpu") - 1).to(like))
    candidates = torch.cat(points)
    values, slopes = density.value_and_grad(candidates)
    usable = values.isfinite() & slopes.isfinite().all(-1) & candidates.isfinite().all(-1)
    return torch.cat([fit.loc.unsqueeze(0), candidates[usable]])


def _join(*groups: Gaussians) -> Gaussians:
    fits = groups[0].join(*groups[1:])
    sound = fits.elbo.isfinite() & fits.loc.isfinite().all(-1) & is_finite(fits.root)
    return fits.pick(sound)


def _sound(density: LogDensity, others: Gaussians, ends: Gaussians) -> tuple[Gaussians, Gaussians]:
    """Drops fits at whose centres the density is noise, unless all are.

    Args:
        density: The log density.
        others: The best fits of ascents.
        ends: Where the ascents end.

    Returns:
        All fits, and the ends alone.
    """
    fits = _join(others, ends)
    sound = is_sound(density, fits.loc)
    return _pick_sound(fits, sound), _pick_sound(ends, sound[len(others.elbo) :])


def _pick_sound(fits: Gaussians, sound: Tensor) -> Gaussians:
    return fits.pick(sound) if bool(sound.any()) else fits


def _drop_duplicates(fits: Gaussians) -> Gaussians:
    """Drops near-duplicates, best ELBO first.

    Kept fits differ by half a width per entry (two in total) in their centres, or by a quarter in
    their scales.
    """
    return fits.pick(list_different(fits))


def list_different(fits: Gaussians) -> Tensor:
    """Lists the fits that :func:`take_census` keeps of near-duplicates, by their indices."""
    order = fits.elbo.argsort(descending=True)
    fits = fits.pick(order)
    n = fits.loc.shape[-1]
    waiting = torch.ones_like(fits.elbo, dtype=torch.bool)
    kept: list[int] = []
    for i in range(len(waiting)):
        if len(kept) == MOST_FITS:
            break
        if not bool(waiting[i]):
            continue
        kept.append(i)
        own = pick_root(fits.root, i)
        offset = solve_root(own, fits.loc - fits.loc[i])
        square = offset.square().sum(-1)
        if isinstance(own, Tensor):
            near = (_differ(own, fits.root) < 1.5) & (square < min(0.25 * n, 4.0))
        else:
            near = square < 0.25 * n  # curvatures of low rank differ by the way of an ascent
        waiting &= ~near
    return order[torch.tensor(kept, device=waiting.device, dtype=torch.long)]


def _differ(root: Tensor, others: Any) -> Tensor:
    """By how much roots differ from one, of shape ``(count,)``: the larger of the mean squares of
    what takes it to them and of what takes them to it, which are one for rotations."""
    relative = torch.linalg.solve_ex(root, others)[0]
    return torch.maximum(_mean_square(relative), _mean_square(torch.linalg.inv_ex(relative)[0]))


def _mean_square(matrices: Tensor) -> Tensor:
    """Squared Frobenius norms over the number of rows: one for a rotation."""
    return matrices.square().sum((-2, -1)) / matrices.shape[-1]


def _score(density: LogDensity, fits: Gaussians) -> Gaussians:
    """Estimates the ELBOs again, by many draws, and sorts by them; fits to noise are dropped."""
    z, log_p, log_c = weigh_fits(density.log_prob, fits)
    elbo = (log_p - log_c).mean(-1)
    highest = log_p.topk(HIGHEST).indices.unsqueeze(-1)
    looked_at = z.take_along_dim(highest, 1)
    sound = is_sound(density, looked_at.flatten(0, 1)).reshape(-1, HIGHEST).all(-1)
    scored = fits._replace(elbo=elbo).pick(sound | ~sound.any())
    return scored.pick(scored.elbo.argsort(descending=True))


def _find_modes(density: LogDensity, fits: Gaussians) -> tuple[Gaussians, Tensor]:
    slope = density.value_and_grad(fits.loc)[1]
    flat = multiply_transposed(fits.root, slope.unsqueeze(-2)).abs().amax((-2, -1)) < FLAT
    # First those that slope, of which there may be many on the ridge of one mode.
    fits = _drop_duplicates(fits.pick(flat))
    if not len(fits.loc):
        return fits, fits.elbo
    _, log_p, log_c = weigh_fits(density.log_prob, fits)
    log_weights = log_p - log_c
    fits = fits._replace(elbo=log_weights.mean(-1))
    return pick_separate(density.log_prob, fits, log_weights.logsumexp(-1) - math.log(DRAWS))


def pick_separate(log_prob: LogProb, fits: Gaussians, evidence: Tensor) -> tuple[Gaussians, Tensor]:
    """Picks the modes that carry mass and between which the density dips.

    Args:
        log_prob: The log density.
        fits: Fits at maxima of the density, at least one.
        evidence: Logarithms of their masses, of shape ``(count,)``.

    Returns:
        The modes, heaviest first, and their shares.
    """
    order = evidence.argsort(descending=True)
    fits, evidence = fits.pick(order), evidence[order]
    kept = [0]
    for i in range(1, len(evidence)):
        mass = float((evidence[i] - evidence[kept].logsumexp(0)).exp())
        if mass > LEAST_MASS and all(dips(log_prob, fits.loc[i], fits.loc[j]) for j in kept):
            kept.append(i)
    index = torch.tensor(kept, device=evidence.device)
    return fits.pick(index), evidence[index].softmax(0)


def dips(log_prob: LogProb, a: Tensor, b: Tensor, points: int = 33) -> bool:
    """Tells whether a density falls and rises again on the line between two points.

    Args:
        log_prob: The log density.
        a: One point, of shape ``(features,)``.
        b: The other.
        points: At how many points the density is looked at, both ends among them.
    """
    t = torch.linspace(0, 1, points, dtype=a.dtype, device=a.device).unsqueeze(-1)
    values = log_prob(a + t * (b - a)).nan_to_num(nan=-math.inf)
    return bool(values.min() < torch.minimum(values[0], values[-1]) - DIP)


def weigh_fits(
    log_prob: LogProb, fits: Gaussians, draws: int = DRAWS
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws from each fit.

    Args:
        log_prob: The log density.
        fits: The fits.
        draws: Draws from each.

    Returns:
        Draws ``(count, draws, features)``, and log densities of the model and of the fit, ``(count,
        draws)``.
    """
    n = fits.loc.shape[-1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(draws, n, generator=generator, device="cpu", dtype=fits.loc.dtype).to(
        fits.loc.device
    )
    z = fits.loc.unsqueeze(-2) + multiply_root(fits.root, noise)
    log_c = (
        -0.5 * noise.square().sum(-1)
        - 0.5 * n * math.log(2 * math.pi)
        - log_det(fits.root).unsqueeze(-1)
    )
    return z, log_prob(z).nan_to_num(nan=-math.inf, posinf=-math.inf), log_c
