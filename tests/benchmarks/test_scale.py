"""The benchmark of large models: its models, their right numbers, and how it counts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but_for
from torch import Tensor

from benchmarks import report, scale
from benchmarks.scale import Found, Point, Row, merge, read_rows, run_row, with_errors, write_json
from benchmarks.scale_closed_forms import CLOSED_FORMS, latent_gaussian
from benchmarks.scale_models import FAMILIES, NAMES, Case, make_case, split_name
from benchmarks.scale_references import (
    Globals,
    Reference,
    marginal_density,
    read_references,
    weigh,
)
from pyroflows.model import LogDensity

LATENTS = {
    "eight_schools": 10,
    "funnel-4": 5,
    "groups-4": 7,
    "slopes-3": 12,
    "schools-1": 50,
    "crossed-5x4": 13,
    "items-5x4": 17,
    "level_increments-6": 8,
    "level_states-6": 8,
    "volatility-6": 9,
    "ar2-6": 10,
    "counts-5": 8,
    "regions-14": 18,
    "logistic-20": 11,
    "hierarchical_logistic-3x20": 10,
    "horseshoe-20": 42,
    "network-4": 14,
}
NORMAL = [
    "eight_schools",
    "funnel-4",
    "groups-4",
    "slopes-3",
    "schools-1",
    "crossed-5x4",
    "level_increments-6",
    "level_states-6",
    "ar2-6",
]
# JAX compiles every operation of the others.
QUICK = ["funnel-4"]
TWO_LOCALS = ["hierarchical_logistic-2x30", "counts-2", "regions-2", "volatility-2"]


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_every_family_is_tested_and_run() -> None:
    families = {split_name(name)[0] for name in LATENTS}
    assert families == {split_name(name)[0] for name in NAMES} == set(FAMILIES)
    assert set(CLOSED_FORMS) == families - {"items", "horseshoe", "network"}


#: Models of many plates, which are dear to run, beside those of few.
DEAR = {"crossed-5x4", "items-5x4", "level_increments-6", "schools-1", "slopes-3"}


@pytest.mark.parametrize("name", slow_but_for(set(LATENTS) - DEAR, LATENTS))
def test_every_model_evaluates_and_has_its_latents(name: str) -> None:
    case = make_case(name)
    density = LogDensity(case.model, case.args)
    assert density.mode == "captured"
    assert bool(density.log_prob(density.initial).isfinite())
    assert density.features == Globals(case).latents == LATENTS[name]
    assert set(case.globals) <= {site.name for site in density.sites}


def test_data_are_the_same_each_time_and_for_both_ways_to_write_a_level() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (one,) = make_case("level_states-5").args
    torch.manual_seed(2)
    (other,) = make_case("level_increments-5").args
    assert torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["flat-3", "groups-few", "groups-"])
def test_a_name_that_says_nothing_is_refused(name: str) -> None:
    if name == "groups-":
        with pytest.raises(TypeError):
            make_case(name)
    else:
        with pytest.raises(ValueError, match="Expected a name such as groups-400"):
            make_case(name)


# Right numbers


def places_of(case: Case, density: LogDensity) -> tuple[Tensor, Tensor]:
    """Places of the globals, in their order, and of the other entries."""
    parts = torch.arange(density.features).split([site.features for site in density.sites])
    names = [site.name for site in density.sites]
    places = dict(zip(names, parts, strict=True))
    globals_ = torch.cat([places.pop(name) for name in case.globals])
    return globals_, torch.cat(list(places.values()))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", slow_but_for(set(NORMAL) - DEAR, NORMAL))
def test_closed_forms_are_those_of_dense_algebra(name: str) -> None:
    case = make_case(name).double()
    density = LogDensity(case.model, case.args)
    globals_, locals_ = places_of(case, density)
    point = torch.zeros(density.features)
    point[globals_] = 0.3 * torch.randn(len(globals_), generator=torch.Generator().manual_seed(3))

    def joint(x: Tensor) -> Tensor:
        return density.log_joint(point.index_put((locals_,), x))

    start = torch.zeros(len(locals_))
    slope = torch.autograd.functional.jacobian(joint, start)
    precision = -torch.autograd.functional.hessian(joint, start)
    mode = start + torch.linalg.solve(precision, slope)
    log_two_pi = len(locals_) * math.log(2 * math.pi)
    expected = joint(mode) + 0.5 * (log_two_pi - precision.logdet())
    found = marginal_density(name, case)(point[globals_].unsqueeze(0))
    torch.testing.assert_close(found, expected.reshape(1), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", TWO_LOCALS)
def test_quadrature_is_that_of_a_grid(name: str) -> None:
    case = make_case(name).double()
    density = LogDensity(case.model, case.args)
    globals_, locals_ = places_of(case, density)
    axis = torch.linspace(-8.0, 8.0, 161)
    grid = torch.zeros(len(axis) ** 2, density.features)
    grid[:, globals_] = torch.linspace(-0.3, 0.3, len(globals_))
    grid[:, locals_] = torch.cartesian_prod(axis, axis)
    expected = density.log_prob(grid).logsumexp(0) + 2 * (axis[1] - axis[0]).log()
    found = marginal_density(name, case)(grid[:1, globals_])
    # A tenth of the noise of one weight, of 256 draws of Laplace's approximation.
    tolerance = 1e-4 if "logistic" in name else 0.02
    assert float(found) == pytest.approx(float(expected), abs=tolerance)


def test_normal_variables_that_are_seen_with_normal_noise_are_integrated_exactly() -> None:
    y = torch.tensor([1.0, -0.5], dtype=torch.float64)
    precision = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)

    def log_likelihood(x: Tensor) -> Tensor:
        return torch.distributions.Normal(x, 0.5).log_prob(y)

    mean = torch.zeros(2, dtype=torch.float64)
    covariance = torch.linalg.inv(precision) + 0.25 * torch.eye(2)
    expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(y)
    torch.testing.assert_close(latent_gaussian(mean, precision, log_likelihood), expected)


def test_weights_find_a_density_that_is_known() -> None:
    normal = torch.distributions.MultivariateNormal(
        torch.tensor([1.0, -2.0]).double(), torch.tensor([[1.0, 0.6], [0.6, 2.0]]).double()
    )
    points, weights, log_evidence = weigh(lambda x: normal.log_prob(x) + 3.0, 2, 500, (256, 1024))
    assert log_evidence == pytest.approx(3.0, abs=0.01)
    torch.testing.assert_close(weights @ points, normal.mean, atol=0.02, rtol=0)
    assert 1 / float(weights.square().sum()) > 0.7 * 1024


def test_stored_references_answer() -> None:
    references = read_references()
    assert set(references) <= set(NAMES)
    for name, found in references.items():
        sites = Globals(make_case(name)) if "0000" not in name else None
        assert found.known
        assert all(sd > 0 for _, sd in found.moments.values())
        assert sites is None or len(found.moments) == sites.features


def test_states_and_increments_have_the_same_evidence() -> None:
    references = read_references()
    states, increments = references["level_states-300"], references["level_increments-300"]
    assert states.log_evidence == increments.log_evidence
    assert states.moments == increments.moments


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in LATENTS]
)
def test_models_of_numpyro_have_the_same_density(name: str) -> None:
    jax = pytest.importorskip("jax")
    from numpyro.infer.util import potential_energy

    from benchmarks import scale_numpyro

    case = make_case(name).double()
    family, sizes = split_name(name)
    density = LogDensity(case.model, case.args)
    point = 0.3 * torch.randn(density.features, generator=torch.Generator().manual_seed(5))
    model = scale_numpyro.MODELS[family](sizes)
    values = {}
    for site, part in zip(
        density.sites, point.split([s.features for s in density.sites]), strict=True
    ):
        same = site.features == math.prod(site.shape)
        values[site.name] = part.reshape(site.shape if same else -1)
    with jax.enable_x64(True):
        args = scale_numpyro.as_arrays(case.args, float64=True)
        z = {site: jax.numpy.asarray(value.numpy()) for site, value in values.items()}
        potential = float(potential_energy(model, args, {}, z))
    # Constants of Pyro's models are in single precision.
    assert float(density.log_prob(point)) == pytest.approx(-potential, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("noncentred", [False, True])
def test_chains_are_timed_and_compared(noncentred: bool) -> None:
    pytest.importorskip("numpyro")
    from benchmarks.scale_numpyro import Schedule, run_nuts

    found = run_nuts("eight_schools", Schedule(2, 200, 300), noncentred)
    assert set(found.scalars) == {"mean", "between"}
    assert found.scalars["mean"].shape == (2, 300)
    assert 0 < found.sampling < found.to_target
    assert found.compilation > 0


# Rows


def test_a_row_has_the_errors_of_its_worst_global(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Reference("grid", {"a": (0.0, 1.0), "b": (1.0, 2.0)}, 1e4, -3.0)
    scalars = {"a": torch.tensor([-1.0, 0.0, 1.0]), "b": torch.tensor([0.0, 2.0, 4.0])}
    row = with_errors(Row("m", "x", 0, log_evidence=-2.5), scalars, right)
    assert row.worst == "b" and row.right is False
    assert row.mean_error == pytest.approx(0.5) and row.evidence_error == pytest.approx(0.5)
    assert with_errors(Row("m", "x", 0), scalars, None).right is None


def test_a_method_that_fails_gives_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, seed: int, time_limit: float | None) -> Found:
        raise RuntimeError("no such luck\nat all")

    monkeypatch.setitem(scale.METHODS, "fails", fail)
    row = run_row("groups-4", "fails", 0)
    assert row.error == "RuntimeError: no such luck" and row.latents == 7 and row.rows == 40
    assert "no such luck" in scale.table([row])


@pytest.mark.parametrize("method", [name for name in scale.METHODS if name.startswith("Auto")])
def test_guides_of_pyro_run(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "STEPS", 3)
    monkeypatch.setattr(scale, "GUIDE_DRAWS", 10)
    found = scale.METHODS[method]("groups-4", 0, None)
    assert set(found.scalars) == {"mean", "between", "within"}
    assert found.scalars["mean"].shape == (10,)
    assert math.isfinite(found.fields["log_evidence"])


def test_files_keep_rows_of_other_methods(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    write_json(path, [Row("m", "x", 0), Row("m", "y", 0)], [Point("groups-100", 103, 1000, 0.1)])
    write_json(path, [Row("m", "x", 0, seconds=2.0)], [])
    rows, points = read_rows(path)
    assert [(row.method, row.seconds) for row in rows] == [("x", 2.0), ("y", None)]
    assert points == [Point("groups-100", 103, 1000, 0.1)]
    assert merge([1j], [2j], "real") == [2j]
    text = report.scale(json.loads(path.read_text()))
    assert text.startswith("| model | latents |") and "| groups-100 | 103 | 1000 | 0.100 |" in text


def test_steps_are_timed_and_drawn(tmp_path: Path) -> None:
    point = scale.run_point("groups-5")
    assert not point.error and point.latents == 8
    costs: list[Any] = [point.gradient, point.marginal, point.preparation]
    assert min(costs) > 0
    scale.plot([point], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.mark.slow
def test_a_process_that_ends_early_says_so() -> None:
    assert scale.run_apart(int, ("7",), 60.0) == (7, "")
    _, error = scale.run_apart(exit, (3,), 60.0)
    assert error == "the process ended with code 3"
