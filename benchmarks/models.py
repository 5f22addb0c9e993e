"""Pyro models of posteriordb's posteriors, written from their published definitions.

Stan's flat priors are `ImproperUniform`. Every model broadcasts over leading dimensions of its latents, such
as a plate of particles, and runs under `torch.func.vmap`: no Python branch on a value, no write into a
tensor. Recursions over time are written as few operations on long tensors, time last, since an operation on
a small one costs its call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor

Draws = dict[str, Tensor]
Column = Callable[[Draws], Tensor]

RK4_STEPS = 5
"""Runge-Kutta steps per unit of time in the Lotka-Volterra model.

Over the reference draws the log density is within 0.003 of that of a step 16 times smaller.
"""


def _same(draws: Draws) -> Draws:
    return dict(draws)


@dataclass(frozen=True)
class Entry:
    """A Pyro model of one posterior and its dictionary to Stan's names.

    Args:
        model: The Pyro model, called with keyword arguments only.
        kwargs: Maps posteriordb's data to the model's keyword arguments.
        to_stan: Maps draws of the latent sites, `(N, *site_shape)`, to draws of Stan's parameters,
            `(N, *shape)`.
        from_stan: The inverse of `to_stan`.
    """

    model: Callable[..., None]
    kwargs: Callable[[dict[str, Any]], dict[str, Any]]
    to_stan: Callable[[Draws], Draws] = _same
    from_stan: Callable[[Draws], Draws] = _same


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.get_default_dtype())


def _only(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {name: _tensor(data[name]) for name in names}


def _flat(name: str, support: Any = constraints.real, shape: tuple[int, ...] = ()) -> Tensor:
    return pyro.sample(name, dist.ImproperUniform(support, (), shape))


# Eight schools


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, centred: mu ~ N(0, 5), tau ~ Cauchy+(5), theta_j ~ N(mu, tau), y_j ~ N(theta_j, s_j).

    References:
        Rubin: Estimation in parallel randomized experiments, 1981. https://doi.org/10.3102/10769986006004377
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, non-centred: theta = mu + tau z with z_j ~ N(0, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def _schools_to_stan(draws: Draws) -> Draws:
    mu, tau = draws["mu"], draws["tau"]
    return {"mu": mu, "tau": tau, "theta": mu[:, None] + tau[:, None] * draws["z"]}


def _schools_from_stan(draws: Draws) -> Draws:
    mu, tau = draws["mu"], draws["tau"]
    return {"mu": mu, "tau": tau, "z": (draws["theta"] - mu[:, None]) / tau[:, None]}


# Linear regressions


def flat_regression(x: Tensor, y: Tensor) -> None:
    """y ~ N(x beta, sigma) with flat beta and flat sigma > 0; `x` is `(N, K)`, `y` is `(N,)`."""
    beta = _flat("beta", constraints.real_vector, (x.shape[1],))
    _regress(beta, _flat("sigma", constraints.positive), x, y)


def cauchy_regression(x: Tensor, y: Tensor) -> None:
    """y ~ N(x beta, sigma) with flat beta and sigma ~ Cauchy+(2.5); `x` is `(N, K)`, `y` is `(N,)`."""
    beta = _flat("beta", constraints.real_vector, (x.shape[1],))
    _regress(beta, pyro.sample("sigma", dist.HalfCauchy(2.5)), x, y)


def normal_regression(x: Tensor, y: Tensor) -> None:
    """y ~ N(x beta, sigma) with beta ~ N(0, 10) and sigma ~ N+(0, 10); `x` is `(N, K)`, `y` is `(N,)`."""
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    _regress(beta, pyro.sample("sigma", dist.HalfNormal(10.0)), x, y)


def _regress(beta: Tensor, sigma: Tensor, x: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Normal(beta @ x.T, sigma[..., None]).to_event(1), obs=y)


def _columns(y: Column, *columns: Column) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Build a regression's data: a column of ones and the given columns, each a function of the data."""

    def kwargs(data: dict[str, Any]) -> dict[str, Any]:
        d = {name: _tensor(values) for name, values in data.items()}
        target = y(d)
        x = [torch.ones_like(target), *(column(d) for column in columns)]
        return {"x": torch.stack(x, -1), "y": target}

    return kwargs


def _get(name: str) -> Column:
    return lambda d: d[name]


def _log(name: str) -> Column:
    return lambda d: d[name].log()


def _equals(name: str, value: int) -> Column:
    return lambda d: (d[name] == value).to(d[name].dtype)


def kilpisjarvi(x: Tensor, y: Tensor, alpha_prior: Tensor, beta_prior: Tensor) -> None:
    """y ~ N(alpha + beta x, sigma), normal priors `(mean, sd)` on alpha and beta, flat sigma > 0."""
    alpha = pyro.sample("alpha", dist.Normal(alpha_prior[0], alpha_prior[1]))
    beta = pyro.sample("beta", dist.Normal(beta_prior[0], beta_prior[1]))
    sigma = _flat("sigma", constraints.positive)
    mean = alpha[..., None] + beta[..., None] * x
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def _kilpisjarvi_kwargs(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "x": _tensor(data["x"]),
        "y": _tensor(data["y"]),
        "alpha_prior": _tensor([data["pmualpha"], data["psalpha"]]),
        "beta_prior": _tensor([data["pmubeta"], data["psbeta"]]),
    }


# Time series


def garch11(y: Tensor, sigma1: Tensor) -> None:
    r"""GARCH(1, 1) with flat priors on mu, alpha0 > 0 and the triangle alpha1, beta1 > 0, alpha1 + beta1 < 1.

    s2_1 = sigma1^2, s2_t = alpha0 + alpha1 (y_{t-1} - mu)^2 + beta1 s2_{t-1}, y_t ~ N(mu, s_t).

    beta1 = (1 - alpha1) fraction; its Jacobian 1 - alpha1 is, up to a constant, the density Beta(1, 2).
    """
    mu = _flat("mu")
    alpha0 = _flat("alpha0", constraints.positive)
    alpha1 = pyro.sample("alpha1", dist.Beta(1.0, 2.0))
    fraction = pyro.sample("fraction", dist.Uniform(0.0, 1.0))
    beta1 = pyro.deterministic("beta1", (1 - alpha1) * fraction)
    drive = alpha0[..., None] + alpha1[..., None] * (y[:-1] - mu[..., None]) ** 2
    first = sigma1.square().expand(drive.shape[:-1])[..., None]
    variance = _recurrence(torch.cat([first, drive], -1), beta1)
    pyro.sample("y", dist.Normal(mu[..., None], variance.sqrt()).to_event(1), obs=y)


def _recurrence(drive: Tensor, decay: Tensor) -> Tensor:
    """Solve v_t = drive_t + decay v_{t-1} with v_0 = 0; `drive` is `(*, T)`, `decay` is `(*)`.

    Doubling: where `sums` holds the terms of lags below n, decay^n times itself, n later, has those of lags n to 2n.
    """
    sums, lags, decay = drive, 1, decay[..., None]
    while lags < drive.shape[-1]:
        sums = sums + decay * F.pad(sums, (lags, -lags))
        lags, decay = 2 * lags, decay.square()
    return sums


def _garch_to_stan(draws: Draws) -> Draws:
    beta1 = (1 - draws["alpha1"]) * draws["fraction"]
    return {**{name: draws[name] for name in ("mu", "alpha0", "alpha1")}, "beta1": beta1}


def _garch_from_stan(draws: Draws) -> Draws:
    fraction = draws["beta1"] / (1 - draws["alpha1"])
    return {**{name: draws[name] for name in ("mu", "alpha0", "alpha1")}, "fraction": fraction}


def hmm_example(y: Tensor) -> None:
    """A hidden Markov model of two states by the forward algorithm.

    mu_1 ~ N(3, 1), mu_2 ~ N(10, 1), 0 < mu_1 < mu_2; flat simplices theta1, theta2 are the rows of the
    transition matrix; y_t ~ N(mu_state, 1); the first state's prior factor is constant.
    """
    theta = [pyro.sample(name, dist.Dirichlet(y.new_ones(2))) for name in ("theta1", "theta2")]
    mu = _flat("mu", constraints.positive_ordered_vector, (2,))
    pyro.factor("mu_prior", dist.Normal(y.new_tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
    log_emission = dist.Normal(mu[..., None], 1.0).log_prob(y)
    # Relative to the likelier state, so that the products do not underflow.
    top = log_emission.detach().amax(-2, keepdim=True)
    emission = (log_emission - top).exp()
    steps = torch.stack(theta, -2)[..., None] * emission[..., None, :, 1:]
    product, log_scale = _chain(steps)
    likelihood = (emission[..., 0, None] * product).sum((-2, -1))
    pyro.factor("y", likelihood.log() + log_scale + top.sum((-2, -1)))


def _chain(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply matrices `(*, K, K, T)` in their order, pair by pair.

    Returns:
        The product divided by a scale, `(*, K, K)`, and the log of the scale, `(*)`.
    """
    log_scale = matrices.new_zeros(())
    while (count := matrices.shape[-1]) > 1:
        if count % 2:
            identity = torch.eye(matrices.shape[-2], dtype=matrices.dtype, device=matrices.device)[
                ..., None
            ]
            matrices = torch.cat([matrices, identity.expand(*matrices.shape[:-1], 1)], -1)
        left, right = matrices.unflatten(-1, (-1, 2)).unbind(-1)
        products = (left[..., :, :, None, :] * right[..., None, :, :, :]).sum(-3)
        scale = products.detach().amax((-3, -2), keepdim=True)
        matrices, log_scale = products / scale, log_scale + scale.log().sum((-3, -2, -1))
    return matrices[..., 0], log_scale


def lotka_volterra(times: Tensor, y_init: Tensor, y: Tensor) -> None:
    r"""Lotka-Volterra predator and prey, observed with log-normal noise; `y` is `(T, 2)`.

    du/dt = (theta_1 - theta_2 v) u, dv/dt = (-theta_3 + theta_4 u) v from t = 0, with theta_1, theta_3 ~
    N(1, 0.5), theta_2, theta_4 ~ N(0.05, 0.05), all positive;
    log z_init ~ N(log 10, 1), log sigma ~ N(-1, 1).

    Solved for (log u, log v), which keeps them positive, by the classical Runge-Kutta method with `RK4_STEPS`
    equal steps per unit of time; `times` are 1, 2, ..., T.
    """
    theta = _flat("theta", constraints.independent(constraints.positive, 1), (4,))
    prior = dist.Normal(y.new_tensor([1.0, 0.05, 1.0, 0.05]), y.new_tensor([0.5, 0.05, 0.5, 0.05]))
    pyro.factor("theta_prior", prior.log_prob(theta).sum(-1))
    z_init = pyro.sample("z_init", dist.LogNormal(math.log(10.0), y.new_ones(2)).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, y.new_ones(2)).to_event(1))
    growth = torch.stack([theta[..., 0], -theta[..., 2]], -1)
    # In units of the rates of predation, so that the interaction has no coefficient but its sign.
    log_unit = torch.stack([theta[..., 3], theta[..., 1]], -1).log()
    log_path = _predation(z_init.log() + log_unit, growth, len(times)) - log_unit[..., None, :]
    pyro.sample("y_init", dist.LogNormal(z_init.log(), sigma).to_event(1), obs=y_init)
    pyro.sample("y", dist.LogNormal(log_path, sigma[..., None, :]).to_event(2), obs=y)


def _predation(z: Tensor, growth: Tensor, times: int) -> Tensor:
    """Solve dz/dt = growth + (-exp(z_2), exp(z_1)); return z at the times 1, 2, ..., `(*, times, 2)`.

    Growth is constant, so it is added once for the middle of a step and once for its end, not in every stage.
    """
    step = 1.0 / RK4_STEPS
    half = growth * (step / 2)
    sign = z.new_tensor([-1.0, 1.0])

    def effect(z: Tensor) -> Tensor:
        return z.exp().flip(-1)

    def advance(z: Tensor) -> Tensor:
        middle = z + half
        end = middle + half
        e1 = effect(z)
        e2 = effect(torch.addcmul(middle, sign, e1, value=step / 2))
        e3 = effect(torch.addcmul(middle, sign, e2, value=step / 2))
        e4 = effect(torch.addcmul(end, sign, e3, value=step))
        return torch.addcmul(end, sign, torch.add(e1 + e4, e2 + e3, alpha=2), value=step / 6)

    path = []
    for _ in range(times):
        for _ in range(RK4_STEPS):
            z = advance(z)
        path.append(z)
    return torch.stack(path, -2)


def _lotka_volterra_kwargs(data: dict[str, Any]) -> dict[str, Any]:
    if data["ts"] != list(range(1, len(data["ts"]) + 1)):
        raise ValueError(
            f"Expected the times 1, 2, ... in the Lotka-Volterra data; got {data['ts']}."
        )
    return {
        "times": _tensor(data["ts"]),
        "y_init": _tensor(data["y_init"]),
        "y": _tensor(data["y"]),
    }


# Gaussian process


def gp_regr(x: Tensor, y: Tensor) -> None:
    """y ~ N(0, K), K = alpha^2 exp(-(x - x')^2 / (2 rho^2)) + sigma I; sigma is a variance.

    rho ~ Gamma(25, 4), alpha ~ N+(0, 2), sigma ~ N+(0, 1).
    """
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))[..., None, None]
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))[..., None, None]
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))[..., None, None]
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    covariance = alpha**2 * torch.exp(-0.5 / rho**2 * (x[:, None] - x) ** 2) + sigma * identity
    # A point whose matrix is singular in floating point is rejected, as in Stan; `cholesky` would raise for
    # the whole batch.
    root, failed = torch.linalg.cholesky_ex(covariance)
    bad = failed > 0
    pyro.factor("positive_definite", torch.where(bad, -math.inf, 0.0).to(x.dtype))
    root = torch.where(bad[..., None, None], identity, root)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), scale_tril=root), obs=y)


_schools = _only("y", "sigma")

MODELS: dict[str, Entry] = {
    "eight_schools-eight_schools_centered": Entry(eight_schools_centered, _schools),
    "eight_schools-eight_schools_noncentered": Entry(
        eight_schools_noncentered, _schools, _schools_to_stan, _schools_from_stan
    ),
    "garch-garch11": Entry(garch11, _only("y", "sigma1"), _garch_to_stan, _garch_from_stan),
    "kilpisjarvi_mod-kilpisjarvi": Entry(kilpisjarvi, _kilpisjarvi_kwargs),
    "hudson_lynx_hare-lotka_volterra": Entry(lotka_volterra, _lotka_volterra_kwargs),
    "gp_pois_regr-gp_regr": Entry(gp_regr, _only("x", "y")),
    "hmm_example-hmm_example": Entry(hmm_example, _only("y")),
    "kidiq-kidscore_interaction": Entry(
        cauchy_regression,
        _columns(
            _get("kid_score"), _get("mom_hs"), _get("mom_iq"), lambda d: d["mom_hs"] * d["mom_iq"]
        ),
    ),
    "kidiq-kidscore_momhs": Entry(cauchy_regression, _columns(_get("kid_score"), _get("mom_hs"))),
    "mesquite-logmesquite": Entry(
        flat_regression,
        _columns(
            _log("weight"),
            *(
                _log(name)
                for name in ("diam1", "diam2", "canopy_height", "total_height", "density")
            ),
            _get("group"),
        ),
    ),
    "mesquite-mesquite": Entry(
        flat_regression,
        _columns(
            _get("weight"),
            *(
                _get(name)
                for name in ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
            ),
        ),
    ),
    "earnings-log10earn_height": Entry(
        flat_regression, _columns(lambda d: d["earn"].log10(), _get("height"))
    ),
    "nes1976-nes": Entry(
        flat_regression,
        _columns(
            _get("partyid7"),
            _get("real_ideo"),
            _get("race_adj"),
            *(_equals("age_discrete", group) for group in (2, 3, 4)),
            *(_get(name) for name in ("educ1", "gender", "income")),
        ),
    ),
    "sblri-blr": Entry(
        normal_regression, lambda data: {"x": _tensor(data["X"]), "y": _tensor(data["y"])}
    ),
}
"""Pyro models by posteriordb's posterior names."""
