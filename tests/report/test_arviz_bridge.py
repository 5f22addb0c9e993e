"""The bridge to ArviZ and the statistics. Runs with ArviZ 0.23 and, without torch, with ArviZ 1.x:

pytest --noconftest tests/report/test_arviz_bridge.py
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[2] / "pyroflows" / "report" / "arviz_bridge.py"

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    az = pytest.importorskip("arviz")

pytestmark = pytest.mark.filterwarnings("error")


def load_modules() -> tuple[ModuleType, ModuleType]:
    if importlib.util.find_spec("torch") is None:
        # Packages without their __init__.py, which import torch.
        for package in (PATH.parents[1], PATH.parent):
            name = "pyroflows" if package.name == "pyroflows" else "pyroflows.report"
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(package)]
    bridge = importlib.import_module("pyroflows.report.arviz_bridge")
    return bridge, importlib.import_module("pyroflows.report.statistics")


bridge, statistics = load_modules()
DATATREE = int(az.__version__.split(".")[0]) >= 1
SCHOOLS = ["Choate", "Deerfield", "Phillips"]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def logsumexp(x: np.ndarray) -> float:
    return float(np.logaddexp.reduce(x.ravel()))


GROUPS: dict[str, dict[str, np.ndarray]] = {
    "posterior": {
        "mu": normal(1, 50),
        "theta": normal(1, 50, 3, seed=1),
        "L": normal(1, 50, 3, 2, seed=2).astype(np.float32),
        "z": np.arange(50).reshape(1, 50),
    },
    "sample_stats": {
        "log_weight": normal(1, 50, seed=3),
        "diverging": np.zeros((1, 50), dtype=bool),
    },
    "log_likelihood": {"y": normal(1, 50, 3, seed=4)},
    "posterior_predictive": {"y": normal(1, 50, 3, 2, seed=5)},
    "prior": {"mu": normal(2, 30, seed=6), "theta": normal(2, 30, 3, seed=7)},
    "observed_data": {"y": normal(3, 2, seed=8)},
    "constant_data": {"sigma": normal(3, seed=9), "n": np.array(3), "label": np.array(["a", "b"])},
}
DIMS = {
    "theta": ["school"],
    "L": ["school", None],
    "y": ["school", "side"],
    "sigma": ["school"],
    "absent": ["x"],
}
COORDS = {"school": SCHOOLS, "unused": [1, 2]}


def example() -> Any:
    return bridge.to_inference_data(GROUPS, DIMS, COORDS, {"inference_library": "pyroflows"})


# Groups and dimensions


def test_container_of_this_arviz() -> None:
    assert type(example()).__name__ == ("DataTree" if DATATREE else "InferenceData")


@pytest.mark.parametrize("group", GROUPS)
def test_arrays_arrive_unchanged(group: str) -> None:
    dataset = example()[group]
    assert set(dataset.data_vars) == set(GROUPS[group])
    for name, array in GROUPS[group].items():
        np.testing.assert_array_equal(dataset[name].values, array)
        assert dataset[name].dtype == array.dtype


@pytest.mark.parametrize(
    ("group", "name", "dims"),
    [
        ("posterior", "mu", ("chain", "draw")),
        ("posterior", "theta", ("chain", "draw", "school")),
        ("posterior", "L", ("chain", "draw", "school", "L_dim_1")),
        ("sample_stats", "log_weight", ("chain", "draw")),
        ("log_likelihood", "y", ("chain", "draw", "school")),
        ("posterior_predictive", "y", ("chain", "draw", "school", "side")),
        ("prior", "theta", ("chain", "draw", "school")),
        ("observed_data", "y", ("school", "side")),
        ("constant_data", "sigma", ("school",)),
        ("constant_data", "n", ()),
        ("constant_data", "label", ("label_dim_0",)),
    ],
)
def test_dimensions(group: str, name: str, dims: tuple[str, ...]) -> None:
    assert example()[group][name].dims == dims


def test_coordinates() -> None:
    posterior = example()["posterior"]
    assert list(posterior["school"].values) == SCHOOLS
    assert list(posterior["L_dim_1"].values) == [0, 1]
    assert list(posterior["chain"].values) == [0]
    assert list(posterior["draw"].values) == list(range(50))
    assert "unused" not in posterior.coords


@pytest.mark.parametrize(
    ("shape", "dims", "expected"),
    [
        ((2, 3), None, ("x_dim_0", "x_dim_1")),
        ((2, 3), ["a"], ("a", "x_dim_1")),
        ((2, 3), [None, "b"], ("x_dim_0", "b")),
        ((2, 3), ["a", "b"], ("a", "b")),
        ((), [], ()),
        ((0,), None, ("x_dim_0",)),
    ],
)
def test_partly_named_dimensions(
    shape: tuple[int, ...], dims: Any, expected: tuple[str, ...]
) -> None:
    given = None if dims is None else {"x": dims}
    data = bridge.to_inference_data({"posterior": {"x": np.zeros((1, 10, *shape))}}, given)
    assert data["posterior"]["x"].dims == ("chain", "draw", *expected)


def test_more_chains_than_draws() -> None:
    data = bridge.to_inference_data({"posterior": {"x": np.zeros((10, 2))}})
    assert data["posterior"]["x"].shape == (10, 2)


def test_empty_groups_are_left_out() -> None:
    data = bridge.to_inference_data({"posterior": {"x": np.zeros((1, 10))}, "observed_data": {}})
    assert "observed_data" not in (data.children if DATATREE else data.groups())


def test_slashes_become_dots() -> None:
    groups = {"posterior": {"block/x": np.zeros((1, 10, 2, 3))}}
    data = bridge.to_inference_data(
        groups, {"block/x": ["block/plate"]}, {"block/plate": ["a", "b"]}
    )
    x = data["posterior"]["block.x"]
    assert x.dims == ("chain", "draw", "block.plate", "block.x_dim_1")
    assert list(x["block.plate"].values) == ["a", "b"]


def posterior(**shapes: tuple[int, ...]) -> dict[str, dict[str, np.ndarray]]:
    return {"posterior": {name: np.zeros(shape) for name, shape in shapes.items()}}


VECTOR = posterior(x=(1, 9, 2))
SLASHES = {"posterior": {"a/b": np.zeros((1, 9)), "a.b": np.zeros((1, 9))}}
COMPLEX = {"posterior": {"x": np.zeros((1, 9), complex)}}


@pytest.mark.parametrize(
    ("groups", "dims", "coords", "error", "match"),
    [
        (
            posterior(x=(10,)),
            None,
            None,
            ValueError,
            r"Expected 'x'.*\(chain, draw, \*\); got \(10,\)",
        ),
        (COMPLEX, None, None, TypeError, "real numbers for 'x'.*complex"),
        (
            {"posterior": {"x": np.array([["a"]])}},
            None,
            None,
            TypeError,
            "real numbers for 'x'.*<U1",
        ),
        (
            {"observed_data": {"x": np.array([None])}},
            None,
            None,
            TypeError,
            "real numbers for 'x'.*object",
        ),
        (SLASHES, None, None, ValueError, "different names.*'a.b' twice"),
        (posterior(x=(1, 9), y=(1, 8)), None, None, ValueError, "Expected 'draw'.*'y'.* 9; got 8"),
        (VECTOR, {"x": ["a", "b"]}, None, ValueError, "dims to hold at most 1 names for 'x'"),
        (VECTOR, {"x": "a"}, None, TypeError, "dims to hold a sequence.*the string 'a'"),
        (
            posterior(x=(1, 9, 2, 2)),
            {"x": ["a", "a"]},
            None,
            ValueError,
            "different names for the dimensions of 'x'",
        ),
        (VECTOR, {"x": ["draw"]}, None, ValueError, "different names for the dimensions of 'x'"),
        (VECTOR, {"x": ["x"]}, None, ValueError, "no dimension named as a variable.*'x'"),
        (
            VECTOR,
            {"x": ["a"]},
            {"a": [1]},
            ValueError,
            r"2 labels for 'a'; got shape \(1,\)",
        ),
    ],
)
def test_refuses(groups: Any, dims: Any, coords: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        bridge.to_inference_data(groups, dims, coords)


# Files


def test_netcdf_round_trip(tmp_path: Path) -> None:
    data = example()
    bridge.save(data, tmp_path / "posterior.nc")
    loaded = bridge.load(tmp_path / "posterior.nc")
    (tmp_path / "posterior.nc").unlink()  # all of it must be in memory
    assert type(loaded) is type(data)
    assert loaded.attrs["inference_library"] == "pyroflows"
    for group, arrays in GROUPS.items():
        assert set(loaded[group].data_vars) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded[group][name].values, array)
            assert loaded[group][name].dims == data[group][name].dims
    assert list(loaded["posterior"]["school"].values) == SCHOOLS


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1),
        (np.bool_(False), 0),
        (3, 3),
        (np.float32(0.5), 0.5),
        (float("-inf"), float("-inf")),
        ("words", "words"),
        ([1.0, 2.0], [1.0, 2.0]),
        (np.arange(3), [0, 1, 2]),
        (["a", "b"], ["a", "b"]),
        ({"a": 1}, "{'a': 1}"),
        ([[1], [2, 3]], "[[1], [2, 3]]"),
        ([[1], [2]], "[[1], [2]]"),
    ],
)
def test_any_attribute_can_be_saved(tmp_path: Path, value: Any, expected: Any) -> None:
    attrs = {"note": value, "nothing": None}
    bridge.save(
        bridge.to_inference_data({"posterior": GROUPS["posterior"]}, attrs=attrs), tmp_path / "x.nc"
    )
    loaded = bridge.load(tmp_path / "x.nc").attrs
    assert set(loaded) == {"note"}
    assert np.array_equal(np.asarray(loaded["note"]), np.asarray(expected))


def test_save_replaces_a_file_that_was_loaded(tmp_path: Path) -> None:
    path = str(tmp_path / "x.nc")
    for value in (1.0, 2.0):
        bridge.save(bridge.to_inference_data({"posterior": {"x": np.full((1, 10), value)}}), path)
        assert float(bridge.load(path)["posterior"]["x"].values[0, 0]) == value
    assert os.listdir(tmp_path) == ["x.nc"]


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.nc"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    data = bridge.to_inference_data({"posterior": {"mu": np.zeros((1, 100))}})
    with pytest.raises(ValueError, match=r"^Cannot write '.*x\.nc': No space left on device\.$"):
        bridge.save(data, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.nc"]


@pytest.mark.parametrize("wrong", [None, 3, "x", [1.0], np.zeros((1, 100)), {3: np.zeros(100)}])
@pytest.mark.parametrize(
    "report",
    [
        bridge.to_inference_data,
        lambda groups: bridge.to_inference_data({"posterior": groups}),
        lambda notes: bridge.to_inference_data({}, attrs=[1] if notes is None else notes),
        bridge.loo,
        statistics.summary,
        statistics.diagnostics,
    ],
)
def test_what_maps_no_names_is_told(report: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^Expected .* (to map names to|to have names as keys).*;"):
        report(wrong)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (".", "Cannot write .*Is a directory"),
        ("missing/x.nc", "Cannot write .*No such"),
    ],
)
def test_save_refuses_path(tmp_path: Path, name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bridge.save(example(), tmp_path / name)


def test_save_refuses_other_objects(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Expected an InferenceData or a DataTree; got dict"):
        bridge.save({}, tmp_path / "x.nc")


@pytest.mark.parametrize("name", ["missing.nc", "words.nc", "."])
def test_load_refuses(tmp_path: Path, name: str) -> None:
    (tmp_path / "words.nc").write_text("not netCDF")
    with pytest.raises(ValueError, match="Cannot read"):
        bridge.load(tmp_path / name)


# Pareto-smoothed importance sampling


def pareto_log_weights(k: float, draws: int, seed: int) -> np.ndarray:
    """Log of draws of the generalised Pareto distribution of shape `k`, moved off zero."""
    u = np.random.default_rng(seed).random(draws)
    return np.log(np.expm1(-k * np.log(u)) / k + 1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [-0.5, 0.1, 0.5, 0.7, 1.0, 2.0])
def test_khat_of_a_pareto_tail(k: float, seed: int) -> None:
    draws = 20_000
    tail = 3 * draws**0.5
    # The estimate is shrunk towards 0.5 as ten draws of prior would.
    expected = (tail * k + 10 * 0.5) / (tail + 10)
    standard_error = max(1 + k, 1.0) / tail**0.5
    assert abs(bridge.psis(pareto_log_weights(k, draws, seed))[1] - expected) < 4 * standard_error


def test_psis_smooths_only_the_tail_and_keeps_its_order() -> None:
    raw = pareto_log_weights(0.7, 4000, 0)
    smoothed, _ = bridge.psis(raw)
    order = np.argsort(raw)
    body = order[:-192]
    shift = smoothed[order[0]] - raw[order[0]]
    assert logsumexp(smoothed) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(smoothed[body] - raw[body], shift, atol=1e-9)
    assert (np.diff(smoothed[order]) >= -1e-12).all()
    assert smoothed.max() <= raw.max() + shift + 1e-12
    assert np.abs(smoothed - raw - shift).max() > 1e-3


def test_estimates_with_psis() -> None:
    """The second moment of N(0, 1.2^2) by draws of N(0, 1): weights with a tail of shape 1 - 1/1.2^2."""
    estimates = []
    for seed in range(50):
        x = normal(4000, seed=seed)
        weights, _ = bridge.psis(0.5 * x**2 * (1 - 1 / 1.2**2))
        estimates.append(np.exp(weights) @ x**2)
    standard_error = np.std(estimates) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - 1.44) < 4 * standard_error < 0.1


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 1000, lambda x: x.reshape(4, -1), lambda x: x.astype(np.float32)],
    ids=["scale", "shape", "dtype"],
)
def test_psis_ignores_scale_shape_and_dtype(change: Any) -> None:
    raw = pareto_log_weights(0.5, 4000, 0).astype(np.float32).astype(np.float64)
    smoothed, khat = bridge.psis(raw)
    other, other_khat = bridge.psis(change(raw))
    assert other_khat == pytest.approx(khat, abs=1e-6)
    assert other.dtype == np.float64
    assert other.shape == change(raw).shape
    np.testing.assert_allclose(other.ravel(), smoothed, atol=1e-6)


def test_psis_leaves_its_argument_alone() -> None:
    raw = pareto_log_weights(0.5, 4000, 0)
    kept = raw.copy()
    bridge.psis(raw)
    np.testing.assert_array_equal(raw, kept)


ODD = np.arange(4000) % 2 == 1


@pytest.mark.parametrize(
    ("log_weights", "khat"),
    [
        (np.zeros(4000), -np.inf),
        (np.full(4000, 1e4), -np.inf),
        (np.full(10, -3.0), -np.inf),
        (1e-4 * normal(4000), -np.inf),
        (np.float32(1e4 + 1e-3 * normal(4000)) - np.float32(1e4), -np.inf),
        (np.where(ODD, 0.0, -np.inf), -np.inf),
        (np.minimum(normal(4000), 0.5), -np.inf),
        (np.zeros(1), np.inf),
        (normal(29), np.inf),
        (np.where(np.arange(4000) < 10, 0.0, -np.inf), np.inf),
        (np.where(np.arange(4000) < 1, 0.0, -np.inf), np.inf),
        (1e4 * normal(4000), np.inf),
    ],
    ids=[
        "constant",
        "constant-large",
        "constant-few",
        "near-constant",
        "float32-rounding",
        "half-zero",
        "clipped",
        "single",
        "few",
        "ten-non-zero",
        "one-non-zero",
        "astronomic-range",
    ],
)
def test_settled_cases_of_psis(log_weights: np.ndarray, khat: float) -> None:
    weights, estimate = bridge.psis(log_weights)
    assert estimate == khat
    assert logsumexp(weights) == pytest.approx(0, abs=1e-9)
    raw = log_weights.astype(np.float64)
    np.testing.assert_allclose(np.exp(weights), np.exp(raw - logsumexp(raw)), rtol=1e-9)


@pytest.mark.parametrize("draws", [30, 31, 100, 225, 226, 1000])
def test_khat_is_finite_from_thirty_draws_on(draws: int) -> None:
    assert all(np.isfinite(bridge.psis(normal(draws, seed=seed))[1]) for seed in range(20))


def test_draws_of_zero_weight_do_not_poison_psis() -> None:
    raw = pareto_log_weights(0.3, 4000, 0)
    raw[ODD] = -np.inf
    smoothed, khat = bridge.psis(raw)
    assert abs(khat - 0.3) < 0.5
    assert np.isneginf(smoothed[ODD]).all()
    assert np.isfinite(smoothed[~ODD]).all()
    assert logsumexp(smoothed) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("log_weights", "match"),
    [
        (
            np.array([0.0, np.nan, 1.0]),
            r"log_weights to be finite numbers or -inf; got nan \(1 of 3\)",
        ),
        (
            np.array([0.0, np.inf]),
            r"log_weights to be finite numbers or -inf; got inf \(1 of 2\)",
        ),
        (np.full(5, -np.inf), "with a draw of non-zero weight; got none in 5"),
        (np.array([]), "with a draw of non-zero weight; got none in 0"),
    ],
)
def test_psis_refuses(log_weights: np.ndarray, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bridge.psis(log_weights)


# Summary


def shortest_interval(x: np.ndarray, probability: float) -> tuple[float, float]:
    x = np.sort(x)
    inside = int(np.floor(probability * len(x)))
    start = int(np.argmin(x[inside:] - x[: len(x) - inside]))
    return float(x[start]), float(x[start + inside])


def test_summary_against_numpy() -> None:
    draws = {
        "mu": normal(1000) + 3,
        "theta": np.exp(normal(1000, 2, 3, seed=1)),
        "z": np.arange(1000) % 7,
    }
    table = statistics.summary(draws)
    assert list(table.columns) == ["mean", "sd", "hdi_3%", "hdi_97%"]
    assert list(table.index) == [
        "mu",
        *(f"theta[{i}, {j}]" for i in range(2) for j in range(3)),
        "z",
    ]
    assert (table.dtypes == np.float64).all()
    columns = np.column_stack([draws["mu"], draws["theta"].reshape(1000, 6), draws["z"]])
    for label, column in zip(table.index, columns.T, strict=True):
        expected = [column.mean(), column.std(ddof=1), *shortest_interval(column, 0.94)]
        np.testing.assert_allclose(table.loc[label], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dims", "coords"),
    [
        (None, None),
        ({"theta": ["school"]}, None),
        ({"theta": ["school"]}, {"school": SCHOOLS}),
        ({"theta": ["school", "year"]}, {"school": SCHOOLS, "year": [2020, 2021]}),
    ],
)
def test_summary_labels_and_moments_as_arviz(dims: Any, coords: Any) -> None:
    draws = {"mu": normal(400), "theta": normal(400, 3, 2, seed=1)}
    table = statistics.summary(draws, dims, coords)
    chains = {name: values[None] for name, values in draws.items()}
    data = bridge.to_inference_data({"posterior": chains}, dims, coords)
    expected = az.summary(data, kind="stats", round_to="none")
    assert list(table.index) == list(expected.index)
    np.testing.assert_allclose(table["mean"], expected["mean"].astype(float), atol=1e-10)
    np.testing.assert_allclose(table["sd"], expected["sd"].astype(float), atol=1e-10)


def test_summary_of_booleans_of_nothing_and_of_empty_sites() -> None:
    table = statistics.summary({"b": np.array([True, False] * 50), "none": np.zeros((100, 0))})
    assert list(table.index) == ["b"]
    assert table.loc["b", "mean"] == 0.5
    assert statistics.summary({}).shape == (0, 4)


@pytest.mark.parametrize(
    ("draws", "dims", "error", "match"),
    [
        ({"x": np.zeros(1)}, None, ValueError, "at least 2 draws of 'x'; got 1"),
        ({"x": np.zeros((5, 2))}, {"x": ["a", "b"]}, ValueError, "at most 1 names"),
        ({"x": np.array(["a", "b"])}, None, TypeError, "Expected real numbers for 'x'"),
    ],
)
def test_summary_refuses(draws: Any, dims: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        statistics.summary(draws, dims)


def test_hdi_is_the_shortest_interval() -> None:
    columns = np.column_stack([normal(500), np.exp(normal(500, seed=1))])
    for probability in (0.5, 0.94):
        expected = [shortest_interval(column, probability) for column in columns.T]
        np.testing.assert_allclose(statistics.hdi(columns, probability), expected, rtol=1e-12)


# ArviZ takes what the bridge gives


def test_loo() -> None:
    """Against the exact leave-one-out density of a normal mean with a flat prior."""
    y = normal(20)
    mu = y.mean() + normal(1, 4000, seed=1) / len(y) ** 0.5
    log_likelihood = -0.5 * (y - mu[..., None]) ** 2 - 0.5 * np.log(2 * np.pi)
    data = bridge.to_inference_data(
        {
            "posterior": {"mu": mu},
            "log_likelihood": {"y": log_likelihood},
            "observed_data": {"y": y},
        },
        dims={"y": ["person"]},
    )
    result = az.loo(data)
    left_out_mean = (y.sum() - y) / (len(y) - 1)
    variance = 1 + 1 / (len(y) - 1)
    exact = np.sum(-0.5 * (y - left_out_mean) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance))
    assert float(result.elpd if DATATREE else result.elpd_loo) == pytest.approx(exact, abs=0.1)


def test_import_and_use_without_torch_and_without_warnings(tmp_path: Path) -> None:
    code = f"""
import sys, types
import numpy as np
for name, folder in (("pyroflows", {str(PATH.parents[1])!r}), ("pyroflows.report", {str(PATH.parent)!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
import pyroflows.report.arviz_bridge as bridge
import pyroflows.report.statistics
assert "arviz" not in sys.modules
bridge.psis(np.random.default_rng(0).normal(size=1000))
assert not {{"torch", "pyro"}} & set(sys.modules)
"""
    # An empty cache makes ArviZ 0.23 announce its successor, as on a user's first run of the day.
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONWARNINGS": "error::FutureWarning"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# Cross-validation


def test_loo_is_arvizs() -> None:
    # Of 2,500 draws the tail has 150 by every version's rounding.
    log_likelihood = 0.3 * normal(2, 1250, 6)
    groups = {"posterior": {"mu": normal(2, 1250, seed=1)}, "log_likelihood": {"y": log_likelihood}}
    theirs = az.loo(bridge.to_inference_data(groups), pointwise=True, reff=1.0)
    ours = bridge.loo({"y": log_likelihood})
    elpd, p = (theirs.elpd_i, theirs.p) if DATATREE else (theirs.loo_i, theirs.p_loo)
    np.testing.assert_allclose(ours.elpd, np.asarray(elpd), atol=1e-9)
    np.testing.assert_allclose(ours.khat, np.asarray(theirs.pareto_k), atol=1e-9)
    assert ours.p_loo == pytest.approx(float(p))


def test_loo_takes_all_entries_of_all_variables() -> None:
    a, b = normal(1, 200, 2, 3), normal(1, 200, seed=1)
    together = bridge.loo({"a": a, "b": b})
    assert together.elpd.shape == together.khat.shape == (7,)
    np.testing.assert_array_equal(
        together.elpd, [*bridge.loo({"a": a}).elpd, *bridge.loo({"b": b}).elpd]
    )


def test_loo_of_a_likelihood_that_no_parameter_moves() -> None:
    found = bridge.loo({"y": np.full((1, 1000, 1), -1.5)})
    assert found.elpd == pytest.approx([-1.5])
    assert found.p_loo == pytest.approx(0, abs=1e-9)
    assert found.khat == [-np.inf]


@pytest.mark.parametrize(
    ("log_likelihood", "error", "message"),
    [
        ({}, ValueError, "at least one observation"),
        ({"y": np.zeros((1, 100, 0))}, ValueError, "at least one observation"),
        ({"y": np.full((1, 100, 1), np.nan)}, ValueError, "finite numbers or -inf"),
        ({"y": np.array([[["a"]]])}, TypeError, "Expected real numbers for 'y'"),
    ],
)
def test_misuse_of_loo(log_likelihood: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bridge.loo(log_likelihood)


def test_moments_of_angles_are_taken_on_the_circle() -> None:
    rng = np.random.default_rng(0)
    angles = np.stack([rng.vonmises(3.0, 8.0, 4000), rng.vonmises(0.5, 8.0, 4000)], 1)
    table = statistics.summary({"mu": angles, "x": angles}, circular=["mu"])
    assert table.loc["mu[0]", "mean"] == pytest.approx(3.0, abs=0.03)
    # sqrt(-2 log R) with R = I1(8) / I0(8)
    assert table.loc["mu[0]", "sd"] == pytest.approx(0.366, abs=0.01)
    assert table.loc["mu[0]", "hdi_97%"] < 0 < 2 < table.loc["mu[0]", "hdi_3%"]
    assert table.loc["x[0]", "sd"] > 1
    ends = ["hdi_3%", "hdi_97%"]
    np.testing.assert_allclose(
        table.loc["mu[1]", ends].tolist(), table.loc["x[1]", ends].tolist(), atol=1e-6
    )
    chains = angles.reshape(2, 2000, 2)
    rhat = statistics.diagnostics({"mu": chains}, circular=["mu"])["rhat"]["mu"]
    assert bool((rhat < 1.02).all())


def test_missing_entries_have_a_row_without_numbers() -> None:
    draws = np.random.default_rng(0).normal(size=(100, 2))
    draws[:, 1] = np.nan
    table = statistics.summary({"x": draws, "mu": draws}, circular=["mu"])
    assert table.loc[["x[1]", "mu[1]"]].isna().all().all()
    assert table.loc[["x[0]", "mu[0]"]].notna().all().all()


def test_plots_of_calibration_take_its_groups() -> None:
    rng = np.random.default_rng(0)
    pit = {"mu": rng.uniform(size=(1, 50)), "theta": rng.uniform(size=(1, 50, 3))}
    averaged = {"mu": rng.normal(size=(2, 50))}
    data = bridge.to_inference_data({"prior_sbc": pit, "averaged_posterior": averaged})
    arviz = bridge.import_arviz()
    if bridge.has_datatree(arviz):
        assert arviz.plot_ecdf_pit(data, backend="none") is not None
        assert arviz.plot_rank(data, group="averaged_posterior", backend="none") is not None
    else:
        values = data["prior_sbc"]["theta"].values.ravel()
        at = np.linspace(0, 1, 20)
        assert arviz.plot_ecdf(values, eval_points=at, cdf=lambda x: x, difference=True) is not None
        assert arviz.plot_rank(data["averaged_posterior"]) is not None
