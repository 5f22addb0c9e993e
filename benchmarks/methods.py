"""The methods that the benchmark runs side by side: pyroflows, Pyro's guides, Pyro's NUTS.

Every method gets the same model and data. Pyro's methods get the number of CPU seconds that pyroflows took, a
vectorised ELBO of many particles, clipped gradients, a step size that decays over those seconds, and starting
points for improper priors, on which their own defaults fail.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions.transforms import block_autoregressive, iterated
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoGuide,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    init_to_median,
)
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.importance import vectorized_importance_weights
from pyro.ops.stats import effective_sample_size
from pyro.optim import LambdaLR  # type: ignore[attr-defined]  # made at import from torch's
from torch import Tensor
from torch.distributions import biject_to

from benchmarks.models import Draws, Entry
from pyroflows.infer.arviz import psis

DRAWS = 40_000
"""Draws of a guide; the error of their mean is 0.005 sd."""
CHUNK = 4_000
PARTICLES = 64
CLIP_NORM = 10.0


@dataclass(frozen=True)
class Task:
    """What a method is asked to do.

    Args:
        entry: The model.
        kwargs: The model's keyword arguments.
        seed: The seed.
        budget: CPU seconds to spend; Pyro's methods need it, pyroflows decides itself.
    """

    entry: Entry
    kwargs: dict[str, Any]
    seed: int
    budget: float | None = None


@dataclass(frozen=True)
class Result:
    """What a method found.

    Args:
        draws: Draws of the latent sites, `(N, *site_shape)`.
        seconds: CPU seconds of the inference, without the drawing afterwards.
        elbo: Evidence lower bound, or None.
        khat: Pareto k-hat of the importance weights, or None.
        ess: Effective sample size as a fraction of the draws: of the importance weights for a guide, the
            smallest over the scalars for a chain; or None.
        ok: The method's own verdict, or None.
        note: Anything worth saying of the run.
    """

    draws: Draws
    seconds: float
    elbo: float | None = None
    khat: float | None = None
    ess: float | None = None
    ok: bool | None = None
    note: str = ""


class BudgetSpent(Exception):
    """The CPU seconds of a method are used up."""


def run_pyroflows(task: Task) -> Result:
    """Fit the default pyroflows posterior."""
    import pyroflows as pf

    start = time.process_time()
    posterior = pf.fit_posterior(task.entry.model, args=(), kwargs=task.kwargs, seed=task.seed, progress=False)
    seconds = time.process_time() - start
    verdict = posterior.verdict
    draws = posterior.sample(DRAWS, seed=task.seed)
    return Result(draws, seconds, verdict.elbo, verdict.khat, verdict.ess, verdict.ok, str(verdict))


# Pyro's guides


def run_guide(build: Callable[[Callable[..., None]], AutoGuide], step_size: float, task: Task) -> Result:
    """Train one of Pyro's guides by `SVI` for the task's budget.

    Args:
        build: Makes the guide of a model.
        step_size: Adam's first step size; it decays along a cosine to zero over the budget.
        task: The task.

    Returns:
        Draws of the guide, with the ELBO, k-hat and importance ESS of the same draws.

    Raises:
        RuntimeError: If the ELBO becomes NaN.
    """
    budget = _budget(task)
    pyro.clear_param_store()
    pyro.set_rng_seed(task.seed)
    guide = build(task.entry.model)
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True)
    start = time.process_time()

    def decay(_: int) -> float:
        spent = min((time.process_time() - start) / budget, 1.0)
        return 0.5 * (1 + math.cos(math.pi * spent))

    schedule = LambdaLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": step_size}, "lr_lambda": decay},
        clip_args={"clip_norm": CLIP_NORM},
    )
    svi = SVI(task.entry.model, guide, schedule, loss=elbo)
    steps = 0
    with pyro.validation_enabled(False):
        while time.process_time() - start < budget:
            if math.isnan(svi.step(**task.kwargs)):
                raise RuntimeError(f"the ELBO became NaN at step {steps}")
            schedule.step()
            steps += 1
        seconds = time.process_time() - start
        draws, log_weights = _draw(task, guide, elbo.max_plate_nesting - 1)
    khat, ess = importance(log_weights)
    note = f"{steps} steps of {PARTICLES} particles"
    return Result(draws, seconds, float(log_weights.mean()), khat, ess, note=note)


def _draw(task: Task, guide: AutoGuide, max_plate_nesting: int) -> tuple[Draws, Tensor]:
    """Draw from a guide, with log p(x, z) - log q(z) of every draw."""
    with torch.no_grad():
        shapes = {name: value.shape for name, value in guide(**task.kwargs).items()}
        chunks, log_weights = [], []
        for _ in range(DRAWS // CHUNK):
            weights, _, trace = vectorized_importance_weights(
                task.entry.model, guide, num_samples=CHUNK, max_plate_nesting=max_plate_nesting, **task.kwargs
            )
            log_weights.append(weights)
            chunks.append({name: trace.nodes[name]["value"].reshape(CHUNK, *shapes[name]) for name in shapes})
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in shapes}, torch.cat(log_weights)


def importance(log_weights: Tensor) -> tuple[float, float]:
    """Return Pareto k-hat and the importance ESS as a fraction.

    Args:
        log_weights: Log importance weights, `(N,)`.

    Returns:
        k-hat and (sum w)^2 / (N sum w^2); NaN where the weights are not finite.
    """
    if not torch.isfinite(log_weights).all():
        return math.nan, math.nan
    total, squares = log_weights.logsumexp(0), (2 * log_weights).logsumexp(0)
    return psis(log_weights.numpy())[1], float((2 * total - squares).exp()) / len(log_weights)


def start_at(site: dict[str, Any]) -> Tensor:
    """Start a site at its prior median; where the prior is improper, at zero on the unconstrained scale."""
    try:
        return init_to_median(site)
    except NotImplementedError:
        return _unconstrained(site, lambda shape: torch.zeros(shape))


def _start_uniform(site: dict[str, Any]) -> Tensor:
    return _unconstrained(site, lambda shape: torch.rand(shape) * 4 - 2)


def _unconstrained(site: dict[str, Any], values: Callable[[torch.Size], Tensor]) -> Tensor:
    transform = biject_to(site["fn"].support)
    return transform(values(transform.inverse_shape(site["fn"].shape())))


def _normal(model: Callable[..., None]) -> AutoGuide:
    return AutoNormal(model, init_loc_fn=start_at)


def _multivariate_normal(model: Callable[..., None]) -> AutoGuide:
    return AutoMultivariateNormal(model, init_loc_fn=start_at)


def _iaf(model: Callable[..., None]) -> AutoGuide:
    # These two guides take no starting point; the messenger lets them trace a model with improper priors.
    return AutoIAFNormal(InitMessenger(start_at)(model), num_transforms=2)


def _normalizing_flow(model: Callable[..., None]) -> AutoGuide:
    return AutoNormalizingFlow(InitMessenger(start_at)(model), partial(iterated, 2, block_autoregressive))


# NUTS


def run_nuts(task: Task) -> Result:
    """Run one chain of Pyro's NUTS for the task's budget.

    A pilot of at most 50 iterations and 15 % of the budget measures the cost of an iteration; the warm-up is
    then meant to take 40 % of what is left (50 to 1000 iterations), and draws follow until the budget is
    spent.

    Raises:
        RuntimeError: If no draw follows the warm-up.
    """
    budget = _budget(task)
    pyro.clear_param_store()
    pyro.set_rng_seed(task.seed)
    start = time.process_time()
    iterations, _ = _chain(task, 50, 0, start + 0.15 * budget)
    spent = time.process_time() - start
    warmup = int(np.clip(0.4 * (budget - spent) * iterations / spent, 50, 1000))
    iterations, draws = _chain(task, warmup, 10_000, start + budget)
    seconds = time.process_time() - start
    count = len(next(iter(draws.values()))) if draws else 0
    if count < 4:
        done = min(iterations, warmup)
        raise RuntimeError(f"no draw after warm-up ({done} of {warmup} warm-up iterations done)")
    ess = min(float(effective_sample_size(values[None], 0, 1).min()) for values in draws.values())
    return Result(draws, seconds, ess=ess / count, note=f"{warmup} warm-up iterations, {count} draws")


def _chain(task: Task, warmup: int, samples: int, deadline: float) -> tuple[int, Draws]:
    """Run a chain until it is done or the deadline has passed; return its iterations and draws."""
    points: list[dict[str, Tensor]] = []
    iterations = 0

    def model(**kwargs: Any) -> None:
        # One trajectory may be a thousand gradients long, so the clock is read at every one.
        if time.process_time() > deadline:
            raise BudgetSpent
        task.entry.model(**kwargs)

    def hook(kernel: NUTS, params: dict[str, Tensor], stage: str, i: int) -> None:
        nonlocal iterations
        iterations += 1
        if stage.startswith("Sample"):
            points.append({name: value.clone() for name, value in params.items()})

    kernel = NUTS(model, init_strategy=_start_uniform, max_plate_nesting=1)
    chain = MCMC(kernel, num_samples=max(samples, 1), warmup_steps=warmup, hook_fn=hook, disable_progbar=True)
    try:
        chain.run(**task.kwargs)
    except BudgetSpent:
        pass
    if not points:
        return iterations, {}
    stacked = {name: torch.stack([point[name] for point in points]) for name in points[0]}
    return iterations, {name: kernel.transforms[name].inv(values) for name, values in stacked.items()}


def _budget(task: Task) -> float:
    if task.budget is None:
        raise ValueError("Expected a budget in CPU seconds for a method of Pyro; got None.")
    return task.budget


METHODS: dict[str, Callable[[Task], Result]] = {
    "pyroflows": run_pyroflows,
    "AutoNormal": partial(run_guide, _normal, 2e-2),
    "AutoMultivariateNormal": partial(run_guide, _multivariate_normal, 2e-2),
    "AutoIAFNormal": partial(run_guide, _iaf, 1e-2),
    "AutoNormalizingFlow": partial(run_guide, _normalizing_flow, 1e-2),
    "NUTS": run_nuts,
}
"""Methods by name; pyroflows is first, since its seconds are the others' budget."""
