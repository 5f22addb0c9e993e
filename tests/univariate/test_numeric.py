"""The numeric inverse: right far out, steep or flat, with derivatives, and loud when there is no root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from pyroflows.univariate._numeric import invert, readable

DTYPES = [torch.float32, torch.float64]


def identity(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.zeros_like(x)


def bent(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 0.99 * x.tanh(), torch.log1p(0.99 * (1 - x.tanh().square()))


def growing(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sinh(), x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - 0.6931471805599453


def slow(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.asinh(), -0.5 * torch.log1p(x.square())


def steep(x: Tensor) -> tuple[Tensor, Tensor]:
    at = 1e4 * (x - 0.3)
    return 1e-3 * x + at.sigmoid(), torch.log(1e-3 + 1e4 * at.sigmoid() * (-at).sigmoid())


SIZES = (1e-30, 1e-10, 1.0, 1e3, 1e10, 1e30)
CASES: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], tuple[float, ...]]] = {
    "identity": (identity, SIZES),
    "bent": (bent, SIZES),
    "growing": (growing, SIZES),
    "slow": (slow, (1e-30, 1.0, 10.0)),
    "steep": (steep, (1e-10, 1.0, 1e3)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_finds_the_root(case, dtype, device):
    function, sizes = CASES[case]
    normal = torch.randn(200, dtype=dtype, device=device)
    y = torch.cat([size * normal for size in sizes])
    with torch.no_grad():
        x, log_slope = invert(function, y, case)
        value, expected = function(x)
    # One rounding of x is as much of y as the slope makes of it, for slopes up to 1e4 and sinh of 70.
    eps = torch.finfo(dtype).eps
    slack = eps * (y.abs() + 1 + (x.abs() + 1) * expected.exp())
    assert bool(((value - y).abs() <= 8 * slack).all())
    assert torch.equal(log_slope, -expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_all_sizes(dtype, device):
    log_scale = torch.linspace(-40, 40, 500, dtype=dtype, device=device)
    y = torch.randn(500, dtype=dtype, device=device)
    x, _ = invert(lambda x: (log_scale.exp() * x, log_scale.expand_as(x)), y, "scales")
    torch.testing.assert_close(x, y / log_scale.exp(), rtol=8 * torch.finfo(dtype).eps, atol=0)


def cubic(y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    return invert(
        lambda x: (
            x + theta * x.tanh() + x**3 / 3,
            torch.log(1 + theta * (1 - x.tanh() ** 2) + x**2),
        ),
        y,
        "cubic",
    )


def test_derivatives_up_to_the_third_order(device):
    y = torch.randn(4, dtype=torch.float64, device=device, requires_grad=True)
    theta = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(cubic, (y, theta))
    assert torch.autograd.gradgradcheck(cubic, (y, theta))

    def slope(y: Tensor) -> Tensor:
        return torch.autograd.grad(cubic(y, theta)[0].sum(), y, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, (y,))


def test_under_vmap_and_compiled(device):
    y = torch.randn(6, dtype=torch.float64, device=device)
    theta = torch.tensor(0.7, dtype=torch.float64, device=device)
    expected = cubic(y, theta)
    torch.testing.assert_close(vmap(lambda y: cubic(y, theta))(y), expected)
    torch.compiler.reset()
    compiled = torch.compile(partial(cubic, theta=theta), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(y), expected)


def test_places_itself(placement):
    y = torch.zeros(3, device=placement)
    x, log_slope = invert(bent, y, "bent")
    assert x.device.type == log_slope.device.type == placement.type
    assert readable(y) == (placement.type != "meta")


def test_takes_empty_and_passes_nan_on(device):
    assert invert(bent, torch.empty(0, 3, device=device), "bent")[0].shape == (0, 3)
    x, _ = invert(bent, torch.tensor([float("nan"), 1.0], device=device), "bent")
    torch.testing.assert_close(x[1], invert(bent, torch.tensor(1.0, device=device), "bent")[0])
    assert bool(x[0].isnan())


def test_a_range_too_small_is_told_by_name(device):
    def bounded(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.tanh(), 2 * (0.6931471805599453 - x - F.softplus(-2 * x))

    with pytest.raises(
        RuntimeError, match=r"numeric inverse of Bounded does not converge: .* is missed by 1"
    ):
        invert(bounded, torch.tensor([0.5, 2.0], device=device), "Bounded")


@dataclass
class Counted:
    calls: int = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return bent(x)


def test_stops_early(device):
    counted = Counted()
    with torch.no_grad():
        invert(counted, torch.randn(1000, dtype=torch.float64, device=device), "counted")
    assert counted.calls < 20
