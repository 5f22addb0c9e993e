"""The compiler without its side effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._compat import default_validation

__all__ = ["compiled"]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile``, which in a process's first call turns off the arguments' validation in all distributions."""
    validate = default_validation()
    try:
        return torch.compile(function, **options)
    finally:
        torch.distributions.Distribution.set_default_validate_args(validate)
