"""Calibration: ranks of parameters among the posteriors of the data that they made."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ARGS, Exact, model
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.report.arviz_bridge import has_datatree, import_arviz
from pyroflows.study import SVIFit

calibrate = functools.partial(pf.calibrate, progress=False)


def observe(x: Any, y: torch.Tensor | None = None) -> None:
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0) if y is None else y)


def one_mean() -> None:
    observe(pyro.sample("x", dist.Normal(0.0, 1.0)))


class FailsAt(Exact):
    """Raises an error on data whose first entry is large, on about a tenth of them."""

    def __call__(self, given: Any, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
        if given.data["y"][0, 0] > 1.4:
            raise RuntimeError("the data are too large.")
        return super().__call__(given, args, kwargs)


# Statistics


def test_the_exact_posterior_is_calibrated():
    found = calibrate(model, ARGS, fit=Exact(), seed=1)
    assert found.ok and found.p_value > 0.01 and found.tarp > 0.01
    assert found.ranks["mu"].shape == found.parameters["mu"].shape == (200, 2)
    assert list(found.summary().index) == ["mu[0]", "mu[1]"]
    np.testing.assert_allclose(found.summary()["inside_90%"], 0.9, atol=3 * (0.09 / 200) ** 0.5)


@pytest.mark.parametrize(
    ("fit", "kind", "sentence"),
    [
        (Exact(width=0.7), "coverage", "too narrow"),
        (Exact(width=1.4), "coverage", "too wide"),
        (Exact(shift=0.5), "vsbc", "lies too high"),
        (Exact(shift=-0.5), "vsbc", "lies too low"),
        (Exact(prior=True), "tarp", "of all parameters together is wrong"),
    ],
)
def test_a_fault_is_flagged_by_the_statistic_that_looks_for_it(fit, kind, sentence):
    found = calibrate(model, ARGS, fit=fit)
    assert not found.ok and sentence in found.reason and f"({kind} p" in found.reason
    smallest = {name: float(values.min()) for name, values in found.p_values.items()}
    smallest["tarp"] = found.tarp
    assert smallest[kind] < 1e-4
    if kind == "coverage":
        assert smallest["vsbc"] > 0.01
    if kind == "tarp":
        assert min(value for name, value in smallest.items() if name != kind) > 0.01


def test_a_wrong_correlation_shows_in_the_joint_statistic_alone():
    found = calibrate(model, ARGS, fit=Exact(correlation=0.98), data_sets=300)
    assert found.tarp < 0.001
    assert min(values.min() for values in found.p_values.values()) > 0.01


# Fits of every kind


def with_a_parameter() -> None:
    shift = pyro.param("shift", torch.tensor(0.5))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    observe(x.sum(-1) + shift)


def test_a_guide_class_is_trained_by_svi_afresh_for_each_data_set():
    pyro.param("shift", torch.tensor(1.5))
    fit = SVIFit(AutoNormal, steps=20, learning_rate=0.1)
    found = calibrate(with_a_parameter, fit=fit, data_sets=3, draws=19)
    assert found.ranks["x"].shape == (3, 2) and "AutoNormal" in found.fit
    assert list(pyro.get_param_store()) == ["shift"] and float(pyro.param("shift")) == 1.5
    with ProcessPoolExecutor(1) as executor:
        elsewhere = calibrate(with_a_parameter, fit=fit, data_sets=3, draws=19, executor=executor)
    assert (found.posterior_draws["x"] == elsewhere.posterior_draws["x"]).all()


def test_draws_of_a_posterior_and_its_verdict():
    fit = functools.partial(pf.fit_posterior, steps=0, progress=False)
    found = calibrate(one_mean, fit=fit, data_sets=2, draws=19, sites=["x"])
    assert found.trusted == [True, True]
    assert "The verdict trusts 2 of 2 posteriors." in str(found)


def test_a_hand_written_guide_and_draws_are_taken_in_seeded_order():
    def guide() -> None:
        pyro.sample("x", dist.Normal(0.5, 0.5**0.5))

    def fit(given: Any, args: Any, kwargs: Any, seed: int) -> Any:
        assert int(torch.initial_seed()) == seed
        return guide

    first, second = (calibrate(one_mean, fit=fit, data_sets=4, draws=19) for _ in range(2))
    assert (first.ranks["x"] == second.ranks["x"]).all()


def test_long_chains_are_thinned():
    class Chains:
        def get_samples(self) -> dict[str, np.ndarray]:
            return {"x": np.arange(1000.0) - 500}

    found = calibrate(one_mean, fit=lambda *_: Chains(), data_sets=2, draws=9)
    assert found.ranks["x"].tolist() == [5, 5] or set(found.ranks["x"]) <= {4, 5}


def test_an_amortised_posterior_is_asked_for_each_data_set():
    class Amortised:
        def posterior_for(self, x: torch.Tensor) -> Any:
            self.mean = x / 2
            return self

        def sample(self, n: int, seed: int) -> dict[str, torch.Tensor]:
            noise = torch.randn(n, generator=torch.Generator().manual_seed(seed))
            return {"x": self.mean + 0.5**0.5 * noise}

    found = calibrate(one_mean, fit=Amortised(), data_sets=100)
    assert found.ok and found.fit == "Amortised.posterior_for"


# Running


def test_any_number_of_processes_and_a_file_give_the_same(tmp_path):
    path = tmp_path / "study.pt"
    alone = calibrate(model, ARGS, fit=Exact(), data_sets=8)
    calibrate(model, ARGS, fit=Exact(), data_sets=3, checkpoint=path)
    with ProcessPoolExecutor(2) as executor:
        resumed = calibrate(
            model, ARGS, fit=Exact(), data_sets=8, executor=executor, checkpoint=path
        )
    assert (alone.ranks["mu"] == resumed.ranks["mu"]).all()
    assert (alone.tarp_ranks == resumed.tarp_ranks).all()


def test_finished_fits_are_not_done_again(tmp_path):
    path = tmp_path / "study.pt"
    calls = []

    def fit(given: Any, args: Any, kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Exact()(given, args, kwargs)

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, ARGS, fit=fit, data_sets=4, checkpoint=path)
    calibrate(model, ARGS, fit=fit, data_sets=4, checkpoint=path)
    assert len(calls) == 5


def test_a_failed_fit_is_tried_again(tmp_path):
    given = {"args": ARGS, "data_sets": 4, "checkpoint": tmp_path / "study.pt"}
    once = [RuntimeError("the disk is full.")]

    def fit(given: Any, args: Any, kwargs: Any) -> Any:
        if once:
            raise once.pop()
        return Exact()(given, args, kwargs)

    assert list(calibrate(model, fit=fit, failing=0.5, **given).failures) == [0]
    assert calibrate(model, fit=fit, **given).fits == 4


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"fit": Exact(width=2.0)}, "has fit Exact"),
        ({"seed": 5}, "has seed 0, and this one 5"),
        ({"draws": 99}, "has draws 199"),
        ({"args": (ARGS[0] + 1, ARGS[1])}, "is one of other simulated data"),
    ],
)
def test_a_file_of_another_study_is_refused(tmp_path, changed, told):
    given = {"args": ARGS, "fit": Exact(), "data_sets": 2, "checkpoint": tmp_path / "study.pt"}
    calibrate(model, **given)
    with pytest.raises(ValueError, match=told):
        calibrate(model, **given | changed)


def test_failed_fits_are_left_out_up_to_a_share():
    found = calibrate(model, ARGS, fit=FailsAt(), data_sets=40, failing=0.5)
    assert 0 < len(found.failures) < 20 and found.fits == 40 - len(found.failures)
    assert "RuntimeError (the data are too large)" in str(found)
    with pytest.raises(ValueError, match=r"at most 0% of 40 fits to fail; 1 of .* did, the first"):
        calibrate(model, ARGS, fit=FailsAt(), data_sets=40, failing=0)


def masked() -> None:
    with pyro.poutine.mask(mask=torch.tensor([True, False])):
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0))
    observe(x[0])


def test_entries_that_a_mask_switches_off_have_no_rank():
    def fit(*_: Any) -> Any:
        return {"x": torch.stack([torch.randn(19), torch.full((19,), torch.nan)], -1)}

    found = calibrate(masked, fit=fit, data_sets=2, draws=19)
    assert (found.ranks["x"][:, 1] == -1).all() and list(found.columns) == ["x[0]"]
    with pytest.raises(ValueError, match="some draws of the posterior are NaN"):
        calibrate(one_mean, fit=lambda *_: {"x": torch.full((199,), torch.nan)})


# What is refused


def without_data() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))


def improper() -> None:
    observe(pyro.sample("x", dist.ImproperUniform(constraints.real, (), ())))


def with_a_factor() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -x)
    observe(x)


def of_a_part() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 9, subsample_size=3):
        observe(x, torch.zeros(3))


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (without_data, r"observed sites.*got one that observes nothing \('x'\)"),
        (improper, "a prior to draw from at site 'x'; got ImproperUniform"),
        (with_a_factor, "the pyro.factor 'penalty'"),
        (of_a_part, "plate 'rows' with 3 of 9"),
    ],
)
def test_a_model_that_cannot_be_simulated_is_refused_before_any_fit(refused, told):
    with pytest.raises(ValueError, match=told):
        calibrate(refused, fit=lambda *_: 1 / 0)


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ({"z": torch.zeros(199)}, "Expected draws of 'x'; the fit returned those of 'z'"),
        ({"x": torch.zeros(199, 1)}, r"of shape \(199,\); the fit returned \(199, 1\)"),
        ({"x": torch.zeros(7)}, "Expected 199 draws of 'x' at least; got 7"),
        (5, "Expected a fit to return a posterior, draws by site, or a trained guide; got int"),
    ],
)
def test_wrong_draws_are_refused_at_the_first_data_set(returned, told):
    with pytest.raises(ValueError, match=told):
        calibrate(one_mean, fit=lambda *_: returned)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"fit": AutoNormal(one_mean)}, TypeError, "got a made AutoNormal"),
        ({"fit": "auto"}, TypeError, "Expected fit to be pyroflows.fit_posterior"),
        ({"data_sets": 0}, ValueError, "data_sets >= 1"),
        ({"draws": 2}, ValueError, "draws >= 9"),
        ({"sites": ["y"]}, ValueError, "Expected sites to be among 'x'; got 'y'"),
        ({"sites": "x"}, TypeError, "sequence of names"),
        ({"failing": 1.5}, ValueError, "failing from 0 to below 1"),
        ({"seed": -1}, ValueError, "seed >= 0"),
        ({"worker": 3}, TypeError, "Expected the options executor, checkpoint, progress"),
        ({"executor": 3}, TypeError, "one of concurrent.futures"),
        ({"executor": ThreadPoolExecutor(1)}, ValueError, "executor of processes"),
        ({"checkpoint": os.path.join("no", "folder")}, ValueError, "that can be written"),
        ({"args": (1,)}, TypeError, "that the model takes"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(options, error, told):
    with pytest.raises(error, match=told):
        calibrate(one_mean, **options)


def test_data_whose_shape_changes_are_refused_in_a_sentence():
    def changing() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        rows = int(torch.randint(1, 4, ()))
        pyro.sample("y", dist.Normal(x, 1.0).expand([rows]), obs=torch.zeros(rows))

    with pytest.raises(ValueError, match="sites of one shape in every draw of the model; 'y'"):
        calibrate(changing, fit=lambda *_: 1 / 0, data_sets=5)


def test_numbers_of_numpy_make_a_file_like_any_other(tmp_path):
    given = {"args": ARGS, "fit": Exact(), "data_sets": 2, "checkpoint": tmp_path / "study.pt"}
    calibrate(model, **given, seed=np.int64(3), draws=np.int64(99))
    assert calibrate(model, **given, seed=3, draws=99).fits == 2


def test_what_cannot_be_pickled_is_refused_in_a_sentence():
    with (
        ProcessPoolExecutor(1) as executor,
        pytest.raises(ValueError, match="can be sent to the processes"),
    ):
        calibrate(one_mean, fit=lambda *_: None, data_sets=2, executor=executor)


# The result


def test_arviz_takes_the_ranks_as_numbers_in_the_unit_interval():
    found = calibrate(model, ARGS, fit=Exact(), data_sets=20)
    data = found.to_arviz()
    numbers = data["prior_sbc"]["mu"].values
    assert numbers.shape == (1, 20, 2) and numbers.min() > 0 and numbers.max() < 1
    assert (np.floor(numbers[0] * 200) == found.ranks["mu"]).all()
    made, drawn = data["averaged_posterior"]["mu"].values
    assert (made == found.parameters["mu"]).all() and not (made == drawn).any()
    az = import_arviz()
    if not has_datatree(az):
        axes = az.plot_ecdf(numbers[0, :, 0], cdf=lambda x: x, difference=True)
        assert axes.lines
        assert az.plot_rank(data["averaged_posterior"]) is not None


def test_the_picture_has_a_panel_for_each_scalar_and_one_for_all(tmp_path):
    found = calibrate(model, ARGS, fit=Exact(), data_sets=20)
    figure = found.plot(tmp_path / "ranks.png")
    titles = [axes.get_title().partition("   ")[0] for axes in figure.axes]
    assert titles == ["mu[0]", "mu[1]", "all together (TARP)"]
    assert (tmp_path / "ranks.png").stat().st_size > 0
