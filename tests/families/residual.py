"""Cases of the residual family."""

from __future__ import annotations

from collections.abc import Callable

import pyroflows as pf
from pyroflows.transforms import Transform
from pyroflows.transforms.residual import Residual
from pyroflows.univariate import Univariate

from .sizes import NET, C, D

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "residual": lambda: Residual(D, **NET),
    "residual-context": lambda: Residual(D, C, **NET),
}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "flow-residual-context": lambda: pf.Flow([Residual(D, C, **NET), Residual(D, C, **NET).inv]),
}
UNIVARIATES: dict[str, Univariate] = {}
MOVED: set[str] = set()
AFFINE: set[str] = set()
EXEMPT: dict[str, dict[str, str]] = {}
