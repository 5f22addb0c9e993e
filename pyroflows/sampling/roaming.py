"""Long trajectories in the plain space, which reach what the map of a guide does not."""

from __future__ import annotations

import torch
from torch import Tensor

from ..guides import Guide
from ..model.density import LogDensity
from ..transforms.roots import solve_root
from .hamiltonian import hmc, latent_target
from .spaces import fit_normal, plain_space

__all__ = ["roam"]

# Trajectories that find the step size, short because most of them begin with one that is too long.
WARM_UP, SHORT = 10, 8
# So many steps still cross a posterior that is a hundred times longer than it is wide.
LONG = 128
# The step size that fits most chains is too long for those at a narrow end.
SCALES = (1.0, 0.5, 0.25, 0.125)
# The share of draws that the units come from: under heavy tails those of all are far too wide.
BULK = 0.9


@torch.no_grad()
def roam(density: LogDensity, guide: Guide, z: Tensor, rounds: int = 1) -> Tensor:
    """Moves draws by long Hamiltonian trajectories in the unconstrained space, in their own units.

    The base space of a guide is of use where the guide is good. Beyond the draws that it was
    trained on its map may be so bent that no trajectory gets there, as along the arms of a thin
    arc. The unconstrained space knows nothing of the guide: in it trajectories follow an arm by
    small steps, of which they take as many as it is long.

    Args:
        density: The log density.
        guide: The guide.
        z: Draws of shape ``(n, features)``, of finite density.
        rounds: How often to make four long trajectories of each draw, with steps of several sizes,
            after short ones that find the size for most. Each round takes its units from the
            draws as they are then.

    Returns:
        The draws after each long trajectory, of shape ``(4 * rounds, n, features)``.

    Reference:
        Neal, "MCMC using Hamiltonian dynamics", 2011, https://arxiv.org/abs/1206.1901

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> density = pf.model.LogDensity(lambda: pyro.sample("x", dist.Normal(0.0, 2.0)))
        >>> guide = pf.AutoFlow(density.model)
        >>> density.introduce(guide)
        >>> chains = roam(density, guide, torch.rand(1000, 1), rounds=2)
        >>> chains.shape, bool((chains[-1].std() - 2).abs() < 0.2)
        (torch.Size([8, 1000, 1]), True)
    """
    chains = []
    for _ in range(rounds):
        chains.append(_roam_once(density, guide, z))
        z = chains[-1][-1]
    return torch.cat(chains)


def _roam_once(density: LogDensity, guide: Guide, z: Tensor) -> Tensor:
    space = plain_space(guide, _bulk(z))
    target = latent_target(density, space.transform)
    x, _ = space.transform.inverse_and_log_det(z)
    settled = hmc(target, x, WARM_UP, leapfrog=SHORT)
    x, positions = settled.position, []
    for scale in SCALES:
        step_size = scale * settled.step_size
        x = hmc(target, x, 1, leapfrog=LONG, step_size=step_size, adapt=False).position
        positions.append(space.transform.forward_and_log_det(x)[0])
    return torch.stack(positions)


def _bulk(z: Tensor) -> Tensor:
    """The draws that are not far out, in units of all."""
    mean, root = fit_normal(z)
    radius = solve_root(root, z - mean).norm(dim=-1)
    return z[radius <= radius.quantile(BULK)]
