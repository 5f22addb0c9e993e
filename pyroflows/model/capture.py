"""Graphs of the operations of a function of many points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .._compat import is_mutating, record_operations
from .row_slices import RowSlices, find_row_slices

__all__ = ["Captured", "ReadsInputsError", "capture"]

Run = Callable[[Tensor], tuple[Tensor, ...]]

# Rows of data times points in one evaluation of a slice: more leave the cache.
ROWS_AT_ONCE = 2**17


class ReadsInputsError(Exception):
    """A graph that holds for some values of its inputs only.

    Args:
        places: Which inputs these are.
    """

    def __init__(self, places: frozenset[int]) -> None:
        super().__init__("the operations depend on values of inputs")
        self.places = places


def capture(function: Callable[..., Any], points: Tensor, tensors: Sequence[Tensor]) -> GraphModule:
    """Records the operations of a function of points and of other tensors.

    Args:
        function: The function.
        points: Points of shape ``(n, features)``.
        tensors: Its other arguments.

    Returns:
        A graph with the results of the function for all arguments of these shapes.

    Raises:
        ReadsInputsError: If the operations depend on the values of some of the other arguments,
            which must then be constants.
        ValueError: If they depend on values of the points.
    """
    graph = record_operations(function)(points, *tensors)
    inputs = graph.graph.find_nodes(op="placeholder")
    if _reads_values(graph, inputs[:1]):
        raise ValueError("the operations depend on values of latent sites")
    read = [i for i, tensor in enumerate(inputs[1:]) if _reads_values(graph, [tensor])]
    if read:
        raise ReadsInputsError(frozenset(read))
    _merge_duplicates(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


class Captured:
    """The recorded operations of a function of many points, for one number of them.

    Args:
        graph: The graph of a function of points and of other tensors, whose last result tells for
            which points it holds.
        size: How many points it takes.
        split: Whether to evaluate the part that depends on no point once for all points; the
            results carry no graph of gradients then.

    Attributes:
        branches: Whether there may be points for which it does not hold.
        largest: The entries of its largest array for each point.
    """

    def __init__(self, graph: GraphModule, size: int, split: bool) -> None:
        *nodes, output = graph.graph.nodes
        varying = _dependent(nodes, {nodes[0]})
        self.branches = output.args[0][-1] in varying
        self.size = size
        arrays = [node.meta.get("val") for node in varying]
        counts = [array.numel() for array in arrays if isinstance(array, Tensor)]
        self.largest = max(counts, default=0) // size
        self._prelude: Callable[..., Any] = lambda *tensors: tensors
        self._body: Callable[..., Any] = graph.forward
        self._slices: RowSlices | None = None
        if split:
            prelude, body = _split(graph)
            self._prelude, self._body = torch.no_grad()(prelude.forward), body.forward
            self._slices = None if self.branches else find_row_slices(body)

    def bind_slices(self, tensors: Sequence[Tensor], single: bool) -> list[tuple[float, Run]]:
        """The function, without its last result, as a weighted sum of functions of some of the rows
        of data, in single precision on request; empty if it is not known to be a sum over many
        rows."""
        if self._slices is None:
            return []
        at_once = max(1, ROWS_AT_ONCE * self._slices.rows // (self.largest * self.size))
        count = -(-self._slices.rows // at_once)
        if count == 1:
            return []
        slices = self._slices.bind(self._prelude(*tensors), count, single)
        return [(weight, self._padded(_without_last(function))) for weight, function in slices]

    def bind(self, tensors: Sequence[Tensor]) -> Run:
        """The function of at most so many points at given values of the other tensors."""
        fixed = self._prelude(*tensors)
        return self._padded(lambda points: tuple(self._body(points, *fixed)))

    def _padded(self, function: Run) -> Run:
        """A function of so many points as one of fewer."""

        def run(points: Tensor) -> tuple[Tensor, ...]:
            missing = self.size - len(points)
            if not missing:
                return function(points)
            padding = points[-1:].expand(missing, -1)
            results = function(torch.cat([points, padding]))
            return tuple(result[: len(points)] for result in results)

        return run


def _without_last(function: Run) -> Run:
    return lambda points: function(points)[:-1]


# The graph


def _split(graph: GraphModule) -> tuple[GraphModule, GraphModule]:
    """Splits a graph of points and other tensors into the part that depends on no point, which
    takes these tensors, and the rest, which takes the points and the results of that part."""
    *nodes, output = graph.graph.nodes
    varying = _varying(nodes)
    needed = {node for user in [*varying, output] for node in user.all_input_nodes}
    fixed = [node for node in nodes if node in needed and node not in varying]
    prelude, body = Graph(), Graph()
    copies: dict[Node, Node] = {}
    inner = {nodes[0]: body.placeholder("points")}
    inner[nodes[0]].meta = nodes[0].meta
    for node in nodes[1:]:
        if node not in varying:
            copies[node] = prelude.node_copy(node, copies.__getitem__)
    prelude.output(tuple(copies[node] for node in fixed))
    for i, node in enumerate(fixed):
        inner[node] = body.placeholder(f"fixed_{i}")
        inner[node].meta = node.meta
    for node in nodes[1:]:
        if node in varying:
            inner[node] = body.node_copy(node, inner.__getitem__)
    body.node_copy(output, inner.__getitem__)
    return GraphModule(graph, prelude), GraphModule(graph, body)


def _varying(nodes: list[Node]) -> set[Node]:
    """The nodes that depend on the points, the first of the nodes, or that write into a tensor."""
    return _dependent(nodes, {nodes[0], *_written(nodes)})


def _written(nodes: list[Node]) -> set[Node]:
    """The nodes that write into a tensor, and those whose memory it may be."""
    written: set[Node] = set()
    for node in reversed(nodes):
        if is_mutating(node.target) or node in written:
            written.update(i for i in node.all_input_nodes if i.op == "call_function")
            written.add(node)
    return written


def _reads_values(graph: GraphModule, inputs: list[Node]) -> bool:
    """Whether operations depend on values of some inputs, so that they hold for these only."""
    given = _dependent(graph.graph.nodes, set(inputs))
    return any(node.op == "call_function" and _reads(node, given) for node in given)


def _reads(node: Any, given: set[Node]) -> bool:
    if node.target == torch.ops.aten.index.Tensor:  # by numbers, or by a mask
        indices = given.intersection(i for i in node.args[1] if isinstance(i, Node))
        return any(index.meta["val"].dtype == torch.bool for index in indices)
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return not tags.isdisjoint(getattr(node.target, "tags", ()))


def _dependent(nodes: Iterable[Node], sources: set[Node]) -> set[Node]:
    """The nodes that depend on some, these included."""
    dependent = set(sources)
    for node in nodes:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return dependent


def _merge_duplicates(graph: Graph) -> None:
    """Merges operations that a graph computes several times."""
    nodes = list(graph.nodes)
    touched = _written(nodes)
    known: dict[Any, Node] = {}
    for node in nodes:
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in tags:
            continue
        if node in touched or not touched.isdisjoint(node.all_input_nodes):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        same = known.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _hashable(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(map(_hashable, argument))
    if isinstance(argument, dict):
        return tuple((key, _hashable(value)) for key, value in argument.items())
    # 1, 1.0 and True are equal, but not the same argument.
    return type(argument), argument
