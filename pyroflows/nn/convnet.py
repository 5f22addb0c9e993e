"""Convolutional networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .._checks import check_activation, check_hidden, check_size
from .startable import Startable

__all__ = ["ConvNet"]

#: The convolution over as many dimensions as there are positions.
_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}


class ConvNet(Startable):
    r"""A convolutional network of an input and an optional context, which keeps positions.

    .. math:: h_1 = a(W_0 * x + V * c + b_0), \quad h_{k+1} = a(W_k * h_k + b_k), \quad
        \mathrm{out} = (W_K * h_K + b_K) / \sqrt{n_K}.

    All convolutions are padded by zeros, so that the output has the positions of the input. The
    root of the last number of hidden channels :math:`n_K` tempers the first steps, as in
    :class:`MLP`.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        context: Channels of the context, or ``None``.
        hidden: Channels of the hidden layers, at least one layer.
        kernel: Width of each convolution, an odd number.
        activation: A callable without arguments that makes the activation module.
        dims: Dimensions of the positions, 2 for images and 1 for series.

    Raises:
        TypeError: If a size is not an integer or ``activation`` does not make modules.
        ValueError: If a size is not positive, ``kernel`` is even, ``hidden`` is empty or ``dims``
            is neither 1 nor 2.

    Example:
        >>> net = ConvNet(3, 2, context=1, hidden=(8,))
        >>> net(torch.zeros(5, 3, 4, 4), torch.zeros(1, 4, 4)).shape
        torch.Size([5, 2, 4, 4])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        context: int | None = None,
        *,
        hidden: Sequence[int] = (32, 32),
        kernel: int = 3,
        activation: Callable[[], nn.Module] = nn.SiLU,
        dims: int = 2,
    ) -> None:
        super().__init__()
        widths = (*check_hidden(hidden), check_size("outputs", outputs))
        if len(widths) < 2:
            raise ValueError("Expected hidden with one layer at least; got none.")
        if check_size("kernel", kernel) % 2 == 0:
            raise ValueError(f"Expected kernel to be odd; got {kernel}.")
        if check_size("dims", dims) not in _CONVOLUTIONS:
            raise ValueError(f"Expected dims to be 1 for series or 2 for images; got {dims}.")
        convolution = _CONVOLUTIONS[dims]
        self.dims = dims
        self.activation = check_activation(activation)
        self.input = convolution(
            check_size("inputs", inputs), widths[0], kernel, padding=kernel // 2
        )
        self.context: nn.Module | None = None
        if context is not None:
            self.context = convolution(context, widths[0], kernel, padding=kernel // 2, bias=False)
        self.layers = nn.ModuleList(
            convolution(i, o, kernel, padding=kernel // 2) for i, o in pairwise(widths)
        )
        self.output_scale = widths[-2] ** -0.5

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        last = self.layers[-1]
        assert isinstance(last, (nn.Conv1d, nn.Conv2d)) and last.bias is not None
        last.weight.zero_()
        last.bias.copy_(values / self.output_scale)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self._convolve(self.input, x)
        if self.context is not None:
            assert context is not None
            h = h + self._convolve(self.context, context)
        for layer in self.layers:
            h = self._convolve(layer, self.activation(h))
        return self.output_scale * h

    def _convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        """A convolution of a batch of any shape; torch's own takes one dimension."""
        batch = x.shape[: x.dim() - self.dims - 1]
        out = layer(x.reshape(batch.numel(), *x.shape[len(batch) :]))
        return out.reshape(*batch, *out.shape[1:])
