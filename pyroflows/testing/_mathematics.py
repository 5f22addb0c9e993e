"""Laws of the mathematics: inverses, log-determinants, gradients, and the transformations of functions that keep them."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, func
from torch.distributions import constraints

from .._compile import compiled
from ..transforms import Transform
from ._case import (
    ROUNDINGS,
    Broken,
    Case,
    Direction,
    LeftOut,
    Outputs,
    bijection,
    forward,
    inverse,
    is_real,
    normal_points,
    per_point,
    satisfies,
    transform_of,
)
from ._law import law, near, require


@law("pure")
def monotone(case: Case) -> None:
    """A map of one number is monotone, and one built of univariate maps increases in each entry, for otherwise it has
    no inverse."""
    module = case.module()
    judged: dict[Transform, int | None] = {}
    if case.transform.event_shape.numel() == 1:
        t = transform_of(module)
        judged[t] = None if t.event_shape else t.sign
    judged |= {
        t: 1 for t in module.modules() if isinstance(t, Transform) and hasattr(t, "univariate")
    }
    if not judged:
        raise LeftOut("only maps of one number and those built of univariate maps promise it")
    for t, sign in judged.items():
        for call, shape, constraint in (
            (forward, t.event_shape, t.domain),
            (inverse, t.image_shape, t.codomain),
        ):
            onto = bijection(constraint)
            if onto is not None and onto.inverse_shape(shape) == shape:
                _sweep(
                    case,
                    t,
                    call,
                    shape,
                    onto,
                    sign,
                    _period(t.codomain if call is forward else t.domain),
                )


def _period(constraint: Any) -> float | None:
    """The length of an interval, which may be a circle."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    ends = [getattr(constraint, name, None) for name in ("lower_bound", "upper_bound")]
    return float(ends[1]) - float(ends[0]) if all(isinstance(end, Real) for end in ends) else None  # type: ignore[arg-type]


def _sweep(
    case: Case,
    t: Transform,
    call: Any,
    shape: torch.Size,
    onto: Any,
    sign: int | None,
    period: float | None,
) -> None:
    """Moves one entry along the line, the others at rest."""
    far = (
        torch.logspace(1, 4, 31, dtype=torch.float64)
        if is_real(onto.codomain)
        else torch.empty(0, dtype=torch.float64)
    )
    line = torch.cat([-far.flip(0), torch.linspace(-9.9, 9.9, 199, dtype=torch.float64), far])
    rest = normal_points(2, shape, seed=5).reshape(2, 1, -1).repeat(1, len(line), 1)
    context = None
    if t.context_shape is not None:
        generator = torch.Generator().manual_seed(3)
        context = torch.randn(t.context_shape, generator=generator, dtype=torch.float64)
    for entry in range(min(shape.numel(), 8)):
        start = rest.clone()
        start[..., entry] = line
        points = onto(start.reshape(2, len(line), *shape))
        values = call(t, points, context)[0].detach().reshape(2, len(line), -1)
        moved, room = (
            values[..., entry],
            case.rounding(torch.float64) * values.abs().amax(-1).clamp_min(1.0),
        )
        ends = moved[0].where(moved[0].isfinite(), moved[0].nanmedian())
        up = sign if sign is not None else 1 if int(ends.argmax()) >= int(ends.argmin()) else -1
        step = up * moved.diff(dim=1)
        if period is not None:
            step = torch.where(step < -period / 2, step + period, step)  # round the circle
        good = (
            (step >= -torch.maximum(room[:, 1:], room[:, :-1]))
            | ~moved.isfinite()[:, 1:]
            | ~moved.isfinite()[:, :-1]
        )
        if not bool(good.all()):
            row, place = divmod(int(good.int().argmin()), len(line) - 1)
            at = float(points.reshape(2, len(line), -1)[row, place, entry])
            raise Broken(
                f"Expected {call.__name__} of {type(t).__name__} to be {'increasing' if up > 0 else 'decreasing'} in entry "
                f"{entry}; got a step of {float(moved[row, place + 1] - moved[row, place]):.2g} from {at:.4g}."
            )


@law("rows")
def gradients(case: Case) -> None:
    """Gradients with respect to points, context and parameters are finite and are those of finite differences, for a
    wrong gradient trains towards something else without a sign."""
    for direction in case.directions:
        module = case.module()
        points, context = case.batch(direction.points, (6,))
        inputs = {
            "the points": [points],
            "the parameters": [p for p in module.parameters() if p.requires_grad],
        }
        if context is not None:
            inputs["the context"] = [context]
        with torch.no_grad():
            outputs, generator = (
                direction(module, points, context),
                torch.Generator().manual_seed(4),
            )
        # Where a density is zero there is no slope.
        weights = [
            torch.randn(o.shape, generator=generator, dtype=o.dtype).where(o.isfinite(), 0.0)
            for o in outputs
        ]
        terms = partial(_terms, direction, module, points, context, weights)
        for what, tensors in inputs.items():
            if tensors:
                _directional(case, direction.name, what, tensors, terms)


def _terms(
    direction: Direction, module: Any, points: Tensor, context: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """All that a function returns, weighted."""
    outputs = direction(module, points, context)
    return torch.cat(
        [(weight * output)[weight != 0] for weight, output in zip(weights, outputs, strict=True)]
    )


def _directional(
    case: Case, name: str, what: str, tensors: list[Tensor], terms: Callable[[], Tensor]
) -> None:
    """Compares a derivative along a random line with the slopes to both sides, which bracket it at a kink too."""
    flags = [tensor.requires_grad for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_()
    value, size = terms().sum(), float(terms().detach().abs().sum())
    grads = (
        torch.autograd.grad(value, tensors, allow_unused=True)
        if value.requires_grad
        else [None] * len(tensors)
    )
    for tensor, flag in zip(tensors, flags, strict=True):
        tensor.requires_grad_(flag)
    generator = torch.Generator().manual_seed(6)
    steps = [
        torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in tensors
    ]
    slope = sum(
        float((grad * step).sum())
        for grad, step in zip(grads, steps, strict=True)
        if grad is not None
    )
    require(
        math.isfinite(slope),
        f"Expected finite gradients of {name} with respect to {what}; got {slope}.",
    )
    h = max(1e-6, math.sqrt(case.accuracy))
    kept = [tensor.detach().clone() for tensor in tensors]
    sides = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            for tensor, start, step in zip(tensors, kept, steps, strict=True):
                tensor.copy_(start + sign * h * step)
            sides.append(sign * float(terms().sum() - value) / h)
        for tensor, start in zip(tensors, kept, strict=True):
            tensor.copy_(start)
    room = case.rounding(torch.float64) * (size + 1) / h
    require(
        min(sides) - room <= slope <= max(sides) + room,
        f"Expected the gradient of {name} with respect to {what} to be that of finite differences, "
        f"{sum(sides) / 2:.6g} along a random direction; got {slope:.6g}.",
    )


@law("domains", "dtypes", "monotone", "rows")
def round_trip(case: Case) -> None:
    """Each direction undoes the other, from points of either side, with the error measured in the image where the
    preimage is ill-conditioned, for only then can what was drawn be scored and what is scored be drawn."""
    judged = 0
    for there, back in ((case.forward, case.inverse), (case.inverse, case.forward)):
        judged += there_and_back(case, there, back, there.points, case.contexts, torch.float64)
    if not judged:
        raise LeftOut("rounding leaves no digit of any point")


def there_and_back(
    case: Case,
    there: Direction,
    back: Direction,
    points: Tensor,
    context: Tensor | None,
    dtype: torch.dtype,
    linear: bool = False,
) -> int:
    """Compares where points come back to, and where that is mapped to; returns how much was compared."""
    module, x = case.module(dtype), points.to(dtype)
    context = None if context is None else context.to(dtype)
    with torch.no_grad():
        y = there(module, x, context)[0]
        require(y.isfinite().all(), f"Expected finite values of {there.name}; got NaN or infinity.")
        inside = satisfies(back.constraint, y)
        x, y, context = x[inside], y[inside], None if context is None else context[inside]
        if not len(x):
            return 0
        again = back(module, y, context)[0]
        image = there(module, again, context)[0]
        # Rounding is measured about the way that float64 takes, which the dtype itself may have left.
        exact_context = None if context is None else context.double()
        exact_image = there(case.pristine, x.double(), exact_context)[0]
        exact = back(case.pristine, y.double(), exact_context)[0]
    slack = case.slack(back, exact_image, context, dtype, linear)[0] + case.rounding(
        dtype
    ) * per_point(x.double(), len(x))
    residual = case.slack(there, exact, context, dtype, linear)[0]
    require(
        again.isfinite().all(), f"Expected {back.name} to undo {there.name}; got NaN or infinity."
    )
    judged = 0
    for what, actual, expected, room in (
        (f"{there.name} to give again what it gave, after {back.name}", image, y, residual),
        (f"{back.name} to undo {there.name}", again, x, slack),
    ):
        # Where rounding leaves no digit there is nothing to compare; then the other of the two speaks.
        some = room < 1e-2 * per_point(expected.double(), len(x)).clamp_min(1.0)
        near(actual[some], expected[some], room[some], what, x[some])
        judged += int(some.sum())
    return judged


@law("gradients", "domains")
def log_det(case: Case) -> None:
    """The log-determinant is that of the Jacobian by automatic differentiation, in both directions, for every density
    is wrong with it."""
    for direction in (case.forward, case.inverse):
        module = case.module()
        points, context = case.batch(direction.points, (min(8, len(direction.points)),))
        inner, points, shift = _coordinates(case, direction, points, context)
        jacobian = jacobian_of(partial(inner, module), points, context)
        require(
            jacobian.isfinite().all(),
            f"Expected a finite Jacobian of {direction.name}; got NaN or infinity in it.",
        )
        expected = torch.linalg.slogdet(jacobian).logabsdet
        singular = torch.linalg.svdvals(jacobian)
        condition = singular.amax(-1) / singular.amin(-1)
        log_det = direction(module, direction.points[: len(points)], context)[1] + shift
        room = (
            case.rounding(torch.float64) * condition.nan_to_num(math.inf)
            + case.usual(direction, len(points))[1]
        )
        near(
            log_det,
            expected,
            room,
            f"the log-determinant of {direction.name} to be that of its Jacobian",
            points,
        )


def _coordinates(case: Case, direction: Direction, points: Tensor, context: Tensor | None) -> Any:
    """The map in free coordinates, where its Jacobian is square, and what that adds to its log-determinant."""
    target = case.inverse.constraint if direction is case.forward else case.forward.constraint
    source_onto, target_onto = bijection(direction.constraint), bijection(target)
    shape = direction.points.shape[1:]
    flat = source_onto is None or source_onto.inverse_shape(shape) == shape
    target_shape = torch.Size(direction.shapes[0])
    if flat and (
        target_onto is None
        or target_onto.inverse_shape(target_shape).numel() == shape.numel() == target_shape.numel()
    ):
        return (lambda module, p, c: direction(module, p, c)[0]), points, 0.0
    free = source_onto.inv(points)
    values = direction(case.pristine, points, context)[0].detach()
    shift = source_onto.log_abs_det_jacobian(free, points)
    shift = shift - target_onto.log_abs_det_jacobian(target_onto.inv(values), values)
    return (
        (lambda module, u, c: target_onto.inv(direction(module, source_onto(u), c)[0])),
        free,
        shift.detach(),
    )


def jacobian_of(function: Callable[..., Tensor], points: Tensor, context: Tensor | None) -> Tensor:
    """One Jacobian per point, row by row, which needs no more than plain differentiation."""
    at = points.detach().clone().requires_grad_()
    values = function(at, context).reshape(len(at), -1)
    rows = []
    for k in range(values.shape[1]):
        (row,) = torch.autograd.grad(values[:, k].sum(), at, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(at).flatten(1) if row is None else row.reshape(len(at), -1))
    return torch.stack(rows, 1)


@law("round_trip", "log_det")
def inverse_log_det(case: Case) -> None:
    """The log-determinant of the inverse is minus that of the map at the same point, for a density drawn and a
    density scored are to be one."""
    opposite(case, case.x, case.contexts, torch.float64)


def opposite(
    case: Case, points: Tensor, context: Tensor | None, dtype: torch.dtype, linear: bool = False
) -> None:
    """Compares the log-determinants of the two directions."""
    module, x = case.module(dtype), points.to(dtype)
    context = None if context is None else context.to(dtype)
    with torch.no_grad():
        y, log_det = case.forward(module, x, context)
        inside = satisfies(case.inverse.constraint, y)
        x, y, log_det, context = (
            x[inside],
            y[inside],
            log_det[inside],
            None if context is None else context[inside],
        )
        if not len(x):
            return
        inverse_log_det = case.inverse(module, y, context)[1]
        # Rounding is measured about the way that float64 takes.
        exact = case.forward(
            case.pristine, x.double(), None if context is None else context.double()
        )[0]
    room = case.slack(case.inverse, exact, context, dtype, linear)[1]
    room = room + case.slack(case.forward, x, context, dtype, linear)[1]
    near(inverse_log_det, -log_det, room, "the inverse's log-determinant to be minus the map's", x)


@law("round_trip", "log_det", "inverse_log_det")
def precision(case: Case) -> None:
    """In float32 values, log-determinants, round trips and densities are those of float64 up to rounding, for a
    formula that cancels loses digits where no formula need."""
    module = case.module(torch.float32)
    context = None if case.contexts is None else case.contexts.float()
    for direction in case.directions:
        points = direction.points.float()
        inside = satisfies(direction.constraint, points)
        points, c = points[inside], None if context is None else context[inside]
        with torch.no_grad():
            low = direction(module, points, c)
            high = direction(case.pristine, points.double(), None if c is None else c.double())
        for one, two, room in zip(
            low, high, case.slack(direction, points, c, torch.float32), strict=True
        ):
            near(one, two, room, f"{direction.name} in float32 to be that in float64", points)
    for there, back in ((case.forward, case.inverse), (case.inverse, case.forward)):
        there_and_back(case, there, back, there.points, case.contexts, torch.float32)
    opposite(case, case.x, case.contexts, torch.float32)


@law("shapes")
def starts_at_identity(case: Case) -> None:
    """A fresh transform is the identity, so that a fresh flow is its base and training starts from there."""
    if not case.options.starts_at_identity:
        raise LeftOut("not asked for: starts_at_identity=True")
    for direction in (case.forward, case.inverse):
        value, log_det = direction(case.module(), direction.points, case.contexts)
        slack = case.usual(direction, len(direction.points))
        near(
            value,
            direction.points,
            slack[0],
            f"{direction.name} to be the identity",
            direction.points,
        )
        near(
            log_det,
            0 * log_det,
            slack[1],
            f"the log-determinant of {direction.name} to be zero",
            direction.points,
        )


@law("log_det", "devices")
def vmap(case: Case) -> None:
    """Under ``torch.func.vmap`` the map is a loop over its points, and ``jacrev`` gives its Jacobian, for ensembles,
    scores and whole batches of models are computed that way."""
    for direction in case.directions:
        module, n = case.module(), min(5, len(direction.points))
        points, context = case.batch(direction.points, (n,))
        in_dims = (0, None if context is None else 0)
        slack = case.usual(direction, n)
        call = partial(direction, module)
        mapped = func.vmap(call, in_dims)(points, context)
        for one, two, room in zip(mapped, call(points, context), slack, strict=True):
            near(one, two, 2 * room, f"{direction.name} under vmap to be that of the batch", points)
        if direction is case.forward:
            values = partial(_values, call)
            slopes = func.vmap(func.jacrev(values), in_dims)(points, context).reshape(n, -1)
            expected = jacobian_of(values, points, context).reshape(n, -1)
            room = case.rounding(torch.float64) * per_point(expected, n).clamp_min(1.0) * ROUNDINGS
            near(
                slopes,
                expected,
                room,
                f"jacrev of {direction.name} under vmap to be its Jacobian",
                points,
            )


def _values(call: Callable[..., Outputs], points: Tensor, context: Tensor | None) -> Tensor:
    return call(points, context)[0]


@law("log_det", "devices", "vmap")
def compiles(case: Case) -> None:
    """Both directions compile to one graph, ``torch.compile(fullgraph=True)``, with the same values and gradients,
    for a break in the graph costs what compiling gains."""
    if not case.options.compile:
        raise LeftOut("not asked for: compile=True")
    for direction in (case.forward, case.inverse):
        module = case.module()
        points, context = case.batch(direction.points, (min(5, len(direction.points)),))
        points.requires_grad_()
        call = _anew(_evaluate)
        found = compiled(call, fullgraph=True, backend="aot_eager")(
            direction.call, module, points, context
        )
        expected = direction(module, points, context)
        slack = case.usual(direction, len(points))
        for one, two, room in zip(found, expected, slack, strict=True):
            near(
                one.detach(),
                two.detach(),
                2 * room,
                f"{direction.name} to be the same when compiled",
                points,
            )
        grads = [
            torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), points, allow_unused=True)[0]
            for outputs in (found, expected)
        ]
        if grads[1] is not None:
            room = (
                ROUNDINGS
                * case.rounding(torch.float64)
                * per_point(grads[1], len(points)).clamp_min(1.0)
            )
            near(
                grads[0],
                grads[1],
                room,
                f"the gradient of {direction.name} to be the same when compiled",
                points,
            )


def _evaluate(call: Any, module: Any, points: Tensor, context: Tensor | None) -> Outputs:
    return call(module, points, context)


def _anew(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own, for torch counts recompilations by code."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
