"""Sizes that all cases share."""

from __future__ import annotations

from typing import Any

#: Features of an event, entries of a context, and the networks of a conditioner.
D, C = 3, 2
NET: dict[str, Any] = {"hidden_features": (8, 8)}
