"""Guides: the contract, and flows as automatic guides."""

from .adapters import as_guide
from .amortized import AutoAmortizedFlow
from .auto import AutoFlow
from .embedded import AmortizedGuide, EmbeddedFlow
from .guide import BaseSpace, Guide, Part, from_spec
from .mixture import AutoMixture
from .structured import AutoStructuredFlow
from .whitened import WhitenedFlow

__all__ = [
    "AmortizedGuide",
    "AutoAmortizedFlow",
    "AutoFlow",
    "AutoMixture",
    "AutoStructuredFlow",
    "BaseSpace",
    "EmbeddedFlow",
    "Guide",
    "Part",
    "WhitenedFlow",
    "as_guide",
    "from_spec",
]
