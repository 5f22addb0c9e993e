"""Hamiltonian trajectories in the base spaces of a guide, which correct its draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..guides import BaseSpace, Guide
from ..model.density import LogDensity
from .hamiltonian import hmc, latent_target
from .spaces import plain_space

__all__ = ["autocorrelation", "draw_spaces", "drift", "polish"]


@torch.no_grad()
def polish(density: LogDensity, guide: Guide, z: Tensor, trajectories: int) -> Tensor:
    r"""Moves draws towards the posterior by Hamiltonian Monte Carlo in the base space of a guide.

    The posterior pulled back to the base of a good guide is nearly a standard normal, which a few
    trajectories of all draws at once cross from end to end. They leave the posterior as it is,
    whatever the guide. Draws of a mixture :math:`q = \sum_k \pi_k q_k` move in the base space of a
    component drawn by its share :math:`r_k = \pi_k q_k / q`, and by trajectories on :math:`p\,
    r_k`, so that the joint distribution of draw and component stays as it is. Draws of a guide
    without a base space move in the unconstrained space, in units of their own covariance.

    Args:
        density: The log density.
        guide: The guide, which is asked for its base spaces.
        z: Draws of shape ``(n, features)``.
        trajectories: How many of each draw.

    Returns:
        The moved draws, of shape ``(n, features)``.

    Reference:
        Hoffman, Sountsov, Dillon, Langmore, Tran, Vasudevan, "NeuTra-lizing bad geometry in
        Hamiltonian Monte Carlo using neural transport", 2019, https://arxiv.org/abs/1903.03704
    """
    spaces = guide.base_spaces() or (plain_space(guide, z),)
    owner = draw_spaces(spaces, z)
    moved = z.clone()
    for k, space in enumerate(spaces):
        mine = owner == k
        if bool(mine.any()):
            moved[mine] = _move(density, space, z[mine], trajectories)
    return moved


def draw_spaces(spaces: Sequence[BaseSpace], z: Tensor) -> Tensor:
    """Draws a space for each draw, by the shares of their components.

    Args:
        spaces: The base spaces of a guide; none counts as one.
        z: Draws of shape ``(n, features)``.

    Returns:
        Numbers of spaces, of shape ``(n,)``.
    """
    log_shares = [space.log_share(z) for space in spaces if space.log_share is not None]
    if not log_shares:
        return torch.zeros(len(z), dtype=torch.long, device=z.device)
    # A draw that no component knows goes with any.
    shares = torch.stack(log_shares, -1).exp().nan_to_num(nan=1.0)
    return torch.multinomial(shares, 1).squeeze(-1)


def drift(before: Tensor, after: Tensor, effective: float) -> Tensor:
    """Measures how far means and log of central 90 % widths, move beyond two standard errors.

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


def autocorrelation(before: Tensor, after: Tensor) -> Tensor:
    """Correlates each entry with its value before; where it stays high, chains do not mix.

    Args:
        before: Draws of shape ``(n, features)``.
        after: The same draws, moved.

    Returns:
        Tensor of shape ``(features,)``.
    """
    a, b = before - before.mean(0), after - after.mean(0)
    return (a * b).mean(0) / (a.square().mean(0) * b.square().mean(0)).sqrt()


def _move(density: LogDensity, space: BaseSpace, z: Tensor, trajectories: int) -> Tensor:
    x, _ = space.transform.inverse_and_log_det(z)
    # A draw that the transform cannot bring back, because it lies too far out, stays where it is.
    sound = (x.isfinite() & z.isfinite()).all(-1)
    if not bool(sound.any()):
        return z
    # Given the component, a draw is distributed as the target times the component's share.
    target = latent_target(density, space.transform, space.log_share)
    result = hmc(target, x[sound], trajectories)
    moved = z.clone()
    moved[sound] = space.transform.forward_and_log_det(result.position)[0]
    return moved


def _width(z: Tensor, effective: float) -> tuple[Tensor, Tensor]:
    """Central 90 % widths, and their relative standard errors by those of the ranks."""
    levels = torch.tensor([0.05, 0.95], dtype=torch.float64, device=z.device)
    spread = (0.05 * 0.95 / effective) ** 0.5
    low, ends, high = (
        z.double().quantile((levels + by).clamp(0, 1), dim=0) for by in (-spread, 0.0, spread)
    )
    width = ends[1] - ends[0]
    error = ((high - low) / 2).square().sum(0).sqrt() / width
    return width.to(z.dtype), error.to(z.dtype)
