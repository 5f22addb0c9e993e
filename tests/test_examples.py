"""The packaged examples: they trace, they can be drawn from, and their numbers are the published ones."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import prune_subsample_sites

from pyroflows.examples import EXAMPLES, Example, load_example

LATENTS = {
    "eight_schools": {"mu": (), "tau": (), "theta": (8,)},
    "eight_schools_noncentered": {"mu": (), "tau": (), "theta_trans": (8,)},
    "funnel": {"v": (), "x": (9,)},
    "logistic_regression": {"intercept": (), "slope": ()},
    "linear_regression": {"intercept": (), "slope_weight": (), "slope_horsepower": (), "sigma": ()},
}


@pytest.fixture(params=list(EXAMPLES))
def example(request: pytest.FixtureRequest) -> Example:
    return load_example(request.param)


def _trace(example: Example) -> poutine.Trace:
    pyro.set_rng_seed(0)
    with InitMessenger(init_to_median):
        trace = prune_subsample_sites(
            poutine.trace(example.model).get_trace(*example.args, **example.kwargs)
        )
    trace.compute_log_prob()
    return trace


def _latents(trace: poutine.Trace) -> dict[str, torch.Tensor]:
    return {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}


def test_every_example_has_its_latent_sites(example):
    shapes = {name: tuple(value.shape) for name, value in _latents(_trace(example)).items()}
    assert shapes == LATENTS[example.name]


def test_log_density_is_finite(example):
    assert math.isfinite(_trace(example).log_prob_sum().item())


def test_observed_sites_have_one_log_density_per_observation(example):
    trace = _trace(example)
    for name in trace.observation_nodes:
        assert trace.nodes[name]["log_prob"].shape == trace.nodes[name]["value"].shape


@pytest.mark.parametrize("parallel", [False, True])
def test_draws_new_data_without_data(example, parallel):
    data = {k: v for k, v in example.kwargs.items() if k not in ("y", "distress", "mpg")}
    draws = Predictive(example.model, num_samples=7, parallel=parallel)(**data)
    for name, shape in LATENTS[example.name].items():
        assert tuple(draws[name].squeeze().shape) == (7, *shape)
    observed = {"y", "distress", "mpg"} & set(example.kwargs)
    for name in observed:
        assert draws[name].shape == (7, *example.kwargs[name].shape)
        assert draws[name].isfinite().all()


def test_the_two_parametrisations_of_eight_schools_agree():
    centred, other = load_example("eight_schools"), load_example("eight_schools_noncentered")
    values = {
        "mu": torch.tensor(3.0),
        "tau": torch.tensor(2.0),
        "theta_trans": torch.linspace(-1, 1, 8),
    }
    trace = poutine.trace(poutine.condition(other.model, values)).get_trace(**other.kwargs)
    theta = trace.nodes["theta"]["value"]
    torch.testing.assert_close(theta, 3 + 2 * values["theta_trans"])
    same = {"mu": values["mu"], "tau": values["tau"], "theta": theta}
    other_trace = poutine.trace(poutine.condition(centred.model, same)).get_trace(**centred.kwargs)
    torch.testing.assert_close(other_trace.log_prob_sum() + 8 * math.log(2.0), trace.log_prob_sum())


def test_funnel_is_neals():
    v, x = torch.tensor(-2.0), torch.linspace(-1, 1, 9)
    model = poutine.condition(load_example("funnel").model, {"v": v, "x": x})
    expected = torch.distributions.Normal(0.0, 3.0).log_prob(v)
    expected = expected + torch.distributions.Normal(0.0, math.exp(-1.0)).log_prob(x).sum()
    torch.testing.assert_close(poutine.trace(model).get_trace().log_prob_sum(), expected)


def test_challenger_numbers_give_the_published_fit():
    # Dalal, Fowlkes and Hoadley's binary model by maximum likelihood: logit p = 15.043 - 0.2322 t.
    data = load_example("logistic_regression").kwargs
    t, y = data["temperature"].double(), data["distress"].double()
    assert len(t) == 23
    assert y.sum() == 7
    design = torch.stack([torch.ones_like(t), t], dim=1)
    beta = torch.zeros(2, dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(design @ beta)
        beta = beta + torch.linalg.solve(
            design.T @ (design * (p * (1 - p))[:, None]), design.T @ (y - p)
        )
    assert beta.tolist() == pytest.approx([15.0429, -0.2322], abs=1e-4)


def test_car_numbers_give_the_published_fit():
    # R: lm(mpg ~ wt + hp, mtcars): 37.22727, -3.87783, -0.03177, residual standard error 2.593.
    data = {key: value.double() for key, value in load_example("linear_regression").kwargs.items()}
    design = torch.stack(
        [torch.ones(32, dtype=torch.float64), data["weight"], data["horsepower"]], dim=1
    )
    beta = torch.linalg.lstsq(design, data["mpg"][:, None]).solution[:, 0]
    assert beta.tolist() == pytest.approx([37.22727, -3.87783, -0.03177], abs=1e-5)
    assert ((data["mpg"] - design @ beta).square().sum() / 29).sqrt().item() == pytest.approx(
        2.593, abs=5e-4
    )


def test_school_numbers_are_rubins():
    data = load_example("eight_schools").kwargs
    assert data["y"].tolist() == [28, 8, -3, 7, -1, 1, 18, 12]
    assert data["sigma"].tolist() == [15, 10, 16, 11, 9, 11, 10, 18]


def test_load_example_follows_the_default_dtype(example):
    torch.set_default_dtype(torch.float64)
    try:
        wide = load_example(example.name)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(value.dtype == torch.float64 for value in wide.kwargs.values())
    assert math.isfinite(_trace(wide).log_prob_sum().item())


def test_load_example_gives_tensors_of_ones_own(example):
    for value in load_example(example.name).kwargs.values():
        value.fill_(math.nan)
    assert all(value.isfinite().all() for value in load_example(example.name).kwargs.values())


def test_unknown_example_lists_the_known():
    with pytest.raises(ValueError, match=r"no example 'nine_schools'.*eight_schools, .*funnel"):
        load_example("nine_schools")
