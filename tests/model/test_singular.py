"""Factorisations of a batch in which some matrices have none: NaN for these, the others unharmed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

from pyroflows._compat import make_fx
from pyroflows.model.singular import NanWhereSingular, survives_failure

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


@pytest.mark.parametrize(
    ("name", "dtype"),
    zip(FACTORISATIONS, itertools.cycle([torch.float32, torch.float64]), strict=False),
)
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


def or_unit(matrix: Tensor) -> Tensor:
    try:
        return linalg.cholesky(matrix)
    except RuntimeError:
        return torch.eye(3)


def with_jitter(matrix: Tensor) -> Tensor:
    jitter = 0.0
    while True:
        try:
            return linalg.cholesky(matrix + jitter * torch.eye(3))
        except torch.linalg.LinAlgError:
            jitter = max(10 * jitter, 1e-6)


def in_vain(matrix: Tensor) -> Tensor:
    try:
        return linalg.cholesky(matrix)
    except RuntimeError as error:
        raise ValueError("no covariance") from error


def in_steps(matrix: Tensor) -> Tensor:
    for _ in range(50):
        matrix = linalg.inv(matrix)
    return linalg.cholesky(matrix)


def suppressed(matrix: Tensor) -> Tensor:
    with contextlib.suppress(RuntimeError):
        return linalg.eigvalsh(matrix)
    return torch.zeros(3)


SURVIVING: dict[str, Callable[[Tensor], Any]] = {
    "another factor": or_unit,
    "jitter": with_jitter,
    "after others": lambda a: or_unit(in_steps(a)),
    "eigenvalues": suppressed,
}
ENDING: dict[str, Callable[[Tensor], Any]] = {
    "no try": linalg.cholesky,
    "another error": in_vain,
    "a loop": in_steps,
    "no factorisation": torch.trace,
    "info": lambda a: linalg.cholesky_ex(a).L,
}


@pytest.mark.parametrize("name", SURVIVING)
def test_a_function_that_catches_its_own_error_is_found(name: str) -> None:
    assert survives_failure(lambda: SURVIVING[name](REGULAR))


@pytest.mark.parametrize("name", ENDING)
def test_a_function_that_ends_with_the_error_is_not(name: str) -> None:
    assert not survives_failure(lambda: ENDING[name](REGULAR))


def test_factorisations_called_from_one_place_fail_once() -> None:
    runs = []
    assert not survives_failure(lambda: (runs.append(1), in_steps(REGULAR)))
    assert len(runs) == 3
