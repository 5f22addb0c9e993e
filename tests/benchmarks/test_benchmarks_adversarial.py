"""The benchmark of honesty: what it says of its densities, against samplers and quadrature, and how it counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor

from benchmarks import adversarial
from benchmarks.adversarial import (
    ADVERSARIES,
    Adversary,
    Moments,
    Row,
    cells,
    compare,
    confusion,
    main,
    moments,
    run_row,
)
from pyroflows.model.density import LogDensity


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """The command works in float64 and sets dtype and threads of its own process."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def density_of(adversary: Adversary) -> LogDensity:
    return LogDensity(adversary.model, (), adversary.kwargs)


def grid(*axes: Tensor) -> tuple[Tensor, Tensor]:
    """Points of a grid and the logarithms of their cells."""
    volumes = [cells(axis).log() for axis in axes]
    return torch.cartesian_prod(*axes), torch.cartesian_prod(*volumes).sum(-1)


def line(low: float, high: float, step: float) -> Tensor:
    return torch.arange(round((high - low) / step) + 1) * step + low


def both(known: Moments) -> tuple[Any, Any]:
    return known.centre, known.scale


# The declared moments


def around(spike: float, scale: float) -> Tensor:
    """A line on which a narrow mode is seen too."""
    return torch.cat([line(-8, 8, 0.1), spike + scale * line(-8.003, 8, 0.5)]).sort().values


# A sum over a grid finer than one standard deviation is exact to many digits for a smooth density.
GRIDS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "mixture_near": lambda: (line(-9.9, 9.9, 0.2), line(-8, 8, 0.3)),
    "mixture_far": lambda: (line(-12, 12, 0.3), line(-12, 12, 0.3)),
    "mixture_unequal": lambda: (line(-14, 8, 0.3), line(-8, 16, 0.3)),
    "mixture_rare": lambda: (line(-8, 16, 0.3), line(-14, 8, 0.3)),
    "spike_in_slab": lambda: (around(1.5, 0.02), around(1.5, 0.02)),
    "banana": lambda: (line(-70, 70, 0.5), line(-12, 160, 0.5)),
    "ring": lambda: (line(-6, 6, 0.06) + 0.013, line(-6, 6, 0.06) + 0.007),
    "label_switching": lambda: (line(-8, 8, 0.4),) * 3,
    # At an edge a cell is half in.
    "cliff": lambda: (line(-0.5, 8, 0.01), line(-8, 8, 0.4)),
    "wall": lambda: (torch.cat([line(-0.6, -0.4, 0.001), line(-0.39, 8, 0.01)]), line(-8, 8, 0.4)),
    "nan_region": lambda: (line(-8, 2.5, 0.01), line(-8, 8, 0.4)),
    "two_arcs_long": lambda: (line(-21, 21, 0.08), line(-8, 8, 0.1)),
    "two_arcs_bent": lambda: (line(-21, 21, 0.08), line(-6, 6, 0.05)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_declared_moments_are_those_of_the_models_own_density(name: str) -> None:
    adversary = ADVERSARIES[name]()
    density = density_of(adversary)
    z, log_cells = grid(*GRIDS[name]())
    p = (density.log_prob(z).nan_to_num(-math.inf, neginf=-math.inf) + log_cells).softmax(0)
    draws = density.constrain(z)
    assert adversary.truth is not None
    for site, known in adversary.truth.items():
        assert known.level is None
        values = draws[site].reshape(len(z), -1)
        mean = p @ values
        sd = (p @ (values - mean).square()).sqrt()
        # The trapezoidal rule is off by the square of a step of 0.01 at an edge, and by less elsewhere.
        assert ((mean - known.centre) / sd).abs().max() < 1e-3
        assert (sd / known.scale).log().abs().max() < 1e-3
    if adversary.modes:
        shares = torch.zeros(len(adversary.modes.weights)).index_add(
            0, adversary.modes.assign(draws), p
        )
        # A cell on the border of two modes is in one of them.
        torch.testing.assert_close(shares, adversary.modes.weights, rtol=0, atol=0.005)
    # Exact draws are right: the standard error of a mean is 0.005, that of a share at most 0.0025.
    chosen = torch.multinomial(
        p, adversarial.DRAWS, True, generator=torch.Generator().manual_seed(0)
    )
    row = compare(Row(name, 0), adversary, {site: value[chosen] for site, value in draws.items()})
    assert row.right and not row.missing


# Models without data or factors, which run forwards as samplers of themselves.
ANCESTRAL = [
    "correlated_normal",
    "nearly_singular",
    "skewed",
    "banana",
    "funnel",
    "student_3",
    "student_1_5",
]


@pytest.mark.parametrize("name", ANCESTRAL)
def test_declared_moments_are_those_of_ancestral_draws(name: str) -> None:
    adversary = ADVERSARIES[name]()
    torch.manual_seed(0)
    n = 200_000
    assert adversary.truth is not None
    draws = Predictive(adversary.model, num_samples=n, parallel=True)(**adversary.kwargs)
    for site, known in adversary.truth.items():
        mean_error, log_scale_error = known.errors(draws[site].reshape(n, -1).squeeze(-1))
        # Five standard errors: of a mean 0.011. Of a width, with the tail of exponent a, 5 / (a sqrt(n p)), which is 0.053
        # for 1 % of t(3) and less for the others; of the log-normal's sd, by its kurtosis of 26, 0.028.
        assert mean_error < 0.02 and log_scale_error < 0.053


def test_moments_of_the_mixture_of_ten_features() -> None:
    adversary = ADVERSARIES["mixture_of_ten_features"]()
    assert adversary.truth is not None and adversary.modes is not None
    weights, locs, roots = (adversary.kwargs[name] for name in ("weights", "locs", "scale_trils"))
    generator = torch.Generator().manual_seed(1)
    n = 50_000
    labels = torch.multinomial(weights, n, True, generator=generator)
    x = locs[labels] + (roots[labels] @ torch.randn(n, 10, 1, generator=generator)).squeeze(-1)
    # Five standard errors of a mean and, for a kurtosis below 3, of a standard deviation.
    assert max(adversary.truth["x"].errors(x)) < 5 / math.sqrt(n)
    assert torch.equal(adversary.modes.assign({"x": x}), labels)
    precisions = torch.cholesky_inverse(roots)
    offsets = x[:500, None] - locs
    squares = torch.einsum("nki,kij,nkj->nk", offsets, precisions, offsets)
    by_hand = (weights.log() - 0.5 * squares + 0.5 * torch.logdet(precisions)).logsumexp(-1)
    difference = density_of(adversary).log_prob(x[:500]) - by_hand
    torch.testing.assert_close(difference, difference.mean().expand(500))


def test_moments_of_the_horseshoe_are_those_of_its_coordinates() -> None:
    adversary = ADVERSARIES["horseshoe"]()
    assert adversary.truth is not None
    chosen = [1, 2, 5]
    y, tau = adversary.kwargs["y"][chosen], adversary.kwargs["tau"]
    singles = [LogDensity(adversary.model, (), {"y": value[None], "tau": tau}) for value in y]
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    parts = [single.log_prob(z[:, [j, 3 + j]]) for j, single in enumerate(singles)]
    joint = LogDensity(adversary.model, (), {"y": y, "tau": tau}).log_prob(z)
    torch.testing.assert_close(joint, torch.stack(parts).sum(0))
    steps = line(-25, 16, 0.1), line(-8, 8, 0.5)
    points, log_cells = grid(*steps)
    u, t = points.unbind(-1)
    signal = (tau * u.exp()).square()
    # Points follow the law of beta given lambda, whose width vanishes with lambda.
    root = (signal / (1 + signal)).sqrt()
    betas, lambdas = adversary.truth["beta"], adversary.truth["lambda"]
    for j, single in zip(chosen, singles, strict=True):
        beta = root.square() * adversary.kwargs["y"][j] + root * t
        log_p = single.log_prob(torch.stack([u, beta], -1)) + root.log() + log_cells
        p = log_p.softmax(0)
        mean = p @ beta
        sd = (p @ (beta - mean).square()).sqrt()
        torch.testing.assert_close(
            torch.stack([mean, sd]),
            torch.tensor([known[j] for known in both(betas)]),
            rtol=1e-4,
            atol=1e-4,
        )
        of_u = log_p.reshape(len(steps[0]), -1).logsumexp(1) - cells(steps[0]).log()
        found = moments(steps[0].exp(), of_u - steps[0], 0.9)
        # The quantiles are interpolated between points a tenth apart in log lambda.
        torch.testing.assert_close(
            torch.tensor(both(found)),
            torch.tensor([known[j] for known in both(lambdas)]),
            rtol=0.01,
            atol=0,
        )


def test_improper_posteriors_have_infinite_mass() -> None:
    flat = density_of(ADVERSARIES["improper_direction"]())
    masses = []
    for size in (20, 40, 80):
        z, log_cells = grid(line(-size, size, 0.25), line(-size, size, 0.25))
        masses.append(float((flat.log_prob(z) + log_cells).logsumexp(0).exp()))
    assert masses[1] / masses[0] == pytest.approx(2, rel=0.02) and masses[2] / masses[
        1
    ] == pytest.approx(2, rel=0.02)
    # The density of log tau, with theta integrated out, tends to a constant.
    scale = LogDensity(ADVERSARIES["improper_scale"]().model, (), {"y": torch.tensor([2.8])})
    u, t = torch.tensor([-5.0, -10.0, -20.0, -40.0]), line(-8, 8, 0.25)
    theta = u.exp()[:, None] * t
    z = torch.stack([u[:, None].expand_as(theta), theta], -1)
    log_density = (scale.log_prob(z) + u[:, None]).logsumexp(-1)
    torch.testing.assert_close(log_density, log_density[-1].expand(4), atol=1e-3, rtol=0)
    assert all(
        ADVERSARIES[name]().truth is None for name in ("improper_direction", "improper_scale")
    )


ARCS = ["arc", "three_arcs", "four_arcs"]


@pytest.mark.parametrize("name", ARCS)
def test_moments_and_evidence_of_arcs_are_those_of_exact_draws(name: str) -> None:
    adversary = ADVERSARIES[name]()
    arcs = adversary.model.__self__  # type: ignore[attr-defined]
    n = 100_000
    x = arcs.sample(n, torch.Generator().manual_seed(0))
    density = density_of(adversary)
    row = compare(Row(name, 0, evidence_error=0.0), adversary, {"x": x})
    assert row.right and not row.missing
    assert max(row.mean_error or 1.0, row.log_sd_error or 1.0) < 5 / math.sqrt(n)
    # Exact draws have the entropy of the model's own density, if that is normalised: each mode
    # adds D / 2 squares of normals, and modes do not overlap.
    entropy = -float(density.log_prob(x).mean())
    features = x.shape[-1]
    of_mode = math.log(arcs.length) + (features - 1) * math.log(arcs.thickness)
    of_mode += features / 2 * math.log(2 * math.pi * math.e)
    of_weights = -float((arcs.weights * arcs.weights.log()).sum())
    error = math.sqrt(features / 2 + 1) / math.sqrt(n)
    assert entropy == pytest.approx(of_mode + of_weights, abs=5 * error)
    assert adversary.log_evidence == 0.0


@pytest.mark.parametrize("name", ["two_arcs_long", "two_arcs_bent"])
def test_evidence_of_two_arcs_by_a_grid(name: str) -> None:
    adversary = ADVERSARIES[name]()
    z, log_cells = grid(*GRIDS[name]())
    log_evidence = float((density_of(adversary).log_prob(z) + log_cells).logsumexp(0))
    assert adversary.log_evidence == pytest.approx(log_evidence, abs=1e-3)


def test_a_fit_of_another_evidence_is_not_right() -> None:
    known = Adversary(lambda: None, {}, {"x": Moments(0.0, 1.0)}, log_evidence=0.0)
    draws = {"x": torch.linspace(-1, 1, 1001) * math.sqrt(3)}
    assert compare(Row("x", 0, evidence_error=0.04), known, draws).right
    assert not compare(Row("x", 0, evidence_error=0.06), known, draws).right


def test_every_adversary_is_checked_here() -> None:
    others = {"mixture_of_ten_features", "horseshoe", "improper_direction", "improper_scale"}
    assert {*GRIDS, *ANCESTRAL, *ARCS, *others} == set(ADVERSARIES)


@pytest.mark.parametrize(("df", "level", "quantile"), [(3.0, 0.99, 5.840909), (1.5, 0.9, 3.705181)])
def test_widths_of_heavy_tails(df: float, level: float, quantile: float) -> None:
    z = float(torch.special.ndtri(torch.tensor((1 + level) / 2)))
    assert adversarial._student_moments(df, level).scale * z == pytest.approx(quantile, rel=1e-3)


def test_moments_by_quadrature_of_an_exponential_law() -> None:
    x = torch.linspace(0, 60, 100_001)
    assert moments(x, -x).centre == pytest.approx(1, rel=1e-5) and moments(
        x, -x
    ).scale == pytest.approx(1, rel=1e-5)
    found = moments(x, -x, 0.9)
    assert found.centre == pytest.approx(math.log(2), rel=1e-4)
    assert found.scale == pytest.approx(math.log(19) / (2 * 1.6448536), rel=1e-4)


# What a fit is worth

MIXTURE = "mixture_far"


def exact(name: str = MIXTURE, n: int = 4000) -> dict[str, Tensor]:
    kwargs = ADVERSARIES[name]().kwargs
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(kwargs["weights"], n, True, generator=generator)
    return {"x": kwargs["locs"][labels] + torch.randn(n, 2, generator=generator)}


def one_mode() -> dict[str, Tensor]:
    x = exact()["x"]
    return {"x": x[x[:, 0] > 1]}


def test_a_lost_mode_is_found_even_where_the_moments_do_not_show_it() -> None:
    row = compare(Row(MIXTURE, 0), ADVERSARIES[MIXTURE](), one_mode())
    assert (
        row.missing == ["mode 0 of weight 0.500 has 0.000 of the draws, 0 of them different"]
        and not row.right
    )
    assert row.mean_error == pytest.approx(3 / math.sqrt(10), rel=0.05)
    wide = Adversary(lambda: None, {}, {"x": Moments(0.0, 100.0)}, ADVERSARIES[MIXTURE]().modes)
    row = compare(Row(MIXTURE, 0), wide, {"x": 100 * torch.randn(4000, 2).abs()})
    assert row.missing


def test_light_modes_may_be_missing_and_a_doubled_weight_is_no_loss() -> None:
    def missing(weight: float, draws: int) -> list[str]:
        modes = adversarial.Modes(
            torch.tensor([1 - weight, weight]), lambda draws: (draws["x"] > 1).long()
        )
        x = torch.rand(4000)
        return modes.missing({"x": torch.where(torch.arange(4000) < draws, x + 1.1, x)})

    assert missing(0.015, 0) == []
    assert missing(0.1, 800) == [] and missing(0.1, 210) == []
    assert missing(0.1, 190)[0].startswith("mode 1 of weight 0.100 has 0.0")


def test_a_mode_of_copies_is_missing() -> None:
    adversary, draws = ADVERSARIES[MIXTURE](), exact()
    assert adversary.modes is not None
    left = adversary.modes.assign(draws) == 0
    row = compare(
        Row(MIXTURE, 0),
        adversary,
        {"x": torch.where(left[:, None], torch.tensor([-3.0, -4.0]), draws["x"])},
    )
    assert not row.right and (row.mean_error or 1.0) < 0.05
    assert row.missing == [
        f"mode 0 of weight 0.500 has {left.double().mean():.3f} of the draws, 1 of them different"
    ]


@pytest.mark.parametrize(
    ("draws", "right"),
    [
        (torch.linspace(-1, 1, 1001) * math.sqrt(3), True),
        (torch.linspace(-1, 1, 1001) * math.sqrt(3) + 0.19, True),
        (torch.linspace(-1, 1, 1001) * math.sqrt(3) + 0.21, False),
        (torch.linspace(-1, 1, 1001) * math.sqrt(3) * 1.2, True),
        (torch.linspace(-1, 1, 1001) * math.sqrt(3) * 0.8, False),
        (torch.full((1001,), math.nan), False),
        (torch.cat([torch.randn(1000), torch.tensor([math.inf])]), False),
        (torch.zeros(1001), False),
    ],
)
def test_right_means_within_the_tolerance(draws: Tensor, right: bool) -> None:
    known = Adversary(lambda: None, {}, {"x": Moments(0.0, 1.0)})
    assert compare(Row("x", 0), known, {"x": draws}).right is right


def test_one_bad_entry_is_not_averaged_away() -> None:
    known = Adversary(
        lambda: None, {}, {"x": Moments(torch.tensor([0.0, 1.0]), 1.0), "y": Moments(0.0, 1.0)}
    )
    x, y = torch.randn(4000, 2), torch.randn(4000)
    row = compare(Row("x", 0), known, {"x": x, "y": y})
    assert not row.right and row.mean_error == pytest.approx(1, abs=0.1)
    row = compare(Row("x", 0), known, {"x": torch.full((4000, 2), math.nan), "y": y})
    assert math.isnan(row.mean_error or 0.0) and not row.right


# The command


def fitted(ok: bool, draws: dict[str, Tensor]) -> Any:
    class Verdict(SimpleNamespace):
        def __str__(self) -> str:
            return "A sentence."

    return SimpleNamespace(verdict=Verdict(ok=ok), sample=lambda n, seed: draws)


def raises(error: Exception) -> Callable[[], Any]:
    def fit() -> Any:
        raise error

    return fit


CASES: dict[str, tuple[Callable[[], Any], str, int]] = {
    "honest": (lambda: fitted(True, exact()), "right_ok", 0),
    "timid": (lambda: fitted(False, exact()), "right_not_ok", 0),
    "liar": (lambda: fitted(True, one_mode()), "wrong_ok", 1),
    "humble": (lambda: fitted(False, one_mode()), "wrong_not_ok", 0),
    "refuses": (raises(ValueError("no such model")), "wrong_not_ok", 0),
    "crashes": (raises(RuntimeError("a bug")), "failed", 1),
    "cannot draw": (
        lambda: SimpleNamespace(**vars(fitted(True, exact())) | {"sample": None}),
        "failed",
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_exit_status_tells_a_lie_or_a_crash(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, cell, status = CASES[case]
    given: list[dict[str, Any]] = []

    def fake(model: Any, args: Any, kwargs: Any, **options: Any) -> Any:
        given.append(options)
        return fit()

    monkeypatch.setattr(adversarial.pf, "fit_posterior", fake)
    file = tmp_path / "rows.json"
    arguments = ["--models", MIXTURE, "--seeds", "0,3", "--time-limit", "7", "--json", str(file)]
    assert main(arguments) == status
    assert given == [{"seed": seed, "time_limit": 7.0, "progress": False} for seed in (0, 3)]
    document = json.loads(file.read_text())
    assert {key: n for key, n in document["confusion"].items() if n} == {cell: 2} | (
        {"refused": 2} if case == "refuses" else {}
    )
    assert document["solved"] == ([MIXTURE] if case == "honest" else [])
    assert [row["seed"] for row in document["rows"]] == [0, 3] and "processor" in document[
        "machine"
    ]
    out = capsys.readouterr().out
    assert {
        "refuses": "Refused: no such model",
        "crashes": "RuntimeError: a bug",
        "cannot draw": "TypeError",
    }.get(case, "A sentence.") in out
    assert "Right and ok with every seed" in out


def test_an_improper_posterior_is_never_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial.pf, "fit_posterior", lambda *args, **kwargs: fitted(True, {}))
    assert main(["--models", "improper_direction", "--seeds", "0"]) == 1
    row = run_row("improper_scale", 0)
    assert row.ok and not row.right and row.mean_error is None


def test_counts_by_hand() -> None:
    rows = [
        Row("a", 0, right=True, ok=True),
        Row("a", 1, right=True, ok=True),
        Row("b", 0, right=True, ok=True),
        Row("b", 1, right=True, ok=False),
        Row("c", 0, right=False, ok=True),
        Row("c", 1, refused=True),
        Row("d", 0, right=True, ok=True, error="RuntimeError: x"),
    ]
    assert confusion(rows) == {
        "right_ok": 3,
        "right_not_ok": 1,
        "wrong_ok": 1,
        "wrong_not_ok": 1,
        "refused": 1,
        "failed": 1,
    }
    assert adversarial.solved(rows) == ["a"]
    medians = adversarial.table(
        [Row("a", seed, float(seed), 0.5, seconds=2.0, right=seed > 0) for seed in range(3)]
    )
    assert medians.splitlines()[1].split() == ["a", "3", "1.000", "0.500", "0", "2", "0", "2.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nothing"], "Expected --models to be among"),
        (["--seeds", "a"], "Expected --seeds to be integers"),
        (["--time-limit", "0"], "Expected --time-limit to be positive"),
        (["--time-limit", "nan"], "Expected --time-limit to be positive"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_list_has_a_line_for_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ADVERSARIES) and all(
        len(line.split()) > 3 for line in lines
    )


def test_the_benchmark_of_an_easy_model_for_real() -> None:
    row = run_row("correlated_normal", 0, time_limit=20.0)
    assert row.right and row.ok and row.verdict and row.seconds
