"""A Pyro model as a log density of many points at once; it knows no flow."""

from .base import Density, Evaluation
from .density import LogDensity
from .minibatch import log_density_of
from .sites import LatentSite, SiteKind

__all__ = [
    "Density",
    "Evaluation",
    "LatentSite",
    "LogDensity",
    "SiteKind",
    "log_density_of",
]
