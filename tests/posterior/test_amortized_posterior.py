"""Posteriors learned from simulations."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.posterior import AmortizedPosterior

QUICK: dict[str, Any] = {"simulations": 200, "ensemble": 1, "max_epochs": 1, "progress": False}
NORMAL = dist.Normal(torch.zeros(2), 1.0)


def shifted(theta: Tensor) -> Tensor:
    return theta + torch.randn(theta.shape)


def small_flow(features: int, context: int) -> pf.Flow:
    return pf.MAF(features, context, transforms=2, hidden=(16,))


def conjugate(n: int = 3, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", n):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.fixture(scope="module")
def of_model() -> AmortizedPosterior:
    return pf.fit_amortized(conjugate, data=["y"], context="vector", flow=small_flow, **QUICK)


@pytest.fixture(scope="module")
def of_function() -> AmortizedPosterior:
    return pf.fit_amortized(shifted, NORMAL, flow=small_flow, **QUICK)


def test_the_posterior_of_a_model_is_corrected_and_judged(of_model: AmortizedPosterior) -> None:
    y = torch.tensor([1.0, 2.0, -0.5])
    posterior = of_model.posterior_for(y)
    assert posterior.verdict.ok, posterior
    mu = posterior.sample(4000, seed=0)["mu"]
    assert abs(float(mu.mean()) - float(y.sum()) / 4) < 0.03
    assert abs(float(mu.std()) - 0.5) < 0.03
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0).log_prob(y)
    assert abs(posterior.log_evidence - float(exact)) < 0.02


def test_draws_are_not_corrected_unless_judged(of_model: AmortizedPosterior) -> None:
    posterior = of_model.posterior_for([1.0, 2.0, -0.5], judge=False)
    assert not posterior.corrects and "has not been judged" in str(posterior.verdict)
    assert posterior.to_arviz(20).posterior["mu"].shape == (1, 20)


def test_one_model_serves_all_data(of_model: AmortizedPosterior) -> None:
    means = [
        of_model.posterior_for(torch.full((3,), v), judge=False).sample(2000, seed=0)["mu"].mean()
        for v in (-1.0, 0.0, 1.0)
    ]
    assert means[0] < means[1] - 0.3 < means[2] - 0.6


def test_the_posterior_of_a_model_can_be_saved(
    of_model: AmortizedPosterior, tmp_path: Path
) -> None:
    posterior = of_model.posterior_for(torch.ones(3), judge=False)
    posterior.save(tmp_path / "p.pt")
    again = pf.load_posterior(tmp_path / "p.pt", conjugate)
    torch.testing.assert_close(again.sample(5, seed=0), posterior.sample(5, seed=0))


def test_the_posterior_of_a_function_says_that_it_is_not_judged(
    of_function: AmortizedPosterior,
) -> None:
    posterior = of_function.posterior_for(torch.ones(2))
    assert "has no likelihood to judge it by" in str(posterior)
    assert not posterior.verdict.ok and math.isnan(posterior.log_evidence)
    assert list(posterior.summary(100).index) == ["theta[0]", "theta[1]"]
    assert posterior.covariance(100).shape == (2, 2)
    data = posterior.to_arviz(30)
    assert data.posterior["theta"].shape == (1, 30, 2)
    assert data.observed_data["x"].values.tolist() == [1.0, 1.0]
    for refused in (lambda: posterior.density, lambda: posterior.propose(3)):
        with pytest.raises(ValueError, match="whose density is known"):
            refused()
    with pytest.raises(ValueError, match="of a Pyro model to save"):
        posterior.save("never.pt")


def test_bounds_of_the_prior_are_never_crossed() -> None:
    prior = {
        "a": dist.Uniform(0.0, 1.0),
        "b": dist.Dirichlet(torch.ones(3)),
        "c": dist.HalfNormal(torch.ones(2)),
    }

    def simulator(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"one": theta["a"], "rest": torch.cat([theta["b"], theta["c"]])}

    amortized = pf.fit_amortized(simulator, prior, **QUICK)
    with pytest.warns(UserWarning, match="outside of the range of the simulations"):
        posterior = amortized.posterior_for({"one": 1.1, "rest": torch.zeros(5)})
    draws = posterior.sample(500, seed=0)
    assert bool(((draws["a"] >= 0) & (draws["a"] <= 1)).all())
    torch.testing.assert_close(draws["b"].sum(-1), torch.ones(500))
    assert bool((draws["c"] >= 0).all())


def test_same_seed_same_posterior() -> None:
    def mean(seed: int) -> Tensor:
        made = pf.fit_amortized(shifted, NORMAL, seed=seed, **QUICK)
        return made.posterior_for([0.5, 0.5]).sample(50, seed=0)["theta"].mean(0)

    assert torch.equal(mean(0), mean(0)) and not torch.equal(mean(0), mean(1))


def test_simulations_may_be_given_and_resumed(tmp_path: Path) -> None:
    drawn = pf.simulate(shifted, NORMAL, 200, path=tmp_path / "s.pt")
    quick = {**QUICK, "simulations": drawn}
    given = pf.fit_amortized(shifted, NORMAL, flow=small_flow, **quick)
    read = pf.fit_amortized(shifted, NORMAL, flow=small_flow, path=tmp_path / "s.pt", **QUICK)
    here = pf.fit_amortized(shifted, NORMAL, flow=small_flow, **QUICK)
    z = torch.zeros(1, 2)
    values = [made.guide_for([0.0, 0.0]).log_prob(z) for made in (given, read, here)]
    assert values[0] == values[1] == values[2]


def test_rounds_spend_simulations_near_the_observation(tmp_path: Path) -> None:
    wide = dist.Normal(torch.zeros(2), 10.0)
    quick = {**QUICK, "simulations": 400, "path": tmp_path / "s.pt", "flow": small_flow}
    amortized = pf.fit_amortized(shifted, wide, observation=[3.0, 3.0], rounds=2, **quick)
    first, second = amortized.simulations.theta["theta"].split(200)
    assert float(first.std()) > 8 and float((second - 3).abs().max()) < 6
    again = pf.fit_amortized(shifted, wide, observation=[3.0, 3.0], rounds=2, **quick)
    torch.testing.assert_close(again.simulations.theta, amortized.simulations.theta)
    with pytest.warns(UserWarning, match="refined at another observation"):
        amortized.posterior_for([0.0, 3.0])


def test_truncated_proposals_of_a_model_are_draws_of_its_prior(
    of_model: AmortizedPosterior,
) -> None:
    mu = of_model.propose([2.0, 2.0, 2.0], 300, seed=0)["mu"]
    assert mu.shape == (300,) and float(mu.min()) > -0.9
    # Within the region they follow the prior, whose density falls there.
    low, high = (mu < 0.8).sum(), (mu > 2.2).sum()
    assert int(low) > 5 * int(high)


def test_rows_that_are_exchangeable_are_read_as_a_set() -> None:
    amortized = pf.fit_amortized(conjugate, args=(6,), data=["y"], flow=small_flow, **QUICK)
    y = torch.randn(6)
    z = torch.zeros(1, 1)
    values = [amortized.guide_for(each).log_prob(z) for each in (y, y.flip(0))]
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["set", "series", "own"])
def test_embeddings_are_trained(kind: str) -> None:
    context: Any = nn.Linear(5, 2) if kind == "own" else kind
    before = copy.deepcopy(context)
    made = pf.fit_amortized(
        lambda theta: theta + torch.randn(5),
        dist.Normal(0.0, 1.0),
        context=context,
        flow=small_flow,
        **{**QUICK, "max_epochs": 15, "learning_rate": 0.02, "average": None},
    )
    assert made.posterior_for(torch.zeros(5)).sample(3)["theta"].shape == (3,)
    if isinstance(context, nn.Module):
        torch.testing.assert_close(context.weight, before.weight)
        trained: Any = made.flows[0].embedding
        assert not torch.equal(trained.weight, before.weight)


def test_local_and_discrete_latents_are_integrated_out_by_draws() -> None:
    def mixture(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y)

    amortized = pf.fit_amortized(mixture, args=(torch.zeros(3),), flow=small_flow, **QUICK)
    assert list(amortized.simulations.theta) == ["mu"]
    assert amortized.posterior_for(torch.ones(3)).verdict.draws > 0


def test_what_was_learned_can_be_pickled(of_function: AmortizedPosterior) -> None:
    again = pickle.loads(pickle.dumps(of_function))
    x, z = torch.zeros(2), torch.ones(1, 2)
    torch.testing.assert_close(again.guide_for(x).log_prob(z), of_function.guide_for(x).log_prob(z))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"simulations": 10}, "at least 20 simulations a round, .* got 10 for 1 round"),
        ({"rounds": 3}, "an observation for 3 rounds; got None"),
        ({"rounds": 0}, "rounds >= 1"),
        ({"observation": [1.0], "rounds": 2}, r"x of shape \(2,\), .* got \(1,\)"),
        ({"context": "sett"}, "context to be one of 'vector', 'set', 'series'; got 'sett'"),
        ({"context": "set", "simulator": lambda theta: theta.sum()}, "data with rows"),
        ({"context": nn.Linear(3, 1)}, r"context to take data of shape \(2, 2\)"),
        ({"context": nn.Unflatten(1, (2, 1))}, r"vectors of shape \(2, k\) .* got \(2, 2, 1\)"),
        ({"flow": lambda a, b: pf.MAF(a)}, "flow to make a Flow of"),
        ({"flow": lambda a: pf.MAF(a)}, r"flow to be called with \(features, context\)"),
        ({"ensembel": 3}, "options of the training .* got 'ensembel'"),
        ({"ensemble": 0}, "ensemble >= 1"),
        ({"time_limit": -1}, "time_limit to be positive"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_bad_options_are_told_before_all_simulations(
    options: dict[str, Any], sentence: str
) -> None:
    calls = 0

    def counted(theta: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return shifted(theta)

    with pytest.raises((TypeError, ValueError), match=sentence):
        pf.fit_amortized(**{"simulator": counted, "prior": NORMAL, **QUICK, **options})
    assert calls <= 10


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.zeros(3), r"Expected x of shape \(2,\), as in the simulations; got \(3,\)"),
        (torch.tensor([0.0, torch.nan]), "finite numbers in x; 1 of 2 are not"),
        ({"y": torch.zeros(2)}, "data by the names 'x'; got 'y'"),
        ("abc", "can't convert|Expected"),
    ],
)
def test_bad_data_are_told(of_function: AmortizedPosterior, x: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        of_function.posterior_for(x)


def test_parameters_on_the_edge_of_the_support_are_left_out() -> None:
    prior = dist.Gamma(0.02, 1.0)  # whose draws are often zero in single precision
    amortized = pf.fit_amortized(
        lambda theta: theta + torch.randn(()), prior, flow=small_flow, **QUICK
    )
    assert bool((amortized.simulations.theta["theta"] < 1e-36).any())
    draws = amortized.posterior_for(1.0).sample(50, seed=0)["theta"]
    assert bool(draws.isfinite().all())


def test_given_simulations_leave_no_room_for_rounds() -> None:
    drawn = pf.simulate(shifted, NORMAL, 40)
    with pytest.raises(ValueError, match="number of simulations where rounds"):
        pf.fit_amortized(shifted, NORMAL, drawn, rounds=2, observation=[0.0, 0.0])


@pytest.mark.slow
def test_ranks_of_the_truth_are_uniform() -> None:
    prior = dist.Uniform(-torch.ones(2), torch.ones(2))
    amortized = pf.fit_amortized(
        lambda theta: theta.abs() + 0.3 * torch.randn(2), prior, 2000, ensemble=1, progress=False
    )
    fresh = pf.simulate(amortized.simulator, count=400, seed=1)
    ranks = []
    for theta, x in zip(fresh.theta["theta"], fresh.x["x"], strict=True):
        draws = amortized.guide_for(x).sample(99)
        values = amortized.layout.density.constrain(draws)["theta"]
        ranks.append((values < theta).sum(0))
    counts = torch.stack([r.flatten().bincount(minlength=100) for r in torch.stack(ranks).T])
    bins = counts.reshape(2, 10, 10).sum(-1).double()
    chi2 = ((bins - 40).square() / 40).sum(-1)
    assert float(chi2.max()) < 27.9  # its quantile .999 with 9 degrees of freedom
