"""Rotations: by Cayley's map, and as products of reflections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_size
from ..nn.network import Network, mlp
from ._linalg import multiply, solve_triangle, widened
from .linear import LinearMap

__all__ = ["Householder", "Orthogonal"]


class Orthogonal(LinearMap):
    r"""A rotation by Cayley's map, :math:`y = Q x` with :math:`Q = (I - A)^{-1} (I + A)`.

    :math:`A = R - R^\top` is skew-symmetric, :math:`R` strictly lower-triangular and learned or the
    output of a network of the context. Every rotation without the eigenvalue -1 is such a
    :math:`Q`, and the others are limits of them. Volumes are kept. Both directions cost one matrix
    product, after one solve per call. It starts at the identity.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive.

    Reference:
        Helfrich, Willmott, Ye, "Orthogonal recurrent neural networks with scaled Cayley transform",
        2018, https://arxiv.org/abs/1707.09520

    Example:
        >>> t = Orthogonal(2)
        >>> _ = torch.nn.init.ones_(t.raw)
        >>> t(torch.tensor([1.0, 0.0])).detach()  # a quarter turn
        tensor([0., 1.])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        self.start(network, raw=torch.zeros(self.features, self.features))

    def _matrix(self, raw: Tensor) -> Tensor:
        lower = raw.tril(-1)
        skew = lower - lower.mT
        eye = torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)
        # I - A has no singular value below one, so there is no error to check for, which would wait for the device.
        return torch.linalg.solve_ex(*widened(eye - skew, eye + skew))[0].to(raw.dtype)

    def _multiply(self, raw: Tensor, x: Tensor) -> Tensor:
        return multiply(self._matrix(raw), x)

    def _solve(self, raw: Tensor, y: Tensor) -> Tensor:
        return multiply(self._matrix(raw).mT, y)

    def _solve_transposed(self, raw: Tensor, score: Tensor) -> Tensor:
        return self._multiply(raw, score)


class Householder(LinearMap):
    r"""A product of reflections, :math:`y = H_1 H_2 \cdots H_K x` with :math:`H_k = I - 2 v_k v_k^\top / |v_k|^2`.

    Its matrix is orthogonal, so volumes are kept, and its inverse is the same product in the
    opposite order. The product is never formed: with unit vectors as columns of :math:`V` it is
    :math:`I - V S^{-1} V^\top`, where :math:`S` has the entries of :math:`V^\top V` above its
    diagonal and one half on it. Both directions cost :math:`2DK` operations per point. An even
    number of reflections is a rotation, and ``features`` of them give every rotation. It starts at
    the identity: reflections 1 and 2 are equal, 3 and 4, and so on.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``; with them the vectors are the output
            of a network.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        reflections: Even number :math:`K` of reflections; by default enough for every rotation.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive or ``reflections`` is odd.

    Reference:
        Tomczak, Welling, "Improving variational auto-encoders using Householder flow", 2016,
        https://arxiv.org/abs/1611.09630

    Example:
        >>> Householder(3)(torch.tensor([1.0, 2.0, 3.0])).detach()
        tensor([1., 2., 3.])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        reflections: int | None = None,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        count = (
            2 * max(self.features // 2, 1)
            if reflections is None
            else check_size("reflections", reflections)
        )
        if count % 2:
            raise ValueError(
                f"Expected reflections to be even, so that they can start as equal pairs; got {count}."
            )
        # Along the axes two equal reflections undo each other without a rounding.
        index = torch.arange(count, device="cpu") // 2 % self.features
        self.start(network, raw=torch.eye(self.features)[index.tolist()])

    def _multiply(self, raw: Tensor, x: Tensor) -> Tensor:
        return reflect(raw, x)

    def _solve(self, raw: Tensor, y: Tensor) -> Tensor:
        return reflect(raw, y, transposed=True)

    def _solve_transposed(self, raw: Tensor, score: Tensor) -> Tensor:
        return self._multiply(raw, score)


def reflect(vectors: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """The product of reflections along ``vectors``, the last applied first, or its transpose, times ``x``."""
    units, mixing = accumulate(vectors)
    weights = solve_triangle(mixing, multiply(units, x), upper=True, transposed=transposed)
    return x - multiply(units.mT, weights)


def accumulate(vectors: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factors of a product of reflections, :math:`H_1 \cdots H_K = I - V S^{-1} V^\top`.

    Args:
        vectors: Tensor of shape ``(*, K, features)``.

    Returns:
        :math:`V^\top` of shape ``(*, K, features)`` and the upper-triangular :math:`S` of shape
        ``(*, K, K)``.

    Reference:
        Joffrain, Low, Quintana-Ortí, van de Geijn, van Zee, "Accumulating Householder
        transformations, revisited", 2006, https://doi.org/10.1145/1141885.1141886
    """
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    units = vectors / norm.clamp(min=torch.finfo(vectors.dtype).tiny)
    half = torch.full_like(units[..., 0], 0.5)
    return units, (units @ units.mT).triu(1) + torch.diag_embed(half)
