"""Normal approximations of low rank of a log density of many entries."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from .._deadline import TimeOver
from ..model.density import LogDensity
from ..transforms.low_rank import RANK, LowRankRoot
from ..transforms.roots import Root
from .gaussian import Gaussians, antithetic_noise

__all__ = ["find_flat_axes", "fit_low_rank", "sharpen"]

# Pairs of steps and changes of the gradient that are remembered.
MEMORY = RANK // 2
# Lengths of steps that are tried.
LENGTHS = 2.0 ** torch.tensor([1.0, 0.0, -1.0, -2.0, -4.0, -6.0, -9.0, -14.0])
# The first step is so long at most.
FIRST = 1.0
# The largest entry of a correction in units of the diagonal that is trusted.
LARGEST = 1e12
# Steps between two looks at the ELBO.
EVERY = 5
# An ascent is over when its step promises to gain so little.
GAIN = 1e-3
# The least curvature along a step, relative to the largest that it could have.
LEAST_CURVATURE = 1e-6
# Rounds of directions and scales, random probes for these and their length, in widths; bounds of
# curvatures, and of how far a round may change one along an axis.
ROUNDS, PROBES, WIDE_PROBES = 2, 8, 4.0
CURVATURES, CHANGES = (1e-6, 1e6), (0.05, 20.0)
# An entry along which the density may be flat has slopes that are so small, in its widths, at so
# many draws that are so many times as wide as a fit; so many entries and sites are looked at.
SLOPE, DRAWS, WIDER = 1e-3, 4, 3.0
MOST_ENTRIES, MOST_SITES = 32, 8


@dataclass
class _Ascents:
    """Ascents under way: where they are, and what is known of the curvature, all ``(count, *)``."""

    loc: Tensor
    value: Tensor
    slope: Tensor
    variance: Tensor
    steps: Tensor
    changes: Tensor

    def pick(self, index: Tensor) -> _Ascents:
        return _Ascents(*(getattr(self, field.name)[index] for field in fields(self)))

    def put(self, index: Tensor, new: _Ascents) -> None:
        for field in fields(self):
            getattr(self, field.name)[index] = getattr(new, field.name)


def fit_low_rank(
    density: LogDensity, starts: Tensor, steps: int = 150, draws: int = 24, seed: int = 0
) -> tuple[Gaussians, Gaussians]:
    r"""Fits Gaussians from many starts at once, by a quasi-Newton method of limited memory.

    The inverse Hessian is a diagonal matrix and a correction by the last few steps :math:`s_k` and
    changes :math:`y_k` of the gradient. Its root gives the covariance of a Gaussian at each point on
    the way, of which the one with the best ELBO is kept. Time and memory of a step are linear in
    the number of entries.

    Args:
        density: The log density.
        starts: Where to start, of shape ``(count, features)``, with finite log densities.
        steps: Most steps to take.
        draws: Draws for each ELBO; the same for all of them.
        seed: Seed of these draws.

    Returns:
        For each start the Gaussian with the best ELBO on the way, and the last one, as
        :func:`pyroflows.posterior.gaussian.fit_gaussians` does.

    Raises:
        TimeOver: If the time is over before the starts have been evaluated.

    Reference:
        Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel quasi-Newton variational
        inference", 2022, https://arxiv.org/abs/2108.03782
    """
    noise = antithetic_noise(draws, starts[0], seed)
    ascents = _begin(density, starts)
    best = last = _gaussians(density, ascents, noise)
    going = torch.ones_like(best.elbo, dtype=torch.bool)
    try:
        for number in range(1, steps + 1):
            index = going.nonzero().squeeze(-1)
            if not len(index):
                break
            moved, still = _step(density, ascents.pick(index))
            ascents.put(index, moved)
            going[index] = ~still
            looked = index[still] if number % EVERY else index
            if len(looked):
                new = _gaussians(density, ascents.pick(looked), noise)
                last = last.put(looked, new)
                held = best.pick(looked)
                best = best.put(looked, new.where(new.elbo > held.elbo, held))
    except TimeOver:
        pass
    return best, last


def sharpen(density: LogDensity, fits: Gaussians, draws: int = 64, seed: int = 0) -> Gaussians:
    """Takes the curvature at the means of fits in the directions in which it is the largest and the
    smallest, where that raises the ELBO.

    An ascent sees little of it, the less the sooner it arrives. Krylov subspaces of products with
    the second derivatives, by differences of gradients, hold the extreme directions in units of a
    diagonal scale, which is then found from what they leave, by random probes.

    Args:
        density: The log density.
        fits: The fits.
        draws: Draws for each ELBO.
        seed: Seed of all that is random.

    Returns:
        The fits, with their own roots or the new ones; as they are when the time of the fit is
        over.

    Reference:
        Saad, "Numerical methods for large eigenvalue problems", 2011,
        https://doi.org/10.1137/1.9781611970739
    """
    noise = antithetic_noise(draws, fits.loc[0], seed)
    generator = torch.Generator().manual_seed(seed)
    root = cast("LowRankRoot", fits.root)
    best, scale, n = fits, root.scale, fits.loc.shape[-1]
    with contextlib.suppress(TimeOver):
        best = _with_elbos(density, fits.loc, root, noise)
        for finished in range(ROUNDS):
            if finished:
                probes = torch.randn(PROBES, n, generator=generator).to(scale).sign()
                scale = _renew_scale(density, fits.loc, root, probes)
            start = torch.randn(1, n, generator=generator).to(scale).expand_as(scale)
            root = _extreme_directions(density, fits.loc, scale, start)
            new = _with_elbos(density, fits.loc, root, noise)
            best = new.where(new.elbo > best.elbo, best)
    return best


def _extreme_directions(
    density: LogDensity, loc: Tensor, scale: Tensor, start: Tensor
) -> LowRankRoot:
    """The roots of inverse curvatures in Krylov subspaces, of units of some scales."""
    basis, products = start.unsqueeze(-2)[:, :0], start.unsqueeze(-2)[:, :0]
    vector = start
    for _ in range(RANK):
        for _ in range(2):  # once is not enough in the presence of rounding
            shares = basis @ vector.unsqueeze(-1)
            vector = vector - (basis.mT @ shares).squeeze(-1)
            vector = vector / vector.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        basis = torch.cat([basis, vector.unsqueeze(-2)], -2)
        vector = _multiply_curvature(density, loc, scale, vector.unsqueeze(-2)).squeeze(-2)
        products = torch.cat([products, vector.unsqueeze(-2)], -2)
    within = basis @ products.mT
    curvatures, turns = torch.linalg.eigh((within + within.mT) / 2)
    stretch = curvatures.abs().clamp(*CURVATURES).rsqrt()
    return LowRankRoot(scale, basis.mT @ turns, stretch)


def _multiply_curvature(density: LogDensity, loc: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """Products of the negative second derivatives, in units of some scales, with vectors of shape
    ``(count, m, features)``."""
    width = 1e-3 if loc.dtype == torch.float64 else 5e-2
    step = width * scale.unsqueeze(-2) * x
    points = torch.stack([loc.unsqueeze(-2) + step, loc.unsqueeze(-2) - step])
    up, down = density.value_and_grad(points)[1]
    products = scale.unsqueeze(-2) * (down - up) / (2 * width)
    return products.nan_to_num(0.0, 0.0, 0.0).clamp(-LARGEST, LARGEST)


def _renew_scale(density: LogDensity, loc: Tensor, root: LowRankRoot, probes: Tensor) -> Tensor:
    """Scales in whose units the curvature is one along the axes, but for what a root explains."""
    x = probes.expand(len(loc), -1, -1) / WIDE_PROBES
    products = WIDE_PROBES * _multiply_curvature(density, loc, root.scale, x)
    explained = (probes @ root.basis / root.stretch.square().unsqueeze(-2)) @ root.basis.mT
    left = (probes * (products - explained)).mean(-2)
    share = 1 - root.basis.square().sum(-1)
    return root.scale * (left / share.clamp(min=0.1)).clamp(*CHANGES).rsqrt()


def _with_elbos(density: LogDensity, loc: Tensor, root: LowRankRoot, noise: Tensor) -> Gaussians:
    values = density.log_prob(loc.unsqueeze(-2) + root.multiply(noise))
    entropy = root.log_det + 0.5 * loc.shape[-1] * (1 + math.log(2 * math.pi))
    elbo = (values.mean(-1) + entropy).nan_to_num(nan=-math.inf, posinf=-math.inf)
    return Gaussians(loc, root, elbo)


def find_flat_axes(density: LogDensity, loc: Tensor, root: Root) -> Tensor | None:
    """Lists directions in which a density of many entries may not fall off.

    They are entries whose slopes vanish at a few points, sites as a whole, and differences of two
    sites.

    Args:
        density: The log density.
        loc: The mean of a fit, of shape ``(features,)``.
        root: Its root.

    Returns:
        Tensor of shape ``(count, features)``; ``None`` if the root is a matrix, whose columns are
        few enough.
    """
    if isinstance(root, Tensor):
        return None
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(DRAWS, len(loc), generator=generator).to(loc)
    slopes = density.value_and_grad(loc + WIDER * root.multiply(noise))[1]
    steepest = (slopes * root.scale).abs().amax(0)
    entries = steepest.argsort()[:MOST_ENTRIES]
    entries = entries[steepest[entries] < SLOPE]
    alone = torch.zeros(len(entries), len(loc)).to(loc)
    alone[torch.arange(len(entries)), entries] = root.scale[entries]
    sizes = [site.features for site in density.sites]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(loc.device)
    wholes = [(owner == k) * root.scale.amax() for k in range(min(len(sizes), MOST_SITES))]
    pairs = [one - other for one, other in itertools.combinations(wholes, 2)]
    return torch.cat([alone, torch.stack(wholes + pairs)])


def _begin(density: LogDensity, starts: Tensor) -> _Ascents:
    value, slope = density.value_and_grad(starts)
    memory = starts.new_zeros(len(starts), MEMORY, starts.shape[-1])
    slope = slope.nan_to_num(0.0, 0.0, 0.0)
    length = slope.norm(dim=-1, keepdim=True)
    variance = (FIRST / length.clamp(min=1e-30)).clamp(max=1.0).expand(starts.shape)
    return _Ascents(starts.clone(), value, slope, variance.clone(), memory, memory.clone())


def _step(density: LogDensity, now: _Ascents) -> tuple[_Ascents, Tensor]:
    """Ascents after a step, and which of them are over."""
    direction = _multiply_inverse(now)
    promise = (direction * now.slope).sum(-1)
    lengths = LENGTHS.to(now.loc)
    points = now.loc.unsqueeze(-2) + lengths.unsqueeze(-1) * direction.unsqueeze(-2)
    values = density.log_prob(points).nan_to_num(nan=-math.inf, posinf=-math.inf)
    best = values.argmax(-1)
    rows = torch.arange(len(best), device=best.device)
    risen = values[rows, best] > now.value
    loc = points[rows, best].where(risen.unsqueeze(-1), now.loc)
    value, slope = density.value_and_grad(loc)
    sound = risen & value.isfinite() & slope.isfinite().all(-1)
    stays = ~sound.unsqueeze(-1)
    loc, slope = now.loc.where(stays, loc), now.slope.where(stays, slope)
    value = value.where(sound, now.value)
    moved = _remember(now, loc, value, slope)
    return moved, ~sound | (promise < GAIN)


def _remember(now: _Ascents, loc: Tensor, value: Tensor, slope: Tensor) -> _Ascents:
    """The ascents at new points, with the curvature along the last step."""
    step, change = loc - now.loc, now.slope - slope
    curvature = (step * change).sum(-1)
    least = LEAST_CURVATURE * step.norm(dim=-1) * change.norm(dim=-1)
    known = (curvature > least).unsqueeze(-1)
    variance = _renew_variance(now.variance, step, change)
    variance = variance.where(known & variance.isfinite() & (variance > 0), now.variance)
    steps = torch.cat([now.steps[:, 1:], step.unsqueeze(-2)], -2)
    changes = torch.cat([now.changes[:, 1:], change.unsqueeze(-2)], -2)
    held = known.unsqueeze(-1)
    return _Ascents(
        loc,
        value,
        slope,
        variance,
        steps.where(held, now.steps),
        changes.where(held, now.changes),
    )


def _renew_variance(variance: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """The diagonal of the inverse Hessian, by the rule of Gilbert and Lemarechal."""
    a = (change.square() * variance).sum(-1, keepdim=True)
    b = (change * step).sum(-1, keepdim=True)
    c = (step.square() / variance).sum(-1, keepdim=True)
    precision = a / (b * variance) + change.square() / b
    return 1 / (precision - a * step.square() / (b * c * variance.square()))


def _multiply_inverse(now: _Ascents) -> Tensor:
    """The slopes times the inverse Hessian, by two passes through the memory."""
    curvatures = (now.steps * now.changes).sum(-1)
    used = curvatures > 0
    inverse = used / curvatures.where(used, 1.0)
    vector, shares = now.slope, []
    for k in reversed(range(MEMORY)):
        share = inverse[:, k, None] * (now.steps[:, k] * vector).sum(-1, keepdim=True)
        vector = vector - share * now.changes[:, k]
        shares.append(share)
    vector = now.variance * vector
    for k, share in enumerate(reversed(shares)):
        back = inverse[:, k, None] * (now.changes[:, k] * vector).sum(-1, keepdim=True)
        vector = vector + (share - back) * now.steps[:, k]
    return vector


def _gaussians(density: LogDensity, now: _Ascents, noise: Tensor) -> Gaussians:
    """The Gaussians of the inverse Hessians, with their ELBOs."""
    return _with_elbos(density, now.loc, _root(now), noise)


def _root(now: _Ascents) -> LowRankRoot:
    r"""The roots of the inverse Hessians :math:`\operatorname{diag}(a) + B C B^\top`."""
    scale = now.variance.double().sqrt()
    steps = now.steps.double() / scale.unsqueeze(-2)
    changes = now.changes.double() * scale.unsqueeze(-2)
    products = steps @ changes.mT
    curvatures = products.diagonal(dim1=-2, dim2=-1)
    # Places in the memory that are empty take no part.
    triangle = products.triu() + torch.diag_embed((curvatures == 0).to(products))
    identity = torch.eye(MEMORY).to(triangle)
    inverse = torch.linalg.solve_triangular(triangle, identity.expand_as(triangle), upper=True)
    middle = torch.diag_embed(curvatures) + changes @ changes.mT
    corner = inverse.mT @ middle @ inverse
    zero = torch.zeros_like(corner)
    core = torch.cat([torch.cat([zero, -inverse], -1), torch.cat([-inverse.mT, corner], -1)], -2)
    columns = torch.cat([changes, steps], -2).mT
    orthonormal, upper = torch.linalg.qr(columns)
    correction = upper @ core @ upper.mT
    # Where the memory holds curvatures of sizes too different, the diagonal has to do.
    sound = correction.abs().amax((-2, -1), keepdim=True) < LARGEST
    eigenvalues, vectors = torch.linalg.eigh(correction.where(sound, 0.0))
    stretch = (1 + eigenvalues).clamp(min=1e-12).sqrt()
    basis = (orthonormal @ vectors).nan_to_num(0.0)
    return LowRankRoot(scale, basis, stretch).to(now.loc)
