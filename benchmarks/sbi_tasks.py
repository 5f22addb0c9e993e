"""Tasks of the benchmark of simulation-based inference by Lueckmann et al. (2021), as functions of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

Prior = dist.TorchDistribution


@dataclass(frozen=True)
class Task:
    """A prior and a simulator.

    Args:
        prior: The distribution of the parameters.
        simulate: Draws data given parameters.
    """

    prior: Prior
    simulate: Callable[[Tensor], Tensor]


def box(low: float, high: float, features: int) -> Prior:
    """A uniform distribution on a cube."""
    return dist.Uniform(low * torch.ones(features), high * torch.ones(features)).to_event(1)


def two_moons(theta: Tensor) -> Tensor:
    angle, radius = (torch.rand(()) - 0.5) * math.pi, 0.1 + 0.01 * torch.randn(())
    moon = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()])
    shift = torch.stack([-theta.sum().abs(), theta[1] - theta[0]]) / math.sqrt(2)
    return moon + shift


def gaussian(theta: Tensor) -> Tensor:
    return theta + math.sqrt(0.1) * torch.randn(theta.shape)


def gaussian_mixture(theta: Tensor) -> Tensor:
    return theta + (1.0 if torch.rand(()) < 0.5 else 0.1) * torch.randn(theta.shape)


def slcp(theta: Tensor) -> Tensor:
    """Four points of a normal distribution in the plane, whose parameters enter squared."""
    first, second = theta[2].square(), theta[3].square()
    correlation = theta[4].tanh()
    noise = torch.randn(4, 2)
    x = theta[0] + first * noise[:, 0]
    rest = (1 - correlation.square()).sqrt() * noise[:, 1]
    y = theta[1] + second * (correlation * noise[:, 0] + rest)
    return torch.stack([x, y], -1).flatten()


def sir(theta: Tensor) -> Tensor:
    """Ten counts of infected among a thousand people who are tested, over 160 days."""
    infection, recovery = theta.tolist()
    people = 1e6

    def change(state: Any, time: float) -> list[float]:
        s, i, _ = state
        new = infection * s * i / people
        return [-new, new - recovery * i, recovery * i]

    infected = integrate(change, [people - 1, 1.0, 0.0], np.arange(161.0))[::17, 1]
    share = torch.from_numpy(infected / people).float().clamp(0, 1)
    return dist.Binomial(1000, share).sample()


def lotka_volterra(theta: Tensor) -> Tensor:
    """Ten noisy counts each of predators and prey, over 20 days."""
    a, b, c, d = theta.tolist()

    def change(state: Any, time: float) -> list[float]:
        x, y = state
        return [a * x - b * x * y, -c * y + d * x * y]

    animals = integrate(change, [30.0, 1.0], np.linspace(0, 20, 201))[::21].T.flatten()
    mean = torch.from_numpy(animals.copy()).float().clamp(1e-10, 1e4)
    return dist.LogNormal(mean.log(), 0.1).sample()


def integrate(change: Any, start: list[float], times: Any) -> Any:
    from scipy.integrate import odeint  # type: ignore[import-untyped]

    return odeint(change, start, times)


TASKS = {
    "two_moons": Task(box(-1, 1, 2), two_moons),
    "gaussian_linear": Task(
        dist.Normal(torch.zeros(10), math.sqrt(0.1)).to_event(1),
        gaussian,
    ),
    "gaussian_mixture": Task(box(-10, 10, 2), gaussian_mixture),
    "gaussian_linear_uniform": Task(box(-1, 1, 10), gaussian),
    "slcp": Task(box(-3, 3, 5), slcp),
    "sir": Task(
        dist.LogNormal(torch.tensor([0.4, 0.125]).log(), torch.tensor([0.5, 0.2])).to_event(1),
        sir,
    ),
    "lotka_volterra": Task(
        dist.LogNormal(torch.tensor([-0.125, -3.0, -0.125, -3.0]), 0.5).to_event(1),
        lotka_volterra,
    ),
}
