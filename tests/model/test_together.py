"""Points that are evaluated together do not decide for each other."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroflows.model import LogDensity


class Exponential(torch.autograd.Function):
    """A solver outside of torch, which vmap refuses."""

    @staticmethod
    def forward(ctx, x):
        y = torch.as_tensor(np.exp(x.detach().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


def solved(limit):
    """A model with a solver, and a branch if there is a limit."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        y = Exponential.apply(x)
        if limit and y.max() > limit:
            y = limit + 0 * y
        pyro.sample("y", dist.Normal(y, 1.0), obs=torch.tensor(3.0))

    return model


def bounded_by_any():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    y = Exponential.apply(x)
    pyro.factor("bound", torch.where((y > 4.0).any(), -math.inf, 0.0) + 0 * y)


def stationary():
    a = pyro.sample("a", dist.Normal(torch.zeros(2, 2), 0.5).to_event(2))
    largest = np.abs(np.linalg.eigvals(a.detach().numpy())).max()
    pyro.factor("stationary", torch.tensor(-math.inf if largest >= 1 else 0.0))


def scaled(y):
    scale = float(np.std(y.numpy()))
    same = torch.rand(1, generator=torch.Generator().manual_seed(1))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(b[..., 0] + 0 * same, scale), obs=y)


def quiet(model, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogDensity(model, args)


def alone(density, z):
    values = []
    for point in z:
        trace = density.trace(point, score=True)
        values.append(
            sum(node["log_prob"].sum() for node in trace.nodes.values() if "log_prob" in node)
        )
    return torch.stack(values)


@pytest.mark.parametrize("model", [solved(4.0), bounded_by_any, stationary])
def test_a_decision_is_made_for_each_point(model):
    density = quiet(model)
    z = 1.5 * torch.randn(40, density.features, generator=torch.Generator().manual_seed(0))
    expected = alone(density, z)
    assert torch.allclose(density.log_prob(z), expected, atol=1e-4)
    assert density.mode == "loop"


def test_a_solver_without_decisions_is_still_run_together():
    density = quiet(solved(0.0))
    assert density.mode == "plate"
    z = torch.linspace(-2.0, 2.0, 5).unsqueeze(-1)
    assert torch.allclose(density.log_prob(z), alone(density, z), atol=1e-5)


def test_data_that_are_read_into_memory_are_those_that_are_bound():
    density = quiet(scaled, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    other = torch.tensor([10.0, -20.0, 30.0, 0.0])
    z = torch.zeros(1, 2)
    assert torch.allclose(density.bind((other,)).log_prob(z), alone(quiet(scaled, other), z))


def test_terms_add_up_where_a_model_draws_from_a_generator_of_its_own():
    def model():
        slopes = torch.rand(3, generator=torch.Generator().manual_seed(3))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(b * slopes, 0.1), obs=torch.ones(3))

    density = quiet(model)
    z = torch.ones(3, 1)
    total = sum(term.reshape(3, -1).sum(-1) for term in density.site_terms(z).values())
    assert torch.allclose(total, density.log_prob(z))
