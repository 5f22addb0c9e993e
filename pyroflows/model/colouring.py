"""Few vectors whose products with a sparse symmetric matrix hold all its entries."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Colouring"]


class Colouring:
    r"""Colours of the entries of a vector, so that a sparse symmetric matrix is read from its
    products with one vector for each colour.

    Entries that touch have different colours, and every path over four entries has at least three:
    of an edge, one end meets the colour of the other end once. Independent entries take one colour,
    a chain three, two crossed factors one more than the smaller of them has entries.

    Args:
        size: Rows of the matrix.
        edges: Pairs of different entries that touch, of shape ``(e, 2)``, each once.

    Attributes:
        colours: The number of each entry's colour, of shape ``(size,)``.
        count: How many colours there are.

    Reference:
        Gebremedhin, Manne, Pothen, "What color is your Jacobian? Graph coloring for computing
        derivatives", 2005, https://doi.org/10.1137/S0036144504444711

    Example:
        >>> chain = torch.stack([torch.arange(4), torch.arange(1, 5)], -1)
        >>> Colouring(5, chain).colours
        tensor([1, 0, 1, 2, 0])
    """

    def __init__(self, size: int, edges: Tensor) -> None:
        self.edges = edges
        self.colours = torch.tensor(_colour(size, edges), dtype=torch.long)
        self.count = max(self.colours.tolist(), default=-1) + 1
        near, far = torch.cat([edges, edges.flip(-1)]).unbind(-1)
        met = near * max(1, self.count) + self.colours[far]
        _, which, times = met.unique(return_inverse=True, return_counts=True)
        alone = (times[which] == 1)[: len(edges)]
        i, j = edges.unbind(-1)
        self._rows = torch.cat([torch.arange(size), i.where(alone, j)])
        self._colours_met = torch.cat([self.colours, self.colours[j.where(alone, i)]])

    @property
    def directions(self) -> Tensor:
        """The vectors, of zeros and ones, of shape ``(count, size)``."""
        return (self.colours == torch.arange(self.count).unsqueeze(-1)).double()

    def read(self, products: Tensor) -> Tensor:
        """The diagonal and then the values of the edges.

        Args:
            products: Products of the matrix with the directions, of shape ``(*, count, size)``.

        Returns:
            Tensor of shape ``(*, size + e)``.
        """
        return products[..., self._colours_met, self._rows]


def _colour(size: int, edges: Tensor) -> list[int]:
    """Gives each entry, those with many neighbours first, the first colour that it may have."""
    near: list[list[int]] = [[] for _ in range(size)]
    for i, j in edges.tolist():
        near[i].append(j)
        near[j].append(i)
    colours = [-1] * size
    # The colours of an entry's neighbours, as the bits of a number.
    seen = [0] * size
    for entry in sorted(range(size), key=lambda i: -len(near[i])):
        forbidden = 0
        for neighbour in near[entry]:
            colour = colours[neighbour]
            if colour < 0:
                forbidden |= seen[neighbour]
            else:
                forbidden |= (1 << colour) | (seen[neighbour] & ((1 << colour) - 1))
        colours[entry] = colour = (~forbidden & (forbidden + 1)).bit_length() - 1
        for neighbour in near[entry]:
            seen[neighbour] |= 1 << colour
    return colours
