"""A model that is run for many points together must treat each of them alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._compat import is_batched, tree_leaves
from .batching import READINGS, REPLACEMENTS

__all__ = ["Together"]

# Without a dimension they make one number of all points.
_NAMES = ("all", "any", "max", "min", "amax", "amin", "median", "mode", "argmax", "argmin")
_MIXING = {
    getattr(owner, name) for owner in (torch, Tensor) for name in _NAMES if hasattr(owner, name)
}
_TO_MEMORY = {Tensor.numpy, Tensor.__array__, Tensor.tolist}


class Together(TorchFunctionMode):
    """Refuses what would let points decide for each other, in one run of a model for all of them.

    A branch on a latent value, ``x.max()`` over all dimensions, or the reading of a latent value
    into memory takes all points together there; so a model that does it cannot be run in this way.
    Functions of autograd may read their arguments, and what vmap takes apart is one point's.

    Args:
        points: The points, of shape ``(n, features)``.
    """

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self._graded, self._several = torch.is_grad_enabled(), len(points) > 1
        # Kept, so that no identity is used twice.
        self._dependent: dict[int, Tensor] = {id(points): points}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dependent = any(map(self._depends, tree_leaves((args, kwargs))))
        if dependent and self._decides(func, args, kwargs):
            raise RuntimeError("a value that latent sites determine is read for all points at once")
        if func in _TO_MEMORY and not dependent:
            func = REPLACEMENTS[func]  # which lets a graph see that data are read
        result = func(*args, **kwargs)
        if dependent:
            tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
            self._dependent.update((id(tensor), tensor) for tensor in tensors)
        return result

    def _depends(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and (leaf.requires_grad or id(leaf) in self._dependent)

    def _decides(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a function makes one number or decision of a tensor with all points."""
        if torch.is_grad_enabled() != self._graded:
            return False
        read = args[0] if args else kwargs.get("input")
        whole = len(args) <= 1 and not kwargs.keys() & {"dim", "axis", "other"}
        mixes = func in _MIXING and whole and self._several
        return (mixes or func in READINGS) and not is_batched(read)
