"""Flows as automatic guides."""

from .auto import AutoFlow

__all__ = ["AutoFlow"]
