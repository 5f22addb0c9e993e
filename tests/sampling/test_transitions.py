"""Chains by a surrogate: they leave a density as it is, whatever the surrogate, and cost one value
each and round."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from pyroflows._deadline import Deadline, TimeOver
from pyroflows.model.base import Density
from pyroflows.sampling.transitions import surrogate_transitions

N, ROUNDS = 2000, 20


class NormalDensity(Density):
    """A normal density of scale ``scale`` about a point, with a constant that means nothing."""

    def __init__(self, loc: float, scale: float, features: int) -> None:
        self.loc, self.scale, self.features = loc, scale, features

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = (z - self.loc) / self.scale
        return 7.0 - 0.5 * x.square().sum(-1), -x / self.scale


def skewed(z: Tensor) -> Tensor:
    """The logarithm of an exponential variable, and a normal about it."""
    x, y = z.unbind(-1)
    return x - x.exp() + Normal(x, 0.5).log_prob(y)


def draws_of_skewed(n: int) -> Tensor:
    x = torch.empty(n).double().exponential_().log()
    return torch.stack([x, x + 0.5 * torch.randn(n).double()], -1)


@pytest.mark.parametrize("surrogate", [(-0.5, 1.0), (1.0, 2.0), (0.0, 0.2)])
def test_exact_draws_stay_so_under_a_wrong_surrogate(surrogate: tuple[float, float]) -> None:
    torch.manual_seed(0)
    density = NormalDensity(*surrogate, 2)
    positions, values, acceptance = surrogate_transitions(
        skewed, density, draws_of_skewed(N), ROUNDS
    )
    assert positions.shape == (ROUNDS, N, 2) and acceptance.shape == (ROUNDS,)
    torch.testing.assert_close(values, skewed(positions.flatten(0, 1)).reshape(ROUNDS, N))
    x, y = positions[-1].unbind(-1)
    # Of the logarithm of an exponential variable: minus Euler's constant and pi^2 / 6; its kurtosis
    # is 5.4.
    variance = math.pi**2 / 6
    assert float(x.mean()) == pytest.approx(-0.57722, abs=5 * math.sqrt(variance / N))
    assert float(x.var() / variance) == pytest.approx(1.0, abs=5 * math.sqrt(4.4 / N))
    noise = (y - x) / 0.5
    assert float(noise.mean()) == pytest.approx(0.0, abs=5 / math.sqrt(N))
    assert float(noise.var()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / N))


def test_a_right_surrogate_is_always_accepted_and_forgets_the_start() -> None:
    torch.manual_seed(0)
    start = torch.randn(N, 3).double()
    calls = []

    def log_prob(z: Tensor) -> Tensor:
        calls.append(len(z))
        return -0.5 * z.square().sum(-1)

    known = -0.5 * start.square().sum(-1)
    density = NormalDensity(0.0, 1.0, 3)
    positions, _, acceptance = surrogate_transitions(log_prob, density, start, 3, known)
    assert calls == [N] * 3
    assert acceptance[::2].min() > 0.999
    correlation = float((positions[0] * start).mean())
    assert abs(correlation) < 5 / math.sqrt(3 * N)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_chains_from_a_guide_that_was_cut_drift(scale: float) -> None:
    """The normal of scale one is cut at one; a surrogate of scale one half leads no further."""
    torch.manual_seed(0)
    start = Normal(0.0, 1.0).sample((4 * N, 2)).double()
    start = start[start[:, 0] < 1][:400]
    density = NormalDensity(0.0, scale, 2)
    log_prob = NormalDensity(0.0, 1.0, 2).log_prob
    end = surrogate_transitions(log_prob, density, start, 4).positions[-1]
    # The mean of the cut normal is -0.29.
    assert float(end[:, 0].mean() - start[:, 0].mean()) > 0.1
    assert float((end[:, 0] > 1).double().mean()) > 0.05


def test_chains_leave_where_the_density_is_zero_and_do_not_come_back() -> None:
    torch.manual_seed(0)

    def log_prob(z: Tensor) -> Tensor:
        x = z.squeeze(-1)
        return (-0.5 * x.square()).where(x > 0, math.nan)

    start = torch.randn(500, 1).double()
    positions, values, _ = surrogate_transitions(log_prob, NormalDensity(0.0, 1.0, 1), start, 12)
    inside = positions.squeeze(-1) > 0
    assert bool(inside[-1].all())
    assert bool((inside[1:] | ~inside[:-1]).all())
    assert torch.equal(values.isfinite(), inside)


def test_no_round_begins_when_the_time_is_over() -> None:
    with Deadline(0.0).enforced(), pytest.raises(TimeOver):
        surrogate_transitions(skewed, NormalDensity(0.0, 1.0, 2), torch.randn(9, 2), 1)


def test_the_same_seed_gives_the_same_chains() -> None:
    chains = []
    for _ in range(2):
        torch.manual_seed(1)
        density = NormalDensity(0.0, 1.0, 2)
        chains.append(surrogate_transitions(skewed, density, draws_of_skewed(50), 2).positions)
    assert torch.equal(*chains)
