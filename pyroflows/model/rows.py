"""Second derivatives of densities whose rows of data each see a few latent entries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._compat import tree_leaves, tree_map_only
from .colouring import Colouring
from .curvature import Holding, multiply_hessian
from .double import DoubleDensity
from .sites import LatentSite
from .sparsity import SymmetricEntries, find_entries

__all__ = ["RowEntries", "RowHessian", "find_row_hessian"]

# What is read this way differs from products by no more, relative to their sizes.
LARGEST_ERROR = 1e-8
# How far the number of an entry is from an integer.
SPACING = 1e-6
_INDEX, _EXPAND = torch.ops.aten.index.Tensor, torch.ops.aten.expand.default


class RowEntries(NamedTuple):
    """What :meth:`RowHessian.read` gives, for points of shape ``(n, features)``.

    Attributes:
        values: The log density, of shape ``(n,)``.
        gradients: Its gradients, of shape ``(n, features)``.
        entries: The diagonal of the matrix of second derivatives by some entries, and then its
            values at their edges, of shape ``(n, size + edges)``.
    """

    values: Tensor
    gradients: Tensor
    entries: Tensor


class Cutting(Holding):
    """Cuts an evaluation where latent entries are spread over rows of data.

    The arrays of rows that are made of entries, by indexing or by broadcasting, are replaced by
    leaves of their own, so that the density is a function of entries and of these arrays.

    Args:
        sites: The sites of the vector.
        held: The names of sites that are taken for constants.

    Attributes:
        spread: The arrays, each element of which depends on one entry.
        leaves: What replaces them.
    """

    def __init__(self, sites: Sequence[LatentSite], held: Set[str]) -> None:
        super().__init__(sites, held)
        self.found = False
        self.spread: list[Tensor] = []
        self.leaves: list[Tensor] = []
        # Tensors of entries and of rows, kept so that no identity is used twice.
        self._entries: dict[int, Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        self._cuts: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.found:
            result = super().__torch_function__(func, types, args, kwargs)
            if self.found:
                self._entries = {id(part): part for part in result if part.requires_grad}
            return result
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        entries = [tensor for tensor in given if id(tensor) in self._entries]
        in_rows = any(id(tensor) in self._rows for tensor in given)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        if not entries:
            return self._noted(result, self._rows) if in_rows else result
        size = max(tensor.numel() for tensor in entries)
        if func is _INDEX or (func is _EXPAND and result.numel() > size):
            return self._cut(result)
        if in_rows or result.numel() > size:
            args, kwargs = tree_map_only(Tensor, lambda t: self._spread(t, result), (args, kwargs))
            return self._noted(func(*args, **kwargs), self._rows)
        return self._noted(result, self._entries) if result.numel() == size else result

    def _noted(self, tensor: Tensor, where: dict[int, Tensor]) -> Tensor:
        where[id(tensor)] = tensor
        return tensor

    def _spread(self, tensor: Tensor, result: Tensor) -> Tensor:
        """A tensor of entries as an array of rows."""
        if id(tensor) not in self._entries:
            return tensor
        key = id(tensor), result.shape
        if key not in self._cuts:
            self._cuts[key] = tensor, self._cut(torch.broadcast_to(tensor, result.shape))
        return self._cuts[key][1]

    def _cut(self, rows: Tensor) -> Tensor:
        leaf = rows.detach().requires_grad_()
        self.spread.append(rows)
        self.leaves.append(leaf)
        return self._noted(leaf, self._rows)


class _Derivatives(NamedTuple):
    """The first derivatives at some points, with a graph."""

    points: Tensor
    values: Tensor
    gradients: Tensor
    # By the leaves, which replace the arrays that are spread.
    slopes: list[Tensor]
    leaves: list[Tensor]
    spread: list[Tensor]


class RowHessian:
    r"""Reads second derivatives row by row.

    The density is a function :math:`f(z, r(z))` of the entries and of arrays :math:`r_a` of rows,
    each element of which depends on one entry. Rows of data do not touch each other, so that one
    product tells for all of them the derivatives by two arrays, and

    .. math::

        \nabla^2 \log p = \nabla_z^2 \bigl(f(z, r) + \nabla_r f^\top r(z)\bigr)
        + \sum_{ab} J_a^\top \operatorname{diag}(d_{ab})\, J_b.

    So two crossed factors take two products and a few more, not one for each entry of the smaller.

    Args:
        density: A log density in double precision.
        chosen: The entries by which derivatives are taken, of shape ``(size,)``.
        edges: Pairs of different places in ``chosen`` that touch, of shape ``(e, 2)``.
        held: Names of sites that are taken for constants: those without chosen entries.

    Attributes:
        count: How many products are taken.

    Raises:
        ValueError: If an element of an array does not depend on one entry.
    """

    def __init__(
        self, density: DoubleDensity, chosen: Tensor, edges: Tensor, held: Set[str]
    ) -> None:
        self.held, self.size, self.edges = held, len(chosen), edges
        self._chosen, self._features = chosen, density.features
        low, high = edges.sort(-1).values.unbind(-1)
        keys, order = (low * self.size + high).sort()
        self._keys = torch.cat([keys, keys.new_tensor([self.size**2])])
        self._order = torch.cat([order, order.new_tensor([len(order)])])
        self._ones = self._outward(torch.ones(self.size).double())
        start = _differentiate(density, density.initial.unsqueeze(0), held)
        places = self._find_places(start)
        joined = itertools.combinations_with_replacement(range(len(places)), 2)
        self._slots = {
            (a, b): self._slots_of(places[a], places[b])
            for a, b in joined
            if len(places[a]) == len(places[b])
        }
        # Where both arrays hold the same entry, its row counts the mixed derivative twice.
        self._weights = {
            (a, b): 1.0 + (places[a] == places[b]) if a != b else torch.ones(())
            for a, b in self._slots
        }
        self._rest = self._find_rest(start)
        self._colouring = Colouring(self.size, edges[self._rest])
        self._directions = self._outward(self._colouring.directions)
        self.count = len(self._directions) + len(places)

    def read(self, density: DoubleDensity, points: Tensor) -> RowEntries:
        """The log density and its derivatives.

        Args:
            density: The density, of any batch size.
            points: Points of shape ``(n, features)``.

        Returns:
            Values, gradients and the entries of the second derivatives, without a graph.
        """
        parts = [self._read(density, piece) for piece in points.split(density.batch_size)]
        return RowEntries(*map(torch.cat, zip(*parts, strict=True)))

    @torch.enable_grad()
    def _read(self, density: DoubleDensity, points: Tensor) -> RowEntries:
        n = len(points)
        found = _differentiate(density, points, self.held)
        read = self._colouring.read(self._multiply(found, self._directions))
        entries = points.new_zeros(n, self.size + len(self.edges) + 1)
        entries[:, : self.size] = read[:, : self.size]
        entries[:, self.size + self._rest] = read[:, self.size :]
        follow = [c.flatten(1)[:n] for c in _follow(found, self._ones)]
        bends = [_gradients(slope.sum(), found.leaves) for slope in found.slopes]
        for (a, b), slots in self._slots.items():
            change = bends[b][a].flatten(1)[:n].detach() * follow[a] * follow[b]
            entries.index_add_(1, slots, change * self._weights[a, b])
        return RowEntries(found.values.detach(), found.gradients.detach(), entries[:, :-1])

    def _outward(self, x: Tensor) -> Tensor:
        """Vectors with zeros for the entries that are not chosen."""
        return x.new_zeros(*x.shape[:-1], self._features).index_copy(-1, self._chosen, x)

    def _multiply(self, found: _Derivatives, directions: Tensor) -> Tensor:
        """The products of vectors with what rows do not tell, of shape ``(n, k, size)``."""
        totals = [(found.gradients @ direction).sum() for direction in directions]
        products = [_gradients(total, [found.points])[0].detach() for total in totals]
        return torch.stack(products, 1)[..., self._chosen]

    def _find_places(self, start: _Derivatives) -> list[Tensor]:
        """For each array the places of the entries on which its elements depend."""
        marks = self._outward(torch.arange(1, self.size + 1).double())
        places = []
        pairs = zip(_follow(start, self._ones), _follow(start, marks), strict=True)
        for ones, marked in pairs:
            number = (marked / ones)[0].flatten()
            nearest = number.round()
            if not bool(((number - nearest).abs() < SPACING).all() and (nearest > 0).all()):
                raise ValueError("Expected arrays whose elements depend on one entry each.")
            places.append(nearest.long() - 1)
        return places

    def _slots_of(self, one: Tensor, other: Tensor) -> Tensor:
        """The slots of pairs of entries; of those that do not touch the one behind the last."""
        key = torch.minimum(one, other) * self.size + torch.maximum(one, other)
        found = torch.searchsorted(self._keys, key)
        edge = self._order[found].where(self._keys[found] == key, len(self.edges))
        return torch.where(one == other, one, self.size + edge)

    def _find_rest(self, start: _Derivatives) -> Tensor:
        """The edges of which rows do not tell all."""

        def multiply(directions: Tensor) -> Tensor:
            return self._multiply(start, self._outward(directions))[0]

        like = torch.ones(self.size).double()
        found = find_entries(multiply, like, torch.Generator().manual_seed(0))
        edges = self._slots_of(found.rows, found.columns) - self.size
        return edges[(edges >= 0) & (edges < len(self.edges))]


def find_row_hessian(
    density: DoubleDensity, chosen: Tensor, edges: Tensor, held: Set[str]
) -> RowHessian | None:
    """The reader of second derivatives row by row, if it reads what they are.

    Args:
        density: As for :class:`RowHessian`.
        chosen: As for :class:`RowHessian`.
        edges: As for :class:`RowHessian`.
        held: As for :class:`RowHessian`.

    Returns:
        The reader; ``None`` if it would be wrong, because rows of data touch each other.
    """
    try:
        rows = RowHessian(density, chosen, edges, held)
    except (ValueError, RuntimeError):
        return None
    generator = torch.Generator().manual_seed(0)
    probe, noise = torch.randn(2, 1, density.features, generator=generator, dtype=torch.double)
    outside = torch.ones(density.features, dtype=torch.bool)
    outside[chosen] = False
    probe[:, outside] = 0
    point = density.initial + 0.3 * noise
    right = multiply_hessian(density, point, probe, held)
    read = rows.read(density, point)
    off = torch.cat([torch.arange(len(chosen)).unsqueeze(-1).expand(-1, 2), edges])
    low, high = off.sort(-1).values.unbind(-1)
    matrix = SymmetricEntries(len(chosen), low, high, read.entries[0])
    wrong = matrix.multiply(probe[:, chosen]) - right.products[0][:, chosen]
    wrong = wrong.abs().amax() / right.products.abs().amax()
    slope = (read.gradients - right.gradients)[:, chosen].abs().amax()
    good = wrong < LARGEST_ERROR and slope <= LARGEST_ERROR * right.gradients.abs().amax()
    return rows if good else None


def _differentiate(density: DoubleDensity, points: Tensor, held: Set[str]) -> _Derivatives:
    # A graph that is made later would record what is done to its operations.
    program = density.values
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        cutting = Cutting(density.sites, held)
        with cutting:
            (values,) = program(points)
        spread, leaves = cutting.spread, cutting.leaves
        direct, *slopes = torch.autograd.grad(
            values.sum(), [points, *leaves], create_graph=True, materialize_grads=True
        )
        pulls = [(slope.detach() * rows).sum() for slope, rows in zip(slopes, spread, strict=True)]
        gradients = direct
        if pulls:
            (through,) = torch.autograd.grad(torch.stack(pulls).sum(), points, create_graph=True)
            gradients = direct + through
    return _Derivatives(points, values, gradients, slopes, leaves, spread)


def _follow(found: _Derivatives, direction: Tensor) -> list[Tensor]:
    """How the arrays change as the entries move in a direction."""
    if not found.spread:
        return []
    with torch.enable_grad():
        weights = [torch.zeros_like(rows).requires_grad_() for rows in found.spread]
        (pulled,) = torch.autograd.grad(
            found.spread, found.points, weights, create_graph=True, retain_graph=True
        )
        return list(torch.autograd.grad((pulled @ direction).sum(), weights, retain_graph=True))


def _gradients(total: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a number; zeros where it does not depend on the inputs."""
    if not total.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True)
    return list(found)
