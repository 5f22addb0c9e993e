"""Products with one matrix, or with one per point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._compat import in_forward_mode, transforming
from .._saturation import limit


def multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """The product of one matrix, or one per point, with vectors in the last dimension."""
    return x @ matrix.mT if matrix.dim() == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of at least 32 bits: torch factorises and solves in no 16 bits."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)


def solve_columns(
    matrix: Tensor, columns: Tensor, upper: bool = False, unit_diagonal: bool = False
) -> Tensor:
    """Solves ``matrix x = columns`` for a triangular matrix, or for a batch of them."""
    solved = torch.linalg.solve_triangular(
        *widened(matrix, columns), upper=upper, unitriangular=unit_diagonal
    )
    return solved.to(columns.dtype)


def solve_triangle(
    matrix: Tensor,
    y: Tensor,
    upper: bool = False,
    transposed: bool = False,
    unit_diagonal: bool = False,
) -> Tensor:
    """Solves ``matrix x = y`` for one triangular matrix, or its transpose, or for one per point.

    A solution that outgrows its dtype stops at the root of the largest number, and the gradients of
    other points are not harmed.
    """
    if transposed:
        matrix, upper = matrix.mT, not upper
    if transforming() or torch.jit.is_tracing() or in_forward_mode():
        return _substitute(matrix, y, upper, unit_diagonal)
    return _Substitution.apply(matrix, y, upper, unit_diagonal)


def _substitute(matrix: Tensor, y: Tensor, upper: bool, unit_diagonal: bool) -> Tensor:
    if matrix.dim() == 2:
        columns = y.reshape(-1, y.shape[-1]).mT
        solved = solve_columns(matrix, columns, upper, unit_diagonal).mT.reshape(y.shape)
    else:
        solved = solve_columns(matrix, y.unsqueeze(-1), upper, unit_diagonal).squeeze(-1)
    most = limit(y.dtype, 0.5)
    return solved.nan_to_num(nan=most, posinf=most, neginf=-most)


class _Substitution(torch.autograd.Function):
    r"""The solution :math:`x` of :math:`A x = y`.

    Its gradients are :math:`A^{-\top} g` in :math:`y` and :math:`-A^{-\top} g x^\top` in
    :math:`A`.

    Torch's own backward pass multiplies by the solution before it is mended.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, y: Tensor, upper: bool, unit_diagonal: bool) -> Tensor:
        x = _substitute(matrix, y, upper, unit_diagonal)
        ctx.save_for_backward(matrix, x)
        ctx.upper, ctx.unit_diagonal, ctx.shape = upper, unit_diagonal, y.shape
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, x = ctx.saved_tensors
        grad_y = solve_triangle(
            matrix, grad, ctx.upper, transposed=True, unit_diagonal=ctx.unit_diagonal
        )
        grad_matrix = None
        if ctx.needs_input_grad[0]:
            width = x.shape[-1]
            if matrix.dim() == 2:
                full = -grad_y.reshape(-1, width).mT @ x.reshape(-1, width)
            else:
                full = (-grad_y.unsqueeze(-1) * x.unsqueeze(-2)).sum_to_size(matrix.shape)
            skipped = int(ctx.unit_diagonal)
            grad_matrix = full.triu(skipped) if ctx.upper else full.tril(-skipped)
        return grad_matrix, grad_y.sum_to_size(ctx.shape), None, None
