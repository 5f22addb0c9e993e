"""Polish: it leaves the posterior as it is, mends what is off, and its drift tells how far."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows import AutoFlow
from pyroflows._deadline import Deadline, TimeOver
from pyroflows.guides import AutoMixture, Guide
from pyroflows.model import LogDensity
from pyroflows.sampling.polishing import autocorrelation, drift, polish
from pyroflows.sampling.spaces import plain_space

N = 2000


def normal() -> None:
    pyro.sample("x", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])).to_event(1))


def guide_at(loc: torch.Tensor, scale: torch.Tensor) -> tuple[LogDensity, AutoFlow]:
    density = LogDensity(normal)
    guide = AutoFlow(density.continuous_model, flow=pf.NICE)
    density.introduce(guide)
    guide.whiten(loc, torch.diag(scale))
    return density, guide


LOC, SCALE = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])


def test_draws_of_the_posterior_stay_so() -> None:
    torch.manual_seed(0)
    density, guide = guide_at(LOC, SCALE)
    z = LOC + SCALE * torch.randn(N, 2)
    moved = (polish(density, guide, z, 5) - LOC) / SCALE
    assert float(moved.mean(0).abs().max()) < 5 / math.sqrt(N)
    assert float(moved.std(0).log().abs().max()) < 5 / math.sqrt(2 * N)
    assert float(drift(z, LOC + SCALE * moved, N).max()) < 0.05


@pytest.mark.parametrize(("shift", "stretch"), [(0.8, 1.0), (0.0, 0.6), (-0.5, 1.5)])
def test_draws_that_are_off_are_mended_and_the_drift_tells_how_far(
    shift: float, stretch: float
) -> None:
    torch.manual_seed(0)
    loc, scale = LOC + shift * SCALE, stretch * SCALE
    density, guide = guide_at(loc, scale)
    z = loc + scale * torch.randn(N, 2)
    moved = polish(density, guide, z, 20)
    standard = (moved - LOC) / SCALE
    assert float(standard.mean(0).abs().max()) < 5 / math.sqrt(N)
    assert float(standard.std(0).log().abs().max()) < 5 / math.sqrt(2 * N)
    # Two standard errors are taken off a drift, and three more are its spread.
    assert float(drift(z, moved, N).max()) > max(abs(shift), abs(math.log(stretch))) - 0.16


class NormalGuide(Guide):
    """A guide that can be drawn and scored, and offers no base space."""

    features = 2

    def __init__(self, normal: dist.MultivariateNormal) -> None:
        self.normal = normal

    def sample_and_log_prob(
        self, n: int, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.normal.sample((n,))
        return z, self.normal.log_prob(z)

    def log_prob(self, z: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        return self.normal.log_prob(z)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_guide_without_a_base_space_is_polished_in_the_plain_space(
    shift: float, device: torch.device
) -> None:
    """Draws of a correlated normal of unlike scales stay so, and draws that are off are mended."""
    torch.manual_seed(0)
    root = torch.tensor([[0.1, 0.0], [9.5, 3.0]], dtype=torch.float64, device=device)
    exact = dist.MultivariateNormal(torch.ones(2).to(root), scale_tril=root)
    density = LogDensity(lambda: pyro.sample("x", exact))
    guide = NormalGuide(
        dist.MultivariateNormal(torch.ones(2).to(root) + shift * root.sum(-1), scale_tril=root)
    )
    assert not guide.base_spaces()
    moved = polish(density, guide, guide.sample_and_log_prob(N)[0], 10)
    standard = torch.linalg.solve_triangular(root, (moved - 1).T, upper=False)
    assert float(standard.mean(1).abs().max()) < 5 / math.sqrt(N)
    assert float((standard.cov() - torch.eye(2).to(root)).abs().max()) < 5 * math.sqrt(2 / N)


@pytest.mark.parametrize("n", [1, 15, 200])
def test_a_plain_space_has_the_units_of_its_draws(n: int, device: torch.device) -> None:
    """Of few draws the scales alone, of one draw nothing; a constant entry keeps its unit."""
    torch.manual_seed(0)
    draws = torch.randn(n, 3, device=device) * torch.tensor([1e3, 1e-3, 0.0], device=device)
    draws[:, 1] += 1e-6 * draws[:, 0]
    space = plain_space(NormalGuide(dist.MultivariateNormal(torch.zeros(2), torch.eye(2))), draws)
    x, _ = space.transform.inverse_and_log_det(draws)
    assert bool(x.isfinite().all())
    if n > 1:
        torch.testing.assert_close(x[:, :2].std(0), torch.ones(2).to(x), rtol=0.05, atol=0.0)
        assert float(x[:, 2].abs().max()) == 0.0
        assert (abs(float(x[:, :2].T.corrcoef()[0, 1])) < 0.01) == (n == 200)


def test_no_trajectory_begins_when_the_time_is_over() -> None:
    density, guide = guide_at(LOC, SCALE)
    with Deadline(0.0).enforced(), pytest.raises(TimeOver):
        polish(density, guide, torch.zeros(3, 2), 10**9)


def test_draws_of_a_mixture_move_within_their_components() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor(
            "two", torch.logaddexp(-0.5 * ((x - 6) / 0.5) ** 2, -0.5 * ((x + 6) / 0.5) ** 2)
        )

    torch.manual_seed(0)
    density = LogDensity(model)
    guide = AutoMixture(density.continuous_model, 2)
    density.introduce(guide)
    for k, at in enumerate((-6.0, 6.0)):
        guide.whiten(k, torch.tensor([at]), torch.tensor([[0.3]]))
    z = guide.get_posterior().sample((N,))
    moved = polish(density, guide, z, 10)
    assert torch.equal(moved.sign(), z.sign())
    assert float((moved.abs() - 6).std() / 0.5) == pytest.approx(1.0, abs=0.1)


def test_draws_that_the_guide_cannot_bring_back_stay_where_they_are() -> None:
    density, guide = guide_at(LOC, SCALE)
    z = torch.full((3, 2), torch.inf)
    assert torch.equal(polish(density, guide, z, 3), z)


def test_exact_draws_of_components_that_overlap_stay_so() -> None:
    components = [(-2.0, 0.4), (1.5, 1.5)]

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        parts = [dist.Normal(m, s).log_prob(x) for m, s in components]
        pyro.factor("two", torch.logaddexp(*parts) - math.log(2))

    torch.manual_seed(0)
    density = LogDensity(model)
    guide = AutoMixture(density.continuous_model, 2)
    density.introduce(guide)
    for k, (loc, scale) in enumerate(components):
        guide.whiten(k, torch.tensor([loc]), torch.tensor([[scale]]))
    z = guide.get_posterior().sample((N,))
    for _ in range(3):
        z = polish(density, guide, z, 10)
    # The mean is -1/4, the variance 2.1^2; five standard errors.
    assert float(z.mean()) == pytest.approx(-0.25, abs=5 * 2.1 / math.sqrt(N))
    assert float((z < -1).double().mean()) == pytest.approx(0.523, abs=5 * 0.5 / math.sqrt(N))


def test_a_drift_allows_for_heavy_tails() -> None:
    generator = torch.Generator().manual_seed(0)

    def students() -> torch.Tensor:
        chi = torch.randn(N, 20, 2, generator=generator).square().sum(-1)
        return torch.randn(N, 20, generator=generator) / (chi / 2).sqrt()

    assert float(drift(students(), students(), N).max()) < 0.1


def test_chains_between_two_modes_remember_where_they_began() -> None:
    start = torch.randn(N, 2)
    mixed = torch.stack([start[:, 0], torch.randn(N)], -1)
    remembered = autocorrelation(start, mixed)
    assert float(remembered[0]) == pytest.approx(1.0)
    assert abs(float(remembered[1])) < 5 / math.sqrt(N)
