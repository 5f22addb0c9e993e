"""Sizes that all cases share."""

from __future__ import annotations

from typing import Any

from pyroflows.nn import mlp

#: Features of an event, entries of a context, and the networks of a conditioner.
D, C = 3, 2
NET: dict[str, Any] = {"network": mlp((8, 8))}
#: The same where networks are special.
HIDDEN: dict[str, Any] = {"hidden": (8, 8)}
