"""Studies of a method over many data sets, and of many methods on one."""

from .calibrate import calibrate
from .calibration import Calibration
from .comparison import Experiment
from .experiment import experiment
from .fits import SVIFit
from .nuts import NUTSFit

__all__ = [
    "Calibration",
    "Experiment",
    "NUTSFit",
    "SVIFit",
    "calibrate",
    "experiment",
]
