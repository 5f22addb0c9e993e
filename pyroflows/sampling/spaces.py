"""Spaces for trajectories where a guide offers none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..guides import BaseSpace, Guide
from ..guides.guide import Map
from ..transforms import LowerTriangularAffine
from ..transforms.low_rank import DENSE, LowRankAffine, LowRankRoot
from ..transforms.roots import Root

__all__ = ["fit_normal", "mean_and_root", "plain_space"]

#: Draws for each entry from which a whole covariance is read; from fewer, the scales alone.
DRAWS_PER_ENTRY = 10


@torch.no_grad()
def plain_space(guide: Guide, draws: Tensor) -> BaseSpace:
    """Makes the unconstrained space, in units of some draws, a space for trajectories.

    Args:
        guide: The guide, which becomes the base.
        draws: Vectors of shape ``(n, features)`` with the location and scale of the posterior.

    Returns:
        A space with an affine transform.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> density = pf.model.LogDensity(lambda: pyro.sample("x", dist.Normal(1.0, 2.0)))
        >>> guide = pf.AutoFlow(density.model)
        >>> density.introduce(guide)
        >>> draws = torch.tensor([[-1.0], [3.0]]).repeat(10, 1)
        >>> plain_space(guide, draws).transform.forward_and_log_det(torch.ones(1, 1))[0]
        tensor([[3.0000]])
    """
    draws = draws[draws.isfinite().all(-1)]
    features = draws.shape[-1]
    many = features > DENSE
    affine: Any = LowRankAffine(features) if many else LowerTriangularAffine(features)
    affine = affine.to(draws).requires_grad_(False)
    if len(draws) > 1:
        affine.set(*fit_normal(draws))
    return BaseSpace(affine, PulledBack(guide, affine))


class PulledBack:
    r"""A guide as a distribution in another space: of :math:`x = f^{-1}(z)`, :math:`z \sim q`.

    Args:
        guide: The guide :math:`q`.
        transform: The map :math:`f`.
    """

    def __init__(self, guide: Guide, transform: Map) -> None:
        self.guide, self.transform = guide, transform

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws vectors of shape ``(*sample_shape, features)``."""
        shape = torch.Size(sample_shape)
        z, _ = self.guide.sample_and_log_prob(shape.numel())
        return self.transform.inverse_and_log_det(z)[0].reshape(*shape, -1)

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of vectors of shape ``(n, features)``."""
        z, log_det = self.transform.forward_and_log_det(value)
        return self.guide.log_prob(z) + log_det


def fit_normal(draws: Tensor) -> tuple[Tensor, Root]:
    """Returns the mean of draws and a root of their covariance, of low rank where there are many
    entries.

    Args:
        draws: Vectors of shape ``(n, features)``.
    """
    n, features = draws.shape
    if features <= DENSE:
        return mean_and_root(draws)
    mean = draws.mean(0)
    # Eigenvalues of a sample of independent entries reach so far.
    noise = (1 + math.sqrt(features / n)) ** 2
    return mean, LowRankRoot.of_factor((draws - mean).mT / math.sqrt(n), noise)


def mean_and_root(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean of draws and a lower-triangular root of their covariance.

    The scale of a constant entry is one; of few draws the scales alone are read.

    Args:
        draws: Vectors of shape ``(n, features)``.

    Returns:
        Tensors of shape ``(features,)`` and ``(features, features)``.
    """
    mean = draws.mean(0)
    centred = draws - mean
    variance = centred.square().mean(0)
    scale = torch.where(variance > 0, variance, 1.0).sqrt()
    n, features = centred.shape
    if n < DRAWS_PER_ENTRY * features:
        return mean, scale.diag()
    standard = centred / scale
    # A ridge, because draws may lie in a plane.
    correlation = standard.T @ standard / n + 1e-6 * torch.eye(features).to(standard)
    return mean, scale.unsqueeze(-1) * torch.linalg.cholesky(correlation)
