"""Reading the traces of guides and models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["fix_draws", "latent_draws", "sample_nodes"]


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


def sample_nodes(trace: poutine.Trace) -> list[tuple[str, Any]]:
    return [
        (n, node)
        for n, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    ]


def _is_point_mass(node: Any) -> bool:
    fn = node["fn"]
    while isinstance(fn, (torch.distributions.Independent, MaskedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, Delta)
