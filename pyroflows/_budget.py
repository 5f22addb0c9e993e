"""How large an object may be that is made as a file says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["at_most", "within_budget"]

#: What takes as much memory as its arguments say.
MAKERS = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.rand, torch.randn),
    *(torch.arange, torch.linspace),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
}
_most: ContextVar[int | None] = ContextVar("most", default=None)


@contextlib.contextmanager
def at_most(entries: int) -> Iterator[None]:
    """Bounds what is made under :func:`within_budget` in the block.

    Args:
        entries: How many entries new tensors may have in all.
    """
    token = _most.set(entries)
    try:
        yield
    finally:
        _most.reset(token)


def within_budget() -> contextlib.AbstractContextManager[Any]:
    """Ends with a ``ValueError`` what makes more than :func:`at_most` allows.

    Example:
        >>> with at_most(10), within_budget():
        ...     torch.zeros(10**12)
        Traceback (most recent call last):
        ValueError: its parts are larger than its numbers
    """
    most = _most.get()
    return contextlib.nullcontext() if most is None else _Budget(most)


class _Budget(TorchFunctionMode):
    """Counts the entries of new tensors, before they take memory."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.left = entries

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS:
            abstract = {**kwargs, "device": "meta"}
            abstract.pop("generator", None)
            # Empty ones count too, so that a loop comes to an end.
            self.left -= max(1, func(*args, **abstract).numel())
            if self.left < 0:
                raise ValueError("its parts are larger than its numbers")
        return func(*args, **kwargs)
