"""Gauss-Hermite nodes and draws on a grid."""

from __future__ import annotations

import pytest
import torch

from pyroflows.distributions.quadrature import HermiteNodes, draw_on_grid


@pytest.mark.parametrize("count", [1, 3, 7, 9, 17, 33])
def test_polynomials_are_exact(count: int) -> None:
    nodes = HermiteNodes(count)
    z = nodes.points
    assert z[nodes.middle].abs() < 1e-12
    for power in range(min(count, 9)):
        torch.testing.assert_close(nodes.integrate(z**power), z ** (power + 1) / (power + 1))
    inside = nodes.grid.abs() <= z[-1]
    for power in range(min(count, 9 if count <= 9 else 6)):
        interpolated = (nodes.interpolation @ z**power)[inside]
        torch.testing.assert_close(interpolated, nodes.grid[inside] ** power)


@pytest.mark.parametrize("count", [5, 9, 17, 33])
def test_cliffs_and_spikes_stay_what_they_are(count: int) -> None:
    nodes = HermiteNodes(count)
    z = nodes.points
    cliff = nodes.integrate(-(9 * z).exp())
    assert (cliff[z > 1e-9] < 0).all()
    assert (cliff.diff() < 1e-3).all()
    # A narrow hump between two nodes, of which slopes see the feet alone.
    offset = z - (z[nodes.middle + 1] / 2)
    hump = nodes.integrate(-1e3 * offset / (1 + 1e3 * offset.square()))
    assert hump.max() < 2 + 1e-9


def test_stretched_noise() -> None:
    nodes = HermiteNodes(17, stretch=0.3)
    z = nodes.points.clone().requires_grad_()
    log_rates, bends = nodes.log_rate(z)
    (rates,) = torch.autograd.grad(nodes.spread(z).sum(), z)
    torch.testing.assert_close(log_rates.exp(), rates)
    torch.testing.assert_close(bends, torch.autograd.grad(log_rates.sum(), z)[0])
    torch.testing.assert_close(HermiteNodes(17).spread(z), z)


def test_functions_continue_as_straight_lines() -> None:
    nodes = HermiteNodes(9)
    values = nodes.points.abs()
    torch.testing.assert_close(
        (nodes.interpolation @ values)[[0, -1]], nodes.grid[[0, -1]].abs(), rtol=1e-12, atol=0
    )


def test_interpolation_at_any_points() -> None:
    nodes = HermiteNodes(17)
    z = torch.randn(5, 3, dtype=torch.double)
    values = nodes.interpolate_at(z) @ nodes.points.sin()
    torch.testing.assert_close(values, z.sin(), rtol=0, atol=0.3**2 / 8 + 1e-3)
    far = nodes.interpolate_at(torch.tensor([1e9]).double()) @ nodes.points
    torch.testing.assert_close(far, nodes.grid[-1:])


def test_the_middle_must_be_a_node() -> None:
    with pytest.raises(ValueError, match="count to be odd; got 8"):
        HermiteNodes(8)


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_draws_are_quantiles(dtype: torch.dtype) -> None:
    grid = torch.linspace(-8, 8, 65, dtype=dtype)
    levels = ((torch.arange(1000) + 0.5) / 1000).to(dtype)
    log_density = -(grid.unsqueeze(-1) - torch.tensor([0.0, 1.0]).to(dtype)).square() / 2
    drawn = draw_on_grid(grid, log_density.unsqueeze(1), levels.unsqueeze(-1).expand(-1, 2))
    expected = torch.special.ndtri(levels)
    torch.testing.assert_close(drawn, torch.stack([expected, expected + 1], -1), rtol=0, atol=0.01)


def test_straight_logarithms_are_exact() -> None:
    grid = torch.linspace(0, 1, 3, dtype=torch.double)
    levels = torch.linspace(0, 1, 11, dtype=torch.double)
    for rate in (-3.0, -1e-5, 0.0, 1e-5, 3.0):
        drawn = draw_on_grid(grid, (rate * grid).unsqueeze(-1), levels)
        share = torch.expm1(rate * drawn) / torch.expm1(torch.tensor(rate)) if rate else drawn
        torch.testing.assert_close(share, levels, rtol=0, atol=1e-6)
