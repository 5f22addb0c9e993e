"""A polynomial in the place of a log density whose values are dear."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..distributions.quadrature import quasi_normal
from ..model.base import Density

__all__ = ["PolynomialDensity", "count_terms"]

# All monomials up to this degree, for so many features; beyond, mixed ones are quadratic at most.
QUARTIC_FEATURES, CUBIC_FEATURES = 3, 6
DEGREE = 4
# Whitened distance beyond which the polynomial goes on along straight lines, their least slope
# downwards, and a slope upwards at which the normal's is taken.
RADIUS, LEAST_SLOPE, CLIMBS = 5.0, 0.5, 1.0
# Points further out would bend a polynomial that is not used there.
FARTHEST = 7.0
# Weights of points: the root of the density, but for this least weight at exp(-DEEPEST).
DEEPEST, LEAST_WEIGHT = 12.0, 1e-3
RIDGE = 1e-4
# Draws by which moments are found, and how often.
DRAWS, ROUNDS = 4096, 2
# Points so far below the best, in nats, say nothing about the bulk.
TOO_DEEP = 40.0


class PolynomialDensity(Density):
    r"""The normal approximation of a log density at its mode, times the exponential of a polynomial.

    .. math:: \log \tilde p(g) = P(u) - \tfrac12 |u|^2, \qquad u = L^{-1} (g - \mu),

    within a ball of five standard deviations; beyond, it goes on along straight lines from the
    mode, so that an exponential tail is one, and always falls. The coefficients of :math:`P` are
    found by weighted least squares from values of the log density.

    Args:
        loc: The mode :math:`\mu`, of shape ``(features,)``.
        root: The lower root :math:`L` of the covariance there, of shape ``(features, features)``.

    Example:
        >>> density = PolynomialDensity(torch.zeros(2), torch.eye(2))
        >>> g = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> true = lambda g: -(g[:, 0] ** 2) / 2 - (g[:, 1] - g[:, 0] ** 2 / 4) ** 2 / 2
        >>> error = density.fit(g, true(g))
        >>> value, slope = density.value_and_grad(torch.ones(1, 2))
        >>> bool((value - true(torch.ones(1, 2))).abs() < 0.01)
        True
    """

    def __init__(self, loc: Tensor, root: Tensor) -> None:
        self.features = len(loc)
        self.initial = loc
        self.loc, self.root = loc.double(), root.double()
        exponents = _monomials(self.features)
        self._factors = torch.tensor(
            [[*term, *[self.features] * (DEGREE - len(term))] for term in exponents]
        ).to(loc.device)
        self._degrees = torch.tensor([float(len(term)) for term in exponents]).to(self.loc)
        self.coefficients = torch.zeros(len(exponents)).to(self.loc)

    def whiten(self, g: Tensor) -> Tensor:
        """The whitened units of points of shape ``(n, features)``."""
        offset = (g.to(self.loc) - self.loc).mT
        return torch.linalg.solve_triangular(self.root, offset, upper=False).mT

    def unwhiten(self, u: Tensor) -> Tensor:
        """The points at whitened units of shape ``(n, features)``."""
        return self.loc + u.to(self.loc) @ self.root.mT

    def fit(self, g: Tensor, values: Tensor) -> float:
        """Finds the coefficients.

        Args:
            g: Points of shape ``(n, features)``.
            values: The log density at these points, of shape ``(n,)``; those that are not finite
                or too far below the best are left out.

        Returns:
            The weighted root mean square of the errors, in nats.
        """
        top = values.nan_to_num(nan=-torch.inf, posinf=-torch.inf).amax()
        usable = values.isfinite() & (values > top - TOO_DEEP)
        usable &= self.whiten(g).norm(dim=-1) < FARTHEST
        u, values = self.whiten(g[usable]), values[usable].to(self.loc)
        weights = ((values - top).clamp_min(-DEEPEST) / 4).exp() + LEAST_WEIGHT
        design = self._terms(u) * weights.unsqueeze(-1)
        # The constant is the best value, so that the ridge shrinks to the normal about the mode.
        wanted = (values - top + u.square().sum(-1) / 2) * weights
        ridge = RIDGE * torch.eye(design.shape[-1]).to(design)
        stacked = torch.cat([wanted, wanted.new_zeros(len(ridge))])
        solution = torch.linalg.lstsq(torch.cat([design, ridge]), stacked.unsqueeze(-1)).solution
        self.coefficients = solution.squeeze(-1)
        error = design @ self.coefficients - wanted
        self.coefficients[0] += top
        return float((error.square().sum() / weights.square().sum()).sqrt())

    def find_normal(self) -> tuple[Tensor, Tensor, float]:
        """The normal distribution with the mean and the covariance of this one.

        Returns:
            The mean, the lower root of the covariance, and the share of effective draws among those
            of the normal distribution, if they are weighted.
        """
        u = quasi_normal(DRAWS, self.features).to(self.loc)
        mean, root = u.new_zeros(self.features), torch.eye(self.features).to(u)
        for _ in range(ROUNDS):
            weights = self._weigh(u, mean, root)
            draws = mean + u @ root.mT
            mean = weights @ draws
            offset = draws - mean
            root, failed = torch.linalg.cholesky_ex(offset.mT @ (weights.unsqueeze(-1) * offset))
            if failed:
                return self.loc, self.root, 0.0
        share = 1 / self._weigh(u, mean, root).square().sum() / DRAWS
        return self.unwhiten(mean), self.root @ root, float(share.nan_to_num(0.0))

    @torch.no_grad()
    def _weigh(self, noise: Tensor, mean: Tensor, root: Tensor) -> Tensor:
        """The weights of draws of a normal distribution of whitened units, which sum to one."""
        log_p = self._evaluate(mean + noise @ root.mT)
        return (log_p + noise.square().sum(-1) / 2).softmax(0)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        points = z.detach().reshape(-1, self.features)
        with torch.enable_grad():
            u = self.whiten(points).requires_grad_()
            values = self._evaluate(u)
            (slopes,) = torch.autograd.grad(values.sum(), u)
        gradients = torch.linalg.solve_triangular(self.root.mT, slopes.mT, upper=True).mT
        return (
            values.detach().to(z.dtype).reshape(z.shape[:-1]),
            gradients.to(z.dtype).reshape(z.shape),
        )

    def _evaluate(self, u: Tensor) -> Tensor:
        """The log density at whitened points of shape ``(n, features)``."""
        distance = u.square().sum(-1).clamp_min(1e-18).sqrt()
        held = distance.clamp_max(RADIUS)
        terms = self._terms(u * (held / distance).unsqueeze(-1))
        within = terms @ self.coefficients - held.square() / 2
        # A monomial of degree d grows along a ray by d / r of itself.
        slope = terms @ (self._degrees * self.coefficients) / held - held
        # A polynomial that climbs at the edge is not to be relied upon beyond.
        falls = slope.clamp_max(-LEAST_SLOPE).where(slope < CLIMBS, -RADIUS)
        return within + falls * (distance - held)

    def _terms(self, u: Tensor) -> Tensor:
        """The monomials, of shape ``(n, terms)``."""
        padded = torch.cat([u, torch.ones_like(u[:, :1])], -1)
        return padded[:, self._factors].prod(-1)


def count_terms(features: int) -> int:
    """How many coefficients a polynomial of so many features has."""
    return len(_monomials(features))


def _monomials(features: int) -> list[tuple[int, ...]]:
    """The monomials, as the numbers of their factors."""
    mixed = 2 + (features <= CUBIC_FEATURES) + (features <= QUARTIC_FEATURES)
    terms: list[tuple[int, ...]] = []
    for degree in range(DEGREE + 1):
        if degree <= mixed:
            terms += itertools.combinations_with_replacement(range(features), degree)
        else:
            terms += [(i,) * degree for i in range(features)]
    return terms
