"""Cases of the ready-made flows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyroflows as pf
from pyroflows.transforms import Orthogonal, Transform
from pyroflows.univariate import Univariate

from .sizes import HIDDEN, NET, C, D

SMALL: dict[str, Any] = {"transforms": 2, **NET}
MASKED: dict[str, Any] = {"transforms": 2, **HIDDEN}

TRANSFORMS: dict[str, Callable[[], Transform]] = {}
UNIVARIATES: dict[str, Univariate] = {}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "maf": lambda: pf.MAF(D, **MASKED),
    "maf-context": lambda: pf.MAF(D, C, order="random", residual=True, **MASKED),
    "maf-1": lambda: pf.MAF(1, **MASKED),
    "iaf": lambda: pf.IAF(D, **MASKED),
    "iaf-context": lambda: pf.IAF(D, C, **MASKED),
    "nsf": lambda: pf.NSF(D, bins=4, **SMALL),
    "nsf-context": lambda: pf.NSF(D, C, bins=4, **SMALL),
    "nsf-linear": lambda: pf.NSF(D, bins=4, spline="linear-rational", **SMALL),
    "nsf-autoregressive": lambda: pf.NSF(2, bins=4, coupling=False, **MASKED),
    "nsf-circular": lambda: pf.NSF(D, bins=4, spline="circular", **SMALL),
    # Two features where each is a numeric inverse of its own.
    "naf": lambda: pf.NAF(2, units=3, **MASKED),
    "naf-context": lambda: pf.NAF(D, C, units=3, transforms=1, **HIDDEN),
    "unaf": lambda: pf.UNAF(D, transforms=1, **HIDDEN),
    "bnaf": lambda: pf.BNAF(D, transforms=2, hidden=(4,)),
    "bnaf-context": lambda: pf.BNAF(D, C, transforms=1, hidden=(4,)),
    "sospf": lambda: pf.SOSPF(2, **MASKED),
    "bpf": lambda: pf.BPF(2, degree=6, **MASKED),
    "planar-flow": lambda: pf.PlanarFlow(D, transforms=2),
    "planar-flow-context": lambda: pf.PlanarFlow(D, C, **SMALL),
    "radial-flow": lambda: pf.RadialFlow(D, transforms=2),
    "radial-flow-context": lambda: pf.RadialFlow(D, C, **SMALL),
    "sylvester-flow": lambda: pf.SylvesterFlow(D, transforms=2, units=2),
    "glow": lambda: pf.Glow(D, **SMALL).eval(),
    "glow-context": lambda: pf.Glow(D, C, **SMALL).eval(),
    "residual-flow": lambda: pf.ResidualFlow(D, **MASKED),
    "ffjord": lambda: pf.FFJORD(D, hidden=(8,), solver="rk4", steps=16),
    "flow-plus-plus": lambda: pf.FlowPlusPlus(D, components=3, **SMALL),
    **{
        f"realnvp-mixing-{n}": (lambda n=n: pf.RealNVP(D, mixing=n, **SMALL).eval())
        for n in pf.flows.MIXINGS
        if n not in ("reverse", "permute")
    },
    "realnvp-mixing-callable": lambda: pf.RealNVP(D, mixing=Orthogonal, **SMALL),
    "realnvp-reversible": lambda: pf.RealNVP(D, reversible=True, **SMALL),
    **{
        f"realnvp-tails-{n}": (lambda n=n: pf.RealNVP(D, tails=n, **SMALL))
        for n in ("gpd", "loft", "student")
    },
}
MOVED: set[str] = set()
AFFINE: set[str] = set()
VARIANTS: set[str] = {
    "maf",
    "iaf-context",
    "nsf-context",
    "nsf-linear",
    "nsf-autoregressive",
    "nsf-circular",
    "naf",
    "bnaf",
    "planar-flow-context",
    "radial-flow",
    "glow",
    "realnvp-tails-gpd",
    "realnvp-tails-loft",
    *(
        f"realnvp-mixing-{n}"
        for n in ("callable", "exponential", "householder", "lu", "orthogonal")
    ),
}
EXEMPT: dict[str, dict[str, str]] = {
    "test_a_fresh_flow_is_its_base": {
        "realnvp-tails-gpd": "its tail layer starts with heavier tails than the base has"
    },
    "test_score_has_the_same_gradient_by_sampling_and_by_inverting": {
        "realnvp-tails-student": "a learned base is evaluated once per call of the flow, and its graph walked back once"
    },
}
