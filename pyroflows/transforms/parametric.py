"""One source of raw parameters: a learned table, or a network of the context."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..nn.network import Network, make_network
from .base import Transform

__all__ = ["Parametric"]


class Parametric(Transform):
    """Base class of maps defined by raw parameters, which are learned or come from the context.

    A subclass calls :meth:`start` at the end of its constructor. Then :attr:`raw` is the table, or :attr:`conditioner` the
    network that gives it, and :meth:`parameters_for` asks either.
    """

    def start(self, table: Tensor, network: Network, positions: Sequence[int] = ()) -> None:
        """Sets where the raw parameters start.

        Args:
            table: Their values, of any shape; with positions of shape ``(parameters, channels * positions)``, the same at
                all positions.
            network: Factory of the network that reads the context, if there is one: as a vector, or, with positions, its
                channels.
            positions: Shape of the positions at which the network reads and gives channels.
        """
        if self.context_shape is None:
            self.raw = nn.Parameter(table)
            return
        self._table_shape, self._positions = table.shape, tuple(positions)
        inputs = self.context_shape[0] if positions else self.context_shape.numel()
        values = table.unflatten(-1, (-1, math.prod(positions)))[..., 0]
        self.conditioner = make_network(network, inputs, values.flatten(), positions=positions)

    def parameters_for(self, context: Tensor | None) -> Tensor:
        """The raw parameters, of the shape of the table after the batch of the context."""
        if self.context_shape is None:
            return self.raw
        assert context is not None
        if not self._positions:
            return self.conditioner(self.read_context(context)).unflatten(-1, self._table_shape)
        batch = context.shape[: context.dim() - len(self.context_shape)]
        return self.conditioner(context).reshape(*batch, *self._table_shape)
