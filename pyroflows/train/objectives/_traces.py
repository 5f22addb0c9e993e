"""Reading the traces of guides and models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor

from ...model.sites import base_distribution, sample_nodes

__all__ = ["fix_draws", "latent_draws"]


def latent_draws(trace: poutine.Trace) -> dict[str, Any]:
    """The sites where a guide draws: all but its point masses."""
    return {
        name: node
        for name, node in sample_nodes(trace)
        if not (node["is_observed"] or _is_point_mass(node))
    }


def fix_draws(trace: poutine.Trace, points: Mapping[str, Tensor]) -> poutine.Trace:
    """A trace to replay, with these points for draws; point masses follow from them."""
    fixed = poutine.Trace()
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and not _is_point_mass(node):
            fixed.nodes[name] = {**node, "value": points.get(name, node["value"])}  # type: ignore[typeddict-item]
    return fixed


def _is_point_mass(node: Any) -> bool:
    return isinstance(base_distribution(node["fn"]), Delta)
