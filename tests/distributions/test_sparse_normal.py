"""Normals with sparse precisions against dense algebra."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyroflows.distributions.elimination import Elimination
from pyroflows.distributions.sparse_normal import SparseNormal


def chain(size: int) -> tuple[int, Tensor]:
    return size, torch.stack([torch.arange(size - 1), torch.arange(1, size)], -1)


def crossed(first: int, second: int, cells: int) -> tuple[int, Tensor]:
    chosen = torch.randperm(first * second)[:cells]
    return first + second, torch.stack([chosen // second, first + chosen % second], -1)


def second_order(size: int) -> tuple[int, Tensor]:
    second = torch.stack([torch.arange(size - 2), torch.arange(2, size)], -1)
    return size, torch.cat([chain(size)[1], second])


def tree(schools: int, classes: int, pupils: int) -> tuple[int, Tensor]:
    of_class = torch.arange(schools * classes) // classes
    of_pupil = schools + torch.arange(schools * classes * pupils) // pupils
    parents = torch.cat([of_class, of_pupil])
    children = schools + torch.arange(len(parents))
    return schools + len(parents), torch.stack([parents, children], -1)


def grid(side: int) -> tuple[int, Tensor]:
    places = torch.arange(side * side).reshape(side, side)
    right = torch.stack([places[:, :-1], places[:, 1:]], -1).reshape(-1, 2)
    down = torch.stack([places[:-1], places[1:]], -1).reshape(-1, 2)
    return side * side, torch.cat([right, down])


PATTERNS: dict[str, Callable[[], tuple[int, Tensor]]] = {
    "nothing": lambda: (0, torch.zeros(0, 2, dtype=torch.long)),
    "one": lambda: (1, torch.zeros(0, 2, dtype=torch.long)),
    "groups": lambda: (50, torch.zeros(0, 2, dtype=torch.long)),
    "pairs": lambda: (80, torch.arange(80).reshape(40, 2)),
    "short chain": lambda: chain(7),
    "chain": lambda: chain(101),
    "second order": lambda: second_order(90),
    "crossed": lambda: crossed(60, 20, 400),
    "thinly crossed": lambda: crossed(60, 20, 150),
    "tree": lambda: tree(4, 5, 6),
    "grid": lambda: grid(12),
    "dense": lambda: (40, torch.triu_indices(40, 40, 1).mT),
}


@pytest.fixture(params=PATTERNS)
def pattern(request: pytest.FixtureRequest) -> tuple[int, Tensor]:
    return PATTERNS[request.param]()


def random_values(size: int, edges: Tensor, count: int = 3) -> Tensor:
    """Values of diagonally dominant matrices."""
    links = torch.rand(count, len(edges), dtype=torch.double) - 0.6
    diagonal = 0.5 + torch.rand(count, size, dtype=torch.double)
    for end in edges.unbind(-1):
        diagonal = diagonal.index_add(-1, end, links.abs())
    return torch.cat([diagonal, links], -1)


def dense(size: int, edges: Tensor, values: Tensor) -> Tensor:
    i, j = edges.unbind(-1)
    matrix = torch.diag_embed(values[..., :size])
    matrix[..., i, j] = matrix[..., j, i] = values[..., size:]
    return matrix


def test_dense_algebra(pattern: tuple[int, Tensor]) -> None:
    size, edges = pattern
    values = random_values(size, edges)
    matrix = dense(size, edges, values)
    normal = SparseNormal(Elimination(size, edges), values)
    h = torch.randn(3, size, dtype=torch.double)
    mean = normal.solve(h)
    torch.testing.assert_close(normal.log_det, torch.linalg.slogdet(matrix).logabsdet)
    torch.testing.assert_close(mean, torch.linalg.solve(matrix, h))
    units = torch.eye(size, dtype=torch.double).unsqueeze(1).expand(size, 3, size)
    root = normal.draw_centred(units).permute(1, 2, 0)
    torch.testing.assert_close(root @ root.mT, torch.linalg.inv(matrix))
    torch.testing.assert_close(normal.draw_centred(normal.whiten(h)), h)
    if size:
        exact = torch.distributions.MultivariateNormal(mean, precision_matrix=matrix)
        torch.testing.assert_close(normal.log_prob(h, mean), exact.log_prob(h))


def test_gradients(pattern: tuple[int, Tensor]) -> None:
    size, edges = pattern
    values = random_values(size, edges).requires_grad_()
    h = torch.randn(3, size, dtype=torch.double, requires_grad=True)

    def total(log_det: Tensor, solved: Tensor) -> Tensor:
        return log_det.sum() + solved.square().sum()

    normal = SparseNormal(Elimination(size, edges), values)
    found = torch.autograd.grad(total(normal.log_det, normal.solve(h)), (values, h))
    matrix = dense(size, edges, values)
    exact = total(torch.logdet(matrix), torch.linalg.solve(matrix, h))
    torch.testing.assert_close(found, torch.autograd.grad(exact, (values, h)))


def test_the_density_of_a_draw_is_that_of_its_noise(pattern: tuple[int, Tensor]) -> None:
    size, edges = pattern
    values = random_values(size, edges).requires_grad_()
    noise = torch.randn(3, size, dtype=torch.double)
    normal = SparseNormal(Elimination(size, edges), values)
    whitened = normal.whiten(normal.draw_centred(noise))
    torch.testing.assert_close(whitened, noise)
    (slope,) = torch.autograd.grad(whitened.square().sum(), values)
    torch.testing.assert_close(slope, torch.zeros_like(slope))


def test_slopes_are_pulled_back_to_the_noise(pattern: tuple[int, Tensor]) -> None:
    size, edges = pattern
    normal = SparseNormal(Elimination(size, edges), random_values(size, edges))
    noise, slope = torch.randn(2, 3, size).double()
    found = (normal.pull_back(slope) * noise).sum(-1)
    torch.testing.assert_close(found, (slope * normal.draw_centred(noise)).sum(-1))


def test_a_chain_takes_a_logarithm_of_levels() -> None:
    size, edges = chain(1000)
    elimination = Elimination(size, edges)
    assert len(elimination.levels) <= math.ceil(math.log2(1000))
    assert len(elimination.wide.core) <= 32
    values = torch.cat([torch.full((size,), 2.5), torch.full((size - 1,), -1.0)]).double()
    # The determinant of a tridiagonal Toeplitz matrix of size n is U_n(a / 2).
    root = (2.5**2 - 4) ** 0.5
    larger = (2.5 + root) / 2
    exact = (size + 1) * math.log(larger) - math.log(root)
    assert SparseNormal(elimination, values).log_det.item() == pytest.approx(exact, rel=1e-12)


def test_a_chain_of_second_order_takes_few_levels() -> None:
    assert len(Elimination(*second_order(1000)).levels) <= 2 * math.log2(1000)


def test_of_crossed_factors_the_smaller_is_the_core() -> None:
    elimination = Elimination(*crossed(60, 20, 1200))
    assert not elimination.levels
    assert elimination.wide.core.tolist() == list(range(60, 80))


def test_groups_take_one_level() -> None:
    elimination = Elimination(4000, torch.zeros(0, 2, dtype=torch.long))
    assert [len(level.entries) for level in elimination.levels] == [4000]
    assert len(elimination.wide.core) == 0


def test_what_is_not_positive_definite_gives_nan_to_itself_only() -> None:
    for size, edges in (chain(50), crossed(20, 10, 180)):
        values = random_values(size, edges)
        values[1, : size // 2] = -1.0
        normal = SparseNormal(Elimination(size, edges), values)
        assert normal.log_det.isnan().tolist() == [False, True, False]


def test_a_repaired_precision_is_positive_definite(pattern: tuple[int, Tensor]) -> None:
    size, edges = pattern
    values = random_values(size, edges)
    elimination = Elimination(size, edges)
    exact = SparseNormal(elimination, values).log_det
    torch.testing.assert_close(SparseNormal(elimination, values, repaired=True).log_det, exact)
    values[1] = torch.randn(size + len(edges), dtype=torch.double)
    repaired = SparseNormal(elimination, values, repaired=True)
    gradient = torch.randn(3, size, dtype=torch.double)
    assert repaired.log_det.isfinite().all()
    assert ((gradient * repaired.solve(gradient)).sum(-1) > 0).all() or size == 0


def test_too_large_a_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyroflows.distributions.elimination.LARGEST_CORE", 20)
    with pytest.raises(ValueError, match=r"at most 20 entries .*; got 21"):
        Elimination(21, torch.triu_indices(21, 21, 1).mT)
