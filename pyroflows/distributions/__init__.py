"""Flows as distributions of Pyro."""

from .flow_distribution import FlowDistribution

__all__ = ["FlowDistribution"]
