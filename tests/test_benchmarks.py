"""The benchmark of posteriors, on a posteriordb folder made here: reader, errors, table, check, methods."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import methods, posteriors
from benchmarks.check import CENTERED, NONCENTERED, Check, check, identity_z_scores
from benchmarks.methods import METHODS, Result, Task
from benchmarks.models import MODELS
from benchmarks.posteriordb import PosteriorDB, Reference, flatten, unflatten
from benchmarks.posteriors import Row, errors, main, medians, noise_floor, run, run_row, table, write_json

REGRESSION = "sblri-blr"


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """The command sets the default dtype and the number of threads of its own process."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def write_zip(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(file.name.removesuffix(".zip"), json.dumps(content))


def write_posterior(root: Path, name: str, data: dict[str, Any], chains: list[dict[str, list[float]]]) -> None:
    info = {"name": name, "data_name": f"{name}-data", "reference_posterior_name": f"{name}-draws"}
    file = root / "posteriors" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(info))
    write_zip(root / "data" / "data" / f"{name}-data.json.zip", data)
    write_zip(root / "reference_posteriors" / "draws" / "draws" / f"{name}-draws.json.zip", chains)


def regression() -> tuple[dict[str, Any], list[dict[str, list[float]]]]:
    """A linear regression with draws of beta given sigma = 1, and of a sigma that is not the posterior's."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2))
    y = x @ [1.0, -2.0] + rng.normal(size=30)
    precision = x.T @ x + np.eye(2) / 100
    beta = rng.multivariate_normal(np.linalg.solve(precision, x.T @ y), np.linalg.inv(precision), size=(2, 400))
    data = {"N": 30, "D": 2, "X": x.tolist(), "y": y.tolist()}
    sigma = (1 + 0.1 * rng.normal(size=(2, 400))).tolist()
    chains = [
        {"beta[1]": b[:, 0].tolist(), "beta[2]": b[:, 1].tolist(), "sigma": s} for b, s in zip(beta, sigma, strict=True)
    ]
    return data, chains


def schools() -> tuple[dict[str, Any], list[dict[str, list[float]]]]:
    rng = np.random.default_rng(0)
    names = ["mu", *(f"theta[{j}]" for j in range(1, 9))]
    chain = {name: rng.normal(size=50).tolist() for name in names} | {"tau": rng.gamma(2.0, size=50).tolist()}
    return {"J": 8, "y": [28, 8, -3, 7, -1, 1, 18, 12], "sigma": [15, 10, 16, 11, 9, 11, 10, 18]}, [chain]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "db" / "posterior_database"
    write_posterior(root, REGRESSION, *regression())
    for name in (CENTERED, NONCENTERED):
        write_posterior(root, name, *schools())
    return tmp_path / "db"


@pytest.fixture
def reference(folder: Path) -> Reference:
    return PosteriorDB(folder).load(REGRESSION)


def copies_of_the_reference(task: Task) -> Result:
    _, chains = regression()
    stan = unflatten({name: np.concatenate([chain[name] for chain in chains]) for name in chains[0]})
    draws = {name: torch.as_tensor(values) for name, values in stan.items()}
    return Result(draws, seconds=1.5 + task.seed, elbo=-3.0, khat=0.4, ess=0.9, ok=True, note="exact")


def fails(task: Task) -> Result:
    raise RuntimeError("no luck today\nat all")


# The reader


def test_reader_finds_posteriors_data_and_draws(folder: Path) -> None:
    for path in (folder, folder / "posterior_database"):
        db = PosteriorDB(path)
        assert db.names() == sorted([CENTERED, NONCENTERED, REGRESSION])
    data, chains = regression()
    reference = db.load(REGRESSION)
    assert reference.data == data
    assert list(reference.draws) == ["beta[1]", "beta[2]", "sigma"]
    np.testing.assert_array_equal(reference.draws["sigma"], np.concatenate([c["sigma"] for c in chains]))


def test_reader_refuses_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected --db to name a posteriordb folder"):
        PosteriorDB(tmp_path / "nowhere")
    db = PosteriorDB(folder)
    with pytest.raises(ValueError, match=r"Expected a posterior of the database .*got 'x'"):
        db.load("x")
    (db.root / "data" / "data" / f"{REGRESSION}-data.json.zip").unlink()
    with pytest.raises(ValueError, match="lacks the file"):
        db.load(REGRESSION)
    (db.root / "posteriors" / "bare.json").write_text(json.dumps({"name": "bare", "reference_posterior_name": None}))
    with pytest.raises(ValueError, match="no reference draws"):
        db.load("bare")


def test_stan_names_round_trip() -> None:
    arrays = {
        "mu": np.arange(3.0),
        "theta": np.arange(6.0).reshape(3, 2),
        "a": np.arange(18.0).reshape(3, 2, 3),
    }
    scalars = flatten(arrays)
    assert {"mu", "theta[2]", "a[2,3]"} <= set(scalars)
    np.testing.assert_array_equal(scalars["a[2,3]"], arrays["a"][:, 1, 2])
    # Ten and more entries must not be put in the order of their names.
    long = {"z": np.arange(24.0).reshape(2, 12)}
    shuffled = dict(sorted(flatten(long).items()))
    for given, back in ((arrays, unflatten(scalars)), (long, unflatten(shuffled))):
        assert set(back) == set(given)
        for name, values in given.items():
            np.testing.assert_array_equal(back[name], values)
    with pytest.raises(ValueError, match="scalar's name"):
        unflatten({"theta[a]": np.zeros(2)})


# The errors


def test_errors_are_the_largest_over_the_scalars() -> None:
    reference = {"a": np.array([-1.0, 1.0]), "b": np.array([0.0, 4.0])}
    draws = {"a": np.array([-1.5, 2.5]), "b": np.array([1.0, 5.0]), "extra": np.array([100.0, 200.0])}
    mean_error, log_sd_error = errors(draws, reference)
    assert mean_error == pytest.approx(0.5)  # both means are off by half a reference sd
    assert log_sd_error == pytest.approx(math.log(2.0))
    assert errors(reference, reference) == (0.0, 0.0)


def test_errors_keep_nan_and_refuse_missing_scalars() -> None:
    reference = {"a": np.array([-1.0, 1.0]), "b": np.array([0.0, 4.0])}
    assert math.isnan(errors(reference | {"a": np.array([math.nan, 1.0])}, reference)[0])
    assert errors(reference | {"a": np.zeros(2)}, reference)[1] == math.inf
    with pytest.raises(ValueError, match="b are missing"):
        errors({"a": np.zeros(2)}, reference)


def test_noise_floor_of_one_normal() -> None:
    draws = {"x": np.random.default_rng(0).normal(size=10_000)}
    mean, log_sd = noise_floor(draws, repeats=400)
    # The difference of two means has sd sqrt(2 / n), of two log sds sqrt(1 / n); median |N(0, 1)| is 0.674.
    assert mean == pytest.approx(0.674 * math.sqrt(2) / 100, rel=0.15)
    assert log_sd == pytest.approx(0.674 / 100, rel=0.15)


# Rows, medians, table, JSON


def test_a_method_gives_a_row(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "exact", copies_of_the_reference)
    row = run_row(reference, "exact", 0, 7.0)
    assert (row.mean_error, row.log_sd_error, row.draws) == (0.0, 0.0, 800)
    assert (row.khat, row.ess, row.elbo, row.seconds, row.budget, row.ok) == (0.4, 0.9, -3.0, 1.5, 7.0, True)
    assert not row.error


def test_a_failing_method_gives_a_row_with_one_sentence(reference: Reference, monkeypatch: Any) -> None:
    monkeypatch.setitem(METHODS, "bad", fails)
    row = run_row(reference, "bad", 3, 7.0)
    assert row.error == "RuntimeError: no luck today"
    assert row.mean_error is None and row.seed == 3


@pytest.mark.parametrize(
    ("first", "given", "expected"),
    [
        (copies_of_the_reference, None, [1.5, 2.5]),
        (copies_of_the_reference, 4.0, [4.0, 4.0]),
        (fails, None, [posteriors.DEFAULT_BUDGET] * 2),
    ],
)
def test_budget_is_what_pyroflows_took(
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    first: Any,
    given: float | None,
    expected: list[float],
) -> None:
    monkeypatch.setitem(METHODS, "pyroflows", first)
    monkeypatch.setitem(METHODS, "NUTS", copies_of_the_reference)
    seen: list[Row] = []
    rows = run([reference], ["NUTS", "pyroflows"], [0, 1], given, seen.append)
    assert seen == rows
    assert [row.method for row in rows] == ["pyroflows", "NUTS"] * 2
    assert [row.budget for row in rows if row.method == "NUTS"] == expected
    assert [row.budget for row in rows if row.method == "pyroflows"] == [None, None]


def test_medians_leave_failures_out_and_count_them() -> None:
    rows = [Row("p", "m", seed, mean_error=value, ok=True) for seed, value in enumerate((0.1, 0.5, 0.2))]
    rows += [Row("p", "m", 3, error="RuntimeError: x"), Row("p", "n", 0, error="RuntimeError: y")]
    m, n = medians(rows)
    assert (m.mean_error, m.seed, m.ok, m.error) == (0.2, 4, True, "1 of 4 failed")
    assert (n.mean_error, n.ok, n.error) == (None, None, "1 of 1 failed")
    assert medians([Row("p", "m", 0, ok=True), Row("p", "m", 1, ok=False)])[0].ok is False


def test_table_aligns_and_says_why_a_row_is_empty() -> None:
    rows = [
        Row("p", "m", 0, mean_error=0.0123, khat=0.5, elbo=-31.339, seconds=20.0, budget=22.0, ok=False),
        Row("p", "n", 1, error="RuntimeError: no draw after warm-up"),
    ]
    head, first, second = table(rows).splitlines()
    assert first.split() == ["p", "m", "0", "0.012", "-", "0.50", "-", "-31.34", "20.0", "22.0", "no"]
    assert second.endswith("RuntimeError: no draw after warm-up")
    assert first.index("0.012") + 5 == head.index("mean err") + 8
    assert table(rows, "n").splitlines()[0].split()[2] == "n"


def test_json_is_strict_and_says_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    rows = [Row("p", "m", 0, mean_error=0.1, khat=math.nan, log_sd_error=math.inf)]
    write_json(file, rows, {"p": (0.02, 0.03)})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(file.read_text(), parse_constant=refuse)
    assert {"date", "python", "torch", "pyro-ppl", "threads", "processor"} <= set(document["machine"])
    assert document["noise_floor"]["p"] == {"mean_error": 0.02, "log_sd_error": 0.03}
    assert document["rows"][0]["khat"] == "nan" and document["rows"][0]["log_sd_error"] == "inf"
    assert document["medians"][0]["seeds"] == 1


# The command


def test_command_prints_the_table_and_writes_json(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "pyroflows", copies_of_the_reference)
    monkeypatch.setitem(METHODS, "NUTS", fails)
    file = tmp_path / "out.json"
    arguments = ["--models", REGRESSION, "--seeds", "0,1", "--methods", "pyroflows,NUTS", "--json", str(file)]
    assert main(["--db", str(folder), *arguments]) == 0
    out = capsys.readouterr().out
    assert out.count("RuntimeError: no luck today") == 2
    for text in ("what pyroflows took", "Medians", "2 of 2 failed", "Noise floor", "1 thread"):
        assert text in out
    assert len(json.loads(file.read_text())["rows"]) == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--models", "nothing"], "Expected --models to be among"),
        (["--methods", "pyroflows,magic"], "Expected --methods to be among"),
        (["--seeds", "a"], "Expected --seeds to be integers"),
    ],
)
def test_command_refuses_wrong_arguments(
    folder: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--db", str(folder), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_command_refuses_a_wrong_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--db", str(tmp_path)]) == 2
    assert "posteriordb folder" in capsys.readouterr().err


def test_interrupt_keeps_what_was_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(task: Task) -> Result:
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "pyroflows", copies_of_the_reference)
    monkeypatch.setitem(METHODS, "NUTS", interrupted)
    assert main(["--db", str(folder), "--models", REGRESSION, "--methods", "pyroflows,NUTS", "--seeds", "0"]) == 0
    out = capsys.readouterr().out
    assert "Interrupted" in out and "Medians" in out


def test_import_has_no_side_effect() -> None:
    code = "import torch, benchmarks.posteriors; assert torch.get_default_dtype() == torch.float32"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# Models and check


def test_every_entry_maps_there_and_back() -> None:
    torch.manual_seed(0)
    triangle = torch.rand(5) * 0.5
    draws = {"mu": torch.randn(5), "tau": torch.rand(5), "theta": torch.randn(5, 8)}
    garch = {"mu": torch.randn(5), "alpha0": torch.rand(5), "alpha1": triangle, "beta1": triangle.flip(0)}
    for name, stan in ((CENTERED, draws), (NONCENTERED, draws), ("garch-garch11", garch)):
        entry = MODELS[name]
        back = entry.to_stan(entry.from_stan(stan))
        assert set(back) == set(stan)
        for key, values in stan.items():
            torch.testing.assert_close(back[key], values)


def test_identity_scores_accept_the_right_gradient_and_reject_wrong_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[1.0, 0.0], [2.0, 0.5]], dtype=torch.float64)
    z = 3.0 + torch.randn(10_000, 2, generator=generator, dtype=torch.float64) @ root.T
    gradient = -(z - 3.0) @ torch.cholesky_inverse(root)
    assert max(identity_z_scores(z, gradient)) < 4
    assert identity_z_scores(z, gradient + 0.1)[0] > 5  # a missing factor exp(0.1 z)
    assert identity_z_scores(z, 1.1 * gradient)[1] > 5  # a likelihood counted 1.1 times


def test_check_compares_the_two_eight_schools(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    outcome = check(PosteriorDB(folder).load(CENTERED))
    assert outcome.ok and outcome.difference is not None and outcome.difference < 1e-10


def test_check_rejects_draws_of_another_posterior(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The draws of sigma in the folder made here are not the posterior's.
    assert main(["--db", str(folder), "--models", REGRESSION, "--check"]) == 1
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "NO"
    assert Check("p", 1.0, 2.0).ok and not Check("p", 1.0, 20.0).ok and not Check("p", difference=1.0).ok


# Pyro's methods, on a model in closed form


@pytest.mark.parametrize("method", ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal", "AutoNormalizingFlow"])
def test_guides_run_on_an_improper_prior(method: str) -> None:
    torch.set_default_dtype(torch.float64)
    x = torch.stack([torch.ones(20), torch.linspace(-1, 1, 20)], -1)
    kwargs = {"x": x, "y": x @ torch.tensor([0.5, -0.5]) + 0.1 * torch.arange(20).cos()}
    result = METHODS[method](Task(MODELS["mesquite-logmesquite"], kwargs, seed=0, budget=0.3))
    assert {name: tuple(values.shape[1:]) for name, values in result.draws.items()} == {
        "beta": (2,),
        "sigma": (),
    }
    assert len(result.draws["sigma"]) == methods.DRAWS
    assert result.elbo is not None and math.isfinite(result.elbo)
    assert result.seconds >= 0.3


def test_nuts_says_when_no_draw_follows_the_warm_up() -> None:
    torch.set_default_dtype(torch.float64)
    data, _ = schools()
    entry = MODELS[NONCENTERED]
    task = Task(entry, entry.kwargs(data), seed=0, budget=0.2)
    with pytest.raises(RuntimeError, match="no draw after warm-up"):
        METHODS["NUTS"](task)


def test_nuts_draws_within_its_budget() -> None:
    torch.set_default_dtype(torch.float64)
    x = torch.ones(20, 1)
    task = Task(MODELS["mesquite-logmesquite"], {"x": x, "y": torch.linspace(-1, 1, 20)}, seed=0, budget=4.0)
    result = METHODS["NUTS"](task)
    assert result.draws["beta"].shape[1:] == (1,) and (result.draws["sigma"] > 0).all()
    assert result.seconds < 6.0
    assert result.ess is not None and result.ess > 0


def test_a_method_of_pyro_needs_a_budget() -> None:
    with pytest.raises(ValueError, match="budget"):
        METHODS["NUTS"](Task(MODELS[REGRESSION], {}, seed=0))
