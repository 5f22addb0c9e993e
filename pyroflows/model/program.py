"""Functions of many points that leave out those at which they fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._deadline import check_time
from .base import Failures
from .faults import first_sentence

__all__ = ["FAILURES", "POINT_ERRORS", "Program", "Run", "Way"]

Run = Callable[[Tensor], tuple[Tensor, ...]]

# Errors that a model raises at a point where it cannot be evaluated. Any other, of the wrong size
# or type for instance, is one of the model or of its data, and is raised.
POINT_ERRORS = (
    torch.linalg.LinAlgError,
    ArithmeticError,
    AssertionError,
    IndexError,
    ValueError,
)
# Errors of a run that may succeed elsewhere: samplers and factorisations raise RuntimeErrors too.
FAILURES = (*POINT_ERRORS, RuntimeError)


class Way(NamedTuple):
    """How points are evaluated.

    Attributes:
        mode: ``"captured"``, ``"vmap"``, ``"plate"`` or ``"loop"``.
        reason: Why a slow way is taken, if it is.
        constants: Which of the inputs, by their places, are constants of a captured graph though
            they are tensors, because the model reads their values.
        in_plate: Whether points are the rows of a plate around the model, not of a ``vmap``.
    """

    mode: str
    reason: str = ""
    constants: frozenset[int] = frozenset()
    in_plate: bool = False

    @property
    def warning(self) -> str:
        """A sentence for whoever waits, if the way is slow."""
        return WARNINGS[self.mode] + self.reason if self.mode in WARNINGS else ""


_UNCAPTURED = (
    "This model cannot be captured as a graph of operations, so every evaluation runs all of it, "
    "which is slow. What the capture says: "
)
WARNINGS = {
    "vmap": _UNCAPTURED,
    "plate": _UNCAPTURED,
    "loop": (
        "This model cannot be evaluated for a batch of points, so its log density is evaluated one "
        "point at a time, which is slow. "
    ),
}


class Program:
    """A function of many points at given inputs.

    Args:
        run: The function, for at most ``batch_size`` points of shape ``(n, features)``.
        batch_size: How many points one run takes.
        failures: Is told why a point could not be evaluated.
        way: How points are evaluated.
        gradients: Whether a run gives gradients after the values.
    """

    def __init__(
        self, run: Run, batch_size: int, failures: Failures, way: Way, gradients: bool = True
    ) -> None:
        self.run, self.batch_size, self.failures, self.way = run, batch_size, failures, way
        self.gradients = gradients

    def __call__(self, points: Tensor) -> tuple[Tensor, ...]:
        """Values of shape ``(n,)`` and gradients of shape ``(n, features)``, NaN where it fails."""
        parts = [self._isolate(chunk) for chunk in points.split(self.batch_size)]
        return parts[0] if len(parts) == 1 else _concatenate(parts)

    def _isolate(self, points: Tensor) -> tuple[Tensor, ...]:
        """Halves a batch that fails until the points that make it fail stand alone."""
        check_time()
        try:
            return self.run(points)
        except POINT_ERRORS as error:
            self.failures.reason = first_sentence(error)
        if len(points) == 1:
            blank = (points.new_full((1,), torch.nan), torch.full_like(points, torch.nan))
            return blank if self.gradients else blank[:1]
        middle = len(points) // 2
        return _concatenate([self._isolate(half) for half in (points[:middle], points[middle:])])


def _concatenate(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
