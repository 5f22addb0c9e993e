r"""Shapes of observed values against those of their sites.

A distribution of batch shape :math:`B`, which plates have expanded to their sizes, and a value of
batch shape :math:`V` broadcast to a log density of shape :math:`B \vee V`. Where that is larger
than :math:`B`, rows meet rows of which they know nothing: a column :math:`(n, 1)` of data under
:math:`n` means gives :math:`n \times n` residuals. So, dimension by dimension:

- A value may not be larger than the distribution. Only a single distribution outside of all plates
  takes any number of draws.
- A value may be smaller, and is then shared, along a plate, because the plate says that there are
  so many rows; outside of plates if it is a single number. A plate to the right of a
  dimension that is no plate's does not count, because a column of means gets there in this way.
- The event shapes are the same, but for hidden Markov models, whose size 1 stands for any number of
  steps.
- A mask or scale may not be larger than the log density to which it applies.
- A ``pyro.factor`` in a plate has no dimensions but those of its plates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .._checks import count
from .sites import Node, base_distribution, distribution_name, is_factor

__all__ = ["check_mask", "check_shape"]

HIDDEN_MARKOV = (dist.hmm.HiddenMarkovModel, dist.IndependentHMM)


def check_shape(name: str, node: Node, nesting: int | None = None) -> None:
    """Refuses an observed value that broadcasts its site, or a mask that does.

    Args:
        name: Name of the site.
        node: The sample statement, in a trace.
        nesting: The dimensions from the right that plates have, if those on their left are of
            enumerated sites.

    Raises:
        ValueError: If the shapes do not fit; the sentence names the site and has both shapes.

    Example:
        >>> import pyro, torch
        >>> def model(y):
        ...     with pyro.plate("rows", 3):
        ...         pyro.sample("y", dist.Normal(torch.zeros(3), 1.0), obs=y)
        >>> trace = pyro.poutine.trace(model).get_trace(torch.zeros(3, 1))
        >>> check_shape("y", trace.nodes["y"])
        Traceback (most recent call last):
            ...
        ValueError: Expected data of the shape of their site; site 'y' observes shape (3, 1) under a
        distribution of batch shape (3,) in plate 'rows' of 3 rows, which together make (3, 3).
    """
    fn, value = node["fn"], torch.as_tensor(node["value"])
    _check_event(name, fn, value)
    batch: Sequence[int] = value.shape[: value.dim() - fn.event_dim]
    plates = {frame.dim: frame for frame in node["cond_indep_stack"] if frame.vectorized}
    if is_factor(fn):
        batch = _of_plates(batch, nesting)
        _check_factor(name, batch, plates)
    sizes = list(_aligned(batch, _of_plates(fn.batch_shape, nesting)))
    if not _is_spread(sizes, plates) and not _is_repeated(sizes, plates):
        return
    where = _told_plates(plates)
    raise ValueError(
        f"Expected data of the shape of their site; site {name!r} observes shape "
        f"{tuple(value.shape)} under a distribution of batch shape "
        f"{tuple(fn.batch_shape)}{where}, which {_together(sizes)}."
    )


def check_mask(name: str, node: Node, nesting: int | None = None) -> None:
    """Refuses a mask or scale that is larger than the log density to which it applies.

    Args:
        name: Name of the site.
        node: The sample statement, in a trace.
        nesting: As in :func:`check_shape`.

    Raises:
        ValueError: If it is.
    """
    fn, value = node["fn"], torch.as_tensor(node["value"])
    batch = value.shape[: value.dim() - fn.event_dim]
    scored = [max(pair) for pair in _aligned(batch, fn.batch_shape)]
    for kind in ("mask", "scale"):
        shape = _of_plates(getattr(node[kind], "shape", ()), nesting)
        pairs = _aligned(shape, scored[::-1])
        if any(size not in (1, most) for size, most in pairs):
            raise ValueError(
                f"Expected a {kind} that fits its site; site {name!r} with the batch shape "
                f"{tuple(reversed(scored))} has one of shape {tuple(shape)}."
            )


def _check_event(name: str, fn: Any, value: Tensor) -> None:
    event = fn.event_shape
    given = value.shape[max(0, value.dim() - len(event)) :]
    any_steps = isinstance(base_distribution(fn), HIDDEN_MARKOV)
    fits = [g == e or (any_steps and e == 1) for g, e in _aligned(given, event)]
    if len(given) < len(event) or not all(fits):
        raise ValueError(
            f"Expected data of the event shape of their site; site {name!r} observes shape "
            f"{tuple(value.shape)} under {distribution_name(fn)} with the event shape "
            f"{tuple(event)}."
        )


def _check_factor(name: str, batch: Sequence[int], plates: dict[int, Any]) -> None:
    loose = any(size > 1 and -k not in plates for k, size in _from_the_right(batch))
    if plates and loose:
        raise ValueError(
            f"Expected a factor with one term for each row of its plates; got {name!r} of shape "
            f"{tuple(batch)}{_told_plates(plates)}."
        )


# Batch shapes, dimension by dimension from the right


def _of_plates(shape: Sequence[int], nesting: int | None) -> Sequence[int]:
    """The dimensions of a shape on the right of those of enumerated sites."""
    return shape if nesting is None else shape[max(0, len(shape) - nesting) :]


def _from_the_right(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    return enumerate(reversed(shape), start=1)


def _aligned(first: Sequence[int], second: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The sizes of two shapes, from the right, with 1 for those that are not there."""
    for k in range(1, max(len(first), len(second)) + 1):
        yield (
            first[-k] if k <= len(first) else 1,
            second[-k] if k <= len(second) else 1,
        )


def _is_spread(sizes: Sequence[tuple[int, int]], plates: dict[int, Any]) -> bool:
    """Whether a value is larger than its distribution, or of another size."""
    single = not plates and all(size == 1 for _, size in sizes)
    return not single and any(given not in (1, size) for given, size in sizes)


def _is_repeated(sizes: Sequence[tuple[int, int]], plates: dict[int, Any]) -> bool:
    """Whether rows of a value count more often than plates say."""
    if not plates and all(given == 1 for given, _ in sizes):
        return False
    pairs = list(enumerate(sizes, start=1))
    loose = [k for k, (_, size) in pairs if size > 1 and -k not in plates]
    shared = [k for k, (given, size) in pairs if given == 1 < size]
    return bool(loose) and any(k <= max(loose) for k in shared)


def _together(sizes: Sequence[tuple[int, int]]) -> str:
    if any(given != size and 1 not in (given, size) for given, size in sizes):
        return "do not go together"
    return f"together make {tuple(max(pair) for pair in reversed(sizes))}"


def _told_plates(plates: dict[int, Any]) -> str:
    told = [f"plate {frame.name!r} {_told_rows(frame)}" for frame in plates.values()]
    return f" in {' and '.join(told)}" if told else ""


def _told_rows(frame: Any) -> str:
    full = frame.full_size
    if full in (None, frame.size):
        return f"of {count(frame.size, 'row')}"
    return f"with {frame.size} of {count(full, 'row')}"
