"""A verdict on a guide: on the whole of it, or by its parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._deadline import TimeOver
from ..guides.marginal_mode import MarginalMode, find_marginal_mode
from ..guides.surrogate import PolynomialDensity
from ..model.double import site_sizes
from ..model.sites import is_improper, sample_nodes
from ..sampling.spaces import mean_and_root
from .checks import (
    Check,
    Drift,
    Modes,
    Outliers,
    Proper,
    Reach,
    Shift,
    Supports,
    Weights,
    judge_subject,
    make_checks,
)
from .importance import ImportanceSample
from .local_modes import missed_locals
from .marginal_census import prior_globals, take_marginal_census
from .marginal_subject import FlowOfGlobals, GlobalDensity, MarginalSubject
from .subject import JUDGE_DRAWS, Subject, known_density, usable_draws
from .verdict import HELD, Verdict

if TYPE_CHECKING:
    from ..guides import AutoStructuredFlow
    from ..guides.guide import Guide
    from ..model.density import LogDensity
    from .census import Census

__all__ = ["judge_guide"]

# Draws of a guide with locals, each of which costs an evaluation of all second derivatives.
STRUCTURED_DRAWS, DEAR_DRAWS = 2000, 1000
# So many latent entries, or rows of data, make one dear.
LARGE, MANY_ROWS = 2048, 2**14

#: The checks of a posterior by its parts: those of the globals that come first, those of the whole,
#: and those of the globals that come last.
FIRST: list[Check] = [Proper(), Modes()]
WHOLE: list[Check] = [Supports(), Weights(), Outliers(), Shift()]
LAST: list[Check] = [Drift(), Reach()]


def some_locals(subject: Subject) -> str | None:
    """Returns a sentence if all latents of a structured guide are globals."""
    guide: AutoStructuredFlow = subject.guide  # type: ignore[assignment]
    return None if len(guide.reference) else "the model has no locals."


class LocalModes(Check):
    """Looks for modes of the locals given the globals other than the one that the guide has."""

    name, limit, costly = "census", Modes.limit, True
    needs = (known_density, some_locals, usable_draws)

    def measure(self, subject: Subject) -> float:
        """The mass at other modes, relative to the evidence."""
        guide: AutoStructuredFlow = subject.guide  # type: ignore[assignment]
        g = subject.sample.z[subject.sample.usable][:, guide.marginal.structure.globals]
        return missed_locals(guide, g, subject.sample.log_evidence)

    def explain(self, subject: Subject, value: float, held: bool) -> str:
        """Says how much is missed."""
        if held:
            return "the locals have no other mode that carries mass."
        return (
            f"given the globals, about {value / (1 + value):.0%} of the posterior's mass is at "
            "other modes of the locals than those that the guide follows."
        )

    def advise(self, subject: Subject) -> str:
        """Says how to be rid of such modes."""
        return "Break the model's symmetry, or fit with a dense flow such as guide=pf.RealNVP."


def judge_guide(
    guide: Guide,
    density: LogDensity,
    census: Census | Callable[[], Census | None] | None,
    trajectories: int = 0,
    remedy: str = Subject.remedy,
    draws: int = JUDGE_DRAWS,
) -> tuple[Verdict, ImportanceSample | None]:
    """Judges a guide, by its parts if it has globals whose density is known with locals integrated
    out.

    Args:
        guide: The guide.
        density: The log density of the model.
        census: A census of the modes of the whole; ``None`` if none was taken; or what takes it,
            which is left out if the weights show that the guide is off.
        trajectories: Trajectories by which draws of the guide are polished.
        remedy: What may mend the guide if it is not exact, in the imperative.
        draws: How many draws of the guide are weighed, at most.

    Returns:
        The verdict, and the weighted draws; ``None`` for these if there was no time for them.
    """
    if guide.has_marginal:
        return _judge_parts(guide, density, remedy, draws)  # type: ignore[arg-type]
    subject = Subject(guide, density, None, trajectories, remedy, draws)
    if not callable(census):
        subject.census = census
    elif all(check.find(subject, failed=False).status == HELD for check in WHOLE):
        subject.census = census()
    verdict = judge_subject(subject)
    return verdict, subject.sample if subject.weighed else None


def _judge_parts(
    guide: AutoStructuredFlow, density: LogDensity, remedy: str, draws: int
) -> tuple[Verdict, ImportanceSample | None]:
    """Judges the weights of the whole, and the globals with the locals integrated out."""
    many_rows = max(site_sizes(density)) > MANY_ROWS
    dear = density.features > LARGE or many_rows or guide.core is not None
    most = DEAR_DRAWS if dear else STRUCTURED_DRAWS
    whole = Subject(guide, density, remedy=remedy, draws=min(draws, most))
    try:
        globals_ = _make_globals(guide, whole.sample, remedy)
    except TimeOver:
        findings = make_checks(_paired(WHOLE, whole))
    else:
        findings = make_checks(
            [
                *_paired(FIRST, globals_),
                *_paired(WHOLE, whole),
                (LocalModes(), whole),
                *_paired(LAST, globals_),
            ]
        )
    sample = whole.sample if whole.weighed else None
    return Verdict(findings, None if sample is None else sample.summary()), sample


def _paired(checks: Sequence[Check], subject: Subject) -> list[tuple[Check, Subject]]:
    return [(check, subject) for check in checks]


def _make_globals(
    guide: AutoStructuredFlow, whole: ImportanceSample, remedy: str
) -> MarginalSubject:
    """The globals before their judges."""
    entries = guide.marginal.structure.globals
    g = whole.z[:, entries]
    flow = FlowOfGlobals(guide.flow, len(entries))
    sample = _weigh_globals(guide, g, whole)
    loc, root = mean_and_root(g.double())
    surrogate = PolynomialDensity(loc, root)
    with torch.no_grad():
        surrogate.fit(g, sample.log_weights.to(g.device) + flow.log_prob(g))
    mode = MarginalMode(loc, root, guide.reference, 0, True)
    subject = MarginalSubject(
        flow,
        GlobalDensity(guide.marginal, guide.log_marginal),
        _take_census(guide, mode),
        remedy=remedy,
        surrogate=surrogate,
    )
    subject.sample = sample
    return subject


@torch.no_grad()
def _weigh_globals(
    guide: AutoStructuredFlow, g: Tensor, whole: ImportanceSample
) -> ImportanceSample:
    """The globals with weights of their own, which are those of the whole if the locals have none."""
    if guide.weighs_globals_alone:
        return ImportanceSample(g, whole.log_weights)
    return ImportanceSample(g, guide.log_marginal(g) - guide.flow().log_prob(g))


def _take_census(guide: AutoStructuredFlow, mode: MarginalMode) -> Census | None:
    def ascend(start: Tensor) -> MarginalMode:
        integrated = guide.leaves or guide.marginal
        near = guide.near(start.unsqueeze(0))[0]
        return find_marginal_mode(integrated, start=start, reference=near)

    with contextlib.suppress(TimeOver):
        prior = prior_globals(guide.marginal)
        improper = _improper_globals(guide)
        return take_marginal_census(guide.log_marginal, mode, ascend, prior, improper=improper)
    return None


def _improper_globals(guide: AutoStructuredFlow) -> list[int]:
    """Which globals have an improper prior, by their numbers."""
    density, entries = guide.marginal.density, guide.marginal.structure.globals.tolist()
    nodes = dict(sample_nodes(density.trace()))
    flat = [is_improper(nodes[s.name]["fn"]) for s in density.sites for _ in range(s.features)]
    return [number for number, entry in enumerate(entries) if flat[entry]]
