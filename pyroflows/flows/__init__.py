"""Flows: transforms over a base, that are distributions when called."""

from .flow import Flow
from .options import MIXINGS
from .presets import (
    BNAF,
    BPF,
    FFJORD,
    IAF,
    MAF,
    NAF,
    NICE,
    NSF,
    SOSPF,
    UNAF,
    FlowPlusPlus,
    Glow,
    PlanarFlow,
    RadialFlow,
    RealNVP,
    ResidualFlow,
    SylvesterFlow,
)

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
    "Flow",
    "FlowPlusPlus",
    "Glow",
    "PlanarFlow",
    "RadialFlow",
    "RealNVP",
    "ResidualFlow",
    "SylvesterFlow",
]
