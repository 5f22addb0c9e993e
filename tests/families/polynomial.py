"""Cases of the polynomial family, and of mixtures."""

from __future__ import annotations

from collections.abc import Callable

import pyroflows as pf
from pyroflows.transforms import Coupling, Elementwise, Transform
from pyroflows.univariate import Bernstein, LogisticMixture, SumOfSquares, Univariate

from .sizes import NET, C, D

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "elementwise-sum-of-squares-context": lambda: Elementwise(SumOfSquares(2, 2), D, C, **NET),
    "coupling-bernstein-context": lambda: Coupling(Bernstein(4), D, C, **NET),
    "coupling-mixture-context": lambda: Coupling(LogisticMixture(3), D, C, **NET),
}
FLOWS: dict[str, Callable[[], pf.Flow]] = {}
UNIVARIATES: dict[str, Univariate] = {
    "sum-of-squares": SumOfSquares(),
    "bernstein": Bernstein(),
    "mixture": LogisticMixture(4),
}
MOVED: set[str] = set()
AFFINE: set[str] = set()
VARIANTS: set[str] = {
    "elementwise-sum-of-squares",
    "elementwise-bernstein",
    "elementwise-mixture",
}
EXEMPT: dict[str, dict[str, str]] = {}
