"""Encoders: networks that sum up the data of a row for a flow that is conditioned on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._checks import check_size
from .mlp import MLP
from .startable import Startable

__all__ = ["RowEncoder", "RowSource", "RowTable", "Skip"]


@dataclass(frozen=True)
class RowSource:
    """What an encoder is given of each row: one tensor.

    Attributes:
        name: A name for messages.
        shape: The shape of one row.
        exchangeable: How many of its first dimensions count observations whose order does not
            matter, as those within a further plate.
        series: Whether the last two dimensions are ``(time, channels)``.
        mask: Whether the source before this one is missing where this one is zero.
    """

    name: str
    shape: torch.Size
    exchangeable: int = 0
    series: bool = False
    mask: bool = False


class RowEncoder(nn.Module):
    r"""Encodes rows of vectors, of sets of exchangeable observations and of series.

    A set goes through a network that sums over its observations, a series through a recurrent one,

    .. math:: e = \tanh \rho\Bigl(v,\ \tfrac1n \sum_{i=1}^n \phi(y_i),\ \log(1 + n),\
        \mathrm{GRU}(s_1, \dots, s_T)\Bigr),

    with the count :math:`n` of those that no mask switches off, so that their order makes no
    difference. Inputs are standardised by the means and scales of the rows that
    :meth:`standardize` was given.

    Args:
        sources: What each row has; sources with exchangeable observations of the same shape belong
            together, observation by observation.
        features: Entries of an encoding.
        width: Width of the hidden layers.

    Raises:
        ValueError: If a size is not positive.

    Reference:
        Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov, Smola, "Deep sets", 2017,
        https://arxiv.org/abs/1703.06114

    Example:
        >>> source = RowSource("y", torch.Size([5]), exchangeable=1)
        >>> encoder, y = RowEncoder([source]), torch.randn(3, 5)
        >>> torch.allclose(encoder(y), encoder(y.flip(-1)), atol=1e-6)
        True
    """

    def __init__(self, sources: Sequence[RowSource], features: int = 32, width: int = 64) -> None:
        super().__init__()
        check_size("features", features)
        self.sources = tuple(sources)
        self.sets = _group_sets(self.sources)
        inputs = sum(self._vector_size(source) for source in self.sources)
        self.elements = nn.ModuleList()
        for members in self.sets:
            entries = sum(_entries(self.sources[k]) for k in members)
            self.elements.append(_perceptron(entries, width, width))
            inputs += width + 1
        self.series = nn.ModuleList()
        for source in self.sources:
            if source.series and not source.exchangeable:
                self.series.append(nn.GRU(source.shape[-1], width, batch_first=True))
                inputs += width * source.shape[:-2].numel()
        self.joint = _perceptron(inputs, width, features)
        for k, source in enumerate(self.sources):
            shape = source.shape[source.exchangeable :]
            self.register_buffer(f"loc_{k}", torch.zeros(shape))
            self.register_buffer(f"scale_{k}", torch.ones(shape))

    @torch.no_grad()
    def standardize(self, *rows: Tensor) -> None:
        """Takes over the means and scales of some rows.

        Args:
            rows: For each source a tensor of shape ``(rows, *shape)``.
        """
        for k, (source, value) in enumerate(zip(self.sources, rows, strict=True)):
            if source.mask or value.numel() == 0:
                continue
            flat = value.flatten(0, source.exchangeable)
            scale = flat.std(0, correction=0)
            getattr(self, f"loc_{k}").copy_(flat.mean(0))
            getattr(self, f"scale_{k}").copy_(scale.where(scale > 0, 1.0))

    def forward(self, *rows: Tensor) -> Tensor:
        """Encodes rows.

        Args:
            rows: For each source a tensor of shape ``(rows, *shape)``.

        Returns:
            Encodings of shape ``(rows, features)``.
        """
        scaled = [self._standardized(k, value) for k, value in enumerate(rows)]
        parts = [v.reshape(len(v), -1) for k, v in enumerate(scaled) if self._is_vector(k)]
        parts += self._encode_sets(scaled)
        parts += self._encode_series(scaled)
        # Bounded, so that no step of training sends a flow far off.
        return self.joint(torch.cat(parts, -1)).tanh()

    def _standardized(self, k: int, value: Tensor) -> Tensor:
        loc, scale = getattr(self, f"loc_{k}"), getattr(self, f"scale_{k}")
        return (value.to(loc) - loc) / scale

    def _is_vector(self, k: int) -> bool:
        return self._vector_size(self.sources[k]) > 0

    def _vector_size(self, source: RowSource) -> int:
        return 0 if source.exchangeable or source.series else source.shape.numel()

    def _encode_sets(self, scaled: Sequence[Tensor]) -> list[Tensor]:
        parts = []
        for members, network in zip(self.sets, self.elements, strict=True):
            columns, present = [], None
            for k in members:
                source = self.sources[k]
                column = scaled[k].flatten(1, source.exchangeable)
                column = column.flatten(2) if column.dim() > 2 else column.unsqueeze(-1)
                columns.append(column)
                if source.mask:
                    seen = column.amax(-1, keepdim=True)
                    present = seen if present is None else present * seen
            values = torch.cat(columns, -1)
            present = torch.ones_like(values[..., :1]) if present is None else present
            count = present.sum(1)
            pooled = (network(values) * present).sum(1) / count.clamp(min=1.0)
            parts += [pooled, count.log1p()]
        return parts

    def _encode_series(self, scaled: Sequence[Tensor]) -> list[Tensor]:
        chosen = [
            (source, value)
            for source, value in zip(self.sources, scaled, strict=True)
            if source.series and not source.exchangeable
        ]
        parts = []
        for network, (source, value) in zip(self.series, chosen, strict=True):
            flat = value.reshape(-1, *source.shape[-2:])
            parts.append(network(flat)[1][-1].reshape(len(value), -1))
        return parts


def _perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    # Not an MLP, whose outputs are small at first, so that a flow is slow to hear of the data.
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, outputs),
    )


def _entries(source: RowSource) -> int:
    return source.shape[source.exchangeable :].numel()


def _group_sets(sources: Sequence[RowSource]) -> list[list[int]]:
    """The sources of exchangeable observations, those of the same shape together."""
    groups: dict[torch.Size, list[int]] = {}
    for k, source in enumerate(sources):
        if source.exchangeable:
            groups.setdefault(source.shape[: source.exchangeable], []).append(k)
    return list(groups.values())


class RowTable(nn.Module):
    """Parameters for each row, in the place of an encoder of its data.

    Args:
        rows: How many rows there are.
        features: Entries for each.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> RowTable(10, 2)(torch.tensor([3, 9])).shape
        torch.Size([2, 2])
    """

    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        size = check_size("rows", rows), check_size("features", features)
        self.values = nn.Parameter(torch.zeros(size))

    def forward(self, index: Tensor) -> Tensor:
        """Looks rows up: from indices of shape ``(n,)`` to ``(n, features)``."""
        return self.values.index_select(0, index.to(self.values.device))


class Skip(Startable):
    r"""A perceptron beside a linear map, which learns fast: :math:`W x + h(x)`.

    Args:
        inputs: Entries of the input.
        outputs: Entries of the output.
        context: Not used.
        through: Whether the first entries of the input pass as they are at first.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> network = Skip(3, 2, through=True)
        >>> network.start_at(torch.zeros(2))
        >>> network(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [1.0, 2.0]
    """

    def __init__(
        self, inputs: int, outputs: int, context: int | None = None, *, through: bool = False
    ) -> None:
        super().__init__()
        self.network = MLP(inputs, outputs)
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.through = through

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        self.network.start_at(values)
        self.linear.weight.zero_()
        if self.through:
            self.linear.weight.fill_diagonal_(1.0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.linear(x) + self.network(x)
