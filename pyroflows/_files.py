"""Files that are whole or not there."""

from __future__ import annotations

import os
from typing import Any

import torch

__all__ = ["save_whole", "temporary_for"]


def save_whole(state: Any, path: str) -> None:
    """``torch.save`` by way of another file, so that what was at the path stays until the new file is whole.

    Raises:
        OSError: If the file cannot be written; torch's own writer raises ``RuntimeError``.
    """
    temporary = temporary_for(path)
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def temporary_for(path: str) -> str:
    """The file beside a path by way of which this process writes it."""
    return f"{path}.{os.getpid()}.tmp"
