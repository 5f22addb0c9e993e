"""A fresh guide that is fitted to chains, where training by the ELBO has cut one short."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._deadline import Deadline
from ..guides.guide import Guide
from ..model.density import LogDensity
from ..sampling.polishing import draw_spaces
from ..sampling.roaming import roam
from ..train.objectives import ForwardKL
from .importance import ImportanceSample, resample

__all__ = ["VectorKL", "roam_components"]

# Chains of all components, and the most for one of them.
CHAINS, MOST = 4000, 1000
# The first half forgets where the guide's draws were.
ROUNDS = 6


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


def roam_components(
    density: LogDensity, guide: Guide, sample: ImportanceSample, deadline: Deadline
) -> list[Tensor]:
    """Runs chains from the draws of each component of a guide, as many from each.

    Args:
        density: The log density.
        guide: The guide; one without base spaces has a single component.
        sample: Weighted draws of it.
        deadline: After it has passed no trajectory begins.

    Returns:
        For each component positions of shape ``(n, features)``; none for one without draws, or
        where the time was over.
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
        chains = roam(density, guide, z, ROUNDS, deadline)
        found.append(chains[len(chains) // 2 :].flatten(0, 1))
    return found
