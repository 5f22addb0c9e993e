"""The Gaussian fit: exact on Gaussians of any scale and correlation, sound on everything else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.examples import load_example
from pyroflows.model import LogDensity
from pyroflows.posterior.gaussian import Gaussian, antithetic_noise, fit_gaussians


@pytest.fixture
def float64() -> None:
    torch.set_default_dtype(torch.float64)


def gaussian_density(loc: Tensor, covariance: Tensor) -> LogDensity:
    # Not validated: torch's check of a covariance compares its entries on one scale.
    law = dist.MultivariateNormal(
        loc, scale_tril=torch.linalg.cholesky(covariance), validate_args=False
    )
    return LogDensity(lambda: pyro.sample("x", law), init_loc_fn=lambda site: loc)


def equicorrelated(scales: Tensor, correlation: float) -> Tensor:
    n = len(scales)
    matrix = torch.full((n, n), correlation, dtype=scales.dtype).fill_diagonal_(1.0)
    return scales.unsqueeze(-1) * matrix * scales


def monte_carlo_error(features: int, draws: int = 256) -> float:
    """Four standard errors of the bound of a normal law on itself: the draws are antithetic pairs."""
    return 4 * math.sqrt(0.5 * features / (draws / 2))


def fit_gaussian(density: LogDensity, start: Tensor, **options: int) -> Gaussian:
    """The best fit from one start."""
    return fit_gaussians(density, start.unsqueeze(0), **options)[0].one(0)


def assert_exact(fit: Gaussian, loc: Tensor, covariance: Tensor, tolerance: float) -> None:
    """Means to a fraction of their standard deviation; covariance in the units of the true one."""
    true_root = torch.linalg.cholesky(covariance)
    off_centre = torch.linalg.solve_triangular(
        true_root, (fit.loc - loc).unsqueeze(-1), upper=False
    )
    assert float(off_centre.abs().max()) < tolerance
    relative = torch.linalg.solve_triangular(true_root, fit.scale_tril, upper=False)
    torch.testing.assert_close(relative @ relative.mT, torch.eye(len(loc)), rtol=0, atol=tolerance)
    assert abs(fit.elbo) < monte_carlo_error(len(loc))
    torch.testing.assert_close(fit.scale_tril, fit.scale_tril.tril())
    assert bool((fit.scale_tril.diagonal() > 0).all())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("features", "scale", "correlation"),
    [
        *((1, 1e-4, 0.0), (1, 1e4, 0.0), (2, 1e-4, 0.999), (2, 1e4, 0.0)),
        *((6, 1e-2, 0.0), (6, 1.0, 0.999), (6, 1e2, 0.999)),
    ],
)
def test_a_gaussian_of_any_scale_is_found_exactly(
    features: int, scale: float, correlation: float
) -> None:
    covariance = equicorrelated(torch.full((features,), scale), correlation)
    loc = scale * torch.linspace(-3, 5, features)
    density = gaussian_density(loc, covariance)
    fit = fit_gaussian(density, torch.zeros(features))
    assert_exact(fit, loc, covariance, 1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("correlation", [-0.24, 0.0, 0.9, 0.999])
def test_a_badly_scaled_and_correlated_gaussian_is_found_exactly(correlation: float) -> None:
    scales = torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4])
    covariance, loc = equicorrelated(scales, correlation), 3 * scales
    fit = fit_gaussian(gaussian_density(loc, covariance), torch.zeros(5), steps=60)
    assert_exact(fit, loc, covariance, 1e-4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("distance", [1.0, 1e2, 1e4, 1e6])
def test_the_start_may_be_far_away(distance: float) -> None:
    loc, covariance = torch.tensor([0.3, -0.2]), equicorrelated(torch.tensor([1.0, 0.1]), 0.9)
    fit = fit_gaussian(gaussian_density(loc, covariance), torch.tensor([distance, -distance]))
    assert_exact(fit, loc, covariance, 1e-4)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("correlation", [0.0, 0.95])
def test_in_single_precision(scale: float, correlation: float) -> None:
    covariance = equicorrelated(torch.full((3,), scale), correlation)
    loc = scale * torch.linspace(-3, 5, 3)
    fit = fit_gaussian(gaussian_density(loc, covariance), torch.zeros(3))
    assert fit.loc.dtype == fit.scale_tril.dtype == torch.float32
    assert_exact(fit, loc, covariance, 2e-2)


@pytest.mark.usefixtures("float64")
def test_collinear_predictors_in_their_raw_units() -> None:
    """A linear regression of year and its square, whose columns differ by 1e3 in scale and are all but collinear."""
    year = torch.linspace(1950, 2000, 40)
    x = torch.stack([torch.ones(40), year, year**2 / 1000], -1)
    noise, width = 0.5, 1e4
    y = x @ torch.tensor([1.0, 0.02, -0.01]) + noise * torch.sin(7 * year)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), width).to_event(1))
        with pyro.plate("n", 40):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    precision = x.mT @ x / noise**2 + torch.eye(3) / width**2
    covariance = torch.linalg.inv(precision)
    loc = covariance @ (x.mT @ y) / noise**2
    fit = fit_gaussian(LogDensity(model), torch.zeros(3))
    sd = covariance.diagonal().sqrt()
    assert float(((fit.loc - loc) / sd).abs().max()) < 0.01
    assert (
        float(((fit.scale_tril @ fit.scale_tril.mT).diagonal().sqrt() / sd).log().abs().max())
        < 0.01
    )


@pytest.mark.usefixtures("float64")
def test_the_bound_is_the_log_evidence_of_a_conjugate_model() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(3.0))

    fit = fit_gaussian(LogDensity(model), torch.zeros(1))
    assert abs(
        fit.elbo - float(dist.Normal(0.0, math.sqrt(5.0)).log_prob(torch.tensor(3.0)))
    ) < monte_carlo_error(1)


# Densities that are not Gaussian


def logistic() -> None:
    x = torch.linspace(-2, 2, 30)
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("n", 30):
        pyro.sample("y", dist.Bernoulli(logits=w[0] + w[1] * x), obs=(x > 0.3).to(x.dtype))


def two_modes() -> None:
    """A saddle at the origin."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    pyro.factor("f", -10 * (x[0] ** 2 - 1) ** 2)


def heavy_tails() -> None:
    pyro.sample("x", dist.Cauchy(torch.zeros(3), 1.0).to_event(1))


def ridge_without_a_mode() -> None:
    """Rises for ever where the scale goes to zero, as centred hierarchical models do."""
    scale = pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with pyro.plate("n", 3):
        theta = pyro.sample("theta", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor([-1.0, 0.5, 1.0]))


def half_of_the_line_is_nan() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", 3 * (x + 1).log())


def half_of_the_line_is_impossible() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Uniform(x - 1, x + 1), obs=torch.tensor(0.5))


OTHERS = [
    logistic,
    two_modes,
    heavy_tails,
    ridge_without_a_mode,
    half_of_the_line_is_nan,
    half_of_the_line_is_impossible,
]


def bound_and_error(density: LogDensity, fit: Gaussian, draws: int = 4000) -> tuple[float, float]:
    noise = torch.randn(draws, density.features, generator=torch.Generator().manual_seed(5))
    values = density.log_prob(fit.loc + noise @ fit.scale_tril.mT)
    entropy = fit.scale_tril.diagonal().log().sum() + 0.5 * density.features * math.log(
        2 * math.pi * math.e
    )
    return float(values.mean() + entropy), float(values.std()) / math.sqrt(draws)


@pytest.mark.parametrize("model", OTHERS)
def test_the_fit_is_a_normal_law_and_no_worse_than_the_start(model: Callable[[], None]) -> None:
    density = LogDensity(model)
    before = fit_gaussian(density, density.initial, steps=0)
    fit = fit_gaussian(density, density.initial)
    assert bool(fit.loc.isfinite().all())
    assert bool(fit.scale_tril.isfinite().all())
    assert bool((fit.scale_tril.diagonal() > 0).all())
    torch.testing.assert_close(fit.scale_tril, fit.scale_tril.tril())
    assert fit.elbo >= before.elbo


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model", [logistic, two_modes])
def test_the_bound_is_that_of_other_draws_too(model: Callable[[], None]) -> None:
    density = LogDensity(model)
    fit = fit_gaussian(density, density.initial, draws=4000)
    bound, error = bound_and_error(density, fit)
    assert abs(fit.elbo - bound) < 5 * error


@pytest.mark.usefixtures("float64")
def test_a_saddle_is_left() -> None:
    fit = fit_gaussian(LogDensity(two_modes), torch.tensor([1e-3, 0.1]))
    assert abs(abs(float(fit.loc[0])) - 1) < 0.15
    assert float(fit.scale_tril[0, 0]) < 0.3


@pytest.mark.usefixtures("float64")
def test_a_hierarchical_model_without_a_mode_is_not_followed_to_its_pole() -> None:
    """At the pole of the centred eight schools tau is 0; a normal law of any use keeps a width there."""
    example = load_example("eight_schools")
    density = LogDensity(example.model, example.args, example.kwargs)
    fit = fit_gaussian(density, density.initial)
    log_tau, width = fit.loc[1], fit.scale_tril[1].norm()
    assert -2 < float(log_tau) < 4
    assert 0.1 < float(width) < 5
    assert fit.elbo > -38


# Options


def test_the_same_seed_gives_the_same_fit_and_leaves_the_random_state_alone() -> None:
    density = LogDensity(logistic)
    state = torch.get_rng_state()
    first, second = (fit_gaussian(density, density.initial, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.loc, second.loc)
    assert torch.equal(first.scale_tril, second.scale_tril)
    assert first.elbo == second.elbo


def test_no_steps_give_the_start() -> None:
    density = LogDensity(logistic)
    fit = fit_gaussian(density, density.initial, steps=0)
    torch.testing.assert_close(fit.loc, density.initial)
    torch.testing.assert_close(fit.scale_tril, torch.eye(2))
    assert math.isfinite(fit.elbo)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [64, 105, 114, 127, 128, 302, 314, 331])
def test_the_bound_of_a_normal_density_is_exact_for_every_size(
    features: int, dtype: torch.dtype
) -> None:
    """With as many draws as features the Gram matrix of the draws is nearly singular."""
    noise = antithetic_noise(2 * features, torch.zeros(features, dtype=dtype), seed=0)
    assert noise.dtype == dtype
    identity = torch.eye(features, dtype=dtype)
    torch.testing.assert_close(noise.mT @ noise / len(noise), identity, rtol=0, atol=1e-5)
    assert float(noise.abs().max()) < features**0.5
    # The bound of a standard normal on itself is zero: half the mean square is half the features.
    assert abs(float(noise.square().sum(-1).mean()) / features - 1) < 1e-5
