"""A census of the modes of a log density: many ascents at once from starts spread far and wide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import prediction as simulate
from ..model.density import LogDensity
from .gaussian import WIDEST, Gaussian, Gaussians, fit_gaussians

__all__ = ["Census", "missed_mass", "take_census", "widened", "without_end"]

STARTS = 64
# The cost of a Hessian by differences grows with the features; so many gradients an iteration of all ascents may take.
GRADIENTS = 16_384
# Draws for the evidence of a local fit.
DRAWS = 256
MOST_FITS = 24
# Spread of the starts around the first fit, in its standard deviations.
SPREADS = (3.0, 10.0)
# Stan's own: uniform numbers of the unconstrained space.
UNIFORM = 2.0
# A mode has no slope, in units of its own width.
FLAT = 0.1
# Nats by which the density dips on the line between two modes.
DIP = 1.0
# What a region must weigh to be told of, as a share of the evidence.
LEAST_MASS = 0.01
# How far out a density is looked at for its fall, in widths of a fit.
FAR = 1e6
# A region is missed where the guide's density is below the posterior's by this factor.
MISSED = 20.0


class Census(NamedTuple):
    """Local Gaussian fits of a log density.

    Attributes:
        fits: All that differ, best ELBO first.
        modes: Those at separate maxima of the density that carry mass, heaviest first; there may be none.
        weights: Shares of their masses, of shape ``(modes,)``.
    """

    fits: Gaussians
    modes: Gaussians
    weights: Tensor

    @property
    def best(self) -> Gaussian:
        """The fit with the best ELBO."""
        return self.fits.one(0)


def take_census(density: LogDensity, start: Tensor, starts: int = STARTS, seed: int = 0) -> Census:
    """Fits Gaussians from many starts and tells which of them are separate modes.

    Starts are the given one, draws from the prior, uniform numbers, and points far around the first fit.

    Args:
        density: The log density.
        start: A point of shape ``(features,)`` with a finite log density.
        starts: How many starts; fewer where there are many features.
        seed: Seed of the starts and of the draws that weigh the fits.

    Returns:
        The census.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, first_end = fit_gaussians(density, start.unsqueeze(0))
        others = max(8, min(starts, GRADIENTS // (2 * density.features + 36)))
        best, end = fit_gaussians(
            density, _starts(density, first.one(0), others), draws=_few_draws(density)
        )
        fits = _rescored(density, _distinct(_joined(first, first_end, best, end)))
        modes, weights = _modes(density, _distinct(_joined(first_end, end)))
    return Census(fits, modes, weights)


def widened(density: LogDensity, census: Census, points: Tensor) -> Census:
    """The census with ascents from more points, such as those at which a guide is surprised.

    Args:
        density: The log density.
        census: What is known.
        points: Where to start, of shape ``(count, features)``, with finite log densities.

    Returns:
        The census of both.
    """
    best, end = fit_gaussians(density, points, draws=_few_draws(density))
    fits = _rescored(density, _distinct(_joined(census.fits, best, end)))
    return Census(fits, *_modes(density, _distinct(_joined(census.modes, end))))


def without_end(density: LogDensity, fit: Gaussian) -> Tensor | None:
    r"""A direction in which a density does not fall off, if one of the axes of a fit is such.

    Along each axis, :math:`t =` a million widths out, a proper density has fallen to less than :math:`1 / t`, unless it has
    a horn that narrow.

    Args:
        density: The log density.
        fit: A fit of its bulk.

    Returns:
        The direction, of shape ``(features,)``, or ``None``.
    """
    axes = torch.cat([fit.scale_tril.mT, -fit.scale_tril.mT])
    # What is no number so far out counts as zero density.
    far = density.log_prob(fit.loc + FAR * axes).nan_to_num(nan=-math.inf, posinf=-math.inf)
    # Newton's steps widen a fit without end where there is no curvature; there rounding hides what the density does.
    endless = (density.log_prob(fit.loc) - far < math.log(FAR)) | (
        axes.abs().amax(-1) > WIDEST / FAR
    )
    return axes[endless.nonzero()[0, 0]] if bool(endless.any()) else None


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
    z, log_p, log_c = _weighed(density, fits)
    with torch.no_grad():
        log_guide = log_q(z.flatten(0, 1)).reshape(log_p.shape).nan_to_num(nan=-math.inf)
    missed = log_p - log_evidence - log_guide > math.log(MISSED)
    ratio = (log_p - log_c - log_evidence).exp()
    return torch.where(missed, ratio, 0.0).mean(-1).nan_to_num(nan=0.0)


def _few_draws(density: LogDensity) -> int:
    """As few draws as tell the ELBO of a normal density exactly."""
    return max(16, 2 * density.features)


def _starts(density: LogDensity, fit: Gaussian, count: int) -> Tensor:
    n, like = density.features, fit.loc
    quarter = count // 4
    prior = simulate.prior_draws(density, quarter)
    around = count - quarter - (quarter if prior else 0)
    noise = torch.randn(around, n, device="cpu").to(like) @ fit.scale_tril.mT
    spreads = like.new_tensor(SPREADS).repeat(-(-around // len(SPREADS)))[:around]
    points = [
        UNIFORM * (2 * torch.rand(quarter, n, device="cpu") - 1).to(like),
        fit.loc + spreads.unsqueeze(-1) * noise,
    ]
    if prior:
        points.append(density.unconstrain(prior).to(like))
    candidates = torch.cat(points)
    values, slopes = density.value_and_grad(candidates)
    usable = values.isfinite() & slopes.isfinite().all(-1) & candidates.isfinite().all(-1)
    return torch.cat([fit.loc.unsqueeze(0), candidates[usable]])


def _joined(*groups: Gaussians) -> Gaussians:
    loc, root, elbo = (torch.cat(parts) for parts in zip(*groups, strict=True))
    sound = elbo.isfinite() & loc.isfinite().all(-1) & root.isfinite().all(-1).all(-1)
    return Gaussians(loc, root, elbo).pick(sound)


def _distinct(fits: Gaussians) -> Gaussians:
    """Those that differ by half a width in place, two in all, or a quarter in widths or axes; best ELBO first."""
    fits = fits.pick(fits.elbo.argsort(descending=True))
    n = fits.loc.shape[-1]
    left = torch.ones_like(fits.elbo, dtype=torch.bool)
    kept: list[int] = []
    for i in range(len(left)):
        if len(kept) == MOST_FITS:
            break
        if not bool(left[i]):
            continue
        kept.append(i)
        offset = torch.linalg.solve(fits.root[i], (fits.loc - fits.loc[i]).mT).mT
        relative = torch.linalg.solve(fits.root[i], fits.root)
        alike = (
            torch.maximum(_mean_square(relative), _mean_square(torch.linalg.inv_ex(relative)[0]))
            < 1.5
        )
        near = alike & (offset.square().sum(-1) < min(0.25 * n, 4.0))
        left &= ~near
    return fits.pick(torch.tensor(kept, device=left.device, dtype=torch.long))


def _mean_square(matrices: Tensor) -> Tensor:
    """Squared Frobenius norms over the number of rows: one for a rotation."""
    return matrices.square().sum((-2, -1)) / matrices.shape[-1]


def _rescored(density: LogDensity, fits: Gaussians) -> Gaussians:
    """With ELBOs of many draws, best first."""
    _, log_p, log_c = _weighed(density, fits)
    elbo = (log_p - log_c).mean(-1)
    return fits._replace(elbo=elbo).pick(elbo.argsort(descending=True))


def _modes(density: LogDensity, fits: Gaussians) -> tuple[Gaussians, Tensor]:
    slope = density.value_and_grad(fits.loc)[1]
    flat = (fits.root.mT @ slope.unsqueeze(-1)).squeeze(-1).abs().amax(-1) < FLAT
    fits = fits.pick(flat)
    if not len(fits.loc):
        return fits, fits.elbo
    _, log_p, log_c = _weighed(density, fits)
    log_weights = log_p - log_c
    fits = fits._replace(elbo=log_weights.mean(-1))
    evidence = log_weights.logsumexp(-1) - math.log(DRAWS)
    order = evidence.argsort(descending=True)
    fits, evidence = fits.pick(order), evidence[order]
    kept = [0]
    for i in range(1, len(evidence)):
        mass = float((evidence[i] - evidence[kept].logsumexp(0)).exp())
        if mass > LEAST_MASS and all(_dips(density, fits.loc[i], fits.loc[j]) for j in kept):
            kept.append(i)
    index = torch.tensor(kept, device=evidence.device)
    return fits.pick(index), evidence[index].softmax(0)


def _dips(density: LogDensity, a: Tensor, b: Tensor) -> bool:
    """Whether the density falls and rises again on the line between two points."""
    t = torch.linspace(0, 1, 33, dtype=a.dtype, device=a.device).unsqueeze(-1)
    values = density.log_prob(a + t * (b - a)).nan_to_num(nan=-math.inf)
    return bool(values.min() < torch.minimum(values[0], values[-1]) - DIP)


def _weighed(density: LogDensity, fits: Gaussians) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of each fit, ``(count, draws, features)``, and log densities of the model and of the fit, ``(count, draws)``."""
    n = fits.loc.shape[-1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(DRAWS, n, generator=generator, device="cpu", dtype=fits.loc.dtype).to(
        fits.loc.device
    )
    z = fits.loc.unsqueeze(-2) + noise @ fits.root.mT
    log_c = (
        -0.5 * noise.square().sum(-1)
        - 0.5 * n * math.log(2 * math.pi)
        - torch.linalg.slogdet(fits.root)[1].unsqueeze(-1)
    )
    return z, density.log_prob(z).nan_to_num(nan=-math.inf, posinf=-math.inf), log_c
