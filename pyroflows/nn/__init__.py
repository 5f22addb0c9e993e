"""Conditioner networks: plain torch modules that know nothing of flows."""

from .mlp import MLP

__all__ = ["MLP"]
