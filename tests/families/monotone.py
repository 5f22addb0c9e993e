"""Cases of the monotone family."""

from __future__ import annotations

from collections.abc import Callable

import pyroflows as pf
from pyroflows.transforms import Transform, Univariate

TRANSFORMS: dict[str, Callable[[], Transform]] = {}
FLOWS: dict[str, Callable[[], pf.Flow]] = {}
UNIVARIATES: dict[str, Univariate] = {}
MOVED: set[str] = set()
AFFINE: set[str] = set()
EXEMPT: dict[str, dict[str, str]] = {}
