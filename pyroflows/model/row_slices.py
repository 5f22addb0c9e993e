"""Graphs of sums over rows of data, evaluated for some of the rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .promotion import in_double

__all__ = ["RowSlices", "find_row_slices"]

# Fewer rows stay in the cache as they are.
LEAST_ROWS = 2**13

# Operations by what they do to the dimension of the rows: they keep it or move it, get its size as
# an argument at some place, or reduce a dimension of their first argument, some of them to a sum.
MOVES = (
    "unsqueeze",
    "squeeze",
    "permute",
    "transpose",
    "t",
    "clone",
    "detach",
    "alias",
    "_to_copy",
)
LIKE = ("zeros_like", "ones_like", "full_like")
SIZED = {"view": 1, "_unsafe_view": 1, "reshape": 1, "expand": 1, "new_zeros": 1, "new_ones": 1}
SIZED |= {"new_full": 1, "zeros": 0, "ones": 0, "full": 0}
RESHAPES = ("view", "_unsafe_view", "reshape")
REDUCTIONS = ("sum", "mean", "amin", "amax", "all", "any", "prod", "logsumexp")
ALONG = (*REDUCTIONS, "_softmax", "_log_softmax", "select", "slice")
PRODUCTS = ("mm", "bmm")


class UnsliceableError(ValueError):
    """A graph that is no sum over rows, as far as can be told."""


class RowSlices:
    r"""A graph that is a sum over rows, of which slices are evaluated.

    With :math:`n` of :math:`N` rows in a slice, and sums over them that are multiplied by
    :math:`N / n`, the graph :math:`f(z) = p(z) + \sum_i t_i(z)` is a weighted mean of slices,

    .. math:: f(z) = \sum_s \frac{n_s}{N} \Bigl(p(z) + \frac{N}{n_s} \sum_{i \in s} t_i(z)\Bigr).

    Each dimension that has as many entries as there are rows is one of rows, and operations are
    known to keep rows apart, or sum over them. Whether the result is affine in these sums is for
    the caller to compare.

    Args:
        graph: A graph of points and of fixed tensors.
        rows: How many rows there are.

    Attributes:
        rows: How many rows there are.

    Raises:
        UnsliceableError: If rows are not kept apart.
    """

    def __init__(self, graph: GraphModule, rows: int) -> None:
        self.rows, self._module = rows, graph
        self._along: dict[Node, int | None] = {}
        self._sums: set[Node] = set()
        *nodes, self._output = graph.graph.nodes
        for node in nodes:
            self._along[node] = self._dimension(node)
            if node.op != "placeholder":
                self._check(node)
        given = [self._along[node] for node in nodes if node.op == "placeholder"]
        self._of_fixed = given[1:]
        results = [node for node in self._output.all_input_nodes if self._along[node] is not None]
        if results or not self._sums:
            raise UnsliceableError("the results are no sums over rows")
        self._graphs: dict[tuple[int, bool], GraphModule] = {}

    def bind(
        self, fixed: Sequence[Tensor], count: int, single: bool = False
    ) -> list[tuple[float, Callable[[Tensor], tuple[Tensor, ...]]]]:
        """The slices as functions of points.

        Args:
            fixed: The fixed tensors.
            count: How many slices, which differ by one row at most.
            single: Whether to evaluate them in single precision, in half the time; their results
                are double nevertheless, so that the sum over slices rounds no more.

        Returns:
            Their weights and functions.
        """
        sizes = [self.rows // count + (i < self.rows % count) for i in range(count)]
        slices, start = [], 0
        for size in sizes:
            slices.append((size / self.rows, self._function(fixed, start, size, single)))
            start += size
        return slices

    def _function(
        self, fixed: Sequence[Tensor], start: int, size: int, single: bool
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        if (size, single) not in self._graphs:
            self._graphs[size, single] = self._resize(size, single)
        pairs = zip(fixed, self._of_fixed, strict=True)
        own = [t if dim is None else t.narrow(dim, start, size) for t, dim in pairs]
        forward = self._graphs[size, single].forward
        if not single:
            return lambda points: tuple(forward(points, *own))
        rounded = [_in_single(tensor) for tensor in own]
        return lambda points: tuple(map(in_double, forward(points.float(), *rounded)))

    def _dimension(self, node: Node) -> int | None:
        """The dimension of the rows; ``None`` if there is none."""
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)):
            if any(self.rows in part.shape for part in value if isinstance(part, Tensor)):
                raise UnsliceableError("the parts of a tensor have rows")
            return None
        found = [i for i, n in enumerate(_shape(node)) if n == self.rows]
        if len(found) > 1:
            raise UnsliceableError("a tensor has two dimensions of rows")
        return found[0] if found else None

    def _check(self, node: Node) -> None:
        """Refuses an operation that does not keep rows apart."""
        name, own = _name(node), self._along[node]
        given = [other for other in node.all_input_nodes if self._along[other] is not None]
        if not given:
            known = own is None or (name in SIZED and name not in RESHAPES)
        elif own is None:
            known = self._sums_up(node, name)
        else:
            known = self._keeps(node, name, own, given)
        if not known:
            raise UnsliceableError(f"{name} does not keep rows apart")

    def _sums_up(self, node: Node, name: str) -> bool:
        """Whether an operation goes over all rows, and notes it if it is a sum."""
        if name in PRODUCTS or name in ("mv", "dot"):
            self._sums.add(node)
            return all(self._along[operand] is not None for operand in node.all_input_nodes)
        if name == "sum":
            self._sums.add(node)
        return name in REDUCTIONS or name.startswith("new_")

    def _keeps(self, node: Node, name: str, own: int, given: list[Node]) -> bool:
        """Whether each row of the result comes of the same row of what is given."""
        right = len(_shape(node)) - own
        operands: Any = node.args[:2]
        if name in RESHAPES:
            before, after = _shape(given[0])[: self._of(given[0])], _shape(node)[:own]
            return math.prod(before) == math.prod(after)
        if torch.Tag.pointwise in node.target.tags or name == "expand":  # type: ignore[union-attr]
            return all(len(_shape(other)) - self._of(other) == right for other in given)
        if name in MOVES or name in LIKE:
            return True
        if name in ALONG:
            dims: Any = node.args[1] if len(node.args) > 1 else 0
            reduced = [dims] if isinstance(dims, int) else dims
            size = len(_shape(given[0]))
            return self._of(given[0]) not in [dim % size for dim in reduced]
        if name in PRODUCTS:
            inner = [self._along[operand] for operand in operands]
            size = len(_shape(node))
            return inner in ([size - 2, None], [None, size - 1])
        if name == "index":
            return self._along[operands[0]] is None
        if name == "cat":
            dim: Any = node.args[1] if len(node.args) > 1 else 0
            return len(given) == len(node.all_input_nodes) and dim % len(_shape(node)) != own
        return name == "gather" and len(given) == 2 and operands[1] % len(_shape(node)) != own

    def _of(self, node: Node) -> int:
        dim = self._along[node]
        if dim is None:
            raise UnsliceableError("a tensor has no rows")
        return dim

    def _resize(self, size: int, single: bool) -> GraphModule:
        """The graph for so many rows, with sums that are scaled up."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in self._along:
            copy = copies[node] = graph.node_copy(node, copies.__getitem__)
            own, name = self._along[node], _name(node)
            if own is not None and name in SIZED:
                shape = [*_shape(node)]
                shape[own] = size
                copy.update_arg(SIZED[name], shape)
            if name == "bmm":
                copy.target = _multiply_matrices
            if single and copy.kwargs.get("dtype") is torch.double:
                copy.update_kwarg("dtype", torch.float)
            if node in self._sums:
                scaled = (copy, self.rows / size)
                copies[node] = graph.call_function(torch.ops.aten.mul.Tensor, scaled)
        graph.node_copy(self._output, copies.__getitem__)
        return GraphModule(self._module, graph)


def find_row_slices(graph: GraphModule) -> RowSlices | None:
    """The slices of the rows of a graph, if it is a sum over rows and they are many.

    Args:
        graph: A graph of points and of fixed tensors, recorded with examples of all values.
    """
    sizes = [size for node in graph.graph.nodes for size in _shape(node)]
    rows = max(sizes, default=0)
    if rows < LEAST_ROWS:
        return None
    try:
        return RowSlices(graph, rows)
    except UnsliceableError:
        return None


def _multiply_matrices(first: Tensor, second: Tensor) -> Tensor:
    """Products of matrices ``(b, n, m)`` and ``(b, m, k)``; by one matrix if the first is the same
    for all."""
    if first.stride(0) or len(first) == 1:
        return torch.bmm(first, second)
    product = second.mT.reshape(-1, second.shape[1]) @ first[0].mT
    return product.reshape(len(second), second.shape[2], -1).mT


def _in_single(tensor: Tensor) -> Tensor:
    """A tensor of real numbers in single precision, expanded as it was."""
    if not tensor.is_floating_point():
        return tensor
    one = [slice(1) if stride == 0 else slice(None) for stride in tensor.stride()]
    return tensor[tuple(one)].float().expand(tensor.shape)


def _shape(node: Node) -> Sequence[int]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


def _name(node: Node) -> str:
    packet: Any = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "__name__", str(node.target))
