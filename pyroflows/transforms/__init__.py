"""Invertible maps from base to event, each with a known Jacobian."""

from .autoregressive import AffineAutoregressive, Autoregressive
from .base import Compose, Conditioned, Inverse, Transform
from .block_autoregressive import BlockAutoregressive
from .continuous import ContinuousFlow
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, coupling_masks
from .elementwise import Elementwise, Rescale
from .glow import GlowStep
from .linear import Householder, LowerTriangularAffine, LULinear, MatrixExponential, Orthogonal, Permute, Reverse
from .mixture import LogisticMixture
from .monotone import MonotoneIntegral, MonotoneNetwork
from .normalization import ActNorm, BatchNorm
from .planar import Planar, Radial, Sylvester
from .polynomial import Bernstein, SumOfSquares
from .residual import Residual
from .splines import CircularSpline, LinearRationalSpline, RationalQuadraticSpline
from .standardize import Standardize
from .tails import LOFT, GPDTail
from .univariate import Affine, Scale, Shift, Univariate

__all__ = [
    "LOFT",
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineAutoregressive",
    "AffineCoupling",
    "Autoregressive",
    "BatchNorm",
    "Bernstein",
    "BlockAutoregressive",
    "CircularSpline",
    "Compose",
    "Conditioned",
    "ContinuousFlow",
    "Coupling",
    "Elementwise",
    "GPDTail",
    "GlowStep",
    "Householder",
    "Inverse",
    "LULinear",
    "LinearRationalSpline",
    "LogisticMixture",
    "LowerTriangularAffine",
    "MatrixExponential",
    "MonotoneIntegral",
    "MonotoneNetwork",
    "Orthogonal",
    "Permute",
    "Planar",
    "Radial",
    "RationalQuadraticSpline",
    "Rescale",
    "Residual",
    "Reverse",
    "Scale",
    "Shift",
    "Standardize",
    "SumOfSquares",
    "Sylvester",
    "Transform",
    "Univariate",
    "coupling_masks",
]
