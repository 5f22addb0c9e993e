"""Multilayer perceptrons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_activation, check_hidden, check_size

__all__ = ["MLP"]


class MLP(nn.Module):
    r"""A fully connected network of an input and an optional context.

    .. math:: h_1 = a(W_0 x + V c + b_0), \quad h_{k+1} = a(W_k h_k + b_k), \quad
        \mathrm{out} = (W_K h_K + b_K) / \sqrt{n_K}.

    The root of the last hidden width :math:`n_K` tempers the first steps of wide networks: without it one step of Adam
    moves the output in proportion to the width, with it to its root. The context enters the first layer by a matrix of its
    own, so that one context serves many inputs by broadcasting and is multiplied once.

    Args:
        in_features: Entries of the input, 0 for a network of the context alone.
        out_features: Entries of the output.
        hidden_features: Widths of the hidden layers.
        context_features: Entries of the context, or ``None``.
        activation: A callable without arguments that makes the activation module.

    Raises:
        TypeError: If a width is not an integer or ``activation`` does not make modules.
        ValueError: If a width is not positive, or if there is neither input nor context.

    Reference:
        Jacot, Gabriel, Hongler, "Neural tangent kernel: Convergence and generalization in neural networks", 2018,
        https://arxiv.org/abs/1806.07572

    Example:
        >>> net = MLP(3, 2, hidden_features=(8,), context_features=1)
        >>> net(torch.zeros(5, 3), torch.zeros(1)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (64, 64),
        context_features: int | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        check_size("in_features", in_features, least=0)
        if context_features is not None:
            check_size("context_features", context_features)
        elif in_features == 0:
            raise ValueError(
                "Expected an MLP with an input or a context; got in_features=0 and no context_features."
            )
        check_size("out_features", out_features)
        widths = check_hidden(hidden_features)
        self.activation = check_activation(activation)
        widths = (*widths, out_features)
        self.input: nn.Linear | None = nn.Linear(in_features, widths[0]) if in_features else None
        self.context = (
            None
            if context_features is None
            else nn.Linear(context_features, widths[0], bias=in_features == 0)
        )
        self.output_scale = widths[-2] ** -0.5 if len(widths) > 1 else 1.0
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        """Makes the network constant: its last weights are set to zero and its last bias to ``values``.

        Args:
            values: Tensor of shape ``(out_features,)``.
        """
        last: list[Any] = (
            [self.layers[-1]]
            if len(self.layers)
            else [m for m in (self.input, self.context) if m is not None]
        )
        for layer in last:
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.copy_(values / self.output_scale)

    def forward(self, x: Tensor | None, context: Tensor | None = None) -> Tensor:
        """Evaluates the network.

        Args:
            x: Input of shape ``(*, in_features)``; ``None`` where there is none.
            context: Context of shape ``(*, context_features)``, broadcast against ``x``.

        Returns:
            Output of shape ``(*, out_features)``.
        """
        h = None
        if self.input is not None:
            h = self.input(x)  # type: ignore[operator]
        if self.context is not None:
            given = self.context(context)  # type: ignore[operator]
            h = given if h is None else h + given
        assert h is not None
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
