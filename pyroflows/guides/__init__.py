"""Guides: the contract, and flows as automatic guides."""

from .auto import AutoFlow
from .guide import BaseSpace, Guide, Part, from_spec
from .mixture import AutoMixture
from .whitened import WhitenedFlow

__all__ = ["AutoFlow", "AutoMixture", "BaseSpace", "Guide", "Part", "WhitenedFlow", "from_spec"]
