"""The packaged example models: plain Pyro functions whose data are their arguments."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def eight_schools(sigma: Tensor, y: Tensor | None = None) -> Tensor:
    r"""Coaching effects in parallel experiments, centred: a funnel between ``tau`` and ``theta``.

    .. math::
        \mu \sim N(0, 5), \quad \tau \sim \text{HalfCauchy}(5), \quad
        \theta_j \sim N(\mu, \tau), \quad y_j \sim N(\theta_j, \sigma_j)

    Args:
        sigma: standard errors of the estimated effects, shape ``(schools,)``.
        y: estimated effects, shape ``(schools,)``; ``None`` draws them.

    Returns:
        ``y``, shape ``(schools,)``.

    References:
        Estimation in parallel randomized experiments (D. B. Rubin, 1981),
        https://doi.org/10.3102/10769986006004377

    >>> import torch
    >>> eight_schools(torch.ones(3)).shape
    torch.Size([3])
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", sigma.shape[0]):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(sigma: Tensor, y: Tensor | None = None) -> Tensor:
    r"""The posterior of :func:`eight_schools` in coordinates without the funnel.

    .. math::
        \tilde\theta_j \sim N(0, 1), \quad \theta_j = \mu + \tau \tilde\theta_j

    Args:
        sigma: standard errors of the estimated effects, shape ``(schools,)``.
        y: estimated effects, shape ``(schools,)``; ``None`` draws them.

    Returns:
        ``y``, shape ``(schools,)``.

    References:
        A general framework for the parametrization of hierarchical models (O. Papaspiliopoulos,
        G. O. Roberts, M. Sköld, 2007), https://doi.org/10.1214/088342307000000014

    >>> import torch
    >>> eight_schools_noncentered(torch.ones(3)).shape
    torch.Size([3])
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", sigma.shape[0]):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        # event_dim=0: by default all dimensions of a deterministic site are its event, none is the plate's.
        theta = pyro.deterministic("theta", mu + tau * theta_trans, event_dim=0)
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def funnel() -> Tensor:
    r"""Neal's funnel in 10 dimensions, a density without data whose normalising constant is 1.

    .. math::
        v \sim N(0, 3), \quad x_i \sim N(0, e^{v / 2}), \quad i = 1, \dots, 9

    Returns:
        ``x``, shape ``(9,)``.

    References:
        Slice sampling (R. M. Neal, 2003), section 8, https://doi.org/10.1214/aos/1056562461

    >>> funnel().shape
    torch.Size([9])
    """
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    # With many particles at once v has batch dimensions of its own, left of the event of x.
    scale = torch.exp(v / 2).unsqueeze(-1)
    return pyro.sample("x", dist.Normal(0.0, scale).expand((*v.shape, 9)).to_event(1))


def logistic_regression(temperature: Tensor, distress: Tensor | None = None) -> Tensor:
    r"""O-ring distress of the space shuttle's boosters against the temperature at launch.

    .. math::
        \alpha \sim N(0, 5), \quad \beta \sim N(0, 5), \quad
        y_i \sim \text{Bernoulli}\left(\text{logit}^{-1}(\alpha + \beta (t_i - 70) / 10)\right)

    So ``intercept`` is the log odds of distress at 70 °F and ``slope`` their change per 10 °F.

    Args:
        temperature: temperature of the joints in degrees Fahrenheit, shape ``(flights,)``.
        distress: 1 where any primary O-ring showed thermal distress, else 0, shape ``(flights,)``; ``None``
            draws it.

    Returns:
        ``distress``, shape ``(flights,)``.

    References:
        Risk analysis of the space shuttle: pre-Challenger prediction of failure (S. R. Dalal, E. B. Fowlkes,
        B. Hoadley, 1989), https://doi.org/10.1080/01621459.1989.10478858

    >>> import torch
    >>> logistic_regression(torch.tensor([31.0, 70.0])).shape
    torch.Size([2])
    """
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("flight", temperature.shape[0]):
        logits = intercept + slope * (temperature - 70.0) / 10.0
        return pyro.sample("distress", dist.Bernoulli(logits=logits), obs=distress)


def linear_regression(weight: Tensor, horsepower: Tensor, mpg: Tensor | None = None) -> Tensor:
    r"""Fuel economy of cars against their weight and power.

    .. math::
        \alpha \sim N(20, 10), \quad \beta_w, \beta_h \sim N(0, 10), \quad
        \sigma \sim \text{HalfNormal}(10), \quad
        y_i \sim N(\alpha + \beta_w (w_i - 3) + \beta_h (h_i - 150) / 100, \sigma)

    So ``intercept`` is the economy of a car of 3000 lb and 150 hp, and the slopes are changes per 1000 lb and
    per 100 hp.

    Args:
        weight: weight in 1000 lb, shape ``(cars,)``.
        horsepower: gross horsepower, shape ``(cars,)``.
        mpg: miles per US gallon, shape ``(cars,)``; ``None`` draws them.

    Returns:
        ``mpg``, shape ``(cars,)``.

    References:
        Building multiple regression models interactively (H. V. Henderson, P. F. Velleman, 1981),
        https://doi.org/10.2307/2530428

    >>> import torch
    >>> linear_regression(torch.tensor([2.6, 3.4]), torch.tensor([110.0, 175.0])).shape
    torch.Size([2])
    """
    intercept = pyro.sample("intercept", dist.Normal(20.0, 10.0))
    slope_weight = pyro.sample("slope_weight", dist.Normal(0.0, 10.0))
    slope_horsepower = pyro.sample("slope_horsepower", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("car", weight.shape[0]):
        mean = (
            intercept
            + slope_weight * (weight - 3.0)
            + slope_horsepower * (horsepower - 150.0) / 100.0
        )
        return pyro.sample("mpg", dist.Normal(mean, sigma), obs=mpg)
