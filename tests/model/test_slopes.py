"""Gradients that a model loses are found by differences."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.model import LogDensity


def make_density(function: Callable[[Tensor], Tensor]) -> LogDensity:
    """Makes the density of a site x, of which a likelihood sees a function, and of another one."""

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(function(x) + w, 1.0), obs=torch.tensor(2.0))

    return LogDensity(model)


def through_a_number(x: Tensor) -> Tensor:
    return torch.tensor(2 * x[1].item())


def through_numpy(x: Tensor) -> Tensor:
    return torch.as_tensor(x.detach().numpy().sum() ** 2)


def and_back(x: Tensor) -> Tensor:
    x[0].item()
    return x.sum()


def by_steps(x: Tensor) -> Tensor:
    return x.sum() + round(x[0].item())


def by_a_branch(x: Tensor) -> Tensor:
    return x.sum() if x[0].item() > 0.01 else 2 * x.sum()


@pytest.mark.filterwarnings("ignore:This model cannot be evaluated for a batch")
@pytest.mark.parametrize("function", [through_a_number, through_numpy])
def test_a_gradient_that_is_lost_is_told_by_its_site(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.warns(
        UserWarning, match="no gradient along latent 'x', which the model turns into"
    ):
        make_density(function)


@pytest.mark.filterwarnings("ignore:This model cannot be evaluated for a batch")
@pytest.mark.parametrize("function", [and_back, by_steps, by_a_branch])
def test_a_gradient_that_is_right_is_taken(function: Callable[[Tensor], Tensor]) -> None:
    assert make_density(function).mode == "loop"
