"""The pattern and the values of a large sparse symmetric matrix, found by products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DENSE", "ManyTouch", "SymmetricEntries", "find_entries"]

Multiply = Callable[[Tensor], Tensor]

#: The most rows that are read by a product each.
DENSE = 1024
# A number is zero if it is so many times smaller than the largest of its row, or as so many times
# the noise of products.
NEGLIGIBLE, NOISE = 1e-10, 30.0
# Columns of a row are told apart by a mark: how far from a mark is none, in units of their spacing,
# and from the second mark.
SPACING, MARK = 0.02, 1e-6
# Tables for each column; buckets of the first table.
TABLES, BUCKETS = 3, 6
# The share of rows, inverted, that is few; rows for each bucket that are read by a product each.
FEW, READ = 8, 36


@dataclass(frozen=True)
class SymmetricEntries:
    """The entries of a sparse symmetric matrix, each pair once.

    Attributes:
        size: Rows of the matrix.
        rows: The smaller index of each entry, of shape ``(n,)``.
        columns: The larger index, of shape ``(n,)``.
        values: The values, of shape ``(n,)``.
    """

    size: int
    rows: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def empty(cls, like: Tensor, size: int) -> SymmetricEntries:
        """No entries, in the dtype and on the device of a tensor."""
        nothing = torch.zeros(0, dtype=torch.long, device=like.device)
        return cls(size, nothing, nothing, like.new_zeros(0))

    def multiply(self, directions: Tensor) -> Tensor:
        """The products with vectors.

        Args:
            directions: Vectors of shape ``(k, size)``.

        Returns:
            Tensor of shape ``(k, size)``.
        """
        off = self.rows != self.columns
        i, j, v = self.rows, self.columns, self.values
        products = torch.zeros_like(directions).index_add(1, i, v * directions[:, j])
        return products.index_add(1, j[off], v[off] * directions[:, i[off]])

    def joined(self, rows: Tensor, columns: Tensor, values: Tensor) -> SymmetricEntries:
        """These entries and new ones, given in any order and maybe twice; the first is kept."""
        low, high = torch.minimum(rows, columns), torch.maximum(rows, columns)
        keys = torch.cat([self.rows, low]) * self.size + torch.cat([self.columns, high])
        keys, order = keys.sort(stable=True)
        first = torch.cat([torch.ones_like(keys[:1], dtype=torch.bool), keys[1:] != keys[:-1]])
        keys, values = keys[first], torch.cat([self.values, values])[order[first]]
        return SymmetricEntries(self.size, keys // self.size, keys % self.size, values)

    def block(self, places: Tensor) -> Tensor:
        """The dense matrix of some rows and their columns, of shape ``(n, n)``."""
        within = torch.full((self.size,), -1, device=places.device)
        within[places] = torch.arange(len(places), device=places.device)
        i, j = within[self.rows], within[self.columns]
        inside = (i >= 0) & (j >= 0)
        i, j, values = i[inside], j[inside], self.values[inside]
        matrix = values.new_zeros(len(places), len(places))
        matrix[i, j] = matrix[j, i] = values
        return matrix

    def without(self, touched: Tensor) -> SymmetricEntries:
        """The entries in none of some rows, which a mask of shape ``(size,)`` marks."""
        kept = ~(touched[self.rows] | touched[self.columns])
        return SymmetricEntries(self.size, self.rows[kept], self.columns[kept], self.values[kept])


class ManyTouch(ValueError):
    """The rows of a matrix do not come apart."""


def find_entries(
    multiply: Multiply, like: Tensor, generator: torch.Generator, most: int = 2 * DENSE
) -> SymmetricEntries:
    r"""Finds the entries of an unknown sparse symmetric matrix by products with few vectors.

    Columns :math:`j` are put at random into buckets, and each bucket :math:`b` is asked by three
    vectors with the entries :math:`a_j, a_j c_j, a_j d_j` of its columns. A row in which the bucket
    meets one unknown entry tells which by the ratio :math:`c_j`, and that it is alone by
    :math:`d_j`. What has been found is subtracted, in both rows that share it, and leaves others
    alone. So rows with many entries are found through those with few, and the number of products
    does not grow with the size. Rows that do not come apart, such as those of a dense block, are
    read by a product each.

    Args:
        multiply: From vectors of shape ``(k, size)`` to their products with the matrix.
        like: A tensor of shape ``(size,)`` and of the dtype of the products, which has to be a
            double for a size above a few hundred.
        generator: Random numbers.
        most: Rows that do not come apart by so many products at once are given up.

    Returns:
        The entries that are not negligible beside the largest of their row.

    Raises:
        ManyTouch: If more than 1,024 rows do not come apart.

    Reference:
        Goodrich, Mitzenmacher, "Invertible Bloom lookup tables", 2011,
        https://arxiv.org/abs/1101.2245

    Example:
        >>> matrix = torch.diag_embed(torch.ones(400).double()).roll(1, 0)
        >>> found = find_entries(lambda v: v @ (matrix + matrix.T), matrix[0], torch.Generator())
        >>> len(found.values), found.rows[:3], found.columns[:3]
        (400, tensor([0, 0, 1]), tensor([  1, 399,   2]))
    """
    entries, buckets, before = SymmetricEntries.empty(like, len(like)), BUCKETS, len(like)
    negligible = max(NEGLIGIBLE, NOISE * _noise(multiply, like, generator))
    while True:
        if 3 * TABLES * buckets >= len(like) and len(like) <= DENSE:
            every = torch.ones(len(like), dtype=torch.bool, device=like.device)
            return _read_rows(multiply, like, entries, every, negligible)
        table = _Table(like, buckets, generator)
        products = multiply(table.directions())
        entries, left = table.decode(products, entries, negligible)
        many = int(left.sum())
        if not many:
            return entries
        # The rows that a table leaves by chance need another one; those that it cannot take apart, a
        # larger one.
        buckets *= 1 if many <= before // FEW else 2
        before = many
        # More products may help; when they cost about as much, each row is read by one.
        if many <= min(DENSE, READ * buckets):
            return _read_rows(multiply, like, entries, left, negligible)
        if 3 * TABLES * buckets > most:
            raise ManyTouch(
                f"Expected a model whose latent entries touch few others each, or at most {DENSE} "
                f"that touch many; got {many} entries that touch many."
            )


class _Table:
    """Random buckets for columns, and the vectors that ask them.

    Args:
        like: A tensor of shape ``(size,)``.
        buckets: Buckets in each of three tables.
        generator: Random numbers.
    """

    def __init__(self, like: Tensor, buckets: int, generator: torch.Generator) -> None:
        size = len(like)

        def uniform() -> Tensor:
            return torch.rand(size, generator=generator, dtype=torch.double).to(like)

        self.size, self.buckets = size, buckets
        tables = torch.randint(buckets, (TABLES, size), generator=generator)
        offsets = buckets * torch.arange(TABLES).unsqueeze(-1)
        self.buckets_of = (tables + offsets).to(like.device)  # (tables, size)
        places = torch.randperm(size, generator=generator).to(like.device)
        self.column_at = torch.empty_like(places)
        self.column_at[places] = torch.arange(size, device=like.device)
        weights, second = 1 + uniform(), 1 + uniform()
        first = 1 + places / size
        self.vectors = weights * torch.stack([torch.ones_like(first), first, second])
        self.weights, self.second = weights, second

    def directions(self) -> Tensor:
        """The vectors, three for each bucket, of shape ``(3 * tables * buckets, size)``."""
        numbers = torch.arange(TABLES * self.buckets, device=self.weights.device)
        inside = (self.buckets_of.unsqueeze(0) == numbers[:, None, None]).any(1)
        return (inside.unsqueeze(1) * self.vectors).flatten(0, 1)

    def decode(
        self, products: Tensor, known: SymmetricEntries, negligible: float
    ) -> tuple[SymmetricEntries, Tensor]:
        """The entries known and found, and which rows have others, of shape ``(size,)``."""
        by_vector = products.reshape(-1, 3, self.size).transpose(0, 1)
        residual = by_vector.reshape(3, -1).clone()  # (vectors, buckets * size)
        # Rounding is relative to all that is subtracted.
        scale = negligible * products.abs().amax(0)
        self._subtract(residual, known)
        while True:
            grown = known.joined(*self._alone(residual, scale))
            if len(grown.values) == len(known.values):
                left = residual.abs().reshape(-1, self.size).amax(0) > scale
                return known, left
            self._subtract(residual, _difference(grown, known))
            known = grown

    def _alone(self, residual: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values of entries that a bucket meets alone in a row."""
        places = (residual[0].abs().reshape(-1, self.size) > scale).flatten().nonzero().squeeze(-1)
        bucket, row = places // self.size, places % self.size
        value, first, second = residual[:, places]
        mark = (first / value - 1) * self.size
        nearest = mark.round().clamp(0, self.size - 1)
        column = self.column_at[nearest.long()]
        alone = (mark - nearest).abs() < SPACING
        alone &= (second / value - self.second[column]).abs() < MARK
        alone &= (self.buckets_of[:, column] == bucket).any(0)
        row, column, value = row[alone], column[alone], value[alone]
        return row, column, value / self.weights[column]

    def _subtract(self, residual: Tensor, entries: SymmetricEntries) -> None:
        i, j, v = entries.rows, entries.columns, entries.values
        off = i != j
        rows, columns = torch.cat([i, j[off]]), torch.cat([j, i[off]])
        change = -torch.cat([v, v[off]]) * self.vectors[:, columns]
        for buckets in self.buckets_of:
            residual.index_add_(1, buckets[columns] * self.size + rows, change)


def _noise(multiply: Multiply, like: Tensor, generator: torch.Generator) -> float:
    """How far products are from linear, because they are rounded, relative to their sizes."""
    one, other = torch.randn(2, len(like), generator=generator, dtype=torch.double).to(like)
    products = multiply(torch.stack([one, other, one + other]))
    error = (products[0] + products[1] - products[2]).abs()
    return float((error / products.abs().amax(0)).nan_to_num(0).amax()) if len(like) else 0.0


def _difference(grown: SymmetricEntries, known: SymmetricEntries) -> SymmetricEntries:
    """The entries of the first that the second does not have."""
    keys = grown.rows * grown.size + grown.columns
    new = ~torch.isin(keys, known.rows * known.size + known.columns)
    return SymmetricEntries(grown.size, grown.rows[new], grown.columns[new], grown.values[new])


def _read_rows(
    multiply: Multiply, like: Tensor, entries: SymmetricEntries, chosen: Tensor, negligible: float
) -> SymmetricEntries:
    """The entries with some rows, marked by a mask, read anew by a product each."""
    numbers = chosen.nonzero().squeeze(-1)
    directions = like.new_zeros(len(numbers), len(like))
    directions[torch.arange(len(numbers), device=like.device), numbers] = 1
    read = multiply(directions)
    largest = read.abs().amax(-1, keepdim=True)
    i, column = (read.abs() > negligible * largest).nonzero().unbind(-1)
    return entries.without(chosen).joined(numbers[i], column, read[i, column])
