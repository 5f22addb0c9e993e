"""The flows of the ladder."""

from __future__ import annotations

from ..flows import Flow, RealNVP
from ..transforms import Elementwise, Transform
from ..univariate import MonotoneNetwork, SumOfSquares

__all__ = ["flow_of_fit", "wide_flow_of_fit"]


def flow_of_fit(features: int) -> Flow | Transform:
    """Makes the flow of the ladder, whose networks grow linearly, to follow a funnel further."""
    if features == 1:
        return Elementwise(SumOfSquares(), features)
    return RealNVP(features, hidden_features=(32, 32), mixing=None)


def wide_flow_of_fit(features: int) -> Flow | Transform:
    """Makes the flow for posteriors that :func:`flow_of_fit` was not enough for."""
    if features == 1:
        return Elementwise(MonotoneNetwork(), features)
    return RealNVP(features, transforms=12, hidden_features=(64, 64), mixing=None)
