"""Numbers far beyond where the tail of the others ends, of which a sample may have a few."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["bounded", "few", "list_rows", "outlying", "tail_end"]

#: Fewer numbers than this tell nothing of a tail.
LEAST = 20
#: The quantiles at which a tail is measured; outliers, a percent of a sample and two of its half
#: below the median, move neither.
INNER, OUTER = 0.9, 0.98
#: How many times farther than the tail's extrapolated end a number has to be.
FACTOR = 5.0


def few(count: int) -> int:
    """How many of ``count`` numbers may be outliers: more of them are a part of the sample."""
    return max(1, count // 100)


def tail_end(deviations: Tensor) -> float:
    r"""Says how far a sample's deviations from its median may go.

    The tail is continued as a power law through two quantiles, up to the largest of :math:`n`,

    .. math:: d_{\max} = 5\, d_{0.98} \max(1, 0.02\, n)^\alpha, \qquad
        \alpha = \log(d_{0.98} / d_{0.9}) / \log 5,

    so that heavy tails reach far. Deviations of zero do not count, because a discrete sample has
    many.

    Args:
        deviations: Deviations of shape ``(n,)``, not negative.

    Returns:
        The end of the tail; infinity where there are too few deviations to tell.
    """
    ordered = deviations[deviations > 0].sort().values
    last = len(ordered) - 1
    if last + 1 < LEAST:
        return math.inf
    inner, outer = (float(ordered[int(fraction * last)]) for fraction in (INNER, OUTER))
    if not math.isfinite(outer):
        return math.inf
    index = math.log(outer / inner) / math.log((1 - INNER) / (1 - OUTER))
    beyond = torch.tensor((1 - OUTER) * (last + 1), dtype=torch.float64).clamp(min=1)
    return FACTOR * outer * float(beyond**index)  # a tensor's power may overflow


def outlying(x: Tensor) -> Tensor:
    """Tells which numbers are outliers of their column, of which a column has a few or none.

    Args:
        x: Numbers of shape ``(n, columns)``.

    Returns:
        A mask of the same shape.
    """
    deviations = (x - x.median(0).values).abs()
    ends = [tail_end(column) for column in deviations.unbind(-1)]
    far = deviations > torch.tensor(ends, dtype=x.dtype, device=x.device)
    return far & (far.sum(0) <= few(len(x)))


def bounded(values: Tensor, reach: float) -> Tensor:
    """Raises the lowest few values to ``reach`` below the median.

    Args:
        values: Values of shape ``(n,)``.
        reach: How far below the median values may be.
    """
    ordered = values.sort().values
    last = len(values) - 1
    floor = torch.minimum(ordered[len(values) // 2] - reach, ordered[min(few(len(values)), last)])
    return values.clamp(min=floor)


def list_rows(rows: Tensor, most: int = 5) -> str:
    """Returns row numbers for a sentence, counted beyond some: ``rows 2, 5 and 7``."""
    told = [str(row) for row in rows.tolist()[:most]]
    if len(rows) > most:
        return f"rows {', '.join(told)} and {len(rows) - most} more"
    if len(told) == 1:
        return f"row {told[0]}"
    return f"rows {', '.join(told[:-1])} and {told[-1]}"
