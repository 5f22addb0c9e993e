"""The benchmark of posteriors, on a posteriordb folder made here: reader, errors, table, check, methods."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to

from benchmarks import methods, models, posteriors
from benchmarks.check import CENTERED, NONCENTERED, Check, check, identity_z_scores
from benchmarks.methods import METHODS, NUMPYRO, NUTS_TO_TARGET, Chain, Result, Task, bulk_ess
from benchmarks.models import MODELS
from benchmarks.posteriordb import PosteriorDB, Reference, flatten, unflatten
from benchmarks.posteriors import (
    Row,
    errors,
    main,
    medians,
    noise_floor,
    run,
    run_row,
    summary,
    table,
    write_json,
)

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


def write_posterior(
    root: Path, name: str, data: dict[str, Any], chains: list[dict[str, list[float]]]
) -> None:
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
    beta = rng.multivariate_normal(
        np.linalg.solve(precision, x.T @ y), np.linalg.inv(precision), size=(2, 400)
    )
    data = {"N": 30, "D": 2, "X": x.tolist(), "y": y.tolist()}
    sigma = (1 + 0.1 * rng.normal(size=(2, 400))).tolist()
    chains = [
        {"beta[1]": b[:, 0].tolist(), "beta[2]": b[:, 1].tolist(), "sigma": s}
        for b, s in zip(beta, sigma, strict=True)
    ]
    return data, chains


def schools() -> tuple[dict[str, Any], list[dict[str, list[float]]]]:
    rng = np.random.default_rng(0)
    names = ["mu", *(f"theta[{j}]" for j in range(1, 9))]
    chain = {name: rng.normal(size=50).tolist() for name in names} | {
        "tau": rng.gamma(2.0, size=50).tolist()
    }
    return {"J": 8, "y": [28, 8, -3, 7, -1, 1, 18, 12], "sigma": [15, 10, 16, 11, 9, 11, 10, 18]}, [
        chain
    ]


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
    stan = unflatten(
        {name: np.concatenate([chain[name] for chain in chains]) for name in chains[0]}
    )
    draws = {name: torch.as_tensor(values) for name, values in stan.items()}
    return Result(
        draws, seconds=1.5 + task.seed, elbo=-3.0, khat=0.4, ess=0.9, ok=True, note="exact"
    )


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
    np.testing.assert_array_equal(
        reference.draws["sigma"], np.concatenate([c["sigma"] for c in chains])
    )


def test_reader_refuses_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected --db to name a posteriordb folder"):
        PosteriorDB(tmp_path / "nowhere")
    db = PosteriorDB(folder)
    with pytest.raises(ValueError, match=r"Expected a posterior of the database .*got 'x'"):
        db.load("x")
    (db.root / "data" / "data" / f"{REGRESSION}-data.json.zip").unlink()
    with pytest.raises(ValueError, match="lacks the file"):
        db.load(REGRESSION)
    (db.root / "posteriors" / "bare.json").write_text(
        json.dumps({"name": "bare", "reference_posterior_name": None})
    )
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
    draws = {
        "a": np.array([-1.5, 2.5]),
        "b": np.array([1.0, 5.0]),
        "extra": np.array([100.0, 200.0]),
    }
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
    assert (row.khat, row.ess, row.elbo, row.seconds, row.budget, row.ok) == (
        0.4,
        0.9,
        -3.0,
        1.5,
        7.0,
        True,
    )
    assert not row.error and row.passed is True


@pytest.mark.parametrize(
    ("bias", "factor", "passed"), [(0.09, 1.0, True), (0.11, 1.0, False), (0.0, 1.12, False)]
)
def test_a_row_passes_below_a_tenth_of_a_sd(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, bias: float, factor: float, passed: bool
) -> None:
    def off(task: Task) -> Result:
        result = copies_of_the_reference(task)
        sigma = result.draws["sigma"]
        moved = sigma.mean() + factor * (sigma - sigma.mean()) + bias * sigma.std(correction=0)
        return replace(result, draws=result.draws | {"sigma": moved})

    monkeypatch.setitem(METHODS, "off", off)
    assert run_row(reference, "off", 0, 7.0).passed is passed


def test_a_chain_cut_short_is_not_judged_by_its_moments(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        METHODS, "short", lambda task: replace(copies_of_the_reference(task), bound="~")
    )
    monkeypatch.setitem(METHODS, "none", lambda task: Result({}, seconds=60.0, bound=">"))
    short, none = (run_row(reference, method, 0, 7.0) for method in ("short", "none"))
    assert (short.mean_error, short.passed, short.bound) == (0.0, None, "~")
    assert (none.mean_error, none.passed, none.draws, none.seconds, none.error) == (
        None,
        None,
        0,
        60.0,
        "",
    )
    first, second = table([short, none]).splitlines()[1:]
    assert " ~1.5 " in first and " >60.0 " in second
    assert medians([short, none])[0].bound == "~" and medians([none])[0].bound == ">"


def test_a_failing_method_gives_a_row_with_one_sentence(
    reference: Reference, monkeypatch: Any
) -> None:
    monkeypatch.setitem(METHODS, "bad", fails)
    row = run_row(reference, "bad", 3, 7.0)
    assert row.error == "RuntimeError: no luck today"
    assert row.mean_error is None and row.seed == 3 and row.passed is False


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
    for method in ("NUTS", NUMPYRO):
        monkeypatch.setitem(METHODS, method, copies_of_the_reference)
    seen: list[Row] = []
    rows = run([reference], ["NUTS", NUMPYRO, "pyroflows"], [0, 1], given, seen.append)
    assert seen == rows
    assert [row.method for row in rows] == ["pyroflows", "NUTS", NUMPYRO] * 2
    assert [row.budget for row in rows if row.method == "NUTS"] == expected
    assert all(row.budget is None for row in rows if row.method != "NUTS")


def test_medians_leave_failures_out_and_count_them() -> None:
    rows = [
        Row("p", "m", seed, mean_error=value, ok=True) for seed, value in enumerate((0.1, 0.5, 0.2))
    ]
    rows += [Row("p", "m", 3, error="RuntimeError: x"), Row("p", "n", 0, error="RuntimeError: y")]
    m, n = medians(rows)
    assert (m.mean_error, m.seed, m.ok, m.error) == (0.2, 4, True, "1 of 4 failed")
    assert (n.mean_error, n.ok, n.error) == (None, None, "1 of 1 failed")
    assert medians([Row("p", "m", 0, ok=True), Row("p", "m", 1, ok=False)])[0].ok is False
    assert (
        medians([Row("p", "m", 0, passed=True), Row("p", "m", 1, passed=False)])[0].passed is False
    )


def test_summary_counts_and_compares() -> None:
    def row(posterior: str, method: str, seconds: float, **fields: Any) -> Row:
        return Row(posterior, method, 3, seconds=seconds, **fields)

    rows = [
        row("p", "pyroflows", 2.0, passed=True, ess=0.95, mean_error=0.02, log_sd_error=0.03),
        row("q", "pyroflows", 4.0, passed=True, ess=0.8, mean_error=0.04, log_sd_error=0.03),
        row("r", "pyroflows", 12.0, passed=False, ess=0.92, mean_error=0.2, log_sd_error=0.3),
        row("p", NUTS_TO_TARGET, 25.0),
        row("q", NUTS_TO_TARGET, 10.0, bound="~"),
        row("r", NUTS_TO_TARGET, 60.0, bound=">"),
        row("p", NUMPYRO, 11.0, passed=True, mean_error=0.03, log_sd_error=0.02),
    ]
    ours, nuts, numpyro, against_nuts, against_numpyro = summary(rows).splitlines()
    assert ours == (
        "pyroflows: 2 of 3 posteriors pass for every seed; ESS/N > 0.9 on 2 of 3; median 4.0 CPU s; slowest 12.0 (r)."
    )
    assert nuts == "NUTS to 1000: median 25.0 CPU s; slowest >60.0 (r)."
    assert numpyro.startswith("NumPyro NUTS: 1 of 1 posteriors pass")
    # 2/25, 4/10 and 12/60: all at most 1/2, one at most 1/10.
    assert (
        "at most 1 times those of NUTS to 1000 on 3," in against_nuts
        and "0.5 times those of NUTS to 1000 on 3," in against_nuts
    )
    assert "0.1 times those of NUTS to 1000 on 1, of 3 posteriors." in against_nuts
    assert against_numpyro.endswith(
        "smaller mean err on 1, smaller |log sd| on 0, of 1 posteriors."
    )


def test_table_aligns_and_says_why_a_row_is_empty() -> None:
    rows = [
        Row(
            "p",
            "m",
            0,
            mean_error=0.0123,
            khat=0.5,
            elbo=-31.339,
            seconds=20.0,
            budget=22.0,
            ok=False,
        ),
        Row("p", "n", 1, error="RuntimeError: no draw after warm-up"),
    ]
    head, first, second = table(rows).splitlines()
    assert first.split() == [
        "p",
        "m",
        "0",
        "0.012",
        "-",
        "-",
        "0.50",
        "-",
        "-31.34",
        "20.0",
        "22.0",
        "no",
    ]
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
    assert {"date", "python", "torch", "pyro-ppl", "threads", "processor"} <= set(
        document["machine"]
    )
    assert document["noise_floor"]["p"] == {"mean_error": 0.02, "log_sd_error": 0.03}
    assert document["rows"][0]["khat"] == "nan" and document["rows"][0]["log_sd_error"] == "inf"
    assert document["medians"][0]["seeds"] == 1


# The command


def test_command_prints_the_table_and_writes_json(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(METHODS, "pyroflows", copies_of_the_reference)
    monkeypatch.setitem(METHODS, "NUTS", fails)
    file = tmp_path / "out.json"
    arguments = [
        "--models",
        REGRESSION,
        "--seeds",
        "0,1",
        "--methods",
        "pyroflows,NUTS",
        "--json",
        str(file),
    ]
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
    assert (
        main(
            [
                "--db",
                str(folder),
                "--models",
                REGRESSION,
                "--methods",
                "pyroflows,NUTS",
                "--seeds",
                "0",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "Interrupted" in out and "Medians" in out


def test_import_has_no_side_effect() -> None:
    code = "import torch, benchmarks.posteriors; assert torch.get_default_dtype() == torch.float32"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# Models and check


def test_garch_variances_by_doubling_are_those_of_the_recursion() -> None:
    drive, decay = (
        torch.rand(3, 37, dtype=torch.float64),
        torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64),
    )
    expected = [drive[:, 0]]
    for term in drive.unbind(-1)[1:]:
        expected.append(term + decay * expected[-1])
    torch.testing.assert_close(models._recurrence(drive, decay), torch.stack(expected, -1))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_a_chain_of_matrices_is_their_product_in_order(count: int) -> None:
    matrices = torch.rand(4, 3, 3, count, dtype=torch.float64)
    product, log_scale = models._chain(matrices)
    expected = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    for matrix in matrices.unbind(-1):
        expected = expected @ matrix
    torch.testing.assert_close(product * log_scale.exp()[..., None, None], expected)


def test_hidden_states_are_summed_out() -> None:
    """Against the sum over all paths of five observations."""
    torch.set_default_dtype(torch.float64)
    y = torch.tensor(
        [2.5, 9.0, 11.0, 3.0, -500.0]
    )  # the last one's density underflows in both states
    values = {
        "theta1": torch.tensor([0.9, 0.1]),
        "theta2": torch.tensor([0.3, 0.7]),
        "mu": torch.tensor([3.2, 9.5]),
    }
    transition = torch.stack([values["theta1"], values["theta2"]]).log()
    emission = torch.distributions.Normal(values["mu"], 1.0).log_prob(y[:, None])
    paths = [
        sum(emission[t, s] for t, s in enumerate(path))
        + sum(transition[a, b] for a, b in pairwise(path))
        for path in product(range(2), repeat=len(y))
    ]
    trace = poutine.trace(poutine.condition(models.hmm_example, data=values)).get_trace(y)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], torch.stack(paths).logsumexp(0))


def test_lotka_volterra_is_solved_to_its_claimed_accuracy() -> None:
    """Near the reference posterior's mean: against steps 16 times smaller, and on the fixed point."""
    torch.set_default_dtype(torch.float64)
    theta = torch.tensor([0.55, 0.028, 0.80, 0.024])
    log_unit = theta[[3, 1]].log()
    growth = theta[[0, 2]] * torch.tensor([1.0, -1.0])
    start = torch.tensor([34.0, 5.9]).log() + log_unit
    path = models._predation(start, growth, 20)
    fine, slope = [start], lambda z: growth + torch.stack([-z[1].exp(), z[0].exp()])
    step = 1 / (16 * models.RK4_STEPS)
    for _ in range(20 * 16 * models.RK4_STEPS):
        z = fine[-1]
        k1 = slope(z)
        k2 = slope(z + step / 2 * k1)
        k3 = slope(z + step / 2 * k2)
        fine.append(z + step / 6 * (k1 + 2 * (k2 + k3) + slope(z + step * k3)))
    # The log populations vary over 3 units; noise of sd 0.25 hides errors of 1e-3.
    torch.testing.assert_close(
        path, torch.stack(fine)[16 * models.RK4_STEPS :: 16 * models.RK4_STEPS], atol=1e-3, rtol=0.0
    )
    fixed = torch.stack([-growth[1], growth[0]]).log()
    torch.testing.assert_close(models._predation(fixed, growth, 3), fixed.expand(3, 2))


def test_every_entry_maps_there_and_back() -> None:
    torch.manual_seed(0)
    triangle = torch.rand(5) * 0.5
    draws = {"mu": torch.randn(5), "tau": torch.rand(5), "theta": torch.randn(5, 8)}
    garch = {
        "mu": torch.randn(5),
        "alpha0": torch.rand(5),
        "alpha1": triangle,
        "beta1": triangle.flip(0),
    }
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


def test_check_rejects_draws_of_another_posterior(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The draws of sigma in the folder made here are not the posterior's.
    assert main(["--db", str(folder), "--models", REGRESSION, "--check"]) == 1
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "NO"
    assert (
        Check("p", 1.0, 2.0).ok
        and not Check("p", 1.0, 20.0).ok
        and not Check("p", difference=1.0).ok
    )


# Pyro's methods, on a model in closed form


@pytest.mark.parametrize(
    "method", ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal", "AutoNormalizingFlow"]
)
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
    task = Task(
        MODELS["mesquite-logmesquite"], {"x": x, "y": torch.linspace(-1, 1, 20)}, seed=0, budget=1.0
    )
    result = METHODS["NUTS"](task)
    assert result.draws["beta"].shape[1:] == (1,) and (result.draws["sigma"] > 0).all()
    assert result.seconds < 6.0
    assert result.ess is not None and result.ess > 0


def test_a_method_of_pyro_needs_a_budget() -> None:
    with pytest.raises(ValueError, match="budget"):
        METHODS["NUTS"](Task(MODELS[REGRESSION], {}, seed=0))


def fake_chain(monkeypatch: pytest.MonkeyPatch, chain: Chain) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def run_chain(task: Task, warmup: int, samples: int, deadline: float, target: float) -> Chain:
        seen.update(seconds=deadline - time.process_time(), target=target, warmup=warmup)
        return chain

    monkeypatch.setattr(methods, "_chain", run_chain)
    return seen


def test_seconds_to_an_ess_of_1000_are_extrapolated_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    draws = {"beta": torch.randn(400, 2), "sigma": torch.rand(400) + 1}
    seen = fake_chain(monkeypatch, Chain(draws, 900, warmup=2.0, sampling=4.0))
    task = Task(MODELS[REGRESSION], {}, seed=0, budget=7.0)
    result = METHODS[NUTS_TO_TARGET](task)
    ess = bulk_ess(task.entry, draws)
    assert ess == pytest.approx(400, rel=0.35)  # independent draws, the smallest of three
    assert result.seconds == pytest.approx(2.0 + 1000 * 4.0 / ess) and result.bound == "~"
    assert (
        seen["seconds"] == pytest.approx(70.0, abs=1.0)
        and seen["warmup"] == 500
        and seen["target"] == 1000
    )
    many = {name: values.repeat(4, *[1] * (values.dim() - 1)) for name, values in draws.items()}
    fake_chain(
        monkeypatch, Chain({k: v[torch.randperm(1600)] for k, v in many.items()}, 2100, 2.0, 4.0)
    )
    reached = METHODS[NUTS_TO_TARGET](task)
    assert reached.bound == "" and 2.0 < reached.seconds < 6.0


@pytest.mark.parametrize("draws", [{}, {"beta": torch.zeros(50, 2), "sigma": torch.ones(50)}])
def test_no_effective_draw_gives_a_lower_bound(draws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that never left the warm-up, and one that never moved."""
    fake_chain(monkeypatch, Chain(draws, 30, warmup=50.0, sampling=10.0))
    result = METHODS[NUTS_TO_TARGET](Task(MODELS[REGRESSION], {}, seed=0, budget=1.0))
    assert (result.seconds, result.bound) == (
        60.0,
        ">",
    ) and "no ESS to extrapolate from" in result.note


def test_bulk_ess_is_the_smallest_over_the_scalars() -> None:
    torch.manual_seed(0)
    slow = torch.randn(2, 500, dtype=torch.float64).cumsum(1).flatten()  # two random walks
    draws = {"mu": torch.randn(1000), "tau": torch.rand(1000), "z": torch.randn(1000, 8)}
    entry = MODELS[NONCENTERED]
    assert bulk_ess(entry, draws, chains=2) > 600
    assert bulk_ess(entry, draws | {"mu": slow}, chains=2) < 20


def test_a_chain_stops_once_it_has_its_ess() -> None:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    task = Task(
        MODELS["mesquite-logmesquite"],
        {"x": torch.ones(20, 1), "y": torch.linspace(-1, 1, 20)},
        seed=0,
    )
    chain = methods._chain(task, 30, 100_000, time.process_time() + 60, target=20)
    assert chain.count >= 200 and chain.iterations == 30 + chain.count
    assert bulk_ess(task.entry, chain.draws) >= 20
    assert chain.warmup > 0 and chain.sampling > 0 and chain.warmup + chain.sampling < 60


# NumPyro


def test_absent_numpyro_is_told_in_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"NumPyro is not installed: pip install 'pyroflows\[benchmarks\]'"
    ):
        METHODS[NUMPYRO](Task(MODELS[REGRESSION], {}, seed=0))
    monkeypatch.setitem(METHODS, "NUTS", copies_of_the_reference)
    arguments = ["--db", str(folder), "--models", REGRESSION, "--seeds", "0"]
    assert main([*arguments, "--methods", f"NUTS,{NUMPYRO}"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith(
        "NumPyro NUTS is left out. NumPyro is not installed: pip install"
    )
    assert out.count(NUMPYRO) == 1
    assert main([*arguments, "--methods", NUMPYRO]) == 2


def small_data(name: str) -> dict[str, torch.Tensor]:
    """Made-up keyword arguments for a model."""
    x, y = torch.linspace(-1, 1, 12), torch.linspace(0.5, 3, 12) + 0.3 * torch.arange(12).sin()
    special = {
        "garch-garch11": {"y": y, "sigma1": torch.tensor(0.5)},
        "kilpisjarvi_mod-kilpisjarvi": {
            "x": x,
            "y": y,
            "alpha_prior": torch.tensor([1.0, 2.0]),
            "beta_prior": torch.tensor([0.0, 3.0]),
        },
        "hudson_lynx_hare-lotka_volterra": {
            "times": torch.arange(1.0, 7.0),
            "y_init": y[:2],
            "y": y.reshape(6, 2),
        },
        "gp_pois_regr-gp_regr": {"x": x, "y": y},
        "hmm_example-hmm_example": {"y": 4 * y},
        CENTERED: {"y": y[:8], "sigma": y[4:]},
        NONCENTERED: {"y": y[:8], "sigma": y[4:]},
    }
    return special.get(name, {"x": torch.stack([torch.ones(12), x], -1), "y": y})


@pytest.mark.parametrize("name", list(MODELS))
def test_the_numpyro_model_is_the_same_up_to_a_constant(name: str) -> None:
    jax = pytest.importorskip("jax", reason="NumPyro, an extra of the benchmarks, is not installed")
    infer = pytest.importorskip(
        "numpyro.infer.util", reason="NumPyro, an extra of the benchmarks, is not installed"
    )
    from benchmarks.numpyro_models import MODELS as NUMPYRO_MODELS

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    kwargs, model = small_data(name), MODELS[name].model
    arrays = {key: value.numpy() for key, value in kwargs.items()}
    start = poutine.trace(methods.InitMessenger(methods.start_at)(model)).get_trace(**kwargs)
    sites = [(site, node) for site, node in start.iter_stochastic_nodes() if site != "schools"]
    differences = []
    with methods._precision_of_torch():
        for _ in range(4):
            values = {}
            for site, node in sites:
                transform = biject_to(node["fn"].support)
                values[site] = transform(
                    0.5 * torch.randn(transform.inverse_shape(node["value"].shape))
                )
            with pyro.validation_enabled(False):
                ours = float(
                    poutine.trace(poutine.condition(model, data=values))
                    .get_trace(**kwargs)
                    .log_prob_sum()
                )
            points = {site: jax.numpy.asarray(value.numpy()) for site, value in values.items()}
            theirs, _ = infer.log_density(NUMPYRO_MODELS[name], (), arrays, points)
            differences.append(ours - float(theirs))
    assert max(differences) - min(differences) < 1e-8 * (1 + abs(ours))


def test_numpyro_nuts_gives_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    jax = pytest.importorskip("jax", reason="NumPyro, an extra of the benchmarks, is not installed")
    pytest.importorskip("numpyro", reason="NumPyro, an extra of the benchmarks, is not installed")
    monkeypatch.setattr(methods, "NUMPYRO_ITERATIONS", 200)
    torch.set_default_dtype(torch.float64)
    before = jax.config.jax_enable_x64
    kwargs = {"x": torch.ones(20, 1), "y": torch.linspace(-1, 1, 20)}
    task = Task(MODELS["mesquite-logmesquite"], kwargs, seed=0, name="mesquite-logmesquite")
    result = METHODS[NUMPYRO](task)
    assert result.draws["beta"].shape == (800, 1) and result.draws["sigma"].dtype == torch.float64
    assert jax.config.jax_enable_x64 is before
    # The mean of beta is that of y, zero, with sd 0.14; 800 draws of an ESS above 200 err by 0.01.
    assert (
        abs(float(result.draws["beta"].mean())) < 0.04
        and result.ess is not None
        and result.ess > 0.25
    )
