"""Cases of the residual family."""

from __future__ import annotations

from collections.abc import Callable

import pyroflows as pf
from pyroflows.transforms import Transform
from pyroflows.transforms.residual import Residual
from pyroflows.univariate import Univariate

from .sizes import HIDDEN, C, D

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "residual": lambda: Residual(D, **HIDDEN),
    "residual-context": lambda: Residual(D, C, **HIDDEN),
}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "flow-residual-context": lambda: pf.Flow(
        [Residual(D, C, **HIDDEN), Residual(D, C, **HIDDEN).inv]
    ),
}
UNIVARIATES: dict[str, Univariate] = {}
MOVED: set[str] = set()
AFFINE: set[str] = set()
VARIANTS: set[str] = {
    "residual",
    "flow-residual-context",
}
EXEMPT: dict[str, dict[str, str]] = {}
