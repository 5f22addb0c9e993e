"""Laws of what is far out: extreme points and extreme parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .._saturation import limit
from ..transforms import Transform
from ._case import (
    DTYPES,
    Case,
    Direction,
    attempt,
    bijection,
    is_real,
    normal_points,
    parts,
    per_point,
    satisfies,
)
from ._law import brief, law, require, short
from ._mathematics import opposite, there_and_back

#: Beyond this nothing needs to come back.
LARGEST = 1e31
#: Takes a share of what is extreme about a module and a point.
Shrink = Callable[[float, Tensor], tuple[Any, Tensor]]


@law("precision")
def extreme_inputs(case: Case) -> None:
    """From 1e-30 to 1e30, at the very edges of a box (``bound``) and in batches that lie in a tail altogether,
    values, gradients and round trips are right, but for what outgrows the numbers of the dtype, for one NaN in a
    batch ends a training run."""
    for dtype in DTYPES:
        module = case.module(dtype)
        for there, back in ((case.forward, case.inverse), (case.inverse, case.forward)):
            points, names = extremes(case, there, dtype)
            if not names:
                continue
            context = None
            if case.contexts is not None:
                context = case.contexts[torch.arange(len(points)) % len(case.contexts)].to(dtype)
            _finite(
                module,
                there,
                points,
                context,
                names,
                partial(_nearer, module) if is_real(there.constraint) else None,
            )
            judged = _recoverable(module, there, back, points, context)
            points, context = points[judged], None if context is None else context[judged]
            there_and_back(case, there, back, points, context, dtype, linear=True)
            if there is case.forward:
                opposite(case, points, context, dtype, linear=True)


def _nearer(module: Any, share: float, point: Tensor) -> tuple[Any, Tensor]:
    return module, share * point


def _recoverable(
    module: Any, there: Direction, back: Direction, points: Tensor, context: Tensor | None
) -> Tensor:
    """Which points come back with finite values, or would if no scale on the way underflowed."""
    with torch.no_grad():
        y = attempt(there, module, points, context)[0]
        largest = _largest(module, points.dtype)
        judged = (per_point(points, len(points)) < largest) & (per_point(y, len(points)) < largest)
        kept = judged.nonzero().flatten()
        again = attempt(back, module, y[kept], None if context is None else context[kept])[0]
    for i in kept[~per_point(again, len(kept)).isfinite()].tolist():
        judged[i] = not (
            _outgrows(module, back, *_at(y, context, i))
            or _outgrows(module, there, *_at(points, context, i))
        )
    return judged


def _largest(module: Any, dtype: torch.dtype) -> float:
    """Beyond this nothing needs to come back, because the layers of flows saturate."""
    exact = all(getattr(part, "exact", True) for part in parts(module))
    return LARGEST if exact else min(LARGEST, 0.1 * limit(dtype, 0.5))


def extremes(case: Case, direction: Direction, dtype: torch.dtype) -> tuple[Tensor, list[str]]:
    """Points that are hard on a map, of shape ``(n, *event_shape)``, and what each is."""
    shape = direction.points.shape[1:]
    onto = bijection(direction.constraint)
    if onto is None:
        return direction.points[:0], []
    start = normal_points(4, onto.inverse_shape(shape), seed=7)
    target = case.inverse.constraint if direction is case.forward else case.forward.constraint
    if not is_real(direction.constraint):
        far = torch.cat([onto(8 * start.sign()), onto(1e-30 * start)]).to(dtype)
        far = far[satisfies(direction.constraint, far)]
        return far, ["a point near the border"] * len(far)
    one_far = start.clone().reshape(4, -1)
    one_far[:, 0] *= 1e10
    signs = torch.where(start > 0, 1.0, -1.0).double()
    found = {
        "a tiny point": torch.cat([0 * start, 1e-30 * start, 1e-10 * start]).to(dtype),
        "a point in a tail": (6 + start.abs()).to(dtype),
    }
    if is_real(target):  # what lies far out is lost where it is squeezed against a border
        found["a huge point"] = torch.cat([1e10 * start, 1e30 * start, 50 + start.abs()]).to(dtype)
        found["a point with one huge entry"] = one_far.reshape(start.shape).to(dtype)
    for bound in _bounds(case.pristine):
        edge = (bound * signs).to(dtype)
        inner, outer = (
            torch.nextafter(edge, torch.zeros_like(edge)),
            torch.nextafter(edge, 2 * edge),
        )
        found[f"a point at the edge {bound:g}"] = torch.cat([edge, inner, outer])
    return torch.cat(list(found.values())), [
        name for name, points in found.items() for _ in range(len(points))
    ]


def _bounds(module: nn.Module) -> list[float]:
    """The edges of boxes, as modules and their univariate maps give them."""
    bounds = [getattr(part, "bound", None) for part in parts(module)]
    return sorted(
        {
            float(bound)
            for bound in bounds
            if isinstance(bound, Real) and not isinstance(bound, bool)
        }
    )


@law("precision")
def extreme_parameters(case: Case) -> None:
    """With every parameter drawn from N(0, 20^2) nothing is NaN or infinite, neither values nor gradients, but for
    what outgrows the numbers of the dtype, for training passes through such places and must come back."""
    for dtype in DTYPES:
        for direction in (case.forward, case.inverse):
            points = direction.points.to(dtype)
            module, _ = _wild(case, 1.0, points)
            context = None if case.contexts is None else case.contexts.to(dtype)
            what = ["parameters from N(0, 20^2)"] * len(points)
            _finite(module, direction, points, context, what, partial(_wild, case))
            if _infinite_gradient(module, direction, points, context) is not None:
                # A gradient is a product of such values, so that it may overflow beyond the root of the largest number.
                calm = [
                    i
                    for i in range(len(points))
                    if not _outgrows(module, direction, *_at(points, context, i), 0.5)
                ]
                name = _infinite_gradient(
                    module, direction, points[calm], None if context is None else context[calm]
                )
                require(
                    name is None,
                    f"Expected finite gradients of {direction.name} in {short(dtype)} with respect to "
                    f"{name} for parameters from N(0, 20^2); got NaN or infinity.",
                )


def _wild(case: Case, share: float, points: Tensor) -> tuple[Any, Tensor]:
    """A copy with parameters from the normal distribution of that share of the spread, in the dtype of the points."""
    module, generator = case.fresh(), torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                share * 20 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            )
    return module.to(points.dtype), points


def _infinite_gradient(
    module: Any, direction: Direction, points: Tensor, context: Tensor | None
) -> str | None:
    """The name of a parameter whose gradient is NaN or infinite."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = sum(value.sum() for value in direction(module, points, context))
    if not parameters or not isinstance(total, Tensor) or not total.requires_grad:
        return None
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    finite = (grad is None or bool(grad.isfinite().all()) for grad in grads)
    return next((name for name, good in zip(parameters, finite, strict=True) if not good), None)


def _finite(
    module: Any,
    direction: Direction,
    points: Tensor,
    context: Tensor | None,
    what: list[str],
    shrink: Shrink | None,
) -> None:
    """Demands finite values and gradients, but where they outgrow the dtype as the extreme is approached."""
    excused: set[int] = set()
    for name, value in _with_gradients(direction, module, points, context).items():
        for i in (~per_point(value, len(points)).isfinite()).nonzero().flatten().tolist()[:4]:
            if i not in excused:
                require(
                    shrink is not None and _overflows(shrink, direction, *_at(points, context, i)),
                    f"Expected finite {name} of {direction.name} in {short(points.dtype)} for {what[i]}; got "
                    f"{brief(value[i])} at {brief(points[i])}.",
                )
                excused.add(i)


def _overflows(shrink: Shrink, direction: Direction, point: Tensor, context: Tensor | None) -> bool:
    """Whether, just before it ceases to be finite, something is so large that the dtype cannot hold what comes next."""
    low, high = 1e-40, 1.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        module, at = shrink(middle, point)
        found = _with_gradients(direction, module, at, context)
        if not all(bool(value.isfinite().all()) for value in found.values()):
            high = middle
        elif any(_is_huge(value) for value in found.values()) or _outgrows(
            module, direction, at, context
        ):
            return True
        else:
            low = middle
    return False


def _is_huge(value: Tensor, power: float = 0.75) -> bool:
    return bool((value.detach().abs() > torch.finfo(value.dtype).max ** power).any())


def _outgrows(
    module: Any, direction: Direction, point: Tensor, context: Tensor | None, power: float = 0.75
) -> bool:
    """Whether a value or a scale of any transform on the way nears the limits of the dtype, up to a power."""
    largest = math.log(torch.finfo(point.dtype).max) * power
    seen: list[bool] = []

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            value, log_det = call(*args, **kwargs)
            seen.append(_is_huge(value, power) or bool((log_det.detach().abs() > largest).any()))
            return value, log_det

        return evaluate

    spied = copy.deepcopy(module)
    for part in spied.modules():
        if isinstance(part, Transform):
            for name in ("forward_and_log_det", "inverse_and_log_det"):
                vars(part)[name] = watched(getattr(part, name))
    with torch.no_grad():
        direction(spied, point, context)
    return any(seen)


def _with_gradients(
    direction: Direction, module: Any, points: Tensor, context: Tensor | None
) -> dict[str, Tensor]:
    """Values and log-determinants, and their gradients with respect to the points, as far as there are any."""
    at = points.detach().clone().requires_grad_()
    outputs = dict(zip(direction.names, attempt(direction, module, at, context), strict=True))
    found = {name: value.detach() for name, value in outputs.items()}
    for name, value in outputs.items():
        if value.requires_grad:
            (grad,) = torch.autograd.grad(value.sum(), at, retain_graph=True, allow_unused=True)
            if grad is not None:
                found[f"gradients of the {name}"] = grad
    return found


def _at(points: Tensor, context: Tensor | None, i: int) -> tuple[Tensor, Tensor | None]:
    return points[i : i + 1], None if context is None else context[i : i + 1]
