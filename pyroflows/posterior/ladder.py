"""The ladder: attempts from the cheapest to the most expensive, until one is trusted.

A new rung is an entry of :data:`LADDER`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch

from ..flows import Flow, RealNVP
from ..guides import AutoFlow, AutoMixture, AutoStructuredFlow
from ..guides.guide import Guide
from ..model.density import LogDensity
from ..sampling.spaces import mean_and_root
from ..transforms import Elementwise, Transform
from ..transforms.low_rank import TRIANGULAR
from ..univariate import MonotoneNetwork
from .census import widen_census
from .climb import Climb, Rung, has_failed, make_narrow_flow
from .refit import roam_components, roam_missed
from .structured import make_structured, start_structured, train_structured
from .subject import JUDGE_DRAWS

__all__ = ["LADDER", "make_own_rung", "make_own_structured_rung"]

# Most posteriors need the first few steps only. Longer training starts with a fresh flow, because
# raising a step size that has decayed once loses a quarter of the effective draws on funnels.
SHORT, LONG, WIDE = 150, 1500, 2500
# Steps between two verdicts on a guide that is trained on.
ROUNDS = (150, 1350)
STRUCTURED_ROUNDS = (150, 150)
MIXTURE_ROUNDS = (0, 150, 450)
# Steps on chains; the rounds after them are steps for the ELBO.
REFIT, REFIT_STEPS = "refit", 450
REFIT_ROUNDS = (0, 450)
# Above TRIANGULAR latents the ladder ends early: flows that are trained for longer, or several of
# them, would take many minutes, and seldom end in trust.
# Draws of each component from which the weights of a mixture are found.
WEIGHING_DRAWS = 2000
POLISH_TRAJECTORIES = 30
# With so many effective draws, trajectories in the base space cost less than more training.
POLISH_ESS = 0.5


# The guides of the rungs


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
    cut_short = any(has_failed(best.verdict, name) for name in ("drift", "reach"))
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
    if best is None or best.verdict.ess < least_ess or has_failed(best.verdict, "census"):
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


STRUCTURED = Rung(
    "structured",
    make=make_structured,
    rounds=STRUCTURED_ROUNDS,
    train=train_structured,
    needs_census=False,
)
MIXTURE = Rung(
    "mixture",
    make=make_mixture,
    rounds=MIXTURE_ROUNDS,
    train=train_mixture,
    most_features=TRIANGULAR,
)
REFITTED = Rung(
    REFIT,
    make=refit_to_chains,
    rounds=REFIT_ROUNDS,
    train=train_mixture,
    most_features=TRIANGULAR,
)
WIDE_FLOW = Rung(
    "wide flow",
    make=lambda climb: climb.make_flow(make_wide_flow),
    rounds=(WIDE,),
    most_features=TRIANGULAR,
)
#: The rungs of ``guide="auto"``, from the cheapest to the most expensive.
LADDER: list[Rung] = [
    STRUCTURED,
    Rung("Gaussian", make=lambda climb: climb.first_flow),
    MIXTURE,
    REFITTED,
    Rung("flow", make=lambda climb: climb.first_flow, rounds=(SHORT,)),
    Rung("flow", make=lambda climb: climb.make_flow(make_narrow_flow), rounds=(LONG,)),
    REFITTED,
    Rung(
        "polish",
        make=functools.partial(find_polishable, least_ess=POLISH_ESS),
        trajectories=POLISH_TRAJECTORIES,
    ),
    WIDE_FLOW,
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

    return replace(STRUCTURED, make=make)


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
