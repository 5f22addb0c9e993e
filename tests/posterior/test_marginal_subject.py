"""The verdict on globals whose density has values alone: what it finds, and what it costs."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from pyroflows._deadline import Deadline, TimeOver, check_time
from pyroflows.flows import Flow, RealNVP
from pyroflows.guides import Guide
from pyroflows.guides.marginal import Marginal
from pyroflows.guides.marginal_mode import MarginalMode, find_marginal_mode
from pyroflows.guides.whitened import WhitenedFlow
from pyroflows.model import LogDensity
from pyroflows.model.base import Density
from pyroflows.model.structure import find_structure
from pyroflows.posterior.checks import CHECKS, judge_subject
from pyroflows.posterior.marginal_census import prior_globals, take_marginal_census
from pyroflows.posterior.marginal_subject import FlowOfGlobals, GlobalDensity, MarginalSubject
from pyroflows.posterior.verdict import FAILED, HELD, NOT_JUDGED
from pyroflows.sampling.polishing import autocorrelation

STANDARD = Normal(0.0, 1.0)
CONSTANT = -12.5


class Values:
    """The values of a normal density of two entries, which are counted."""

    features, entry_names = 2, ["mean", "log_scale"]

    def __init__(self) -> None:
        self.count = 0

    def log_prob(self, g: Tensor) -> Tensor:
        check_time()
        self.count += g[..., 0].numel()
        return STANDARD.log_prob(g).sum(-1) + CONSTANT

    def describe(self, g: Tensor) -> str:
        return f"near mean = {float(g[0]):.2g}"


class Surrogate(Density):
    """A normal density that is off by a little, or by more."""

    features = 2

    def __init__(self, off: float = 0.1) -> None:
        self.off = off

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = z - self.off
        return -0.5 * x.square().sum(-1), -x


class CutNormal(Guide):
    """A standard normal in two entries, the first of which ends at a given point."""

    features = 2

    def __init__(self, end: float) -> None:
        self.end, self.kept = end, float(STANDARD.cdf(torch.tensor(end)))

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u = torch.rand(n, 2)
        z = STANDARD.icdf(torch.stack([u[:, 0] * self.kept, u[:, 1]], -1).clamp(1e-6, 1 - 1e-6))
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        inside = STANDARD.log_prob(z).sum(-1) - math.log(self.kept)
        return torch.where(z[:, 0] <= self.end, inside, -math.inf)


def flow_of(loc: float, scale: float) -> FlowOfGlobals:
    """A flow that is a normal distribution."""
    flow = WhitenedFlow(RealNVP(2))
    flow.whiten(torch.full((2,), loc), scale * torch.eye(2))
    return FlowOfGlobals(flow, 2)


def subject_of(guide: Guide, **options: int) -> tuple[MarginalSubject, Values]:
    torch.manual_seed(0)
    density = Values()
    mode = MarginalMode(torch.zeros(2).double(), torch.eye(2).double(), torch.zeros(0), 1, True)
    census = take_marginal_census(density.log_prob, mode, lambda start: mode)
    density.count = 0
    return MarginalSubject(guide, density, census, surrogate=Surrogate(), **options), density


def test_a_right_flow_is_trusted_for_few_values() -> None:
    subject, density = subject_of(flow_of(0.0, 1.0))
    verdict = judge_subject(subject)
    assert verdict.ok, verdict
    assert verdict.log_evidence == pytest.approx(CONSTANT, abs=1e-4)
    assert {finding.block for finding in verdict.findings} == {"globals"}
    assert [finding.status for finding in verdict.findings] == [HELD] * 8 + [NOT_JUDGED]
    # The draws, the draws of one fit, and two rounds of the chains.
    assert density.count == 1000 + 64 + 2 * 800


@pytest.mark.parametrize(("loc", "scale"), [(0.4, 1.0), (0.0, 0.5), (0.0, 1.5)])
def test_a_wrong_flow_is_not_trusted(loc: float, scale: float) -> None:
    verdict = judge_subject(subject_of(flow_of(loc, scale))[0])
    assert not verdict.ok
    assert verdict.reason.startswith("globals: ")


@pytest.mark.parametrize("end", [0.0, 1.0, 1.4])
def test_a_guide_that_was_cut_short_is_not_trusted(end: float) -> None:
    subject, _ = subject_of(CutNormal(end))
    costly = [check for check in CHECKS if check.name in ("drift", "reach")]
    found = [check.find(subject).status for check in costly]
    # The mean of the draws moves by 0.80, 0.29 and 0.16 standard deviations.
    assert found[1] == FAILED
    assert end > 1 or found[0] == FAILED
    assert "near mean = " in costly[1].find(subject).sentence


def test_a_bad_surrogate_costs_more_and_judges_alike() -> None:
    subject, density = subject_of(CutNormal(1.0))
    subject.surrogate = Surrogate(-2.5)
    found = [check.find(subject).status for check in CHECKS if check.name in ("drift", "reach")]
    assert found == [FAILED, FAILED]
    assert density.count > 1000 + 2 * 2 * 800


def test_a_mode_that_a_guide_misses_is_told_by_the_census() -> None:
    subject, _ = subject_of(flow_of(9.0, 0.5))
    finding = judge_subject(subject).finding("census", "globals")
    assert finding is not None and finding.status == FAILED
    assert finding.sentence.count("near mean = ") == 1


@pytest.mark.parametrize(("ticks", "judged"), [(3, False), (60, True)])
def test_checks_without_time_are_not_made(ticks: int, judged: bool) -> None:
    subject, _ = subject_of(flow_of(0.0, 1.0))
    passing = iter(range(10_000))
    with Deadline(ticks + 0.5, clock=lambda: next(passing)).enforced():
        verdict = judge_subject(subject)
    finding = verdict.finding("drift", "globals")
    assert finding is not None
    assert finding.status == (HELD if judged else NOT_JUDGED)


def test_chains_that_find_more_stop_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, density = subject_of(CutNormal(1.7), chains=2000)
    moved = subject.moved

    def late(g: Tensor) -> Tensor:
        raise TimeOver

    monkeypatch.setattr(density, "log_prob", late)
    assert subject.roamed is moved


def test_the_same_seed_gives_the_same_verdict() -> None:
    first, second = (str(judge_subject(subject_of(CutNormal(1.0))[0])) for _ in range(2))
    assert first == second


def groups(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    between = pyro.sample("between", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, between))
        pyro.sample("y", dist.Normal(effect, 0.5), obs=y)


def flow_at(mode: MarginalMode) -> Flow:
    flow = WhitenedFlow(RealNVP(2))
    flow.whiten(mode.loc.float(), mode.root.float())
    return flow


def test_the_globals_of_a_model() -> None:
    """The normal approximation of the globals of many groups is all but right."""
    torch.manual_seed(0)
    density = LogDensity(groups, (torch.linspace(-2, 2, 100),), batch_size=32)
    marginal = Marginal(density, find_structure(density))
    mode = find_marginal_mode(marginal)
    globals_ = GlobalDensity(marginal)
    assert globals_.entry_names == ["mean", "between"]
    assert globals_.describe(mode.loc.float()).startswith("near mean = ")
    guide = FlowOfGlobals(flow_at(mode), 2)

    class Normals(Density):
        features = 2

        def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
            precision = torch.cholesky_inverse(mode.root)
            slope = (mode.loc - z) @ precision
            return -0.5 * (slope * (mode.loc - z)).sum(-1), slope

    prior = prior_globals(marginal)
    assert prior is not None and prior.shape == (16, 2)
    census = take_marginal_census(marginal.log_prob, mode, lambda start: mode, prior, starts=12)
    subject = MarginalSubject(
        guide, globals_, census, draws=300, surrogate=Normals(), chains=100, rounds=2
    )
    verdict = judge_subject(subject)
    assert verdict.ess > 0.9
    assert not verdict.failed, verdict
    assert float(autocorrelation(subject.starts, subject.moved).amax()) < 0.3
