"""The verdict on guides whose faults are known, and the evidence against closed forms."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, StudentT

from pyroflows._deadline import Deadline, TimeOver
from pyroflows._random import forked
from pyroflows.guides import AutoFlow, Guide
from pyroflows.model import LogDensity
from pyroflows.posterior import Finding, Posterior, Verdict
from pyroflows.posterior.checks import (
    CHECKS,
    Check,
    Drift,
    Modes,
    Polish,
    Shift,
    Supports,
    judge_subject,
)
from pyroflows.posterior.importance import ImportanceSample
from pyroflows.posterior.subject import Subject
from pyroflows.posterior.verdict import FAILED, HELD, NOT_JUDGED, TIME_OVER

DRAWS = 10_000
CONSTANT = -12.5


def normal_on_normal(
    loc: float = 0.0, scale: float = 1.0, features: int = 1, seed: int = 0, draws: int = DRAWS
) -> tuple[Tensor, Tensor, list[str]]:
    """Weights and draws of a guide N(loc, scale^2) in every entry of a posterior N(0, 1) of log
    evidence CONSTANT.
    """
    generator = torch.Generator().manual_seed(seed)
    z = loc + scale * torch.randn(draws, features, generator=generator, dtype=torch.float64)
    log_p = Normal(0.0, 1.0).log_prob(z).sum(-1) + CONSTANT
    log_q = Normal(loc, scale).log_prob(z).sum(-1)
    return log_p - log_q, z, [f"x[{i}]" for i in range(features)]


def judge(log_weights: Tensor, z: Tensor, names: list[str]) -> tuple[Verdict, Tensor]:
    """The verdict on a guide of which only weighted draws are known, and the smoothed weights."""
    sample = ImportanceSample(z, log_weights)
    return judge_subject(Subject.of_sample(sample, names)), sample.weights


def verdict_of(*args: float, **kwargs: float) -> Verdict:
    return judge(*normal_on_normal(*args, **kwargs))[0]  # type: ignore[arg-type]


# Guides that are right


@pytest.mark.parametrize("features", [1, 5])
def test_an_exact_guide_is_trusted(features: int) -> None:
    verdict, weights = judge(*normal_on_normal(features=features))
    assert verdict.ok
    assert verdict.khat < 0.7
    assert verdict.ess == pytest.approx(1.0)
    assert verdict.log_evidence == pytest.approx(CONSTANT)
    assert verdict.elbo == pytest.approx(CONSTANT)
    assert verdict.log_evidence_error == pytest.approx(0.0, abs=1e-6)
    assert verdict.shift < 0.01
    assert verdict.draws == DRAWS
    torch.testing.assert_close(weights.log(), torch.full_like(weights, -math.log(DRAWS)))


@pytest.mark.parametrize(("loc", "scale"), [(0.02, 1.0), (0.0, 1.03), (0.0, 0.97), (-0.02, 1.02)])
def test_an_all_but_exact_guide_is_trusted(loc: float, scale: float) -> None:
    assert verdict_of(loc, scale).ok


# Guides that are wrong


@pytest.mark.parametrize("scale", [0.2, 0.4, 0.5])
def test_a_guide_that_is_too_narrow_is_not_trusted(scale: float) -> None:
    verdict = verdict_of(scale=scale)
    assert not verdict.ok
    assert verdict.khat > 0.5
    assert "x[0]" in verdict.reason


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.7, 0.9])
def test_khat_is_the_shape_of_the_tail(scale: float) -> None:
    """For a normal of scale s on a standard normal the weights have a Pareto tail of shape 1 - s^2."""
    estimates = [verdict_of(scale=scale, seed=seed).khat for seed in range(4)]
    assert sum(estimates) / 4 == pytest.approx(1 - scale**2, abs=0.15)


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.0])
def test_a_guide_that_is_too_wide_has_bounded_weights_and_a_known_ess(scale: float) -> None:
    verdict = verdict_of(scale=scale)
    assert verdict.khat < 0.7
    # E[w^2] of the normalised weights is s^2 / sqrt(2 s^2 - 1).
    assert verdict.ess == pytest.approx(math.sqrt(2 * scale**2 - 1) / scale**2, rel=0.03)
    assert verdict.shift == pytest.approx(math.log(scale), abs=0.05)
    assert not verdict.ok
    assert "weighting moves x[0]" in verdict.reason


def test_a_guide_with_heavy_tails_has_bounded_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    chi = torch.randn(3, DRAWS, generator=generator, dtype=torch.float64).square().sum(0)
    z = torch.randn(DRAWS, generator=generator, dtype=torch.float64) / (chi / 3).sqrt()
    log_weights = Normal(0.0, 1.0).log_prob(z) - StudentT(3.0).log_prob(z)
    verdict = judge(log_weights, z.unsqueeze(-1), ["x"])[0]
    assert verdict.khat < 0.3
    assert abs(verdict.log_evidence) < 4 * verdict.log_evidence_error
    assert not verdict.ok
    # The central 90 % of a t with 3 degrees of freedom lie within 2.353, those of a normal within
    # 1.645.
    assert verdict.shift == pytest.approx(math.log(2.353 / 1.645), abs=0.1)


@pytest.mark.parametrize("loc", [2.0, 4.0])
def test_a_guide_far_off_is_not_trusted(loc: float) -> None:
    verdict = verdict_of(loc)
    assert not verdict.ok
    assert verdict.ess < 0.2


def test_a_guide_a_little_off_is_not_trusted_as_it_is() -> None:
    verdict = verdict_of(0.3)
    assert not verdict.ok
    assert verdict.shift == pytest.approx(0.3, abs=0.05)


def test_the_entry_at_fault_is_named() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 1.0, 1.4, 1.0], dtype=torch.float64)
    z = scales * torch.randn(DRAWS, 4, generator=generator, dtype=torch.float64)
    log_weights = (Normal(0.0, 1.0).log_prob(z) - Normal(torch.zeros(4), scales).log_prob(z)).sum(
        -1
    )
    verdict = judge(log_weights, z, ["a", "b", "theta[2]", "c"])[0]
    assert not verdict.ok
    assert "theta[2]" in verdict.reason


# Zero density and what is no number


def truncated(at: float) -> tuple[Tensor, Tensor, list[str]]:
    """An exact guide, but for what lies below a point, which the model forbids."""
    log_weights, z, names = normal_on_normal()
    return torch.where(z[:, 0] < at, -math.inf, log_weights), z, names


def test_a_region_of_zero_density_is_not_trusted_and_leaves_the_evidence_right() -> None:
    verdict, weights = judge(*truncated(-1.5))
    assert not verdict.ok
    assert "zero density" in verdict.reason
    assert "7%" in verdict.reason
    expected = CONSTANT + math.log(float(Normal(0.0, 1.0).cdf(torch.tensor(1.5))))
    assert abs(verdict.log_evidence - expected) < 4 * verdict.log_evidence_error
    assert verdict.elbo == -math.inf
    assert float(weights.sum()) == pytest.approx(1.0)


def test_a_few_draws_of_zero_density_do_no_harm() -> None:
    verdict = judge(*truncated(-3.0))[0]
    assert verdict.ok
    assert abs(verdict.log_evidence - CONSTANT) < 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_number_count_as_zero_density(bad: float) -> None:
    log_weights, z, names = truncated(-1.5)
    spoilt = torch.where(log_weights == -math.inf, bad, log_weights)
    assert judge(spoilt, z, names)[0] == judge(log_weights, z, names)[0]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_model_that_forbids_every_draw(bad: float) -> None:
    _, z, names = normal_on_normal()
    verdict, weights = judge(torch.full((DRAWS,), bad), z, names)
    assert not verdict.ok
    assert "every draw" in verdict.reason
    assert verdict.log_evidence == -math.inf
    assert verdict.ess == 0.0
    assert bool(weights.isfinite().all())


@pytest.mark.parametrize("share", [0.005, 0.2])
def test_draws_that_are_no_number_are_left_out(share: float) -> None:
    log_weights, z, names = normal_on_normal(scale=2.0)
    bad = torch.arange(DRAWS) < share * DRAWS
    verdict = judge(
        torch.where(bad, math.nan, log_weights), torch.where(bad.unsqueeze(-1), math.nan, z), names
    )[0]
    assert not verdict.ok
    assert verdict.shift == pytest.approx(math.log(2.0), abs=0.05)


# The evidence and its error


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.3), (0.4, 1.1), (0.0, 0.9)])
def test_the_error_of_the_log_evidence_is_its_spread(loc: float, scale: float) -> None:
    runs = [verdict_of(loc, scale, seed=seed, draws=2000) for seed in range(200)]
    errors = torch.tensor([(v.log_evidence - CONSTANT) / v.log_evidence_error for v in runs])
    # 200 runs tell a standard deviation to a twentieth, and a mean to a fourteenth.
    assert abs(float(errors.mean())) < 0.3
    assert 0.8 < float(errors.std()) < 1.25


def test_the_elbo_is_below_the_evidence_by_the_divergence() -> None:
    scale = 1.5
    verdict = verdict_of(scale=scale)
    divergence = 0.5 * (scale**2 - 1) - math.log(scale)
    assert verdict.elbo == pytest.approx(
        CONSTANT - divergence, abs=4 * 0.5 * (scale**2 - 1) * math.sqrt(2 / DRAWS)
    )
    assert verdict.elbo < verdict.log_evidence


@pytest.mark.parametrize("constant", [-1e6, -500.0, 500.0, 1e6])
def test_evidence_of_any_size(constant: float) -> None:
    log_weights, z, names = normal_on_normal(scale=1.1)
    verdict = judge(log_weights + constant, z, names)[0]
    reference = judge(log_weights, z, names)[0]
    assert verdict.log_evidence - constant == pytest.approx(reference.log_evidence, abs=1e-6)
    assert verdict.khat == pytest.approx(reference.khat, abs=1e-3)
    assert verdict.ok == reference.ok


# Form


def test_single_precision_and_double_agree() -> None:
    log_weights, z, names = normal_on_normal(scale=1.2)
    single, double = (
        judge(log_weights.float(), z.float(), names)[0],
        judge(log_weights, z, names)[0],
    )
    assert single.log_evidence == pytest.approx(double.log_evidence, abs=1e-4)
    assert single.ess == pytest.approx(double.ess, abs=1e-4)
    assert single.ok == double.ok


def test_what_is_given_is_not_changed() -> None:
    log_weights, z, names = truncated(-1.5)
    log_weights[0] = math.nan
    before = log_weights.clone(), z.clone()
    judge(log_weights, z, names)
    torch.testing.assert_close((log_weights, z), before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("draws", [2, 10, 40])
def test_few_draws_are_judged_without_an_error(draws: int) -> None:
    verdict, weights = judge(*normal_on_normal(scale=1.2, draws=draws))
    assert verdict.draws == draws
    assert float(weights.sum()) == pytest.approx(1.0)
    assert math.isfinite(verdict.log_evidence)


@pytest.mark.parametrize(
    "case",
    [normal_on_normal(), normal_on_normal(scale=0.4), normal_on_normal(0.3), truncated(-1.5)],
)
def test_the_verdict_reads_as_one_paragraph(case: tuple[Tensor, Tensor, list[str]]) -> None:
    verdict = judge(*case)[0]
    text = str(verdict)
    assert text.startswith(
        "Trust this posterior: " if verdict.ok else "Do not trust this posterior: "
    )
    assert text.endswith(".")
    assert "\n" not in text
    assert "nan" not in text
    assert f"{verdict.ess:.0%}" in text


def test_a_verdict_cannot_be_set() -> None:
    with pytest.raises(FrozenInstanceError):
        verdict_of().ok = False  # type: ignore[misc]


# Findings


def statuses(verdict: Verdict) -> dict[str, str]:
    return {finding.name: finding.status for finding in verdict.findings}


def test_each_check_has_one_finding_in_order() -> None:
    verdict = verdict_of()
    assert [finding.name for finding in verdict.findings] == [check.name for check in CHECKS]
    assert statuses(verdict) == {
        "proper": NOT_JUDGED,
        "census": NOT_JUDGED,
        "supports": HELD,
        "weights": HELD,
        "outliers": HELD,
        "shift": HELD,
        "drift": NOT_JUDGED,
        "reach": NOT_JUDGED,
        "polish": NOT_JUDGED,
    }
    for finding in verdict.findings:
        assert finding.sentence.endswith(".")
        assert (finding.value is None) == (finding.status == NOT_JUDGED)


def test_the_first_failure_gives_the_reason() -> None:
    verdict = verdict_of(scale=0.2)
    assert verdict.failed[0].name == "weights"
    assert verdict.reason == verdict.failed[0].sentence
    assert verdict.value("weights") == verdict.khat > 0.7


@pytest.mark.parametrize(("shape", "status"), [(0.66, HELD), (0.74, FAILED)])
def test_the_limit_of_khat_is_seven_tenths(shape: float, status: str) -> None:
    """Above, means of weighted draws err far more than their standard errors say."""
    levels = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    of_tail = -shape * (1 - levels).log()
    verdict = judge(of_tail, *normal_on_normal()[1:])[0]
    assert verdict.khat == pytest.approx(shape, abs=0.03)
    assert statuses(verdict)["weights"] == status


def test_a_model_that_forbids_every_draw_has_no_weights_to_judge() -> None:
    _, z, names = normal_on_normal()
    verdict = judge(torch.full((DRAWS,), -math.inf), z, names)[0]
    assert statuses(verdict)["supports"] == FAILED
    assert statuses(verdict)["weights"] == statuses(verdict)["shift"] == NOT_JUDGED


def test_a_draw_without_density_is_told_with_the_site_at_fault() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(x, 9.0, validate_args=False), obs=torch.tensor(0.5))

    density, guide = LogDensity(model), AutoFlow(model)
    density.introduce(guide)
    guide.whiten(torch.zeros(1), torch.eye(1))
    with forked(0):
        finding = judge_subject(Subject(guide, density, draws=500), [Supports()]).findings[0]
    assert "of the guide's draws have zero density under the model, such as one near x = " in str(
        finding
    )
    assert "where site 'y' gives -inf. " in finding.sentence
    assert finding.sentence.endswith("Restrict the priors to where the model has a density.")


class Moved(Drift):
    """A drift that runs no trajectories."""

    needs = ()

    def measure(self, subject: Subject) -> float:
        return 0.01

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        return "nothing moves."


CHEAP = [check for check in CHECKS if not check.costly]


def subject_of(*args: float, **kwargs: float) -> Subject:
    log_weights, z, names = normal_on_normal(*args, **kwargs)  # type: ignore[arg-type]
    return Subject.of_sample(ImportanceSample(z, log_weights), names)


def test_a_costly_check_is_left_out_once_another_has_failed() -> None:
    checks = [*CHEAP, Moved()]
    assert statuses(judge_subject(subject_of(), checks))["drift"] == HELD
    failed = judge_subject(subject_of(scale=0.2), checks).finding("drift")
    assert failed is not None
    assert (failed.status, failed.sentence) == (NOT_JUDGED, "a check before it has failed.")


def test_a_check_that_outlasts_the_time_is_not_judged() -> None:
    class Late(Moved):
        def measure(self, subject: Subject) -> float:
            raise TimeOver

    verdict = judge_subject(subject_of(), [*CHEAP, Late()])
    assert verdict.finding("drift") == Finding("drift", NOT_JUDGED, None, 0.1, TIME_OVER)
    assert verdict.ok
    assert "There was no time to check: drift." in str(verdict)


def test_draws_that_have_been_weighed_are_judged_even_after_the_time_is_over() -> None:
    with Deadline(0.0).enforced():
        verdict = judge_subject(subject_of(), [Shift(), Moved()])
        unsearched = judge_subject(subject_of(), [Modes(), Shift()])
    assert verdict.ok
    assert str(verdict).endswith("There was no time to check: drift.")
    # No weights show a mode that the guide misses.
    assert not unsearched.ok
    assert unsearched.reason.endswith("There was no time to check: census.")


def test_without_time_nothing_is_judged() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    density, guide = LogDensity(model), AutoFlow(model)
    density.introduce(guide)
    with Deadline(0.0).enforced():
        verdict = judge_subject(Subject(guide, density))
    assert set(statuses(verdict).values()) == {NOT_JUDGED}
    assert verdict.importance is None
    assert not verdict.ok


def test_the_weights_of_a_guide_whose_draws_are_polished_do_not_decide() -> None:
    subject = subject_of(scale=0.2)
    subject.trajectories = 30
    verdict = judge_subject(subject, CHEAP)
    assert set(statuses(verdict).values()) == {NOT_JUDGED}
    assert verdict.value("weights") == verdict.khat > 0.7
    assert verdict.shift > 0.1
    assert not verdict.ok


def test_polished_draws_are_trusted_only_if_they_forget_where_they_began() -> None:
    class Forgets(Polish):
        needs = ()

        def measure(self, subject: Subject) -> float:
            return 0.4

        def explain(self, subject: Subject, value: float, held: bool) -> str:
            return "the draws are mixed."

    class Remembers(Forgets):
        def measure(self, subject: Subject) -> float:
            return math.nan

    subject = subject_of(scale=0.2)
    subject.trajectories = 30
    good, bad = (judge_subject(subject, [*CHEAP, last]) for last in (Forgets(), Remembers()))
    assert good.ok and good.reason == "the draws are mixed."
    assert not bad.ok and bad.failed[0].name == "polish"


def test_findings_of_blocks_stand_beside_those_of_the_whole() -> None:
    whole = verdict_of()
    log_weights, z, names = normal_on_normal(0.3)
    block = judge_subject(
        Subject.of_sample(ImportanceSample(z, log_weights), names, block="school 3")
    )
    both = Verdict((*whole.findings, *block.findings), whole.importance)
    assert whole.ok and not both.ok
    assert both.reason.startswith("school 3: ")
    assert both.shift == whole.shift
    assert both.finding("shift", "school 3").value > 0.2  # type: ignore[union-attr, operator]
    assert "check_school 3_shift_value" in both.attributes()


class Vector(Guide):
    """A guide whose model is not known."""

    features = 2

    def sample_and_log_prob(self, n: int, rows: Any = None) -> tuple[Tensor, Tensor]:
        z = torch.randn(n, 2)
        return z, Normal(0.0, 1.0).log_prob(z).sum(-1)


def test_a_posterior_whose_density_is_not_known_is_drawn_and_says_that_it_was_not_judged() -> None:
    guide = Vector()
    verdict = judge_subject(Subject(guide, None))
    assert set(statuses(verdict).values()) == {NOT_JUDGED}
    assert not verdict.ok
    assert str(verdict) == (
        "Do not trust this posterior: it has not been judged, because the density of the model is "
        "not known."
    )
    posterior = Posterior(guide, None, verdict)
    assert posterior.sample(5, seed=0)["latent"].shape == (5, 2)
    assert math.isnan(posterior.log_evidence)
    assert "2 features" in repr(posterior)
    for call in (posterior.to_arviz, lambda: posterior.save("p.pt"), lambda: posterior.propose(5)):
        with pytest.raises(
            ValueError, match="Expected a posterior of a model whose density is known"
        ):
            call()


def test_making_a_posterior_computes_nothing() -> None:
    guide = Guide()
    posterior = Posterior(guide)
    assert not posterior.verdict.ok
    assert str(posterior.verdict) == "Do not trust this posterior: it has not been judged."


def test_a_verdict_as_plain_data() -> None:
    for verdict in (verdict_of(), verdict_of(scale=0.4), Verdict()):
        assert Verdict.from_plain(verdict.to_plain()) == verdict


class EvenDraws(Check):
    """A check of a user's own."""

    name, limit = "even draws", 0.1

    def measure(self, subject: Subject) -> float:
        return abs(float((subject.sample.z > 0).double().mean()) - 0.5)

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        return f"{value:.0%} too many draws are on one side."


def test_a_check_of_ones_own_is_among_the_findings() -> None:
    even, uneven = (judge_subject(subject_of(loc), [*CHECKS, EvenDraws()]) for loc in (0.0, 9.0))
    assert even.ok and statuses(even)["even draws"] == HELD
    finding = uneven.finding("even draws")
    assert finding is not None
    assert (finding.status, finding.sentence) == (
        FAILED,
        "50% too many draws are on one side.",
    )
