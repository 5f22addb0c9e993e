"""Normal approximations of posteriors of many entries, whose cost is linear in their number."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyroflows.model import LogDensity
from pyroflows.posterior.census import find_start, take_census
from pyroflows.posterior.gaussian import Gaussian
from pyroflows.posterior.importance import ImportanceSample
from pyroflows.posterior.pathfinder import _begin, _root, fit_low_rank, sharpen
from pyroflows.transforms import roots
from pyroflows.transforms.low_rank import DENSE, TRIANGULAR, LowRankRoot

pytestmark = pytest.mark.usefixtures("placement")


def factors(n: int) -> LogDensity:
    """Two factors, and noise of different widths."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(n, 2, generator=generator)
    noise = torch.rand(n, generator=generator) + 0.5

    def model() -> None:
        normal = dist.LowRankMultivariateNormal(torch.ones(n), factor, noise)
        pyro.sample("x", normal)

    return LogDensity(model)


def ess(density: LogDensity, fit: Gaussian) -> float:
    noise = torch.randn(1000, density.features, generator=torch.Generator().manual_seed(1))
    z = fit.loc + roots.multiply_root(fit.scale_tril, noise)
    log_q = -noise.square().sum(-1) / 2 - roots.log_det(fit.scale_tril)
    return ImportanceSample(z, density.log_prob(z) - log_q).ess


def test_a_normal_of_low_rank_is_found() -> None:
    density = factors(TRIANGULAR + 44)
    best, _ = fit_low_rank(density, find_start(density).unsqueeze(0))
    assert isinstance(best.root, LowRankRoot)
    sharp = sharpen(density, best)
    assert float(sharp.elbo) > float(best.elbo)
    assert ess(density, best.one(0)) < 0.1 < 0.3 < ess(density, sharp.one(0))


def test_up_to_so_many_entries_the_whole_curvature_is_found_once_a_mode() -> None:
    density = factors(DENSE + 6)
    census = take_census(density, find_start(density), starts=6)
    assert isinstance(census.best.scale_tril, Tensor)
    assert ess(density, census.best) > 0.95
    assert len(census.weights) == 1


def two_sided(n: int) -> LogDensity:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(n), 1.0).to_event(1))
        pyro.factor("sides", torch.logaddexp(-8 * (x[..., 0] - 2) ** 2, -8 * (x[..., 0] + 2) ** 2))

    return LogDensity(model)


def test_modes_are_told_apart() -> None:
    density = two_sided(TRIANGULAR + 1)
    census = take_census(density, find_start(density), starts=12)
    assert len(census.weights) == 2
    assert float(census.weights.amin()) > 0.2


def flat(n: int) -> LogDensity:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(n), 1.0).to_event(1))
        pyro.sample("y", dist.ImproperUniform(constraints.real, (), ()))

    return LogDensity(model)


def test_a_direction_without_a_fall_is_seen() -> None:
    density = flat(TRIANGULAR + 1)
    direction = take_census(density, find_start(density), starts=6).flat_direction
    assert direction is not None
    assert int(direction.abs().argmax()) == TRIANGULAR + 1
    assert take_census(two_sided(300), torch.ones(300), starts=6).flat_direction is None


def test_curvatures_that_overflow_leave_the_diagonal() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(TRIANGULAR + 1), 1.0).to_event(1))
        pyro.factor("wall", -(30 * x[..., 0]).exp() - (30 * x[..., 1]).exp())

    density = LogDensity(model)
    starts = torch.zeros(2, density.features)
    starts[1, :2] = 2.5
    best, last = fit_low_rank(density, starts, steps=30)
    assert bool(roots.is_finite(best.root).all())
    assert bool(roots.is_finite(last.root).all())
    ascents = _begin(density, starts)
    ascents.steps[:, -2:] = 1e20
    ascents.changes[:, -2:] = torch.tensor([[1e-20], [1e20]])
    assert bool(roots.is_finite(_root(ascents)).all())
