"""Laws of the contract: shapes, dtypes, devices, copies."""

from __future__ import annotations

import copy
import pickle
import sys
import weakref
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .._memory import Memory
from ..flows import Flow
from ._case import (
    DTYPES,
    Broken,
    Case,
    Direction,
    LeftOut,
    Outputs,
    bijection,
    satisfies,
    transform_of,
)
from ._law import brief, law, near, require

BATCHES: tuple[tuple[int, ...], ...] = ((), (5,), (2, 1, 3), (0,), (4, 0))


@law()
def shapes(case: Case) -> None:
    """Values have the shape of their event and log-determinants that of the batch, whatever the batch is, a single
    point and an empty batch included, for a log-determinant of another shape is silently broadcast or summed."""
    t = case.transform
    for name, constraint, shape in (
        ("domain", t.domain, t.event_shape),
        ("codomain", t.codomain, t.forward_shape(t.event_shape)),
    ):
        require(
            constraint.event_dim == len(shape),
            f"Expected a {name} of event_dim {len(shape)}, for events of shape {tuple(shape)}; got {constraint.event_dim}.",
        )
    for direction in case.directions:
        for batch in BATCHES:
            if direction.name == "log_prob" and 0 in batch:
                continue  # not every base takes an empty batch
            outputs = direction(case.module(), *case.batch(direction.points, batch))
            require(
                len(outputs) == len(direction.shapes)
                and all(isinstance(value, Tensor) for value in outputs),
                f"Expected {direction.name} to return {len(direction.shapes)} tensors; got {_kinds(outputs)}.",
            )
            for value, shape, what in zip(outputs, direction.shapes, direction.names, strict=True):
                require(
                    value.shape == (*batch, *shape),
                    f"Expected {direction.name} to return {what} of shape {(*batch, *shape)} for a batch of shape {batch}; "
                    f"got {tuple(value.shape)}.",
                )


def _kinds(outputs: Any) -> str:
    return ", ".join(type(value).__name__ for value in outputs)


@law()
def registered(case: Case) -> None:
    """Every tensor and every module that a transform holds is a parameter, a buffer or a submodule, for nothing else
    is saved, moved to a device or trained."""
    registered, internal = (
        {id(module) for module in case.original.modules()},
        set(vars(nn.Module())),
    )
    for module in case.original.modules():
        for key, value in vars(module).items():
            # The base of a flow moves with the module, which sees to that itself.
            if (
                key in internal
                or key.startswith("_pyro")
                or (isinstance(module, Flow) and key == "_base")
            ):
                continue
            for path, found in _held(value, key, 4, frozenset()):
                owner = f"{type(module).__name__}.{path}"
                require(
                    not isinstance(found, Tensor),
                    f"Expected {owner} to be a parameter or a buffer; got a plain tensor.",
                )
                require(
                    id(found) in registered,
                    f"Expected {owner} to be a registered submodule; got a module apart.",
                )


def _held(value: Any, path: str, depth: int, seen: frozenset[int]) -> Iterator[tuple[str, Any]]:
    """Tensors and modules within an attribute."""
    apart = (Memory, constraints.Constraint, weakref.ref, type, str, ModuleType)
    if isinstance(value, (Tensor, nn.Module)):
        yield path, value
    elif not depth or id(value) in seen or isinstance(value, apart):
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _held(item, f"{path}[{key!r}]", depth - 1, seen | {id(value)})
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            yield from _held(item, f"{path}[{index}]", depth - 1, seen | {id(value)})
    elif hasattr(value, "__dict__") and not callable(value):
        for key, item in vars(value).items():
            yield from _held(item, f"{path}.{key}", depth - 1, seen | {id(value)})


@law("shapes")
def pure(case: Case) -> None:
    """Evaluating changes nothing: neither the input nor the parameters nor the state of random numbers, and it gives
    the same twice, for otherwise a density is no function of its point."""
    for direction in case.directions:
        module = case.module()
        points, context = (
            direction.points.clone(),
            None if case.contexts is None else case.contexts.clone(),
        )
        state = {key: value.clone() for key, value in module.state_dict().items()}
        random = torch.get_rng_state()
        first, second = _raw(direction, module, points, context), direction(module, points, context)
        require(
            torch.equal(torch.get_rng_state(), random),
            f"Expected {direction.name} to draw no random numbers; it does.",
        )
        require(
            torch.equal(points, direction.points),
            f"Expected {direction.name} to leave its input; it wrote to it.",
        )
        after = module.state_dict()
        changed = [
            key
            for key in state
            if not torch.equal(state[key].nan_to_num(), after[key].nan_to_num())
        ]
        require(
            not changed,
            f"Expected {direction.name} to leave parameters and buffers; it changed {', '.join(changed)}.",
        )
        for one, two in zip(first, second, strict=True):
            require(
                torch.equal(one.nan_to_num(), two.nan_to_num()),
                f"Expected {direction.name} to give the same values twice; got others.",
            )


@law("shapes")
def domains(case: Case) -> None:
    """Images lie in the declared codomain, preimages in the domain, and ``forward_shape`` and ``inverse_shape``
    foretell shapes, for Pyro takes supports and shapes from there."""
    module = case.module()
    t = transform_of(module)
    require(t.bijective, "Expected bijective to be True; got False.")
    for direction, target in ((case.forward, t.codomain), (case.inverse, t.domain)):
        values = direction(module, direction.points, case.contexts)[0]
        outside = ~satisfies(target, values) & values.isfinite().reshape(len(values), -1).all(1)
        if bool(outside.any()):
            first = int(outside.nonzero()[0])
            raise Broken(
                f"Expected {direction.name} to give values that satisfy {target}; got {brief(values[first])} at "
                f"{brief(direction.points[first])}."
            )
    for shape_of, given, wanted in (
        (t.forward_shape, case.x.shape, case.y.shape),
        (t.inverse_shape, case.y.shape, case.x.shape),
    ):
        require(
            shape_of(given) == wanted,
            f"Expected {shape_of.__name__}({tuple(given)}) to be {tuple(wanted)}; got {tuple(shape_of(given))}.",
        )


@law("shapes", "registered")
def dtypes(case: Case) -> None:
    """Results have the dtype of parameters and points, whatever torch's default is, for a stray tensor of another
    dtype costs half the digits or raises."""
    default = torch.get_default_dtype()
    try:
        for dtype in DTYPES:
            for assumed in DTYPES:
                torch.set_default_dtype(assumed)
                module = case.module(dtype)
                context = None if case.contexts is None else case.contexts.to(dtype)
                for direction in case.directions:
                    for value in direction(module, direction.points.to(dtype), context):
                        require(
                            value.dtype == dtype,
                            f"Expected {direction.name} to return {dtype} for points and parameters of that dtype; got "
                            f"{value.dtype}{'' if assumed == default else f', under a default of {assumed}'}.",
                        )
    finally:
        torch.set_default_dtype(default)


@law("pure", "dtypes")
def rows(case: Case) -> None:
    """Each point is mapped by itself, whatever lies beside it in the batch or in the memory, for a density of one
    point must not depend on others."""
    for direction in case.directions:
        module, n = case.module(), min(6, len(direction.points))
        points, context = case.batch(direction.points, (n,))
        layouts = {
            "its points one by one": _stacked(direction, module, points, context),
            "a strided batch": _raw(
                direction, module, points.repeat_interleave(2, 0)[::2], context
            ),
            "a transposed batch": _raw(direction, module, _transposed(points), context),
        }
        whole = direction(module, points, context)
        for what, outputs in layouts.items():
            for value, wanted, room in zip(outputs, whole, case.usual(direction, n), strict=True):
                near(
                    value,
                    wanted,
                    2 * room,
                    f"{direction.name} of {what} to be that of the batch",
                    points,
                )
        same = points[:1].expand(n, *points.shape[1:])
        outputs = _raw(direction, module, same, context)
        for value, wanted, room in zip(
            outputs, direction(module, same, context), case.usual(direction, n), strict=True
        ):
            near(
                value,
                wanted,
                2 * room.amax().expand(n),
                f"{direction.name} of an expanded batch to be that of its rows",
            )


def _raw(direction: Direction, module: Any, points: Tensor, context: Tensor | None) -> Outputs:
    """Evaluates at the very tensors, as they lie in memory."""
    outputs = direction.call(module, points, context)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _stacked(direction: Direction, module: Any, points: Tensor, context: Tensor | None) -> Outputs:
    singles = [
        direction(module, points[i], None if context is None else context[i])
        for i in range(len(points))
    ]
    return tuple(torch.stack(values) for values in zip(*singles, strict=True))


def _transposed(points: Tensor) -> Tensor:
    return (
        points.flatten(1).mT.contiguous().mT.reshape(points.shape) if points.dim() > 1 else points
    )


@law("rows")
def context(case: Case) -> None:
    """A context is broadcast against the batch of the points, in both directions, and fixing it by ``condition`` is
    the same as passing it, so that one context serves many points and many contexts one point."""
    if case.contexts is None:
        raise LeftOut("it takes no context")
    for direction in case.directions:
        module = case.module()
        points, _ = case.batch(direction.points, (4, 1))
        contexts = case.batch(direction.points, (3,))[1]
        assert contexts is not None
        event = points.shape[2:]
        every, each = points.expand(4, 3, *event), contexts.expand(4, 3, *contexts.shape[1:])
        expected = direction(module, every, each)
        slack = case.slack(
            direction,
            every.reshape(12, *event),
            each.reshape(12, *contexts.shape[1:]),
            torch.float64,
        )
        for given, c, rows in (
            (points, contexts, slice(None)),
            (points[0, 0], contexts, slice(0, 3)),
            (points[:, 0], contexts[0], slice(0, 12, 3)),
        ):
            outputs = direction(module, given, c)
            for value, full, room, shape in zip(
                outputs, expected, slack, direction.shapes, strict=True
            ):
                wanted = full.reshape(12, *shape)[rows]
                got = f"{direction.name} of points {tuple(given.shape)} with a context {tuple(c.shape)}"
                flat = (4, 3) if given is points else (len(wanted),)
                require(
                    value.shape == (*flat, *shape),
                    f"Expected {got} to be of shape {(*flat, *shape)}; got {tuple(value.shape)}.",
                )
                near(
                    value.reshape(len(wanted), *shape),
                    wanted,
                    2 * room[rows],
                    f"{got} to be that of each pair",
                )
    _conditioned(case)


def _conditioned(case: Case) -> None:
    module = case.module()
    context = case.batch(case.x, (3,))[1]
    assert context is not None
    fixed, x = transform_of(module).condition(context), case.batch(case.x, (4, 1))[0]
    expected = case.forward(module, x, context)
    for value, wanted in zip(fixed.forward_and_log_det(x), expected, strict=True):
        require(
            torch.equal(value, wanted),
            "Expected condition(context) to map as the context passed along; got other values.",
        )
    shape = fixed.forward_shape(x.shape)
    require(
        shape == expected[0].shape,
        f"Expected forward_shape of condition(context) to be {tuple(expected[0].shape)}; got {tuple(shape)}.",
    )


@law("registered", "dtypes")
def devices(case: Case) -> None:
    """Everything is computed on the device of parameters and points, without reading values back, for a tensor made
    elsewhere fails on a GPU and a value read back stops it; torch's meta device, which holds no values, stands for
    all others."""
    for device in ["meta", *(["cuda"] if torch.cuda.is_available() else [])]:
        module = copy.deepcopy(case.original).to(torch.float32).to(device)
        context = None if case.contexts is None else case.contexts.to(device, torch.float32)
        for direction in case.directions:
            points = direction.points.to(device, torch.float32)
            outputs = direction(module, points, context)
            for value in outputs:
                require(
                    value.device.type == device,
                    f"Expected {direction.name} to return tensors on {device}; got one on {value.device.type}.",
                )
        if isinstance(module, Flow):
            drawn = case.distribution(module, context).rsample()
            require(
                drawn.device.type == device,
                f"Expected draws on {device}; got them on {drawn.device.type}.",
            )


@law("pure")
def copies(case: Case) -> None:
    """A deep copy, a pickle and a loaded ``state_dict`` are the same function, before and after use, and use makes
    none of them larger, for a model that is saved must be the one that was trained."""
    module = copy.deepcopy(case.pristine)
    # Pickle finds a class by its name, which one defined in a function has not; that says nothing of the transform.
    pickles = all(_is_importable(type(part)) for part in module.modules())
    before = len(pickle.dumps(module)) if pickles else 0
    kept = [_use(case, module, grad) for grad in (True, False)]
    twins = {"a deep copy": copy.deepcopy(module)}
    if pickles:
        twins["a pickle"] = pickle.loads(pickle.dumps(module))
    grown = len(pickle.dumps(module)) - before if pickles else 0
    del kept
    # The names of a few attributes may join; a batch may not.
    require(grown <= 256, f"Expected a pickle not to grow with use; got {grown} bytes more.")
    others = {"a state_dict": _scrambled(case)}
    if case.options.make is not None:
        others["a state_dict in a new instance"] = (
            copy.deepcopy(case.options.make()).to("cpu", torch.float64).eval()
        )
    for name, other in others.items():
        missing = other.load_state_dict(module.state_dict(), strict=False)
        require(
            not missing.missing_keys and not missing.unexpected_keys,
            f"Expected {name} to hold all that a new instance asks for; got differences in "
            f"{', '.join([*missing.missing_keys, *missing.unexpected_keys])}.",
        )
    for name, twin in {**twins, **others}.items():
        shared = {id(p) for p in twin.parameters()} & {id(p) for p in module.parameters()}
        require(not shared, f"Expected {name} to have parameters of its own; got shared ones.")
        for direction in case.directions:
            expected = direction(case.module(), direction.points, case.contexts)
            for value, wanted in zip(
                direction(twin, direction.points, case.contexts), expected, strict=True
            ):
                require(
                    torch.equal(value.nan_to_num(), wanted.nan_to_num()),
                    f"Expected {name} to be the same function after use; got other values of {direction.name}.",
                )


def _is_importable(kind: type) -> bool:
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def _use(case: Case, module: Any, grad: bool) -> tuple[Any, ...]:
    """Calls everything that may be remembered, on a large batch, and returns what keeps a memory full."""
    with torch.set_grad_enabled(grad):
        x, context = case.batch(case.x, (200,))
        t = transform_of(module)
        outputs = (
            *t.forward_and_log_det(x, context),
            *t.inverse_and_log_det(case.batch(case.y, (200,))[0], context),
        )
        t = t if context is None else t.condition(context)
        y = t(x)
        drawn = (
            case.distribution(module, context).rsample()
            if bijection(t.domain) is not None
            else None
        )
        return t, x, outputs, y, t.log_abs_det_jacobian(x, y), t.inv(y), t(x), drawn


def _scrambled(case: Case) -> nn.Module:
    """A copy with another state."""
    other, generator = case.fresh(), torch.Generator().manual_seed(9)
    noise = {
        key: value + torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for key, value in other.state_dict().items()
        if value.is_floating_point()
    }
    other.load_state_dict(noise, strict=False)
    return other
