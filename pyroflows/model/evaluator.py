"""A function of one point, evaluated with its gradient for many points at a time."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from .._compat import functions_of_any_style, stamp, tree_flatten, tree_unflatten
from .._deadline import TimeOver
from .._vmap import vmap
from .base import Failures
from .batching import Batchable
from .branches import Branches
from .capture import Captured, ReadsInputsError, capture
from .faults import first_sentence
from .inputs import Inputs
from .program import POINT_ERRORS, Program, Run, Way
from .singular import Factorisations, NanWhereSingular, survives_failure
from .stable import selecting_no_entries
from .together import Together

__all__ = ["Evaluator"]

# How many graphs are made for other values of inputs that a model reads, such as mini-batches.
CAPTURES = 8

# Points far from the start at which a model that is run for many points together is compared.
FAR_OUT = 8

DIFFERENT = "its values differ from those of single traces"
VMAP_SAYS = "What torch.func.vmap says: "
SURVIVES = (
    "It goes on when a factorisation fails, by an except for its error, and in a batch no error "
    "can be raised for some of the points."
)


class Kind(NamedTuple):
    """What an evaluation gives.

    Attributes:
        gradients: Whether it gives gradients after the values.
        split: Whether the part that depends on no point is evaluated once for all points, so that
            values carry no graph to the inputs.
    """

    gradients: bool = True
    split: bool = True


class _Leaves:
    """Inputs taken apart into tensors and constants.

    Args:
        inputs: The inputs.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.leaves, self.spec = tree_flatten(inputs)

    def free(self, constants: frozenset[int]) -> list[int]:
        """The places of the leaves that are inputs of a graph."""
        places = range(len(self.leaves))
        return [i for i in places if isinstance(self.leaves[i], Tensor) and i not in constants]

    def tensors(self, constants: frozenset[int]) -> list[Tensor]:
        """The leaves that are inputs of a graph."""
        return [self.leaves[i] for i in self.free(constants)]

    def fixed(self, constants: frozenset[int]) -> list[Any]:
        """The leaves that are constants of a graph."""
        free = set(self.free(constants))
        return [leaf for i, leaf in enumerate(self.leaves) if i not in free]

    def rebuild(self, constants: frozenset[int], tensors: Sequence[Tensor]) -> Inputs:
        """The inputs with other tensors in the place of the free ones."""
        given = dict(zip(self.free(constants), tensors, strict=True))
        leaves = [given.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        return tree_unflatten(leaves, self.spec)

    def kind(self) -> Hashable:
        """The key of inputs that are evaluated in the same way."""
        kinds = [
            leaf.dim() if isinstance(leaf, Tensor) else _identity(leaf) for leaf in self.leaves
        ]
        return (self.spec, *kinds)

    def key(self, constants: frozenset[int]) -> Hashable:
        """The key of inputs that share a graph."""
        tensors = self.tensors(constants)
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        return (self.spec, *shapes, *map(_identity, self.fixed(constants)))


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
    """A digest that tells apart constants that may be changed in place, as arrays of numpy may."""
    try:
        return hashlib.sha256(pickle.dumps(constant)).digest()
    except Exception:  # a pickle refuses objects by any type of error
        return id(constant)


class Evaluator:
    """A function of one point and of inputs, evaluated with its gradient for many points.

    By the fastest of the ways whose results agree: as a captured graph of tensor operations, by
    :func:`torch.func.vmap`, in a plate around it, or one point at a time. The tensors among the
    inputs are inputs of the graph too, but for those whose values it reads, and the part that
    depends on no point is run once for each of their values. Where the function branches on values
    of the points, there is one graph for each combination of branches that is met.

    Args:
        function: From a point of shape ``(features,)`` and the inputs to a number.
        start: A point.
        failures: Is told why a point could not be evaluated.
        in_plate: From points of shape ``(n, features)`` and the inputs to ``n`` numbers, the same
            ones if the function can be written so.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Inputs], Tensor],
        start: Tensor,
        failures: Failures,
        in_plate: Callable[[Tensor, Inputs], Tensor] | None = None,
    ) -> None:
        self.in_plate = in_plate
        self.function, self.start, self.failures = function, start, failures
        self._ways: dict[Hashable, Way] = {}
        self.graphs: dict[Hashable, list[Captured]] = {}
        # How many graphs there are of inputs whose values they depend on.
        self._captures = 0
        # Whether a run has met a factorisation, whose error the function may catch.
        self._factorises = False
        # Whether it has functions of autograd, whose gradients a graph of values does not know.
        self._own_gradients = False
        # The same function in double precision, once it has been asked for.
        self.double: Evaluator | None = None
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
        way = self._way(leaves, batch_size) if mode is None else Way(mode, in_plate=mode == "plate")
        return self._make(leaves, batch_size, way)

    def make_differentiable(self, inputs: Inputs, batch_size: int, split: bool = False) -> Program:
        """The function at given inputs, with a graph to the points and to these inputs.

        Args:
            inputs: The inputs.
            batch_size: How many points one evaluation takes.
            split: Whether to evaluate the part that depends on no point once; the graph leads to
                the points only then.

        Returns:
            The program, which gives a tuple of one tensor of values.
        """
        leaves = _Leaves(inputs)
        way = self._way(leaves, batch_size)
        if self._own_gradients and way.mode == "captured":
            way = _uncaptured(way, "it has gradients of its own")
        return self._make(leaves, batch_size, way, Kind(gradients=False, split=split))

    def make_slices(
        self, inputs: Inputs, batch_size: int, single: bool = False
    ) -> list[tuple[float, Program]]:
        """The function at given inputs as a weighted sum of functions of some rows of data each,
        of which one at a time needs less memory than all; empty if it is not known to be one.

        Args:
            inputs: The inputs, of which :meth:`make_differentiable` has made the whole function.
            batch_size: As there.
            single: Whether they are evaluated in single precision.

        Returns:
            Weights, and programs that give a tuple of one tensor of values.
        """
        leaves = _Leaves(inputs)
        way = self._way(leaves, batch_size)
        graphs = self.graphs.get(_key(leaves, batch_size, way, Kind(gradients=False)))
        if not graphs or way.mode != "captured":
            return []
        slices = graphs[0].bind_slices(leaves.tensors(way.constants), single)
        return [
            (weight, Program(run, batch_size, self.failures, way, gradients=False))
            for weight, run in slices
        ]

    def learn_from(self, other: Evaluator) -> None:
        """Takes the ways of evaluation that another one has found for the same function."""
        self._ways = dict(other._ways)
        self._factorises, self._own_gradients = other._factorises, other._own_gradients

    # The ways

    def _make(self, leaves: _Leaves, batch_size: int, way: Way, kind: Kind = Kind()) -> Program:
        way = self._affordable(way, leaves, batch_size, kind)
        run = self._make_run(leaves, batch_size, way, kind)
        size = 1 if way.mode == "loop" else batch_size
        return Program(run, size, self.failures, way, kind.gradients)

    def _make_run(self, leaves: _Leaves, batch_size: int, way: Way, kind: Kind = Kind()) -> Run:
        one_by_one = self._loop(leaves.inputs, kind.gradients)
        if way.mode == "loop":
            return one_by_one
        alone = Program(one_by_one, 1, self.failures, Way("loop"), kind.gradients)
        tensors = leaves.tensors(way.constants)
        if kind.split:
            tensors = [tensor.detach() for tensor in tensors]
        batch = self._in_plate if way.in_plate else self._batched
        batched = batch(leaves, way.constants, kind.gradients)
        if way.mode != "captured":

            def run(points: Tensor) -> tuple[Tensor, ...]:
                return batched(points, *tensors)

            return Branches(run, lambda *_: run, alone)
        graphs = self.graphs.setdefault(_key(leaves, batch_size, way, kind), [])

        def follow(i: int, point: Tensor) -> Run:
            if i == len(graphs):
                graph = self._capture(batched, leaves, batch_size, way, point)
                graphs.append(Captured(graph, batch_size, split=kind.split))
            return graphs[i].bind(tensors)

        first = follow(0, self.start)
        if graphs[0].branches:
            return Branches(first, follow, alone)
        return lambda points: first(points)[:-1]

    def _loop(self, inputs: Inputs, gradients: bool) -> Run:
        def run(points: Tensor) -> tuple[Tensor, ...]:
            if not gradients:
                return (torch.stack([self.function(point, inputs) for point in points]),)
            pairs = [self._value_and_grad(point, inputs) for point in points]
            values, grads = zip(*pairs, strict=True)
            return torch.stack(values), torch.stack(grads)

        return run

    def _value_and_grad(self, point: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        try:
            return _differentiate(self.function, point, inputs)
        except RuntimeError:
            # A factorisation that fails gives NaN, as it does in a batch.
            with NanWhereSingular():
                return _differentiate(self.function, point, inputs)

    # Batches

    def _batched(
        self, leaves: _Leaves, constants: frozenset[int], gradients: bool
    ) -> Callable[..., Any]:
        """The function of many points and of the free tensors: its values, its gradients on
        request, and for which points they hold."""

        def function(point: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            return self._follow(point, leaves.rebuild(constants, tensors))

        def with_gradient(point: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            differentiated = torch.func.grad_and_value(function, has_aux=True)
            grad, (value, held) = differentiated(point, *tensors)
            return value, grad, held

        shared = (None,) * len(leaves.tensors(constants))
        of_point = with_gradient if gradients else function
        batched = vmap(of_point, in_dims=(0, *shared))

        def run(points: Tensor, *tensors: Tensor) -> Any:
            # Around differentiation, because gradients factorise matrices too.
            with (
                NanWhereSingular(),
                functions_of_any_style() as applied,
                selecting_no_entries(),
            ):
                results = batched(points, *tensors)
            self._own_gradients |= bool(applied)
            return results

        return run

    def _in_plate(
        self, leaves: _Leaves, constants: frozenset[int], gradients: bool
    ) -> Callable[..., Any]:
        """As :meth:`_batched`, by one run of the model for all points."""

        def run(points: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            assert self.in_plate is not None
            inputs = leaves.rebuild(constants, tensors)
            held = torch.ones(len(points), dtype=torch.bool, device=points.device)
            function = functools.partial(_run_together, self.in_plate)
            with NanWhereSingular(), selecting_no_entries():
                if not gradients:
                    return function(points, inputs), held
                return *_differentiate(function, points, inputs), held

        return run

    def _follow(self, point: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The function along the branches of the first point, and whether they are this one's."""
        batchable = Batchable(point)
        try:
            with batchable:
                value = self.function(point, inputs)
        except POINT_ERRORS as error:
            if not batchable.branched:
                raise
            self.failures.reason = first_sentence(error)
            value = point.sum() * torch.nan  # as at all points that take these branches
        return value, batchable.held

    def _capture(
        self,
        batched: Callable[..., Any],
        leaves: _Leaves,
        batch_size: int,
        way: Way,
        point: Tensor,
    ) -> GraphModule:
        points = point.expand(batch_size, -1).contiguous()
        # Fresh views: the same tensor given twice is two inputs.
        tensors = [tensor.detach() for tensor in leaves.tensors(way.constants)]
        try:
            graph = capture(batched, points, tensors)
        except ReadsInputsError as error:
            places = leaves.free(way.constants)
            raise ReadsInputsError(frozenset(places[i] for i in error.places)) from None
        self._constants.extend(leaves.fixed(way.constants))
        return graph

    # The choice of a way

    def _affordable(self, way: Way, leaves: _Leaves, batch_size: int, kind: Kind) -> Way:
        """The way without a capture, where the constants of the graphs change all the time."""
        key = _key(leaves, batch_size, way, kind)
        if way.mode != "captured" or not way.constants or key in self.graphs:
            return way
        self._captures += 1
        if self._captures > CAPTURES:
            return _uncaptured(way, "its operations depend on values of data that change")
        return way

    def _way(self, leaves: _Leaves, batch_size: int) -> Way:
        kind = leaves.kind()
        if kind not in self._ways:
            self._ways[kind] = self._choose_way(leaves, batch_size)
        return self._ways[kind]

    @torch.no_grad()
    def _choose_way(self, leaves: _Leaves, batch_size: int) -> Way:
        points, values, grads = self._references(leaves.inputs, min(3, batch_size))
        if self._factorises and survives_failure(lambda: self.function(points[0], leaves.inputs)):
            return Way("loop", SURVIVES)
        n = len(points)
        batch = points.repeat(-(-batch_size // n), 1)[:batch_size]

        def agrees(way: Way) -> bool:
            run = self._make_run(leaves, batch_size, way)
            value, grad = run(batch)
            near = agree(value[:n], values) and agree(grad[:n], grads)
            return near and (not way.in_plate or self._agrees_far_out(run, leaves, batch_size))

        ways = (
            [Way("vmap")] if self.in_plate is None else [Way("vmap"), Way("plate", in_plate=True)]
        )
        reasons = []
        for way in ways:
            captured = self._capturing(agrees, way._replace(mode="captured"))
            if isinstance(captured, Way):
                return captured
            why = self._failure(functools.partial(agrees, way))
            if not why:
                return way._replace(reason=captured)
            reasons.append(why)
        for i in range(n):
            self._check_repeats(leaves.inputs, points[i], values[i], grads[i])
        return Way("loop", VMAP_SAYS + reasons[0])

    def _agrees_far_out(self, run: Run, leaves: _Leaves, batch_size: int) -> bool:
        """Whether points far from each other do not change each other's values."""
        generator = torch.Generator(device="cpu").manual_seed(1)
        noise = torch.randn(FAR_OUT, len(self.start), generator=generator, device="cpu")
        spread = torch.linspace(0.5, 3.0, FAR_OUT).unsqueeze(-1)
        points = (self.start + (spread * noise).to(self.start))[:batch_size]
        alone = torch.stack([self._value_alone(point, leaves.inputs) for point in points])
        batch = points.repeat(-(-batch_size // len(points)), 1)[:batch_size]
        together = run(batch)[0][: len(points)]
        pairs = zip(together, alone, strict=True)
        return all(bool(b.isnan()) or agree(a, b) for a, b in pairs)

    def _value_alone(self, point: Tensor, inputs: Inputs) -> Tensor:
        """The value at a point, NaN where the function fails."""
        try:
            return self._value_and_grad(point, inputs)[0]
        except POINT_ERRORS:
            return point.new_tensor(torch.nan)

    @staticmethod
    def _capturing(agrees: Callable[[Way], bool], way: Way) -> Way | str:
        """The way with those inputs as constants that must be for a capture, or why it fails."""
        while True:
            try:
                agreed = agrees(way)
            except ReadsInputsError as error:
                way = way._replace(constants=way.constants | error.places)
            except TimeOver:
                raise
            except Exception as error:
                return first_sentence(error)
            else:
                return way if agreed else DIFFERENT

    @staticmethod
    def _failure(agrees: Callable[[], bool]) -> str:
        """Why a way of evaluation fails; empty if it does not."""
        try:
            return "" if agrees() else DIFFERENT
        except TimeOver:
            raise
        except Exception as error:
            return first_sentence(error)

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
        self._check_repeats(inputs, *found[0])
        points, values, grads = zip(*found, strict=True)
        return torch.stack(points), torch.stack(values), torch.stack(grads)

    def _check_repeats(self, inputs: Inputs, point: Tensor, value: Tensor, grad: Tensor) -> None:
        """Refuses a function that has another value or gradient when it is run again."""
        with Factorisations() as noted:
            again = self._value_and_grad(point, inputs)
        self._factorises |= bool(noted.places)
        if not (agree(again[0], value) and agree(again[1], grad)):
            raise ValueError(
                "Expected a model whose log density is a function of its latent sites; got two "
                "values at one point. Does it draw random numbers outside of pyro.sample?"
            )

    def _candidates(self) -> Iterator[Tensor]:
        generator = torch.Generator(device="cpu").manual_seed(0)
        noise = torch.randn(3, len(self.start), generator=generator, device="cpu").to(self.start)
        yield from self.start + 0.1 * noise
        yield self.start
        yield from self.start + 0.01 * noise


def _run_together(
    function: Callable[[Tensor, Inputs], Tensor], points: Tensor, inputs: Inputs
) -> Tensor:
    with Together(points):
        return function(points, inputs)


def _differentiate(
    function: Callable[[Tensor, Inputs], Tensor], points: Tensor, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """The values of a function at one point, or at many, and its gradients there."""
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        values = function(points, inputs)
        if not values.requires_grad:  # a density that is flat everywhere has no graph
            return values, torch.zeros_like(points)
        (grads,) = torch.autograd.grad(values.sum(), points, allow_unused=True)
    return values.detach(), torch.zeros_like(points) if grads is None else grads


def _key(leaves: _Leaves, batch_size: int, way: Way, kind: Kind) -> Hashable:
    """The key of evaluations that share graphs."""
    return kind, way.in_plate, leaves.key(way.constants), batch_size


def _uncaptured(way: Way, reason: str) -> Way:
    return way._replace(mode="plate" if way.in_plate else "vmap", reason=reason)


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one computation are equal up to rounding."""
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-3
    scale = 1 + b.abs().nan_to_num(0, 0, 0).amax()
    return torch.allclose(a, b, rtol=tolerance, atol=float(tolerance * scale), equal_nan=True)
