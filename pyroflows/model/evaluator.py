"""A function of one point, evaluated with its gradient for many points at a time."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .._compat import is_mutating, make_fx, stamp, tree_flatten, tree_unflatten
from .._deadline import check_time
from .._vmap import vmap
from .base import Failures
from .handlers import DetachedData
from .inputs import Inputs
from .singular import NanWhereSingular

__all__ = ["Evaluator", "Program", "first_sentence", "map_points"]

Run = Callable[[Tensor], tuple[Tensor, ...]]

# Errors that a model raises at a point where it cannot be evaluated. Any other, of the wrong size
# or type for instance, is one of the model or of its data, and is raised.
POINT_ERRORS = (
    torch.linalg.LinAlgError,
    ArithmeticError,
    AssertionError,
    IndexError,
    ValueError,
)
# What a run may raise that succeeds elsewhere: samplers and factorisations raise RuntimeErrors too.
FAILURES = (*POINT_ERRORS, RuntimeError)


class Way(NamedTuple):
    """How points are evaluated.

    Attributes:
        mode: ``"captured"``, ``"vmap"`` or ``"loop"``.
        free: Which tensors are inputs of a captured graph, a place in ``FREE``.
        reason: Why points are evaluated one at a time, if they are.
    """

    mode: str
    free: int = 0
    reason: str = ""


# Which tensors are inputs of a captured graph; the others are constants. A model that reads values
# of its data, most often of counts and indices, cannot be captured with these as inputs.
FREE: tuple[Callable[[Any], bool], ...] = (
    lambda leaf: isinstance(leaf, Tensor),
    lambda leaf: isinstance(leaf, Tensor) and leaf.is_floating_point(),
    lambda leaf: False,
)


class _Leaves:
    """Inputs taken apart into tensors and constants.

    Args:
        inputs: The inputs.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.leaves, self.spec = tree_flatten(inputs)

    def tensors(self, free: int) -> list[Tensor]:
        """The leaves that are inputs of a graph."""
        return [leaf for leaf in self.leaves if FREE[free](leaf)]

    def constants(self, free: int) -> list[Any]:
        """The leaves that are constants of a graph."""
        return [leaf for leaf in self.leaves if not FREE[free](leaf)]

    def rebuild(self, free: int, tensors: Sequence[Tensor]) -> Inputs:
        """The inputs with other tensors in the place of the free ones."""
        given = iter(tensors)
        leaves = [next(given) if FREE[free](leaf) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)

    def kind(self) -> Hashable:
        """What inputs have in common that are evaluated in the same way."""
        kinds = [
            leaf.dim() if isinstance(leaf, Tensor) else _identity(leaf) for leaf in self.leaves
        ]
        return (self.spec, *kinds)

    def key(self, free: int) -> Hashable:
        """What inputs have in common that share a graph."""
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self.tensors(free)]
        return (self.spec, *shapes, *map(_identity, self.constants(free)))


def _identity(constant: Any) -> Hashable:
    if isinstance(constant, Tensor):
        # Its values may have been changed in place.
        return stamp(constant)
    try:
        hash(constant)
    except TypeError:
        return type(constant), _content(constant)
    return type(constant), constant


def _content(constant: Any) -> Hashable:
    """What tells apart constants that may be changed in place, such as arrays of numpy."""
    try:
        return hashlib.sha256(pickle.dumps(constant)).digest()
    except Exception:  # what a pickle refuses is told by any type of error
        return id(constant)


class Program:
    """A function of many points at given inputs.

    Args:
        run: The function, for at most ``batch_size`` points of shape ``(n, features)``.
        batch_size: How many points one run takes.
        failures: Is told why a point could not be evaluated.
        way: How points are evaluated.
        gradients: Whether a run gives gradients after the values.
    """

    def __init__(
        self, run: Run, batch_size: int, failures: Failures, way: Way, gradients: bool = True
    ) -> None:
        self.run, self.batch_size, self.failures, self.way = run, batch_size, failures, way
        self.gradients = gradients

    def __call__(self, points: Tensor) -> tuple[Tensor, ...]:
        """Values of shape ``(n,)`` and gradients of shape ``(n, features)``, NaN where it fails."""
        parts = [self._isolate(chunk) for chunk in points.split(self.batch_size)]
        return parts[0] if len(parts) == 1 else _concatenate(parts)

    def _isolate(self, points: Tensor) -> tuple[Tensor, ...]:
        """Halves a batch that fails until the points that make it fail stand alone."""
        check_time()
        try:
            return self.run(points)
        except POINT_ERRORS as error:
            self.failures.reason = first_sentence(error)
        if len(points) == 1:
            blank = (points.new_full((1,), torch.nan), torch.full_like(points, torch.nan))
            return blank if self.gradients else blank[:1]
        middle = len(points) // 2
        return _concatenate([self._isolate(half) for half in (points[:middle], points[middle:])])


class Evaluator:
    """A function of one point and of inputs, evaluated with its gradient for many points.

    By the fastest of three ways whose results agree: as a captured graph of tensor operations, by
    :func:`torch.func.vmap`, or one point at a time. The tensors among the inputs are inputs of the
    graph too, and the part of it that depends on no point is run once for each of their values.

    Args:
        function: From a point of shape ``(features,)`` and the inputs to a number.
        start: A point.
        failures: Is told why a point could not be evaluated.
    """

    def __init__(
        self, function: Callable[[Tensor, Inputs], Tensor], start: Tensor, failures: Failures
    ) -> None:
        self.function, self.start, self.failures = function, start, failures
        self._ways: dict[Hashable, Way] = {}
        self._graphs: dict[Hashable, Any] = {}
        # Kept so that the identities in the keys of the graphs cannot be reused.
        self._constants: list[Any] = []

    def make_program(self, inputs: Inputs, batch_size: int, mode: str | None = None) -> Program:
        """The function at given inputs, with its gradient.

        Args:
            inputs: The inputs. Of those that differ in tensors of equal ranks only, all after the
                first are evaluated in the same way, and those of equal sizes share one graph.
            batch_size: How many points one evaluation takes.
            mode: The way to evaluate; the fastest if ``None``.

        Returns:
            The program, which gives values and gradients.

        Raises:
            ValueError: If the function has two values at one point.
        """
        leaves = _Leaves(inputs)
        way = self._way(leaves, batch_size) if mode is None else Way(mode)
        run = self._make_run(leaves, batch_size, way)
        return Program(run, 1 if way.mode == "loop" else batch_size, self.failures, way)

    def make_differentiable(self, inputs: Inputs, batch_size: int) -> Program:
        """The function at given inputs, with a graph to the points and to these inputs.

        Args:
            inputs: The inputs.
            batch_size: How many points one evaluation takes.

        Returns:
            The program, which gives a tuple of one tensor of values.
        """
        leaves = _Leaves(inputs)
        way = self._way(leaves, batch_size)
        if way.mode == "loop":
            return Program(self._loop_values(inputs), 1, self.failures, way, gradients=False)
        evaluate = batched = self._batched(leaves, way.free)
        if way.mode == "captured":
            key = ("whole", leaves.key(way.free), batch_size)
            evaluate = self._cached(key, lambda: self._capture(batched, leaves, batch_size, way))
        tensors = leaves.tensors(way.free)

        def run(points: Tensor) -> tuple[Tensor, ...]:
            return (evaluate(_padded(points, batch_size), *tensors)[: len(points)],)

        return Program(run, batch_size, self.failures, way, gradients=False)

    # The three ways

    def _make_run(self, leaves: _Leaves, batch_size: int, way: Way) -> Run:
        if way.mode == "loop":
            return lambda points: self._loop(points, leaves.inputs)
        tensors = [tensor.detach() for tensor in leaves.tensors(way.free)]
        if way.mode == "vmap":
            batched = self._batched(leaves, way.free, torch.func.grad_and_value)
            return lambda points: batched(points, *tensors)[::-1]
        key = ("halves", leaves.key(way.free), batch_size)
        prelude, body = self._cached(key, lambda: self._capture_halves(leaves, batch_size, way))
        with torch.no_grad():
            return _captured_run(body, prelude(*tensors), batch_size)

    def _loop(self, points: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        pairs = [self._value_and_grad(point, inputs) for point in points]
        values, grads = zip(*pairs, strict=True)
        return torch.stack(values), torch.stack(grads)

    def _value_and_grad(self, point: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        try:
            return self._differentiate(point, inputs)
        except RuntimeError:
            # A factorisation that fails gives NaN, as it does in a batch.
            with NanWhereSingular():
                return self._differentiate(point, inputs)

    def _differentiate(self, point: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            value = self.function(point, inputs)
            if not value.requires_grad:  # a density that is flat everywhere has no graph
                return value, torch.zeros_like(point)
            (grad,) = torch.autograd.grad(value, point, allow_unused=True)
        return value.detach(), torch.zeros_like(point) if grad is None else grad

    def _loop_values(self, inputs: Inputs) -> Run:
        return lambda points: (torch.stack([self.function(point, inputs) for point in points]),)

    # Captured graphs

    def _batched(
        self, leaves: _Leaves, free: int, transform: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """The function of many points and of the free tensors."""

        def function(point: Tensor, *tensors: Tensor) -> Tensor:
            with DetachedData():
                return self.function(point, leaves.rebuild(free, tensors))

        shared = len(leaves.tensors(free))
        of_point = function if transform is None else transform(function)
        of_points = vmap(of_point, in_dims=(0, *(None for _ in range(shared))))

        def of_batch(points: Tensor, *tensors: Tensor) -> Any:
            # Around differentiation, because gradients factorise matrices too.
            with NanWhereSingular():
                return of_points(points, *tensors)

        return of_batch

    def _cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._graphs:
            self._graphs[key] = make()
        return self._graphs[key]

    def _capture_halves(
        self, leaves: _Leaves, batch_size: int, way: Way
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        batched = self._batched(leaves, way.free, torch.func.grad_and_value)
        prelude, body = _split(self._capture(batched, leaves, batch_size, way))
        return prelude.forward, body.forward

    def _capture(
        self, batched: Callable[..., Any], leaves: _Leaves, batch_size: int, way: Way
    ) -> GraphModule:
        points = self.start.expand(batch_size, -1).contiguous()
        # Fresh views: the same tensor given twice is two inputs.
        tensors = [tensor.detach() for tensor in leaves.tensors(way.free)]
        graph = make_fx(batched)(points, *tensors)
        if _reads_values(graph):
            raise ValueError("The shapes in the model depend on values of its data.")
        graph.graph.eliminate_dead_code()
        graph.recompile()
        self._constants.extend(leaves.constants(way.free))
        return graph

    # The choice of a way

    def _way(self, leaves: _Leaves, batch_size: int) -> Way:
        kind = leaves.kind()
        if kind not in self._ways:
            self._ways[kind] = self._choose_way(leaves, batch_size)
        return self._ways[kind]

    @torch.no_grad()
    def _choose_way(self, leaves: _Leaves, batch_size: int) -> Way:
        points, values, grads = self._references(leaves.inputs, min(3, batch_size))
        n = len(points)
        batch = points.repeat(-(-batch_size // n), 1)[:batch_size]

        def agrees(way: Way) -> bool:
            value, grad = self._make_run(leaves, batch_size, way)(batch)
            return agree(value[:n], values) and agree(grad[:n], grads)

        if _succeeds(lambda: agrees(Way("captured"))):
            return Way("captured")
        try:
            if not agrees(Way("vmap")):
                return Way("loop", reason="its values differ from those of single traces")
        except Exception as error:
            return Way("loop", reason=first_sentence(error))
        for free in range(1, len(FREE)):
            way = Way("captured", free)
            if _succeeds(lambda way=way: agrees(way)):  # type: ignore[misc]
                return way
        return Way("vmap")

    def _references(self, inputs: Inputs, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Points at which the function can be evaluated, with values and gradients by the loop."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        failed: list[tuple[Tensor, Tensor, Tensor]] = []
        last: Exception | None = None
        for point in self._candidates():
            try:
                value, grad = self._value_and_grad(point, inputs)
            except POINT_ERRORS as error:
                last = error
                continue
            (failed if value.isnan() else found).append((point, value, grad))
            if len(found) == count:
                break
        # Where the model gives NaN everywhere, its ways agree on that.
        found = found or failed[:count]
        if not found and last is not None:
            raise last
        point, value, _ = found[0]
        if not agree(self._value_and_grad(point, inputs)[0], value):
            raise ValueError(
                "Expected a model whose log density is a function of its latent sites; got two "
                "values at one point. Does it draw random numbers outside of pyro.sample?"
            )
        points, values, grads = zip(*found, strict=True)
        return torch.stack(points), torch.stack(values), torch.stack(grads)

    def _candidates(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(3, len(self.start), generator=generator, device="cpu").to(self.start)
        yield from self.start + 0.1 * noise
        yield self.start
        yield from self.start + 0.01 * noise


def map_points(
    function: Callable[[Tensor], dict[str, Tensor]],
    points: Tensor,
    batch_size: int,
    safe: Tensor | None = None,
) -> dict[str, Tensor]:
    """Evaluates a function of one point for many, with other random numbers for each.

    Args:
        function: From a point of shape ``(features,)`` to tensors by name.
        points: Points of shape ``(n, features)``.
        batch_size: How many points one evaluation takes; one at a time if 1.
        safe: A point of shape ``(features,)`` at which the function can be evaluated. If given,
            the results at points where it fails are NaN; else its error is raised.

    Returns:
        For each name a tensor with a first dimension of size ``n``.
    """
    if batch_size > 1:
        try:
            with NanWhereSingular(), DetachedData():
                batched = vmap(function, randomness="different", chunk_size=batch_size)
                return batched(points)
        except (RuntimeError, ValueError):
            pass  # some samplers have no batching rule; one run at a time needs none
    runs = [_run_once(function, point, strict=safe is None) for point in points]
    known = next((run for run in runs if run is not None), None)
    if known is None:
        known = function(points[0] if safe is None else safe)
    # Without a dtype: NaN is no integer.
    blank = {name: torch.full(t.shape, torch.nan, device=t.device) for name, t in known.items()}
    return {name: torch.stack([(run or blank)[name] for run in runs]) for name in known}


def _run_once(
    function: Callable[[Tensor], dict[str, Tensor]], point: Tensor, strict: bool
) -> dict[str, Tensor] | None:
    """The results at a point; ``None`` where the function fails, unless that is an error."""
    check_time()
    try:
        return function(point)
    except FAILURES:
        if strict:
            raise
        return None


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one computation are equal up to rounding."""
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-3
    scale = 1 + b.abs().nan_to_num(0, 0, 0).amax()
    return torch.allclose(a, b, rtol=tolerance, atol=float(tolerance * scale), equal_nan=True)


def first_sentence(error: Exception) -> str:
    """The first sentence of an error's message, or the name of its type."""
    message, *_ = str(error).split("Trace Shapes:")  # by which Pyro shows what it has run
    text = " ".join(message.split())
    return text.split(". ")[0][:200] or type(error).__name__


def _padded(points: Tensor, size: int) -> Tensor:
    """Points and copies of the last one, as many as a graph takes."""
    missing = size - len(points)
    return torch.cat([points, points[-1:].expand(missing, -1)]) if missing else points


def _captured_run(body: Callable[..., Any], fixed: tuple[Tensor, ...], batch_size: int) -> Run:
    def run(points: Tensor) -> tuple[Tensor, ...]:
        n = len(points)
        grad, value = body(_padded(points, batch_size), *fixed)
        return (value, grad) if n == batch_size else (value[:n], grad[:n])

    return run


def _split(graph: GraphModule) -> tuple[GraphModule, GraphModule]:
    """Splits a graph of points and other tensors into the part that depends on no point, which
    takes these tensors, and the rest, which takes the points and what that part gives."""
    *nodes, output = graph.graph.nodes
    varying = _varying(nodes)
    needed = {node for user in [*varying, output] for node in user.all_input_nodes}
    fixed = [node for node in nodes if node in needed and node not in varying]
    prelude, body = Graph(), Graph()
    copies: dict[Node, Node] = {}
    inner = {nodes[0]: body.placeholder("points")}
    for node in nodes[1:]:
        if node not in varying:
            copies[node] = prelude.node_copy(node, copies.__getitem__)
    prelude.output(tuple(copies[node] for node in fixed))
    for i, node in enumerate(fixed):
        inner[node] = body.placeholder(f"fixed_{i}")
    for node in nodes[1:]:
        if node in varying:
            inner[node] = body.node_copy(node, inner.__getitem__)
    body.node_copy(output, inner.__getitem__)
    return GraphModule(graph, prelude), GraphModule(graph, body)


def _varying(nodes: list[Node]) -> set[Node]:
    """The nodes that depend on the points, the first of the nodes, or that write into a tensor."""
    written: set[Node] = set()
    for node in reversed(nodes):
        if is_mutating(node.target) or node in written:
            written.update(i for i in node.all_input_nodes if i.op == "call_function")
            written.add(node)
    return _dependent(nodes, {nodes[0], *written})


def _reads_values(graph: GraphModule) -> bool:
    """Whether shapes in a graph depend on values of its inputs, so that it holds for these only."""
    inputs = graph.graph.find_nodes(op="placeholder")
    given = _dependent(graph.graph.nodes, set(inputs[1:]))
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


def _concatenate(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _succeeds(attempt: Callable[[], bool]) -> bool:
    try:
        return attempt()
    except Exception:
        return False
