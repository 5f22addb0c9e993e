"""Matrices read from their products with few vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyroflows.model.colouring import Colouring


def random_edges(size: int, count: int) -> Tensor:
    pairs = torch.triu_indices(size, size, 1).mT
    return pairs[torch.randperm(len(pairs))[:count]]


@pytest.mark.parametrize(
    ("size", "count"), [(0, 0), (6, 0), (12, 15), (40, 60), (40, 400), (9, 36)]
)
def test_every_entry_is_read(size: int, count: int) -> None:
    edges = random_edges(size, count)
    i, j = edges.unbind(-1)
    values = torch.randn(2, size + count, dtype=torch.double)
    matrix = torch.diag_embed(values[:, :size])
    matrix[:, i, j] = matrix[:, j, i] = values[:, size:]
    colouring = Colouring(size, edges)
    assert torch.equal(colouring.read(colouring.directions @ matrix), values)


def test_colours_are_few() -> None:
    chain = torch.stack([torch.arange(99), torch.arange(1, 100)], -1)
    crossed = torch.cartesian_prod(torch.arange(30), 30 + torch.arange(7))
    assert Colouring(100, chain[:0]).count == 1
    assert Colouring(100, chain).count == 3
    assert Colouring(37, crossed).count == 8
