"""Affine maps and roots of low rank, whose cost is linear in the number of entries."""

import pytest
import torch
from torch import Tensor

from pyroflows.transforms import roots
from pyroflows.transforms.low_rank import RANK, LowRankAffine, LowRankRoot

N = 80


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_root(*batch: int) -> LowRankRoot:
    basis = torch.linalg.qr(numbers(*batch, N, 5)).Q
    return LowRankRoot(numbers(*batch, N).exp(), basis, numbers(*batch, 5, seed=1).exp())


def matrix_of(root: LowRankRoot) -> Tensor:
    return root.multiply(torch.eye(N, dtype=torch.float64)).mT


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_root_is_a_matrix(batch: tuple[int, ...]) -> None:
    root = make_root(*batch)
    matrix, x = matrix_of(root), numbers(*batch, 4, N, seed=2)
    for given in (root, matrix):
        torch.testing.assert_close(roots.multiply_root(given, x), x @ matrix.mT)
        torch.testing.assert_close(roots.multiply_transposed(given, x), x @ matrix)
        torch.testing.assert_close(roots.log_det(given), torch.linalg.slogdet(matrix)[1])
    torch.testing.assert_close(root.solve(x @ matrix.mT), x)


def test_its_triangle_is_a_root_of_the_same_covariance() -> None:
    root = make_root()
    matrix, lower = matrix_of(root), root.triangle()
    torch.testing.assert_close(lower @ lower.mT, matrix @ matrix.mT)
    torch.testing.assert_close(lower, lower.tril())


def test_roots_are_picked_and_joined() -> None:
    root = make_root(3)
    again = roots.join_roots([root.pick(torch.tensor([0])), root.pick(torch.tensor([1, 2]))])
    assert all(torch.equal(one, other) for one, other in zip(root, again, strict=True))
    assert roots.is_finite(root).all()
    assert not roots.is_finite(root._replace(scale=root.scale * torch.inf)).any()


def test_principal_factors_of_a_covariance_are_found() -> None:
    widths = numbers(N).exp().unsqueeze(-1)
    factor = widths * torch.cat([3 * numbers(N, 4, seed=1), torch.eye(N).double()], -1)
    root = LowRankRoot.of_factor(factor)
    relative = root.solve(factor.mT).mT
    spread = torch.linalg.svdvals(relative)
    assert bool(((spread > 0.9) & (spread < 1.1)).all())


def test_of_few_draws_noise_is_not_taken_for_a_factor() -> None:
    factor = torch.randn(N, 200, generator=torch.Generator().manual_seed(0)) / 200**0.5
    root = LowRankRoot.of_factor(factor, least=(1 + (N / 200) ** 0.5) ** 2)
    assert bool((root.stretch == 1).all())


def test_fewer_columns_than_directions_will_do() -> None:
    root = LowRankRoot.of_factor(numbers(N, 2))
    assert root.basis.shape == (N, RANK)
    assert bool(roots.is_finite(LowRankRoot(*(part.unsqueeze(0) for part in root))).all())


def moved_affine() -> LowRankAffine:
    t = LowRankAffine(N).double()
    t.set(numbers(N), LowRankRoot.of_factor(numbers(N, 200)))
    with torch.no_grad():
        for parameter in t.parameters():
            parameter.add_(0.05 * numbers(*parameter.shape, seed=3))
    return t


def test_the_affine_map_is_inverted_and_has_its_determinant(device: torch.device) -> None:
    t, x = moved_affine().to(device), numbers(3, N, seed=4).to(device)
    y, log_det = t.forward_and_log_det(x)
    back, inverse_log_det = t.inverse_and_log_det(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)
    jacobian = torch.autograd.functional.jacobian(lambda v: t(v), x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[0])
    score = numbers(3, N, seed=5).to(device)
    torch.testing.assert_close(t.push_score(x, score)[2] @ jacobian, score)


def test_centred_it_is_the_same_map() -> None:
    t, x = moved_affine(), numbers(3, N, seed=4)
    before = t(x)
    t.centre()
    torch.testing.assert_close(t(x), before)
    assert not t.offset.any()


def test_nothing_of_the_square_of_the_entries_is_made() -> None:
    t = LowRankAffine(200_000)
    t.set(torch.zeros(200_000), LowRankRoot.diagonal(torch.ones(200_000)))
    assert t(torch.ones(1, 200_000)).shape == (1, 200_000)
