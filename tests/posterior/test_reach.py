"""A guide that cuts a posterior short: the weights see nothing, chains that roam do, and a fresh
guide that is fitted to them is right.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows._deadline import Deadline
from pyroflows.guides import AutoMixture, Guide
from pyroflows.model import LogDensity
from pyroflows.posterior import Posterior, refit
from pyroflows.posterior.checks import judge_subject
from pyroflows.posterior.climb import Climb
from pyroflows.posterior.gaussian import Gaussians
from pyroflows.posterior.importance import draw_importance_sample
from pyroflows.posterior.ladder import refit_to_chains
from pyroflows.posterior.refit import VectorKL, roam_components, roam_missed
from pyroflows.posterior.subject import Subject, gained
from pyroflows.posterior.verdict import FAILED, HELD

NORMAL = torch.distributions.Normal(0.0, 1.0)


def normal() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


class CutNormal(Guide):
    """A standard normal in two entries, the first of which ends at a given point."""

    features = 2

    def __init__(self, end: float) -> None:
        self.end, self.kept = end, float(NORMAL.cdf(torch.tensor(end)))

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u = torch.rand(n, 2)
        z = NORMAL.icdf(torch.stack([u[:, 0] * self.kept, u[:, 1]], -1).clamp(1e-6, 1 - 1e-6))
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        inside = NORMAL.log_prob(z).sum(-1) - math.log(self.kept)
        return torch.where(z[:, 0] <= self.end, inside, -math.inf)


@pytest.mark.parametrize(("end", "status"), [(1.5, FAILED), (2.0, FAILED), (6.0, HELD)])
def test_mass_that_a_guide_cuts_off_is_reached(end: float, status: str) -> None:
    torch.manual_seed(0)
    guide = CutNormal(end)
    subject = Subject(guide, LogDensity(normal))
    verdict = judge_subject(subject)
    found = verdict.finding("reach")
    assert found is not None and found.value is not None
    # The weights of all draws are equal, whatever is cut off.
    assert verdict.ess == pytest.approx(1.0, abs=1e-6)
    assert [finding.name for finding in verdict.failed] == ["reach"] * (status == FAILED)
    # Two standard errors of 1000 chains are taken off, and three more are the spread.
    cut_off = 1 - guide.kept
    assert found.value == pytest.approx(cut_off, abs=5 * math.sqrt((cut_off + 1e-4) / 1000))
    assert found.status == status


def test_chains_that_come_and_go_gain_nothing() -> None:
    before = torch.arange(1000) < 40
    after = (torch.arange(1000) >= 20) & (torch.arange(1000) < 60)
    assert gained(before, after) == 0.0
    assert gained(before, before | (torch.arange(1000) >= 900)) == pytest.approx(0.08)


def two_arcs() -> None:
    """Two arcs of scale 2 along and 0.2 across, ten apart."""
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    u, v = x.unbind(-1)
    along = -0.5 * (v / 2).square()
    across = -0.5 * ((u.abs() - 5 - 0.3 * v.square()) / 0.2).square()
    pyro.factor("arcs", along + across)


LOG_EVIDENCE = math.log(2 * 2 * 0.2 * 2 * math.pi)


def short_mixture(density: LogDensity) -> AutoMixture:
    """Gaussians on the middles of the arcs."""
    guide = AutoMixture(density.continuous_model, 2)
    density.introduce(guide)
    for k, u in enumerate((-5.3, 5.3)):
        guide.whiten(k, torch.tensor([u, 0.0]), torch.diag(torch.tensor([0.3, 1.0])))
    return guide


def test_each_component_sends_out_as_many_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "ROUNDS", 1)
    torch.manual_seed(0)
    density = LogDensity(two_arcs)
    guide = short_mixture(density)
    with torch.no_grad():
        guide.logits.copy_(torch.tensor([0.2, 0.8]).log())
    sample = draw_importance_sample(guide, density, 2000)
    left, right = roam_components(density, guide, sample)
    assert left.shape == right.shape
    assert float(left[:, 0].max()) < 0 < float(right[:, 0].min())
    # They begin with a standard deviation of one, and go on along the arms.
    for z in (left, right):
        assert float(z[:, 1].std()) > 1.15


def test_chains_start_at_a_mode_that_a_guide_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "ROUNDS", 1)
    torch.manual_seed(0)
    density = LogDensity(two_arcs)
    guide = short_mixture(density)
    both = Gaussians(
        torch.tensor([[-5.3, 0.0], [5.3, 0.0]]),
        torch.diag(torch.tensor([0.2, 1.0])).expand(2, 2, 2),
        torch.zeros(2),
    )
    sample = draw_importance_sample(guide, density, 1000)
    assert roam_missed(density, guide, sample, both) == []
    with torch.no_grad():
        guide.logits.copy_(torch.tensor([0.0, -40.0]))
    sample = draw_importance_sample(guide, density, 1000)
    (found,) = roam_missed(density, guide, sample, both)
    assert float(found[:, 0].min()) > 0


def test_the_forward_divergence_on_vectors_is_minus_their_mean_log_density() -> None:
    z = torch.randn(100, 2)
    density = LogDensity(normal)
    loss = VectorKL(z).density_loss(dist.Normal(torch.zeros(2), 1.0).to_event(1), density)
    torch.testing.assert_close(loss, -NORMAL.log_prob(z).sum(-1).mean())


def test_a_guide_is_refitted_only_where_chains_may_find_more() -> None:
    climb = Climb(LogDensity(normal), 0, Deadline())
    assert refit_to_chains(climb) is None
    climb.judge("flow", climb.first_flow)
    assert climb.best is not None and climb.best.verdict.finding("reach") is not None
    assert refit_to_chains(climb) is None


@pytest.mark.slow
def test_a_mixture_that_was_cut_short_is_refitted_and_right() -> None:
    torch.manual_seed(0)
    density = LogDensity(two_arcs)
    climb = Climb(density, 6000, Deadline())
    guide = short_mixture(density)
    assert not climb.judge("short", guide).ok
    refitted = refit_to_chains(climb)
    assert refitted is not None
    verdict = climb.judge("refit", refitted)
    assert verdict.log_evidence == pytest.approx(LOG_EVIDENCE, abs=0.03)
    posterior = climb.best
    assert isinstance(posterior, Posterior) and posterior.name == "refit"
    v = posterior.sample_unconstrained(4000, seed=0)[:, 1]
    assert float((v.std() / 2).log().abs()) < 0.06
