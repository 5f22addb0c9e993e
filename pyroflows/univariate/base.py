"""The contract of a monotone map of one real number, which every structure puts to use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Univariate", "soft_clip"]


class Univariate(ABC):
    """Base class of monotone maps of the line, which structures apply to many entries at once.

    A subclass says how many raw parameters one entry takes, and how the map runs both ways. Raw
    parameters are any real numbers; they come from a network or a table as a tensor of shape
    ``(*, parameters, features)``, where ``features`` counts the entries of an event, flattened if
    it is an image or a series, and entries have the shape ``(*, features)``.

    All other members have defaults, to be overridden: :attr:`identity`, :attr:`linear`,
    :attr:`fast`, :attr:`support`, :attr:`codes` and :meth:`encode`, :attr:`exempt_laws`.

    Example:
        >>> class Double(Univariate):
        ...     parameters = 1
        ...     def forward_and_log_det(self, x, raw):
        ...         log_slope = raw.select(-2, 0).expand_as(x)
        ...         return x * log_slope.exp(), log_slope
        ...     def inverse_and_log_det(self, y, raw):
        ...         log_slope = -raw.select(-2, 0).expand_as(y)
        ...         return y * log_slope.exp(), log_slope
        >>> Double().identity
        (0.0,)
    """

    #: Which direction is fast: ``"both"``, or ``"forward"`` for a map whose inverse is numeric.
    fast: str = "both"
    #: The constraint that arguments and values satisfy.
    support: constraints.Constraint = constraints.real
    #: How many numbers :meth:`encode` makes of one entry.
    codes: int = 1
    #: Laws of :mod:`pyroflows.testing` that cannot hold, each with the reason.
    exempt_laws: ClassVar[Mapping[str, str]] = {}

    @property
    @abstractmethod
    def parameters(self) -> int:
        """How many raw parameters one entry takes."""

    @property
    def linear(self) -> bool:
        """Whether the derivative is the same everywhere."""
        return False

    @property
    def identity(self) -> tuple[float, ...]:
        """Raw parameters that make the map the identity: zeros by default."""
        return (0.0,) * self.parameters

    def encode(self, x: Tensor) -> Tensor:
        """What networks read of entries of shape ``(*, features)``.

        Returns:
            A tensor of shape ``(*, codes * features)``, the first code of every entry before the
            second.
        """
        return x

    @abstractmethod
    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``y`` and ``log dy/dx``, entry by entry, for ``x`` of shape ``(*, features)``."""

    @abstractmethod
    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and ``log dx/dy``, entry by entry, for ``y`` of shape ``(*, features)``."""


def soft_clip(value: Tensor, bound: float) -> Tensor:
    r"""A smooth clip to :math:`\pm B`, :math:`B \tanh(a / B)`, with slope one at zero."""
    return bound * torch.tanh(value / bound)
