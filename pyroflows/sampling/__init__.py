"""Hamiltonian trajectories of many chains at once."""

from .hamiltonian import hmc
from .polishing import drift, polish

__all__ = ["drift", "hmc", "polish"]
