"""The log density of a trace with enumerated sites, by operations that torch.func can transform."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.packed import unpack
from pyro.ops.rings import LogRing
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .._compat import named_dims, packed_dims

__all__ = [
    "EnumeratedGroup",
    "enumerated_groups",
    "enumerated_log_prob",
    "sample_enumerated",
]


class EnumeratedGroup(NamedTuple):
    """Sites that are joined by the discrete sites they depend on.

    Attributes:
        names: The names of the sites, in the order of the model.
        log_prob: The log of the sum, over all values of the discrete sites, of the product of
            their densities, for each row of the plates that all of the sites are in, which are
            its dimensions from the right, as Pyro has them.
    """

    names: tuple[str, ...]
    log_prob: Tensor


def enumerated_log_prob(trace: Any) -> Tensor:
    """Sums the enumerated sites out of a trace, as ``TraceEnum_ELBO`` does: masks act inside of the
    sum, scales outside.

    Args:
        trace: A trace of a model under ``poutine.enum``.

    Returns:
        The log density, a tensor without dimensions.

    Raises:
        ValueError: If the sites that depend on an enumerated one do not share one
            ``poutine.scale``.
    """
    factors = _Factors(trace)
    total: Any = sum(trace.nodes[name]["log_prob_sum"] for name in factors.free)
    if not factors.terms:
        return total
    return total + factors.scale * factors.contract(list(factors.terms), frozenset())


def enumerated_groups(trace: Any) -> list[EnumeratedGroup]:
    """The parts into which the sum over the enumerated sites of a trace falls.

    Args:
        trace: A trace of a model under ``poutine.enum``.

    Returns:
        The groups; a site that depends on no enumerated one is in none of them.

    Raises:
        ValueError: If their sites do not share one ``poutine.scale``.
    """
    factors = _Factors(trace)
    groups = []
    for names in factors.components():
        common = frozenset.intersection(*(factors.plates[name] for name in names))
        packed_sum = factors.contract(names, common)
        log_prob = unpack(packed_sum, trace.symbol_to_dim)
        groups.append(EnumeratedGroup(tuple(names), factors.scale * log_prob))
    return groups


def sample_enumerated(trace: Any) -> dict[str, Tensor]:
    """Draws the enumerated sites of a trace from their posterior given the other sites.

    The variables are eliminated one after the other, and drawn in the reverse order, each given
    those that were eliminated after it.

    Args:
        trace: A trace of a model under ``poutine.enum``.

    Returns:
        For each enumerated site a value of the shape that it has in a run without enumeration.

    Raises:
        ValueError: If the sites that depend on an enumerated one do not share one
            ``poutine.scale``.
    """
    factors, ring = _Factors(trace), _RecordingRing()
    if factors.terms:
        factors.contract(list(factors.terms), frozenset(), ring)
    chosen: dict[str, Tensor] = {}
    for dim, table in reversed(ring.tables):
        for other in packed_dims(table):
            if other != dim and other in chosen:
                table = _take_along(table, other, chosen[other])
        chosen[dim] = _sample_dim(table, dim)
    values = {}
    for name, site in trace.nodes.items():
        own = site["infer"].get("_enumerate_dim") if site["type"] == "sample" else None
        if own is not None:
            index = chosen[site["infer"]["_dim_to_symbol"][own]]
            values[name] = _choose_value(site, unpack(index, trace.symbol_to_dim))
    return values


def _take_along(table: Tensor, dim: str, index: Tensor) -> Tensor:
    """The table at the chosen index of one dimension, in each row of its plates."""
    names = packed_dims(table)
    rest = names.replace(dim, "")
    place = names.index(dim)
    aligned = _product([index, named_dims(torch.zeros_like(table.select(place, 0)), rest)])
    order = [packed_dims(aligned).index(name) for name in rest]
    aligned = aligned.permute(order).to(torch.long).unsqueeze(place)
    return named_dims(table.gather(place, aligned).squeeze(place), rest)


def _sample_dim(table: Tensor, dim: str) -> Tensor:
    """Draws the index of one dimension by Gumbel noise, which needs no normalised table."""
    names = packed_dims(table)
    place = names.index(dim)
    noise = -torch.empty_like(table).exponential_().log()
    return named_dims((table + noise).argmax(place), names.replace(dim, ""))


def _choose_value(site: Any, index: Tensor) -> Tensor:
    """The values of a site at indices of its support, of the batch shape of the site."""
    fn = site["fn"]
    support = fn.enumerate_support(expand=False)
    support = support.reshape(len(support), *fn.event_shape)
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    shape = [sizes.get(-k, 1) for k in range(max([0, *(-dim for dim in sizes)]), 0, -1)]
    return support[index.expand(torch.broadcast_shapes(index.shape, tuple(shape)))]


class _Factors:
    """The factors of the log density of a trace that depend on enumerated sites.

    Args:
        trace: A trace of a model under ``poutine.enum``.

    Attributes:
        terms: For each site that depends on an enumerated one its packed log density.
        plates: For each of these sites the symbols of its plates.
        free: The other sites.
        scale: The scale that all of these sites share.
    """

    def __init__(self, trace: Any) -> None:
        trace.compute_log_prob()
        trace.pack_tensors()
        symbols = trace.plate_to_symbol
        self.enumerated = set(trace.symbol_to_dim) - set(symbols.values())
        self.terms: dict[str, Any] = {}
        self.plates: dict[str, frozenset[str]] = {}
        self.free: list[str] = []
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            term = site["packed"]["unscaled_log_prob"]
            if self.enumerated.isdisjoint(packed_dims(term)):
                self.free.append(name)
                continue
            if site["infer"].get("_enumerate_dim") is None:
                term = packed.scale_and_mask(term, mask=site["packed"]["mask"])
            frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
            self.terms[name] = term
            self.plates[name] = frozenset(symbols[frame.name] for frame in frames)
        self.scale = _common([trace.nodes[name]["scale"] for name in self.terms])

    def contract(
        self, names: list[str], kept: frozenset[str], ring: _EliminationRing | None = None
    ) -> Tensor:
        """Sums some sites over the enumerated ones, and over all plates but those that are kept."""
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for name in names:
            tree.setdefault(self.plates[name], []).append(self.terms[name])
        return contract_to_tensor(tree, self.enumerated, kept, ring=ring or _EliminationRing())

    def components(self) -> list[list[str]]:
        """The names of the sites, those that share an enumerated one together."""
        groups: list[tuple[set[str], list[str]]] = []
        for name, term in self.terms.items():
            dims, names = self.enumerated.intersection(packed_dims(term)), [name]
            joined = [group for group in groups if not dims.isdisjoint(group[0])]
            for group in joined:
                dims, names = dims | group[0], group[1] + names
                groups.remove(group)
            groups.append((dims, names))
        return [sorted(names, key=list(self.terms).index) for _, names in groups]


def _common(scales: list[Any]) -> float:
    if not scales:
        return 1.0
    numbers = {float(scale) if torch.as_tensor(scale).numel() == 1 else None for scale in scales}
    (scale, *others) = numbers
    if others or scale is None:
        raise ValueError(
            "Expected one number as poutine.scale of all sites that depend on a discrete latent "
            "site; got several."
        )
    return scale


class _EliminationRing(LogRing):
    """Sums of products in log space by eliminating one variable after the other.

    Pyro's own goes through an autograd function that torch.func cannot transform.
    """

    def sumproduct(self, terms: list[Tensor], dims: Any) -> Tensor:
        left = {dim for dim in dims if _touched(terms, dim)}
        while left:
            # The one with the smallest table first: in a star the leaves, not the centre.
            dim = min(
                sorted(left),
                key=lambda dim: len(set("".join(map(packed_dims, _touched(terms, dim))))),
            )
            touched = _touched(terms, dim)
            product = _product(touched)
            self.eliminate(dim, product)
            names = packed_dims(product)
            summed = named_dims(_logsumexp(product, names.index(dim)), names.replace(dim, ""))
            terms = [term for term in terms if all(term is not t for t in touched)] + [summed]
            left.remove(dim)
        return _product(terms)

    def eliminate(self, dim: str, product: Tensor) -> None:
        """Is told the product of all terms in a variable, over which it is summed out next."""


class _RecordingRing(_EliminationRing):
    """Keeps the variables in the order of their elimination, each with its table."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[tuple[str, Tensor]] = []

    def eliminate(self, dim: str, product: Tensor) -> None:
        self.tables.append((dim, product))


def _touched(terms: list[Tensor], dim: str) -> list[Tensor]:
    return [term for term in terms if dim in packed_dims(term)]


def _logsumexp(term: Tensor, dim: int) -> Tensor:
    """As torch's, but with gradient zero, not NaN, where all is impossible."""
    slices = term.detach().unbind(dim)
    shift = functools.reduce(torch.maximum, slices).clamp(min=torch.finfo(term.dtype).min)
    # Sums of slices: torch's reductions of a few entries cost several times as much.
    total = functools.reduce(torch.add, (term - shift.unsqueeze(dim)).exp().unbind(dim))
    possible = total > 0
    return torch.where(possible, torch.where(possible, total, 1.0).log() + shift, -torch.inf)


def _product(terms: list[Tensor]) -> Tensor:
    # As they lie in memory: those of plates last, those of enumerated sites before them.
    dims = "".join(sorted(set("".join(map(packed_dims, terms))), reverse=True))
    total: Any = 0
    for term in terms:
        names = packed_dims(term)
        ordered = term.permute([names.index(dim) for dim in dims if dim in names])
        shape = iter(ordered.shape)
        total = total + ordered.reshape([next(shape) if dim in names else 1 for dim in dims])
    return named_dims(total, dims)
