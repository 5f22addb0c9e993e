"""The log density of a trace with enumerated sites, in operations that torch.func can batch and differentiate."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .._compat import named_dims, packed_dims

__all__ = ["enumerated_log_prob"]


def enumerated_log_prob(trace: Any) -> Tensor:
    """Sums the enumerated sites out of a trace, as ``TraceEnum_ELBO`` does: masks act inside of the sum, scales outside.

    Args:
        trace: A trace of a model under ``poutine.enum``.

    Returns:
        The log density, a tensor without dimensions.

    Raises:
        ValueError: If the sites that depend on an enumerated one do not share one ``poutine.scale``.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    plates = trace.plate_to_symbol
    enumerated = set(trace.symbol_to_dim) - set(plates.values())
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    total: Any = 0.0
    scales = []
    for site in trace.nodes.values():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        term = site["packed"]["unscaled_log_prob"]
        if enumerated.isdisjoint(packed_dims(term)):
            total = total + site["log_prob_sum"]
            continue
        if site["infer"].get("_enumerate_dim") is None:
            term = packed.scale_and_mask(term, mask=site["packed"]["mask"])
        ordinal = frozenset(
            plates[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized
        )
        factors.setdefault(ordinal, []).append(term)
        scales.append(site["scale"])
    if not factors:
        return total
    return total + _common(scales) * contract_to_tensor(
        factors, enumerated, ring=_EliminationRing()
    )


def _common(scales: list[Any]) -> float:
    numbers = {float(scale) if torch.as_tensor(scale).numel() == 1 else None for scale in scales}
    (scale, *others) = numbers
    if others or scale is None:
        raise ValueError(
            "Expected one number as poutine.scale of all sites that depend on a discrete latent site; got several."
        )
    return scale


class _EliminationRing(LogRing):
    """Sums of products in log space by eliminating one variable after the other.

    Pyro's own goes through an autograd function that torch.func cannot transform.
    """

    def sumproduct(self, terms: list[Tensor], dims: Any) -> Tensor:
        left = {dim for dim in dims if _touched(terms, dim)}
        while left:
            # The one with the smallest table first: in a star the leaves, not the centre that joins them all.
            dim = min(
                sorted(left),
                key=lambda dim: len(set("".join(packed_dims(t) for t in _touched(terms, dim)))),
            )
            touched = _touched(terms, dim)
            product = _product(touched)
            rest = packed_dims(product).replace(dim, "")
            summed = named_dims(_logsumexp(product, packed_dims(product).index(dim)), rest)
            terms = [term for term in terms if all(term is not t for t in touched)] + [summed]
            left.remove(dim)
        return _product(terms)


def _touched(terms: list[Tensor], dim: str) -> list[Any]:
    return [term for term in terms if dim in packed_dims(term)]


def _logsumexp(term: Tensor, dim: int) -> Tensor:
    """As torch's, but with gradient zero, not NaN, where all is impossible."""
    shift = term.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(term.dtype).min)
    total = (term - shift).exp().sum(dim)
    possible = total > 0
    return torch.where(
        possible, torch.where(possible, total, 1.0).log() + shift.squeeze(dim), -torch.inf
    )


def _product(terms: list[Tensor]) -> Tensor:
    dims = "".join(sorted(set("".join(packed_dims(term) for term in terms))))
    total: Any = 0
    for term in terms:
        names = packed_dims(term)
        ordered = term.permute([names.index(dim) for dim in dims if dim in names])
        shape = iter(ordered.shape)
        total = total + ordered.reshape([next(shape) if dim in names else 1 for dim in dims])
    return named_dims(total, dims)
