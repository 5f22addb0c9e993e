"""Fits of models with many rows of data."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.model import LogDensity, prediction
from pyroflows.model.prediction import inference_data, site_draws


def test_a_nearly_normal_posterior_needs_no_training() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(8), 2.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)

    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(20_000, 8, generator=generator), torch.randn(20_000, generator=generator)
    y = x.sum(-1) + noise
    posterior = pf.fit_posterior(model, (x, y), progress=False)
    assert posterior.verdict.ok
    assert posterior.name == "structured"
    assert not posterior.history
    precision = x.double().mT @ x.double() + torch.eye(8) / 4
    mean = torch.linalg.solve(precision, x.double().mT @ y.double())
    width = torch.linalg.inv(precision).diagonal().sqrt()
    slope = posterior.sample(4000, seed=0)["slope"].double()
    assert ((slope.mean(0) - mean) / width).abs().amax() < 0.06
    assert (slope.std(0) / width).log().abs().amax() < 0.06


def test_the_mirror_image_of_a_posterior_of_many_rows_is_missed_aloud() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((x @ slope).abs(), 1.0), obs=y)

    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(17_000, 8, generator=generator), torch.randn(17_000, generator=generator)
    y = (x @ torch.linspace(-1, 1, 8)).abs() + noise
    posterior = pf.fit_posterior(model, (x, y), guide=pf.AutoStructuredFlow, progress=False)
    assert [finding.name for finding in posterior.verdict.failed] == ["census"]


def test_draws_run_no_model_without_deterministic_sites() -> None:
    runs = []

    def model() -> None:
        runs.append(1)
        pyro.sample("x", dist.Normal(0.0, 1.0))

    density = LogDensity(model)
    runs.clear()
    assert site_draws(density, torch.zeros(50, 1))["x"].shape == (50,)
    assert len(runs) <= 1


def test_likelihoods_of_too_many_rows_are_left_out_with_a_note(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(20))

    monkeypatch.setattr(prediction, "MOST_NUMBERS", 100)
    density = LogDensity(model)
    few = inference_data(density, torch.zeros(1, 5, 1), {})
    many = inference_data(density, torch.zeros(1, 6, 1), {})
    assert "log_likelihood" in few.groups()
    assert "log_likelihood" not in many.groups()
    assert "it would have 120 numbers" in many.attrs["log_likelihood"]
