"""Cases of the linear family."""

from __future__ import annotations

from collections.abc import Callable

import pyroflows as pf
from pyroflows.transforms import (
    Householder,
    LULinear,
    MatrixExponential,
    Orthogonal,
    Transform,
)
from pyroflows.transforms.glow import GlowStep
from pyroflows.transforms.normalization import ActNorm, BatchNorm
from pyroflows.univariate import Univariate

from .sizes import NET, C, D

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "householder": lambda: Householder(D, reflections=4),
    "householder-context": lambda: Householder(D, C, **NET),
    "orthogonal": lambda: Orthogonal(D),
    "orthogonal-context": lambda: Orthogonal(D, C, **NET),
    "lu-linear": lambda: LULinear(D),
    "lu-linear-rotated": lambda: LULinear(D, bias=False, rotate=True),
    "lu-linear-context": lambda: LULinear(D, C, **NET),
    "matrix-exponential": lambda: MatrixExponential(D),
    "matrix-exponential-context": lambda: MatrixExponential(D, C, **NET),
    # In training mode the statistics of data move these two, and have tests of their own.
    "actnorm": lambda: ActNorm(D).eval(),
    "actnorm-context": lambda: ActNorm(D, C, **NET).eval(),
    "batchnorm": lambda: BatchNorm(D).eval(),
    "batchnorm-inverse-context": lambda: BatchNorm(D, C, **NET).inv.eval(),
    "glow-step": lambda: GlowStep(D, **NET).eval(),
    "glow-step-context": lambda: GlowStep(D, C, **NET).eval(),
}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "glow-steps": lambda: pf.Flow(
        [GlowStep(D, **NET), GlowStep(D, mask="checkerboard", **NET)]
    ).eval(),
}
UNIVARIATES: dict[str, Univariate] = {}
MOVED: set[str] = set()
AFFINE: set[str] = {name for name in TRANSFORMS if not name.startswith("glow")}
VARIANTS: set[str] = {
    "householder",
    "lu-linear",
    "batchnorm",
    "orthogonal-context",
    "matrix-exponential",
    "actnorm-context",
    "glow-step",
    "glow-steps",
}
EXEMPT: dict[str, dict[str, str]] = {
    "test_starts_at_the_identity": {
        "lu-linear-rotated": "starts at a random rotation, as its option asks"
    },
}
