"""Conditioner networks: plain torch modules that know nothing of flows."""

from .made import MADE
from .mlp import MLP

__all__ = ["MADE", "MLP"]
