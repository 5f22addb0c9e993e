"""Monotone maps of the line, which the structures take as a part."""

from .affine import Affine, Scale, Shift
from .base import Univariate
from .logistic import LogisticMixture
from .monotone import MonotoneIntegral, MonotoneNetwork
from .polynomial import Bernstein, SumOfSquares
from .splines import CircularSpline, LinearRationalSpline, RationalQuadraticSpline
from .tails import GPDTail

__all__ = [
    "Affine",
    "Bernstein",
    "CircularSpline",
    "GPDTail",
    "LinearRationalSpline",
    "LogisticMixture",
    "MonotoneIntegral",
    "MonotoneNetwork",
    "RationalQuadraticSpline",
    "Scale",
    "Shift",
    "SumOfSquares",
    "Univariate",
]
