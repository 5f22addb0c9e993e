"""Angles in the unconstrained vector, and where their circles are cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.model import LogDensity
from pyroflows.model.circle import CircleMap, wrap

PI = math.pi


@pytest.mark.parametrize("centre", [0.0, 1.0, -PI, 3.0])
def test_the_map_covers_the_circle_once(centre: float) -> None:
    chart = CircleMap(torch.tensor(centre, dtype=torch.float64))
    u = torch.linspace(-4, 4, 101, dtype=torch.float64, requires_grad=True)
    angle = chart(u)
    assert bool((angle >= -PI).all() & (angle < PI).all())
    torch.testing.assert_close(chart.inv(angle), u)
    (slope,) = torch.autograd.grad(angle.sum(), u)
    torch.testing.assert_close(chart.log_abs_det_jacobian(u, angle), slope.log())
    at_zero = chart(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(at_zero, wrap(torch.tensor(centre, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_are_wrapped(dtype: torch.dtype) -> None:
    ends = torch.tensor([-PI, PI, 3 * PI, -1e-9 - PI, 100.0, 0.0], dtype=dtype)
    wrapped = wrap(ends)
    assert bool((wrapped >= -PI).all() & (wrapped < PI).all())
    torch.testing.assert_close(wrapped.cos(), ends.cos(), atol=1e-4, rtol=0)
    far = torch.tensor([-40.0, 40.0], dtype=dtype)
    assert bool((CircleMap()(far) < PI).all())
    assert bool(CircleMap().inv(ends).isfinite().all())


def direction(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.VonMises(0.0, 1e-3))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.VonMises(mu, 2.0), obs=y)


def axis(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.VonMises(0.0, 1e-3))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.VonMises(2 * mu, 2.0), obs=y)


def not_periodic(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.VonMises(0.0, 1e-3))
    pyro.sample("y", dist.Normal(mu, 0.3), obs=y.mean())


@pytest.mark.parametrize(
    ("model", "data", "centres"),
    [(direction, PI, (PI,)), (direction, 1.0, (1.0,)), (axis, 0.0, (PI / 2, -PI / 2))],
)
def test_the_cut_is_far_from_all_modes(
    model: Callable[[Tensor], None], data: float, centres: tuple[float, ...]
) -> None:
    density = LogDensity(model, (torch.full((10,), data),))
    (centre,) = density.centres["mu"]
    nearest = min(float(wrap(centre - c).abs()) for c in centres)
    assert nearest < 2 * PI / 24


def test_the_cut_is_where_a_density_jumps() -> None:
    assert float(LogDensity(not_periodic, (torch.full((3,), 3.0),)).centres["mu"]) == 0


def torus() -> None:
    with pyro.plate("n", 2):
        pyro.sample("x", dist.SineBivariateVonMises(PI, -2.0, 5.0, 3.0, correlation=2.0))
    pyro.sample("s", dist.LogNormal(0.0, 1.0))


@pytest.mark.filterwarnings("ignore:This model cannot be evaluated for a batch")
def test_another_cut_is_the_same_density() -> None:
    density = LogDensity(torus)
    assert density.features == 5
    moved = density.rotated({"x": torch.tensor([0.5, 1.0, -2.0, 3.0])})
    assert moved.rotated(moved.centres) is moved
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    values = density.constrain(z)
    other = moved.unconstrain(values)
    torch.testing.assert_close(moved.constrain(other)["x"], values["x"], atol=1e-5, rtol=1e-5)

    def on_the_circle(of: LogDensity, points: Tensor) -> Tensor:
        u = points[:, :4]
        return of.log_prob(points) - CircleMap().log_abs_det_jacobian(u, u).sum(-1)

    torch.testing.assert_close(
        on_the_circle(moved, other), on_the_circle(density, z), atol=1e-3, rtol=1e-4
    )
