"""Flows: a base, a stack of transforms and a support, as one module of Pyro."""

from .flow import Flow
from .presets import NICE, RealNVP

__all__ = ["NICE", "Flow", "RealNVP"]
