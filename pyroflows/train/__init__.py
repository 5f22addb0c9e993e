"""How flows are trained: on a log density, and on data."""

from . import objectives, processes
from .checkpoint import Checkpoint
from .likelihood import DensityReport, fit_density
from .training import TrainingReport, train

__all__ = [
    "Checkpoint",
    "DensityReport",
    "TrainingReport",
    "fit_density",
    "objectives",
    "processes",
    "train",
]
