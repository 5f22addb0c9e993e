"""Flows as distributions of Pyro, and bases for them."""

from .bases import NormalMixture, NormalMixtureBase, StudentTBase, mixture_base, student_t_base
from .flow_distribution import FlowDistribution

__all__ = ["FlowDistribution", "NormalMixture", "NormalMixtureBase", "StudentTBase", "mixture_base", "student_t_base"]
