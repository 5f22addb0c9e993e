"""Likelihoods learned from simulations."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.train import LearnedLikelihood

QUICK: dict[str, Any] = {"simulations": 400, "max_epochs": 1, "progress": False}
PRIOR = {"mu": dist.Normal(0.0, 1.0), "shift": dist.Uniform(-torch.ones(2), torch.ones(2))}


def small_flow(features: int, context: int) -> pf.Flow:
    return pf.MAF(features, context, transforms=2, hidden=(16,))


def simulator(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"a": theta["mu"] + torch.randn(()), "b": theta["shift"] + 0.1 * torch.randn(2)}


@pytest.fixture(scope="module")
def likelihood() -> LearnedLikelihood:
    return pf.fit_likelihood(simulator, PRIOR, flow=small_flow, **QUICK)


def test_it_is_the_likelihood(likelihood: LearnedLikelihood) -> None:
    theta = {"mu": torch.tensor([0.0, 1.0]), "shift": torch.tensor([[0.1, 0.2], [0.0, -0.5]])}
    draws = likelihood(theta).sample((2000,))
    assert draws.shape == (2000, 2, 3)
    expected = torch.cat([theta["mu"].unsqueeze(-1), theta["shift"]], -1)
    torch.testing.assert_close(draws.mean(0), expected, atol=0.25, rtol=0)
    torch.testing.assert_close(
        draws.std(0), torch.tensor([[1.0, 0.1, 0.1]] * 2), atol=0.1, rtol=0.3
    )


def test_many_observations_share_one_network(likelihood: LearnedLikelihood) -> None:
    x = {"a": torch.tensor([1.0, 0.5, 1.5, 1.0]), "b": torch.zeros(4, 2)}
    density = pf.model.LogDensity(likelihood.model, (x,))
    assert density.batched and density.features == 3
    z = torch.randn(5, 3)
    theta = density.constrain(z)
    rows = torch.cat([x["a"].unsqueeze(-1), x["b"]], -1)
    each = torch.stack([likelihood(theta).log_prob(row) for row in rows])
    prior = pf.model.LogDensity(likelihood.simulator.prior).log_prob(z)
    torch.testing.assert_close(density.log_prob(z), prior + each.sum(0), rtol=1e-4, atol=1e-3)


def test_same_seed_same_likelihood() -> None:
    x, theta = torch.zeros(3), {"mu": torch.zeros(()), "shift": torch.zeros(2)}
    made = [pf.fit_likelihood(simulator, PRIOR, flow=small_flow, **QUICK) for _ in range(2)]
    assert made[0](theta).log_prob(x) == made[1](theta).log_prob(x)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.zeros(3), "observations by the names 'a', 'b'"),
        ({"a": torch.zeros(3), "b": torch.zeros(3)}, r"b of shape \(\*, 2\); got \(3,\)"),
        ({"a": torch.zeros(()), "b": torch.zeros(3, 2)}, r"a of shape \(n\); got \(\)"),
        ({"a": torch.zeros(0), "b": torch.zeros(0, 2)}, r"a of shape \(n\); got \(0,\)"),
    ],
)
def test_bad_observations_are_told(likelihood: LearnedLikelihood, x: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        likelihood.model(x)


@pytest.mark.parametrize(
    ("theta", "sentence"),
    [
        (torch.zeros(3), "theta by the names mu, shift; got Tensor"),
        ({"mu": torch.zeros(())}, "theta by the names mu, shift; got mu"),
        ({"mu": torch.zeros(4), "shift": torch.zeros(4)}, r"shift of shape \(\*, 2\); got \(4,\)"),
    ],
)
def test_bad_parameters_are_told(likelihood: LearnedLikelihood, theta: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        likelihood(theta)


def test_the_order_of_parameters_does_not_matter() -> None:
    simulations = pf.simulate(simulator, PRIOR, 40)
    theta = {"mu": torch.tensor(0.0), "shift": torch.tensor([0.9, -0.9])}
    for prior in (PRIOR, dict(reversed(PRIOR.items()))):
        likelihood = pf.fit_likelihood(
            simulator, prior, simulations, flow=small_flow, max_epochs=1, progress=False
        )
        assert float(likelihood(theta).log_prob(torch.tensor([0.0, 0.9, -0.9]))) > -3
    with pytest.raises(ValueError, match=r"given other; got those given mu, shift\[2\]"):
        pf.fit_likelihood(simulator, {"other": PRIOR["mu"]}, simulations)


@pytest.mark.parametrize("name", ["max_epochs", "learning_rate", "validation", "average", "flow"])
def test_options_are_checked_before_the_simulations(name: str) -> None:
    calls = 0

    def counted(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return simulator(theta)

    with pytest.raises((TypeError, ValueError), match=f"Expected {name}"):
        pf.fit_likelihood(counted, PRIOR, **{**QUICK, name: -1})
    assert calls <= 10


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"simulations": 10}, "simulations >= 20"),
        ({"flow": lambda a, b: pf.MAF(a)}, "flow to make a Flow of"),
        ({"ensemble": 3}, "options of the training .* got 'ensemble'"),
        ({"simulator": lambda theta: theta["mu"].round()}, "whole numbers only in an entry of x"),
        ({"prior": None}, "prior to be a distribution"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], sentence: str) -> None:
    given = {"simulator": simulator, "prior": PRIOR, **QUICK, "simulations": 40, **options}
    with pytest.raises((TypeError, ValueError), match=sentence):
        pf.fit_likelihood(**given)
