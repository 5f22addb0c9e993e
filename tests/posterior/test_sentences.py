"""The sentence of a verdict fits what was found and what was done."""

from __future__ import annotations

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows._deadline import Deadline
from pyroflows.model import LogDensity
from pyroflows.posterior.checks import CHECKS, Check, Drift, Reach, Weights, judge_subject
from pyroflows.posterior.climb import OWN_REMEDY, REMEDY, Climb
from pyroflows.posterior.importance import ImportanceSample
from pyroflows.posterior.marginal_subject import MarginalSubject
from pyroflows.posterior.subject import Subject
from pyroflows.posterior.verdict import FAILED, HELD, Finding, Verdict

JUDGED = Subject(None, None).remedy

# The sentence found, and the remedy with which it was found.
FOUND = "the guide misses a region."
OVER = "ended the fit at the mixture; allow more time."


def model() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def climb_with(own: bool, limit: float | None, elapsed: float) -> Climb:
    times = iter([0.0])
    guide = pf.AutoFlow(model) if own else None
    deadline = Deadline(limit, clock=lambda: next(times, elapsed))
    climb = Climb(LogDensity(model), 100, deadline, guide)
    if guide is not None:
        climb.density.introduce(guide)
    return climb


@pytest.mark.parametrize(
    ("own", "limit", "elapsed", "out_of_steps", "interrupted", "remedy"),
    [
        (False, None, 99.0, False, False, "Mend it."),
        (False, 200.0, 99.0, False, False, "Mend it."),
        (False, 40.0, 99.0, False, False, f"The time limit of 40 s {OVER}"),
        (True, 40.0, 99.0, False, False, f"The time limit of 40 s {OVER}"),
        (False, 40.0, 99.0, True, False, f"The time limit of 40 s {OVER}"),
        (
            False,
            None,
            99.0,
            True,
            False,
            "The steps of training were used up at the mixture; allow more steps.",
        ),
        # All steps are what a guide of one's own is given.
        (True, None, 99.0, True, False, "Mend it."),
        (False, 40.0, 99.0, True, True, "Let the fit run to its end."),
    ],
)
def test_what_ended_a_fit_too_early_is_told_in_place_of_a_remedy(
    own: bool,
    limit: float | None,
    elapsed: float,
    out_of_steps: bool,
    interrupted: bool,
    remedy: str,
) -> None:
    climb = climb_with(own, limit, elapsed)
    climb.judge("mixture, 150 steps", climb.guide or climb.first_flow)
    assert climb.best is not None
    failed = Finding("census", FAILED, 0.5, 0.02, FOUND).with_remedy("Mend it.")
    climb.best.verdict = Verdict((failed,))
    climb.out_of_steps, climb.interrupted = out_of_steps, interrupted
    assert climb.result().verdict.reason == f"{FOUND} {remedy}"


def test_a_failure_without_a_remedy_of_the_fit_keeps_its_sentence() -> None:
    """More time does not make an improper posterior proper."""
    improper = Finding("proper", FAILED, 1.0, 0.0, "give the site a proper prior.")
    assert Verdict((improper,)).with_remedy("Allow more time.").findings == (improper,)
    held = Finding("shift", HELD, 0.0, 0.1, "all is well.", grounds=True)
    assert str(Verdict((held,)).with_remedy("Allow more time.")).endswith("all is well.")


def fixed_subject(remedy: str) -> Subject:
    z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    subject = Subject.of_sample(ImportanceSample(z, 2 * z.square().sum(-1)), ["a", "b"])
    subject.remedy = remedy
    return subject


WEIGHTS = [check for check in CHECKS if check.name in ("weights", "shift")]


@pytest.mark.parametrize("check", WEIGHTS, ids=lambda check: check.name)
@pytest.mark.parametrize(
    ("remedy", "start"),
    [
        (REMEDY, "Hand a richer flow to guide=, or "),
        (OWN_REMEDY, 'Give the guide more steps or a wider flow, or fit with guide="auto", or '),
        (JUDGED, 'Train the guide longer or fit with guide="auto", or '),
    ],
)
def test_each_remedy_is_one_that_has_not_been_tried(check: Check, remedy: str, start: str) -> None:
    found = check.find(fixed_subject(remedy))
    assert found.status == FAILED
    assert found.remedy.startswith(start)
    assert found.sentence.endswith(f". {found.remedy}")
    assert ('guide="auto"' in found.sentence) == (remedy != REMEDY)


def test_the_ladder_is_not_advised_to_one_who_has_climbed_it() -> None:
    climb = climb_with(own=False, limit=None, elapsed=1.0)
    guide = climb.first_flow
    guide.whiten(torch.full((2,), 3.0), torch.eye(2))
    verdict = climb.judge("flow", guide)
    assert verdict.failed
    assert not any('guide="auto"' in finding.sentence for finding in verdict.findings)


def test_the_reason_is_the_first_failure_with_its_remedy() -> None:
    verdict = judge_subject(fixed_subject(REMEDY))
    first = verdict.failed[0]
    assert verdict.reason == first.sentence
    assert first.remedy and first.sentence.endswith(first.remedy)
    changed = verdict.with_remedy("Allow more time.")
    assert changed.reason.endswith("Allow more time.") and first.remedy not in changed.reason
    assert [f.status for f in changed.findings] == [f.status for f in verdict.findings]


@pytest.mark.parametrize("check", [Drift(), Reach()])
def test_chains_are_called_what_they_are(check: Check) -> None:
    density = LogDensity(model)
    guide = pf.AutoFlow(model, init_scale=1.0)
    density.introduce(guide)
    values = SimpleNamespace(
        log_prob=density.log_prob, entry_names=["x[0]", "x[1]"], describe=lambda z: "far off"
    )
    globals_ = MarginalSubject(guide, values, surrogate=density, draws=200, chains=20)
    whole = Subject(guide, density, draws=200)
    for subject, movers in (
        (globals_, "Metropolis chains of the globals"),
        (whole, "Hamiltonian trajectories"),
    ):
        assert movers in check.explain(subject, 0.0, held=True)
        beyond = {"roamed": torch.zeros(1, 2), "lies_beyond": lambda z: z[:, 0] == 0}
        vars(subject).update(moved=subject.starts, **beyond)
        assert movers in check.explain(subject, 0.5, held=False)


def test_a_far_tail_of_little_weight_is_called_one() -> None:
    class FarTail(ImportanceSample):
        khat, ess = 1.2, 0.99

    sample = FarTail(torch.randn(200, 1), torch.zeros(200))
    finding = Weights().find(Subject.of_sample(sample, ["x"]))
    assert finding.status == HELD
    assert finding.sentence.startswith("99% of the importance draws are effective (k-hat 1.20: a ")
    assert "far tail of little weight" in finding.sentence
