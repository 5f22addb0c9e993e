"""Factorisations of a batch in which some matrices have none: NaN for these, the others unharmed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

from pyroflows._compat import make_fx
from pyroflows.model.singular import NanWhereSingular

linalg = torch.linalg
REGULAR = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 1.5]])
ZERO = torch.zeros(3, 3)
NEGATIVE = -torch.eye(3)
NAN = torch.full((3, 3), torch.nan)
INFINITE = torch.full((3, 3), torch.inf)


def ones(a: Tensor) -> Tensor:
    return torch.ones(3, dtype=a.dtype)


def of_precision(a: Tensor) -> Tensor:
    return MultivariateNormal(ones(a), precision_matrix=a, validate_args=False).log_prob(
        2 * ones(a)
    )


def of_low_rank(a: Tensor) -> Tensor:
    diagonal = a.diagonal()
    return LowRankMultivariateNormal(ones(a), a, diagonal, validate_args=False).log_prob(ones(a))


FACTORISATIONS: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "linalg.cholesky": (linalg.cholesky, NEGATIVE),
    "upper": (lambda a: linalg.cholesky(a, upper=True), ZERO),
    "cholesky": (torch.cholesky, NEGATIVE),
    "Tensor.cholesky": (lambda a: a.cholesky(), NAN),
    "linalg.inv": (linalg.inv, ZERO),
    "inverse": (torch.inverse, ZERO),
    "matrix_power": (lambda a: linalg.matrix_power(a, -2), ZERO),
    "solve": (lambda a: linalg.solve(a, ones(a).diag()), ZERO),
    "solve from the right": (lambda a: linalg.solve(a, ones(a).diag(), left=False), ZERO),
    "solve a vector": (lambda a: linalg.solve(a, ones(a)), ZERO),
    "lu_factor": (lambda a: linalg.lu_factor(a)[0], ZERO),
    "cholesky_inverse": (torch.cholesky_inverse, ZERO),
    "eigh": (linalg.eigh, NAN),
    "eigvalsh": (linalg.eigvalsh, INFINITE),
    "eigvals": (lambda a: linalg.eigvals(a).abs(), NAN),
    "svd": (linalg.svdvals, NAN),
    "nuclear norm": (lambda a: linalg.matrix_norm(a, "nuc"), INFINITE),
    "pinv": (linalg.pinv, NAN),
    "pinv of a symmetric matrix": (lambda a: linalg.pinv(a, hermitian=True), INFINITE),
    "precision matrix": (of_precision, NEGATIVE),
    "low rank": (of_low_rank, NAN),
}


def total(factorise: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def of_matrix(matrix: Tensor) -> Tensor:
        found = factorise(matrix)
        parts = (found,) if isinstance(found, Tensor) else tuple(found)
        return torch.stack([part.sum() for part in parts]).sum()

    return of_matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FACTORISATIONS)
@pytest.mark.filterwarnings("ignore:torch.cholesky is deprecated")
def test_a_matrix_that_cannot_be_factorised_harms_no_other(name: str, dtype: torch.dtype) -> None:
    factorise, bad = FACTORISATIONS[name]
    value_and_slope = torch.func.vmap(torch.func.grad_and_value(total(factorise)))

    def run(matrices: Tensor) -> tuple[Tensor, Tensor]:
        with NanWhereSingular():
            return value_and_slope(matrices)

    sound = torch.stack([REGULAR, 1.5 * REGULAR, 2 * REGULAR]).to(dtype)
    mixed = torch.stack([REGULAR, bad, 2 * REGULAR]).to(dtype)
    expected_slope, expected = value_and_slope(sound)
    for evaluate in (run, make_fx(run)(sound)):
        slope, value = evaluate(mixed)
        assert torch.equal(value[::2], expected[::2])
        assert torch.equal(slope[::2], expected_slope[::2])
        assert not bool(value[1].isfinite())


def test_gradients_factorise_too() -> None:
    def spread(matrix: Tensor) -> Tensor:
        return linalg.eig(matrix).eigenvectors.abs().sum()

    defective = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    matrices = torch.stack([torch.tensor([[1.0, 0.3], [0.2, 2.0]]), defective])
    with NanWhereSingular():
        slope, _ = torch.func.vmap(torch.func.grad_and_value(spread))(matrices)
    assert bool(slope[0].isfinite().all())
