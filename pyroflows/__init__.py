"""Normalizing flows for Pyro: priors, likelihoods, latents and guides that are right, and know when they are not."""

from . import distributions, flows, guides, infer, nn, transforms
from ._version import __version__
from .distributions import FlowDistribution
from .flows import NICE, Flow, RealNVP
from .guides import AutoFlow
from .infer import LogDensity, Posterior, Verdict, fit_posterior, load_posterior
from .transforms import (
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    Compose,
    Coupling,
    Elementwise,
    Inverse,
    LowerTriangularAffine,
    Permute,
    Rescale,
    Reverse,
    Scale,
    Shift,
    Transform,
)

__all__ = [
    "NICE",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "AutoFlow",
    "Compose",
    "Coupling",
    "Elementwise",
    "Flow",
    "FlowDistribution",
    "Inverse",
    "LogDensity",
    "LowerTriangularAffine",
    "Permute",
    "Posterior",
    "RealNVP",
    "Rescale",
    "Reverse",
    "Scale",
    "Shift",
    "Transform",
    "Verdict",
    "__version__",
    "distributions",
    "fit_posterior",
    "flows",
    "guides",
    "infer",
    "load_posterior",
    "nn",
    "transforms",
]
