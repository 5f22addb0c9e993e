"""Where to cut the circles of a model, so that the posterior has little mass there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Density
from .circle import CircleMap, wrap
from .sites import LatentSite, SiteKind

__all__ = ["find_centres"]

# Ascents, their steps, the lengths of the first and the last.
ASCENTS = 32
STEPS = 80
LENGTHS = (0.2, 0.02)
# How far below the best one an ascent may end, in nats, to count as one to a mode.
NATS = 10.0
MOST_MODES = 8
# Angles at which a cut is tried.
GRID = 24
# Nats by which a density jumps at the ends of its interval, where it is not periodic, and how near
# to them it is looked at.
JUMP = 0.5
NEAR = 1e-3


def find_centres(density: Density, sites: Sequence[LatentSite]) -> dict[str, Tensor]:
    r"""Finds for each angle a centre, opposite to which its circle is cut.

    From points all around the circles ascents go up the log density to modes :math:`z_k`. The cut
    of angle :math:`j` is where

    .. math:: \sum_k p(\theta_j \mid z_{k, -j})

    is least, or at :math:`\pm\pi` if the density jumps there, as one that is not periodic does. The
    posterior is the same for any cut, but easier to fit with a good one.

    Args:
        density: The log density, with centres at zero.
        sites: Its sites.

    Returns:
        For each circular site the centres, of shape ``(features,)``.
    """
    search = _Search(density, sites)
    if not len(search.angles):
        return {}
    modes = search.ascend()
    cuts = search.grid[search.profiles(modes).logsumexp(0).argmin(-1)]
    centres = wrap(cuts + math.pi).where(~search.jumps(modes[0]), 0.0)
    circles = [site for site in sites if site.kind is SiteKind.CIRCLE]
    blocks = centres.split([site.features for site in circles])
    return {site.name: block for site, block in zip(circles, blocks, strict=True)}


class _Search:
    """The log density of a vector that holds angles as they are.

    Args:
        density: The log density, with centres at zero.
        sites: Its sites.

    Attributes:
        angles: The places of the angles in a vector.
        grid: Angles all around the circle.
    """

    def __init__(self, density: Density, sites: Sequence[LatentSite]) -> None:
        self.density, self.map = density, CircleMap()
        counts = torch.tensor([site.features for site in sites], device="cpu")
        circular = torch.tensor([site.kind is SiteKind.CIRCLE for site in sites], device="cpu")
        places = circular.repeat_interleave(counts).nonzero().squeeze(-1)
        self.angles = places.to(density.initial.device)
        steps = torch.arange(GRID, dtype=torch.float64, device="cpu") - GRID // 2
        self.grid = (2 * math.pi / GRID * steps).to(density.initial)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients at vectors with angles, ``-inf`` and zero where there are none."""
        u = self.map.inv(x[..., self.angles])
        log_slope = self.map.log_abs_det_jacobian(u, u)
        z = x.index_copy(-1, self.angles, u)
        value, grad, _ = self.density.evaluate(z)
        of_angles = (grad[..., self.angles] + u) / log_slope.exp()
        grad = grad.index_copy(-1, self.angles, of_angles.nan_to_num(0.0))
        known = value.isfinite().unsqueeze(-1)
        return value - log_slope.sum(-1), grad.where(known, 0.0)

    def ascend(self) -> Tensor:
        """Climbs from many starts; returns the best ends, best first, ``(modes, features)``."""
        start = self.density.initial
        generator = torch.Generator(device="cpu").manual_seed(0)
        noise = torch.randn(ASCENTS, len(start), generator=generator, device="cpu").to(start)
        turns = torch.rand(ASCENTS, len(self.angles), generator=generator, device="cpu").to(start)
        x = (start + 0.5 * noise).index_copy(-1, self.angles, math.pi * (2 * turns - 1))
        x.requires_grad_()
        first, last = LENGTHS
        optimizer = torch.optim.Adam([x], lr=first)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = first * (last / first) ** (step / STEPS)
            x.grad = -self.value_and_grad(x.detach())[1]
            optimizer.step()
        ends = x.detach()
        values = self.value_and_grad(ends)[0]
        order = values.argsort(descending=True)[:MOST_MODES]
        return ends[order[values[order] >= values[order[0]] - NATS]]

    def profiles(self, modes: Tensor) -> Tensor:
        """The log densities of each angle given the rest, ``(modes, angles, GRID)``."""
        values, _ = self.value_and_grad(self._with_angles(modes, self.grid))
        return values.log_softmax(-1).nan_to_num(nan=-math.inf)

    def jumps(self, mode: Tensor) -> Tensor:
        """Whether the density jumps at the ends of the interval of each angle."""
        ends = self.grid.new_tensor([NEAR - math.pi, math.pi - NEAR])
        values, grads = self.value_and_grad(self._with_angles(mode.unsqueeze(0), ends))
        slopes = torch.stack([grads[0, j, :, place] for j, place in enumerate(self.angles)])
        at_ends = values[0] + slopes * slopes.new_tensor([-NEAR, NEAR])
        return ~((at_ends[:, 0] - at_ends[:, 1]).abs() < JUMP)

    def _with_angles(self, modes: Tensor, values: Tensor) -> Tensor:
        """Modes with one angle at some values, ``(modes, angles, values, features)``."""
        x = modes[:, None, None].repeat(1, len(self.angles), len(values), 1)
        for j, place in enumerate(self.angles):
            x[:, j, :, place] = values
        return x
