"""The models of `benchmarks.models` in NumPyro: the same sites, the same densities, the same keyword arguments.

Each is written as NumPyro's users write it, recursions with `jax.lax.scan`. The log joint density differs from
that of the Pyro model by a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from jax.nn import logsumexp
from numpyro.distributions import constraints

from benchmarks.models import RK4_STEPS


def _flat(name: str, support: Any = constraints.real, shape: tuple[int, ...] = ()) -> Any:
    return numpyro.sample(name, dist.ImproperUniform(support, (), shape))


# Eight schools


def eight_schools_centered(y: Array, sigma: Array) -> None:
    """Eight schools, centred."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Array, sigma: Array) -> None:
    """Eight schools, non-centred."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


# Linear regressions


def flat_regression(x: Array, y: Array) -> None:
    """Regression with flat beta and flat sigma > 0."""
    beta = _flat("beta", constraints.real_vector, (x.shape[1],))
    numpyro.sample("y", dist.Normal(x @ beta, _flat("sigma", constraints.positive)), obs=y)


def cauchy_regression(x: Array, y: Array) -> None:
    """Regression with flat beta and a half-Cauchy sigma."""
    beta = _flat("beta", constraints.real_vector, (x.shape[1],))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def normal_regression(x: Array, y: Array) -> None:
    """Regression with normal beta and half-normal sigma."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kilpisjarvi(x: Array, y: Array, alpha_prior: Array, beta_prior: Array) -> None:
    """Regression on a year, in raw units."""
    alpha = numpyro.sample("alpha", dist.Normal(alpha_prior[0], alpha_prior[1]))
    beta = numpyro.sample("beta", dist.Normal(beta_prior[0], beta_prior[1]))
    numpyro.sample("y", dist.Normal(alpha + beta * x, _flat("sigma", constraints.positive)), obs=y)


# Time series


def garch11(y: Array, sigma1: Array) -> None:
    """GARCH(1, 1)."""
    mu = _flat("mu")
    alpha0 = _flat("alpha0", constraints.positive)
    alpha1 = numpyro.sample("alpha1", dist.Beta(1.0, 2.0))
    beta1 = (1 - alpha1) * numpyro.sample("fraction", dist.Uniform(0.0, 1.0))

    def advance(variance: Array, before: Array) -> tuple[Array, Array]:
        variance = alpha0 + alpha1 * (before - mu) ** 2 + beta1 * variance
        return variance, variance

    first = sigma1**2
    _, rest = lax.scan(advance, first, y[:-1])
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(jnp.concatenate([first[None], rest]))), obs=y)


def hmm_example(y: Array) -> None:
    """A hidden Markov model of two states by the forward algorithm."""
    theta = [numpyro.sample(name, dist.Dirichlet(jnp.ones(2))) for name in ("theta1", "theta2")]
    mu = _flat("mu", constraints.positive_ordered_vector, (2,))
    numpyro.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    log_transition = jnp.log(jnp.stack(theta))
    log_emission = dist.Normal(mu, 1.0).log_prob(y[:, None])

    def advance(forward: Array, emission: Array) -> tuple[Array, None]:
        return logsumexp(forward[:, None] + log_transition, axis=0) + emission, None

    forward, _ = lax.scan(advance, log_emission[0], log_emission[1:])
    numpyro.factor("y", logsumexp(forward))


def lotka_volterra(times: Array, y_init: Array, y: Array) -> None:
    """Lotka-Volterra predator and prey, by the Runge-Kutta method of the Pyro model."""
    theta = _flat("theta", constraints.independent(constraints.positive, 1), (4,))
    prior = dist.Normal(jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]))
    numpyro.factor("theta_prior", prior.log_prob(theta).sum())
    z_init = numpyro.sample("z_init", dist.LogNormal(math.log(10.0), jnp.ones(2)).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, jnp.ones(2)).to_event(1))
    growth = jnp.array([1.0, -1.0]) * theta[jnp.array([0, 2])]
    effect = jnp.array([-1.0, 1.0]) * theta[jnp.array([1, 3])]
    step = 1.0 / RK4_STEPS

    def slope(log_z: Array) -> Array:
        return growth + effect * jnp.exp(log_z[::-1])

    def rk4(log_z: Array, _: None) -> tuple[Array, None]:
        k1 = slope(log_z)
        k2 = slope(log_z + step / 2 * k1)
        k3 = slope(log_z + step / 2 * k2)
        k4 = slope(log_z + step * k3)
        return log_z + step / 6 * (k1 + 2 * (k2 + k3) + k4), None

    def unit_of_time(log_z: Array, _: None) -> tuple[Array, Array]:
        log_z, _ = lax.scan(rk4, log_z, None, length=RK4_STEPS)
        return log_z, log_z

    _, path = lax.scan(unit_of_time, jnp.log(z_init), None, length=len(times))
    numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma), obs=y_init)
    numpyro.sample("y", dist.LogNormal(path, sigma), obs=y)


# Gaussian process


def gp_regr(x: Array, y: Array) -> None:
    """A Gaussian process with the squared exponential kernel."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    covariance = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + sigma * jnp.eye(len(x))
    numpyro.sample(
        "y", dist.MultivariateNormal(jnp.zeros_like(x), covariance_matrix=covariance), obs=y
    )


MODELS: dict[str, Callable[..., None]] = {
    "eight_schools-eight_schools_centered": eight_schools_centered,
    "eight_schools-eight_schools_noncentered": eight_schools_noncentered,
    "garch-garch11": garch11,
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "hudson_lynx_hare-lotka_volterra": lotka_volterra,
    "gp_pois_regr-gp_regr": gp_regr,
    "hmm_example-hmm_example": hmm_example,
    "kidiq-kidscore_interaction": cauchy_regression,
    "kidiq-kidscore_momhs": cauchy_regression,
    "mesquite-logmesquite": flat_regression,
    "mesquite-mesquite": flat_regression,
    "earnings-log10earn_height": flat_regression,
    "nes1976-nes": flat_regression,
    "sblri-blr": normal_regression,
}
"""NumPyro models by posteriordb's posterior names."""
