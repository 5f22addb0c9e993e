"""The compiler without its side effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["compiled"]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile``, which in a process's first call turns off the arguments' validation in all distributions."""
    validate = torch.distributions.Distribution._validate_args
    try:
        return torch.compile(function, **options)
    finally:
        torch.distributions.Distribution.set_default_validate_args(validate)
