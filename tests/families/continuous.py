"""Cases of the continuous family."""

from __future__ import annotations

from collections.abc import Callable

import pyroflows as pf
from pyroflows.transforms import Transform
from pyroflows.transforms.continuous import ContinuousFlow
from pyroflows.univariate import Univariate

from .sizes import HIDDEN, C, D

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "continuous": lambda: ContinuousFlow(D, solver="gbs", steps=3, **HIDDEN),
    "continuous-context": lambda: ContinuousFlow(D, C, solver="gbs", steps=3, **HIDDEN),
}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "flow-continuous-context": lambda: pf.Flow(
        [ContinuousFlow(D, C, solver="gbs", steps=3, **HIDDEN)]
    ),
}
UNIVARIATES: dict[str, Univariate] = {}
MOVED: set[str] = set()
AFFINE: set[str] = set()
VARIANTS: set[str] = {
    "continuous",
    "flow-continuous-context",
}
EXEMPT: dict[str, dict[str, str]] = {}
