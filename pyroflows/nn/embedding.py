"""Networks that read whole data sets, as contexts of flows: sets and series."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from .._checks import check_activation, check_hidden, check_shape, check_size
from .._spec import Recorded
from .mlp import MLP

__all__ = ["DeepSet", "Flat", "SeriesNet"]


class Flat(Recorded, nn.Module):
    """The entries of data as one vector.

    Args:
        shape: Shape of the data; empty for a number.

    Example:
        >>> import torch
        >>> Flat((2, 3))(torch.zeros(5, 2, 3)).shape, Flat(())(torch.zeros(5)).shape
        (torch.Size([5, 6]), torch.Size([5, 1]))
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = check_shape("shape", shape)

    def forward(self, x: Tensor) -> Tensor:
        """Lays out data of shape ``(*, *shape)`` as vectors of shape ``(*, entries)``."""
        return x.reshape(*x.shape[: x.dim() - len(self.shape)], self.shape.numel())


class DeepSet(Recorded, nn.Module):
    r"""A network of a set: what it gives does not depend on the order of the rows.

    .. math:: \mathrm{out} = \rho\Big(\frac{1}{n} \sum_{i=1}^n \varphi(x_i)\Big).

    Args:
        shape: Shape of a set, rows first: ``(n,)`` for numbers, ``(n, d)`` for vectors.
        outputs: Entries of the output.
        hidden: Widths of the hidden layers of both networks.
        activation: A callable without arguments that makes the activation module.

    Raises:
        TypeError: If a size is not an integer or ``activation`` does not make modules.
        ValueError: If a size is not positive.

    Reference:
        Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov, Smola, "Deep sets", 2017,
        https://arxiv.org/abs/1703.06114

    Example:
        >>> import torch
        >>> net = DeepSet((10, 2), outputs=4)
        >>> x = torch.randn(5, 10, 2)
        >>> net(x).shape, torch.allclose(net(x), net(x.flip(1)), atol=1e-6)
        (torch.Size([5, 4]), True)
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.shape = check_shape("shape", shape, least=1)
        entries = self.shape[1:].numel()
        width = check_hidden(hidden)[-1]
        self.of_row = MLP(entries, width, hidden=hidden, activation=activation)
        self.of_mean = MLP(width, outputs, hidden=hidden, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Reads sets.

        Args:
            x: Tensor of shape ``(*, *shape)``.

        Returns:
            Tensor of shape ``(*, outputs)``.
        """
        batch = x.shape[: x.dim() - len(self.shape)]
        rows = x.reshape(*batch, self.shape[0], self.shape[1:].numel())
        return self.of_mean(self.of_row(rows).mean(-2))


class SeriesNet(Recorded, nn.Module):
    r"""A network of a series: convolutions along time, each of which halves it, and a mean.

    .. math:: \mathrm{out} = \rho\Big(\frac{1}{T_K} \sum_t h_K(t)\Big), \quad
        h_k = a(W_k * h_{k-1} + b_k).

    Args:
        shape: Shape of a series, times first: ``(T,)`` or ``(T, d)``.
        outputs: Entries of the output.
        hidden: Channels of the convolutions.
        kernel: Width of each convolution, an odd number.
        activation: A callable without arguments that makes the activation module.

    Raises:
        TypeError: If a size is not an integer or ``activation`` does not make modules.
        ValueError: If a size is not positive, or ``kernel`` is even.

    Example:
        >>> import torch
        >>> SeriesNet((50, 2), outputs=4)(torch.randn(5, 50, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        hidden: Sequence[int] = (32, 32, 32),
        kernel: int = 5,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.shape = check_shape("shape", shape, least=1)
        if check_size("kernel", kernel) % 2 == 0:
            raise ValueError(f"Expected kernel to be odd; got {kernel}.")
        self.activation = check_activation(activation)
        channels = (self.shape[1:].numel(), *check_hidden(hidden))
        self.layers = nn.ModuleList(
            nn.Conv1d(i, o, kernel, stride=2, padding=kernel // 2) for i, o in pairwise(channels)
        )
        self.of_mean = MLP(channels[-1], outputs, hidden=channels[-1:], activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Reads series.

        Args:
            x: Tensor of shape ``(*, *shape)``.

        Returns:
            Tensor of shape ``(*, outputs)``.
        """
        batch = x.shape[: x.dim() - len(self.shape)]
        h = x.reshape(batch.numel(), self.shape[0], self.shape[1:].numel()).mT
        for layer in self.layers:
            h = self.activation(layer(h))
        return self.of_mean(h.mean(-1)).reshape(*batch, -1)
