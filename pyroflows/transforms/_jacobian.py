"""Fully connected networks whose Jacobians are written out, as products of weights and slopes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..nn import MLP

__all__ = ["Feedforward", "Jacobian", "check_trace", "trace_rule"]

#: Slopes by hand, from the argument and the value; forward-mode differentiation gives all others, at many times the cost.
_SLOPES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Tanh: lambda module, h, a: 1 - a * a,
    nn.SiLU: lambda module, h, a: _silu_slope(
        h.clamp(-90, 90)
    ),  # beyond it is 0 or 1 to the last digit
    nn.ELU: lambda module, h, a: torch.where(h > 0, torch.ones_like(h), a + module.alpha),
    nn.Softplus: lambda module, h, a: (module.beta * h).sigmoid(),
}


def _silu_slope(h: Tensor) -> Tensor:
    return h.sigmoid() * (1 + h * (-h).sigmoid())


def check_trace(value: Any) -> str:
    """Returns how a trace is to be computed, if the word is known."""
    if value not in ("auto", "exact", "hutchinson"):
        raise ValueError(f"Expected trace to be auto, exact or hutchinson; got {value!r}.")
    return str(value)


def _activate(activation: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    """An activation and its slope."""
    slope = _SLOPES.get(type(activation))
    if slope is None:
        value, slope_at_h = torch.func.jvp(activation, (h,), (torch.ones_like(h),))[:2]
        return value, slope_at_h
    value = activation(h)
    return value, slope(activation, h, value)


class Jacobian(NamedTuple):
    r"""The Jacobian :math:`W_K S_K \dots W_1 S_1 W_0` of a network at a batch of points.

    Args:
        weights: Matrices :math:`W_k`.
        slopes: Diagonals of :math:`S_k`, of shape ``(*batch, width)``.
    """

    weights: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]

    def push(self, vector: Tensor) -> Tensor:
        r"""The product :math:`J v`, row by row."""
        vector = linear(vector, self.weights[0])
        for slope, weight in zip(self.slopes, self.weights[1:], strict=True):
            vector = linear(slope * vector, weight)
        return vector

    def pull(self, vector: Tensor) -> Tensor:
        r"""The product :math:`J^\top v`, row by row."""
        for slope, weight in zip(reversed(self.slopes), reversed(self.weights[1:]), strict=True):
            vector = (vector @ weight) * slope
        return vector @ self.weights[0]

    def matrix(self) -> Tensor:
        """The matrix, of shape ``(*batch, out, in)``, or ``(out, in)`` where it is one for all points."""
        columns = self.weights[0].mT
        for slope, weight in zip(self.slopes, self.weights[1:], strict=True):
            columns = linear(slope.unsqueeze(-2) * columns, weight)
        return columns.mT

    def detach(self) -> Jacobian:
        """The same without gradients."""
        return Jacobian(
            tuple(w.detach() for w in self.weights), tuple(s.detach() for s in self.slopes)
        )


class Feedforward(NamedTuple):
    r"""A network :math:`W_K a(\dots a(W_0 x + b_0) \dots) + b_K`, given by its tensors.

    Args:
        weights: Matrices :math:`W_k`.
        shifts: Vectors :math:`b_k`; the first may have the batch shape of a context.
        activation: The activation :math:`a`.
    """

    weights: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]
    activation: nn.Module

    @classmethod
    def of(cls, network: MLP, context: Tensor | None) -> Feedforward:
        """The tensors of a perceptron at one context."""
        assert network.input is not None
        layers: Sequence[Any] = [network.input, *network.layers]
        weights, shifts = [layer.weight for layer in layers], [layer.bias for layer in layers]
        if network.context is not None:
            shifts[0] = shifts[0] + network.context(context)
        weights[-1], shifts[-1] = (
            weights[-1] * network.output_scale,
            shifts[-1] * network.output_scale,
        )
        return cls(tuple(weights), tuple(shifts), network.activation)

    def __call__(self, x: Tensor) -> Tensor:
        h = linear(x, self.weights[0]) + self.shifts[0]
        for weight, shift in zip(self.weights[1:], self.shifts[1:], strict=True):
            h = linear(self.activation(h), weight, shift)
        return h

    def linearise(self, x: Tensor) -> tuple[Tensor, Jacobian]:
        """The value and the Jacobian at ``x``."""
        h, slopes = linear(x, self.weights[0]) + self.shifts[0], []
        for weight, shift in zip(self.weights[1:], self.shifts[1:], strict=True):
            h, slope = _activate(self.activation, h)
            h = linear(h, weight, shift)
            slopes.append(slope)
        return h, Jacobian(self.weights, tuple(slopes))


def trace_rule(weights: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    r"""How the trace of the Jacobian follows from the slopes.

    With up to two hidden layers it is a form in the slopes with coefficients that serve all points,
    as in

    .. math:: \operatorname{tr}(W_2 S_2 W_1 S_1 W_0) = s_2^\top \big( W_1 \circ (W_0 W_2)^\top \big) s_1,

    so that it costs no more than a layer of the network, whatever the number of entries. With more,
    the columns of the Jacobian are followed through the network.

    Args:
        weights: Matrices :math:`W_0, \dots, W_K`.

    Returns:
        A function of the slopes :math:`s_1, \dots, s_K`.
    """
    first, *inner, last = weights if len(weights) > 1 else (weights[0], weights[0])
    if len(weights) == 1:
        total = first.diagonal().sum()
        return lambda slopes: total
    if not inner:
        form = (first * last.mT).sum(-1)
        return lambda slopes: slopes[0] @ form
    if len(inner) == 1:
        form = inner[0] * (first @ last).mT
        return lambda slopes: ((slopes[1] @ form) * slopes[0]).sum(-1)

    def along_columns(slopes: Sequence[Tensor]) -> Tensor:
        columns = first.mT
        for slope, weight in zip(slopes[:-1], inner, strict=True):
            columns = linear(slope.unsqueeze(-2) * columns, weight)
        return (columns * slopes[-1].unsqueeze(-2) * last).sum((-1, -2))

    return along_columns
