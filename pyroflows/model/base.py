"""What every log density offers to those who train on it, sample it and judge by it."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Density", "Evaluation", "Failures"]


class Evaluation(NamedTuple):
    """A log density at some points.

    Attributes:
        log_prob: The log density, of shape ``(*)``: ``-inf`` where it is zero or unknown, else
            finite.
        gradient: Its gradient, of shape ``(*, features)``: zero where ``log_prob`` is ``-inf``.
        usable: Which points could be evaluated, of shape ``(*)``. A point of density zero could;
            one where the model fails, or gives NaN or ``inf``, or a finite density without a
            finite gradient, could not.
    """

    log_prob: Tensor
    gradient: Tensor
    usable: Tensor


class Failures:
    """Counts the points that could not be evaluated.

    Attributes:
        evaluated: How many points were evaluated.
        reason: The first sentence of the last error that a point raised; empty if none did.

    Example:
        >>> failures = Failures()
        >>> failures.count(torch.tensor([[0.0], [2.0], [3.0]]), torch.tensor([True, False, False]))
        >>> failures.points, failures.evaluated, failures.most
        (2, 3, True)
        >>> failures.example
        tensor([2.])
    """

    def __init__(self) -> None:
        self.evaluated = 0
        self.reason = ""
        self._points: Any = 0
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def points(self) -> int:
        """How many points could not be evaluated."""
        return int(self._points)

    @property
    def most(self) -> bool:
        """Whether most points could not be evaluated."""
        return 2 * self.points > self.evaluated

    @property
    def example(self) -> Tensor | None:
        """A point of the last evaluation that could not be evaluated, of shape ``(features,)``."""
        if self._last is None:
            return None
        points, usable = self._last
        failed = points[~usable]
        return failed[0] if len(failed) else None

    def count(self, points: Tensor, usable: Tensor) -> None:
        """Counts the points of one evaluation, without waiting for the device.

        Args:
            points: Points of shape ``(*, features)``.
            usable: Which of them could be evaluated, of shape ``(*)``.
        """
        self.evaluated += usable.numel()
        self._points = self._points + (~usable).sum()
        self._last = points, usable


class Density(abc.ABC):
    """A log density of an unconstrained vector, evaluated for many vectors at a time.

    Attributes:
        features: Entries of a point.
        initial: A start, of shape ``(features,)``.
    """

    features: int
    initial: Tensor

    @property
    def full(self) -> Any:
        """The density over all data, of which this one is an estimate; else itself."""
        return self

    @functools.cached_property
    def failures(self) -> Failures:
        """Counts the points of :meth:`evaluate` that could not be evaluated."""
        return Failures()

    @abc.abstractmethod
    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log density and its gradient as the model gives them; neither carries a graph.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            Tensors of shape ``(*)`` and ``(*, features)``, NaN where the model fails.

        Raises:
            ValueError: If the last dimension is not ``features``.
        """

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density as the model gives it, without a graph.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            Tensor of shape ``(*)``, NaN where the model fails.

        Raises:
            ValueError: If the last dimension is not ``features``.
        """
        return self.value_and_grad(z)[0]

    def precise_log_prob(self, z: Tensor) -> Tensor:
        """The log density in double precision, as far as the model's tensors can be promoted.

        Args:
            z: Points of shape ``(n, features)``.

        Returns:
            Tensor of shape ``(n,)``, NaN where it cannot be had.
        """
        return torch.full(z.shape[:-1], torch.nan, dtype=torch.double, device=z.device)

    @torch.no_grad()
    def evaluate(self, z: Tensor) -> Evaluation:
        """The log density and its gradient, with a mask of the points that could be evaluated.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            The log density and gradient, finite or ``-inf`` and zero, and the mask.

        Raises:
            ValueError: If the last dimension is not ``features``.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyroflows.model import LogDensity
            >>> density = LogDensity(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
            >>> log_prob, gradient, usable = density.evaluate(torch.tensor([[1.0], [torch.nan]]))
            >>> log_prob, gradient.squeeze(-1), usable
            (tensor([-1.4189,    -inf]), tensor([-1.,  0.]), tensor([ True, False]))
            >>> density.failures.points
            1
        """
        value, grad = self.value_and_grad(z)
        known = value.isfinite() & grad.isfinite().all(-1)
        usable = known | value.isneginf()
        self.failures.count(z, usable)
        return Evaluation(
            value.where(known, -torch.inf), grad.where(known.unsqueeze(-1), 0.0), usable
        )

    def anchor(self, z: Tensor) -> None:  # noqa: B027, most have no use for it
        """Is told a point near the middle of the posterior, for densities that can use it.

        Args:
            z: Point of shape ``(features,)``.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Where in its data the density is; empty for one that sees all of them every time."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027, most have none
        """Goes back to where the density was.

        Args:
            state: What :meth:`state_dict` gave.
        """
