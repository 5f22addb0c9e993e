"""The benchmark of real models: what it compares, and how it counts."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import real_models
from benchmarks.pyro_models import MODELS
from benchmarks.real_models import Row, compare, read_references, right_moments, run_row
from pyroflows.model import LogDensity

QUICK = ("coin", "weighing", "working_memory", "inclined_plane")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS]
)
@pytest.mark.filterwarnings("ignore:This model cannot be captured")
def test_every_model_has_a_density_in_batches(name: str) -> None:
    case = MODELS[name]()
    density = LogDensity(case.model, case.args)
    assert density.mode in ("captured", "vmap")
    assert bool(density.log_prob(density.initial).isfinite())


@pytest.mark.parametrize("name", ["coin", "weighing"])
def test_a_fit_is_compared_with_its_closed_form(name: str) -> None:
    row = run_row(name, 0, 60.0, right_moments(name, {}))
    assert row.outcome == "right"
    assert row.mode == "captured" and row.features == 1


def test_stored_chains_name_the_scalars_of_their_models() -> None:
    for name, found in read_references().items():
        assert name in MODELS
        assert found["least_ess"] >= real_models.LEAST_ESS
        assert all(sd > 0 for _, sd in found["moments"].values())


def test_long_chains_find_a_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "CHAIN_DRAWS", 200)
    monkeypatch.setattr(real_models, "WARMUP", 100)
    case = MODELS["weighing"]()
    found = real_models.long_run("weighing")
    (mean, sd), (right, right_sd) = found["moments"]["weight"], case.exact["weight"]
    # Four standard errors of as many independent draws as the chains have.
    assert abs(mean - right) < 4 * right_sd / math.sqrt(found["least_ess"])
    assert abs(math.log(sd / right_sd)) < 4 / math.sqrt(2 * found["least_ess"])
    assert torch.get_default_dtype() == torch.float32


def test_errors_are_in_standard_deviations() -> None:
    draws = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([0.0, 2.0])}
    mean, log_sd = compare(draws, {"a": (1.0, 2.0), "b": (1.0, 2**0.5)})
    assert mean == pytest.approx(0.5)
    assert log_sd == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (Row("m", 0, sentence="ValueError: no"), "failed"),
        (Row("m", 0, "captured", ok=True, right=True), "right"),
        (Row("m", 0, "captured", ok=True, right=False), "WRONG"),
        (Row("m", 0, "captured", ok=True), "unknown"),
        (Row("m", 0, "captured", right=True), "not trusted"),
    ],
)
def test_outcomes(row: Row, outcome: str) -> None:
    assert row.outcome == outcome
    assert outcome in real_models.table([row])


def test_the_summary_counts_models_over_their_seeds() -> None:
    good = [Row("a", seed, "captured", ok=True, right=True) for seed in (0, 1)]
    mixed = [Row("b", seed, "captured", ok=True, right=seed == 0) for seed in (0, 1)]
    assert real_models.summary(good + mixed) == (
        "1 of 2 models are trusted and right for every seed, 1 trusted and wrong for some, "
        "0 fail for some."
    )
