"""Log densities that are evaluated by slices of the rows of their data."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflows.model import LogDensity
from pyroflows.model.curvature import differentiate, multiply_hessian, slice_rows
from pyroflows.model.double import DoubleDensity
from pyroflows.model.row_slices import find_row_slices

ROWS = 60_000
INDEX = torch.arange(ROWS) % 7


def by_vector(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ slope), obs=(y > 0).float())


def by_matrix(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3, 1), 2.0).to_event(2))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("rows", ROWS):
        pyro.sample("y", dist.Normal((x @ slope).squeeze(-1), noise), obs=y)


def by_sum(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    pyro.sample("y", dist.StudentT(3.0, (x * slope).sum(-1), 1.0).to_event(1), obs=y)


def by_classes(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3, 4), 2.0).to_event(2))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Categorical(logits=x @ slope), obs=y.abs().long().clamp(max=3))


def by_groups(x: Tensor, y: Tensor) -> None:
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("groups", 7):
        level = pyro.sample("level", dist.Normal(0.0, spread))
    with pyro.plate("rows", len(y)), pyro.poutine.scale(scale=0.5):
        pyro.sample("y", dist.Poisson(level[INDEX].exp()), obs=y.abs().round())


def by_mixture(x: Tensor, y: Tensor) -> None:
    means = pyro.sample("means", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        mixture = dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2) / 2), dist.Normal(means, 1.0)
        )
        pyro.sample("y", mixture, obs=y)


def by_factor(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    pyro.factor("fit", -0.5 * (y - x @ slope).square().sum())


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 3, generator=generator), torch.randn(ROWS, generator=generator)


def in_one(density: LogDensity, count: int) -> DoubleDensity:
    whole = DoubleDensity(density, count)
    whole.parts = [(1.0, whole.values)]
    return whole


@pytest.mark.parametrize(
    "model", [by_vector, by_matrix, by_sum, by_classes, by_groups, by_mixture, by_factor]
)
def test_slices_of_rows_add_up(model: Callable[..., None]) -> None:
    density = LogDensity(model, data())
    sliced = DoubleDensity(density, 8)
    assert len(sliced.parts) > 1
    whole = in_one(density, 8)
    points = torch.randn(11, density.features, dtype=torch.double)
    torch.testing.assert_close(
        sliced.log_joint(points), whole.log_joint(points), rtol=1e-10, atol=0
    )
    found, expected = differentiate(sliced, points), differentiate(whole, points)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-8, atol=1e-6)
    directions = torch.eye(density.features).double()[:2]
    found, expected = (multiply_hessian(d, points[:3], directions) for d in (sliced, whole))
    torch.testing.assert_close(found.products, expected.products, rtol=1e-8, atol=1e-6)


def by_order(x: Tensor, y: Tensor) -> None:
    """Rows touch each other."""
    decay = pyro.sample("decay", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal((x @ decay).cumsum(0) / ROWS, 1.0).to_event(1), obs=y)


def by_spread(x: Tensor, y: Tensor) -> None:
    """The density is no affine function of a sum over rows."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    pyro.factor("fit", -ROWS / 2 * (y - x @ slope).square().sum().log())


@pytest.mark.parametrize("model", [by_order, by_spread])
def test_what_is_no_sum_over_rows_is_not_sliced(model: Callable[..., None]) -> None:
    assert len(DoubleDensity(LogDensity(model, data()), 8).parts) == 1


@pytest.mark.parametrize("dim", [1, -1])
def test_what_gathers_from_other_rows_is_not_sliced(dim: int) -> None:
    order = torch.arange(ROWS).flip(0)

    def total(points: Tensor, x: Tensor, order: Tensor) -> tuple[Tensor]:
        return (((points * x).gather(dim, order.expand(len(points), -1)) * x).sum(-1),)

    graph = make_fx(total, tracing_mode="fake")(torch.ones(2, 1), torch.ones(ROWS), order)
    assert find_row_slices(graph) is None


def test_more_points_are_taken_at_once_by_slices() -> None:
    x, y = data()
    sliced = slice_rows(LogDensity(by_vector, (x, y)))
    assert sliced is not None
    assert sliced.batch_size == 64
    assert slice_rows(LogDensity(by_vector, (x[:100], y[:100]))) is None


def test_a_row_that_forbids_a_point_is_seen() -> None:
    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Uniform(-4.0, top.exp() + 4.0), obs=y)

    y = torch.zeros(ROWS)
    y[-1] = 4.9
    sliced = DoubleDensity(LogDensity(model, (y,)), 8)
    assert len(sliced.parts) > 1
    allowed = sliced.log_joint(torch.tensor([[-1.0], [0.5]]).double()).isfinite()
    assert allowed.tolist() == [False, True]
