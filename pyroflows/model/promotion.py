"""Operations on tensors of several precisions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._compat import tree_leaves, tree_map_only

__all__ = ["Promoting"]


class Promoting(TorchFunctionMode):
    """Lets matrix products and all else take operands of single and double precision together.

    Torch promotes sums and products of numbers, but refuses those of matrices. A model whose data
    are single can so be evaluated at a point in double precision.

    Example:
        >>> with Promoting():
        ...     (torch.eye(2).double() @ torch.ones(2)).dtype
        torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        dtypes = {leaf.dtype for leaf in tree_leaves(given) if _is_array(leaf)}
        if len(dtypes) > 1:
            given = tree_map_only(Tensor, _in_double, given)
        return func(*given[0], **given[1])


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if _is_array(tensor) else tensor
