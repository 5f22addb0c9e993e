"""The density of Pyro's stable distributions without selections of entries.

Pyro mends the entries whose shape is near one, or whose value is near zero, where its integral is
inexact, by interpolation between neighbours. It selects them by a mask, which
:func:`torch.func.vmap` refuses because each point has another number of them. Here, all entries are
computed in both ways.

Reference:
    Nolan, "Numerical calculation of stable densities and distribution functions", 1997,
    https://doi.org/10.1080/15326349708807450
"""

from __future__ import annotations

import contextlib
import math

import torch
from pyro.distributions.stable_log_prob import (
    alpha_near_one_tolerance,
    value_near_zero_tolerance_alpha,
    value_near_zero_tolerance_density,
)
from torch import Tensor

from .._compat import stable_density_at_zero, stable_density_of, stable_integral

__all__ = ["selecting_no_entries"]


def selecting_no_entries() -> contextlib.AbstractContextManager[None]:
    """Context manager in which stable distributions have this density."""
    return stable_density_of(_log_prob_away_from_one, _log_prob)


def _log_prob(alpha: Tensor, beta: Tensor, value: Tensor, coords: str) -> Tensor:
    """The log density of a standard stable distribution, in the coordinates S or S0."""
    if coords == "S":
        shifted = (value - beta * (math.pi / 2 * alpha)).tan()
        value = torch.where(alpha == 1, value.tan(), shifted)
    low, high = 1 - alpha_near_one_tolerance, 1 + alpha_near_one_tolerance
    near = (alpha - 1).abs() < alpha_near_one_tolerance
    above = _log_prob_away_from_one(torch.where(near, high, alpha), beta, value)
    if not near.any():
        return above
    below = _log_prob_away_from_one(torch.where(near, low, alpha), beta, value)
    weight = torch.where(near, (alpha - 1) / (high - low) + 0.5, 0.5)
    return torch.where(near, _mix(above, below, weight), above)


def _log_prob_away_from_one(alpha: Tensor, beta: Tensor, value: Tensor) -> Tensor:
    value = value + beta * (math.pi / 2 * alpha).tan()
    by_density = value_near_zero_tolerance_density / stable_density_at_zero(alpha).exp()
    width = value_near_zero_tolerance_alpha * alpha / (1 - alpha).abs()
    width = width.clamp(max=by_density)
    near = value.abs() < width
    above = stable_integral(alpha, beta, torch.where(near, width, value))
    below = stable_integral(alpha, beta, torch.where(near, -width, value))
    weight = torch.where(near, value / (2 * width) + 0.5, 0.5)
    return torch.where(near, _mix(above, below, weight), above)


def _mix(above: Tensor, below: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([above + weight.log(), below + (1 - weight).log()]).logsumexp(0)
