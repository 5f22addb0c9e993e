"""Invertible maps from base to event, each with a known Jacobian."""

from .autoregressive import AffineAutoregressive, Autoregressive
from .base import Compose, Conditioned, Inverse, Transform
from .block_autoregressive import BlockAutoregressive
from .continuous import ContinuousFlow
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, coupling_masks
from .elementwise import Elementwise, Rescale
from .glow import GlowStep
from .linear import (
    Householder,
    LowerTriangularAffine,
    LULinear,
    MatrixExponential,
    Orthogonal,
    Permute,
    Reverse,
)
from .normalization import ActNorm, BatchNorm
from .planar import Planar, Radial, Sylvester
from .residual import Residual
from .standardize import Standardize
from .tails import LOFT

__all__ = [
    "LOFT",
    "ActNorm",
    "AdditiveCoupling",
    "AffineAutoregressive",
    "AffineCoupling",
    "Autoregressive",
    "BatchNorm",
    "BlockAutoregressive",
    "Compose",
    "Conditioned",
    "ContinuousFlow",
    "Coupling",
    "Elementwise",
    "GlowStep",
    "Householder",
    "Inverse",
    "LULinear",
    "LowerTriangularAffine",
    "MatrixExponential",
    "Orthogonal",
    "Permute",
    "Planar",
    "Radial",
    "Rescale",
    "Residual",
    "Reverse",
    "Standardize",
    "Sylvester",
    "Transform",
    "coupling_masks",
]
