"""Densities of one model on other data, rows and parameters, which share one captured graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from test_log_density import CASES
from torch import Tensor, nn

from pyroflows.model import LogDensity, evaluator

Z = torch.tensor([[0.3], [-1.1], [2.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.set_default_dtype(torch.float64)


def z_of(density: LogDensity) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4, density.features, generator=generator)
    return density.initial + 0.5 * noise.to(density.initial)


def forbid_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr(evaluator, "capture", fail)


# Data


def regression(x: Tensor, y: Tensor, *, noise: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def nested(data: dict[str, Any]) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    x, y = data["tables"]
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(slope * x, data["noise"]), obs=y)


def draws(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, n, generator=torch.Generator().manual_seed(seed))
    return x, y


FORMS: dict[str, Callable[..., tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "arguments": lambda x, y, s: (regression, (x, y), {"noise": s}),
    "containers": lambda x, y, s: (nested, ({"tables": [x, y], "noise": s},), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_data_of_the_same_shapes_share_the_graph(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args, kwargs = FORMS[form](*draws(9, 0), torch.tensor(0.5))
    _, other_args, other_kwargs = FORMS[form](*draws(9, 1), torch.tensor(2.0))
    density = LogDensity(model, args, kwargs)
    expected = LogDensity(model, other_args, other_kwargs)
    before = density.value_and_grad(Z)
    forbid_capture(monkeypatch)
    bound = density.bind(other_args, other_kwargs)
    assert bound.mode == "captured"
    torch.testing.assert_close(bound.value_and_grad(Z), expected.value_and_grad(Z))
    torch.testing.assert_close(bound.site_terms(Z), expected.site_terms(Z))
    torch.testing.assert_close(density.value_and_grad(Z), before)


def test_data_of_other_shapes() -> None:
    density = LogDensity(regression, draws(9, 0), {"noise": torch.tensor(0.5)})
    bound = density.bind(draws(4, 1))
    expected = LogDensity(regression, draws(4, 1), {"noise": torch.tensor(0.5)})
    assert bound.mode == "captured"
    torch.testing.assert_close(bound.value_and_grad(Z), expected.value_and_grad(Z))


def test_one_tensor_given_twice_is_two_inputs() -> None:
    x, y = draws(9, 0)
    bound = LogDensity(regression, (x, x), {"noise": torch.tensor(1.0)}).bind((x, y))
    expected = LogDensity(regression, (x, y), {"noise": torch.tensor(1.0)})
    torch.testing.assert_close(bound.log_prob(Z), expected.log_prob(Z))


def test_a_model_that_reads_values_of_its_data_is_captured_for_these_values() -> None:
    def model(count: Tensor, y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        for i in range(int(count)):
            pyro.sample(f"y_{i}", dist.Normal(x, 1.0), obs=y[i])

    y = torch.tensor([0.5, -1.0, 2.0])
    density = LogDensity(model, (torch.tensor(2), y))
    assert density.mode == "captured"
    for count in (2, 3, 1, 2):
        bound = density.bind((torch.tensor(count), -y))
        expected = dist.Normal(Z, 1.0).log_prob(-y[:count]).sum(-1) + dist.Normal(0, 1).log_prob(
            Z[:, 0]
        )
        assert bound.mode == "captured"
        torch.testing.assert_close(bound.log_prob(Z), expected)


def test_data_chosen_by_a_mask_are_not_those_of_the_first_mask() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        positive = y[y > 0]
        with pyro.plate("n", len(positive)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=positive)

    density = LogDensity(model, (torch.tensor([0.5, -1.0, 2.0]),))
    other = torch.tensor([0.5, 1.0, 2.0])
    expected = LogDensity(model, (other,))
    torch.testing.assert_close(density.bind((other,)).log_prob(Z), expected.log_prob(Z))


# Parameters


def width() -> None:
    value = pyro.param("width", torch.tensor(2.0), constraint=constraints.positive)
    pyro.sample("x", dist.Normal(0.0, value))


class Widths(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.width = PyroParam(torch.tensor(2.0), constraint=constraints.positive)

    def forward(self) -> None:
        pyro.sample("x", dist.Normal(0.0, self.width))


def network(registered: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    layer = nn.Linear(1, 3)

    def model() -> None:
        if registered:
            pyro.module("layer", layer)
        x = pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(layer(x), 1.0).to_event(1), obs=torch.ones(3))

    return model


PARAMETERS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "pyro.param": (lambda: width, ["width"]),
    "PyroModule": (Widths, ["width"]),
    "pyro.module": (lambda: network(True), ["layer$$$weight", "layer$$$bias"]),
    "a module of nobody": (lambda: network(False), ["parameter 0", "parameter 1"]),
}


def names(density: LogDensity) -> list[str]:
    return sorted(name.removesuffix("_unconstrained") for name in density.parameters)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_are_found_held_and_bound(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, expected_names = PARAMETERS[kind]
    model = make()
    density = LogDensity(model)
    assert names(density) == sorted(expected_names)
    before = density.value_and_grad(Z)
    with torch.no_grad():
        for parameter in density.parameters.values():
            parameter.add_(0.3)
    torch.testing.assert_close(density.value_and_grad(Z), before)
    expected = LogDensity(model).value_and_grad(Z)
    assert not torch.equal(expected[0], before[0])
    forbid_capture(monkeypatch)
    bound = density.bind(parameters=density.parameters)
    torch.testing.assert_close(bound.value_and_grad(Z), expected)
    torch.testing.assert_close(sum(t for t in bound.site_terms(Z).values()), expected[0])


@pytest.mark.parametrize("kind", [*PARAMETERS, "flow"])
def test_gradients_with_respect_to_parameters(kind: str) -> None:
    model = CASES["flow_prior_and_likelihood"]() if kind == "flow" else PARAMETERS[kind][0]()
    density = LogDensity(model)
    z, leaves = z_of(density), list(density.parameters.values())
    bound = density.bind(parameters=density.parameters)
    value = bound.log_joint(z)
    torch.testing.assert_close(value.detach(), density.log_prob(z))
    found = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
    total = torch.zeros(())
    for row in z:
        conditioned = poutine.condition(model, data=density.constrain(row))
        total = total + poutine.trace(conditioned).get_trace().log_prob_sum()
    expected = torch.autograd.grad(total, leaves, materialize_grads=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["captured", "loop"])
@pytest.mark.filterwarnings("ignore:This model cannot be evaluated for a batch")
def test_gradients_with_respect_to_points_and_data(mode: str) -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        shift = 0.0 if mode == "captured" or float(x.detach()) > 0 else 1.0
        pyro.sample("y", dist.Normal(x + shift, 1.0), obs=y)

    y = torch.tensor(1.5, requires_grad=True)
    density = LogDensity(model, (y,))
    assert density.mode == mode
    z = Z.clone().requires_grad_()
    value = density.log_joint(z)
    slope, of_data = torch.autograd.grad(value.sum(), [z, y])
    torch.testing.assert_close((value.detach(), slope), density.value_and_grad(Z))
    torch.testing.assert_close(of_data, (Z.exp() - y).sum().detach())


def test_a_mask_that_was_changed_in_place_is_read_anew() -> None:
    def model(mask: Tensor, y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        seen = y[mask]
        with pyro.plate("n", len(seen)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=seen)

    mask, y = torch.tensor([True, False, True]), torch.tensor([1.0, 2.0, 3.0])
    density = LogDensity(model, (mask, y))
    mask[1] = True
    expected = LogDensity(model, (mask.clone(), y)).log_prob(Z)
    torch.testing.assert_close(density.bind((mask, y)).log_prob(Z), expected)


def test_a_flag_chooses_the_way_to_evaluate() -> None:
    def model(branches: bool) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        scale = 2.0 if branches and float(x.detach()) > 0 else 1.0
        pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(1.0))

    density = LogDensity(model, (False,))
    assert density.mode == "captured"
    bound = density.bind((True,))
    assert bound.mode == "loop"
    scale = torch.where(Z > 0, 2.0, 1.0)
    prior, likelihood = dist.Normal(0.0, 1.0), dist.Normal(Z, scale)
    expected = prior.log_prob(Z) + likelihood.log_prob(torch.tensor(1.0))
    torch.testing.assert_close(bound.log_prob(Z), expected.squeeze(-1))


@pytest.mark.parametrize("shape", [(), (0,), (2, 300)])
def test_the_log_joint_of_any_batch(shape: tuple[int, ...]) -> None:
    density = LogDensity(width)
    z = torch.randn(*shape, 1)
    torch.testing.assert_close(density.log_joint(z).detach(), density.log_prob(z))


# Rows


def subsampled(part: int | None = 2) -> None:
    y = torch.linspace(-1, 1, 6)
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 6, subsample_size=part) as rows:
        pyro.sample("y", dist.Normal(x, 1.0), obs=y[rows])


def test_rows_share_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    density = LogDensity(subsampled)
    density.bind(rows={"n": torch.tensor([0, 1])})
    forbid_capture(monkeypatch)
    y = torch.linspace(-1, 1, 6)
    for rows in (torch.tensor([4, 2]), torch.tensor([5, 0])):
        expected = dist.Normal(0.0, 1.0).log_prob(Z[:, 0]) + 3 * dist.Normal(Z, 1.0).log_prob(
            y[rows]
        ).sum(-1)
        torch.testing.assert_close(density.bind(rows={"n": rows}).log_prob(Z), expected)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            {"parameters": {"height": torch.tensor(1.0)}},
            ValueError,
            r"Expected parameters of the model \('width'\); got 'height'\.",
        ),
        (
            {"parameters": {"width": torch.ones(2)}},
            ValueError,
            r"Expected parameter 'width' of shape \(\); got \(2,\)\.",
        ),
        (
            {"rows": {"n": torch.tensor([0])}},
            ValueError,
            r"rows of every plate with a subsample_size \(none\); got those of 'n'\.",
        ),
        ({"args": torch.ones(2)}, TypeError, "Expected args to be a sequence"),
        ({"kwargs": 3}, TypeError, "Expected kwargs to be a mapping"),
    ],
)
def test_misuse(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        LogDensity(width).bind(**given)


def misused(y: Tensor) -> None:
    shift = pyro.param("shift", torch.zeros(2))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 6, subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(x + shift[0], 1.0), obs=y[rows])


@pytest.mark.parametrize(
    ("error", "match", "inputs"),
    [
        (TypeError, "args and kwargs that the model takes", {"args": ()}),
        (TypeError, "args and kwargs that the model takes", {"kwargs": {"z": 1}}),
        (TypeError, "kwargs to have names as keys; got 1", {"kwargs": {1: 2}}),
        (TypeError, "parameters to be a mapping from names; got 3", {"parameters": 3}),
        (TypeError, "'shift' to be a tensor of shape", {"parameters": {"shift": 3}}),
        (TypeError, "rows to be a mapping from names; got 3", {"rows": 3}),
        (TypeError, "'rows' to be a tensor of indices", {"rows": {"rows": [0, 1]}}),
        (TypeError, "'rows' to be a tensor of indices", {"rows": {"rows": torch.zeros(2)}}),
        (ValueError, "'rows' from 0 to 5; got 1 to 6", {"rows": {"rows": torch.tensor([1, 6])}}),
        (ValueError, r"'rows' of shape .rows,.", {"rows": {"rows": torch.zeros(1, 2).long()}}),
        (ValueError, "batch_size >= 1; got 0", {"batch_size": 0}),
        (TypeError, "batch_size to be an integer; got 'x'", {"batch_size": "x"}),
    ],
)
def test_wrong_inputs_are_told(error: type[Exception], match: str, inputs: Any) -> None:
    density = LogDensity(misused, (torch.zeros(6),))
    with pytest.raises(error, match=match):
        density.bind(**inputs)


@pytest.mark.parametrize("method", ["constrain", "site_log_probs", "evaluate", "site_terms"])
@pytest.mark.parametrize("z", [3, [0.0], torch.zeros(2), torch.zeros(1).long()], ids=repr)
def test_wrong_points_are_told(method: str, z: Any) -> None:
    density = LogDensity(misused, (torch.zeros(6),))
    with pytest.raises((TypeError, ValueError), match="Expected z"):
        getattr(density, method)(z)


@pytest.mark.parametrize("options", [{"model": 3}, {"device": "x"}, {"args": (1, 2)}], ids=repr)
def test_wrong_arguments_of_a_density_are_told(options: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="Expected"):
        LogDensity(**{"model": misused, "args": (torch.zeros(6),), **options})


# After the param store has been cleared


def shifted() -> None:
    scale = pyro.param("scale", lambda: torch.tensor(2.0), constraint=constraints.positive)
    pyro.sample("x", dist.Normal(0.0, scale))


def of_scale(scale: float) -> Tensor:
    return dist.Normal(0.0, scale).log_prob(Z.squeeze(-1))


def test_parameters_are_held_and_bound_by_name_after_the_store_is_cleared() -> None:
    density = LogDensity(shifted)
    pyro.clear_param_store()
    torch.testing.assert_close(density.log_prob(Z), of_scale(2.0))
    torch.testing.assert_close(density.bind(batch_size=2).log_prob(Z), of_scale(2.0))
    other = density.bind(parameters={"scale": torch.tensor(3.0).log()}, batch_size=5)
    torch.testing.assert_close(other.log_prob(Z), of_scale(3.0))
    torch.testing.assert_close(other.log_joint(Z), of_scale(3.0))
    torch.testing.assert_close(other.site_terms(Z)["x"], of_scale(3.0))
    assert list(pyro.get_param_store()) == []


def test_the_present_parameters_of_the_store_are_bound() -> None:
    density = LogDensity(shifted)
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(5.0), constraint=constraints.positive)
    bound = density.bind(parameters=density.parameters)
    torch.testing.assert_close(bound.log_prob(Z), of_scale(5.0))
    bound.log_joint(Z).sum().backward()
    assert float(density.parameters["scale"].grad) != 0


def test_an_array_that_is_changed_in_place_is_read_anew() -> None:
    def model(y: np.ndarray) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0).expand([2]).to_event(1), obs=torch.as_tensor(y.copy()))

    y = np.array([1.0, 2.0])
    density = LogDensity(model, (y,))
    before = density.log_prob(Z)
    y[0] = 5.0
    assert torch.equal(density.log_prob(Z), before)
    torch.testing.assert_close(density.bind().log_prob(Z), LogDensity(model, (y,)).log_prob(Z))
