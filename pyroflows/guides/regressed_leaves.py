"""The integral of small blocks of locals as a smooth correction of Laplace's approximation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from .leaves import DEVIATION, Leaves
from .warm_reference import WarmReference

__all__ = ["RegressedLeaves", "regress_leaves"]

# Points a coefficient and beyond, and their spread in whitened units.
POINTS_A_TERM, MORE_POINTS, SPREAD = 2, 10, 1.2
# The polynomial is taken no further from the mode, in whitened units along an axis.
FARTHEST = 4.0


class RegressedLeaves:
    r"""The log density of a model's globals by Laplace's approximation and a correction.

    .. math:: \log p(g) \approx \log p_{\text{Laplace}}(g) + q(u), \quad u = L^{-1} (g - g^*)

    However far Laplace's approximation is off, its error changes slowly with the globals: a
    quadratic polynomial :math:`q` of them leaves some thousandths. So a value costs as much as
    Laplace's approximation, from a tenth to a half of an integral.

    Args:
        leaves: The integrals.
        warm: The reference of the locals, whose whitened globals are the polynomial's.
        coefficients: Those of the polynomial, of shape ``(terms,)``.
        error: The standard deviation of what the polynomial leaves at points that it has not seen.
    """

    def __init__(
        self, leaves: Leaves, warm: WarmReference, coefficients: Tensor, error: float
    ) -> None:
        self.leaves, self.warm = leaves, warm
        self.coefficients, self.error = coefficients, error

    @property
    def settled(self) -> bool:
        """Whether the integrals and the polynomial are known to suffice."""
        return self.leaves.settled and self.error < DEVIATION

    def log_prob(self, g: Tensor, reference: Tensor) -> Tensor:
        """As :meth:`pyroflows.guides.leaves.Leaves.log_prob`."""
        laplace = self.leaves.marginal.log_prob(g, reference, self.leaves.steps)
        return laplace + _terms(self.warm.whiten(g)) @ self.coefficients.to(g)

    def sample(
        self, g: Tensor, reference: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`pyroflows.guides.leaves.Leaves.sample`, with the integral for the density."""
        return self.leaves.sample(g, reference, noise)


def regress_leaves(leaves: Leaves, warm: WarmReference, seed: int = 0) -> RegressedLeaves:
    """Regresses the error of Laplace's approximation on the globals.

    Args:
        leaves: The integrals.
        warm: The reference of the locals.
        seed: Seed of the points at which integrals are taken, two for each coefficient and ten.

    Returns:
        The density; not :attr:`RegressedLeaves.settled` if a quadratic polynomial is too far from
        the integrals.

    Reference:
        Allen, "The relationship between variable selection and data augmentation and a method for
        prediction", 1974, https://doi.org/10.1080/00401706.1974.10489157
    """
    features = leaves.marginal.features
    terms = _terms(torch.zeros(1, features)).shape[-1]
    engine = SobolEngine(features, scramble=True, seed=seed)
    uniform = engine.draw(POINTS_A_TERM * terms + MORE_POINTS, dtype=torch.double)
    u = SPREAD * torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).to(warm.root)
    g = warm.loc + u @ warm.root.mT
    reference = warm(g)
    change = leaves.log_prob(g, reference) - leaves.marginal.log_prob(g, reference, leaves.steps)
    usable = change.isfinite()
    if usable.sum() <= terms:
        return RegressedLeaves(leaves, warm, u.new_zeros(terms), math.inf)
    design, change = _terms(u)[usable], change[usable]
    basis, upper = torch.linalg.qr(design)
    loads = basis.mT @ change
    coefficients = torch.linalg.solve_triangular(upper, loads.unsqueeze(-1), upper=True)
    # What the polynomial of all other points leaves at each.
    left = (change - basis @ loads) / (1 - basis.square().sum(-1))
    return RegressedLeaves(
        leaves, warm, coefficients.squeeze(-1), float(left.square().mean() ** 0.5)
    )


def _terms(u: Tensor) -> Tensor:
    """The terms of a quadratic polynomial, of shape ``(*, terms)``."""
    u = u.clamp(-FARTHEST, FARTHEST)
    first, second = torch.triu_indices(u.shape[-1], u.shape[-1], device=u.device)
    return torch.cat([torch.ones_like(u[..., :1]), u, u[..., first] * u[..., second]], -1)
