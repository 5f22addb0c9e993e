"""Affine maps of many entries, whose cost is linear in their number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..nn.network import mlp
from ._linalg import widened
from .parametric import Parametric

__all__ = ["DENSE", "RANK", "TRIANGULAR", "LowRankAffine", "LowRankRoot"]

#: Above so many entries no covariance is factorised, and above so many none is written down.
DENSE, TRIANGULAR = 64, 256
#: Directions in which covariances of many entries are more than their diagonal.
RANK = 24
# Rounds of principal factors, and the least share of a variance that they leave.
ROUNDS, LEAST_UNIQUE = 8, 1e-3


class LowRankRoot(NamedTuple):
    r"""A root of a covariance, :math:`R = D\, (I + Q (\operatorname{diag}(r) - I)\, Q^\top)`.

    :math:`D` is diagonal and :math:`Q` has a few orthonormal columns, so that products, solutions
    and determinants are linear in the number of entries. There may be several roots at once.

    Attributes:
        scale: The diagonal of :math:`D`, of shape ``(*, features)``.
        basis: The matrix :math:`Q`, of shape ``(*, features, rank)``.
        stretch: The numbers :math:`r > 0`, of shape ``(*, rank)``.

    Example:
        >>> root = LowRankRoot(torch.ones(2), torch.tensor([[0.0], [1.0]]), torch.tensor([3.0]))
        >>> root.multiply(torch.ones(1, 2)), root.log_det.exp()
        (tensor([[1., 3.]]), tensor(3.))
    """

    scale: Tensor
    basis: Tensor
    stretch: Tensor

    @classmethod
    def diagonal(cls, scale: Tensor) -> LowRankRoot:
        """The root of a diagonal covariance, with random directions.

        Args:
            scale: Standard deviations, of shape ``(features,)``.
        """
        n = len(scale)
        noise = torch.randn(n, min(RANK, n), generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(noise.to(scale)).Q
        return cls(scale, basis, torch.ones_like(basis[0]))

    @classmethod
    def of_factor(cls, factor: Tensor, least: float = 1.0) -> LowRankRoot:
        r"""A root of about the same covariance, by principal factors.

        Some rounds take the directions of largest variance in units of :math:`D`, and for
        :math:`D` the standard deviations that they leave.

        Args:
            factor: A matrix :math:`A` of shape ``(features, m)``; the covariance is
                :math:`A A^\top`.
            least: The least variance, in units of :math:`D^2`, that is told from noise.
        """
        variance = factor.square().sum(-1)
        variance = variance.where(variance > 0, 1.0)
        root = cls.diagonal(variance.sqrt())
        lacking = max(0, root.basis.shape[-1] - factor.shape[-1])
        factor = torch.nn.functional.pad(factor, (0, lacking))
        for _ in range(ROUNDS):
            root = root._renew(factor, variance, least)
        return root

    def _renew(self, factor: Tensor, variance: Tensor, least: float) -> LowRankRoot:
        standard = factor / self.scale.unsqueeze(-1)
        basis = torch.linalg.qr(standard @ (standard.mT @ self.basis)).Q
        left, singular, _ = torch.linalg.svd(basis.mT @ standard, full_matrices=False)
        basis, stretch = basis @ left, singular.clamp(min=1.0)
        stretch = stretch.where(singular.square() > least, 1.0)
        explained = self.scale.square() * (basis.square() @ (stretch.square() - 1))
        scale = (variance - explained).clamp(min=LEAST_UNIQUE * variance).sqrt()
        return LowRankRoot(scale, basis, stretch)

    def multiply(self, x: Tensor) -> Tensor:
        """Products :math:`R x` with vectors of shape ``(*, m, features)``."""
        return self.scale.unsqueeze(-2) * self._turn(x, self.stretch - 1)

    def multiply_transposed(self, x: Tensor) -> Tensor:
        r"""Products :math:`R^\top x` with vectors of shape ``(*, m, features)``."""
        return self._turn(self.scale.unsqueeze(-2) * x, self.stretch - 1)

    def solve(self, y: Tensor) -> Tensor:
        """Solutions :math:`R^{-1} y` for vectors of shape ``(*, m, features)``."""
        return self._turn(y / self.scale.unsqueeze(-2), 1 / self.stretch - 1)

    @property
    def log_det(self) -> Tensor:
        """The logarithm of the determinant, of shape ``(*)``."""
        return self.scale.log().sum(-1) + self.stretch.log().sum(-1)

    def triangle(self) -> Tensor:
        """The lower-triangular root of the covariance of one root, of shape ``(features,
        features)``, whose cost is quadratic."""
        # What is left of Q' C Q when the entries so far are known.
        left = (self.stretch.square() - 1).diag()
        lower = torch.zeros(len(self.scale), len(self.scale)).to(self.scale)
        for j in range(len(self.scale)):
            column = self.basis[j:] @ (left @ self.basis[j])
            width = (1 + column[0]).sqrt()
            lower[j:, j] = column / width
            lower[j, j] = width
            seen = left @ self.basis[j] / width
            left = left - torch.outer(seen, seen)
        return self.scale.unsqueeze(-1) * lower

    def pick(self, index: Tensor | int) -> LowRankRoot:
        """Some of several roots, by indices or a mask."""
        return LowRankRoot(*(part[index] for part in self))

    def to(self, like: Tensor) -> LowRankRoot:
        """The root in the dtype and on the device of a tensor."""
        return LowRankRoot(*(part.to(like) for part in self))

    def _turn(self, x: Tensor, change: Tensor) -> Tensor:
        return x + (x @ self.basis * change.unsqueeze(-2)) @ self.basis.mT


class LowRankAffine(Parametric):
    r"""Affine map :math:`y = \mu + D\, (I + U V^\top)(x + \delta)`, linear in the number of entries.

    :math:`D` is diagonal and positive, :math:`U` and :math:`V` have a few columns each. The offset
    :math:`\delta` is learned in the map's own units, so that a step on it does not depend on those
    of :math:`y`. It starts at the identity.

    Args:
        features: Entries of the vector.

    Raises:
        ValueError: If the number is not positive.

    Example:
        >>> t = LowRankAffine(100)
        >>> t.set(torch.ones(100), LowRankRoot.diagonal(2 * torch.ones(100)))
        >>> t(torch.ones(100)).detach().unique()
        tensor([3.])
    """

    vectors_only = True
    loc: Tensor
    offset: Parameter
    log_scale: Parameter
    left: Parameter
    right: Parameter

    def __init__(self, features: int) -> None:
        super().__init__(features)
        basis = LowRankRoot.diagonal(torch.ones(self.features)).basis
        self.start(
            mlp(),
            offset=torch.zeros(self.features),
            log_scale=torch.zeros(self.features),
            left=torch.zeros_like(basis),
            right=basis,
        )
        self.register_buffer("loc", torch.zeros(self.features))

    @torch.no_grad()
    def set(self, loc: Tensor, root: LowRankRoot) -> None:
        """Sets the map to :math:`y = loc + R x`.

        Args:
            loc: Tensor of shape ``(features,)``.
            root: The root :math:`R`, of the same number of entries.
        """
        self.loc.copy_(loc)
        self.offset.zero_()
        self.log_scale.copy_(root.scale.log())
        self.left.copy_(root.basis * (root.stretch - 1))
        self.right.copy_(root.basis)

    @torch.no_grad()
    def centre(self) -> None:
        """Puts the offset that was learned into the units of :math:`y`; the map stays the same."""
        zero = torch.zeros_like(self.loc).unsqueeze(0)
        self.loc.copy_(self.forward_and_log_det(zero)[0][0])
        self.offset.zero_()

    def _core(self) -> Tensor:
        """The matrix whose determinant is that of :math:`I + U V^T`."""
        rank = self.left.shape[-1]
        return torch.eye(rank).to(self.left) + self.right.mT @ self.left

    def _log_det(self) -> Tensor:
        return self.log_scale.sum() + torch.linalg.slogdet(self._core())[1]

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = x + self.offset
        y = self.loc + self.log_scale.exp() * (x + (x @ self.right) @ self.left.mT)
        return y, self._log_det().expand(y.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        standard = (y - self.loc) * (-self.log_scale).exp()
        within = _solve(self._core(), standard @ self.right)
        x = standard - within @ self.left.mT - self.offset
        return x, -self._log_det().expand(x.shape[:-1])

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x, context)
        with torch.no_grad():
            # J = D (I + U V'), so the new score solves (I + V U') D s = score.
            score = score.expand(y.shape)
            within = _solve(self._core().mT, score @ self.left)
            pushed = (score - within @ self.right.mT) * (-self.log_scale).exp()
        return y, log_det, pushed


def _solve(matrix: Tensor, y: Tensor) -> Tensor:
    """Solves a few equations for vectors of shape ``(*, rank)``."""
    columns = y.reshape(-1, y.shape[-1]).mT
    return torch.linalg.solve(*widened(matrix, columns)).mT.reshape(y.shape).to(y)
