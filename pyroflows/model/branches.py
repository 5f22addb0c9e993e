"""Points evaluated along the branches that a program takes at them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import caller_level
from .._deadline import TimeOver

__all__ = ["Branches"]

Run = Callable[[Tensor], tuple[Tensor, ...]]

# Combinations of branches that are followed for many points at a time.
FOLLOWED = 8


class Branches:
    """A function of many points that branches on them.

    Args:
        first: The function along the branches of one point: for points of shape ``(n, features)``
            tensors of results with ``n`` rows, and last for which of them they hold.
        follow: Gives one along other branches, those of a given point if it must be made, by its
            number.
        alone: The function, one point at a time.
    """

    def __init__(self, first: Run, follow: Callable[[int, Tensor], Run], alone: Run) -> None:
        self.known, self.follow, self.alone = [first], follow, alone
        self._most, self._told = FOLLOWED, False

    def __call__(self, points: Tensor) -> tuple[Tensor, ...]:
        """The results for points of shape ``(n, features)``."""
        *results, held = self.known[0](points)
        left = (~held).nonzero().squeeze(-1)
        turn = 1
        while len(left):
            found, held = self._evaluate(turn, points[left])
            right = left[held]
            results = [
                result.index_copy(0, right, part[held])
                for result, part in zip(results, found, strict=True)
            ]
            left = left[~held]
            turn += 1
        return tuple(results)

    def _evaluate(self, turn: int, points: Tensor) -> tuple[list[Tensor], Tensor]:
        if turn == len(self.known) < self._most:
            self._learn(turn, points)
        if turn < len(self.known):
            *found, held = self.known[turn](points)
            return found, held
        if not self._told:
            self._told = True
            warnings.warn(
                f"This model branches on values of its latent sites in more ways than the {turn} "
                "that are evaluated in a batch, so the points that take others are evaluated one "
                "at a time, which is slow.",
                stacklevel=caller_level(),
            )
        return list(self.alone(points)), points.new_ones(len(points), dtype=torch.bool)

    def _learn(self, turn: int, points: Tensor) -> None:
        """Learns to follow the branches of the first point for many points, if torch can."""
        try:
            run = self.follow(turn, points[0])
            failed = bool(run(points[:1])[0].isnan())
        except TimeOver:
            raise
        except Exception:
            return
        if failed and not bool(self.alone(points[:1])[0].isnan()):
            # An error that a batch raises, and a single point does not.
            self._most = turn
        else:
            self.known.append(run)
