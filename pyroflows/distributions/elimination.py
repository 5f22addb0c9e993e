"""The order in which the entries of a sparse symmetric matrix are eliminated."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Elimination", "Level", "Wide"]

# Entries with more neighbours are eliminated by dense products.
DEGREE = 8
# So few entries that touch each other are left to the core.
FEW = 32
# The most entries that the core may have.
LARGEST_CORE = 2048

Pair = tuple[int, int]


@dataclass(frozen=True)
class Level:
    """Entries that do not touch each other, with few neighbours, eliminated together.

    Numbers are places in the vector, and slots of the values, that are left when the level begins.
    The place or slot behind the last, which holds a zero, stands for none.

    Attributes:
        entries: The entries, of shape ``(n,)``.
        rest: The entries that are left, of shape ``(r,)``.
        order: Puts the entries and the rest back in their order, of shape ``(n + r,)``.
        pivots: The slots of the entries' diagonal, of shape ``(n,)``.
        neighbours: The places in the rest of what an entry touches, of shape ``(n, m)``.
        links: The slots of these pairs, of shape ``(n, m)``.
        kept: For each slot of the rest the slot that it was, of shape ``(s + 1,)``.
        targets: The slots of the rest for all pairs of neighbours, of shape ``(n, m (m + 1) / 2)``.
    """

    entries: Tensor
    rest: Tensor
    order: Tensor
    pivots: Tensor
    neighbours: Tensor
    links: Tensor
    kept: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Wide:
    """The last entries, with many neighbours: some that do not touch each other, and the core.

    Attributes:
        entries: The entries of the first kind, of shape ``(n,)``.
        core: The others, of shape ``(c,)``.
        order: Puts both back in their order, of shape ``(n + c,)``.
        pivots: The slots of the entries' diagonal, of shape ``(n,)``.
        links: The slots of all pairs of an entry and one of the core, of shape ``(n, c)``.
        slots: The slots of the core, of shape ``(c, c)``.
    """

    entries: Tensor
    core: Tensor
    order: Tensor
    pivots: Tensor
    links: Tensor
    slots: Tensor


class Elimination:
    r"""The order in which the entries of a sparse symmetric matrix are eliminated.

    Entries that do not touch each other are eliminated together, those with the fewest neighbours
    first: groups that share nothing take one level, a chain of :math:`T` entries
    :math:`\log_2 T` levels. Entries with many neighbours come last: one more level of entries that
    do not touch each other, and a dense core. So of two crossed factors the smaller is the core.

    A matrix is given by its values in slots: one for each entry of the diagonal, then one for each
    edge.

    Args:
        size: Rows of the matrix.
        edges: Pairs of different entries that touch, of shape ``(e, 2)``, each once.

    Attributes:
        levels: The levels, from the first.
        wide: What is left.
        core: The entries of the core, of shape ``(c,)``.

    Raises:
        ValueError: If the core has more than 2,048 entries.

    Reference:
        George, Liu, "The evolution of the minimum degree ordering algorithm", 1989,
        https://doi.org/10.1137/1031001

    Example:
        >>> chain = Elimination(100, torch.stack([torch.arange(99), torch.arange(1, 100)], -1))
        >>> [len(level.entries) for level in chain.levels], len(chain.wide.core)
        ([50, 25], 12)
    """

    def __init__(self, size: int, edges: Tensor) -> None:
        self.size, self.edges = size, edges
        graph = _Graph(size, edges.tolist())
        self.levels: list[Level] = []
        while chosen := graph.choose_few_neighbours():
            self.levels.append(graph.eliminate(chosen))
        self.wide = graph.finish()
        left = torch.arange(size)
        for level in self.levels:
            left = left[level.rest]
        self.core = left[self.wide.core]
        if len(self.wide.core) > LARGEST_CORE:
            raise ValueError(
                f"Expected at most {LARGEST_CORE} entries that have to be treated as a dense "
                f"matrix; got {len(self.wide.core)}."
            )


class _Graph:
    """What is left of a matrix: entries, their neighbours, and the slots of its values."""

    def __init__(self, size: int, edges: Iterable[Sequence[int]]) -> None:
        self.left = list(range(size))
        self.near: list[set[int]] = [set() for _ in range(size)]
        self.slots: dict[Pair, int] = {(i, i): i for i in range(size)}
        for i, j in edges:
            self.slots[_pair(i, j)] = len(self.slots)
            self.near[i].add(j)
            self.near[j].add(i)

    def choose_few_neighbours(self) -> list[int]:
        """Entries with the fewest neighbours that do not touch each other; empty if they are dear
        to eliminate in this way."""
        counts = sorted(len(self.near[i]) for i in self.left)
        if not counts or counts[0] > DEGREE or (counts[0] and len(counts) <= FEW):
            return []
        # The ends of a chain have the fewest; to take them alone would need a level for each entry.
        usual = counts[len(counts) // 4]
        return self._independent(limit=min(DEGREE, max(2 * counts[0], usual)))

    def eliminate(self, chosen: list[int]) -> Level:
        """Takes entries out, and lets the neighbours of each touch each other."""
        old, places = self.slots, self._places()
        near = [sorted(self.near[i]) for i in chosen]
        self._remove(chosen)
        self._number_slots(near)
        rest_places = self._places()
        width = max(map(len, near))
        here = [places[i] for i in chosen]
        rest = [places[i] for i in self.left]
        none, none_left = len(old), len(self.slots)
        links, neighbours, targets = [], [], []
        for entry, row in zip(chosen, near, strict=True):
            links.append(_padded([old[_pair(entry, i)] for i in row], width, none))
            neighbours.append(_padded([rest_places[i] for i in row], width, len(self.left)))
            targets.append([self.slots[pair] for pair in _pairs(row)])
        kept = [old.get(pair, none) for pair in self.slots]
        return Level(
            entries=_integers(here),
            rest=_integers(rest),
            order=_integers(here + rest).argsort(),
            pivots=_integers([old[i, i] for i in chosen]),
            neighbours=_integers(neighbours).reshape(len(chosen), width),
            links=_integers(links).reshape(len(chosen), width),
            kept=_integers([*kept, none]),
            targets=_spread(targets, [len(row) for row in near], width, none_left),
        )

    def finish(self) -> Wide:
        """What is left, at last."""
        wide = self._independent(limit=len(self.left))
        if 4 * len(wide) < len(self.left):
            wide = []  # a dense matrix of all of them is as good
        core = sorted(set(self.left).difference(wide))
        none, places = len(self.slots), self._places()
        links = [self.slots.get(_pair(i, j), none) for i in wide for j in core]
        inner = [self.slots.get(_pair(i, j), none) for i in core for j in core]
        here, there = [places[i] for i in wide], [places[i] for i in core]
        return Wide(
            entries=_integers(here),
            core=_integers(there),
            order=_integers(here + there).argsort(),
            pivots=_integers([self.slots[i, i] for i in wide]),
            links=_integers(links).reshape(len(wide), len(core)),
            slots=_integers(inner).reshape(len(core), len(core)),
        )

    def _independent(self, limit: int) -> list[int]:
        """Entries with at most so many neighbours that do not touch each other."""
        chosen, blocked = [], set[int]()
        for entry in sorted(self.left, key=lambda i: len(self.near[i])):
            if len(self.near[entry]) > limit:
                break
            if entry not in blocked:
                chosen.append(entry)
                blocked |= self.near[entry]
        return chosen

    def _remove(self, chosen: list[int]) -> None:
        for entry in chosen:
            for i in self.near[entry]:
                self.near[i] |= self.near[entry]
                self.near[i] -= {i, entry}
        gone = set(chosen)
        self.left = [i for i in self.left if i not in gone]

    def _number_slots(self, near: list[list[int]]) -> None:
        """Numbers the pairs that are left, those that come to touch at last."""
        left = set(self.left)
        kept = [pair for pair in self.slots if left.issuperset(pair)]
        self.slots = {pair: number for number, pair in enumerate(kept)}
        for row in near:
            for pair in _pairs(row):
                self.slots.setdefault(pair, len(self.slots))

    def _places(self) -> dict[int, int]:
        return {entry: place for place, entry in enumerate(self.left)}


def _pair(i: int, j: int) -> Pair:
    return (i, j) if i <= j else (j, i)


def _pairs(row: list[int]) -> Iterable[Pair]:
    """All pairs of sorted entries, those of an entry with itself too."""
    return itertools.combinations_with_replacement(row, 2)


def _padded(numbers: list[int], width: int, none: int) -> list[int]:
    return numbers + [none] * (width - len(numbers))


def _integers(numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long)


def _spread(targets: list[list[int]], counts: list[int], width: int, none: int) -> Tensor:
    """The targets of entries with fewer neighbours than the width, at the pairs of this width."""
    pairs = list(_pairs(list(range(width))))
    spread = torch.full((len(targets), len(pairs)), none)
    for count in set(counts):
        rows = _integers([k for k, own in enumerate(counts) if own == count])
        columns = _integers([k for k, pair in enumerate(pairs) if pair[1] < count])
        spread[rows.unsqueeze(-1), columns] = _integers([targets[k] for k in rows.tolist()])
    return spread
