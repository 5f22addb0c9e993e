"""Multilayer perceptrons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_activation, check_hidden, check_size
from .startable import Startable

__all__ = ["MLP"]


class MLP(Startable):
    r"""A fully connected network of an input and an optional context.

    .. math:: h_1 = a(W_0 x + V c + b_0), \quad h_{k+1} = a(W_k h_k + b_k), \quad
        \mathrm{out} = (W_K h_K + b_K) / \sqrt{n_K}.

    The root of the last hidden width :math:`n_K` tempers the first steps of wide networks: without
    it one step of Adam moves the output in proportion to the width, with it to its root. The
    context enters the first layer by a matrix of its own, so that one context serves many inputs by
    broadcasting and is multiplied once.

    Args:
        inputs: Entries of the input.
        outputs: Entries of the output.
        context: Entries of the context, or ``None``.
        hidden: Widths of the hidden layers.
        activation: A callable without arguments that makes the activation module.

    Raises:
        TypeError: If a width is not an integer or ``activation`` does not make modules.
        ValueError: If a width is not positive.

    Reference:
        Jacot, Gabriel, Hongler, "Neural tangent kernel: Convergence and generalization in neural
        networks", 2018, https://arxiv.org/abs/1806.07572

    Example:
        >>> net = MLP(3, 2, context=1, hidden=(8,))
        >>> net(torch.zeros(5, 3), torch.zeros(1)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        context: int | None = None,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        check_size("inputs", inputs)
        if context is not None:
            check_size("context", context)
        widths = (*check_hidden(hidden), check_size("outputs", outputs))
        self.activation = check_activation(activation)
        self.input = nn.Linear(inputs, widths[0])
        self.context = None if context is None else nn.Linear(context, widths[0], bias=False)
        self.output_scale = widths[-2] ** -0.5 if len(widths) > 1 else 1.0
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        last: Any = self.layers[-1] if len(self.layers) else self.input
        last.weight.zero_()
        last.bias.copy_(values / self.output_scale)
        if not len(self.layers) and self.context is not None:
            self.context.weight.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.input(x)
        if self.context is not None:
            h = h + self.context(context)
        if not len(self.layers):
            return h
        *hidden, last = self.layers
        assert isinstance(last, nn.Linear)
        for layer in hidden:
            h = layer(self.activation(h))
        # The product's own factor, which spares a pass over the output.
        rows = self.activation(h).reshape(math.prod(h.shape[:-1]), h.shape[-1])
        out = torch.addmm(
            last.bias * self.output_scale, rows, last.weight.mT, alpha=self.output_scale
        )
        return out.reshape(*h.shape[:-1], out.shape[-1])
