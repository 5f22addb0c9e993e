"""Flows: transforms over a base, that are distributions when called."""

from .autoregressive import BNAF, BPF, IAF, MAF, NAF, SOSPF, UNAF, AutoregressiveFlow
from .bayesian import BayesianFlow, bayesian
from .coupling import NICE, CouplingFlow, FlowPlusPlus, Glow, RealNVP
from .flow import Flow
from .layered import (
    FFJORD,
    LayeredFlow,
    PlanarFlow,
    RadialFlow,
    ResidualFlow,
    SylvesterFlow,
)
from .options import MIXINGS, FlowOptions
from .spline import NSF

__all__ = [
    "BNAF",
    "BPF",
    "FFJORD",
    "IAF",
    "MAF",
    "MIXINGS",
    "NAF",
    "NICE",
    "NSF",
    "SOSPF",
    "UNAF",
    "AutoregressiveFlow",
    "BayesianFlow",
    "CouplingFlow",
    "Flow",
    "FlowOptions",
    "FlowPlusPlus",
    "Glow",
    "LayeredFlow",
    "PlanarFlow",
    "RadialFlow",
    "RealNVP",
    "ResidualFlow",
    "SylvesterFlow",
    "bayesian",
]
