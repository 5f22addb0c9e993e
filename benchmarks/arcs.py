"""Long thin modes that are bent, with their moments, their evidence and exact draws in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


@dataclass(frozen=True)
class Arcs:
    r"""A mixture of normals that are long in one direction, thin in all others, and sheared.

    A shear keeps volumes, so that the density of

    .. math:: x = m_k + A_k \left( u + b_k\, (u_1^2 - L^2)\, e_2 \right), \qquad
        u \sim N(0, \operatorname{diag}(L^2, t^2, \dots, t^2)),

    is that of :math:`u`, with mean :math:`m_k` and covariance
    :math:`A_k \operatorname{diag}(L^2, t^2 + 2 b_k^2 L^4, t^2, \dots) A_k^\top`.

    Args:
        weights: Weights of the modes, of shape ``(M,)``.
        locs: Their means, of shape ``(M, D)``.
        axes: Rotations, of shape ``(M, D, D)``.
        bends: Of shape ``(M,)``.
        length: Standard deviation along a mode before it is bent.
        thickness: Standard deviation across it.
    """

    weights: Tensor
    locs: Tensor
    axes: Tensor
    bends: Tensor
    length: float = 2.0
    thickness: float = 0.1

    def components(self, x: Tensor) -> Tensor:
        """Returns the weighted log densities of the modes, from ``(*, D)`` to ``(*, M)``."""
        y = torch.einsum("kij,...ki->...kj", self.axes, x.unsqueeze(-2) - self.locs)
        along = y[..., 0]
        bend = self.bends * (along.square() - self.length**2)
        across = torch.cat([(y[..., 1] - bend).unsqueeze(-1), y[..., 2:]], -1)
        squares = (along / self.length).square() + (across / self.thickness).square().sum(-1)
        features = self.locs.shape[-1]
        log_scales = math.log(self.length) + (features - 1) * math.log(self.thickness)
        constant = log_scales + features / 2 * math.log(2 * math.pi)
        return self.weights.log() - 0.5 * squares - constant

    def moments(self) -> tuple[Tensor, Tensor]:
        """Returns the means and the standard deviations of the entries, each of shape ``(D,)``."""
        variances = torch.full_like(self.locs, self.thickness**2)
        variances[:, 0] = self.length**2
        variances[:, 1] += 2 * self.bends.square() * self.length**4
        of_modes = (self.axes.square() * variances.unsqueeze(-2)).sum(-1)
        mean = self.weights @ self.locs
        variance = self.weights @ (of_modes + (self.locs - mean).square())
        return mean, variance.sqrt()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws exactly.

        Args:
            n: How many draws.
            generator: Where they come from.

        Returns:
            Tensor of shape ``(n, D)``.
        """
        mode = torch.multinomial(self.weights, n, True, generator=generator)
        u = self.thickness * torch.randn(n, self.locs.shape[-1], generator=generator)
        u[:, 0] *= self.length / self.thickness
        u[:, 1] += self.bends[mode] * (u[:, 0].square() - self.length**2)
        return self.locs[mode] + torch.einsum("nij,nj->ni", self.axes[mode], u)

    def model(self) -> None:
        """A Pyro model of a single site, of log evidence zero."""
        features = self.locs.shape[-1]
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (features,)))
        pyro.factor("log_density", self.components(x).logsumexp(-1))


def random_arcs(modes: int, features: int, bend: float, seed: int) -> Arcs:
    """Makes arcs that lie anyhow, with weights that fall from mode to mode.

    Args:
        modes: How many.
        features: In how many dimensions.
        bend: How bent they are.
        seed: Seed of rotations and places.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(modes + 1.0, 1.0, -1.0)
    axes = torch.linalg.qr(torch.randn(modes, features, features, generator=generator))[0]
    locs = 6 * torch.randn(modes, features, generator=generator)
    return Arcs(weights / weights.sum(), locs, axes, torch.full((modes,), bend))


def two_arcs(bend: float) -> None:
    """Two arcs back to back under a normal prior, x_1 = +-(2 + bend x_2^2), of thickness 0.1."""
    x = pyro.sample("x", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    across = (x[..., 0].abs() - 2 - bend * x[..., 1].square()) / 0.1
    pyro.factor("arcs", -0.5 * across.square())


def two_arcs_moments(bend: float) -> tuple[Tensor, float]:
    """Returns the standard deviations of :func:`two_arcs` and its log evidence, by quadrature.

    Args:
        bend: How bent the arcs are.
    """
    y = torch.linspace(-15, 15, 1001, dtype=torch.float64).unsqueeze(-1)
    across = torch.linspace(-8, 8, 201, dtype=torch.float64)
    x = 2 + bend * y.square() + 0.1 * across
    prior = torch.distributions.Normal(0.0, 3.0)
    log_p = prior.log_prob(x) + prior.log_prob(y) - 0.5 * across.square()
    p = log_p.exp()
    # Two arcs; steps of 0.03 along and of 0.08 times 0.1 across.
    evidence = 2 * float(p.sum()) * 0.03 * 0.008
    p = p / p.sum()
    sds = torch.stack([(p * x.square()).sum().sqrt(), (p * y.square()).sum().sqrt()])
    return sds, math.log(evidence)
