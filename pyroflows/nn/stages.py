"""A masked network stage by stage: forwards as its entries become known, and its transpose backwards."""

from __future__ import annotations

import torch
from torch import Tensor

from .made import MADE, Weights

__all__ = ["Folding", "Unfolding"]


class Unfolding:
    """A network evaluated stage by stage, each of its units once.

    It works on columns, one per point of the batch, so that what is known is a block of rows at the
    top: the units that depend on entries of earlier stages only. In turn :meth:`parameters` gives
    the parameters of the next stage's entries, and :meth:`reveal` takes their values.

    Args:
        net: The network.
        weights: Its weights.
        context: The context's part of the first layer, of shape ``(units, batch)``.
        like: Values that come in the end, of shape ``(features, batch)``.
        in_place: Whether to write to tensors, which is faster; not for what is differentiated or
            mapped.
    """

    def __init__(
        self, net: MADE, weights: Weights, context: Tensor | None, like: Tensor, in_place: bool
    ) -> None:
        self.net, self.stage = net, 0
        self.values = _Rows(like, net.codes * net.features if in_place else None)
        self.active = [_Rows(like, width if in_place else None) for width in net.widths]
        self.matrices = _by_stage(net, weights.matrices)
        bias, *biases = [bias.unsqueeze(-1) for bias in weights.biases]
        self.biases = [bias if context is None else bias + context, *biases]
        self.biases[-1] = _entry_by_entry(net, self.biases[-1], 0, net.outputs)

    def parameters(self) -> Tensor:
        """The parameters of the next stage's entries, of shape ``(entries, parameters, batch)``."""
        net, stage = self.net, self.stage
        start, stop = (end * net.outputs for end in net.slices[stage])
        z: Tensor | None = None
        for layer, ends in enumerate(net.unit_ends):
            low, high = ends[stage - 1] if stage else 0, ends[stage]
            if low < high:
                into = self._multiply(layer, low, high)
                z = into if z is None or not net.residual else z + into
                self.active[layer].add(net.activation(z))
        return self._multiply(len(net.widths), start, stop).unflatten(0, (-1, net.outputs))

    def reveal(self, inputs: Tensor) -> None:
        """Takes the inputs of the stage's entries, of shape ``(entries, codes, batch)``."""
        self.values.add(inputs.flatten(0, 1))
        self.stage += 1

    def _multiply(self, layer: int, low: int, high: int) -> Tensor:
        """Some rows of the input of a layer, of what is known by now."""
        matrix, bias = self.matrices[layer], self.biases[layer][low:high]
        known = self.active[layer - 1].all if layer else self.values.all
        if matrix is None or not len(known):
            return bias.expand(-1, known.shape[-1])
        return torch.addmm(bias, matrix[low:high, : len(known)], known)


class Folding:
    """The transpose of the derivative of a network, folded back stage by stage, each of its units once.

    The mirror image of :class:`Unfolding`, from the last stage to the first: in turn :meth:`pulled`
    gives what the cotangents of later stages' parameters put on the entries of a stage, and
    :meth:`reveal` takes the cotangents of its parameters.

    Args:
        net: The network.
        weights: Its weights.
        slopes: Derivatives of the activations, of shape ``(units, batch)``, layer by layer.
        like: Values that come in the end, of shape ``(features, batch)``.
        in_place: Whether to write to tensors.
    """

    def __init__(
        self, net: MADE, weights: Weights, slopes: list[Tensor], like: Tensor, in_place: bool
    ) -> None:
        self.net, self.stage, self.slopes = net, net.stages, slopes
        sizes = (*net.widths, net.outputs * net.features)
        #: The matrix that leads out of the entries, then those out of the layers.
        self.matrices = [
            matrix.mT for matrix in _by_stage(net, weights.matrices) if matrix is not None
        ]
        self.cotangents = [_Rows(like, size if in_place else None, upwards=True) for size in sizes]

    def pulled(self) -> Tensor:
        """What later stages put on the inputs of the stage before the last one revealed, ``(entries, codes, batch)``."""
        codes = self.net.codes
        self.stage -= 1
        low, high = self.net.slices[self.stage]
        return self._multiply(0, low * codes, high * codes).unflatten(0, (-1, codes))

    def reveal(self, cotangents: Tensor) -> None:
        """Takes the cotangents of the stage's parameters, of shape ``(entries, parameters, batch)``."""
        net, stage = self.net, self.stage
        self.cotangents[-1].add(cotangents.flatten(0, 1))
        z: Tensor | None = None
        for layer in reversed(range(len(net.widths))):
            ends = net.unit_ends[layer]
            low, high = ends[stage - 1] if stage else 0, ends[stage]
            if low < high:
                out = self._multiply(layer + 1, low, high) * self.slopes[layer][low:high]
                z = out if z is None or not net.residual else z + out
                self.cotangents[layer].add(z)

    def _multiply(self, layer: int, low: int, high: int) -> Tensor:
        known = self.cotangents[layer].all
        return self.matrices[layer][low:high, self.matrices[layer].shape[1] - len(known) :] @ known


def _by_stage(net: MADE, matrices: list[Tensor | None]) -> list[Tensor | None]:
    """The matrices with inputs and outputs sorted stage by stage."""
    first, *others = matrices
    sorted_ones = [None if first is None else _entry_by_entry(net, first, 1, net.codes), *others]
    last = sorted_ones[-1]
    sorted_ones[-1] = None if last is None else _entry_by_entry(net, last, 0, net.outputs)
    return sorted_ones


def _entry_by_entry(net: MADE, table: Tensor, dim: int, count: int) -> Tensor:
    """Sorts a dimension stage by stage, what belongs to one entry together."""
    sorted_one = table.unflatten(dim, (count, -1)).index_select(dim + 1, net.entries)
    return sorted_one.transpose(dim, dim + 1).flatten(dim, dim + 1)


class _Rows:
    """A matrix that grows by blocks of rows: written to a tensor of its final height, or concatenated."""

    def __init__(self, like: Tensor, height: int | None, upwards: bool = False) -> None:
        self.upwards = upwards
        self.whole = None if height is None else like.new_empty(height, like.shape[-1])
        self.all = like[:0]

    def add(self, rows: Tensor) -> None:
        if self.whole is None:
            self.all = torch.cat([rows, self.all] if self.upwards else [self.all, rows])
            return
        known, height = len(self.all) + len(rows), len(self.whole)
        if self.upwards:
            self.all = self.whole[height - known :]
            self.all[: len(rows)] = rows
        else:
            self.all = self.whole[:known]
            self.all[known - len(rows) :] = rows
