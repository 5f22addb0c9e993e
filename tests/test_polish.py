"""Polish: it leaves the posterior as it is, mends what is off, and its drift tells how far."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows import AutoFlow, AutoMixture, LogDensity
from pyroflows.infer.polish import drift, polish

N = 2000


def normal() -> None:
    pyro.sample("x", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])).to_event(1))


def guide_at(loc: torch.Tensor, scale: torch.Tensor) -> tuple[LogDensity, AutoFlow]:
    density = LogDensity(normal)
    guide = AutoFlow(density.continuous_model, flow=pf.NICE)
    density.introduce(guide)
    guide.whiten(loc, torch.diag(scale))
    return density, guide


LOC, SCALE = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])


def test_draws_of_the_posterior_stay_so() -> None:
    torch.manual_seed(0)
    density, guide = guide_at(LOC, SCALE)
    z = LOC + SCALE * torch.randn(N, 2)
    moved = (polish(density, guide, z, 5) - LOC) / SCALE
    assert float(moved.mean(0).abs().max()) < 5 / math.sqrt(N)
    assert float(moved.std(0).log().abs().max()) < 5 / math.sqrt(2 * N)
    assert float(drift(z, LOC + SCALE * moved, N).max()) < 0.05


@pytest.mark.parametrize(("shift", "stretch"), [(0.8, 1.0), (0.0, 0.6), (-0.5, 1.5)])
def test_draws_that_are_off_are_mended_and_the_drift_tells_how_far(shift: float, stretch: float) -> None:
    torch.manual_seed(0)
    loc, scale = LOC + shift * SCALE, stretch * SCALE
    density, guide = guide_at(loc, scale)
    z = loc + scale * torch.randn(N, 2)
    moved = polish(density, guide, z, 20)
    standard = (moved - LOC) / SCALE
    assert float(standard.mean(0).abs().max()) < 5 / math.sqrt(N)
    assert float(standard.std(0).log().abs().max()) < 5 / math.sqrt(2 * N)
    # Two standard errors are taken off a drift, and three more are its spread.
    assert float(drift(z, moved, N).max()) > max(abs(shift), abs(math.log(stretch))) - 0.16


def test_draws_of_a_mixture_move_within_their_components() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("two", torch.logaddexp(-0.5 * ((x - 6) / 0.5) ** 2, -0.5 * ((x + 6) / 0.5) ** 2))

    torch.manual_seed(0)
    density = LogDensity(model)
    guide = AutoMixture(density.continuous_model, 2)
    density.introduce(guide)
    for k, at in enumerate((-6.0, 6.0)):
        guide.whiten(k, torch.tensor([at]), torch.tensor([[0.3]]))
    z = guide.get_posterior().sample((N,))
    moved = polish(density, guide, z, 10)
    assert torch.equal(moved.sign(), z.sign())
    assert float((moved.abs() - 6).std() / 0.5) == pytest.approx(1.0, abs=0.1)


def test_draws_that_the_guide_cannot_bring_back_stay_where_they_are() -> None:
    density, guide = guide_at(LOC, SCALE)
    z = torch.full((3, 2), torch.inf)
    assert torch.equal(polish(density, guide, z, 3), z)
