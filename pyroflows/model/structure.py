"""Which latent entries of a model touch which, found from its log density alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .coordinates import PartialSums
from .curvature import multiply_hessian, points_at_once
from .density import LogDensity
from .double import DoubleDensity
from .memory import check_memory
from .sites import LatentSite
from .sparsity import DENSE, ManyTouch, SymmetricEntries, find_entries

__all__ = ["Structure", "find_structure"]

# Distances from the start of the points at which a model is looked at, tried in turn.
RADII = (0.3, 0.1, 0.01)
# How far products with what was found may be from the true ones, relative to the largest.
LARGEST_ERROR = 1e-4
# Sums are taken if they touch so many times fewer others; the rounding of their differences.
FEWER, ROUNDED = 4, 1e-8
# The products at once by which entries of very large sites have to come apart.
TRIAL = 300
# A site with more entries holds no globals.
LARGEST_GLOBAL_SITE = 16
# A global touches this share of all entries, or of those of a site of so many entries.
SHARE, SITE_SHARE, SITE_SIZE = 0.25, 0.5, 4


@dataclass(frozen=True)
class Structure:
    """Which entries of the unconstrained vector touch which.

    Two entries touch if the second derivative of the log density by them is not zero: then neither
    is independent of the other given all the rest.

    A chain that is written by its increments is seen by its states: see
    :class:`pyroflows.model.coordinates.PartialSums`.

    Attributes:
        size: Entries of the vector.
        edges: Pairs of different entries that touch, of shape ``(e, 2)``, the smaller first.
        globals: The entries of which many others depend, of shape ``(g,)``, in order.
        locals: The others, of shape ``(n,)``, in order.
        coordinates: The coordinates of the vector in which this is so.
    """

    size: int
    edges: Tensor
    globals: Tensor
    locals: Tensor
    coordinates: PartialSums = field(default_factory=PartialSums)

    @functools.cached_property
    def local_edges(self) -> Tensor:
        """The edges between locals, as pairs of places in :attr:`locals`, of shape ``(m, 2)``."""
        place = torch.full((self.size,), -1)
        place[self.locals] = torch.arange(len(self.locals))
        edges = place[self.edges]
        return edges[(edges >= 0).all(-1)]

    @functools.cached_property
    def blocks(self) -> Tensor:
        """For each local the number of its block: locals of two blocks are independent given the
        globals. Of shape ``(n,)``."""
        # Not at the top, because scipy changes the filters of warnings.
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        n = len(self.locals)
        i, j = self.local_edges.unbind(-1)
        graph = coo_array((torch.ones(len(i)), (i, j)), shape=(n, n))
        _, labels = connected_components(graph, directed=False)
        return torch.as_tensor(labels, dtype=torch.long)

    @functools.cached_property
    def block_sizes(self) -> Tensor:
        """How many locals each block has, of shape ``(b,)``."""
        return torch.bincount(self.blocks)

    @functools.cached_property
    def dense(self) -> Tensor:
        """Which blocks have at least three locals, all of which touch each other, of shape
        ``(b,)``."""
        sizes = self.block_sizes
        edges = torch.bincount(self.blocks[self.local_edges[:, 0]], minlength=len(sizes))
        return (sizes > 2) & (2 * edges == sizes * (sizes - 1))


def find_structure(density: LogDensity, seed: int = 0) -> Structure:
    r"""Finds which entries touch which, and which of them are globals.

    The pattern of :math:`\nabla^2 \log p` is found at two points near the start, by products with
    few vectors: see :func:`pyroflows.model.sparsity.find_entries`. Nothing needs to be known of the
    model, so rows may be reached by indexing and chains written as one vector.

    Globals are entries of small sites outside of plates that touch a large share of all entries, or
    half of the entries of another site; and those that touch nothing but globals, if they are few.
    If there are none, up to 16 entries are all of them globals.

    Args:
        density: A log density whose data do not come from a loader.
        seed: Seed of the points and vectors.

    Returns:
        The structure.

    Raises:
        ValueError: If more than 1,024 entries touch many others, if the second derivatives are not
            finite anywhere near the start, or if there is too little memory.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("groups", 5):
        ...         effect = pyro.sample("effect", dist.Normal(0.0, scale))
        ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=y)
        >>> structure = find_structure(LogDensity(model, (torch.arange(5.0),)))
        >>> structure.globals, len(structure.edges), len(structure.local_edges)
        (tensor([0]), 5, 0)
    """
    check_memory(density)
    generator = torch.Generator().manual_seed(seed)
    double = DoubleDensity(density, points_at_once(density, few=1)[0])
    coordinates, entries = _find_coordinates(double, generator)
    if len(entries.values) < density.features * (density.features + 1) / 2:
        again = _entries_near_start(double, coordinates, generator)
        entries = entries.joined(again.rows, again.columns, again.values)
    off = entries.rows != entries.columns
    edges = torch.stack([entries.rows[off], entries.columns[off]], -1).cpu()
    is_global = _find_globals(density.sites, edges)
    return Structure(
        density.features,
        edges,
        is_global.nonzero().squeeze(-1),
        (~is_global).nonzero().squeeze(-1),
        coordinates,
    )


# The pattern


def _find_coordinates(
    density: DoubleDensity, generator: torch.Generator
) -> tuple[PartialSums, SymmetricEntries]:
    """The coordinates in which entries touch few others, and the second derivatives by them."""
    large = _large_chains(density.sites)
    for coordinates in [PartialSums(), *large] if large else []:
        try:
            return coordinates, _entries_near_start(density, coordinates, generator, TRIAL)
        except ManyTouch:
            continue
    coordinates = PartialSums()
    entries = _entries_near_start(density, coordinates, generator)
    if chains := _find_chains(density.sites, entries):
        coordinates = PartialSums(chains)
        entries = _entries_near_start(density, coordinates, generator)
    return coordinates, entries


def _entries_near_start(
    density: DoubleDensity,
    coordinates: PartialSums,
    generator: torch.Generator,
    products: int = 2 * DENSE,
) -> SymmetricEntries:
    """The second derivatives at a point near the start."""
    start = density.initial
    for radius in RADII:
        noise = torch.randn(len(start), generator=generator, dtype=torch.double)
        point = start + radius * noise.to(start)

        def multiply(directions: Tensor, point: Tensor = point) -> Tensor:
            moved = coordinates.from_sums(directions)
            found = multiply_hessian(density, point.unsqueeze(0), moved)
            return coordinates.pull_back(found.products.squeeze(0))

        probe = torch.randn(1, len(start), generator=generator, dtype=torch.double).to(start)
        product = multiply(probe)
        if not product.isfinite().all():
            continue
        entries = find_entries(multiply, start, generator, products)
        _check_found(product, entries.multiply(probe))
        return entries
    raise ValueError(
        "Expected a log density with finite second derivatives near its start; got some that are "
        "not finite at all points that were tried."
    )


def _check_found(product: Tensor, found: Tensor) -> None:
    error = (product - found).abs().amax()
    if error > LARGEST_ERROR * product.abs().amax():
        raise ValueError(
            "Expected a log density with a symmetric matrix of second derivatives; got products "
            f"with it that differ by {error:.2g} from those of its entries."
        )


# Chains that are written by their increments


def _large_chains(sites: list[LatentSite]) -> list[PartialSums]:
    """Sums along an axis of all sites that are too large to be read as a dense block, and of one of
    them."""
    large = [_all_fibres(site, places) for site, places in _summable(sites, DENSE, torch.inf)]
    axes = max(map(len, large), default=0)
    along = [[fibres[axis] for fibres in large if axis < len(fibres)] for axis in range(axes)]
    alone = [[fibres] for every in large for fibres in every]
    return [PartialSums(chains) for chains in [*along, *alone * (len(large) > 1)]]


def _find_chains(sites: list[LatentSite], entries: SymmetricEntries) -> list[Tensor]:
    """The chains of the sites whose partial sums, or sums of sums, touch far fewer others than they
    do."""
    chains = []
    for site, places in _summable(sites, LARGEST_GLOBAL_SITE, DENSE):
        block = entries.block(places)
        fewest, best = _touching(block) / FEWER, []
        for fibres in _all_fibres(site, torch.arange(len(places))):
            for times in (1, 2):
                sums = PartialSums([fibres] * times)
                count = _touching(sums.pull_back(sums.pull_back(block).mT))
                if count < fewest:
                    fewest, best = count, [places[fibres]] * times
        chains += best
    return chains


def _summable(
    sites: list[LatentSite], above: float, most: float
) -> Iterator[tuple[LatentSite, Tensor]]:
    """The sites whose entries could be increments, of some sizes, and the places of these."""
    first = 0
    for site in sites:
        places = torch.arange(first, first + site.features)
        first += site.features
        if above < site.features <= most and site.complete:
            yield site, places


def _all_fibres(site: LatentSite, places: Tensor) -> list[Tensor]:
    """For each axis of a site, the last first, its fibres along it, of shape ``(k, length)``."""
    array = places.reshape(site.unconstrained_shape)
    axes = [axis for axis in reversed(range(array.dim())) if array.shape[axis] > 1]
    return [array.movedim(axis, -1).reshape(-1, array.shape[axis]) for axis in axes]


def _touching(block: Tensor) -> int:
    """How many pairs of different entries of a block touch."""
    largest = block.abs().amax(-1, keepdim=True)
    return int((block.abs() > ROUNDED * largest).sum()) - len(block)


# Globals


def _find_globals(sites: list[LatentSite], edges: Tensor) -> Tensor:
    """Which entries are globals, of shape ``(features,)``."""
    features = torch.tensor([site.features for site in sites])
    site_of = torch.repeat_interleave(torch.arange(len(sites)), features)
    size = len(site_of)
    in_plate = torch.tensor([any(site.plates) for site in sites])
    candidates = (~in_plate & (features <= LARGEST_GLOBAL_SITE))[site_of]
    near, far = torch.cat([edges, edges.flip(-1)]).unbind(-1)
    touched = torch.zeros(size, len(sites))
    touched.index_put_((near, site_of[far]), torch.ones(len(near)), accumulate=True)
    larger = (features > SITE_SIZE) & (features > 2 * features[site_of].unsqueeze(-1))
    half_of_site = (larger & (touched >= SITE_SHARE * features)).any(-1)
    is_global = candidates & (half_of_site | (touched.sum(-1) >= SHARE * (size - 1)))
    is_global = _with_parents(is_global, candidates & (touched.sum(-1) > 0), near, far)
    if size <= LARGEST_GLOBAL_SITE and not is_global.any():
        return torch.ones_like(is_global)
    return is_global


def _with_parents(is_global: Tensor, candidates: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """The globals, and the candidates that touch nothing but them, if these are few: else they are
    the rows of a plate that is a loop."""
    while True:
        touches_local = torch.zeros_like(is_global)
        touches_local[near[~is_global[far]]] = True
        parents = candidates & ~touches_local & ~is_global
        if not 0 < parents.sum() <= LARGEST_GLOBAL_SITE:
            return is_global
        is_global = is_global | parents
