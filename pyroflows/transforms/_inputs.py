"""Checks of all that transforms are given, and the dtype in which they compute, in one place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_context, check_tensor
from .._compat import dtype_of

__all__ = ["admit", "check_directions", "check_pull", "check_push", "set_aside"]

Method = Callable[..., Any]


def admit(
    transform: Any, name: str, value: Any, shape: torch.Size, context: Any
) -> tuple[Tensor, Tensor | None]:
    """Checks points and contexts, and brings both into the dtype of a transform.

    Args:
        transform: The transform, which computes in the dtype of its parameters.
        name: Name of the points, for sentences.
        value: The points, of shape ``(*, *shape)``.
        shape: Shape of one point.
        context: Context of shape ``(*, *context_shape)``, or ``None`` where there is none.

    Returns:
        Points and contexts.

    Raises:
        TypeError: If one of them is not a floating-point tensor.
        ValueError: If one has another shape, or if their batch shapes do not fit together.
    """
    check_tensor(name, value, shape)
    check_context(context, transform.context_shape, type(transform).__name__)
    if context is not None:
        _check_batches(name, value, len(shape), context, len(transform.context_shape))
    dtype = dtype_of(transform)
    if dtype is None:
        return value, context
    return value.to(dtype), None if context is None else context.to(dtype)


def _check_batches(name: str, value: Tensor, dims: int, context: Tensor, context_dims: int) -> None:
    batch = value.shape[: value.dim() - dims]
    given = context.shape[: context.dim() - context_dims]
    # Seldom anything else, and cheap to see; a tracer warns of comparisons.
    if not given or torch.jit.is_tracing() or given == batch:
        return
    try:
        torch.broadcast_shapes(batch, given)
    except RuntimeError:
        raise ValueError(
            f"Expected context of a batch shape that broadcasts against {tuple(batch)}, that of "
            f"{name}; got {tuple(given)}."
        ) from None


def set_aside(transform: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Makes points whose contexts are not finite no numbers, and these contexts zero.

    A search for many points at once stops when all of them have settled. It leaves out points that
    are no numbers, but knows nothing of contexts.

    Args:
        transform: The transform that searches.
        x: Points of shape ``(*, *event_shape)``.
        context: Context of shape ``(*, *context_shape)``, or ``None``.

    Returns:
        Points, with the batch dimensions of the contexts, and contexts.
    """
    if context is None:
        return x, None
    dims = len(transform.context_shape)
    lost = ~context.isfinite().flatten(context.dim() - dims).all(-1)
    x = transform.broadcast(x, context)
    of_points = lost.reshape(lost.shape + (1,) * len(transform.event_shape))
    of_contexts = lost.reshape(lost.shape + (1,) * dims)
    return x.masked_fill(of_points, torch.nan), context.masked_fill(of_contexts, 0.0)


def check_directions(owner: type) -> None:
    """Makes the maps that a class defines check what they are given.

    Args:
        owner: A subclass of :class:`Transform`.
    """
    for name, wrap in _WRAPS.items():
        if name in vars(owner):
            setattr(owner, name, wrap(vars(owner)[name]))


def check_forward(method: Method) -> Method:
    """Makes a method such as ``forward_and_log_det`` check what it is given."""

    @functools.wraps(method)
    def checked(self: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return method(self, *admit(self, "x", x, self.event_shape, context))

    return checked


def check_inverse(method: Method) -> Method:
    """Makes a method such as ``inverse_and_log_det`` check what it is given."""

    @functools.wraps(method)
    def checked(self: Any, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return method(self, *admit(self, "y", y, self.image_shape, context))

    return checked


def check_push(method: Method) -> Method:
    """Makes a method such as ``push_score`` check what it is given."""

    @functools.wraps(method)
    def checked(self: Any, x: Tensor, score: Tensor, context: Tensor | None = None) -> Any:
        x, context = admit(self, "x", x, self.event_shape, context)
        return method(self, x, check_tensor("score", score, self.event_shape).to(x.dtype), context)

    return checked


def check_pull(method: Method) -> Method:
    """Makes a method such as ``pull_score`` check what it is given."""

    @functools.wraps(method)
    def checked(self: Any, y: Tensor, score: Tensor, context: Tensor | None = None) -> Any:
        y, context = admit(self, "y", y, self.image_shape, context)
        return method(self, y, check_tensor("score", score, self.image_shape).to(y.dtype), context)

    return checked


_WRAPS: dict[str, Callable[[Method], Method]] = {
    "forward_and_log_det": check_forward,
    "inverse_and_log_det": check_inverse,
    "push_score": check_push,
    "pull_score": check_pull,
}
