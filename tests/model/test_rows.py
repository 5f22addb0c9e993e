"""Second derivatives read by rows of data."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.model import LogDensity
from pyroflows.model.double import DoubleDensity
from pyroflows.model.rows import RowHessian, find_row_hessian

PERSON, ITEM = torch.arange(40) % 8, torch.arange(40) % 5


def siblings() -> tuple[Tensor, Tensor, Tensor]:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("persons", 8):
        a = pyro.sample("a", dist.Normal(0.0, scale))
    with pyro.plate("items", 5):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    return scale, a, b


def indexed(y: Tensor) -> None:
    _, a, b = siblings()
    with pyro.plate("rows", 40):
        pyro.sample("y", dist.Poisson((a[PERSON] + b.exp()[ITEM]).exp()), obs=y[:, 0])


def broadcast(y: Tensor) -> None:
    scale, a, b = siblings()
    with pyro.plate("columns", 8):
        slope = pyro.sample("slope", dist.Normal(a, scale))
    with pyro.plate("pairs", 5, dim=-2), pyro.plate("others", 8, dim=-1):
        mean = slope.exp() * (a - b.unsqueeze(-1))
        pyro.sample("y", dist.Bernoulli(logits=mean), obs=(y[:5, :8] > 0).float())


def beside_rows(y: Tensor) -> None:
    """Entries of which there are as many as rows."""
    _, a, _ = siblings()
    with pyro.plate("rows", 40):
        c = pyro.sample("c", dist.Normal(a[PERSON], 1.0))
        pyro.sample("y", dist.Normal(c * a[PERSON] + a[PERSON] ** 2, 1.0), obs=y[:, 0])


def summed(y: Tensor) -> None:
    _, a, b = siblings()
    total = (a[PERSON] + b[ITEM]).cumsum(-1)
    pyro.sample("y", dist.Normal(total, 1.0).to_event(1), obs=y[:, 0])


def rows_of(model: Callable[[Tensor], None]) -> tuple[DoubleDensity, RowHessian | None]:
    density = DoubleDensity(LogDensity(model, (torch.randn(40, 8).abs().round(),)), 2)
    chosen = torch.arange(1, density.features)
    edges = torch.triu_indices(len(chosen), len(chosen), 1).mT
    hessian = torch.autograd.functional.hessian(density.log_joint, density.initial + 0.2)
    touching = hessian[chosen[edges[:, 0]], chosen[edges[:, 1]]] != 0
    return density, find_row_hessian(density, chosen, edges[touching], {"scale"})


@pytest.mark.parametrize(("model", "most"), [(indexed, 3), (broadcast, 6), (beside_rows, 5)])
def test_second_derivatives_by_rows(model: Callable[[Tensor], None], most: int) -> None:
    density, rows = rows_of(model)
    assert rows is not None
    assert rows.count <= most
    points = 0.3 * torch.randn(3, density.features, dtype=torch.double)
    with torch.no_grad():
        read = rows.read(density, points)
    for i, point in enumerate(points):
        hessian = torch.autograd.functional.hessian(density.log_joint, point)[1:, 1:]
        first, second = rows.edges.unbind(-1)
        expected = torch.cat([hessian.diagonal(), hessian[first, second]])
        torch.testing.assert_close(read.entries[i], expected)
        slope = torch.autograd.functional.jacobian(density.log_joint, point)
        torch.testing.assert_close(read.gradients[i, 1:], slope[1:])
    torch.testing.assert_close(read.values, density.log_joint(points))


def test_rows_that_touch_each_other_are_refused() -> None:
    assert rows_of(summed)[1] is None
