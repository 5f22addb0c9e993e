"""What the laws see of a transform or flow: copies of it, points, and the room that rounding has."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from .._checks import check_context, check_tensor
from .._wording import unstopped
from ..distributions.flow import sum_rightmost
from ..flows import Flow
from ..transforms import Transform

#: How many roundings of its data a value may be off.
ROUNDINGS = 256
#: Errors of points, as shares of that.
SHARES = (1.0, 1 / 8, 1 / 64)
#: The most points that are judged of those that are given.
MOST_POINTS = 32
DTYPES = (torch.float64, torch.float32)

Outputs = tuple[Tensor, ...]


class Broken(Exception):
    """The sentence of a law that does not hold."""


class LeftOut(Exception):
    """Why a law says nothing about a case."""


@dataclass(frozen=True)
class Direction:
    """A function of points and context, the points to try it on, and the event shapes of what it returns."""

    name: str
    call: Callable[[Any, Tensor, Tensor | None], Any]
    points: Tensor
    shapes: tuple[tuple[int, ...], ...]
    constraint: constraints.Constraint

    @property
    def names(self) -> tuple[str, ...]:
        """What it returns."""
        return ("values", "log-determinants") if len(self.shapes) == 2 else ("densities",)

    def __call__(self, module: nn.Module, points: Tensor, context: Tensor | None) -> Outputs:
        """Evaluates at copies, so that nothing that is remembered by identity comes back."""
        outputs = self.call(module, points.clone(), None if context is None else context.clone())
        return outputs if isinstance(outputs, tuple) else (outputs,)


@dataclass(frozen=True)
class Options:
    """What the caller asks for."""

    starts_at_identity: bool
    compile: bool
    accuracy: float
    make: Callable[[], Any] | None


class Case:
    """One transform or flow as the laws see it."""

    def __init__(
        self, given: Transform | Flow, x: Tensor | None, context: Tensor | None, options: Options
    ) -> None:
        self.options = options
        try:
            self.original = copy.deepcopy(given).to("cpu").eval()
        except Exception as error:
            raise Broken(f"Expected a deep copy; got {told(error)}.") from error
        self.pristine = copy.deepcopy(self.original).to(torch.float64)
        self.transform = transform_of(self.pristine)
        self.accuracy = max([options.accuracy, *map(_declared_accuracy, parts(given))])
        self._shaken: dict[tuple[float, int, float], nn.Module] = {}
        self._modules: dict[torch.dtype, nn.Module] = {}
        self._room: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        self._place(x, context)

    # Points and contexts

    def _place(self, x: Tensor | None, context: Tensor | None) -> None:
        t = self.transform
        onto, codomain_onto = bijection(t.domain), bijection(t.codomain)
        if x is None and onto is None:
            raise ValueError(
                f"Expected x, points of the domain of {type(t).__name__}, for there is no bijection onto it."
            )
        n = 20 if x is None else _count(x, self._point_shape())
        self.contexts = self._contexts(context, n)
        if x is None:
            self.x = onto(normal_points(n, onto.inverse_shape(t.event_shape)))  # type: ignore[union-attr]
        else:
            stride = math.ceil(n / MOST_POINTS)
            self.contexts = None if self.contexts is None else self.contexts[::stride]
            self.x = self._base_points(_flat(x, self._point_shape())[::stride])
            if not bool(satisfies(t.domain, self.x).all()):
                raise ValueError(
                    f"Expected x with points of the domain, {t.domain}; got some outside."
                )
        self.y = back = self._images()
        if x is None and codomain_onto is not None:
            back = codomain_onto(
                normal_points(n, codomain_onto.inverse_shape(t.image_shape), seed=1)
            )
        self.directions = [
            Direction("forward_and_log_det", forward, self.x, (tuple(t.image_shape), ()), t.domain),
            Direction("inverse_and_log_det", inverse, back, (tuple(t.event_shape), ()), t.codomain),
        ]
        self.forward, self.inverse = self.directions
        self.batch_shape = torch.Size()
        self.values = self.y
        self.density = Direction("log_prob", self._density, self.y, ((),), t.codomain)
        if isinstance(self.pristine, Flow):
            self._place_values(self.pristine)

    def _images(self) -> Tensor:
        try:
            with torch.no_grad():
                return self.transform.forward_and_log_det(self.x.clone(), self.contexts)[0]
        except Exception:  # the laws evaluate it again, and report
            return self.x

    def _place_values(self, flow: Flow) -> None:
        """Adds the density of a flow to the functions that are judged."""
        self.batch_shape = base_of(flow).batch_shape
        constraint = self.transform.codomain if flow.support is None else flow.support
        with torch.no_grad():
            self.values = onto_support(flow)(self.y)
        shapes = (tuple(self.batch_shape),)
        self.density = Direction("log_prob", self._density, self.values, shapes, constraint)
        self.directions.append(
            Direction("log_prob", self._log_prob, self.values, shapes, constraint)
        )

    def _point_shape(self) -> torch.Size:
        if isinstance(self.pristine, Flow):
            return onto_support(self.pristine).forward_shape(self.transform.image_shape)
        return self.transform.event_shape

    def _base_points(self, x: Tensor) -> Tensor:
        if not isinstance(self.pristine, Flow):
            return x
        with torch.no_grad():
            return self.transform.inverse_and_log_det(
                onto_support(self.pristine).inv(x), self.contexts
            )[0]

    def _contexts(self, context: Tensor | None, n: int) -> Tensor | None:
        shape = self.transform.context_shape
        if shape is None:
            return check_context(context, None, type(self.transform).__name__)
        if context is None:
            generator = torch.Generator().manual_seed(3)
            return torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        given = check_tensor("context", context, shape).detach().to("cpu", torch.float64)
        given = given.reshape(-1, *shape)
        if len(given) not in (1, n):
            sizes = ", ".join(map(str, shape))
            raise ValueError(
                f"Expected context of shape (*, {sizes}) for one point or for {n}; "
                f"got {tuple(context.shape)}."
            )
        return given.expand(n, *shape).clone()

    @property
    def context_dim(self) -> int:
        """Dimensions of one context."""
        return len(self.transform.context_shape or ())

    def batch(self, points: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Points, and their contexts, in a batch of another shape."""
        index = torch.arange(math.prod(shape)) % len(points)
        chosen = points[index].reshape((*shape, *points.shape[1:]))
        return chosen, None if self.contexts is None else self.contexts[index].reshape(
            (*shape, *self.contexts.shape[1:])
        )

    # Copies

    def fresh(self, dtype: torch.dtype = torch.float64) -> Any:
        """A copy that nobody else sees."""
        return copy.deepcopy(self.pristine).to(dtype)

    def module(self, dtype: torch.dtype = torch.float64) -> Any:
        """The copy of the law that is being judged."""
        if dtype not in self._modules:
            self._modules[dtype] = self.fresh(dtype)
        return self._modules[dtype]

    def forget(self) -> None:
        """Gives the next law a copy of its own."""
        self._modules = {}

    def shaken(self, size: float, seed: int, sign: float) -> nn.Module:
        """A copy whose parameters are off by a relative error."""
        key = (size, seed, sign)
        if key not in self._shaken:
            module, generator = self.fresh(), torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1 + sign * size * _signs(parameter.shape, generator))
            self._shaken[key] = module
        return self._shaken[key]

    # Distributions

    def base(self) -> Any:
        """The base of a flow, or the standard normal, mapped into the domain of a transform."""
        if isinstance(self.pristine, Flow):
            return base_of(self.pristine)
        onto = bijection(self.transform.domain)
        if onto is None:
            raise LeftOut("no distribution over the domain is known")
        shape = onto.inverse_shape(self.transform.event_shape)
        normal = dist.Normal(torch.zeros(shape, dtype=torch.float64), 1.0).to_event(len(shape))
        return (
            normal
            if is_real(self.transform.domain)
            else dist.TransformedDistribution(normal, [onto])
        )

    def distribution(self, module: Any, context: Tensor | None) -> Any:
        """The distribution that a flow gives, or the one that Pyro makes of a transform."""
        if isinstance(module, Flow):
            return module(with_room(context, self.context_dim, len(self.batch_shape)))
        return dist.TransformedDistribution(
            self.base(), [module if context is None else module.condition(context)]
        )

    def _log_prob(self, flow: Flow, values: Tensor, context: Tensor | None) -> Tensor:
        spare = len(self.batch_shape)
        return flow(with_room(context, self.context_dim, spare)).log_prob(
            with_room(values, len(self._point_shape()), spare)
        )

    def density_by_hand(self, module: Any, values: Tensor, context: Tensor | None) -> Tensor:
        """The change of variables, written out."""
        z, log_det_onto = values, values.new_zeros(())
        if isinstance(module, Flow):
            onto = onto_support(module)
            z = onto.inv(values)
            log_det_onto = onto.log_abs_det_jacobian(z, values)
            log_det_onto = sum_rightmost(
                log_det_onto, log_det_onto.dim() - (z.dim() - len(self.transform.image_shape))
            )
        x, log_det = transform_of(module).inverse_and_log_det(z, context)
        base = base_of(module) if isinstance(module, Flow) else self.base()
        return base.log_prob(x) + log_det - log_det_onto

    def _density(self, module: Any, values: Tensor, context: Tensor | None) -> Tensor:
        """The same for a batch of values, each under every member of a batch of bases."""
        spare = len(self.batch_shape)
        values, context = (
            with_room(values, len(self.values.shape[1:]), spare),
            with_room(context, self.context_dim, spare),
        )
        return self.density_by_hand(module, values, context)

    # Rounding

    def rounding(self, dtype: torch.dtype) -> float:
        """The relative error of data that counts as rounding."""
        return ROUNDINGS * torch.finfo(dtype).eps + self.accuracy

    def usual(self, direction: Direction, n: int) -> Outputs:
        """The room of the first of the points that a function is tried on, in float64."""
        return tuple(
            room[:n]
            for room in self.slack(direction, direction.points, self.contexts, torch.float64)
        )

    def slack(
        self,
        direction: Direction,
        points: Tensor,
        context: Tensor | None,
        dtype: torch.dtype,
        linear: bool = False,
    ) -> Outputs:
        """How far rounding may move what a function returns, one number per point and output.

        With ``linear`` it is infinite where what is returned does not move in proportion to the error of the point, as far
        out, where a map may change within less than the distance to the next number.
        """
        points, context = (
            points.detach().double(),
            None if context is None else context.detach().double(),
        )
        key = (
            direction.name,
            dtype,
            points.numpy().tobytes(),
            b"" if context is None else context.numpy().tobytes(),
        )
        if key not in self._room:
            self._room[key] = self._measure(direction, points, context, self.rounding(dtype))
        return tuple(
            torch.where(even | torch.tensor(not linear), room, math.inf)
            for room, even in self._room[key]
        )

    def _measure(
        self, direction: Direction, points: Tensor, context: Tensor | None, size: float
    ) -> list[tuple[Tensor, Tensor]]:
        """For each output the room that rounding needs, and whether the output moves in proportion to the points."""
        n, tries = (
            len(points),
            [(seed, sign, share) for seed, share in enumerate(SHARES) for sign in (1.0, -1.0)],
        )
        copies = len(tries)
        off = torch.cat(
            [_shake(points, s * size * share, k, direction.constraint) for k, s, share in tries]
        )
        context_off = context_same = None
        if context is not None:
            context_off = torch.cat(
                [_shake(context, s * size * share, k, constraints.real) for k, s, share in tries]
            )
            context_same = context.repeat(copies, *[1] * (context.dim() - 1))
        with torch.no_grad():
            # As large a batch as is compared with, for a fault that mixes points is not to pass for rounding.
            same = attempt(
                direction,
                self.pristine,
                points.repeat(copies, *[1] * (points.dim() - 1)),
                context_same,
            )
            by_points = attempt(direction, self.pristine, off, context_off)
            shaken = [self.shaken(size, 0, 1.0), self.shaken(size, 1, -1.0)]
            nominal, *by_parameters = [
                attempt(direction, each, points, context) for each in (self.pristine, *shaken)
            ]
        found = []
        for k, value in enumerate(same):
            moved = (
                per_point(by_points[k] - value, copies * n)
                .nan_to_num(math.inf)
                .reshape(len(SHARES), -1, n)
                .amax(1)
            )
            moved = moved / torch.tensor(SHARES).unsqueeze(-1)
            most, least = moved.amax(0), moved.amin(0)
            digits = size * per_point(nominal[k], n).nan_to_num(0.0, 0.0).clamp_min(1.0)
            for other in by_parameters:
                most = most + per_point(other[k] - nominal[k], n).nan_to_num(math.inf)
            found.append(
                (2 * most + digits, (moved.amax(0) <= 16 * least) | (moved.amax(0) <= 16 * digits))
            )
        return found


def attempt(direction: Direction, module: Any, points: Tensor, context: Tensor | None) -> Outputs:
    """What a function returns, with NaN for the points that it refuses, as a numeric inverse does where it finds no root."""
    try:
        return direction(module, points, context)
    except RuntimeError:
        if len(points) < 2:
            return tuple(
                points.new_full((len(points), *shape), math.nan) for shape in direction.shapes
            )
    half = len(points) // 2
    parts = [
        attempt(direction, module, points[rows], None if context is None else context[rows])
        for rows in (slice(half), slice(half, None))
    ]
    return tuple(torch.cat(pair) for pair in zip(*parts, strict=True))


def told(error: Exception) -> str:
    """An error in a line."""
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {unstopped(first[:300])}"


def transform_of(module: Any) -> Transform:
    return module.transform if isinstance(module, Flow) else module


def forward(module: Any, x: Tensor, context: Tensor | None) -> Any:
    return transform_of(module).forward_and_log_det(x, context)


def inverse(module: Any, y: Tensor, context: Tensor | None) -> Any:
    return transform_of(module).inverse_and_log_det(y, context)


def parts(module: nn.Module) -> Iterator[Any]:
    """All modules, and their univariate maps, which need not be modules."""
    for part in module.modules():
        yield part
        if getattr(part, "univariate", None) is not None:
            yield part.univariate


def _declared_accuracy(part: Any) -> float:
    declared = getattr(part, "accuracy", 0.0)
    return float(declared) if isinstance(declared, Real) else 0.0


def bijection(constraint: Any) -> Any:
    try:
        return biject_to(constraint)
    except NotImplementedError:
        return None


def is_real(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint in (constraints.real, constraints.real_vector)


def onto_support(flow: Flow) -> Any:
    return biject_to(constraints.real if flow.support is None else flow.support)


def base_of(flow: Flow) -> Any:
    spare = len(flow.event_shape) - len(flow.base.event_shape)
    return dist.Independent(flow.base, spare) if spare else flow.base  # type: ignore[arg-type]


def normal_points(n: int, shape: Any, seed: int = 0) -> Tensor:
    """Points about the origin, some of them near it and some further out."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, 1.0, 3.0, 1.0, 0.1], dtype=torch.float64).repeat(math.ceil(n / 5))[
        :n
    ]
    points = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return sizes.reshape(n, *[1] * len(shape)) * points


def _signs(shape: Any, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, tuple(shape), generator=generator, dtype=torch.float64) - 1


def _shake(points: Tensor, size: float, seed: int, constraint: Any) -> Tensor:
    """Points off by an error relative to the largest entry of each, where that leaves them in place or can be led back."""
    if not points.numel():
        return points
    generator = torch.Generator().manual_seed(seed)
    noise = _signs(points.shape, generator) * (
        size * per_point(points, len(points)).nan_to_num(0.0, 0.0).clamp_min(1.0)
    ).reshape(-1, *[1] * (points.dim() - 1))
    onto = bijection(constraint)
    if onto is None or is_real(constraint) or onto.inverse_shape(points.shape) == points.shape:
        moved = points + noise
    else:
        moved = onto(onto.inv(points + noise))
    allowed = satisfies(constraint, moved).reshape(-1, *[1] * (points.dim() - 1))
    return torch.where(allowed, moved, points)


def satisfies(constraint: Any, points: Tensor) -> Tensor:
    """Which points of a batch of rank one satisfy a constraint."""
    inside = constraint.check(points)
    return (
        inside.reshape(len(points), -1).all(1)
        if points.numel()
        else torch.ones(len(points), dtype=torch.bool)
    )


def per_point(value: Tensor, n: int) -> Tensor:
    """The largest entry of each point's."""
    return value.abs().reshape(n, -1).amax(1) if value.numel() else value.new_zeros(n)


def _count(x: Any, shape: torch.Size) -> int:
    given = check_tensor("x", x, shape)
    n = math.prod(given.shape[: given.dim() - len(shape)])
    if not n:
        raise ValueError(f"Expected x to hold at least one point; got shape {tuple(given.shape)}.")
    return n


def _flat(x: Tensor, shape: torch.Size) -> Tensor:
    return x.detach().to("cpu", torch.float64).reshape(-1, *shape)


def with_room(value: Tensor | None, event_dim: int, spare: int) -> Any:
    """Room for batch dimensions of a base, before the event."""
    if value is None or not spare:
        return value
    cut = value.dim() - event_dim
    return value.reshape(*value.shape[:cut], *[1] * spare, *value.shape[cut:])
