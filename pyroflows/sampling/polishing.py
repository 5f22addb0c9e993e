"""Hamiltonian trajectories in the base space of a guide: they correct its draws, and how far they drift is its error."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..distributions import FlowDistribution, FlowMixture
from ..model.density import LogDensity
from ..transforms import Transform
from .hamiltonian import LogFactor, hmc, latent_target

__all__ = ["drift", "memory", "polish"]


@torch.no_grad()
def polish(
    density: LogDensity, guide: Any, z: Tensor, trajectories: int, deadline: float | None = None
) -> Tensor:
    r"""Moves draws towards the posterior by Hamiltonian Monte Carlo in the base space of a guide.

    The posterior pulled back to the base of a good guide is nearly a standard normal, which a few trajectories of all
    draws at once cross from end to end. They leave the posterior as it is, whatever the guide. Draws of a mixture
    :math:`q = \sum_k \pi_k q_k` move in the base space of a component drawn by its share :math:`r_k = \pi_k q_k / q`, and by
    trajectories on :math:`p\, r_k`, so that the joint law of draw and component stays as it is.

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
    # A draw that no component knows goes with any.
    belongs = torch.multinomial(shares.nan_to_num(nan=1.0), 1).squeeze(-1)
    moved = z.clone()
    for k, flow in enumerate(guide.flows):
        mine = belongs == k
        if bool(mine.any()):
            # Given the component, the law of a draw is the target times the component's share.
            moved[mine] = _in_base(
                density,
                flow.transform,
                z[mine],
                trajectories,
                deadline,
                functools.partial(_log_share, law, k),
            )
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
    effective = min(n, effective)
    error = (after - before).std(0) / scale / math.sqrt(effective)
    means = (after.mean(0) - before.mean(0)).abs() / scale - 2 * error
    (width, width_error), (new_width, new_error) = _width(before, effective), _width(after, n)
    widths = (new_width / width).log().abs() - 2 * torch.hypot(width_error, new_error)
    return torch.maximum(means, widths).clamp(min=0.0)


def memory(before: Tensor, after: Tensor) -> Tensor:
    """Correlation of each entry with where trajectories began; chains that remember it do not mix.

    Args:
        before: Draws of shape ``(n, features)``.
        after: The same draws, moved.

    Returns:
        Tensor of shape ``(features,)``.
    """
    a, b = before - before.mean(0), after - after.mean(0)
    return (a * b).mean(0) / (a.square().mean(0) * b.square().mean(0)).sqrt()


def _log_share(law: FlowMixture, k: int, z: Tensor) -> Tensor:
    return law.component_log_probs(z).log_softmax(-1)[:, k]


def _in_base(
    density: LogDensity,
    transform: Transform,
    z: Tensor,
    trajectories: int,
    deadline: float | None,
    log_factor: LogFactor | None = None,
) -> Tensor:
    x, _ = transform.inverse_and_log_det(z)
    # A draw that the transform cannot bring back, for it lies too far out, stays where it is.
    sound = x.isfinite().all(-1)
    if not bool(sound.any()):
        return z
    result = hmc(
        latent_target(density, transform, log_factor), x[sound], trajectories, deadline=deadline
    )
    moved = z.clone()
    moved[sound] = transform.forward_and_log_det(result.position)[0]
    return moved


def _width(z: Tensor, effective: float) -> tuple[Tensor, Tensor]:
    """Central 90 % widths, and their relative standard errors, from quantiles as far apart as their ranks err."""
    levels = torch.tensor([0.05, 0.95], dtype=torch.float64, device=z.device)
    spread = (0.05 * 0.95 / effective) ** 0.5
    low, ends, high = (
        z.double().quantile((levels + by).clamp(0, 1), dim=0) for by in (-spread, 0.0, spread)
    )
    width = ends[1] - ends[0]
    error = ((high - low) / 2).square().sum(0).sqrt() / width
    return width.to(z.dtype), error.to(z.dtype)
