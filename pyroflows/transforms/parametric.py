"""One source of raw parameters: a learned table, or a network of the context."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..nn.network import Network, check_network, make_network
from .base import Transform

__all__ = ["Parametric"]


class Parametric(Transform):
    """Base class of maps whose tables of raw parameters are learned or come from the context.

    A subclass calls :meth:`start` in its constructor. Then the tables are parameters by their
    names, or :attr:`conditioner` is the network that gives them, and :meth:`tables_for` asks
    either.
    """

    raw: nn.Parameter

    def start(self, network: Network, positions: Sequence[int] = (), **tables: Tensor) -> None:
        """Sets where the raw parameters start.

        Args:
            network: Factory of the network that reads the context, if there is one: as a vector,
                or, with positions, its channels.
            positions: Shape of the positions at which the network reads and gives channels.
            tables: The values, of any shape, by name; with positions of shape
                ``(*, channels * positions)``, the same at all positions.
        """
        check_network(network)
        self._tables = {name: table.shape for name, table in tables.items()}
        if self.context_shape is None:
            for name, table in tables.items():
                self.register_parameter(name, nn.Parameter(table))
            return
        self._positions = tuple(positions)
        inputs = self.context_shape[0] if positions else self.context_shape.numel()
        count = math.prod(positions)
        values = [table.unflatten(-1, (-1, count))[..., 0].flatten() for table in tables.values()]
        self.conditioner = make_network(network, inputs, torch.cat(values), positions=positions)

    def tables_for(self, context: Tensor | None) -> list[Tensor]:
        """The tables, each of its shape after the batch of the context."""
        if self.context_shape is None:
            return [getattr(self, name) for name in self._tables]
        assert context is not None
        shapes = self._tables.values()
        if self._positions:
            out = self.conditioner(context).flatten(-len(self.context_shape))
        else:
            out = self.conditioner(self.read_context(context))
        out = out.to(context.dtype)  # autocast is for the network alone
        parts = [out] if len(shapes) == 1 else out.split([shape.numel() for shape in shapes], -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def parameters_for(self, context: Tensor | None) -> Tensor:
        """The table of a map that has one."""
        (table,) = self.tables_for(context)
        return table
