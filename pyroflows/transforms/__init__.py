"""Invertible maps from base to event, each with a known Jacobian."""

from .autoregressive import AffineAutoregressive, Autoregressive
from .base import Conditioned, Inverse, Transform
from .block_autoregressive import BlockAutoregressive
from .compose import Compose
from .continuous import ContinuousFlow
from .coupling import AdditiveCoupling, AffineCoupling, Coupling
from .elementwise import Elementwise, Rescale
from .glow import GlowStep
from .linear import LULinear, MatrixExponential
from .masks import coupling_masks
from .normalization import ActNorm, BatchNorm
from .orthogonal import Householder, Orthogonal
from .permute import Permute, Reverse
from .planar import Planar, Radial, Sylvester
from .residual import Residual
from .standardize import Standardize
from .tails import LOFT
from .triangular import LowerTriangularAffine

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
