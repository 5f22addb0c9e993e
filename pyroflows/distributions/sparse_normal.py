"""Normal distributions with a sparse precision matrix, many at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .elimination import Elimination, Level

__all__ = ["SparseNormal"]

# The smallest pivot of a repaired matrix.
SMALLEST = 1e-8


class _Factor(NamedTuple):
    """The factor of a level: its pivots, of shape ``(*, n)``, and its links divided by them."""

    pivots: Tensor
    ratios: Tensor


class SparseNormal:
    r"""Normal distributions with sparse precision matrices of one pattern.

    .. math:: \mathcal N(P^{-1} h,\, P^{-1})

    Entries are eliminated level by level, :math:`P = L D L^\top`, without a loop over entries:
    a level takes a few operations on all its entries at once. All is differentiable by values and
    information. A precision that is not positive definite gives NaN, for its own distribution only,
    unless it is repaired.

    Args:
        elimination: The order in which entries are eliminated.
        values: The values of the precisions in the slots of ``elimination``: the diagonal, then
            the edges. Of shape ``(*, size + edges)``.
        repaired: Whether a matrix that is not positive definite is replaced by one that is: pivots
            and the eigenvalues of the core are taken by their sizes. This suits the steps of a
            search, not a density, and reads values on the host.

    Attributes:
        log_det: The log-determinants of the precisions, of shape ``(*)``.

    Example:
        >>> pair = Elimination(2, torch.tensor([[0, 1]]))
        >>> normal = SparseNormal(pair, torch.tensor([2.0, 2.0, 1.0]))
        >>> normal.log_det.exp(), normal.solve(torch.tensor([2.0, 1.0]))
        (tensor(3.), tensor([1., 0.]))
    """

    def __init__(self, elimination: Elimination, values: Tensor, repaired: bool = False) -> None:
        self.elimination, self.repaired = elimination, repaired
        self._factors: list[_Factor] = []
        left = pad(values, (0, 1))
        for level in elimination.levels:
            left = self._eliminate(level, left)
        wide = elimination.wide
        links = left[..., wide.links]
        self._wide = self._divide(left[..., wide.pivots], links)
        self._root = self._factorise(left[..., wide.slots] - links.mT @ self._wide.ratios)
        diagonal = self._root.diagonal(dim1=-2, dim2=-1).square()
        pivots = [factor.pivots for factor in self._factors]
        self.log_det = torch.cat([*pivots, self._wide.pivots, diagonal], -1).log().sum(-1)

    @property
    def size(self) -> int:
        """Entries of a vector."""
        return self.elimination.size

    @property
    def core_root(self) -> Tensor:
        r"""The lower root :math:`R` of the precision of the core, with all others integrated out,
        of shape ``(*, c, c)``.

        The core is last to be eliminated, so :meth:`draw_centred` makes its entries
        :math:`R^{-\top} \epsilon` of their own noise alone.
        """
        return self._root

    def _eliminate(self, level: Level, values: Tensor) -> Tensor:
        """The values that are left after a level, whose factor is kept."""
        links = values[..., level.links]
        factor = self._divide(values[..., level.pivots], links)
        self._factors.append(factor)
        first, second = torch.triu_indices(links.shape[-1], links.shape[-1], device=values.device)
        change = links[..., first] * factor.ratios[..., second]
        kept = values[..., level.kept]
        return kept.index_add(-1, level.targets.flatten(), -change.flatten(-2))

    def _divide(self, pivots: Tensor, links: Tensor) -> _Factor:
        if self.repaired:
            pivots = pivots.abs().clamp_min(SMALLEST)
        return _Factor(pivots, links / pivots.unsqueeze(-1))

    def _factorise(self, core: Tensor) -> Tensor:
        """The lower root of the core."""
        root, failed = torch.linalg.cholesky_ex(core)
        if self.repaired and failed.any():
            eigenvalues, vectors = torch.linalg.eigh(core.nan_to_num())
            widths = eigenvalues.abs().clamp_min(SMALLEST)
            positive = (vectors * widths.unsqueeze(-2)) @ vectors.mT
            root, failed = torch.linalg.cholesky_ex(
                positive.where(failed[..., None, None] > 0, core)
            )
        return root.where(failed[..., None, None] == 0, torch.nan)

    def solve(self, h: Tensor) -> Tensor:
        r"""The means :math:`P^{-1} h`.

        Args:
            h: Information vectors, of shape ``(*, size)``.

        Returns:
            Tensor of shape ``(*, size)``.
        """
        own = []
        for level, factor in self._by_level:
            mine = h[..., level.entries]
            own.append(mine / factor.pivots)
            change = factor.ratios * mine.unsqueeze(-1)
            rest = pad(h[..., level.rest], (0, 1))
            h = rest.index_add(-1, level.neighbours.flatten(), -change.flatten(-2))[..., :-1]
        wide, mine = self.elimination.wide, h[..., self.elimination.wide.entries]
        core = h[..., wide.core] - _times(self._wide.ratios.mT, mine)
        solved = torch.cholesky_solve(core.unsqueeze(-1), self._root).squeeze(-1)
        return self._complete(solved, mine / self._wide.pivots, own)

    def draw_centred(self, noise: Tensor) -> Tensor:
        r"""Draws of :math:`\mathcal N(0, P^{-1})`.

        Args:
            noise: Standard normal numbers, of shape ``(*, size)``.

        Returns:
            Tensor of shape ``(*, size)``; a linear function of the noise.
        """
        own = []
        for level, factor in self._by_level:
            own.append(noise[..., level.entries] * factor.pivots.rsqrt())
            noise = noise[..., level.rest]
        wide = self.elimination.wide
        mine = noise[..., wide.entries] * self._wide.pivots.rsqrt()
        core = noise[..., wide.core].unsqueeze(-1)
        drawn = torch.linalg.solve_triangular(self._root.mT, core, upper=True).squeeze(-1)
        return self._complete(drawn, mine, own)

    def whiten(self, x: Tensor) -> Tensor:
        r"""The noise of which :meth:`draw_centred` makes given points.

        Args:
            x: Points of shape ``(*, size)``.

        Returns:
            Tensor of shape ``(*, size)``, whose squares add up to :math:`x^\top P x`.
        """
        own = []
        for level, factor in self._by_level:
            mine, x = x[..., level.entries], x[..., level.rest]
            near = pad(x, (0, 1))[..., level.neighbours]
            own.append((mine + (factor.ratios * near).sum(-1)) * factor.pivots.sqrt())
        wide = self.elimination.wide
        mine, core = x[..., wide.entries], x[..., wide.core]
        mine = (mine + _times(self._wide.ratios, core)) * self._wide.pivots.sqrt()
        noise = torch.cat([mine, _times(self._root.mT, core)], -1)[..., wide.order]
        for level, mine in reversed(list(zip(self.elimination.levels, own, strict=True))):
            noise = torch.cat([mine, noise], -1)[..., level.order]
        return noise

    def pull_back(self, slope: Tensor) -> Tensor:
        """The gradients by the noise of which :meth:`draw_centred` makes points.

        Args:
            slope: The gradients by the points, of shape ``(*, size)``.

        Returns:
            Tensor of shape ``(*, size)``.
        """
        return self.whiten(self.solve(slope))

    def log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        """The log density.

        Args:
            x: Points of shape ``(*, size)``.
            mean: The means, of shape ``(*, size)``.

        Returns:
            Tensor of shape ``(*)``.
        """
        quadratic = self.whiten(x - mean).square().sum(-1)
        return 0.5 * (self.log_det - quadratic - self.size * math.log(2 * math.pi))

    def _complete(self, core: Tensor, wide: Tensor, own: list[Tensor]) -> Tensor:
        """The vector, from the entries of the core and what all others have of their own."""
        last = wide - _times(self._wide.ratios, core)
        x = torch.cat([last, core], -1)[..., self.elimination.wide.order]
        for (level, factor), mine in reversed(list(zip(self._by_level, own, strict=True))):
            near = pad(x, (0, 1))[..., level.neighbours]
            mine = mine - (factor.ratios * near).sum(-1)
            x = torch.cat([mine, x], -1)[..., level.order]
        return x

    @property
    def _by_level(self) -> list[tuple[Level, _Factor]]:
        return list(zip(self.elimination.levels, self._factors, strict=True))


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)
