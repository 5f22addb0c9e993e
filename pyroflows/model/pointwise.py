"""Functions of one point with several results, evaluated for many points."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._compat import functions_of_any_style
from .._deadline import check_time
from .._vmap import vmap
from .batching import Batchable
from .program import FAILURES
from .singular import NanWhereSingular
from .stable import selecting_no_entries

__all__ = ["map_points"]


def map_points(
    function: Callable[[Tensor], dict[str, Tensor]],
    points: Tensor,
    batch_size: int,
    safe: Tensor | None = None,
    random: bool = True,
) -> dict[str, Tensor]:
    """Evaluates a function of one point for many, with other random numbers for each.

    Args:
        function: From a point of shape ``(features,)`` to tensors by name.
        points: Points of shape ``(n, features)``.
        batch_size: How many points one evaluation takes; one at a time if 1.
        safe: A point of shape ``(features,)`` at which the function can be evaluated. If given,
            the results at points where it fails are NaN; else its error is raised.
        random: Whether the function is random; if not, all that it draws comes from generators of
            its own.

    Returns:
        For each name a tensor with a first dimension of size ``n``.
    """

    def of_point(point: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        with Batchable(point) as batchable:
            return function(point), batchable.held

    randomness = "different" if random else "error"
    if batch_size > 1:
        try:
            with NanWhereSingular(), functions_of_any_style(), selecting_no_entries():
                batched = vmap(of_point, randomness=randomness, chunk_size=batch_size)
                found, held = batched(points)
            for i in (~held).nonzero().squeeze(-1).tolist():
                row = _run_once(function, points[i], strict=safe is None)
                found = {
                    name: _with_row(found[name], i, None if row is None else row[name])
                    for name in found
                }
            return found
        except FAILURES:
            pass  # some samplers have no batching rule; one run at a time needs none
    runs = [_run_once(function, point, strict=safe is None) for point in points]
    known = next((run for run in runs if run is not None), None)
    if known is None:
        known = function(points[0] if safe is None else safe)
    blank = {name: _unknown(tensor) for name, tensor in known.items()}
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


def _with_row(tensor: Tensor, i: int, row: Tensor | None) -> Tensor:
    """A tensor with another row, or with NaN if that is not known."""
    new = _unknown(tensor[i]) if row is None else row
    return torch.cat([tensor[:i], new.unsqueeze(0), tensor[i + 1 :]])


def _unknown(like: Tensor) -> Tensor:
    """NaN in the shape of a tensor, but not in its dtype, which may be one of integers."""
    return torch.full(like.shape, torch.nan, device=like.device)
