"""Plain arrays into ArviZ, tables and pictures; it imports no other room."""

from . import arviz_bridge, plots

__all__ = [
    "arviz_bridge",
    "plots",
]
