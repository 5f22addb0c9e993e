"""The census: it finds modes with their masses, and regions that a guide misses."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyroflows.model import LogDensity
from pyroflows.model.prediction import prior_draws
from pyroflows.posterior.census import (
    find_flat_direction,
    has_missed,
    missed_mass,
    take_census,
    widen_census,
)


@pytest.fixture(autouse=True)
def float64() -> None:
    torch.set_default_dtype(torch.float64)


def mixture_density(weights: Tensor, locs: Tensor, scales: Tensor) -> LogDensity:
    parts = dist.Independent(dist.Normal(locs, scales.unsqueeze(-1).expand_as(locs)), 1)
    law = dist.MixtureSameFamily(dist.Categorical(weights), parts)

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), locs.shape[-1:]))
        pyro.factor("law", law.log_prob(x))

    return LogDensity(model)


TWO = (
    torch.tensor([0.7, 0.3]).double(),
    torch.tensor([[0.0, 0.0], [9.0, -5.0]]).double(),
    torch.tensor([1.0, 0.5]).double(),
)


def test_two_normals_are_found_with_their_masses() -> None:
    weights, locs, scales = TWO
    census = take_census(mixture_density(*TWO), torch.zeros(2))
    # The fits are exact, so that their evidences carry no sampling error.
    torch.testing.assert_close(census.weights, weights, rtol=0, atol=1e-3)
    torch.testing.assert_close(census.modes.loc, locs, rtol=0, atol=1e-3)
    for k in range(2):
        torch.testing.assert_close(
            census.modes.one(k).scale_tril, scales[k] * torch.eye(2), rtol=0, atol=1e-2
        )


@pytest.mark.parametrize("weight", [0.005, 0.05])
def test_a_mode_counts_from_one_percent_on(weight: float) -> None:
    weights = torch.tensor([1 - weight, weight])
    census = take_census(mixture_density(weights, *TWO[1:]), torch.zeros(2))
    assert len(census.weights) == (2 if weight > 0.01 else 1)


def test_overlapping_normals_with_one_maximum_are_one_mode() -> None:
    density = mixture_density(
        torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 0.0], [1.5, 0.0]]), torch.ones(2)
    )
    assert len(take_census(density, torch.zeros(2)).weights) == 1


def test_scales_far_apart_do_not_matter() -> None:
    scales = torch.tensor([1e-3, 1.0, 1e3])

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3), scales).to_event(1))

    census = take_census(LogDensity(model), torch.tensor([1.0, 1.0, 1.0]))
    assert census.weights.tolist() == [1.0]
    assert abs(census.best.elbo) < 1e-6


def test_the_same_seed_gives_the_same_census_and_the_state_outside_is_left() -> None:
    density = mixture_density(*TWO)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (
        take_census(density, torch.zeros(2), seed=4),
        take_census(density, torch.zeros(2), seed=4),
    )
    assert torch.equal(first.fits.loc, second.fits.loc)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mass_that_a_guide_misses() -> None:
    density = mixture_density(*TWO)
    census = take_census(density, torch.zeros(2))
    guide = dist.Independent(dist.Normal(torch.zeros(2), 1.0), 1)
    missed = missed_mass(density, guide.log_prob, math.log(0.7), census.fits)
    # Three parts in ten of all, as a share of the seven that the guide sees.
    assert float(missed.max()) == pytest.approx(0.3 / 0.7, rel=1e-2)
    everything = mixture_density(*TWO)
    assert float(missed_mass(density, everything.log_prob, 0.0, census.fits).max()) == 0.0


def test_a_guide_that_is_no_number_far_out_misses_what_lies_there() -> None:
    density = mixture_density(*TWO)
    census = take_census(density, torch.zeros(2))

    def log_q(z: Tensor) -> Tensor:
        inside = z.abs().amax(-1) < 4
        return torch.where(inside, -0.5 * z.square().sum(-1) - math.log(2 * math.pi), torch.nan)

    assert float(missed_mass(density, log_q, math.log(0.7), census.fits).max()) == pytest.approx(
        0.3 / 0.7, rel=1e-2
    )


def test_a_narrow_mode_is_found_from_a_point_within_it() -> None:
    weights, locs = torch.tensor([0.7, 0.3]), torch.tensor([[0.0, 0.0], [1.8, 1.8]])
    density = mixture_density(weights, locs, torch.tensor([1.0, 0.01]))
    census = take_census(density, torch.zeros(2))
    wider = widen_census(density, census, torch.tensor([[1.81, 1.79]]))
    # The wide normal has a little mass within the narrow one's width, and neither fit is exact there.
    torch.testing.assert_close(wider.weights, weights, rtol=0, atol=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_proper_density_has_an_end(scale: float) -> None:
    for law in (dist.Normal(0.0, scale), dist.StudentT(1.5, 0.0, scale), dist.Cauchy(0.0, scale)):
        density = LogDensity(lambda law=law: pyro.sample("x", law))
        best = take_census(density, torch.zeros(1)).best
        assert find_flat_direction(density.log_prob, best) is None


def test_an_improper_density_has_none() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(2.0))

    density = LogDensity(model)
    best = take_census(density, density.initial).best
    direction = find_flat_direction(density.log_prob, best)
    assert direction is not None
    assert float((direction[0] + direction[1]) / direction.abs().amax()) == pytest.approx(
        0.0, abs=1e-6
    )


def test_correlated_latents_are_fitted_exactly() -> None:
    def chain() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0))

    def pair() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.5 * a, 1.0))

    for model in (chain, pair):
        assert abs(take_census(LogDensity(model), torch.zeros(2)).best.elbo) < 1e-6


def test_modes_that_differ_in_one_entry_of_many_are_two() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(60), 1.0).to_event(1))
        two = torch.logaddexp(-0.5 * (x[0] - 4) ** 2, -0.5 * (x[0] + 4) ** 2)
        pyro.factor("two", two + 0.5 * x[0] ** 2)

    assert len(take_census(LogDensity(model), torch.zeros(60)).weights) == 2


def test_prior_draws_at_which_the_model_fails_are_left_out() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Poisson(x).mask(x > -9), obs=torch.tensor(1.0))

    density = LogDensity(model, init_loc_fn=lambda site: torch.tensor(1.0))
    draws = prior_draws(density, 64)["x"]
    assert 10 < len(draws) < 60
    assert bool((draws > 0).all())
    take_census(density, density.initial, starts=8)


def test_a_model_that_fails_at_all_draws_of_its_prior_has_none() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        torch.linalg.cholesky(torch.eye(2) * (x - 50))
        pyro.sample("y", dist.Poisson(x - 50), obs=torch.tensor(1.0))

    density = LogDensity(model, init_loc_fn=lambda site: torch.tensor(60.0))
    assert prior_draws(density, 8) == {}


def test_a_guide_misses_what_it_gives_a_twentieth_of_its_density() -> None:
    log_evidence, log_q = -3.0, torch.tensor([0.5, 0.5, torch.nan])
    log_p = torch.tensor([19.0, 21.0, 1e-9]).log() + 0.5 + log_evidence
    assert has_missed(log_p, log_q, log_evidence).tolist() == [False, True, True]
