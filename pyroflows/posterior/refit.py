"""A fresh guide that is fitted to chains, where training by the ELBO has cut one short."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..guides.guide import Guide
from ..model.density import LogDensity
from ..sampling.polishing import draw_spaces
from ..sampling.roaming import roam
from ..train.objectives import ForwardKL
from ..transforms.roots import multiply_root, pick_root
from .census import missed_mass
from .gaussian import Gaussians
from .importance import ImportanceSample, resample

__all__ = ["VectorKL", "roam_components", "roam_missed"]

# Chains of all components, and the most for one of them.
CHAINS, MOST = 4000, 1000
# The first half forgets where the guide's draws were.
ROUNDS = 6
# Mass, relative to the evidence, that is worth a component of its own.
LEAST_MISSED = 0.02


class VectorKL(ForwardKL):
    """The forward divergence on draws of the unconstrained vector.

    Args:
        z: Draws of shape ``(n, features)``.
        num_particles: Draws for each step, at random.
    """

    def __init__(self, z: Tensor, num_particles: int = 256) -> None:
        super().__init__({"latent": z}, num_particles)

    def _vectors(self, target: Any) -> Tensor:
        return self.draws["latent"]


def roam_components(density: LogDensity, guide: Guide, sample: ImportanceSample) -> list[Tensor]:
    """Runs chains from the draws of each component of a guide, as many from each.

    Args:
        density: The log density.
        guide: The guide; one without base spaces has a single component.
        sample: Weighted draws of it.

    Returns:
        For each component positions of shape ``(n, features)``; none for one without draws.
    """
    spaces = guide.base_spaces()
    owner = draw_spaces(spaces, sample.z).cpu()
    count = max(1, len(spaces))
    found = []
    for k in range(count):
        weights = sample.weights * (owner == k)
        total = float(weights.sum())
        if not total > 0:
            found.append(sample.z[:0])
            continue
        z = resample(sample.z, weights / total, min(MOST, CHAINS // count))
        found.append(_run_chains(density, guide, z))
    return found


def roam_missed(
    density: LogDensity,
    guide: Guide,
    sample: ImportanceSample,
    fits: Gaussians,
) -> list[Tensor]:
    """Runs chains from the local fit that is furthest from what a guide covers, if it misses any.

    Args:
        density: The log density.
        guide: The guide.
        sample: Weighted draws of it.
        fits: Local fits of the density.

    Returns:
        Positions of shape ``(n, features)``; none where the guide misses nothing.
    """
    missed = missed_mass(density, guide.log_prob, sample.log_evidence, fits)
    if float(missed.amax()) <= LEAST_MISSED:
        return []
    with torch.no_grad():
        # Next to what the guide covers its components send out chains of their own.
        distance = -guide.log_prob(fits.loc).nan_to_num(nan=-torch.inf)
    worst = int(distance.masked_fill(missed <= LEAST_MISSED, -torch.inf).argmax())
    noise = torch.randn(MOST, density.features, device="cpu").to(fits.loc)
    z = fits.loc[worst] + 0.1 * multiply_root(pick_root(fits.root, worst), noise)
    z = z[density.log_prob(z).isfinite()]
    if not len(z):
        return []
    return [_run_chains(density, guide, z)]


def _run_chains(density: LogDensity, guide: Guide, z: Tensor) -> Tensor:
    """The positions of chains from some draws, in the second half of their way."""
    chains = roam(density, guide, z, ROUNDS)
    return chains[len(chains) // 2 :].flatten(0, 1)
