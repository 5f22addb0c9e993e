"""Chains that roam: they leave the posterior as it is, and reach what a bad map keeps them from."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows._deadline import Deadline, TimeOver
from pyroflows.guides import Guide
from pyroflows.model import LogDensity
from pyroflows.sampling.roaming import roam

N = 1000
THIN = 0.1


class Flat(Guide):
    """A guide that no chain has to ask."""

    features = 2


def arc() -> None:
    """A normal of scale 2 along a parabola, and of scale 0.1 across it."""
    x = pyro.sample("x", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(0.3 * x.square(), THIN))


def draws_of_arc(x: Tensor) -> Tensor:
    return torch.stack([x, 0.3 * x.square() + THIN * torch.randn_like(x)], -1)


def test_exact_draws_stay_so() -> None:
    torch.manual_seed(0)
    density = LogDensity(arc)
    start = draws_of_arc(2 * torch.randn(N))
    chains = roam(density, Flat(), start)
    assert chains.shape == (4, N, 2)
    x, y = chains[-1].unbind(-1)
    assert abs(float(x.mean())) < 5 * 2 / math.sqrt(N)
    assert float((x.std() / 2).log().abs()) < 5 / math.sqrt(2 * N)
    across = (y - 0.3 * x.square()) / THIN
    assert float(across.std().log().abs()) < 5 / math.sqrt(2 * N)


def test_chains_from_a_thin_arc_that_was_cut_short_come_to_its_ends() -> None:
    torch.manual_seed(0)
    density = LogDensity(arc)
    start = draws_of_arc(2 * torch.randn(N).fmod(1.5))
    x = roam(density, Flat(), start, 4)[-1, :, 0]
    assert float(x.std() / 2) == pytest.approx(1.0, abs=0.1)
    # A normal exceeds two standard deviations with probability 0.0455.
    assert float((x.abs() > 4).double().mean()) == pytest.approx(0.0455, abs=0.03)


def test_heavy_tails_do_not_set_the_units() -> None:
    """Of a Cauchy law the largest of 1000 draws is some thousand times as far out as the bulk."""
    torch.manual_seed(0)
    density = LogDensity(lambda: pyro.sample("x", dist.StudentT(1.0, torch.zeros(2)).to_event(1)))
    start = dist.StudentT(1.0, torch.zeros(2)).sample((N,))
    start[0] = 1e6
    moved = roam(density, Flat(), start)[-1]
    inside = start.abs().amax(-1) < 1
    # In units that are far too wide nearly no chain of the bulk would be accepted.
    assert float((moved != start)[inside].any(-1).double().mean()) > 0.95


def test_no_trajectory_begins_when_the_time_is_over() -> None:
    with Deadline(0.0).enforced(), pytest.raises(TimeOver):
        roam(LogDensity(arc), Flat(), torch.zeros(3, 2), 2)


def test_the_same_seed_gives_the_same_chains() -> None:
    density = LogDensity(arc)
    chains = []
    for _ in range(2):
        pyro.set_rng_seed(1)
        chains.append(roam(density, Flat(), draws_of_arc(torch.randn(10))))
    assert torch.equal(*chains)
