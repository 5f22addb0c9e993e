"""Whether to trust a posterior: the findings of all checks, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .importance import ImportanceSummary

__all__ = ["FAILED", "HELD", "NOT_JUDGED", "TIME_OVER", "Finding", "Verdict"]

HELD, FAILED, NOT_JUDGED = "held", "failed", "not judged"
#: The sentence of a check for which no time was left.
TIME_OVER = "the time limit was reached."


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: The check.
        status: ``"held"``, ``"failed"`` or ``"not judged"``.
        value: The number that was measured; ``None`` where there is none.
        limit: The largest value at which the check holds.
        sentence: What was found and what to do about it, or why the check was not made.
        block: The block of the posterior that it is about; ``None`` for the whole.
        grounds: Whether it is a reason to trust the posterior when it holds, instead of a search
            for one fault.
        remedy: The end of the sentence that says what to do about a failure.
    """

    name: str
    status: str
    value: float | None
    limit: float | None
    sentence: str
    block: str | None = None
    grounds: bool = False
    remedy: str = ""

    def __str__(self) -> str:
        where = "" if self.block is None else f" ({self.block})"
        return f"{self.name}{where}: {self.status}, {self.sentence}"

    def with_remedy(self, remedy: str) -> Finding:
        """Returns the finding with another remedy at the end of its sentence.

        Args:
            remedy: A sentence, or nothing.
        """
        found = self.sentence.removesuffix(self.remedy).rstrip()
        return replace(self, sentence=f"{found} {remedy}".rstrip(), remedy=remedy)


@dataclass(frozen=True)
class Verdict:
    r"""Whether to trust a posterior, and why.

    A posterior is trusted if no check has failed, at least one has held that is a reason for
    trust, and the time has not ended the census of modes. With draws :math:`z_i \sim q` of a guide
    the weights :math:`w_i = p(z_i, \mathrm{data}) / q(z_i)` show faults wherever the guide has draws; a census
    of modes and Hamiltonian trajectories look for faults elsewhere.

    Args:
        findings: The finding of each check.
        importance: The numbers that the weights give; ``None`` if the density of the model is not
            known.

    Reference:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", 2024,
        https://arxiv.org/abs/1507.02646

        Yao, Vehtari, Simpson, Gelman, "Yes, but did it work? Evaluating variational inference",
        2018, https://arxiv.org/abs/1802.02538

    Example:
        >>> shift = Finding("shift", HELD, 0.01, 0.1, "weighting moves no mean.", grounds=True)
        >>> print(Verdict((shift,)))
        Trust this posterior: weighting moves no mean.
    """

    findings: tuple[Finding, ...] = ()
    importance: ImportanceSummary | None = None

    def __str__(self) -> str:
        return f"{'Trust' if self.ok else 'Do not trust'} this posterior: {self.reason}"

    @property
    def ok(self) -> bool:
        """Whether to trust the posterior."""
        # Only a census sees a mode that all draws miss.
        return not self.failed and bool(self._held) and "census" not in self._late

    @property
    def reason(self) -> str:
        """The first failure with its remedy, or the best reason for trust."""
        if self.failed:
            first = self.failed[0]
            return first.sentence if first.block is None else f"{first.block}: {first.sentence}"
        if not self._grounds:
            return "it has not been judged."
        if not self._held:
            return f"it has not been judged, because {self._grounds[0].sentence}"
        late = f" There was no time to check: {', '.join(self._late)}." if self._late else ""
        return self._held[-1].sentence + late

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings that failed, in the order of the checks."""
        return tuple(finding for finding in self.findings if finding.status == FAILED)

    @property
    def _grounds(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.grounds]

    @property
    def _held(self) -> list[Finding]:
        return [finding for finding in self._grounds if finding.status == HELD]

    @property
    def _late(self) -> list[str]:
        """Names of the checks for which no time was left."""
        return [finding.name for finding in self.findings if finding.sentence == TIME_OVER]

    def with_remedy(self, remedy: str) -> Verdict:
        """Returns the verdict with another remedy for all failures that have one, and for all
        checks that were not made for want of time where none tells for or against the guide.

        Args:
            remedy: A sentence, such as one on what has ended the fit too early.
        """
        unjudged = not self._held and not self.failed
        late = f"{remedy[0].lower()}{remedy[1:]}"

        def remedied(finding: Finding) -> Finding:
            if unjudged and finding.sentence == TIME_OVER:
                return replace(finding, sentence=late)
            return finding.with_remedy(remedy) if finding.remedy else finding

        return replace(self, findings=tuple(map(remedied, self.findings)))

    def finding(self, name: str, block: str | None = None) -> Finding | None:
        """Returns the finding of a check, or ``None`` if there is none.

        Args:
            name: The check.
            block: The block that it is about; the whole by default.
        """
        for finding in self.findings:
            if (finding.name, finding.block) == (name, block):
                return finding
        return None

    def value(self, name: str) -> float:
        """Returns the value of a check of the whole posterior, or else the largest of its blocks;
        NaN if it was not measured."""
        found = [f for f in self.findings if f.name == name and f.value is not None]
        whole = [f.value for f in found if f.block is None] or [f.value for f in found]
        return max((value for value in whole if value is not None), default=math.nan)

    @property
    def khat(self) -> float:
        """Shape of the Pareto tail of the weights; above 0.7 they are unreliable."""
        return math.nan if self.importance is None else self.importance.khat

    @property
    def ess(self) -> float:
        """Effective sample size of the smoothed weights, as a fraction of the draws."""
        return math.nan if self.importance is None else self.importance.ess

    @property
    def elbo(self) -> float:
        r"""Evidence lower bound, the mean of :math:`\log w_i`."""
        return math.nan if self.importance is None else self.importance.elbo

    @property
    def log_evidence(self) -> float:
        r""":math:`\log \tfrac{1}{N} \sum_i w_i`, with smoothed weights."""
        return math.nan if self.importance is None else self.importance.log_evidence

    @property
    def log_evidence_error(self) -> float:
        """Monte Carlo standard error of the log evidence, of the region that draws reach."""
        return math.nan if self.importance is None else self.importance.log_evidence_error

    @property
    def draws(self) -> int:
        """How many draws of the guide were weighed."""
        return 0 if self.importance is None else self.importance.draws

    @property
    def shift(self) -> float:
        """The furthest that weighting moves a mean, in standard deviations, or a log width."""
        return self.value("shift")

    @property
    def missed(self) -> float:
        """Mass that a census sees where the guide has next to none, relative to the evidence."""
        return self.value("census")

    @property
    def drift(self) -> float:
        """The furthest that trajectories move a mean or log width, beyond sampling error."""
        return self.value("drift")

    def attributes(self) -> dict[str, Any]:
        """Returns the verdict, its numbers and each finding as strings and numbers by name."""
        named: dict[str, Any] = {"verdict": str(self)}
        if self.importance is not None:
            numbers = asdict(self.importance)
            named |= {"ess_fraction": numbers.pop("ess"), **numbers}
        for finding in self.findings:
            name = "_".join(filter(None, ["check", finding.block, finding.name]))
            named[name] = finding.status
            if finding.value is not None:
                named[f"{name}_value"] = finding.value
        return named

    def to_plain(self) -> dict[str, Any]:
        """Returns the verdict as numbers, strings, lists and dictionaries."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "importance": None if self.importance is None else asdict(self.importance),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Verdict:
        """Makes a verdict from the result of :meth:`to_plain`."""
        findings = tuple(Finding(**finding) for finding in plain["findings"])
        importance = plain["importance"]
        return cls(findings, None if importance is None else ImportanceSummary(**importance))
