"""Plain arrays into ArviZ, tables and pictures; it imports no other room."""

from __future__ import annotations

import importlib
from types import ModuleType

from . import arviz_bridge, statistics

__all__ = [
    "arviz_bridge",
    "plots",
    "statistics",
]


def __getattr__(name: str) -> ModuleType:
    # Matplotlib is imported with the first picture, and not with the package.
    if name == "plots":
        return importlib.import_module(".plots", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
