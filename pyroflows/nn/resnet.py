"""Residual networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._checks import check_activation, check_size
from .startable import Startable

__all__ = ["ResNet"]


class ResNet(Startable):
    r"""A residual network of an input and an optional context.

    .. math:: h_0 = W x + V c + b, \quad h_{k+1} = h_k + B_k\, a(A_k\, a(h_k) + a_k) + b_k, \quad
        \mathrm{out} = (W_K\, a(h_K) + b_K) / \sqrt{n}.

    The root of the width :math:`n` tempers the first steps, as in :class:`MLP`. Every block starts
    as the identity.

    Args:
        inputs: Entries of the input.
        outputs: Entries of the output.
        context: Entries of the context, or ``None``.
        width: Entries :math:`n` of each hidden layer.
        blocks: Number of residual blocks.
        activation: A callable without arguments that makes the activation module.

    Raises:
        TypeError: If a size is not an integer or ``activation`` does not make modules.
        ValueError: If a size is not positive.

    Reference:
        He, Zhang, Ren, Sun, "Identity mappings in deep residual networks", 2016,
        https://arxiv.org/abs/1603.05027

    Example:
        >>> net = ResNet(3, 2, context=1, width=8)
        >>> net(torch.zeros(5, 3), torch.zeros(1)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        context: int | None = None,
        *,
        width: int = 64,
        blocks: int = 2,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        check_size("width", width)
        self.activation = check_activation(activation)
        self.input = nn.Linear(check_size("inputs", inputs), width)
        self.context = None if context is None else nn.Linear(context, width, bias=False)
        blocks = check_size("blocks", blocks)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.output = nn.Linear(width, check_size("outputs", outputs))
        self.output_scale = width**-0.5
        for layer in self.outer:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        self.output.weight.zero_()
        self.output.bias.copy_(values / self.output_scale)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.input(x)
        if self.context is not None:
            h = h + self.context(context)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            h = h + outer(self.activation(inner(self.activation(h))))
        return self.output_scale * self.output(self.activation(h))
