"""Points at which a distribution gets arguments that it does not allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.model import LogDensity

t = torch.tensor
Z = t([[-0.7], [0.4], [0.8], [1.7], [-0.2]])

# Each of a number x, most of them finite where x is not allowed, and a value.
DISTRIBUTIONS: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "Normal": (lambda x: dist.Normal(0.0, x), t(0.3)),
    "LogNormal": (lambda x: dist.LogNormal(0.0, x), t(0.3)),
    "Gamma": (lambda x: dist.Gamma(x, 1.0), t(0.3)),
    "Poisson": (dist.Poisson, t(0.0)),
    "Poisson in an event": (lambda x: dist.Poisson(x * torch.ones(3)).to_event(1), torch.zeros(3)),
    "masked Poisson": (lambda x: dist.Poisson(x).mask(t(True)), t(0.0)),
    "zero-inflated Poisson": (lambda x: dist.ZeroInflatedPoisson(x, gate=t(0.3)), t(0.0)),
    "Bernoulli": (dist.Bernoulli, t(1.0)),
    "Binomial": (lambda x: dist.Binomial(5, x), t(2.0)),
    "Categorical": (lambda x: dist.Categorical(torch.stack([x, x + 1])), t(1)),
    "Beta": (lambda x: dist.Beta(x, 2.0), t(0.3)),
    "Dirichlet": (lambda x: dist.Dirichlet(torch.stack([x, x + 1])), t([0.3, 0.7])),
    "StudentT": (lambda x: dist.StudentT(x, 0.0, 1.0), t(0.3)),
    "VonMises": (lambda x: dist.VonMises(0.0, x), t(0.3)),
    "NegativeBinomial": (lambda x: dist.NegativeBinomial(x, t(0.3)), t(2.0)),
    "GammaPoisson": (lambda x: dist.GammaPoisson(x, 1.0), t(3.0)),
    "mixture": (
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Poisson(torch.stack([x, x + 3]))
        ),
        t(0.0),
    ),
    "covariance": (
        lambda x: dist.MultivariateNormal(torch.zeros(2), x * torch.eye(2)),
        torch.zeros(2),
    ),
    "not validated": (lambda x: dist.Poisson(x, validate_args=False), t(0.0)),
}


def observed(make: Callable[[Tensor], Any], value: Tensor) -> Callable[[], None]:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.5, 1.0))
        pyro.sample("y", make(x), obs=value)

    return model


def is_allowed(make: Callable[[Tensor], Any], value: Tensor, x: Tensor) -> bool:
    """Whether Pyro evaluates a distribution without an error."""
    try:
        make(x).log_prob(value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_point_that_pyro_refuses_has_no_density(name: str) -> None:
    make, value = DISTRIBUTIONS[name]
    density = LogDensity(observed(make, value))
    found = density.evaluate(Z)
    allowed = torch.tensor([is_allowed(make, value, x) for x in Z.squeeze(-1)])
    assert torch.equal(found.usable, allowed)
    assert bool(found.log_prob[~allowed].isneginf().all())
    assert not bool(found.gradient[~allowed].any())
    assert density.failures.points == int((~allowed).sum())


@pytest.mark.parametrize("mode", ["captured", "vmap", "loop"])
def test_in_every_way(mode: str) -> None:
    density = LogDensity(observed(*DISTRIBUTIONS["Poisson"]))
    density._program = density._evaluator.make_program(density.inputs, 4, mode)
    value, _ = density.value_and_grad(Z)
    assert value.isnan().tolist() == [True, False, False, False, True]


def test_validation_that_is_off_stays_off() -> None:
    with pyro.validation_enabled(False):
        density = LogDensity(observed(*DISTRIBUTIONS["Poisson"]))
    assert bool(density.evaluate(Z).usable.all())


def test_many_probabilities_may_be_rounded() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3000), 1.0).to_event(1))
        pyro.sample("y", dist.Categorical(x.softmax(-1)), obs=t(1))

    density = LogDensity(model, batch_size=8)
    assert bool(density.evaluate(torch.randn(8, 3000)).usable.all())
