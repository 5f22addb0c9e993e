"""Points at which rounding drowns a log density are no part of a posterior."""

import math

import pyro
import pyro.distributions as dist
import torch

from pyroflows.model import LogDensity
from pyroflows.model.rounding import is_sound, without_noise
from pyroflows.posterior.census import find_start, take_census


def dispersed(counts):
    """At a large concentration, differences of log-gammas leave no digit."""
    k = pyro.sample("k", dist.LogNormal(0.0, 10.0))
    mean = pyro.sample("mean", dist.LogNormal(1.0, 1.0))
    with pyro.plate("n", len(counts)):
        pyro.sample("counts", dist.GammaPoisson(k, k / mean), obs=counts)


def walled():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("wall", torch.where((x > 0).all(-1), 0.0, -math.inf))


COUNTS = torch.tensor([2.0, 5.0, 1.0, 0.0, 3.0, 4.0])


def test_a_density_is_sound_where_digits_are_left():
    density = LogDensity(dispersed, (COUNTS,))
    z = torch.tensor([[0.0, 1.0], [5.0, 1.0], [16.0, 1.0], [20.0, 1.0]])
    assert is_sound(density, z).tolist() == [True, True, False, False]


def test_a_corner_of_the_support_is_sound():
    density = LogDensity(walled)
    assert is_sound(density, torch.full((1, 2), 1e-7)).tolist() == [True]


def test_points_of_zero_density_are_sound():
    density = LogDensity(walled)
    assert is_sound(density, torch.tensor([[-1.0, 1.0]])).tolist() == [True]
    assert is_sound(density, torch.empty(0, 2)).tolist() == []


def test_noise_has_no_weight():
    density = LogDensity(dispersed, (COUNTS,))
    z = torch.cat([torch.randn(100, 2), torch.tensor([[20.0, 1.0]] * 80)])
    log_weights = torch.cat([torch.zeros(100), torch.ones(80)])
    kept = without_noise(density, z, log_weights)
    assert torch.equal(kept[:100], log_weights[:100])
    assert bool((kept[100:] == -math.inf).all())


def test_a_census_has_no_mode_that_is_rounding():
    density = LogDensity(dispersed, (COUNTS,))
    census = take_census(density, find_start(density))
    exact = density.log_prob(census.fits.loc.double())
    assert torch.allclose(density.log_prob(census.fits.loc).double(), exact, atol=1.0)
