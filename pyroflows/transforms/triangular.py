"""The affine map with a triangular matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .._checks import check_tensor
from ..nn.network import Network, mlp
from ._linalg import multiply, solve_triangle
from .parametric import Parametric

__all__ = ["LowerTriangularAffine"]


def compose_affine(
    inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The offset and the matrix of two affine maps one after the other, each given by its own."""
    (loc, matrix), (outer_loc, outer_matrix) = inner, outer
    return outer_loc + outer_matrix @ loc, outer_matrix @ matrix


class LowerTriangularAffine(Parametric):
    r"""Affine map with a lower-triangular matrix, :math:`y = \mu + L x`, :math:`L_{ii} = e^{d_i} > 0`.

    From a standard normal base it gives every multivariate normal; a guide uses it to whiten. It
    starts at the identity. With a context, :math:`\mu`, :math:`d` and the rest of :math:`L` are the
    output of a network.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> t = LowerTriangularAffine(2)
        >>> t.set(loc=torch.ones(2), scale_tril=torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> t(torch.ones(2)).detach()
        tensor([3., 3.])
    """

    vectors_only = True
    loc: Parameter
    log_diag: Parameter
    lower: Parameter

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        n = self.features
        self.start(
            network,
            loc=torch.zeros(n),
            log_diag=torch.zeros(n),
            lower=torch.zeros(n, n),
        )

    @torch.no_grad()
    def set(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Sets the map to ``y = loc + scale_tril x``.

        Args:
            loc: Tensor of shape ``(features,)``.
            scale_tril: Lower-triangular tensor of shape ``(features, features)`` with a positive
                diagonal.

        Raises:
            TypeError: If an argument is not a floating-point tensor.
            ValueError: If the map has a context, or if an argument is not as described.
        """
        if self.context_features is not None:
            raise ValueError(
                "Expected a LowerTriangularAffine without context; this one is set by its network."
            )
        n = self.features
        for name, given, dim in (("loc", loc, 1), ("scale_tril", scale_tril, 2)):
            if check_tensor(name, given, (n,) * dim).dim() != dim:
                raise ValueError(
                    f"Expected {name} of shape {(n,) * dim}; got {tuple(given.shape)}."
                )
        diagonal = scale_tril.diagonal()
        if not bool((diagonal > 0).all()):
            raise ValueError(
                f"Expected scale_tril with a positive diagonal; got {diagonal.tolist()}."
            )
        if bool(scale_tril.triu(1).any()):
            raise ValueError(
                "Expected scale_tril to be lower-triangular; got one with entries above the diagonal."
            )
        self.loc.copy_(loc)
        self.log_diag.copy_(diagonal.log())
        self.lower.copy_(scale_tril.tril(-1))

    @torch.no_grad()
    def loc_and_scale_tril(self) -> tuple[Tensor, Tensor]:
        """The offset, of shape ``(features,)``, and the matrix, of shape ``(features, features)``, without gradient.

        Raises:
            ValueError: If the map has a context.
        """
        if self.context_features is not None:
            raise ValueError(
                "Expected a LowerTriangularAffine without context; this one is set by its network."
            )
        loc, _, matrix = self._loc_matrix(None)
        return loc.clone(), matrix

    def _loc_matrix(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        loc, log_diag, lower = self.tables_for(context)
        return loc, log_diag, lower.tril(-1) + torch.diag_embed(log_diag.exp())

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        loc, log_diag, matrix = self._loc_matrix(context)
        y = multiply(matrix, x) + loc
        return y, log_diag.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        loc, log_diag, matrix = self._loc_matrix(context)
        x = solve_triangle(matrix, y - loc)
        return x, -log_diag.sum(-1).expand(x.shape[:-1])

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x, context)
        with torch.no_grad():
            # J = L, so the new score solves L' s = score.
            pushed = solve_triangle(
                self._loc_matrix(context)[2], score.expand(y.shape), transposed=True
            )
        return y, log_det, pushed
