"""Cases of the tails family."""

from __future__ import annotations

from collections.abc import Callable

import torch

import pyroflows as pf
from pyroflows.distributions import mixture_base
from pyroflows.transforms import LOFT, AffineCoupling, Elementwise, Transform
from pyroflows.univariate import GPDTail, Univariate

from .sizes import NET, C, D

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "gpd-tail-context": lambda: Elementwise(GPDTail(start=0.5), D, C, **NET),
    "loft": lambda: LOFT(D),
    "loft-narrow": lambda: LOFT(D, bound=0.5),
}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "flow-gpd-tail": lambda: pf.Flow([AffineCoupling(D, **NET), Elementwise(GPDTail(), D)]),
    "flow-loft": lambda: pf.Flow([AffineCoupling(D, **NET), LOFT(D, bound=5.0)]),
    "flow-base-mixture": lambda: pf.Flow(
        [AffineCoupling(D, **NET)],
        base=mixture_base(torch.tensor([[-1.0], [1.0]]).expand(2, D).contiguous(), 0.5),
    ),
}
UNIVARIATES: dict[str, Univariate] = {"gpd-tail": GPDTail()}
MOVED: set[str] = set()
AFFINE: set[str] = set()
VARIANTS: set[str] = {
    "loft-narrow",
    "elementwise-gpd-tail",
    "flow-loft",
}
_LENGTHENS = "every map of the family lengthens the tails; where it starts is tested with it"
EXEMPT: dict[str, dict[str, str]] = {
    "test_starts_at_the_identity": {
        "gpd-tail-context": _LENGTHENS,
        "elementwise-gpd-tail": _LENGTHENS,
        "loft-narrow": "is the identity within its bound alone, which half of the points lie beyond",
    },
    "test_a_fresh_flow_is_its_base": {"flow-gpd-tail": _LENGTHENS},
}
