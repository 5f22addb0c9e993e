"""Points to fit a density to: their checks, the part that is held out, batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._checks import check_tensor
from ..distributions.flow import advise_features
from . import processes

__all__ = [
    "Data",
    "Points",
    "batches",
    "distribution_of",
    "log_prob",
    "log_probs",
    "shared_log_probs",
    "split",
]

Data = Tensor | NDArray[np.floating[Any]]


class Points(NamedTuple):
    """Points with their contexts.

    Attributes:
        x: Of shape ``(n, *event_shape)``.
        context: Of shape ``(n, *context_shape)``, or ``None``.
        row_numbers: The rows of the given data that they are, of shape ``(n,)``.
        name: The argument that they were given as.
    """

    x: Tensor
    context: Tensor | None
    row_numbers: Tensor
    name: str

    def rows(self, index: Any) -> Points:
        """Some of them."""
        context = None if self.context is None else self.context[index]
        return Points(self.x[index], context, self.row_numbers[index], self.name)


def batches(count: int, size: int) -> int:
    """Into how many batches of at most ``size`` points to part ``count`` of them."""
    return math.ceil(count / size)


def distribution_of(flow: nn.Module, context: Tensor | None) -> Any:
    """The distribution of points given their contexts."""
    return flow() if context is None else flow(context)


def log_prob(flow: nn.Module, points: Points) -> Tensor:
    """The log density of each point, of shape ``(n,)``."""
    return distribution_of(flow, points.context).log_prob(points.x)


@torch.no_grad()
def log_probs(flow: nn.Module, points: Points, batch_size: int) -> Tensor:
    """The log density of each point, batch by batch; in double precision, on the host."""
    order = torch.arange(len(points.x), device=points.x.device)
    parts = order.tensor_split(batches(len(order), 4 * batch_size))
    values = [log_prob(flow, points.rows(part)).to("cpu", torch.float64) for part in parts]
    return torch.cat(values)


def shared_log_probs(flow: nn.Module, points: Points, batch_size: int) -> Tensor:
    """The log density of each point, of which each process evaluates its share."""
    mine = processes.rows(len(points.x))
    with processes.add_up(len(points.x), points.x.device) as values:
        values[mine] = log_probs(flow, points.rows(mine), batch_size).to(values.device)
    return values.cpu()


def split(flow: nn.Module, x: Data, context: Data | None, validation: Any) -> tuple[Points, Points]:
    """The training points and those held out."""
    trained = next((p for p in flow.parameters() if p.requires_grad), None)
    if trained is None:
        raise ValueError(
            f"Expected a flow with parameters to train; got {type(flow).__name__} without any."
        )
    points = _points("x", flow, x, context, like=trained)
    if isinstance(validation, Real) and not isinstance(validation, bool):
        train, held_out = _hold_out(points, float(validation))
    else:
        alone = isinstance(validation, Tensor) or hasattr(validation, "__array__")
        given: Any = (validation,) if alone else validation
        if not isinstance(given, Sequence) or isinstance(given, str) or not 1 <= len(given) <= 2:
            raise TypeError(
                "Expected validation to be a fraction, held-out points, or a pair of points and "
                "contexts; "
                f"got {validation!r}."
            )
        if (len(given) == 1) != (context is None):
            raise ValueError(
                "Expected validation to be a pair of points and contexts where there is a context, "
                "and points alone "
                f"where there is none; got {'no contexts' if len(given) == 1 else 'a pair'}."
            )
        train, held_out = points, _points("validation", flow, *given, like=trained)
        if len(train.x) < 2:
            raise ValueError(f"Expected at least 2 points to train on; got {len(train.x)}.")
    return train, held_out


def _points(name: str, flow: nn.Module, x: Any, context: Any = None, *, like: Tensor) -> Points:
    """Points that a flow can be fitted to, where it is and of its dtype."""
    x = check_tensor(name, _as_tensor(x), ())
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(
            f"Expected {name} to hold points along its first dimension; got shape {tuple(x.shape)}."
        )
    if context is not None:
        context = check_tensor("context", _as_tensor(context), ())
        if context.dim() == 0 or len(context) != len(x):
            raise ValueError(
                f"Expected one context for each of the {len(x)} points; got shape "
                f"{tuple(context.shape)}."
            )
    for what, value in ((name, x), ("context", context)):
        if value is not None:
            _check_rows(
                f"finite numbers in {what}", value.isfinite().reshape(len(value), -1).all(-1)
            )

    def placed(value: Tensor) -> Tensor:
        return value.detach().to(like.device, like.dtype)

    index = torch.arange(len(x), device=like.device)
    points = Points(placed(x), None if context is None else placed(context), index, name)
    _check_event(name, flow, points)
    return points


def _as_tensor(value: Any) -> Any:
    """A tensor of the numbers of an array of numpy, or whatever becomes one, such as a table."""
    if isinstance(value, Tensor) or not hasattr(value, "__array__"):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        return value
    if array.dtype.kind == "f" and np.ma.is_masked(value):
        array = np.ma.filled(value, np.nan)  # entries that are masked are missing
    # The dtypes that torch has no name for are those of other byte orders and sizes.
    native = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64
    return torch.from_numpy(np.array(array, dtype=native, order="C"))


def check_fraction(validation: float) -> None:
    """Raises ``ValueError`` unless some points are held out, and not all."""
    if not 0 < validation < 1:
        raise ValueError(
            "Expected validation between 0 and 1, the fraction of points to hold out; got "
            f"{validation:g}."
        )


def _hold_out(points: Points, fraction: float) -> tuple[Points, Points]:
    check_fraction(fraction)
    n = len(points.x)
    held_out = max(1, round(fraction * n))
    if n - held_out < 2:
        raise ValueError(
            f"Expected at least 2 points to train on besides those held out; got {n} points in all."
        )
    order = torch.randperm(n, device="cpu").to(points.x.device)
    return points.rows(order[held_out:]), points.rows(order[:held_out])


def _check_event(name: str, flow: nn.Module, points: Points) -> None:
    """Checks points against what the flow is a distribution of."""
    one = points.rows(slice(1))
    with torch.no_grad():
        distribution = distribution_of(flow, one.context)
    if not isinstance(distribution, torch.distributions.Distribution):
        raise TypeError(
            "Expected flow to return a distribution when called; got "
            f"{type(distribution).__name__}."
        )
    batch, event = tuple(distribution.batch_shape), tuple(distribution.event_shape)
    if batch not in ((), (1,)) or (batch == (1,) and points.context is None):
        raise ValueError(
            "Expected flow to return a distribution over single points; got one of batch shape "
            f"{batch}."
        )
    if tuple(points.x.shape[1:]) != event:
        sizes = ", ".join(["N", *map(str, event)])
        got = f"{tuple(points.x.shape)}.{advise_features(distribution, points.x.shape)}"
        raise ValueError(f"Expected {name} of shape ({sizes}); got {got}")
    with contextlib.suppress(NotImplementedError):
        support: Any = distribution.support
        inside = support.check(points.x).reshape(len(points.x), -1).all(-1)
        _check_rows(f"{name} within the support {support}", inside)


def _check_rows(expected: str, good: Tensor) -> None:
    if not bool(good.all()):
        bad = (~good).nonzero().flatten()
        raise ValueError(
            f"Expected {expected}; {len(bad)} of {len(good)} rows are not so, the first is row "
            f"{int(bad[0])}."
        )
