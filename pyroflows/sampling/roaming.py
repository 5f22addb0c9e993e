"""Long trajectories in the plain space, which reach what the map of a guide does not."""

from __future__ import annotations

import torch
from torch import Tensor

from .._deadline import Deadline
from ..guides import Guide
from ..model.density import LogDensity
from .hamiltonian import hmc, latent_target
from .spaces import mean_and_root, plain_space

__all__ = ["roam"]

# Trajectories that find the step size, short because most of them begin with one that is too long.
WARM_UP, SHORT = 10, 8
# So many steps still cross a posterior that is a hundred times longer than it is wide.
LONG = 128
# The share of draws that the units come from: under heavy tails those of all are far too wide.
BULK = 0.9


@torch.no_grad()
def roam(
    density: LogDensity,
    guide: Guide,
    z: Tensor,
    trajectories: int,
    deadline: Deadline | None = None,
) -> Tensor:
    """Moves draws by long Hamiltonian trajectories in the unconstrained space, in their own units.

    The base space of a guide is of use where the guide is good. Beyond the draws that it was
    trained on its map may be so bent that no trajectory gets there, as along the arms of a thin
    arc. The unconstrained space knows nothing of the guide: in it trajectories follow an arm by
    small steps, of which they take as many as it is long.

    Args:
        density: The log density.
        guide: The guide.
        z: Draws of shape ``(n, features)``, of finite density.
        trajectories: How many of each draw, after some that find the step size.
        deadline: After it has passed no trajectory begins.

    Returns:
        The draws after each trajectory, of shape ``(trajectories, n, features)``, or fewer where
        the time was over.

    Reference:
        Neal, "MCMC using Hamiltonian dynamics", 2011, https://arxiv.org/abs/1206.1901

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> density = pf.model.LogDensity(lambda: pyro.sample("x", dist.Normal(0.0, 2.0)))
        >>> guide = pf.AutoFlow(density.model)
        >>> density.introduce(guide)
        >>> chains = roam(density, guide, torch.rand(1000, 1), trajectories=10)
        >>> chains.shape, bool((chains[-1].std() - 2).abs() < 0.2)
        (torch.Size([10, 1000, 1]), True)
    """
    space = plain_space(guide, _bulk(z))
    target = latent_target(density, space.transform)
    x, _ = space.transform.inverse_and_log_det(z)
    settled = hmc(target, x, WARM_UP, leapfrog=SHORT, deadline=deadline)
    chains = hmc(
        target,
        settled.position,
        trajectories,
        leapfrog=LONG,
        step_size=settled.step_size,
        adapt=False,
        keep=True,
        deadline=deadline,
    ).history
    assert chains is not None
    moved, _ = space.transform.forward_and_log_det(chains.flatten(0, 1))
    return moved.reshape(chains.shape)


def _bulk(z: Tensor) -> Tensor:
    """The draws that are not far out, in units of all."""
    mean, root = mean_and_root(z)
    radius = torch.linalg.solve_triangular(root, (z - mean).mT, upper=False).norm(dim=0)
    return z[radius <= radius.quantile(BULK)]
