"""The integral of small blocks of locals by few nodes and a smooth correction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributions.quadrature import quasi_normal
from .leaves import COUNTS, DEVIATION, Leaves
from .marginal_mode import MarginalMode
from .warm_reference import WarmReference

__all__ = ["RegressedLeaves", "regress_leaves"]

# Points a coefficient and beyond, and their spread in whitened units.
POINTS_A_TERM, MORE_POINTS, SPREAD = 2, 10, 1.2
# The polynomial is taken no further from the mode, in whitened units along an axis.
FARTHEST = 4.0
# The mode of Laplace's approximation is moved by no more whitened units.
NEAR = 1.0


class RegressedLeaves:
    r"""The log density of a model's globals by few nodes and a correction.

    .. math:: \log p(g) \approx \log p_{\text{few}}(g) + q(u), \quad u = L^{-1} (g - g^*)

    However far Laplace's approximation, or an integral by few nodes, is off, its error changes
    slowly with the globals: a quadratic polynomial :math:`q` of them leaves some thousandths. So a
    value costs from a tenth to a half of one by enough nodes.

    Args:
        leaves: The integrals by enough nodes.
        base: Those by few; one node is Laplace's approximation.
        warm: The reference of the locals, whose whitened globals are the polynomial's.
        coefficients: Those of the polynomial, of shape ``(terms,)``.
        error: The standard deviation of what the polynomial leaves at points that it has not seen.
    """

    def __init__(
        self,
        leaves: Leaves,
        base: Leaves,
        warm: WarmReference,
        coefficients: Tensor,
        error: float,
    ) -> None:
        self.leaves, self.base, self.warm = leaves, base, warm
        self.coefficients, self.error = coefficients, error

    @property
    def settled(self) -> bool:
        """Whether the nodes and the polynomial are known to suffice."""
        return self.leaves.settled and self.error < DEVIATION

    def log_prob(self, g: Tensor, reference: Tensor) -> Tensor:
        """As :meth:`pyroflows.guides.leaves.Leaves.log_prob`."""
        correction = _terms(self.warm.whiten(g)) @ self.coefficients.to(g)
        return self.base.log_prob(g, reference) + correction

    def move_mode(self, mode: MarginalMode) -> MarginalMode | None:
        r"""Where the mode of Laplace's approximation goes by the correction.

        With the linear and the quadratic part of the polynomial, :math:`b` and :math:`C`, it is
        :math:`u = (I - 2 C)^{-1} b`, and the covariance :math:`(I - 2 C)^{-1}`.

        Args:
            mode: The mode of Laplace's approximation, by which globals are whitened.

        Returns:
            The mode; ``None`` if it is far away, or if the polynomial corrects more nodes than one.
        """
        features = len(mode.loc)
        linear, bends = self.coefficients[1:].split([features, features * (features + 1) // 2])
        first, second = torch.triu_indices(features, features)
        bend = torch.zeros(features, features).to(bends)
        bend[first, second] = bends
        precision = torch.eye(features).to(bend) - bend - bend.mT
        root, failed = torch.linalg.cholesky_ex(precision)
        if self.base.nodes.count > 1 or bool(failed):
            return None
        move = torch.cholesky_solve(linear.unsqueeze(-1), root).squeeze(-1)
        if float(move.norm()) > NEAR:
            return None
        covariance = torch.cholesky_inverse(root)
        widened = mode.root @ torch.linalg.cholesky(covariance)
        loc = mode.loc + mode.root @ move
        return mode._replace(loc=loc, root=widened, reference=self.warm(loc))

    def sample(
        self, g: Tensor, reference: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`pyroflows.guides.leaves.Leaves.sample`, by enough nodes."""
        return self.leaves.sample(g, reference, noise)


def regress_leaves(leaves: Leaves, warm: WarmReference, seed: int = 0) -> RegressedLeaves:
    """Regresses the error of few nodes on the globals.

    One node is tried first, then more, until the polynomial leaves less than .02.

    Args:
        leaves: The integrals.
        warm: The reference of the locals.
        seed: Seed of the points at which integrals are taken, two for each coefficient and ten.

    Returns:
        The density; not :attr:`RegressedLeaves.settled` if no polynomial is near the integrals.

    Reference:
        Allen, "The relationship between variable selection and data augmentation and a method for
        prediction", 1974, https://doi.org/10.1080/00401706.1974.10489157
    """
    features = leaves.marginal.features
    terms = _terms(torch.zeros(1, features)).shape[-1]
    u = SPREAD * quasi_normal(POINTS_A_TERM * terms + MORE_POINTS, features, seed).to(warm.root)
    g = warm.loc + u @ warm.root.mT
    reference = warm(g)
    values = leaves.log_prob(g, reference)
    counts = [count for count in COUNTS if count < leaves.nodes.count]
    for count in [1, *counts]:
        base = Leaves(leaves.marginal, count, leaves.steps)
        coefficients, error = _regress(_terms(u), values - base.log_prob(g, reference))
        if error < DEVIATION:
            break
    return RegressedLeaves(leaves, base, warm, coefficients, error)


def _regress(design: Tensor, values: Tensor) -> tuple[Tensor, float]:
    """The coefficients, and the standard deviation of what those of all other points leave at each
    point."""
    usable = values.isfinite()
    design, values = design[usable], values[usable]
    if len(values) <= design.shape[-1]:
        return design.new_zeros(design.shape[-1]), math.inf
    basis, upper = torch.linalg.qr(design)
    loads = (basis.mT @ values).unsqueeze(-1)
    coefficients = torch.linalg.solve_triangular(upper, loads, upper=True).squeeze(-1)
    left = (values - design @ coefficients) / (1 - basis.square().sum(-1))
    return coefficients, float(left.square().mean().sqrt())


def _terms(u: Tensor) -> Tensor:
    """The terms of a quadratic polynomial, of shape ``(*, terms)``."""
    u = u.clamp(-FARTHEST, FARTHEST)
    first, second = torch.triu_indices(u.shape[-1], u.shape[-1], device=u.device)
    return torch.cat([torch.ones_like(u[..., :1]), u, u[..., first] * u[..., second]], -1)
