"""The ladder: attempts from the cheapest to the most expensive, until one is trusted.

A new rung is an entry of :data:`LADDER`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
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
from ..guides import AutoFlow, AutoMixture, AutoStructuredFlow
from ..guides.guide import Guide
from ..model.base import Density
from ..model.density import LogDensity
from ..model.explanation import explain
from ..model.minibatch import MiniBatchDensity
from ..nn import mlp
from ..sampling.spaces import mean_and_root
from ..train import processes
from ..train.marginal import MarginalFit
from ..train.training import train
from ..transforms import Elementwise, Transform
from ..univariate import MonotoneNetwork, SumOfSquares
from .census import Census, find_start, take_census, widen_census
from .importance import ImportanceSample
from .judging import judge_guide
from .posterior import Attempt, Posterior
from .refit import VectorKL, roam_components, roam_missed
from .structured import make_structured, start_structured, train_structured
from .subject import JUDGE_DRAWS
from .verdict import Verdict

__all__ = ["LADDER", "Climb", "Rung", "climb_ladder", "make_own_rung"]

# Most posteriors need the first few steps only. Longer training starts with a fresh flow, because
# raising a step size that has decayed once loses a quarter of the effective draws on funnels.
SHORT, LONG, WIDE = 150, 1500, 2500
# Steps between two verdicts on a guide that is trained on.
ROUNDS = (150, 1350)
MIXTURE_ROUNDS = (0, 150, 450)
# Steps on chains; the rounds after them are steps for the ELBO.
REFIT, REFIT_STEPS = "refit", 450
REFIT_ROUNDS = (0, 450)
# Draws of each component from which the weights of a mixture are found.
WEIGHING_DRAWS = 2000
POLISH_TRAJECTORIES = 30
# Share of the time that a census leaves: draws are weighed with fewer evaluations than it makes.
LEFT_BY_CENSUS = 1 / 4
# How much longer a verdict may take than one on a guide that has not been trained.
UNTRAINED = 2.0
# A dense flow over more latents needs more memory than there is.
MOST_DENSE = 2048
# Remedies that are left, once all rungs have been tried or a guide of the user's has been trained.
REMEDY = "hand a richer flow to guide="
OWN_REMEDY = 'give the guide more steps or a wider flow, or fit with guide="auto"'
# With so many effective draws, trajectories in the base space cost less than more training.
POLISH_ESS = 0.5


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
        if rung.needs_census and not self._may_be_dense():
            return True
        if rung.needs_census and not self.has_census:
            self.take_census()
        guide = rung.make(self)
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

    def _may_be_dense(self) -> bool:
        """Whether a guide of all latents at once can be made; an error if there is no other."""
        if self.density.features <= MOST_DENSE:
            return True
        if self.best is None:
            raise ValueError(
                f"Expected at most {MOST_DENSE} latent entries, or a model of a few globals on "
                "which all others depend, these in groups, chains or crossed factors; got "
                f"{self.density.features} entries without such a structure."
            )
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
            )
        self.judging = max(self.judging, self.deadline.elapsed - begun)
        self.sample = sample
        self.attempts.append(Attempt(name, self.deadline.elapsed, verdict))
        posterior = Posterior(guide, self.density, verdict, trajectories, name)
        self.best = posterior if self.best is None else choose_better(self.best, posterior)
        return verdict

    def _is_over(self, verdict: Verdict) -> bool:
        """Whether to stop. All processes use the main one's answer, because rounding differs."""
        settled = processes.agree(verdict.ok or _has_failed(verdict, "proper"))
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
    """

    name: str
    make: Callable[[Climb], Any]
    rounds: tuple[int, ...] = (0,)
    train: Callable[[Climb, Any, int], int] = train_flow
    trajectories: int = 0
    needs_census: bool = True

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
    if climb.best is None and climb.density.features > MOST_DENSE:
        raise ValueError(
            f"Expected a time limit in which a guide of {climb.density.features} latent entries "
            f"can be made; got {climb.deadline.seconds:g} s."
        )
    if climb.best is None:
        first = next((rung for rung in ladder if rung.needs_census), ladder[0])
        climb.judge(first.name, first.make(climb))


def choose_better(first: Posterior, second: Posterior) -> Posterior:
    """Returns the posterior that is trusted, or else the one of greater merit."""
    return second if _merit(second) >= _merit(first) else first


def _merit(posterior: Posterior) -> tuple[bool, float, bool]:
    """Trust first; then effective draws, divided by how often the mass missed exceeds a limit."""
    verdict = posterior.verdict
    excess = 1.0
    for finding in verdict.findings:
        if finding.name in ("census", "reach") and finding.value is not None and finding.limit:
            excess = max(excess, finding.value / finding.limit)
    judged = verdict.ok or bool(verdict.failed)
    return verdict.ok, verdict.ess / excess, judged


def _has_failed(verdict: Verdict, name: str) -> bool:
    return any(finding.name == name for finding in verdict.failed)


# The guides of the rungs


def make_narrow_flow(features: int) -> Flow | Transform:
    """Makes the flow for most posteriors; its networks grow linearly, to follow a funnel."""
    if features == 1:
        return Elementwise(SumOfSquares(), features)
    return RealNVP(features, network=mlp((32, 32)), mixing=None)


def make_wide_flow(features: int) -> Flow | Transform:
    """Makes the flow for posteriors that a narrow flow does not fit."""
    if features == 1:
        return Elementwise(MonotoneNetwork(), features)
    return RealNVP(features, transforms=12, mixing=None)


def make_mixture(climb: Climb) -> AutoMixture | None:
    """Makes a mixture with a flow for each mode; ``None`` if there is one mode."""
    if climb.census is not None and climb.sample is not None and not climb.sample.empty:
        # Ascents from draws of great weight find modes that are too narrow for the census to hit.
        points = climb.sample.heaviest()
        climb.census = widen_census(climb.density, climb.census, points)
    if climb.census is None or len(climb.census.weights) < 2:
        return None
    modes = climb.census.modes
    count = len(modes.elbo)
    density = climb.density
    mixture = AutoMixture(
        density.continuous_model, count, make_narrow_flow, init_loc_fn=density.init_loc_fn
    )
    density.introduce(mixture)
    for k in range(count):
        mode = modes.one(k)
        mixture.whiten(k, mode.loc, mode.scale_tril)
    weigh_components(climb.density, mixture)
    return mixture


def train_mixture(climb: Climb, mixture: AutoMixture, steps: int) -> int:
    """Trains each flow of a mixture for some steps, and weighs them anew."""
    for flow in mixture.flows:
        climb.train(flow, steps)
    weigh_components(climb.density, mixture)
    return steps


def refit_to_chains(climb: Climb) -> AutoMixture | None:
    """Makes a guide of fresh flows that are fitted to chains from the best guide so far.

    It is made once, and only where the best guide is a mixture or cuts the posterior short. The
    flows are fresh, because the map of one that was cut short is bad where it has had no draws.
    """
    best = climb.best
    if best is None or best.verdict.ok or climb.sample is None or climb.sample.empty:
        return None
    if best.name.startswith(REFIT):
        return None
    cut_short = any(_has_failed(best.verdict, name) for name in ("drift", "reach"))
    if len(best.guide.base_spaces()) < 2 and not cut_short:
        return None
    sample = best.propose(JUDGE_DRAWS, seed=0)
    chains = roam_components(climb.density, best.guide, sample)
    if climb.census is not None:
        fits = climb.census.fits
        chains += roam_missed(climb.density, best.guide, sample, fits)
    chains = [z for z in chains if len(z)]
    if not chains:
        return None
    guide = AutoMixture(climb.density.continuous_model, len(chains), flow=make_narrow_flow)
    climb.density.introduce(guide)
    for k, z in enumerate(chains):
        guide.whiten(k, *mean_and_root(z))
        climb.train_on(z, guide.flows[k], REFIT_STEPS)
    weigh_components(climb.density, guide)
    return guide


def find_polishable(climb: Climb, least_ess: float = 0.0) -> Guide | None:
    """Returns the best guide so far, unless it misses a mode or has too few effective draws."""
    best = climb.best
    if best is None or best.verdict.ess < least_ess or _has_failed(best.verdict, "census"):
        return None
    return best.guide


@torch.no_grad()
def weigh_components(density: LogDensity, mixture: AutoMixture, rounds: int = 200) -> None:
    r"""Sets the weights of a mixture that minimise the forward divergence from the posterior.

    With draws of all components and weights :math:`w = p / q` the divergence is least at the fixed
    point of

    .. math:: \pi_k \leftarrow
        \mathbb{E}_q \left[ w(z)\, \frac{\pi_k q_k(z)}{q(z)} \right] / \mathbb{E}_q [w(z)].

    Where components do not overlap, these are their shares of the evidence.

    Args:
        density: The log density.
        mixture: The mixture.
        rounds: How often to apply the update.
    """
    count = len(mixture.flows)
    guide = mixture.get_posterior()
    z = torch.cat([component.sample((WEIGHING_DRAWS,)) for component in guide.components])
    each = guide.component_log_probs(z) - mixture.logits.log_softmax(-1)
    # The draws come from all components in equal numbers, whatever the weights.
    log_q = each.logsumexp(-1) - math.log(count)
    ratio = density.log_prob(z).nan_to_num(nan=-math.inf, posinf=-math.inf) - log_q
    # Draws that no component can invert get zero weight.
    ratio = ratio.masked_fill((each == -math.inf).all(-1), torch.finfo(ratio.dtype).min)
    weights = ratio.softmax(0)
    log_pi = torch.full_like(mixture.logits, -math.log(count))
    for _ in range(rounds):
        shares = (each + log_pi).softmax(-1).nan_to_num(nan=0.0)
        log_pi = (weights @ shares).clamp(min=1e-12).log()
    mixture.logits.copy_(log_pi.log_softmax(-1))


#: The rungs of ``guide="auto"``, from the cheapest to the most expensive.
LADDER: list[Rung] = [
    Rung(
        "structured",
        make=make_structured,
        rounds=(SHORT,),
        train=train_structured,
        needs_census=False,
    ),
    Rung("Gaussian", make=lambda climb: climb.first_flow),
    Rung("mixture", make=make_mixture, rounds=MIXTURE_ROUNDS, train=train_mixture),
    Rung(REFIT, make=refit_to_chains, rounds=REFIT_ROUNDS, train=train_mixture),
    Rung("flow", make=lambda climb: climb.first_flow, rounds=(SHORT,)),
    Rung("flow", make=lambda climb: climb.make_flow(make_narrow_flow), rounds=(LONG,)),
    Rung(REFIT, make=refit_to_chains, rounds=REFIT_ROUNDS, train=train_mixture),
    Rung(
        "polish",
        make=functools.partial(find_polishable, least_ess=POLISH_ESS),
        trajectories=POLISH_TRAJECTORIES,
    ),
    Rung("wide flow", make=lambda climb: climb.make_flow(make_wide_flow), rounds=(WIDE,)),
    Rung("polish", make=find_polishable, trajectories=POLISH_TRAJECTORIES),
]


def make_own_structured_rung(guide: AutoStructuredFlow) -> Rung:
    """Makes the only rung of a structured guide that the user has chosen.

    Args:
        guide: The guide.
    """

    def make(climb: Climb) -> AutoStructuredFlow:
        start_structured(climb, guide)
        return guide

    return Rung("structured", make, rounds=(SHORT,), train=train_structured, needs_census=False)


def make_own_rung(guide: AutoFlow, fresh: bool, steps: int, limited: bool = False) -> Rung:
    """Makes the only rung of a guide that the user has chosen.

    Args:
        guide: The guide.
        fresh: Whether it has never been trained, so that it starts at the best Gaussian of the
            census.
        steps: Most steps of training.
        limited: Whether the time is limited, so that the guide is judged before it is trained: a
            verdict is then at hand, and it is known how much time the next one takes.
    """

    def make(climb: Climb) -> AutoFlow:
        if fresh and climb.census is not None:
            guide.whiten(climb.census.best.loc, climb.census.best.scale_tril)
        return guide

    rounds = (*ROUNDS, steps) if steps else ()
    return Rung("guide", make, rounds=(0, *rounds) if limited or not steps else rounds)
