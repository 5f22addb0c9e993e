"""Points at which a model cannot be evaluated are masked, and leave the others of a batch alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.model import LogDensity
from pyroflows.model.minibatch import log_density_of

MODES = ("captured", "vmap", "loop")
Y = torch.tensor([0.3, -1.2])


def in_mode(density: LogDensity, mode: str) -> LogDensity:
    """The same density, evaluated in another way."""
    other = density.bind()
    other._program = other._evaluator.make_program(other.inputs, other.batch_size, mode)
    return other


def correlated() -> None:
    """A correlation without bounds: the covariance is singular from 1 on."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    one = torch.ones_like(x)
    covariance = torch.stack([torch.stack([one, x]), torch.stack([x, one])])
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=Y)


def rotated() -> None:
    """Eigenvalues that fail, with an error, where x is negative, so that its root is NaN."""
    x = pyro.sample("x", dist.Normal(1.0, 1.0))
    zero = torch.zeros_like(x)
    matrix = torch.stack([torch.stack([x.sqrt(), zero]), torch.stack([zero, zero + 9.0])])
    pyro.sample("y", dist.Normal(torch.linalg.eigvalsh(matrix), 1.0).to_event(1), obs=Y)


def picky() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x > 1:
        raise ValueError("x is too large. It must be small")


def normal(z: Tensor, loc: float = 0.0) -> Tensor:
    return -0.5 * (z - loc) ** 2 - 0.5 * math.log(2 * math.pi)


def of_correlated(z: Tensor) -> Tensor:
    """The density by the precision of two standard normal variables with correlation z."""
    quadratic = (Y[0] ** 2 - 2 * z * Y[0] * Y[1] + Y[1] ** 2) / (1 - z**2)
    return normal(z) - 0.5 * (quadratic + (1 - z**2).log()) - math.log(2 * math.pi)


def of_rotated(z: Tensor) -> Tensor:
    return normal(z, 1.0) + normal(z.sqrt() - Y[0]) + normal(9 - Y[1])


CASES: dict[str, tuple[Callable[[], None], Callable[[Tensor], Tensor], Any, Any]] = {
    "cholesky": (correlated, of_correlated, lambda z: z.abs() < 1, MODES),
    "eigenvalues": (rotated, of_rotated, lambda z: z > 0, MODES),
    "error": (picky, normal, lambda z: z <= 1, MODES),
}


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, case in CASES.items() for mode in case[3]]
)
def test_a_point_that_fails_is_masked_and_the_others_are_unharmed(name: str, mode: str) -> None:
    model, by_hand, usable, _ = CASES[name]
    density = in_mode(LogDensity(model), mode)
    z = torch.linspace(-2.95, 2.95, 300).reshape(3, 100).requires_grad_()
    found = density.evaluate(z.unsqueeze(-1))
    expected = by_hand(z)
    (slope,) = torch.autograd.grad(expected[usable(z)].sum(), z)
    assert torch.equal(found.usable, usable(z))
    torch.testing.assert_close(found.log_prob, expected.where(usable(z), -math.inf).detach())
    torch.testing.assert_close(
        found.gradient.squeeze(-1), slope.where(usable(z), 0.0), rtol=1e-4, atol=1e-4
    )
    assert density.failures.points == int((~usable(z)).sum())
    assert density.failures.evaluated == 300


@pytest.mark.parametrize("mode", MODES)
def test_values_as_the_model_gives_them_are_nan_where_it_fails(mode: str) -> None:
    density = in_mode(LogDensity(correlated), mode)
    value, _ = density.value_and_grad(torch.tensor([[2.0], [0.5]]))
    assert value.isnan().tolist() == [True, False]


@pytest.mark.parametrize("model", [correlated, rotated, picky])
def test_terms_are_nan_where_the_model_fails(model: Callable[[], None]) -> None:
    density = LogDensity(model)
    z = torch.tensor([[-1.5], [0.5], [1.5]])
    total = torch.stack(list(density.site_terms(z).values())).sum(0)
    usable = density.evaluate(z).usable
    torch.testing.assert_close(total.isnan(), ~usable)
    torch.testing.assert_close(total[usable], density.log_prob(z)[usable])


def test_the_last_error_is_told() -> None:
    density = LogDensity(picky)
    assert density.failures.reason == ""
    density.evaluate(torch.tensor([[0.0], [2.0]]))
    assert density.failures.reason == "x is too large"
    assert (density.failures.points, density.failures.evaluated) == (1, 2)


@pytest.mark.parametrize(
    ("value", "log_prob", "usable"),
    [
        (math.nan, -math.inf, False),
        (math.inf, -math.inf, False),
        (-math.inf, -math.inf, True),
        (2.5, 2.5, True),
    ],
)
def test_values_that_are_no_finite_numbers(value: float, log_prob: float, usable: bool) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("f", torch.where(x > 1, value + 0 * x, x))

    found = LogDensity(model).evaluate(torch.tensor([[2.0], [0.5]]))
    assert found.log_prob.tolist() == [log_prob, 0.5]
    assert found.usable.tolist() == [usable, True]
    assert found.gradient.squeeze(-1).tolist() == [0.0, 1.0]


def test_a_finite_value_without_a_finite_gradient_is_not_usable() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("f", -x.abs().sqrt())

    found = LogDensity(model).evaluate(torch.tensor([[0.0], [4.0]]))
    assert found.usable.tolist() == [False, True]
    assert found.log_prob.tolist() == [-math.inf, -2.0]
    assert found.gradient.squeeze(-1).tolist() == [0.0, -0.25]


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    found = LogDensity(correlated).evaluate(torch.zeros(*shape, 1))
    assert found.log_prob.shape == found.usable.shape == shape
    assert found.gradient.shape == (*shape, 1)


def test_data_of_another_size_are_refused() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"site 'y' observes shape \(4,\)"):
        LogDensity(model, (torch.zeros(3),)).bind((torch.zeros(4),))


def test_a_mini_batch_has_a_mask_too() -> None:
    y = torch.linspace(-1, 1, 20)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.5, 1.0))
        with pyro.plate("n", 20, subsample_size=4) as rows:
            pyro.sample("y", dist.Normal(0.0, x.sqrt()), obs=y[rows])

    density = log_density_of(model)
    found = density.evaluate(torch.tensor([[-1.0], [1.0]]))
    assert found.usable.tolist() == [False, True]
    assert density.failures.points == 1


def test_a_gaussian_process_whose_covariance_fails_at_wide_length_scales() -> None:
    x = torch.linspace(0, 10, 11)
    counts = torch.tensor([2.0, 4, 5, 2, 1, 1, 1, 3, 4, 3, 1])

    def model() -> None:
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
        kernel = (-0.5 * ((x[:, None] - x) / rho) ** 2).exp() + 1e-8 * torch.eye(11)
        f = pyro.sample("f", dist.Normal(0.0, 1.0).expand([11]).to_event(1))
        rate = (torch.linalg.cholesky(kernel) @ f).exp()
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=counts)

    start = init_to_value(values={"rho": torch.tensor(1.0), "f": torch.zeros(11)})
    density = LogDensity(model, init_loc_fn=start)
    assert density.mode == "captured"
    z = density.initial.repeat(64, 1)
    z[:, 0] = torch.linspace(-2, 5, 64)
    found = density.evaluate(z)
    assert bool(found.usable[:20].all()) and not bool(found.usable[-20:].any())
    alone = torch.stack([density.evaluate(row).log_prob for row in z[:20:5]])
    torch.testing.assert_close(found.log_prob[:20:5], alone)


def test_a_model_that_catches_its_own_error_is_evaluated_alone() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Uniform(-2.0, 2.0))
        one = torch.ones_like(x)
        covariance = torch.stack([torch.stack([one, x]), torch.stack([x, one])])
        try:
            factor = torch.linalg.cholesky(covariance)
        except RuntimeError:
            factor = torch.eye(2)
        pyro.factor("f", factor.diagonal().log().sum())

    with pytest.warns(UserWarning, match="at a time.*It goes on when a factorisation"):
        density = LogDensity(model)
    x = torch.tensor([-1.5, 0.5, 1.2])
    z = density.unconstrain({"x": x})
    found = density.log_prob(z)
    log_det = density.sites[0].transform.log_abs_det_jacobian(z[:, 0], x)
    factor = torch.where(x.abs() < 1, 0.5 * (1 - x**2).log(), 0.0)
    torch.testing.assert_close(found, factor - math.log(4) + log_det)


def test_random_numbers_from_elsewhere_are_refused_every_time() -> None:
    draw = random.Random(0).random

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + draw(), 1.0), obs=torch.tensor(0.5))

    for _ in range(20):
        with pytest.raises(ValueError, match="two values at one point"):
            LogDensity(model)
