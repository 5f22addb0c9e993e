"""Chains of a density whose values are dear, by proposals from one whose gradients are cheap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_size
from .._deadline import check_time
from ..model.base import Density
from .hamiltonian import Target, hmc
from .spaces import mean_and_root

__all__ = ["Transitions", "surrogate_transitions"]

# Trajectories that find the step size, and those of a proposal.
WARM_UP, TRAJECTORIES = 10, 4
# Widths of a random walk over the root of the number of entries.
STRIDE = 2.4


class Transitions(NamedTuple):
    """Where chains are after each round.

    Attributes:
        positions: Tensor of shape ``(rounds, n, features)``.
        log_density: The log density there, of shape ``(rounds, n)``; ``-inf`` where it is zero.
        acceptance: The share of the chains that moved in each round, of shape ``(rounds,)``: by
            proposals of the surrogate in the first, third, ..., by random walks in the others.
    """

    positions: Tensor
    log_density: Tensor
    acceptance: Tensor


class _Chains(NamedTuple):
    position: Tensor
    log_density: Tensor


@torch.no_grad()
def surrogate_transitions(
    log_prob: Callable[[Tensor], Tensor],
    surrogate: Density,
    z: Tensor,
    rounds: int,
    log_density: Tensor | None = None,
) -> Transitions:
    r"""Moves chains by long trajectories of a surrogate, each for one value of the density.

    Several Hamiltonian trajectories leave a surrogate :math:`s` as it is, and are reversible with
    respect to it. As a proposal :math:`z'` they leave the density :math:`p` as it is if they are
    accepted with probability

    .. math:: \min\left(1, \frac{p(z')\, s(z)}{p(z)\, s(z')}\right).

    Where the surrogate is far too low no proposal goes, and where it is far too high none is
    accepted; so every second round is a random walk on the density itself. Steps are in units of
    the covariance of the given draws, and do not adapt.

    Args:
        log_prob: The log density, from points of shape ``(n, features)`` to ``(n,)``; not finite
            where it is zero.
        surrogate: The surrogate, normalised or not.
        z: Where the chains start, of shape ``(n, features)``.
        rounds: How many rounds, the first by the surrogate; each costs ``n`` values.
        log_density: The log density at the start, of shape ``(n,)``, if it is known.

    Returns:
        The chains after each round.

    Raises:
        TimeOver: If the time is over before the last round.

    Reference:
        Liu, "Monte Carlo strategies in scientific computing", 2001,
        https://doi.org/10.1007/978-0-387-76371-2

        Christen, Fox, "Markov chain Monte Carlo using an approximation", 2005,
        https://doi.org/10.1198/106186005X76983

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> _ = torch.manual_seed(0)
        >>> wide = pf.model.LogDensity(lambda: pyro.sample("x", dist.Normal(0.0, 1.2)))
        >>> normal = lambda z: -0.5 * z.square().sum(-1)
        >>> positions, _, acceptance = surrogate_transitions(normal, wide, torch.rand(1000, 1), 6)
        >>> bool((positions[-1].std() - 1).abs() < 0.1), acceptance.shape
        (True, torch.Size([6]))
    """
    mean, root = mean_and_root(z)

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = surrogate.value_and_grad(mean + x @ root.mT)
        return value, slope @ root

    def evaluate(x: Tensor) -> Tensor:
        values = log_prob(mean + x @ root.mT)
        return values.where(values.isfinite(), -math.inf)

    x = torch.linalg.solve_triangular(root, (z - mean).mT, upper=False).mT
    step_size = hmc(target, x, WARM_UP).step_size
    chains = _Chains(x, evaluate(x) if log_density is None else log_density)
    history, accepted = [], []
    for number in range(check_size("rounds", rounds)):
        check_time()
        if number % 2:
            proposal, log_ratio = _walk(chains.position)
        else:
            proposal, log_ratio = _follow(target, chains.position, step_size)
        chains, share = _step(evaluate, chains, proposal, log_ratio)
        history.append(chains)
        accepted.append(share)
    positions, values = map(torch.stack, zip(*history, strict=True))
    return Transitions(mean + positions @ root.mT, values, torch.stack(accepted))


def _follow(target: Target, x: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
    """Proposes by trajectories of the surrogate; its log density falls by the second value."""
    result = hmc(target, x, TRAJECTORIES, step_size=step_size, adapt=False)
    return result.position, target(x)[0] - result.log_density


def _walk(x: Tensor) -> tuple[Tensor, Tensor]:
    """Proposes by steps that go either way alike."""
    stride = STRIDE / math.sqrt(x.shape[-1])
    return x + stride * torch.randn_like(x), x.new_zeros(len(x))


def _step(
    evaluate: Callable[[Tensor], Tensor], chains: _Chains, proposal: Tensor, log_ratio: Tensor
) -> tuple[_Chains, Tensor]:
    """Accepts proposals by Metropolis' rule, and returns the share of them that it accepts."""
    values = evaluate(proposal)
    log_ratio = log_ratio + values - chains.log_density
    # Chains that start where the density is zero leave as soon as they can.
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    position = proposal.where(accepted.unsqueeze(-1), chains.position)
    moved = _Chains(position, values.where(accepted, chains.log_density))
    return moved, accepted.to(values.dtype).mean()
