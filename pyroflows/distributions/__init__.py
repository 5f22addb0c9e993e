"""Flows as distributions of Pyro, and bases for them."""

from .bases import NormalMixture, NormalMixtureBase, StudentTBase, mixture_base, student_t_base
from .flow import FlowDistribution
from .mixture import FlowMixture

__all__ = [
    "FlowDistribution",
    "FlowMixture",
    "NormalMixture",
    "NormalMixtureBase",
    "StudentTBase",
    "mixture_base",
    "student_t_base",
]
