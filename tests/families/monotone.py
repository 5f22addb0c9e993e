"""Cases of the monotone family."""

from __future__ import annotations

from collections.abc import Callable

import pyroflows as pf
from pyroflows.transforms import Coupling, Transform
from pyroflows.transforms.block_autoregressive import BlockAutoregressive
from pyroflows.univariate import Univariate
from pyroflows.univariate.monotone import MonotoneIntegral, MonotoneNetwork

from .sizes import NET, C, D

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "coupling-monotone-network-context": lambda: Coupling(MonotoneNetwork(4, 1), D, C, **NET),
    "coupling-monotone-integral-context": lambda: Coupling(MonotoneIntegral(), D, C, **NET),
    "block-autoregressive": lambda: BlockAutoregressive(D),
    "block-autoregressive-context": lambda: BlockAutoregressive(
        D, C, hidden=(4, 3), order="random"
    ),
    "block-autoregressive-forward": lambda: BlockAutoregressive(D, C, hidden=(4,), fast="forward"),
}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "block-autoregressive-stack": lambda: pf.Flow(
        [
            BlockAutoregressive(D, C, hidden=(4,)),
            BlockAutoregressive(D, hidden=(4,), order="reversed"),
        ]
    ),
}
UNIVARIATES: dict[str, Univariate] = {
    "monotone-network": MonotoneNetwork(),
    "monotone-integral": MonotoneIntegral(units=4, nodes=33),
}
MOVED: set[str] = set()
AFFINE: set[str] = set()
VARIANTS: set[str] = {
    "block-autoregressive",
    "elementwise-monotone-network",
    "elementwise-monotone-integral",
    "block-autoregressive-stack",
}
EXEMPT: dict[str, dict[str, str]] = {}
