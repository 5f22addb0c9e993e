"""Linear algebra of a batch of matrices, of which some may have no factorisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._compat import (
    ERROR_CHECK,
    FACTORISATIONS_OF_FINITE,
    FACTORISATIONS_WITH_INFO,
    TorchDispatchMode,
    tree_map_only,
)

__all__ = ["NanWhereSingular"]


class NanWhereSingular(TorchDispatchMode):
    """Lets a factorisation that fails return NaN for its matrix, so that one matrix that has none
    does not end the evaluation of a whole batch.

    It stands below differentiation and ``vmap``, where all that torch has for one factorisation
    comes down to one operation, and so do the factorisations that gradients need.

    Example:
        >>> matrices = torch.stack([torch.eye(2), torch.zeros(2, 2)])
        >>> with NanWhereSingular():
        ...     torch.linalg.cholesky(matrices).diagonal(dim1=-2, dim2=-1)
        tensor([[1., 1.],
                [nan, nan]])
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _SAFE.get(func, func)(*args, **(kwargs or {}))


def _by_info(factorise: Callable[..., Any]) -> Callable[..., Any]:
    """Reads from the last result, ``info``, for which matrices a factorisation has failed."""

    def safe(*args: Any, **kwargs: Any) -> Any:
        *results, info = factorise(*args, **kwargs)
        return (*_nan_unless(info == 0, tuple(results)), info)

    return safe


def _of_finite(factorise: Callable[..., Any]) -> Callable[..., Any]:
    """Puts the unit matrix in the place of matrices that are not finite, for which iterations do
    not converge."""

    def safe(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        finite = matrix.isfinite().all(-1).all(-1)
        return _nan_unless(finite, factorise(_unit_unless(finite, matrix), *args, **kwargs))

    return safe


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    factor, info = torch.ops.aten.linalg_cholesky_ex.default(matrix, upper=upper)
    return _nan_unless(info == 0, factor)


def _cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    regular = (factor.diagonal(dim1=-2, dim2=-1) != 0).all(-1)
    inverse = torch.ops.aten.cholesky_inverse.default(_unit_unless(regular, factor), upper)
    return _nan_unless(regular, inverse)


def _unit_unless(condition: Tensor, matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape[-2:]
    unit = torch.eye(rows, columns, dtype=matrix.dtype, device=matrix.device)
    return torch.where(condition[..., None, None], matrix, unit)


def _nan_unless(condition: Tensor, results: Any) -> Any:
    """Puts NaN into the results, numbers or vectors or matrices, of some elements of a batch."""

    def mask(result: Tensor) -> Tensor:
        # Pivots are integers, and vectors that nobody asked for are empty.
        if not result.numel() or not (result.is_floating_point() or result.is_complex()):
            return result
        trailing = (1,) * (result.dim() - condition.dim())
        return result.where(condition.reshape(condition.shape + trailing), torch.nan)

    return tree_map_only(Tensor, mask, results)


# An error that is checked for is in the results already.
_SAFE: dict[Any, Callable[..., Any]] = {
    ERROR_CHECK: lambda *args, **kwargs: None,
    torch.ops.aten.cholesky.default: _cholesky,
    torch.ops.aten.cholesky_inverse.default: _cholesky_inverse,
    **{operation: _by_info(operation) for operation in FACTORISATIONS_WITH_INFO},
    **{operation: _of_finite(operation) for operation in FACTORISATIONS_OF_FINITE},
}
