"""A polynomial in the place of a log density."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyroflows.guides.surrogate import PolynomialDensity, count_terms

LOC = torch.tensor([1.0, -2.0], dtype=torch.double)
ROOT = torch.tensor([[2.0, 0.0], [0.5, 0.3]], dtype=torch.double)


def skewed(u: Tensor) -> Tensor:
    cubic = 0.1 * u[:, 0] ** 3 - 0.05 * u[:, 0] * u[:, 1] ** 2
    return 3.0 - u.square().sum(-1) / 2 + cubic - 0.02 * u[:, 1] ** 4 + 0.2 * u[:, 0]


def points(n: int, features: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, features, generator=generator, dtype=torch.double)


def fitted(device: torch.device) -> PolynomialDensity:
    density = PolynomialDensity(LOC.to(device), ROOT.to(device))
    u = points(300).to(device)
    assert density.fit(density.unwhiten(u), skewed(u)) < 0.02
    return density


def test_finds_a_quartic(device: torch.device) -> None:
    density = fitted(device)
    u = points(50)[:, :].clamp(-1.5, 1.5).to(device)
    values, _ = density.value_and_grad(density.unwhiten(u))
    torch.testing.assert_close(values, skewed(u), atol=0.02, rtol=0)


def test_gradients_are_those_of_the_values(device: torch.device) -> None:
    density = fitted(device)
    g = density.unwhiten(2 * points(20).to(device))
    _, slopes = density.value_and_grad(g)
    step = 1e-6 * torch.eye(2, device=device, dtype=torch.double)
    up, down = (density.value_and_grad(g.unsqueeze(1) + s)[0] for s in (step, -step))
    torch.testing.assert_close(slopes, (up - down) / 2e-6, atol=1e-5, rtol=1e-5)


def test_an_exponential_tail_is_one(device: torch.device) -> None:
    density = PolynomialDensity(torch.zeros(1).to(device), torch.eye(1).to(device))

    def gumbel(u: Tensor) -> Tensor:
        return u[:, 0] - u[:, 0].exp()

    u = points(400, 1).to(device) * 2
    density.fit(u, gumbel(u))
    far = torch.tensor([[-6.0], [-12.0]]).to(u)
    values, slopes = density.value_and_grad(far)
    torch.testing.assert_close(values, gumbel(far), atol=0.5, rtol=0.2)
    torch.testing.assert_close(slopes, torch.ones_like(slopes), atol=0.4, rtol=0)


def test_falls_off_everywhere(device: torch.device) -> None:
    """A polynomial that bends upwards does so within a ball only."""
    density = PolynomialDensity(LOC.to(device), ROOT.to(device))
    u = points(300).to(device)
    density.fit(density.unwhiten(u), skewed(u) + 0.1 * u[:, 0] ** 4)
    far = torch.tensor([[30.0, 0.0], [100.0, 50.0], [0.0, -60.0]]).to(u)
    values, slopes = density.value_and_grad(density.unwhiten(far))
    bulk, _ = density.value_and_grad(density.unwhiten(u))
    assert bool((values < bulk.min()).all())
    assert bool(slopes.isfinite().all())


def test_points_of_no_density_are_left_out(device: torch.device) -> None:
    density = PolynomialDensity(LOC.to(device), ROOT.to(device))
    u = points(300).to(device)
    values = skewed(u)
    values[:3] = torch.tensor([torch.nan, -torch.inf, -1e9]).to(values)
    assert density.fit(density.unwhiten(u), values) < 0.02


@pytest.mark.parametrize(("features", "terms"), [(1, 5), (2, 15), (3, 35), (5, 61), (10, 86)])
def test_counts_terms(features: int, terms: int) -> None:
    assert count_terms(features) == terms


@pytest.mark.parametrize("features", [1, 4, 7])
def test_a_normal_density_takes_no_polynomial(features: int, device: torch.device) -> None:
    loc, root = torch.zeros(features).to(device), torch.eye(features).to(device)
    density = PolynomialDensity(loc, root)
    g = points(2 * count_terms(features) + 50, features).to(device)
    density.fit(g, -g.square().sum(-1) / 2)
    assert float(density.coefficients.abs().amax()) < 1e-5


def test_finds_its_normal_distribution(device: torch.device) -> None:
    density = PolynomialDensity(LOC.to(device), ROOT.to(device))
    u = points(300).to(device)
    density.fit(density.unwhiten(u), -(u - 0.2).square().sum(-1) / (2 * 0.9**2))
    mean, root, share = density.find_normal()
    shift = torch.full((2,), 0.2, dtype=torch.double, device=device)
    torch.testing.assert_close(mean, density.unwhiten(shift), atol=0.01, rtol=0)
    torch.testing.assert_close(root, 0.9 * ROOT.to(device), atol=0.01, rtol=0)
    assert share > 0.999


def test_tells_that_it_is_not_normal(device: torch.device) -> None:
    density = fitted(device)
    assert density.find_normal()[2] < 0.99
