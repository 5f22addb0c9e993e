"""Trees of eliminations against the dependence of draws on their noise."""

from __future__ import annotations

import pytest
import torch
from test_sparse_normal import PATTERNS, random_values

from pyroflows.distributions.elimination import Elimination
from pyroflows.distributions.elimination_tree import find_elimination_tree
from pyroflows.distributions.sparse_normal import SparseNormal


@pytest.mark.parametrize("name", PATTERNS)
def test_draws_depend_on_the_noise_of_ancestors(name: str) -> None:
    size, edges = PATTERNS[name]()
    elimination = Elimination(size, edges)
    tree = find_elimination_tree(elimination)
    assert sorted(torch.cat([torch.zeros(0), *tree.levels]).tolist()) == list(range(size))
    parent = torch.full((size,), -1)
    for depth in range(1, tree.depth):
        parent[tree.levels[depth]] = tree.levels[depth - 1][tree.parents[depth]]
    ancestors = torch.eye(size, dtype=torch.bool)
    for depth in range(1, tree.depth):
        own = tree.levels[depth]
        ancestors[own] |= ancestors[parent[own]]
    normal = SparseNormal(elimination, random_values(size, edges, 1)[0])
    depends = normal.draw_centred(torch.eye(size).double()).mT != 0
    assert not (depends & ~ancestors).any()
    assert (tree.depths[parent >= 0] == tree.depths[parent[parent >= 0]] + 1).all()
