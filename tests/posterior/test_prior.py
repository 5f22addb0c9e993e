"""Yesterday's posterior as today's prior."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

import pyroflows as pf
from pyroflows.model import LogDensity
from pyroflows.posterior.posterior import Posterior
from pyroflows.posterior.prior import OnSites, OntoSites, SitesPrior


def study(y: Tensor) -> None:
    """Data with a mean and a scale, and a share that has no part in them."""
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def fitted(y: Tensor, spread: float = 0.2) -> Posterior:
    """A posterior of an untrained guide, which needs no correction that is not made."""
    density = LogDensity(study, (y,))
    guide = pf.AutoFlow(study, init_scale=spread)
    density.introduce(guide)
    return Posterior(guide, density)


def sites_of(posterior: Posterior) -> list[Any]:
    return list(posterior.density.sites)


def test_a_closed_density_is_taken_as_it_is() -> None:
    posterior = fitted(torch.randn(20))
    prior = posterior.as_prior()
    z, log_q = posterior.guide.sample_and_log_prob(5)
    onto = OntoSites(sites_of(posterior))
    value = onto(z)
    expected = log_q - onto.log_abs_det_jacobian(z, value)
    torch.testing.assert_close(prior.log_prob(value), expected, atol=1e-4, rtol=0.0)
    assert prior.event_shape == (5,)
    assert {name: tuple(v.shape) for name, v in prior.split(value).items()} == {
        "mean": (5,),
        "scale": (5,),
        "share": (5, 3),
    }


def test_the_map_onto_sites_is_a_bijection_with_its_jacobian() -> None:
    posterior = fitted(torch.randn(20))
    onto = OntoSites(sites_of(posterior))
    z = torch.randn(4, 4, dtype=torch.float64)
    value = onto(z)
    torch.testing.assert_close(onto.inv(value), z)
    assert bool(OnSites(onto.sites).check(value).all())
    assert not bool(OnSites(onto.sites).check(-value).any())
    free = [0, 1, 2, 3]  # the last entry of a simplex follows from the others
    for point, log_det in zip(z, onto.log_abs_det_jacobian(z, value), strict=True):
        jacobian = torch.autograd.functional.jacobian(onto, point)[free]
        assert float(jacobian.det().abs().log()) == pytest.approx(float(log_det), abs=1e-8)


def test_a_marginal_is_learned_from_draws() -> None:
    prior = fitted(torch.randn(20)).as_prior(["scale"], draws=2000)
    log = prior.sample((4000,)).log()
    assert float(log.std()) == pytest.approx(0.2, abs=0.02)
    grid = torch.linspace(0.01, 5.0, 2000).unsqueeze(-1)
    mass = torch.trapezoid(prior.log_prob(grid).exp(), grid.squeeze(-1))
    assert float(mass) == pytest.approx(1.0, abs=0.01)


def test_the_same_seed_gives_the_same_prior_and_moves_no_random_state() -> None:
    posterior = fitted(torch.randn(20))
    state = torch.get_rng_state()
    first, second = (posterior.as_prior(["mean"], draws=200) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    value = torch.zeros(1)
    assert torch.equal(first.log_prob(value), second.log_prob(value))


def test_it_expands_and_copies() -> None:
    prior = fitted(torch.randn(20)).as_prior()
    many = prior.expand((7,))
    assert isinstance(many, SitesPrior)
    assert many.sample().shape == (7, 5)
    assert list(many.split(many.sample())) == ["mean", "scale", "share"]
    value = prior.sample()
    assert torch.equal(copy.deepcopy(prior).log_prob(value), prior.log_prob(value))


def test_it_takes_the_place_of_priors_in_their_model() -> None:
    prior = fitted(torch.randn(20)).as_prior()
    y = torch.randn(8)
    today = prior.replace(study)
    trace = poutine.trace(today).get_trace(y)
    trace.compute_log_prob()
    value = trace.nodes["prior"]["value"]
    sites = prior.split(value)
    likelihood = dist.Normal(sites["mean"], sites["scale"]).log_prob(y).sum()
    torch.testing.assert_close(trace.log_prob_sum(), prior.log_prob(value) + likelihood)
    density = LogDensity(today, (y,))
    assert [site.name for site in density.sites] == ["prior"]
    z = torch.randn(6, density.features)
    expected = torch.stack([density.log_prob(row) for row in z])
    torch.testing.assert_close(density.log_prob(z), expected, atol=1e-4, rtol=1e-4)


def test_its_parameters_stay_fixed() -> None:
    prior = fitted(torch.randn(20)).as_prior(["mean"], draws=200)
    assert not any(parameter.requires_grad for parameter in prior.flow.parameters())
    today = prior.replace(study)
    trace = poutine.trace(today).get_trace(torch.randn(4))
    assert [n for n, node in trace.nodes.items() if node["type"] == "param"] == []


def test_a_prior_is_predicted_from() -> None:
    prior = fitted(torch.randn(20)).as_prior()
    draws = Predictive(prior.replace(study), num_samples=5)(torch.randn(3))
    assert draws["mean"].numel() == 5


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an unknown site": ({"sites": ["location"]}, ValueError, "among mean, scale, share; got"),
    "a word": ({"sites": "mean"}, TypeError, "a sequence of names"),
    "no site": ({"sites": []}, ValueError, "one site or more"),
    "few draws": ({"draws": 3}, ValueError, "draws >= 100"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    options, error, match = REFUSED[case]
    posterior = fitted(torch.randn(20))
    with pytest.raises(error, match=match):
        posterior.as_prior(**options)


def test_a_model_with_another_shape_is_refused() -> None:
    prior = fitted(torch.randn(20)).as_prior()

    def other() -> None:
        pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"'mean' of shape \(\), .*got \(2,\) in the model"):
        prior.replace(other)()


def test_a_model_that_lacks_or_observes_a_site_is_refused() -> None:
    prior = fitted(torch.randn(20)).as_prior(["mean"], draws=200)

    def other() -> None:
        pyro.sample("centre", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="the sites of its prior, mean; it has no 'mean'"):
        prior.replace(other)()
    known = poutine.condition(study, data={"mean": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="'mean' to be latent in the model"):
        prior.replace(known)(torch.zeros(2))
    with pytest.raises(ValueError, match="a name that none of the prior's sites has; got 'mean'"):
        prior.replace(study, name="mean")
    with pytest.raises(TypeError, match="name to be a string; got 3"):
        prior.replace(study, name=3)  # type: ignore[arg-type]


def test_values_of_another_shape_are_refused() -> None:
    prior = fitted(torch.randn(20)).as_prior()
    with pytest.raises(ValueError, match=r"value of shape \(\*, 5\); got \(2,\)"):
        prior.split(torch.zeros(2))


def test_seeds_may_be_numbers_of_numpy() -> None:
    posterior = fitted(torch.randn(20))
    one, two = (posterior.sample(3, seed=seed)["mean"] for seed in (7, np.int64(7)))
    assert torch.equal(one, two)
    one, two = (
        posterior.as_prior(["mean"], draws=200, seed=seed).log_prob(torch.zeros(1))
        for seed in (7, np.int64(7))
    )
    assert torch.equal(one, two)


@pytest.mark.slow
def test_a_study_in_two_halves_is_that_of_one_shot() -> None:
    y = 3.0 + 2.0 * torch.randn(60)
    whole = pf.fit_posterior(study, (y,), progress=False)
    first = pf.fit_posterior(study, (y[:30],), progress=False)
    today = first.as_prior(["mean", "scale"], draws=20000).replace(study)
    second = pf.fit_posterior(today, (y[30:],), progress=False)
    one, two = whole.sample(20000), second.sample(20000)
    for name in ("mean", "scale"):
        sd = float(one[name].std())
        assert float((one[name].mean() - two[name].mean()).abs()) < 0.05 * sd
        assert float(two[name].std()) == pytest.approx(sd, rel=0.05)
