"""How flows are trained: on a log density, and on data."""

from . import objectives, processes
from .checkpoint import Checkpoint
from .learned_likelihood import LearnedLikelihood, fit_likelihood
from .likelihood import DensityReport, fit_density
from .loop import LoopOptions, TrainingReport
from .training import train

__all__ = [
    "Checkpoint",
    "DensityReport",
    "LearnedLikelihood",
    "LoopOptions",
    "TrainingReport",
    "fit_density",
    "fit_likelihood",
    "objectives",
    "processes",
    "train",
]
