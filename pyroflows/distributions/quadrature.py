"""Gauss-Hermite nodes, what is known of a function from its slopes there, and spread points."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from .._checks import check_size

__all__ = ["HermiteNodes", "draw_on_grid", "quasi_normal"]

# A polynomial goes through so many neighbouring nodes: one through many would be wild between them.
# Where there are more nodes than the first number, values are interpolated through fewer.
WINDOW, FEWER = 9, 6
# The spacing of the fine grid, and how far it reaches beyond the nodes.
SPACING, BEYOND = 0.3, 1.0
# Changes of the logarithm of a density that count as none.
FLAT = 1e-3
# Uniform numbers are kept so far from zero and one.
LEAST_SHARE = 1e-7


class HermiteNodes:
    r"""The nodes of Gauss-Hermite quadrature for the standard normal distribution.

    .. math:: \int f(z)\, \varphi(z)\, dz \approx \sum_k w_k f(z_k)

    Functions are interpolated by polynomials through the nearest nodes: nine for slopes, and six
    for values at more nodes than nine. Densities with heavier tails than the normal one need nodes
    that reach further: the noise at a node is

    .. math:: t(z) = \sinh(b z) / b.

    Args:
        count: How many nodes; odd, so that zero is one of them.
        stretch: The number :math:`b`; at zero the noise is :math:`z` itself.

    Attributes:
        points: The nodes, in order, of shape ``(count,)``.
        log_weights: The logarithms of their weights, of shape ``(count,)``.
        grid: Equally spaced points that reach a little beyond the nodes, of shape ``(m,)``.
        interpolation: Takes values at the nodes to values on the grid, of shape ``(m, count)``.

    Raises:
        ValueError: If ``count`` is even.

    Example:
        >>> nodes = HermiteNodes(5)
        >>> (nodes.log_weights.exp() * nodes.points**4).sum()
        tensor(3.0000, dtype=torch.float64)
        >>> torch.allclose(nodes.integrate(3 * nodes.points**2), nodes.points**3)
        True
    """

    def __init__(self, count: int, stretch: float = 0.0) -> None:
        if check_size("count", count) % 2 == 0:
            raise ValueError(f"Expected count to be odd; got {count}.")
        points, weights = np.polynomial.hermite_e.hermegauss(count)
        self.count, self.stretch = count, stretch
        self.points = torch.as_tensor(points)
        self.log_weights = torch.as_tensor(np.log(weights / weights.sum()))
        cells = math.ceil((float(self.points[-1]) + BEYOND) / SPACING)
        self.grid = SPACING * torch.arange(-cells, cells + 1, dtype=torch.double)

    @property
    def middle(self) -> int:
        """The number of the node at zero."""
        return self.count // 2

    def spread(self, z: Tensor) -> Tensor:
        """The noise at points of any shape."""
        return (self.stretch * z).sinh() / self.stretch if self.stretch else z

    def log_rate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of the rate of change of the noise at points, and its own slope."""
        angle = self.stretch * z
        return angle.cosh().log(), self.stretch * angle.tanh()

    def integrate(self, slopes: Tensor) -> Tensor:
        """Takes slopes at the nodes to values there, less the value at zero.

        The mean slope between two nodes lies between those at them, or beyond by no more than
        slopes differ next to them: polynomials are wild where a function has a spike or a cliff.

        Args:
            slopes: Tensor of shape ``(count, *)``.
        """
        if self.count == 1:
            return torch.zeros_like(slopes)
        changes = slopes.diff(dim=0).abs()
        near = torch.cat([changes[:1], changes, changes[-1:]])
        slack = torch.minimum(near[:-2], near[2:])
        low = torch.minimum(slopes[:-1], slopes[1:]) - slack
        high = torch.maximum(slopes[:-1], slopes[1:]) + slack
        means = torch.tensordot(self._means.to(slopes), slopes, 1).clamp(low, high)
        gaps = self.points.diff().to(slopes).reshape(-1, *(slopes.ndim - 1) * [1])
        sums = torch.cat([torch.zeros_like(slopes[:1]), (gaps * means).cumsum(0)])
        return sums - sums[self.middle]

    @functools.cached_property
    def _means(self) -> Tensor:
        """Takes slopes at the nodes to their means between them, of shape ``(count - 1, count)``."""
        nodes, weights = map(torch.as_tensor, np.polynomial.legendre.leggauss(WINDOW))
        centres = (self.points[1:] + self.points[:-1]) / 2
        at = centres.unsqueeze(-1) + self.points.diff().unsqueeze(-1) / 2 * nodes
        basis = self._interpolate(at.flatten()).reshape(*at.shape, self.count)
        return torch.einsum("j,kjm->km", weights / 2, basis)

    @functools.cached_property
    def interpolation(self) -> Tensor:
        points, grid = self.points, self.grid
        window = WINDOW if self.count <= WINDOW else FEWER
        matrix = self._interpolate(grid.clamp(points[0], points[-1]), window)
        if self.count > 1:
            # A straight line beyond the nodes.
            spacing = points[-1] - points[-2]
            excess = (grid.abs() - points[-1]).clamp_min(0) / spacing
            above, below = excess.where(grid > 0, 0.0), excess.where(grid < 0, 0.0)
            matrix[:, -1] += above
            matrix[:, -2] -= above
            matrix[:, 0] += below
            matrix[:, 1] -= below
        return matrix

    def interpolate_at(self, z: Tensor) -> Tensor:
        """Takes values at the nodes to values at points of any shape ``(*)``: a tensor of shape
        ``(*, count)``."""
        place = (z - float(self.grid[0])) / SPACING
        cell = place.long().clamp(0, len(self.grid) - 2)
        part = (place - cell).clamp(0, 1).unsqueeze(-1)
        matrix = self.interpolation.to(z)
        return torch.lerp(matrix[cell], matrix[cell + 1], part)

    def _interpolate(self, at: Tensor, window: int = WINDOW) -> Tensor:
        """Takes values at the nodes to values at points between them, of shape ``(m, count)``."""
        width = min(window, self.count)
        cells = torch.searchsorted(self.points, at, right=True)
        first = (cells - (width + 1) // 2).clamp(0, self.count - width)
        chosen = first.unsqueeze(-1) + torch.arange(width)
        near = self.points[chosen]
        own = torch.eye(width, dtype=torch.bool)
        gaps = (near.unsqueeze(-1) - near.unsqueeze(-2)).masked_fill(own, 1.0)
        apart = (at[:, None, None] - near.unsqueeze(-2)).expand(-1, width, -1)
        basis = apart.masked_fill(own, 1.0).prod(-1) / gaps.prod(-1)
        return torch.zeros(len(at), self.count, dtype=torch.double).scatter(1, chosen, basis)


def draw_on_grid(grid: Tensor, log_density: Tensor, uniform: Tensor) -> Tensor:
    r"""Draws from densities whose logarithms are linear between the points of a grid, by their
    inverse distribution functions.

    Args:
        grid: Equally spaced points of shape ``(m,)``.
        log_density: The logarithms of the densities there, up to constants, of shape ``(m, *)``.
        uniform: Numbers between zero and one, of shape ``(*)``; the densities are broadcast to it.

    Returns:
        Tensor of shape ``(*)``, which grows with the uniform numbers.

    Example:
        >>> grid = torch.linspace(0.0, 1.0, 5)
        >>> draw_on_grid(grid, torch.zeros(5, 2), torch.tensor([0.3, 0.9]))
        tensor([0.3000, 0.9000])
    """
    log_density = log_density - log_density.amax(0)
    density = log_density.exp()
    growth = log_density.diff(dim=0)
    trapezia = (density[:-1] + density[1:]) / 2
    below = (density.diff(dim=0) / growth).where(growth.abs() > FLAT, trapezia).cumsum(0)
    below, density, growth = (f.expand(-1, *uniform.shape) for f in (below, density, growth))
    wanted = uniform * below[-1]
    cell = (below < wanted).sum(0).clamp_max(len(grid) - 2)
    before = (cell - 1).clamp_min(0).unsqueeze(0)
    start = below.gather(0, before).squeeze(0).where(cell > 0, 0.0)
    left = density.gather(0, cell.unsqueeze(0)).squeeze(0)
    rate = growth.gather(0, cell.unsqueeze(0)).squeeze(0)
    part = (wanted - start) / left.clamp_min(torch.finfo(left.dtype).tiny)
    curved = torch.log1p((rate * part).clamp_min(-1)) / rate
    part = curved.where(rate.abs() > FLAT, part * (1 - rate * part / 2))
    return grid[cell] + part.clamp(0, 1) * (grid[1] - grid[0])


def quasi_normal(count: int, features: int, seed: int = 0) -> Tensor:
    """Quasi-random standard normal points.

    Args:
        count: How many.
        features: Their entries.
        seed: Seed of the scramble.

    Returns:
        Tensor of shape ``(count, features)``, in double precision.
    """
    engine = SobolEngine(features, scramble=True, seed=seed)
    uniform = engine.draw(count, dtype=torch.double)
    return torch.special.ndtri(uniform.clamp(LEAST_SHARE, 1 - LEAST_SHARE))
