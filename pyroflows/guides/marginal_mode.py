"""The mode of a marginal density, found by its values alone."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_size
from .marginal import Marginal

__all__ = ["MarginalMode", "find_marginal_mode"]

# The distance of differences, in whitened units, and the width of the first ones.
DISTANCE, WIDTH = 0.3, 0.3
# A round changes no width by more: curvatures are known only within the present ones.
FLATTEST, SHARPEST = 0.05, 1e6
# The search is over when a step would gain so little, and when all curvatures are so near one.
GAIN, NEAR_ONE = 1e-2, 0.3
# Points of the lowest density count as so far below the best.
DEEPEST = 1e4
LENGTHS = 2.0 ** torch.arange(1.0, -7.0, -1.0)


class MarginalMode(NamedTuple):
    """The mode of a marginal density.

    Attributes:
        loc: The globals there, of shape ``(features,)``.
        root: The lower root of their covariance by the curvature there, of shape
            ``(features, features)``.
        reference: The mean of the locals there, of shape ``(locals,)``.
        rounds: How many rounds the search took.
        found: Whether it is a mode: not if the rounds were over before.
    """

    loc: Tensor
    root: Tensor
    reference: Tensor
    rounds: int
    found: bool


class _Point(NamedTuple):
    loc: Tensor
    value: Tensor
    reference: Tensor


def find_marginal_mode(
    marginal: Marginal, starts: int = 16, rounds: int = 25, seed: int = 0
) -> MarginalMode:
    r"""Finds the mode of the globals with the locals integrated out.

    The joint density of a centred hierarchy grows without bound as its groups come together, and
    has no mode worth the name; the marginal density has. Each round takes the gradient and the
    Hessian by central differences along the columns of the present root :math:`L`, renews the root,
    :math:`L \leftarrow L V |w|^{-1/2}`, and moves to the best of a series of steps. The locals
    start from their mean at the best point so far.

    Args:
        marginal: The marginal density.
        starts: Around the start of the density so many points are tried, of which the best is
            taken.
        rounds: Most rounds; about six are usual.
        seed: Seed of these points.

    Returns:
        The mode, or the best point if the rounds are over before.

    Raises:
        ValueError: If the density is zero at all starts.

    Reference:
        Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio, "Identifying and attacking the saddle
        point problem in high-dimensional non-convex optimization", 2014,
        https://arxiv.org/abs/1406.2572

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows.model import LogDensity
        >>> from pyroflows.model.structure import find_structure
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("groups", 3):
        ...         effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=y)
        >>> density = LogDensity(model, (torch.tensor([1.0, 2.0, 3.0]),))
        >>> mode = find_marginal_mode(Marginal(density, find_structure(density)))
        >>> mode.loc.round(decimals=3), mode.root.square().round(decimals=3)
        (tensor([1.2000], dtype=torch.float64), tensor([[0.4000]], dtype=torch.float64))
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(check_size("starts", starts), marginal.features, generator=generator)
    noise[0] = 0
    first = marginal.initial.double()
    now = _best(marginal, first + noise.to(first), marginal.reference)
    if not now.value.isfinite():
        raise ValueError("Expected a start near which the density is not zero; got none.")
    root = WIDTH * torch.eye(marginal.features).to(first)
    for number in range(1, check_size("rounds", rounds) + 1):
        gradient, curvature = _differentiate(marginal, now, root)
        eigenvalues, vectors = torch.linalg.eigh(curvature)
        widths = eigenvalues.abs().clamp(FLATTEST, SHARPEST)
        step = vectors @ ((vectors.mT @ gradient) / widths)
        move = root @ step
        root = _lower(root @ (vectors * widths.rsqrt()))
        if gradient @ step < GAIN and (widths - 1).abs().amax() < NEAR_ONE:
            return MarginalMode(now.loc + move, root, now.reference, number, True)
        lengths = torch.cat([torch.zeros(1), LENGTHS]).to(first)
        now = _best(marginal, now.loc + lengths.unsqueeze(-1) * move, now.reference)
    return MarginalMode(now.loc, root, now.reference, rounds, False)


def _lower(root: Tensor) -> Tensor:
    """The lower root of the same covariance."""
    upper = torch.linalg.qr(root.mT).R
    return upper.mT * upper.diagonal().sign()


def _best(marginal: Marginal, g: Tensor, reference: Tensor) -> _Point:
    """The point of the highest density."""
    values, means = marginal.evaluate(g, reference)
    best = values.argmax()
    return _Point(g[best], values[best], means[best])


def _differentiate(marginal: Marginal, now: _Point, root: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient and the negative Hessian in units of a root, by central differences."""
    n = len(root)
    units = DISTANCE * torch.eye(n).to(root)
    pairs = list(itertools.combinations(range(n), 2))
    first, second = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(-1)
    design = torch.cat([units, units[first] + units[second]])
    points = torch.cat([0 * units[:1], design, -design])
    values, _ = marginal.evaluate(now.loc + points @ root.mT, now.reference)
    change = values.clamp_min(now.value - DEEPEST) - now.value
    up, down = (change[1:] - change[0]).chunk(2)
    gradient = (up - down)[:n] / (2 * DISTANCE)
    bends = -(up + down) / DISTANCE**2
    curvature = torch.diag_embed(bends[:n])
    mixed = (bends[n:] - bends[first] - bends[second]) / 2
    curvature[first, second] = curvature[second, first] = mixed
    return gradient, curvature
