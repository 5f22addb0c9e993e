"""Invertible maps from base to event, each with a known Jacobian."""

from .base import Compose, Conditioned, Inverse, Transform
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, coupling_masks
from .elementwise import Elementwise, Rescale
from .linear import LowerTriangularAffine, Permute, Reverse
from .univariate import Affine, Scale, Shift, Univariate

__all__ = [
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Compose",
    "Conditioned",
    "Coupling",
    "Elementwise",
    "Inverse",
    "LowerTriangularAffine",
    "Permute",
    "Rescale",
    "Reverse",
    "Scale",
    "Shift",
    "Transform",
    "Univariate",
    "coupling_masks",
]
