"""Outliers are told from the tails of their sample, whatever its kind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyroflows._outliers import bounded, few, list_rows, outlying, tail_end


def uniform(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator, dtype=torch.float64)


def normal(n: int) -> Tensor:
    return torch.special.ndtri(uniform(n))


SAMPLES = {
    "normal": normal(3000),
    "few": normal(30),
    "uniform": uniform(3000),
    "Student, two degrees of freedom": normal(3000) / (-uniform(3000, 1).log()).sqrt(),
    "log-normal": (2 * normal(3000)).exp(),
    "mostly zero": (uniform(3000) < 0.01).double(),
    "rare counts": (-uniform(3000).log() * 0.5).floor(),
    "two far groups": normal(3000) + 1e4 * (uniform(3000, 1) < 0.05),
    "huge": 1e30 * normal(3000),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_an_honest_sample_has_no_outliers(name: str) -> None:
    assert not bool(outlying(SAMPLES[name].unsqueeze(-1)).any())


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "two far groups"])
@pytest.mark.parametrize("size", [1e6, -1e6, math.inf])
def test_a_number_far_beyond_the_tail_is_an_outlier(name: str, size: float) -> None:
    sample = SAMPLES[name].clone()
    sample[7] = size * (1 + sample.abs().max())
    assert outlying(sample.unsqueeze(-1)).nonzero().tolist() == [[7, 0]]


def test_a_percent_may_be_outliers_and_more_are_part_of_the_sample() -> None:
    sample = normal(1000)
    sample[:10] = 1e3
    assert outlying(sample.unsqueeze(-1)).sum() == few(1000) == 10
    sample[10] = 1e3
    assert not bool(outlying(sample.unsqueeze(-1)).any())


def test_a_constant_and_a_handful_have_no_tail() -> None:
    assert tail_end(torch.zeros(100)) == tail_end(torch.ones(19)) == math.inf
    assert tail_end(torch.ones(100)) == 5.0
    assert tail_end(torch.logspace(-300, 300, 10_000, dtype=torch.float64)) == math.inf


def test_only_the_lowest_are_bounded() -> None:
    values = torch.tensor([-2.0, -1e4, -1.0, -3.0, -1.5])
    assert bounded(values, 20.0).tolist() == [-2.0, -22.0, -1.0, -3.0, -1.5]
    assert bounded(torch.tensor([-math.inf, -1.0]), 20.0).tolist() == [-21.0, -1.0]
    # More than a few are no outliers.
    low = torch.tensor([-1e4, -2e4, 0.0, 0.0, 0.0])
    assert bounded(low, 20.0).tolist() == [-1e4, -1e4, 0.0, 0.0, 0.0]
    assert torch.equal(bounded(low, math.inf), low)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([3], "row 3"),
        ([3, 5], "rows 3 and 5"),
        ([3, 5, 8], "rows 3, 5 and 8"),
        ([0, 1, 2, 3, 4, 5, 6], "rows 0, 1, 2, 3, 4 and 2 more"),
    ],
)
def test_rows_are_listed(rows: list[int], told: str) -> None:
    assert list_rows(torch.tensor(rows)) == told
