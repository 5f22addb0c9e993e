"""Which entries of a sparse normal vector depend on the noise of which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .elimination import Elimination

__all__ = ["EliminationTree", "find_elimination_tree"]


@dataclass(frozen=True)
class EliminationTree:
    """The tree of an elimination: what is eliminated last in its block is a root.

    A draw of :class:`pyroflows.distributions.sparse_normal.SparseNormal` makes an entry of its own
    noise and that of its ancestors. Given these, subtrees are independent.

    Attributes:
        levels: For each depth, from the roots, the entries there, in order.
        parents: For each depth the places of the entries' parents in the level before; empty for
            the roots.
    """

    levels: list[Tensor]
    parents: list[Tensor]

    @property
    def depth(self) -> int:
        """How many levels there are."""
        return len(self.levels)

    @property
    def depths(self) -> Tensor:
        """The depth of each entry, of shape ``(size,)``; zero for the roots."""
        depths = torch.zeros(sum(map(len, self.levels)), dtype=torch.long)
        for depth, entries in enumerate(self.levels):
            depths[entries] = depth
        return depths


def find_elimination_tree(elimination: Elimination) -> EliminationTree:
    """Finds the tree of an elimination.

    Args:
        elimination: The elimination.

    Returns:
        Its tree.

    Reference:
        Liu, "The role of elimination trees in sparse factorization", 1990,
        https://doi.org/10.1137/0611010

    Example:
        >>> schools = torch.tensor([[0, 2], [0, 3], [1, 4], [1, 5]])
        >>> find_elimination_tree(Elimination(6, schools)).levels
        [tensor([0, 1]), tensor([2, 3, 4, 5])]
    """
    order = _order(elimination)
    parents = _parents(order, elimination.edges.tolist())
    depths = [0] * elimination.size
    for entry in reversed(order):
        if parents[entry] >= 0:
            depths[entry] = depths[parents[entry]] + 1
    of_entry, parent = torch.tensor(depths, dtype=torch.long), torch.tensor(parents)
    places = torch.zeros(elimination.size, dtype=torch.long)
    levels, above = [], []
    for depth in range(max(depths, default=-1) + 1):
        entries = (of_entry == depth).nonzero().squeeze(-1)
        above.append(places[parent[entries]] if depth else entries[:0])
        places[entries] = torch.arange(len(entries))
        levels.append(entries)
    return EliminationTree(levels, above)


def _order(elimination: Elimination) -> list[int]:
    """All entries, in the order in which they are eliminated."""
    left, order = torch.arange(elimination.size), []
    for level in elimination.levels:
        order += left[level.entries].tolist()
        left = left[level.rest]
    wide = elimination.wide
    return order + left[wide.entries].tolist() + left[wide.core].tolist()


def _parents(order: list[int], edges: list[list[int]]) -> list[int]:
    """For each entry the next in its block that depends on it when it is gone; -1 for none."""
    rank = {entry: number for number, entry in enumerate(order)}
    before: list[list[int]] = [[] for _ in order]
    for i, j in edges:
        first, last = sorted((i, j), key=rank.__getitem__)
        before[last].append(first)
    parents, roots = [-1] * len(order), list(range(len(order)))
    for entry in order:
        for below in before[entry]:
            # Climbs to the root of what is there so far, and shortens the way for later.
            while roots[below] != below:
                roots[below], below = entry, roots[below]
            if below != entry:
                roots[below] = parents[below] = entry
    return parents
