"""Flows as automatic guides."""

from .auto import AutoFlow
from .mixture import AutoMixture

__all__ = ["AutoFlow", "AutoMixture"]
