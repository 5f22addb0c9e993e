"""Work on many points that processes may share out, without being told of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

__all__ = ["Function", "Share", "in_shares", "shared_by"]

Function = Callable[[Tensor], tuple[Tensor, ...]]
Share = Callable[[Function, Tensor, int], tuple[Tensor, ...]]

_share: ContextVar[Share | None] = ContextVar("share", default=None)


def in_shares(function: Function, points: Tensor, width: int) -> tuple[Tensor, ...]:
    """Values of a function of each of many points, of which each process may evaluate its share.

    Args:
        function: From points of shape ``(m, *)`` to tensors of shape ``(m, *)`` without graph.
        points: Points of shape ``(n, *)``.
        width: How many numbers the function gives for a point, in all its tensors.

    Returns:
        The function's tensors for all points.

    Example:
        >>> import torch
        >>> in_shares(lambda x: (x.sum(-1), -x), torch.ones(2, 1), width=2)
        (tensor([1., 1.]), tensor([[-1.],
                [-1.]]))
    """
    share = _share.get()
    return function(points) if share is None else share(function, points, width)


@contextlib.contextmanager
def shared_by(share: Share | None) -> Iterator[None]:
    """Context manager in which :func:`in_shares` shares points out.

    Args:
        share: Evaluates a function of many points, as :func:`in_shares` does; ``None`` where
            nothing is shared out.
    """
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)
