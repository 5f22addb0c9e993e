"""Hamiltonian trajectories of many chains at once."""

from .hamiltonian import hmc
from .polishing import polish

__all__ = ["hmc", "polish"]
