"""Cases of the planar family."""

from __future__ import annotations

from collections.abc import Callable

import pyroflows as pf
from pyroflows.transforms import Transform
from pyroflows.transforms.planar import Planar, Radial, Sylvester
from pyroflows.univariate import Univariate

from .sizes import NET, C, D

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "planar": lambda: Planar(D),
    "planar-context": lambda: Planar(D, C, **NET),
    "radial": lambda: Radial(D),
    "radial-context": lambda: Radial(D, C, **NET),
    "sylvester": lambda: Sylvester(D),
    "sylvester-context": lambda: Sylvester(D, C, units=2, **NET),
}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "planar-stack": lambda: pf.Flow([Planar(D), Radial(D), Planar(D).inv, Sylvester(D, units=2)]),
}
UNIVARIATES: dict[str, Univariate] = {}
MOVED: set[str] = set()
AFFINE: set[str] = set()
VARIANTS: set[str] = {
    "planar-context",
    "radial",
    "sylvester",
    "planar-stack",
}
EXEMPT: dict[str, dict[str, str]] = {}
