"""How far draws are from those of a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["LEVELS", "Errors", "Moments", "errors", "moments"]

#: The levels of the quantiles that are compared.
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


class Moments(NamedTuple):
    """What is compared of the draws of a variable.

    Attributes:
        mean: Of shape ``(*shape)``.
        sd: Of shape ``(*shape)``.
        quantiles: Of shape ``(len(LEVELS), *shape)``.
    """

    mean: np.ndarray
    sd: np.ndarray
    quantiles: np.ndarray


class Errors(NamedTuple):
    """The largest errors over all scalars.

    Attributes:
        mean: Of a mean, in standard deviations of the reference.
        log_sd: Of a standard deviation, as the absolute value of its log ratio.
        quantile: Of a quantile, in standard deviations of the reference.
    """

    mean: float
    log_sd: float
    quantile: float


def moments(draws: Any) -> Moments:
    """Computes mean, standard deviation and quantiles of draws.

    Args:
        draws: Shape ``(draws, *shape)``.

    Example:
        >>> float(moments(np.array([1.0, 3.0])).mean)
        2.0
    """
    values = np.asarray(draws, dtype=np.float64)
    return Moments(values.mean(0), values.std(0), np.quantile(values, LEVELS, axis=0))


def errors(found: Mapping[str, Moments], reference: Mapping[str, Moments]) -> Errors:
    """Compares draws with those of a reference by their moments.

    Entries of the reference that are NaN, as those that a mask switches off, or that do not vary,
    are left out.

    Args:
        found: Variable name -> its moments.
        reference: The same of the reference; other variables of ``found`` do not count.

    Returns:
        The largest errors; NaN where a moment is.

    Raises:
        ValueError: If a variable of the reference is missing, or has another shape.

    Example:
        >>> known = {"x": moments(np.array([0.0, 2.0]))}
        >>> errors({"x": moments(np.array([1.0, 3.0]))}, known)
        Errors(mean=1.0, log_sd=0.0, quantile=1.0)
    """
    missing = sorted(set(reference) - set(found))
    if missing:
        raise ValueError(
            f"Expected draws of every scalar of the reference; {', '.join(missing)} are missing."
        )
    parts = [_errors(name, found[name], known) for name, known in reference.items()]
    # np.max keeps a NaN, which Python's max may drop.
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Errors(*(float(np.max(column, initial=0.0)) for column in columns))


def _errors(name: str, found: Moments, known: Moments) -> list[np.ndarray]:
    if np.shape(found.mean) != np.shape(known.mean):
        raise ValueError(
            f"Expected draws of {name!r} of shape (*, {np.shape(known.mean)}), as the reference "
            f"has; got {np.shape(found.mean)}."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.abs(found.mean - known.mean) / known.sd
        log_sd = np.abs(np.log(found.sd / known.sd))
        quantile = (np.abs(found.quantiles - known.quantiles) / known.sd).max(0)
    counts = np.ravel(known.sd > 0)
    return [np.ravel(values)[counts] for values in (mean, log_sd, quantile)]
