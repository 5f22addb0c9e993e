"""``torch.func.vmap`` without a warning that nobody can act on."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["vmap"]


def vmap(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.func.vmap``, silent about operations that torch maps one point at a time.

    Example:
        >>> vmap(torch.sin)(torch.zeros(2))
        tensor([0., 0.])
    """
    mapped = torch.func.vmap(function, **options)

    @functools.wraps(function)
    def silent(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return mapped(*args, **kwargs)

    return silent
