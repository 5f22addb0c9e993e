"""Noise that is almost normal, and skew."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["SkewNoise"]

# Parameters of single draws are kept within these bounds, so that none goes astray.
MOST_SKEW, MOST_SCALE, FARTHEST = 1.5, 1.5, 3.0
# Sizes are no more than so many times their median.
LARGEST = 2.0
# The ridge of the regression: so many draws without a slope.
RIDGE = 1.0
# The first entries of an expansion of sqrt(1 + n^2) in Hermite polynomials.
_POINTS, _WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()
MEAN = float(_WEIGHTS @ np.sqrt(1 + _POINTS**2))
BEND = float(_WEIGHTS @ (np.sqrt(1 + _POINTS**2) * (_POINTS**2 - 1))) / 2


class SkewNoise(torch.nn.Module):
    r"""A distribution near the standard normal one, fitted by the slopes of its log density.

    Where a posterior is narrow in the units of its third derivatives, its log density in whitened
    noise is that of a standard normal distribution plus a small polynomial of degree three. The map
    that makes such noise of normal numbers is quadratic then, entry by entry:

    .. math::

        \epsilon_i = a_i + \sum_j \bigl(b_{ij} n_j + c_{ij} (n_j^2 - 1)\bigr)
            + e^{s_i + \sum_j t_{ij} n_j}\, f_{k_i}(n_i),
        \qquad f_k(n) = \sinh(\operatorname{arsinh} n + k) - \text{const},

    where :math:`j` runs over a few entries before :math:`i`. Each term of the slope of the log
    density is one of the map, divided by its degree in :math:`n_i` and one, so that the map is
    found by linear regression. Third derivatives hardly depend on what else the density depends on,
    but its widths do: all parameters are those of entries as wide as usual, times the powers of the
    widths that belong to derivatives.

    Args:
        near: For each entry those before it, of shape ``(size, p)``; padded with -1.

    Reference:
        Jones, Pewsey, "Sinh-arcsinh distributions", 2009, https://doi.org/10.1093/biomet/asp053

    Example:
        >>> noise = SkewNoise(torch.full((1, 0), -1))
        >>> n = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> wide = torch.ones(1000, 1).double()
        >>> for _ in range(3):  # the logarithm of a gamma variable of shape 10, times its root
        ...     epsilon, _ = noise.transform(n, wide)
        ...     noise.regress(n, wide, 10**0.5 * (1 - (epsilon / 10**0.5).exp()))
        >>> median = noise.transform(torch.zeros(1, 1).double(), wide[:1])[0]
        >>> bool((median + 0.107).abs() < 0.02)
        True
    """

    near: Tensor
    sizes: Tensor
    shifts: Tensor
    log_scales: Tensor
    skews: Tensor

    def __init__(self, near: Tensor) -> None:
        super().__init__()
        size, count = near.shape
        self.register_buffer("near", near)
        self.register_buffer("sizes", torch.ones(size).double())
        self.register_buffer("shifts", torch.zeros(size, 1 + 2 * count).double())
        self.register_buffer("log_scales", torch.zeros(size, 1 + count).double())
        self.register_buffer("skews", torch.zeros(size, 1).double())

    def transform(self, n: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Makes noise of standard normal numbers.

        Args:
            n: Standard normal numbers, of shape ``(*, size)``.
            sizes: The widths of the entries, of shape ``(*, size)``.

        Returns:
            The noise, of the same shape, and the log determinant of the map, of shape ``(*)``.
        """
        shifts, scales, skews = self._terms(n, sizes)
        shift = (shifts * self.shifts.to(n)).sum(-1)
        log_scale = (scales * self.log_scales.to(n)).sum(-1).clamp(-MOST_SCALE, MOST_SCALE)
        skew = (skews * self.skews.to(n)).sum(-1).clamp(-MOST_SKEW, MOST_SKEW)
        far = (1 + n.square()).sqrt()
        skewed = n * skew.cosh() + (far - MEAN) * skew.sinh()
        slope = skew.cosh() + n / far * skew.sinh()
        return shift + log_scale.exp() * skewed, (log_scale + slope.log()).sum(-1)

    def regress(self, n: Tensor, sizes: Tensor, slopes: Tensor) -> None:
        """Moves the parameters to where the noise has the slopes of another density, to first
        order.

        Args:
            n: Standard normal numbers, of shape ``(m, size)``.
            sizes: The widths of the entries, of shape ``(m, size)``.
            slopes: The gradients of the other log density at the noise made of them, of shape
                ``(m, size)``.
        """
        if not self.skews.any():
            self.sizes.copy_(sizes.median(0).values)
        terms = self._terms(n, sizes)
        degrees = [n.new_ones(()), n, n.square() - 1]
        design = torch.cat(
            [term * degree[..., None] for term, degree in zip(terms, degrees, strict=True)], -1
        )
        wanted = self._pull_back(n, sizes, slopes) + n
        ridge = RIDGE * torch.eye(design.shape[-1]).to(n).expand(n.shape[-1], -1, -1)
        stacked = torch.cat([design.movedim(0, 1), ridge], 1)
        wanted = torch.cat([wanted.mT, n.new_zeros(ridge.shape[:2])], 1)
        found = torch.linalg.lstsq(stacked, wanted.unsqueeze(-1)).solution.squeeze(-1)
        shifts, scales, skews = found.split([term.shape[-1] for term in terms], -1)
        self.shifts.add_(shifts)
        self.log_scales.add_(scales / 2)
        self.skews.add_(skews / (3 * BEND))

    @torch.enable_grad()
    def _pull_back(self, n: Tensor, sizes: Tensor, slopes: Tensor) -> Tensor:
        """The gradients by the normal numbers."""
        n = n.detach().requires_grad_()
        epsilon, log_det = self.transform(n, sizes)
        (gradient,) = torch.autograd.grad((epsilon * slopes).sum() + log_det.sum(), n)
        return gradient

    def _terms(self, n: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What shifts, logarithms of scales and skews are linear combinations of, of shape
        ``(*, size, terms)``."""
        own = (sizes / self.sizes.to(n)).clamp(max=LARGEST).expand_as(n)
        there = (self.near >= 0).to(n)
        near, wide = n[..., self.near] * there, own[..., self.near]
        bends, own = (near.square() - 1) * there, own.unsqueeze(-1)
        shifts = torch.cat([torch.ones_like(own), wide * near, wide.square() * bends], -1) * own
        held = near.clamp(-FARTHEST, FARTHEST)
        scales = torch.cat([torch.ones_like(own), wide * held], -1) * own.square()
        return shifts, scales, own**3
