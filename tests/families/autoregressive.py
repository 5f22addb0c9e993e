"""Cases of the autoregressive family."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

import pyroflows as pf
from pyroflows.transforms import Transform
from pyroflows.transforms.autoregressive import AffineAutoregressive, Autoregressive
from pyroflows.univariate import Univariate
from pyroflows.univariate.splines import CircularSpline, RationalQuadraticSpline

from .sizes import HIDDEN, C, D

#: Entry 0 depends on entry 2 and nothing else on anything: two stages, and not in the natural order.
GRAPH = [[False, False, True], [False, False, False], [False, False, False]]

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "autoregressive": lambda: AffineAutoregressive(D, **HIDDEN),
    "autoregressive-context": lambda: AffineAutoregressive(D, C, **HIDDEN),
    "autoregressive-forward": lambda: AffineAutoregressive(
        D, order="reversed", fast="forward", **HIDDEN
    ),
    "autoregressive-forward-context": lambda: AffineAutoregressive(
        D, C, activation=nn.Tanh, fast="forward", **HIDDEN
    ),
    "autoregressive-random-residual": lambda: AffineAutoregressive(
        D, C, order="random", residual=True, **HIDDEN
    ),
    "autoregressive-graph": lambda: AffineAutoregressive(D, adjacency=GRAPH, **HIDDEN),
    "autoregressive-spline-context": lambda: Autoregressive(
        RationalQuadraticSpline(4), D, C, **HIDDEN
    ),
    "autoregressive-circular": lambda: Autoregressive(
        CircularSpline(4), D, fast="forward", **HIDDEN
    ),
    "autoregressive-1": lambda: AffineAutoregressive(1),
}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "flow-autoregressive-context": lambda: pf.Flow(
        [AffineAutoregressive(D, C, order=order, **HIDDEN) for order in ("natural", "reversed")]
    ),
    "flow-autoregressive-forward": lambda: pf.Flow(
        [
            AffineAutoregressive(D, order=order, fast="forward", **HIDDEN)
            for order in ("natural", "reversed")
        ]
    ),
}
UNIVARIATES: dict[str, Univariate] = {}
MOVED: set[str] = set()
AFFINE: set[str] = set()
VARIANTS: set[str] = {
    "autoregressive",
    "autoregressive-context",
    "autoregressive-forward-context",
    "autoregressive-circular",
    "flow-autoregressive-context",
    "flow-autoregressive-forward",
}
EXEMPT: dict[str, dict[str, str]] = {
    "test_holds_in_the_tails": {
        "autoregressive-circular": "angles end at pi: what lies beyond is turned back into the circle",
    },
}
