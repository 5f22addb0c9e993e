"""The pictures: what they show, which pair they choose, and that pyplot is left alone."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyroflows.report.plots import hardest_pair, plot_marginals, plot_pair, plot_posterior
from pyroflows.report.statistics import summary


def schools(n: int = 4000) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mu, tau = 4 + 3 * rng.normal(size=n), np.exp(1 + 0.9 * rng.normal(size=n))
    return {"mu": mu, "tau": tau, "theta": mu[:, None] + tau[:, None] * rng.normal(size=(n, 8))}


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def words(figure: Figure) -> str:
    return " ".join(
        text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))
    )


def test_eight_schools_shows_all_marginals_and_the_funnel(tmp_path):
    figure = plot_posterior(schools(), tmp_path / "schools.png")
    assert titles(figure) == ["mu", "tau", *(f"theta[{j}]" for j in range(8))]
    pair = figure.axes[-1]
    assert pair.get_ylabel() == "tau (log scale)"
    assert pair.get_yscale() == "log"
    assert pair.get_xlabel().startswith("theta[")
    assert pair.get_xscale() == "linear"
    assert (tmp_path / "schools.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_vector_leaves_room_for_the_scalars_after_it():
    figure = plot_posterior({"x": torch.randn(100, 30), "sigma": torch.rand(100)})
    assert titles(figure) == [*(f"x[{i}]" for i in range(11)), "sigma"]
    assert "12 of 31 scalar parameters are shown." in words(figure)


def test_matrices_are_named_by_row_and_column():
    figure = plot_marginals({"w": torch.randn(50, 2, 2)})
    assert titles(figure) == ["w[0, 0]", "w[0, 1]", "w[1, 0]", "w[1, 1]"]


@pytest.mark.parametrize(
    "other",
    [torch.ones(200), torch.full((200,), torch.nan), torch.arange(200).log()],
    ids=["constant", "nan", "inf"],
)
def test_what_cannot_be_drawn_is_left_out(other):
    assert titles(plot_posterior({"a": torch.randn(200), "b": other, "c": torch.randn(200)})) == [
        "a",
        "c",
    ]


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(300),
        torch.randint(0, 3, (300,)),
        torch.rand(300) < 0.5,
        torch.randn(300).double(),
        1e30 * torch.randn(300),
        1e-30 * torch.randn(300),
        torch.distributions.Cauchy(0.0, 1.0).sample((300,)),
        torch.nn.functional.one_hot(torch.tensor(7), 300).float(),
    ],
    ids=["float", "int", "bool", "double", "huge", "tiny", "heavy", "spike"],
)
def test_any_single_parameter_can_be_drawn(value, tmp_path):
    figure = plot_posterior({"x": value}, tmp_path / "x.png")
    assert titles(figure) == ["x"]


def test_a_picture_that_cannot_be_written_keeps_the_old_one(tmp_path):
    (tmp_path / "x.png").write_text("old")
    with pytest.raises(ValueError, match=r"Expected path to end in one of .* got '.*x\.words'"):
        plot_marginals(schools(), tmp_path / "x.words")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"Cannot write .*folder\.png': Is a directory"):
        plot_marginals(schools(), tmp_path / "folder.png")
    assert {path.name for path in tmp_path.iterdir()} == {"x.png", "folder.png"}
    assert (tmp_path / "x.png").read_text() == "old"


def test_the_interval_of_a_picture_is_that_of_the_table():
    draws = {"tau": schools()["tau"]}
    [axes] = plot_marginals(draws).axes
    ends = axes.lines[0].get_xdata()
    assert list(ends) == list(summary(draws).loc["tau", ["hdi_3%", "hdi_97%"]])


def test_names_with_dollars_are_no_formulas(tmp_path):
    plot_posterior({"a$b$_^": torch.randn(50), "c": torch.randn(50)}, tmp_path / "x.png")


def test_marginals_alone():
    figure = plot_marginals(schools())
    assert len(figure.axes) == 10
    assert "94 % HDI" in words(figure)


def test_a_pair_by_name():
    axes = plot_pair(schools(), "mu", "theta[3]").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("mu", "theta[3]")


def _gaussian(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    return rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=n)


def _funnel(rng: np.random.Generator, n: int) -> np.ndarray:
    v = rng.normal(size=n)
    return np.stack([v, np.exp(v) * rng.normal(size=n)], axis=1)


def _banana(rng: np.random.Generator, n: int) -> np.ndarray:
    x = rng.normal(size=n)
    return np.stack([x, x**2 + 0.3 * rng.normal(size=n)], axis=1)


def _ring(rng: np.random.Generator, n: int) -> np.ndarray:
    angle, radius = rng.uniform(0, 2 * np.pi, size=n), rng.normal(3, 0.2, size=n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


@pytest.mark.parametrize("shape", [_funnel, _banana, _ring])
@pytest.mark.parametrize("rho", [0.0, 0.95])
def test_hardest_pair_prefers_what_a_gaussian_cannot_explain(shape, rho):
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [_gaussian(rng, 4000, rho), shape(rng, 4000), rng.normal(size=(4000, 5))], axis=1
    )
    assert set(hardest_pair(values)) == {2, 3}


def test_hardest_pair_does_not_depend_on_scales():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(size=(4000, 2)), _funnel(rng, 4000)], axis=1)
    assert hardest_pair(values) == hardest_pair(np.exp(values) * [1e3, 1e-3, 1e6, 1.0])


def test_hardest_pair_of_a_gaussian_is_the_most_correlated():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(size=(4000, 3)), _gaussian(rng, 4000, -0.5)], axis=1)
    assert set(hardest_pair(values)) == {3, 4}


def test_one_quantity_under_two_names_is_no_pair():
    x = np.random.default_rng(3).normal(size=(500, 1))
    assert hardest_pair(np.concatenate([x, 2 * x], axis=1)) is None
    assert hardest_pair(x) is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot_posterior(object()), TypeError, "map names to arrays.*got object"),
        (lambda: plot_posterior(schools(n=1)), ValueError, "nothing to draw"),
        (lambda: plot_posterior({}), ValueError, "nothing to draw"),
        (lambda: plot_marginals({"x": torch.ones(9)}), ValueError, "nothing to draw"),
        (lambda: plot_pair(schools(), "mu"), ValueError, "both x and y, or neither"),
        (lambda: plot_pair(schools(), "mu", "nu"), ValueError, "no parameter 'nu'.*mu, tau"),
        (lambda: plot_pair({"x": torch.randn(9)}), ValueError, "two scalar parameters"),
    ],
)
def test_mistakes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_pyplot_is_never_imported():
    code = "import sys, pyroflows.report.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "draws",
    [3, np.zeros(0), np.array(["x"]), None, np.zeros(3, dtype=complex)],
    ids=["number", "empty", "words", "none", "complex"],
)
def test_draws_are_arrays_of_numbers(draws):
    with pytest.raises(ValueError, match="Expected draws of 'x' to be numbers of shape"):
        plot_marginals({"x": draws})


def test_tensors_with_gradients_are_drawn():
    assert isinstance(plot_marginals({"x": torch.randn(20, requires_grad=True)}), Figure)
