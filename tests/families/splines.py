"""Cases of the splines family."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch

import pyroflows as pf
from pyroflows.transforms import Coupling, Elementwise, Transform
from pyroflows.univariate import Univariate
from pyroflows.univariate.splines import (
    CircularSpline,
    LinearRationalSpline,
    RationalQuadraticSpline,
)

from .sizes import NET, C, D

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "coupling-rational-quadratic": lambda: Coupling(
        RationalQuadraticSpline(5, bound=2.0), D, **NET
    ),
    "coupling-rational-quadratic-context": lambda: Coupling(RationalQuadraticSpline(), D, C, **NET),
    "elementwise-rational-quadratic-context": lambda: Elementwise(
        RationalQuadraticSpline(4), D, C, **NET
    ),
    "coupling-linear-rational-context": lambda: Coupling(LinearRationalSpline(4), D, C, **NET),
    "coupling-circular": lambda: Coupling(CircularSpline(4), D, **NET),
    "coupling-circular-context": lambda: Coupling(
        CircularSpline(4), D, C, mask=[True, False, True], **NET
    ),
}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "splines": lambda: pf.Flow(
        [
            Coupling(RationalQuadraticSpline(4), D, **NET),
            Coupling(LinearRationalSpline(4), D, mask=[False, True, True], **NET),
            Elementwise(RationalQuadraticSpline(4), D),
        ]
    ),
    "splines-circular-base-uniform": lambda: pf.Flow(
        [Coupling(CircularSpline(4), D, C, **NET), Elementwise(CircularSpline(4), D)],
        base=dist.Uniform(-torch.pi * torch.ones(D), torch.pi).to_event(1),
    ),
}
UNIVARIATES: dict[str, Univariate] = {
    "rational-quadratic": RationalQuadraticSpline(bound=3.0),
    "linear-rational": LinearRationalSpline(4),
    "circular": CircularSpline(4),
}
MOVED: set[str] = set()
AFFINE: set[str] = set()
VARIANTS: set[str] = {
    "coupling-rational-quadratic-context",
    "coupling-circular",
    "elementwise-rational-quadratic",
    "elementwise-linear-rational",
    "elementwise-circular",
    "splines",
}
_TURNED = "angles end at pi: what lies beyond is turned back into the circle"
EXEMPT: dict[str, dict[str, str]] = {
    "test_holds_in_the_tails": {
        name: _TURNED for name in (*TRANSFORMS, "elementwise-circular") if "circular" in name
    },
}
