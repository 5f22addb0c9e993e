"""Products with one matrix, or with one per point."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """The product of one matrix, or one per point, with vectors in the last dimension."""
    return x @ matrix.mT if matrix.dim() == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)


def solve_triangle(
    matrix: Tensor,
    y: Tensor,
    upper: bool = False,
    transposed: bool = False,
    unit_diagonal: bool = False,
) -> Tensor:
    """Solves ``matrix x = y``, or with the transposed matrix, for one triangular matrix or one per point."""
    if transposed:
        matrix, upper = matrix.mT, not upper
    if matrix.dim() == 2:
        columns = y.reshape(-1, y.shape[-1]).mT
        return torch.linalg.solve_triangular(
            matrix, columns, upper=upper, unitriangular=unit_diagonal
        ).mT.reshape(y.shape)
    return torch.linalg.solve_triangular(
        matrix, y.unsqueeze(-1), upper=upper, unitriangular=unit_diagonal
    ).squeeze(-1)
