"""A few outlying rows steer no maximum-likelihood fit, and are named; arrays of numpy are data."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.nn import mlp
from pyroflows.train import DensityReport, fit_density
from pyroflows.transforms import Standardize

FAR = torch.tensor([100.0, -100.0])


def banana(n: int, seed: int = 0) -> Tensor:
    u, v = torch.randn(2, n, generator=torch.Generator().manual_seed(seed))
    return torch.stack([u, 0.5 * (u.square() + v)], -1)


def with_rows(x: Tensor, value: Any, *rows: int) -> Tensor:
    x = x.clone()
    x[list(rows)] = value
    return x


def made(**options: Any) -> pf.Flow:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pf.RealNVP(2, transforms=2, network=mlp((16,)), **options)


def fitted(x: Any, validation: Any, flow: pf.Flow | None = None) -> tuple[float, DensityReport]:
    """The log-likelihood of new rows, and the report."""
    flow = made() if flow is None else flow
    options: dict[str, Any] = {"max_epochs": 4, "batch_size": 64, "learning_rate": 1e-2}
    report = fit_density(flow, x, validation=validation, progress=False, **options)
    with torch.no_grad():
        return float(flow().log_prob(banana(2000, seed=2)).mean()), report


def test_clean_rows_are_worth_no_word(recwarn: pytest.WarningsRecorder) -> None:
    found, report = fitted(banana(1000), banana(200, seed=1))
    assert not recwarn.list
    assert found > report.validation[0] + 0.2 and report.train_size == 1000


@pytest.mark.parametrize(
    ("value", "standardize"), [(FAR, False), (30.0, True), (1e4, False), (1e20, True)]
)
def test_an_outlying_row_costs_training_nothing(value: Any, standardize: bool) -> None:
    x, held_out = banana(1000), banana(200, seed=1)
    clean, _ = fitted(x, held_out, made(standardize=standardize))
    with pytest.warns(UserWarning, match="Training leaves out row 7 of x, because") as warned:
        found, report = fitted(with_rows(x, value, 7), held_out, made(standardize=standardize))
    assert found == pytest.approx(clean, abs=0.05) and report.train_size == 999
    assert len(warned) == 1 and warned[0].filename == __file__


@pytest.mark.parametrize("value", [FAR, 1e4, 1e20])
def test_an_outlying_row_held_out_does_not_end_training(value: Any) -> None:
    x, held_out = banana(1000), banana(200, seed=1)
    clean, expected = fitted(x, held_out)
    with pytest.warns(UserWarning, match="counted row 5 of validation as .* below the median"):
        found, report = fitted(x, with_rows(held_out, value, 5))
    assert found == pytest.approx(clean, abs=0.05)
    assert report.best_epoch == expected.best_epoch
    # The report has the plain mean.
    assert report.log_likelihood < expected.log_likelihood - 10.0


def test_rows_are_numbered_as_they_were_given() -> None:
    rows = [3, 50, 400, 777, 900, 999]
    with pytest.warns(UserWarning, match=r"rows? .* of x") as warned:
        fitted(with_rows(banana(1000), FAR, *rows), 0.4)
    told = " ".join(str(warning.message) for warning in warned)
    assert {int(number) for number in re.findall(r"\b\d+\b(?! nats)", told)} >= set(rows)
    with pytest.warns(UserWarning, match="rows 3, 50, 400, 777, 900 and 1 more of x"):
        fitted(with_rows(banana(1000), FAR, *rows), banana(200, seed=1))


def test_an_outlying_context_is_left_out() -> None:
    x, context = banana(500), with_rows(torch.zeros(500, 1), 1.0, *range(250))
    flow = made(context_features=1)
    with pytest.warns(UserWarning, match="leaves out row 9 of x"):
        fit_density(flow, x, with_rows(context, 1e4, 9), max_epochs=1, progress=False)


def test_rows_that_are_odd_only_as_a_whole_cost_little() -> None:
    """No entry of theirs is an outlier, but together they lie far off a thin ridge."""
    x, held_out = (banana(n, n)[:, :1].repeat(1, 2) for n in (1000, 200))
    x, held_out = (rows + 1e-3 * torch.randn_like(rows) for rows in (x, held_out))
    flow = pf.Flow([pf.transforms.LowerTriangularAffine(2)])
    options: dict[str, Any] = {"max_epochs": 40, "batch_size": 50, "learning_rate": 3e-2}
    bad = with_rows(held_out, torch.tensor([2.0, -2.0]), 5)
    x = with_rows(x, torch.tensor([-2.0, 2.0]), 7)
    with pytest.warns(UserWarning, match="counted row 5 of validation"):
        fit_density(flow, x, validation=bad, progress=False, **options)
    with torch.no_grad():
        assert float(flow().log_prob(held_out).mean()) > 2.0


def test_more_than_a_percent_without_a_density_are_refused_by_their_rows() -> None:
    x, bad = banana(300), with_rows(banana(300, seed=1), 1e30, 4, 8, 9, 200)
    with pytest.raises(ValueError, match="4 of 300 points have none: rows 4, 8, 9 and 200"):
        fitted(x, bad)


def test_constant_columns_are_named() -> None:
    x = with_rows(banana(300).T, 2.0, 1).T.contiguous()
    with pytest.warns(UserWarning, match="no maximum, .* narrower in column 1 of x") as warned:
        fitted(x, 0.1)
    assert [warning.filename for warning in warned] == [__file__]
    with pytest.warns(UserWarning, match="no maximum, .* narrower in column 1 of x"):
        fitted(with_rows(x, 0.0, 0), 0.1)
    with pytest.raises(ValueError, match=r"one value only in \[1\]"):
        fitted(x, 0.1, made(standardize=True))


def test_standardize_does_without_outliers() -> None:
    x = banana(1000)
    clean, t = Standardize.from_data(x[1:]), Standardize.from_data(with_rows(x, FAR * 1e3, 0))
    torch.testing.assert_close((t.loc, t.scale), (clean.loc, clean.scale))


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8", "f2"])
def test_arrays_of_numpy_are_data(dtype: str) -> None:
    x, held_out = banana(300).half().float(), banana(100, seed=1).half().float()
    expected, _ = fitted(x, held_out)
    arrays = [rows.numpy().astype(dtype)[::-1].copy()[::-1] for rows in (x, held_out)]
    arrays[0].flags.writeable = False
    found, _ = fitted(arrays[0], arrays[1])
    assert found == expected
    flow = made(context_features=1)
    context = np.zeros((300, 1), dtype)
    report = fit_density(
        flow,
        arrays[0],
        context,
        validation=(arrays[1], context[:100]),
        max_epochs=1,
        progress=False,
    )
    assert math.isfinite(report.log_likelihood)
