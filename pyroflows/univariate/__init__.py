"""Monotone maps of the line, which the structures take as a part."""

from .base import Affine, Scale, Shift, Univariate
from .logistic import LogisticMixture
from .monotone import MonotoneIntegral, MonotoneNetwork
from .polynomial import Bernstein, SumOfSquares
from .splines import CircularSpline, LinearRationalSpline, RationalQuadraticSpline

__all__ = [
    "Affine",
    "Bernstein",
    "CircularSpline",
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
