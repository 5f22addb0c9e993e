"""Inference: from a model to a posterior, and whether to trust it."""

from .density import DensityReport, fit_density
from .fit import fit_posterior
from .log_density import LogDensity
from .posterior import Posterior, load_posterior
from .verdict import Verdict

__all__ = [
    "DensityReport",
    "LogDensity",
    "Posterior",
    "Verdict",
    "fit_density",
    "fit_posterior",
    "load_posterior",
]
