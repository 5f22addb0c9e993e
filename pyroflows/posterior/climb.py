"""A fit under way, and the rungs that it climbs."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._checks import caller_level
from .._deadline import Deadline, TimeOver
from .._random import forked
from ..flows import Flow, RealNVP
from ..guides import AutoFlow, AutoStructuredFlow
from ..guides.guide import Guide
from ..model.base import Density
from ..model.density import LogDensity
from ..model.explanation import explain
from ..model.minibatch import MiniBatchDensity
from ..nn import mlp
from ..train import processes
from ..train.marginal import MarginalFit
from ..train.training import train
from ..transforms import Elementwise, Transform
from ..univariate import SumOfSquares
from .census import Census, find_start, take_census
from .importance import ImportanceSample
from .judging import judge_guide
from .posterior import Attempt, Posterior
from .refit import VectorKL
from .subject import JUDGE_DRAWS
from .verdict import Verdict

__all__ = ["Climb", "Rung", "choose_better", "climb_ladder", "has_failed", "make_narrow_flow"]

# Share of the time that a census leaves: draws are weighed with fewer evaluations than it makes.
LEFT_BY_CENSUS = 1 / 4
# Share of the time that the search of a structured guide leaves.
LEFT_BY_SEARCH = 1 / 2
# How much longer a verdict may take than one on a guide that has not been trained.
UNTRAINED = 2.0
# A flow over more latents at once needs more memory than there is.
MOST_DENSE = 2048
# Remedies that are left, once all rungs have been tried or a guide of the user's has been trained.
REMEDY = "hand a richer flow to guide="
OWN_REMEDY = 'give the guide more steps or a wider flow, or fit with guide="auto"'


class Climb:
    """A fit under way: its census, its attempts so far, and the steps and time that are left.

    Args:
        density: The log density that flows are trained on, of all data or of mini-batches.
        steps: Most steps of training.
        deadline: The time that is left.
        own: A guide that the user has chosen; ``None`` for those of the ladder.
        settings: Further keyword arguments of :func:`pyroflows.train.train`.

    Attributes:
        density: The log density of all data.
        census: The census of the modes; ``None`` until it is taken.
        guide: The guide of the attempt under way.
        sample: The weighted draws by which the last attempt was judged.
        best: The best attempt so far.
        obstacle: Why no guide follows the structure of the model, if that was looked for.
        judging: Seconds that the longest verdict so far has taken.
        marginal_fit: Trains the flow of a structured guide; there once such a guide has been made.
    """

    marginal_fit: MarginalFit

    def __init__(
        self,
        density: LogDensity | MiniBatchDensity,
        steps: int,
        deadline: Deadline,
        own: AutoFlow | AutoStructuredFlow | None = None,
        **settings: Any,
    ) -> None:
        self.trained, self.density = density, density.full
        self.start = find_start(self.density)
        self.steps_left, self.deadline, self.settings = steps, deadline, settings
        self.own = own
        self.census: Census | None = None
        self.guide: Guide | None = own
        self.sample: ImportanceSample | None = None
        self.best: Posterior | None = None
        self.attempts: list[Attempt] = []
        self.history: list[Tensor] = []
        self.interrupted = self.out_of_steps = self.has_census = False
        self.obstacle: ValueError | None = None
        self.judging = 0.0

    @cached_property
    def first_flow(self) -> AutoFlow:
        """The flow of the first rungs, a Gaussian until it is trained."""
        return self.make_flow(make_narrow_flow)

    def make_flow(self, flow: Callable[[int], Flow | Transform]) -> AutoFlow:
        """Makes a guide that starts at the best Gaussian of the census.

        Args:
            flow: Makes a flow or transform from the number of features.
        """
        density = self.density
        guide = AutoFlow(density.continuous_model, flow, density.init_loc_fn)
        density.introduce(guide)
        if self.census is not None:
            guide.whiten(self.census.best.loc, self.census.best.scale_tril)
        return guide

    def train(self, flow: Flow, steps: int) -> int:
        """Trains a flow for as many steps as are left, and returns how many it took."""
        return self._train(flow, steps, self.history)

    def train_on(self, z: Tensor, flow: Flow, steps: int) -> int:
        """Trains a flow by maximum likelihood, for as many steps as are left.

        Args:
            z: Draws of the posterior, of shape ``(n, features)``.
            flow: The flow.
            steps: Most steps to take.

        Returns:
            How many it took.
        """
        # The history holds ELBOs.
        return self._train(flow, steps, [], objective=VectorKL(z))

    def train_in_place(self, density: Density, flow: Flow, steps: int, **options: Any) -> int:
        """Trains a flow on a density that stands for another, for as many steps as are left.

        Args:
            density: The density.
            flow: The flow.
            steps: Most steps to take.
            options: Keyword arguments of :func:`pyroflows.train.train`.

        Returns:
            How many it took.
        """
        return self._train(flow, steps, self.history, density, **options)

    def _train(
        self,
        flow: Flow,
        steps: int,
        history: list[Tensor],
        density: Density | None = None,
        **options: Any,
    ) -> int:
        self.out_of_steps |= steps > self.steps_left
        steps = min(steps, self.steps_left)
        # A guide is of use only with a verdict on it, for which a trained one takes longer.
        judging = self.judging if self.history else UNTRAINED * self.judging
        settings = {"deadline": self.deadline.earlier(judging), **self.settings, **options}
        # In training, processes evaluate points of their own, and agree on the time at each step.
        alone = processes.world_size() == 1
        with contextlib.nullcontext() if alone else Deadline().enforced():
            report = train(flow, density or self.trained, history, steps, **settings)
        self.steps_left -= report.steps
        return report.steps

    def attempt(self, rung: Rung) -> bool:
        """Makes, trains and judges the guide of a rung.

        Args:
            rung: The rung.

        Returns:
            Whether the fit is over: a guide is trusted, none can be, or the time is over.
        """
        if self.density.features > rung.most_features:
            return False
        if rung.needs_census and not self._may_be_dense():
            return True
        if rung.needs_census and not self.has_census:
            self.take_census()
        guide = self._make(rung)
        if guide is None:
            return False
        self.guide, taken = guide, 0
        for steps in rung.rounds:
            if steps and not self.steps_left:
                self.out_of_steps = True
                break
            taken += rung.train(self, guide, steps) if steps else 0
            verdict = self.judge(rung.label(taken), guide, rung.trajectories)
            if self._is_over(verdict):
                return True
        return False

    def _make(self, rung: Rung) -> Any:
        """Makes the guide of a rung; one that others can follow leaves them half of the time."""
        if rung.needs_census or self.own is not None or self.density.features > MOST_DENSE:
            return rung.make(self)
        sooner = self.deadline.earlier(max(self.deadline.left, 0.0) * LEFT_BY_SEARCH)
        with sooner.enforced(), contextlib.suppress(TimeOver):
            return rung.make(self)
        return None

    def _may_be_dense(self) -> bool:
        """Whether a guide of all latents at once can be made; an error if there is no other."""
        if self.density.features <= MOST_DENSE:
            return True
        if self.best is None:
            raise ValueError(
                f"Expected at most {MOST_DENSE} latent entries, or a model of a few globals on "
                "which all others depend, these in groups, chains or crossed factors; got "
                f"{self.density.features} entries without such a structure."
            ) from self.obstacle
        return False

    def take_census(self) -> None:
        """Takes the census, and leaves time to judge a guide, which is of use only with a
        verdict."""
        self.has_census = True
        sooner = self.deadline.earlier(max(self.deadline.left, 0.0) * LEFT_BY_CENSUS)
        with sooner.enforced(), contextlib.suppress(TimeOver):
            self.census = take_census(self.density, self.start)

    def judge(self, name: str, guide: Guide, trajectories: int = 0) -> Verdict:
        """Judges a guide as it is now, and keeps it if it is the best so far.

        Args:
            name: Name of the attempt.
            guide: The guide.
            trajectories: Trajectories by which its draws are polished.
        """
        guide = copy.deepcopy(guide)
        begun = self.deadline.elapsed
        # The same draws of the base for each attempt, so that attempts differ by their guides only.
        with forked(0):
            verdict, sample = judge_guide(
                guide,
                self.density,
                self.census,
                trajectories,
                REMEDY if self.own is None else OWN_REMEDY,
                JUDGE_DRAWS,
            )
        self.judging = max(self.judging, self.deadline.elapsed - begun)
        self.sample = sample
        self.attempts.append(Attempt(name, self.deadline.elapsed, verdict))
        posterior = Posterior(guide, self.density, verdict, trajectories, name)
        self.best = posterior if self.best is None else choose_better(self.best, posterior)
        return verdict

    def _is_over(self, verdict: Verdict) -> bool:
        """Whether to stop. All processes use the main one's answer, because rounding differs."""
        settled = processes.agree(verdict.ok or has_failed(verdict, "proper"))
        return settled or self.deadline.passed

    def _ending(self) -> str:
        """Returns a sentence on why the fit ended before all was tried, or nothing."""
        if self.interrupted:
            return "Let the fit run to its end."
        last = self.attempts[-1].name.split(",")[0]
        if self.deadline.passed and self.deadline.seconds is not None:
            limit = f"The time limit of {self.deadline.seconds:g} s"
            return f"{limit} ended the fit at the {last}; allow more time."
        if self.out_of_steps and self.own is None:
            return f"The steps of training were used up at the {last}; allow more steps."
        return ""

    def result(self) -> Posterior:
        """Returns the best attempt, with the record of the whole fit."""
        best = self.best
        if best is None:
            raise RuntimeError("Expected at least one attempt; got none.")
        self._tell_failures()
        guide, ending = best.guide, self._ending()
        if self.own is not None:
            # A guide of the user is trained in place, and keeps its best numbers.
            self.own.load_state_dict(guide.state_dict())
            guide = self.own
        return Posterior(
            guide,
            self.density,
            best.verdict.with_remedy(ending) if ending else best.verdict,
            best.trajectories,
            best.name,
            rungs=self.attempts,
            history=torch.stack(self.history).tolist() if self.history else [],
            seconds=self.deadline.elapsed,
            interrupted=self.interrupted,
        )

    def _tell_failures(self) -> None:
        """Warns where most points of the training could not be evaluated."""
        failures = self.trained.failures
        if failures.most and failures.example is not None:
            warnings.warn(
                f"{failures.points} of {failures.evaluated} points could not be evaluated and "
                f"count as of density zero; at one of them, "
                f"{explain(self.density, failures.example)}",
                stacklevel=caller_level(),
            )


def train_flow(climb: Climb, guide: AutoFlow, steps: int) -> int:
    """Trains the flow of a guide, and returns how many steps it took."""
    return climb.train(guide.flow, steps)


@dataclass(frozen=True)
class Rung:
    """One way to find a posterior.

    Attributes:
        name: A word for it; the name of an attempt adds the steps that were taken.
        make: Makes the guide from the fit so far; returns ``None`` where the rung is of no use.
        rounds: Steps of training before each verdict; 0 for a verdict on the guide as it was made.
        train: Trains the guide for some steps, and returns how many it took.
        trajectories: Trajectories by which draws of the guide are polished.
        needs_census: Whether the guide starts at the census of the modes of the whole posterior.
        most_features: The largest number of latent entries for which it is tried.
    """

    name: str
    make: Callable[[Climb], Any]
    rounds: tuple[int, ...] = (0,)
    train: Callable[[Climb, Any, int], int] = train_flow
    trajectories: int = 0
    needs_census: bool = True
    most_features: float = math.inf

    def label(self, steps: int) -> str:
        """Returns the name of an attempt.

        Args:
            steps: The steps of training that the rung has taken.
        """
        if self.trajectories:
            return f"{self.name}, {self.trajectories} trajectories"
        return f"{self.name}, {steps} steps" if steps else self.name


def climb_ladder(climb: Climb, ladder: Sequence[Rung]) -> Posterior:
    """Tries one rung after the other until the fit is over, or until Ctrl-C.

    Args:
        climb: The fit.
        ladder: The rungs.

    Returns:
        The posterior.
    """
    try:
        with climb.deadline.enforced(), processes.sharing():
            _climb(climb, ladder)
    except KeyboardInterrupt:
        if climb.guide is None and climb.density.features > MOST_DENSE:
            raise
        climb.interrupted = True
        climb.judge("interrupted", climb.guide or climb.first_flow)
    return climb.result()


def _climb(climb: Climb, ladder: Sequence[Rung]) -> None:
    with contextlib.suppress(TimeOver):
        for rung in ladder:
            if climb.attempt(rung):
                return
    if climb.best is not None:
        return
    if climb.density.features > MOST_DENSE:
        raise ValueError(
            f"Expected a time limit in which a guide of {climb.density.features} latent entries "
            f"can be made; got {climb.deadline.seconds:g} s."
        )
    first = next((rung for rung in ladder if rung.needs_census), ladder[0])
    # A structured guide takes time to make, and is judged as it is.
    made = None if first.needs_census else climb.guide
    climb.judge(first.name, made or first.make(climb))


def choose_better(first: Posterior, second: Posterior) -> Posterior:
    """Returns the posterior that is trusted, or else the one of greater merit."""
    return second if _merit(second) >= _merit(first) else first


def _merit(posterior: Posterior) -> tuple[bool, bool, float, bool]:
    """Trust first; then what says that there is nothing to trust; then effective draws, divided by
    how often the mass missed exceeds a limit."""
    verdict = posterior.verdict
    excess = 1.0
    for finding in verdict.findings:
        if finding.name in ("census", "reach") and finding.value is not None and finding.limit:
            excess = max(excess, finding.value / finding.limit)
    judged = verdict.ok or bool(verdict.failed)
    return verdict.ok, has_failed(verdict, "proper"), verdict.ess / excess, judged


def has_failed(verdict: Verdict, name: str) -> bool:
    """Returns whether a check has failed.

    Args:
        verdict: The verdict.
        name: The check.
    """
    return any(finding.name == name for finding in verdict.failed)


def make_narrow_flow(features: int) -> Flow | Transform:
    """Makes the flow for most posteriors; its networks grow linearly, to follow a funnel."""
    if features == 1:
        return Elementwise(SumOfSquares(), features)
    return RealNVP(features, network=mlp((32, 32)), mixing=None)
