"""The log density of a trace with enumerated sites, in operations that torch.func can batch and differentiate."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from torch import Tensor

__all__ = ["enumerated_log_prob"]


def enumerated_log_prob(trace: Any, max_plate_nesting: int) -> Tensor:
    """Sums the enumerated sites out of a trace.

    Args:
        trace: A trace of a model under ``poutine.enum``.
        max_plate_nesting: How many dimensions on the right belong to plates.

    Returns:
        The log density, a tensor without dimensions.
    """
    evaluator = TraceEinsumEvaluator(trace, True, max_plate_nesting)
    return contract_to_tensor(evaluator._get_log_factors(trace), evaluator._enum_dims, ring=_EliminationRing())


class _EliminationRing(LogRing):
    """Sums of products in log space by eliminating one variable after the other.

    Pyro's own goes through an autograd function that torch.func cannot transform.
    """

    def sumproduct(self, terms: list[Tensor], dims: Any) -> Tensor:
        for dim in sorted(set(dims)):
            touched = [term for term in terms if dim in term._pyro_dims]  # type: ignore[attr-defined]
            if touched:
                product = _product(touched)
                rest = product._pyro_dims.replace(dim, "")  # type: ignore[attr-defined]
                summed = _named(product.logsumexp(product._pyro_dims.index(dim)), rest)  # type: ignore[attr-defined]
                terms = [term for term in terms if all(term is not t for t in touched)] + [summed]
        return _product(terms)


def _product(terms: list[Tensor]) -> Tensor:
    dims = "".join(sorted(set("".join(term._pyro_dims for term in terms))))  # type: ignore[attr-defined]
    total: Any = 0
    for term in terms:
        names = term._pyro_dims  # type: ignore[attr-defined]
        ordered = term.permute([names.index(dim) for dim in dims if dim in names])
        shape = iter(ordered.shape)
        total = total + ordered.reshape([next(shape) if dim in names else 1 for dim in dims])
    return _named(total, dims)


def _named(term: Tensor, dims: str) -> Tensor:
    term._pyro_dims = dims  # type: ignore[attr-defined]
    return term
