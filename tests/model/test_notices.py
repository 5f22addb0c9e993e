"""Warnings of models that can be fitted but may not be what was meant."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyroflows as pf
from pyroflows.model.minibatch import log_density_of
from pyroflows.model.notices import warn_of_oversights

Y = torch.linspace(-1.0, 1.0, 6)
LEARN = "To learn them, pass learn=True, or the names of some, to fit_posterior."
HELD = "The model has parameters that are held at their present values, because only latent sites"
UNOBSERVED = "No site of the model is observed, and it has no pyro.factor"


def told(model: Callable[..., Any], args: Any = ()) -> list[str]:
    """The warnings about a model."""
    density = log_density_of(model, args).full
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_oversights(density)
    assert all(warning.category is UserWarning for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def observe(mean: Tensor, scale: Any = 1.0) -> None:
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=Y)


def with_parameters(count: int) -> Callable[[], None]:
    def model() -> None:
        shifts = [pyro.param(f"shift{i}", torch.tensor(0.0)) for i in range(count)]
        observe(pyro.sample("x", dist.Normal(0.0, 1.0)) + sum(shifts))

    return model


def with_a_constrained_parameter() -> None:
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    observe(pyro.sample("x", dist.Normal(0.0, 1.0)), scale)


def with_a_module(learned: bool) -> Callable[[], None]:
    net = nn.Linear(1, 1).requires_grad_(learned)

    def model() -> None:
        mean = pyro.module("net", net.train(learned))(Y[:, None]).squeeze(-1)
        observe(pyro.sample("x", dist.Normal(0.0, 1.0)) + mean)

    return model


class Module(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.shift = PyroParam(torch.tensor(1.0))
        self.x = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self) -> None:
        observe(self.x + self.shift)

    def method(self) -> None:
        self()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: with_parameters(1), "'shift0'"),
        (lambda: with_parameters(2), "'shift0', 'shift1'"),
        (lambda: with_parameters(7), "'shift0', 'shift1', 'shift2', 'shift3', 'shift4' and 2 more"),
        (lambda: with_a_constrained_parameter, "'scale'"),
        (lambda: with_a_module(True), "'net$$$weight', 'net$$$bias'"),
        (lambda: Module(), "'shift'"),
        (lambda: Module().method, "'shift'"),
    ],
    ids=["one", "two", "seven", "constrained", "module", "PyroModule", "method of a PyroModule"],
)
def test_parameters_are_named_once(make: Callable[[], Any], names: str) -> None:
    assert told(make()) == [f"{HELD} are fitted: {names}. {LEARN}"]


@pytest.mark.parametrize("make", [lambda: with_parameters(0), lambda: with_a_module(False)])
def test_without_parameters_to_learn_nothing_is_told(make: Callable[[], Any]) -> None:
    assert told(make()) == []


def unobserved(y: Tensor | None = None) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 6):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def without_rows() -> None:
    pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=Y[:0])


def deterministic() -> None:
    pyro.deterministic("y", pyro.sample("x", dist.Normal(0.0, 1.0)) ** 2)


@pytest.mark.parametrize("model", [unobserved, without_rows, deterministic])
def test_a_model_without_data_is_told(model: Callable[..., Any]) -> None:
    (said,) = told(model)
    assert said.startswith(UNOBSERVED)
    assert "\n" not in said


def factor() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", -(x**4))


def imputed() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 6):
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y, obs_mask=Y > 0)


def rows(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 6, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (unobserved, (Y,)),
        (poutine.condition(unobserved, data={"y": Y}), ()),
        (factor, ()),
        (imputed, ()),
        (rows, DataLoader(TensorDataset(Y), batch_size=3)),
    ],
    ids=["given", "conditioned", "factor", "imputed", "loader"],
)
def test_a_model_with_data_is_not(model: Callable[..., Any], args: Any) -> None:
    assert told(model, args) == []


def test_a_fit_tells_both_once_before_it_begins() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(pyro.param("shift", torch.tensor(0.0)), 1.0))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = pf.fit_posterior(model, steps=0, time_limit=1.0, progress=False)
    said = [str(warning.message) for warning in caught if warning.filename == __file__]
    assert [text.startswith(start) for text, start in zip(said, (UNOBSERVED, HELD), strict=True)]
    assert posterior.sample(3)["x"].shape == (3,)
