"""Data in which NaN stands for what is missing."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyroflows.model import LogDensity

ROWS = torch.tensor([[0.5, 1.0, -1.0], [0.2, math.nan, 1.0], [math.nan] * 3, [math.nan, 0.0, 2.0]])


def entries(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("n", 4):
        pyro.sample("y", dist.NanMaskedNormal(mu, 0.5).to_event(1), obs=y)


def vectors(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    covariance = torch.eye(3) + 0.5 * mu[0].exp()
    with pyro.plate("n", 4):
        pyro.sample("y", dist.NanMaskedMultivariateNormal(mu, covariance), obs=y)


@pytest.mark.parametrize("model", [entries, vectors])
def test_missing_entries_are_integrated_out(model: Any) -> None:
    density = LogDensity(model, (ROWS,))
    assert density.mode == "captured"
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    given = [poutine.condition(model, data={"mu": mu}) for mu in z]
    expected = [poutine.trace(g).get_trace(ROWS).log_prob_sum() for g in given]
    torch.testing.assert_close(density.log_prob(z), torch.stack(expected))
    assert bool(density.value_and_grad(z)[1].isfinite().all())
