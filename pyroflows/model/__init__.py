"""A Pyro model as a log density of many points at once; it knows no flow."""

from .density import LogDensity

__all__ = [
    "LogDensity",
]
