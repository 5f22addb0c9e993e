"""Networks that read whole data sets, as contexts of flows: sets and series."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .._checks import check_activation, check_hidden, check_shape, check_size
from .._spec import Recorded
from .mlp import MLP

__all__ = ["DeepSet", "Entries", "SeriesNet"]


class Entries(Recorded, nn.Module):
    r"""The entries of data as one vector, each as it is and by its rank among simulations.

    .. math:: e = \big(u,\ \sqrt{3} / \pi \; \mathrm{logit}\, \hat F(u)\big),

    with the distribution function :math:`\hat F` of each entry, between quantiles of the
    simulations. Ranks have no outliers, and where an entry is a parameter with little noise they
    are close to that parameter in the unconstrained coordinates of a uniform prior.

    Args:
        shape: Shape of the data; empty for a number.
        quantiles: How many quantiles.

    Example:
        >>> import torch
        >>> entries = Entries((1,))
        >>> entries.fit(torch.linspace(0.0, 1.0, 1001).unsqueeze(-1))
        >>> entries(torch.tensor([[0.9]]))
        tensor([[0.9000, 1.2117]])
    """

    levels: Tensor
    scores: Tensor
    knots: Tensor

    def __init__(self, shape: Sequence[int], quantiles: int = 100) -> None:
        super().__init__()
        self.shape = check_shape("shape", shape)
        levels = torch.linspace(0.0, 1.0, check_size("quantiles", quantiles, least=2))
        edge = 0.25 / quantiles
        scores = levels.clamp(edge, 1 - edge).logit() * (math.sqrt(3) / math.pi)
        self.register_buffer("levels", levels)
        self.register_buffer("scores", scores)
        self.register_buffer("knots", scores.repeat(self.shape.numel(), 1))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Takes the quantiles of simulations of shape ``(n, *shape)``."""
        columns = x.reshape(len(x), self.shape.numel()).double()
        self.knots.copy_(columns.quantile(self.levels.double(), 0).mT)

    def forward(self, x: Tensor) -> Tensor:
        """Lays out data of shape ``(*, *shape)`` as vectors of shape ``(*, 2 * entries)``."""
        batch = x.shape[: x.dim() - len(self.shape)]
        columns = x.reshape(batch.numel(), self.shape.numel())
        return torch.cat([columns, self._rank(columns)], -1).reshape(*batch, -1)

    def _rank(self, x: Tensor) -> Tensor:
        """The scores of columns, by straight lines between the knots and none beyond."""
        columns = x.mT.contiguous()
        right = torch.searchsorted(self.knots, columns).clamp(1, len(self.levels) - 1)
        low, high = self.knots.gather(1, right - 1), self.knots.gather(1, right)
        gap = high - low
        share = torch.where(gap > 0, (columns - low) / gap.where(gap > 0, 1.0), 0.5).clamp(0, 1)
        return torch.lerp(self.scores[right - 1], self.scores[right], share).mT


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
