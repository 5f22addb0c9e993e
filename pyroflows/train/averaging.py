"""Parameters kept beside those that a loop trains: the best so far, and a running average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import copy_all, interpolate_all

__all__ = ["Average", "Best", "copy_tensors", "tensors_of"]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name, without gradients."""
    state = module.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def copy_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers of a module."""
    return {name: value.clone() for name, value in tensors_of(module).items()}


class Best:
    """The best parameters so far, for the case that later ones are worse.

    Args:
        module: The module whose parameters and buffers are kept.

    Attributes:
        value: How good they are; minus infinity before the first look.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.value = -math.inf
        self._start = copy_tensors(module)
        self._state: dict[str, Tensor] = {}

    def see(self, value: float) -> bool:
        """Keeps the present parameters if ``value`` is higher than before; tells whether it is."""
        better = value > self.value
        if better:
            self.value, self._state = value, copy_tensors(self.module)
        return better

    def restore(self, or_start: bool = False) -> None:
        """Brings the best parameters back; without any, those of the start if asked to."""
        state = self._state or (self._start if or_start else {})
        if state:
            self.module.load_state_dict(state, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and numbers."""
        return {"value": self.value, "state": self._state, "start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state."""
        like = self._start
        self.value = state["value"]
        self._state = {name: value.to(like[name].device) for name, value in state["state"].items()}
        self._start = {name: value.to(like[name].device) for name, value in state["start"].items()}


class Average:
    r"""The exponential moving average of parameters.

    .. math:: \bar\phi_t = \gamma_t \bar\phi_{t-1} + (1 - \gamma_t) \phi_t, \qquad
        \gamma_t = \min\!\left(\gamma, \frac{t}{t + 9}\right),

    which forgets the start at first, and later steps at the pace of :math:`\gamma`.

    Args:
        parameters: The parameters.
        decay: The weight :math:`\gamma` of the past, between 0 and 1.

    Reference:
        Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992,
        https://doi.org/10.1137/0330046

    Example:
        >>> p = nn.Parameter(torch.zeros(1))
        >>> average = Average([p], decay=0.5)
        >>> for value in (1.0, 2.0):
        ...     p.data = torch.full((1,), value)
        ...     average.update()
        >>> with average.applied():
        ...     print(p.data)
        tensor([1.8000])
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.steps = list(parameters), decay, 0
        self._values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present parameters in."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        interpolate_all(self._values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Gives the parameters their averages."""
        copy_all([p.detach() for p in self.parameters], self._values)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the parameters their averages for a while."""
        present = [p.detach().clone() for p in self.parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            copy_all([p.detach() for p in self.parameters], present)

    @torch.no_grad()
    def restart(self) -> None:
        """Forgets the past: the average begins anew at the present parameters."""
        self.steps = 0
        copy_all(self._values, [p.detach() for p in self.parameters])

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and numbers."""
        return {"steps": self.steps, "values": self._values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state."""
        self.steps = state["steps"]
        copy_all(self._values, list(state["values"]))
