"""Points at which rounding drowns a log density, so that its values there mean nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Density

__all__ = ["is_sound", "without_noise"]

# Points around each, and how many spacings of floating-point numbers away.
NEAR, SPACINGS = 8, 8
# A log density that is off by so many nats says nothing, unless it is a sum of so many terms that
# its own last digits are as large.
NOISE, DIGITS = 1.0, 32
# Next to an edge of a support, or in a corner, some of the points around still agree.
AGREE = 0.25
# The heaviest points are looked at, and again while some of them are noise.
HEAVIEST, ROUNDS = 64, 16


@torch.no_grad()
def is_sound(density: Density, z: Tensor) -> Tensor:
    r"""Tells at which points a log density is more than rounding.

    A covariance that is nearly singular, or :math:`\log \Gamma(n + k) - \log \Gamma(k)` at a large
    :math:`k`, may leave no digit of the log density, and gives modes that are none. At such a point
    it differs by more than a nat from that in double precision, or, where there is none, from its
    values a few spacings of floating-point numbers away.

    Args:
        density: The log density.
        z: Points of shape ``(n, features)``.

    Returns:
        Booleans of shape ``(n,)``; true where the log density is not finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows.model import LogDensity
        >>> def model():
        ...     k = pyro.sample("k", dist.LogNormal(0.0, 5.0))
        ...     pyro.sample("y", dist.GammaPoisson(k, k), obs=torch.tensor(3.0))
        >>> is_sound(LogDensity(model), torch.tensor([[0.0], [20.0]]))
        tensor([ True, False])
    """
    if not len(z):
        return z.new_zeros(0, dtype=torch.bool)
    values = density.log_prob(z)
    precise = density.precise_log_prob(z)
    error = (values - precise).abs()
    unknown = precise.isnan() & values.isfinite()
    if bool(unknown.any()):
        error[unknown] = _spread(density, z[unknown], values[unknown]).to(error)
    last_digits = torch.finfo(values.dtype).eps * values.abs()
    return (error <= NOISE + DIGITS * last_digits) | ~values.isfinite()


def _spread(density: Density, z: Tensor, values: Tensor) -> Tensor:
    """How much a log density differs between numbers that are all but equal."""
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.rand(NEAR, z.shape[-1], generator=generator, device="cpu").to(z) - 1
    spacing = torch.finfo(z.dtype).eps * (z.abs() + 1)
    near = z.unsqueeze(-2) + SPACINGS * spacing.unsqueeze(-2) * signs
    differences = (density.log_prob(near) - values.unsqueeze(-1)).abs()
    return differences.nan_to_num(nan=math.inf).quantile(AGREE, dim=-1)


@torch.no_grad()
def without_noise(density: Density, z: Tensor, log_weights: Tensor) -> Tensor:
    """Gives no weight to the points of great weight at which the log density is noise.

    Args:
        density: The log density.
        z: Points of shape ``(n, features)``.
        log_weights: Their log weights, of shape ``(n,)``.

    Returns:
        The log weights, ``-inf`` at these points.
    """
    count = min(HEAVIEST, len(z))
    for _ in range(ROUNDS):
        ranked = log_weights.nan_to_num(nan=-math.inf, posinf=-math.inf)
        heaviest = ranked.topk(count).indices
        heaviest = heaviest[ranked[heaviest].isfinite()]
        noise = heaviest[~is_sound(density, z[heaviest])]
        log_weights = log_weights.index_fill(0, noise, -math.inf)
        if 2 * len(noise) < count:
            break
    return log_weights
