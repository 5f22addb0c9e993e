"""Experiments: methods side by side under one budget, against a reference."""

from __future__ import annotations

import functools
import math
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyroflows as pf
from pyroflows.report.arviz_bridge import to_inference_data
from pyroflows.study import NUTSFit, SVIFit
from pyroflows.train.objectives import PathELBO

experiment = functools.partial(pf.experiment, progress=False)

# Two correlated means: a precision of one from the prior and of four from their sum.
PRECISION = torch.eye(2) + 4 * torch.ones(2, 2)
COVARIANCE = PRECISION.inverse()
MEAN = COVARIANCE @ torch.full((2,), 4 * 1.5)
EVIDENCE = float(dist.Normal(0.0, (0.25 + 2) ** 0.5).log_prob(torch.tensor(1.5)))


def model(y: torch.Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=y)


ARGS = (torch.tensor(1.5),)


@pytest.fixture(scope="module")
def truth() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 2, generator=generator)
    return {"x": MEAN + noise @ torch.linalg.cholesky(COVARIANCE).mT}


def fails(model: Any) -> Any:
    raise RuntimeError("no guide today.")


def test_guides_cross_objectives_and_others_have_rows_of_their_own(truth):
    found = experiment(
        model,
        ARGS,
        guides=[AutoNormal, pf.fit_posterior, "NUTS"],
        objectives=[Trace_ELBO(num_particles=8, vectorize_particles=True), PathELBO(8)],
        reference=truth,
        steps=120,
    )
    labels = [tuple(label) for label in found.table[["method", "objective"]].to_numpy()]
    assert labels == [
        ("AutoNormal", "Trace_ELBO(8)"),
        ("AutoNormal", "PathELBO(8)"),
        ("fit_posterior", ""),
        ("NUTS", ""),
    ]
    table = found.table.set_index(["method", "objective"])
    # A mean-field Gaussian has the sd of a coordinate given the other.
    narrow = 0.5 * math.log(float(COVARIANCE[0, 0] * PRECISION[0, 0]))
    mean_field = table.loc[("AutoNormal", "PathELBO(8)")]
    assert mean_field["log_sd_error"] == pytest.approx(narrow, abs=0.12)
    ours = table.loc[("fit_posterior", "")]
    assert ours["mean_error"] < 0.1 and ours["log_sd_error"] < 0.1 and ours["ok"]
    assert ours["log_evidence"] == pytest.approx(EVIDENCE, abs=0.01)
    assert ours["elbo"] > mean_field["elbo"]
    assert math.isnan(table.loc[("NUTS", "")]["elbo"]) and table.loc[("NUTS", "")]["ess"] > 0
    assert (table["seconds"] > 0).all() and (table["error"] == "").all()


def test_step_sizes_are_those_of_the_methods():
    slow = SVIFit(AutoNormal, learning_rate=1e-3)
    guides = {"slow": slow, "fast": AutoNormal, "flow": pf.RealNVP}
    found = experiment(model, ARGS, guides=guides, steps=2, draws=100)
    assert (found.table["error"] == "").all()
    elbo = found.table.set_index("method")["elbo"]
    assert elbo["slow"] < elbo["fast"]


def test_seeds_processes_and_a_file_give_the_same_table(tmp_path):
    given = {"guides": [AutoNormal], "steps": 10, "draws": 100}
    alone = experiment(model, ARGS, seeds=2, **given)
    path = tmp_path / "experiment.pt"
    experiment(model, ARGS, seeds=1, checkpoint=path, **given)
    with ProcessPoolExecutor(1) as executor:
        other = experiment(model, ARGS, seeds=2, checkpoint=path, executor=executor, **given)
    assert alone.table["elbo"].tolist() == other.table["elbo"].tolist()
    assert alone.summary().loc[("AutoNormal", "Trace_ELBO"), "elbo"] == np.median(
        alone.table["elbo"]
    )
    with pytest.raises(ValueError, match="has model"):
        experiment(model, (torch.tensor(0.0),), checkpoint=path, **given)
    with pytest.raises(ValueError, match="has budget"):
        experiment(model, ARGS, checkpoint=path, **given | {"steps": 20})


def test_a_fit_that_fails_has_a_row_that_says_why(truth):
    found = experiment(
        model,
        ARGS,
        guides={"broken": fails, "a point": AutoDelta, "fine": AutoNormal},
        reference=truth,
        steps=2,
    )
    reasons = dict(zip(found.table["method"], found.table["error"], strict=True))
    assert reasons["broken"] == "RuntimeError (no guide today)"
    assert "guide with a density" in reasons["a point"] and reasons["fine"] == ""
    assert found.summary()["failed"].tolist() == [1, 1, 0]
    assert "Failed: broken | Trace_ELBO | 0: RuntimeError" in str(found)
    figure = found.plot()
    assert [axes.get_title() for axes in figure.axes][-1] == "CPU seconds"


def test_a_reference_comes_in_many_forms(truth):
    values = truth["x"].numpy()
    chains = values.reshape(4, 5000, 2)

    class OfPyro:
        def get_samples(self) -> Any:
            return truth

    class OurChains:
        draws = {"x": torch.as_tensor(chains)}  # noqa: RUF012

    container = to_inference_data({"posterior": {"x": chains}})
    fit = {"guides": [AutoNormal], "steps": 2, "draws": 100}
    tables = [
        experiment(model, ARGS, reference=reference, **fit).table
        for reference in (truth, {"x": values}, OfPyro(), OurChains(), container)
    ]
    for table in tables:
        assert table["mean_error"][0] == pytest.approx(tables[0]["mean_error"][0], rel=1e-5)
    assert "mean_error" not in experiment(model, ARGS, **fit).table


def test_a_budget_of_cpu_seconds_ends_the_training():
    ticks = iter(range(1000))

    class Counted(AutoNormal):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            next(ticks)
            return super().forward(*args, **kwargs)

    SVIFit(Counted, cpu_seconds=1e-9)(model, ARGS, {})
    assert next(ticks) <= 2
    with pytest.raises(RuntimeError, match="no draw after warm-up"):
        NUTSFit(cpu_seconds=1e-9)(model, ARGS, {})


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"guides": []}, ValueError, "one method at least"),
        ({"guides": AutoNormal}, TypeError, "guides to be a list, or a mapping"),
        ({"guides": ["HMC"]}, TypeError, "or 'NUTS'; got 'HMC'"),
        ({"guides": [AutoNormal(model)]}, TypeError, "classes such as AutoNormal"),
        ({"guides": [AutoNormal, AutoNormal]}, ValueError, "'AutoNormal' twice. Give a mapping"),
        ({"guides": [lambda: None]}, TypeError, "a call with the model alone"),
        ({"objectives": [Trace_ELBO]}, TypeError, "Expected objectives of pyro.infer"),
        ({"seeds": 0}, ValueError, "seeds >= 1"),
        ({"seeds": [1, 1]}, ValueError, "each once"),
        ({"steps": 0}, ValueError, "steps >= 2"),
        ({"cpu_seconds": -1.0}, ValueError, "cpu_seconds to be positive"),
        ({"draws": 1}, ValueError, "draws >= 100"),
        ({"budget": 1}, TypeError, "Expected the options executor"),
        ({"reference": 3}, TypeError, "Expected reference to be draws by site"),
        ({"reference": {"z": torch.zeros(9)}}, ValueError, "'x' is not among 'z'"),
        ({"reference": {"x": torch.zeros(9)}}, ValueError, r"of shape \(n, 2\); got \(9,\)"),
        ({"reference": {"x": torch.full((9, 2), torch.nan)}}, ValueError, "finite reference draws"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(options, error, told):
    with pytest.raises(error, match=told):
        experiment(model, ARGS, **{"guides": [AutoNormal], **options})
