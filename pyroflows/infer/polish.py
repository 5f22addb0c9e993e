"""Hamiltonian trajectories in the base space of a guide: they correct its draws, and how far they drift is its error."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..distributions import FlowDistribution, FlowMixture
from ..transforms import Transform
from .hmc import hmc, latent_target
from .log_density import LogDensity

__all__ = ["drift", "polish"]

# Relative error of the central 90 % width of n independent normal draws, times sqrt(n).
WIDTH_ERROR = 0.91


@torch.no_grad()
def polish(density: LogDensity, guide: Any, z: Tensor, trajectories: int, deadline: float | None = None) -> Tensor:
    r"""Moves draws towards the posterior by Hamiltonian Monte Carlo in the base space of a guide.

    The posterior pulled back to the base of a good guide is nearly a standard normal, which a few trajectories of all
    draws at once cross from end to end. They leave the posterior as it is, whatever the guide. Draws of a mixture
    move in the base space of the component that each belongs to, which is exact where components do not overlap.

    Args:
        density: The log density.
        guide: The guide, whose ``get_posterior`` is a flow or a mixture of flows.
        z: Draws of shape ``(n, features)``.
        trajectories: How many of each draw.
        deadline: A reading of ``time.perf_counter`` after which no trajectory begins.

    Returns:
        The moved draws, of shape ``(n, features)``.

    Reference:
        Hoffman, Sountsov, Dillon, Langmore, Tran, Vasudevan, "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using
        neural transport", 2019, https://arxiv.org/abs/1903.03704
    """
    law = guide.get_posterior()
    if isinstance(law, FlowDistribution):
        return _in_base(density, guide.get_transform(), z, trajectories, deadline)
    assert isinstance(law, FlowMixture)
    shares = law.component_log_probs(z).softmax(-1)
    # A draw that no component knows goes with the first.
    belongs = torch.multinomial(shares.nan_to_num(nan=1.0), 1).squeeze(-1)
    moved = z.clone()
    for k, flow in enumerate(guide.flows):
        mine = belongs == k
        if bool(mine.any()):
            moved[mine] = _in_base(density, flow.transform, z[mine], trajectories, deadline)
    return moved


def drift(before: Tensor, after: Tensor, effective: float) -> Tensor:
    """How far each mean, and the logarithm of each central 90 % width, has moved beyond two standard errors.

    Args:
        before: Draws of shape ``(n, features)``.
        after: The same draws, moved.
        effective: Effective number of independent draws among ``before``.

    Returns:
        Tensor of shape ``(features,)``, in standard deviations.
    """
    n = len(before)
    scale = after.std(0)
    error = (after - before).std(0) / scale / math.sqrt(min(n, effective))
    means = (after.mean(0) - before.mean(0)).abs() / scale - 2 * error
    widths = (_width(after) / _width(before)).log().abs() - 2 * WIDTH_ERROR * (1 / n + 1 / min(n, effective)) ** 0.5
    return torch.maximum(means, widths).clamp(min=0.0)


def _in_base(density: LogDensity, transform: Transform, z: Tensor, trajectories: int, deadline: float | None) -> Tensor:
    x, _ = transform.inverse_and_log_det(z)
    # A draw that the transform cannot bring back, for it lies too far out, stays where it is.
    sound = x.isfinite().all(-1)
    if not bool(sound.any()):
        return z
    result = hmc(latent_target(density, transform), x[sound], trajectories, deadline=deadline)
    moved = z.clone()
    moved[sound] = transform.forward_and_log_det(result.position)[0]
    return moved


def _width(z: Tensor) -> Tensor:
    ends = z.double().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64, device=z.device), dim=0)
    return (ends[1] - ends[0]).to(z.dtype)
