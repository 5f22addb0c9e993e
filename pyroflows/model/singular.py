"""Linear algebra of a batch of matrices, of which some may have no factorisation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from traceback import walk_stack
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

__all__ = ["Factorisations", "NanWhereSingular", "survives_failure"]


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


class Factorisations(TorchDispatchMode):
    """Notes from where the factorisations of a run are called, and lets one of them fail.

    Args:
        failed: From where factorisations have failed before. If given, the first one that is called
            from elsewhere fails.

    Attributes:
        places: From where factorisations have been called, each as the lines of all callers.

    Example:
        >>> with Factorisations() as noted:
        ...     _ = torch.linalg.cholesky(torch.eye(2))
        >>> len(noted.places)
        1
    """

    def __init__(self, failed: Collection[Hashable] | None = None) -> None:
        super().__init__()
        self.places: set[Hashable] = set()
        self.failed = failed
        self.failing: Hashable = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RAISING:
            place = tuple((frame.f_code, line) for frame, line in walk_stack(None))
            self.places.add(place)
            if self.failed is not None and self.failing is None and place not in self.failed:
                self.failing = place
                raise torch.linalg.LinAlgError("The input is singular.")
        return func(*args, **(kwargs or {}))


def survives_failure(run: Callable[[], Any]) -> bool:
    """Whether a function goes on after one of its factorisations has failed.

    Such a function catches the error, to add jitter or to take another matrix, and has a value
    where :class:`NanWhereSingular` gives NaN. Each factorisation fails in a run of its own; those
    that a loop calls from one place are one.

    Args:
        run: The function.

    Returns:
        Whether a run ends without an error though a factorisation has failed.

    Example:
        >>> def run():
        ...     try:
        ...         return torch.linalg.cholesky(torch.eye(2))
        ...     except RuntimeError:
        ...         return torch.eye(2)
        >>> survives_failure(run)
        True
    """
    failed: set[Hashable] = set()
    while True:
        noted = Factorisations(failed)
        try:
            with noted:
                run()
        except Exception:
            if noted.failing is None:
                return False
        else:
            return noted.failing is not None
        failed.add(noted.failing)


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

# Those that raise an error of their own.
_RAISING = _SAFE.keys() - set(FACTORISATIONS_WITH_INFO)
