"""Operations on tensors of several precisions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._compat import is_mutating, tree_map_only
from .batching import written

__all__ = ["Promoting", "in_double"]


class Promoting(TorchFunctionMode):
    """Lets all operations take operands of single and double precision together, in double.

    Torch refuses products of two such matrices, and rounds a double number to the precision of the
    array that it meets. Within, a model whose data are single is evaluated in double precision at a
    point that is double. What is written into a single array is rounded.

    Example:
        >>> import torch
        >>> with Promoting():
        ...     (torch.eye(2).double() @ torch.ones(2)).dtype
        torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        dtypes = {tensor.dtype for tensor in _real_tensors([*args, *given[1].values()])}
        # A tensor that is written to has to stay the same.
        if len(dtypes) > 1 and not is_mutating(func) and written(func, *given) is None:
            given = tree_map_only(Tensor, in_double, given)
        return func(*given[0], **given[1])


def _real_tensors(items: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of real numbers among arguments; a walk over general trees costs more than most
    operations."""
    for item in items:
        if isinstance(item, Tensor):
            if item.is_floating_point():
                yield item
        elif isinstance(item, (list, tuple)):
            yield from _real_tensors(item)


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in double precision; itself if it holds no real numbers."""
    return tensor.double() if tensor.is_floating_point() else tensor
