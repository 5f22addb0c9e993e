"""The checks of a verdict: each has a name, a limit, a test and a sentence.

A new check is a class here and an entry of :data:`CHECKS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from .._deadline import TimeOver, check_time
from ..sampling.polishing import autocorrelation, drift
from .subject import (
    KHAT_LIMIT,
    Need,
    Subject,
    gained,
    known_density,
    polished_draws,
    taken_census,
    usable_draws,
    usable_trajectories,
)
from .verdict import FAILED, HELD, NOT_JUDGED, TIME_OVER, Finding, Verdict

__all__ = ["CHECKS", "Check", "judge_subject", "make_checks"]


class Check(ABC):
    """One part of a verdict: a number that may not exceed a limit, and a sentence about it.

    Attributes:
        name: A word for the check.
        limit: The largest value at which it holds.
        grounds: Whether it is a reason to trust the posterior when it holds, instead of a search
            for one fault.
        of_weights: Whether it looks at the guide's own draws, which do not decide where draws are
            polished. Once these are weighed it costs next to nothing, and is made even after the
            time is over.
        costly: Whether it runs trajectories, so that it is left out once a check has failed.
        needs: What must be known of a subject; each returns a sentence on what is lacking, or
            ``None``.
    """

    name: ClassVar[str]
    limit: ClassVar[float]
    grounds: ClassVar[bool] = False
    of_weights: ClassVar[bool] = False
    costly: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = (known_density,)

    @abstractmethod
    def measure(self, subject: Subject) -> float:
        """Returns the value that is held against the limit."""

    @abstractmethod
    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Returns a sentence about the value."""

    def advise(self, subject: Subject) -> str:
        """Returns a sentence on how to mend a failure, or nothing."""
        return ""

    def holds(self, subject: Subject, value: float) -> bool:
        """Returns whether the check holds; NaN does not."""
        return value <= self.limit

    def find(self, subject: Subject, failed: bool = False) -> Finding:
        """Makes the check.

        Args:
            subject: The guide and all that is known of it.
            failed: Whether a check before this one has failed.

        Returns:
            The finding.
        """
        try:
            if not (self.of_weights and subject.weighed):
                check_time()
            obstacle = self._obstacle(subject, failed)
            value = self.measure(subject) if obstacle is None else None
        except TimeOver:
            obstacle, value = TIME_OVER, None
        if obstacle is not None or value is None:
            return self._finding(subject, NOT_JUDGED, None, obstacle or "")
        if self.of_weights and subject.trajectories:
            return self._finding(subject, NOT_JUDGED, value, "the guide's draws are polished.")
        held = self.holds(subject, value)
        sentence = self.explain(subject, value, held)
        if held:
            return self._finding(subject, HELD, value, sentence)
        return self._finding(subject, FAILED, value, sentence).with_remedy(self.advise(subject))

    def _obstacle(self, subject: Subject, failed: bool) -> str | None:
        """Returns a sentence on why the check cannot be made, or ``None``."""
        for need in self.needs:
            lack = need(subject)
            if lack is not None:
                return lack
        return "a check before it has failed." if self.costly and failed else None

    def _finding(
        self, subject: Subject, status: str, value: float | None, sentence: str
    ) -> Finding:
        return Finding(self.name, status, value, self.limit, sentence, subject.block, self.grounds)


class Proper(Check):
    """Looks for a direction in which the density does not fall off."""

    name, limit, needs = "proper", 0.0, (taken_census,)

    def measure(self, subject: Subject) -> float:
        """One if there is such a direction, zero if none was found."""
        return float(len(subject.flat_entries) > 0)

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Names the entries that change the most along the direction."""
        if held:
            return "the density falls off along all axes of its bulk."
        names = " and ".join(subject.flat_entries)
        return (
            f"the posterior cannot be normalised: its density does not fall off along {names}. "
            "Give the site a proper prior, or look for a parameter that the data say nothing of."
        )


class Modes(Check):
    """Looks for mass that a census of the modes sees where the guide has next to none."""

    name, limit, needs = "census", 0.02, (taken_census, known_density, usable_draws)

    def measure(self, subject: Subject) -> float:
        """The greatest mass that is missed, relative to the evidence."""
        return float(subject.missed.amax())

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Says how much is missed and where."""
        if held:
            return "a census of the modes finds none that the guide misses."
        where = subject.describe(subject.fits.loc[subject.missed.argmax()])
        return (
            f"the guide misses a region with about {value / (1 + value):.0%} of the posterior's "
            f"mass, {where}, which importance sampling cannot see."
        )

    def advise(self, subject: Subject) -> str:
        """Tells the two kinds of such regions apart."""
        return (
            f"{_capitalise(subject.remedy)}; break the model's symmetry if that is a mode of its "
            "own; reparametrise if it lies next to the region that the guide covers, as the neck "
            "of a funnel does."
        )


class Supports(Check):
    """Looks for draws that the model gives no density."""

    name, limit, of_weights = "supports", 0.01, True

    def measure(self, subject: Subject) -> float:
        """The share of such draws."""
        return subject.sample.zero_share

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Says how many such draws there are."""
        if value == 1.0:
            return f"the model gives every draw of the guide zero density{subject.forbidden}."
        if held:
            return f"the model gives {1 - value:.0%} of the guide's draws a density."
        return (
            f"{value:.0%} of the guide's draws have zero density under the model"
            f"{subject.forbidden}. {_capitalise(_facts(subject))}."
        )

    def advise(self, subject: Subject) -> str:
        """Says where a prior has to end."""
        return "Restrict the priors to where the model has a density."


class Weights(Check):
    """Looks at the tail of the weights, and at how many draws they leave effective."""

    name, limit, of_weights = "weights", KHAT_LIMIT, True
    needs = (known_density, usable_draws)
    ess_limit: ClassVar[float] = 0.9

    def measure(self, subject: Subject) -> float:
        """k-hat, the shape of the tail."""
        return subject.sample.khat

    def holds(self, subject: Subject, value: float) -> bool:
        """A far tail of little weight does no harm."""
        return value < self.limit or subject.sample.ess > self.ess_limit

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Gives both numbers, and the entry at which the guide is off the most."""
        if held:
            return f"{_harmless_facts(subject)}."
        name = _most_shifted(subject)
        return (
            f"{_facts(subject)} (k-hat below {self.limit} or {self.ess_limit:.0%} would do), so the guide "
            f"misses part of it, most at {name}."
        )

    def advise(self, subject: Subject) -> str:
        """Names the entry at which the guide is off the most."""
        return _advice(subject, f"reparametrise {_most_shifted(subject)}")


class Outliers(Check):
    """Looks for a few draws of great weight, which smoothing hides: they hit a narrow region."""

    name, limit, of_weights = "outliers", 0.05, True
    needs = (known_density, usable_draws)

    def measure(self, subject: Subject) -> float:
        """The share of all weight that smoothing takes away."""
        return subject.sample.smoothed_away

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Says how much weight they carry."""
        if held:
            return "no handful of the guide's draws carries much of the weight."
        return (
            f"a handful of the guide's draws carry {value:.0%} of all weight, so there is a narrow "
            f"region that it misses ({_facts(subject)} otherwise)."
        )

    def advise(self, subject: Subject) -> str:
        """Says where to look."""
        return _advice(subject, "look at the draws of greatest weight")


class Shift(Check):
    """Looks at how far weighting moves the means and the widths of the draws."""

    name, limit, of_weights, grounds = "shift", 0.1, True, True
    needs = (known_density, usable_draws)

    def measure(self, subject: Subject) -> float:
        """The furthest that an entry moves, in standard deviations."""
        return float(subject.sample.shifts.amax())

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Gives the numbers of the weights, and the entry that moves the most."""
        if not held:
            return (
                f"{_facts(subject)}, but weighting moves {_most_shifted(subject)} by {value:.2f} "
                f"of its standard deviation (at most {self.limit} is fine)."
            )
        most = max(value, 0.005)
        return (
            f"{_harmless_facts(subject)}, and weighting moves no mean or width by more than "
            f"{most:.2f}."
        )

    def advise(self, subject: Subject) -> str:
        """Names the entry that moves the most."""
        return _advice(subject, f"reparametrise {_most_shifted(subject)}")


class Drift(Check):
    """Looks at how far trajectories move draws; draws of the posterior stay as they are."""

    name, limit, costly = "drift", 0.1, True
    needs = (known_density, usable_trajectories)

    def measure(self, subject: Subject) -> float:
        """The furthest that the moments of an entry move, beyond two standard errors."""
        return float(self._drifts(subject).amax())

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Names the entry that moves the most."""
        name = subject.entry_names[int(self._drifts(subject).argmax())]
        moved = f"{value:.2f} of its standard deviation"
        if held:
            most = max(value, 0.005)
            return f"{subject.movers} move no mean or width by more than {most:.2f}."
        if subject.trajectories:
            return (
                f"{_guide_alone(subject)}, and after {subject.trajectories} Hamiltonian "
                f"trajectories its draws of {name} still move by more than {moved}."
            )
        return (
            f"the weights see nothing wrong, but {subject.movers} from the guide's draws "
            f"move {name} by more than {moved}, so the guide misses a region next to what it "
            "covers."
        )

    def advise(self, subject: Subject) -> str:
        """Names the entry that moves the most."""
        name = subject.entry_names[int(self._drifts(subject).argmax())]
        return _advice(subject, f"reparametrise {name}")

    @staticmethod
    def _drifts(subject: Subject) -> torch.Tensor:
        if subject.trajectories:
            return drift(subject.halfway, subject.moved, len(subject.starts))
        return drift(subject.starts, subject.moved, subject.effective_starts)


class Reach(Check):
    """Looks for mass next to the region that a guide covers, by chains that roam from its draws."""

    name, limit, costly = "reach", 0.01, True
    needs = (known_density, usable_trajectories, usable_draws)

    def measure(self, subject: Subject) -> float:
        """The share of the chains that come to where the guide has next to no density."""
        starts, ends = subject.roamers, subject.roamed
        return gained(subject.lies_beyond(starts), subject.lies_beyond(ends))

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Says how many chains leave the region that the guide covers, and where they go."""
        if held:
            return f"{subject.rovers} from the guide's draws stay where it has density."
        beyond = subject.roamed[subject.lies_beyond(subject.roamed)]
        return (
            f"{subject.rovers} take at least {value:.0%} of the draws to where the guide has "
            f"next to no density, {subject.describe(beyond[0])}, so it cuts the posterior short."
        )

    def advise(self, subject: Subject) -> str:
        """Says how to make a posterior easier to follow."""
        return _advice(subject, "reparametrise so that the posterior is less thin and bent")


class Polish(Check):
    """Looks at whether polished draws still depend on their starts, so that modes weigh wrongly."""

    name, limit, costly, grounds = "polish", 0.5, True, True
    needs = (known_density, usable_trajectories, polished_draws)

    def measure(self, subject: Subject) -> float:
        """The greatest correlation of an entry with itself half the trajectories before."""
        # With reliable weights the start is right, and need not be forgotten.
        return (
            0.0
            if subject.reliable
            else float(autocorrelation(subject.halfway, subject.moved).amax())
        )

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Says how well the draws are mixed."""
        if not held:
            slowest = int(autocorrelation(subject.halfway, subject.moved).argmax())
            return (
                f"{_guide_alone(subject)}, and polished draws of {subject.entry_names[slowest]} "
                "remember where they began, so that modes may have the wrong weights."
            )
        drifts = drift(subject.halfway, subject.moved, len(subject.starts))
        return (
            f"the guide alone is not exact (k-hat {subject.sample.khat:.2f}, "
            f"{subject.sample.ess:.0%} of the importance draws are effective), but its draws are "
            f"polished by {subject.trajectories} Hamiltonian trajectories, the second half of "
            f"which moves no mean or width by more than {max(float(drifts.amax()), 0.005):.2f} "
            "standard deviations beyond its error."
        )

    def advise(self, subject: Subject) -> str:
        """Names the chains that jump between modes."""
        return _advice(subject, "draw by pyroflows.flow_mc")


#: All checks, in the order in which they are made: the first that fails gives the reason of a
#: verdict.
CHECKS: list[Check] = [
    Proper(),
    Modes(),
    Supports(),
    Weights(),
    Outliers(),
    Shift(),
    Drift(),
    Reach(),
    Polish(),
]


def judge_subject(subject: Subject, checks: Sequence[Check] = CHECKS) -> Verdict:
    """Makes all checks for which there is time.

    Args:
        subject: The guide and all that is known of it; its draws come from torch's random state.
        checks: The checks, in order.

    Returns:
        The verdict, with one finding for each check.

    Example:
        >>> from pyroflows.posterior.importance import ImportanceSample
        >>> z = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> sample = ImportanceSample(z, torch.zeros(1000))
        >>> verdict = judge_subject(Subject.of_sample(sample, ["x"]))
        >>> verdict.ok, verdict.log_evidence
        (True, 0.0)
        >>> print(verdict.finding("census"))
        census: not judged, no census of the modes was taken.
    """
    findings = make_checks([(check, subject) for check in checks])
    return Verdict(findings, subject.sample.summary() if subject.weighed else None)


def make_checks(checks: Sequence[tuple[Check, Subject]]) -> tuple[Finding, ...]:
    """Makes checks of one subject or several, of which costly ones are left out after a failure.

    Args:
        checks: The checks, in order, each with its subject.

    Returns:
        One finding for each.
    """
    findings: list[Finding] = []
    for check, subject in checks:
        failed = any(finding.status == FAILED for finding in findings)
        findings.append(check.find(subject, failed))
    return tuple(findings)


def _most_shifted(subject: Subject) -> str:
    return subject.entry_names[int(subject.sample.shifts.argmax())]


def _guide_alone(subject: Subject) -> str:
    return f"the guide is not exact (k-hat {subject.sample.khat:.2f})"


def _advice(subject: Subject, other: str) -> str:
    return f"{_capitalise(subject.remedy)}, or {other}."


def _capitalise(text: str) -> str:
    return text[0].upper() + text[1:]


def _harmless_facts(subject: Subject) -> str:
    """The numbers of weights that hold, with a word on a k-hat that is large even so."""
    khat, ess = subject.sample.khat, subject.sample.ess
    if not (math.isfinite(khat) and khat >= KHAT_LIMIT):
        return _facts(subject)
    tail = f"k-hat {khat:.2f}: a far tail of little weight is off"
    return f"{ess:.0%} of the importance draws are effective ({tail})"


def _facts(subject: Subject) -> str:
    khat, ess = subject.sample.khat, subject.sample.ess
    if khat == -math.inf:
        kind = "all of equal weight" if ess > 0.999 else "their weights bounded"
        return f"{ess:.0%} of the importance draws are effective, {kind}"
    return f"k-hat is {khat:.2f} and {ess:.0%} of the importance draws are effective"
