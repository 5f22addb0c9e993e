"""Studies of a method over many data sets, and of many methods on one."""

from .calibrate import calibrate
from .calibration import Calibration
from .fits import SVIFit
from .simulation import Simulation, Simulator

__all__ = ["Calibration", "SVIFit", "Simulation", "Simulator", "calibrate"]
