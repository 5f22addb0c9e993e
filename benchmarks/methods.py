"""The methods that the benchmark runs side by side: pyroflows, Pyro's guides, Pyro's NUTS, NumPyro's NUTS.

Every method gets the same model and data. Pyro's methods get the number of CPU seconds that pyroflows took, a
vectorised ELBO of many particles, clipped gradients, a step size that decays over those seconds, and starting
points for improper priors, on which their own defaults fail. Two methods have no such budget: `NUTS to 1000`
measures how long Pyro's NUTS needs, and NumPyro's NUTS runs its usual 4 chains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import arviz
import numpy as np
import pyro
import torch
from pyro.distributions.transforms import block_autoregressive, iterated
from pyro.infer import SVI, Trace_ELBO
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
from pyro.optim import LambdaLR  # type: ignore[attr-defined]  # made at import from torch's
from torch import Tensor
from torch.distributions import biject_to

from benchmarks.models import Draws, Entry
from benchmarks.posteriordb import flatten
from pyroflows.report.arviz_bridge import psis
from pyroflows.study.nuts import Chain, run_chain, run_within

DRAWS = 40_000
"""Draws of a guide; the error of their mean is 0.005 sd."""
CHUNK = 4_000
PARTICLES = 64
CLIP_NORM = 10.0
NUTS_TO_TARGET = "NUTS to 1000"
NUTS_TARGET = 1000
"""Bulk ESS that `NUTS to 1000` is after."""
NUTS_WARMUP = 500
LEAST_DRAWS = 20
NUTS_BUDGET = (60.0, 10.0, 300.0)
"""`NUTS to 1000` may take 10 times the task's budget, but at least 60 and at most 300 CPU seconds."""
NUMPYRO = "NumPyro NUTS"
NUMPYRO_CHAINS = 4
NUMPYRO_ITERATIONS = 1000
INSTALL_NUMPYRO = "NumPyro is not installed: pip install 'pyroflows[benchmarks]'."


@dataclass(frozen=True)
class Task:
    """What a method is asked to do.

    Args:
        entry: The model.
        kwargs: The model's keyword arguments.
        seed: The seed.
        budget: CPU seconds to spend; Pyro's methods need it, pyroflows and NumPyro decide themselves.
        name: The posterior's name, by which NumPyro finds its model.
    """

    entry: Entry
    kwargs: dict[str, Any]
    seed: int
    budget: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Result:
    """What a method found.

    Args:
        draws: Draws of the latent sites, `(N, *site_shape)`; empty if the method only measures seconds and
            got none.
        seconds: CPU seconds of the inference, without the drawing afterwards.
        elbo: Evidence lower bound, or None.
        khat: Pareto k-hat of the importance weights, or None.
        ess: Effective sample size as a fraction of the draws: of the importance weights for a guide, the
            smallest bulk ESS over the scalars for chains; or None.
        ok: The method's own verdict, or None.
        note: Anything worth saying of the run.
        bound: How to read `seconds`: "" measured, "~" extrapolated, ">" a lower bound.
    """

    draws: Draws
    seconds: float
    elbo: float | None = None
    khat: float | None = None
    ess: float | None = None
    ok: bool | None = None
    note: str = ""
    bound: str = ""


def run_pyroflows(task: Task) -> Result:
    """Fit the default pyroflows posterior."""
    import pyroflows as pf

    start = time.process_time()
    posterior = pf.fit_posterior(
        task.entry.model, args=(), kwargs=task.kwargs, seed=task.seed, progress=False
    )
    seconds = time.process_time() - start
    verdict = posterior.verdict
    draws = posterior.sample(DRAWS, seed=task.seed)
    return Result(draws, seconds, verdict.elbo, verdict.khat, verdict.ess, verdict.ok, str(verdict))


# Pyro's guides


def run_guide(
    build: Callable[[Callable[..., None]], AutoGuide], step_size: float, task: Task
) -> Result:
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
                task.entry.model,
                guide,
                num_samples=CHUNK,
                max_plate_nesting=max_plate_nesting,
                **task.kwargs,
            )
            log_weights.append(weights)
            chunks.append(
                {name: trace.nodes[name]["value"].reshape(CHUNK, *shapes[name]) for name in shapes}
            )
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in shapes}, torch.cat(
        log_weights
    )


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


NUTS_OPTIONS = {"init_strategy": _start_uniform, "max_plate_nesting": 1}


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
    return AutoNormalizingFlow(
        InitMessenger(start_at)(model), partial(iterated, 2, block_autoregressive)
    )


# NUTS


def run_nuts(task: Task) -> Result:
    """Run one chain of Pyro's NUTS for the task's budget.

    A pilot of at most 50 iterations and 15 % of the budget measures the cost of an iteration; the warm-up is
    then meant to take 40 % of what is left (50 to 1000 iterations), and draws follow until the budget is
    spent.

    Raises:
        RuntimeError: If no draw follows the warm-up.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(task.seed)
    start = time.process_time()
    chain = run_within(_budget(task), task.entry.model, (), task.kwargs, **NUTS_OPTIONS)
    seconds = time.process_time() - start
    ess = bulk_ess(task.entry, chain.draws) / chain.count
    return Result(
        chain.draws,
        seconds,
        ess=ess,
        note=f"{chain.iterations - chain.count} warm-up iterations, {chain.count} draws",
    )


def run_nuts_to_target(task: Task) -> Result:
    """Measure the CPU seconds that one chain of Pyro's NUTS needs to a bulk ESS of `NUTS_TARGET`.

    The seconds are those of a warm-up of `NUTS_WARMUP` iterations plus `NUTS_TARGET` times the seconds of an effective
    draw, those after the warm-up over the smallest bulk ESS of a scalar. The chain stops once it has that ESS or
    `NUTS_BUDGET` is spent; then they are extrapolated, or, from fewer than `LEAST_DRAWS`, only a lower bound.
    """
    least, multiple, most = NUTS_BUDGET
    budget = min(max(multiple * _budget(task), least), most)
    pyro.clear_param_store()
    pyro.set_rng_seed(task.seed)
    chain = _chain(task, NUTS_WARMUP, 1_000_000, time.process_time() + budget, NUTS_TARGET)
    ess = bulk_ess(task.entry, chain.draws) if chain.count >= LEAST_DRAWS else 0.0
    if not ess > 0:
        done = min(chain.iterations, NUTS_WARMUP)
        note = f"no ESS to extrapolate from; {done} of {NUTS_WARMUP} warm-up iterations, {chain.count} draws"
        return Result(chain.draws, chain.warmup + chain.sampling, note=note, bound=">")
    seconds = chain.warmup + chain.sampling / ess * NUTS_TARGET
    note = f"{chain.warmup:.1f} s of warm-up, {chain.sampling:.1f} s for {chain.count} draws of bulk ESS {ess:.0f}"
    return Result(
        chain.draws,
        seconds,
        ess=ess / chain.count,
        note=note,
        bound="" if ess >= NUTS_TARGET else "~",
    )


def bulk_ess(entry: Entry, draws: Draws, chains: int = 1) -> float:
    """Return the smallest bulk ESS over Stan's scalars; zero where one never moved.

    Args:
        entry: The model, which knows Stan's scalars.
        draws: Draws of the latent sites, `(chains * N, *site_shape)`, chains one after another.
        chains: How many chains.
    """
    arrays = {name: values.detach().cpu().numpy() for name, values in entry.to_stan(draws).items()}
    scalars = flatten(arrays).values()
    # ArviZ counts every draw of a constant.
    ess = [
        arviz.ess(values.reshape(chains, -1), method="bulk") if np.ptp(values) > 0 else 0.0
        for values in scalars
    ]
    return float(np.min(ess))


def _chain(
    task: Task, warmup: int, samples: int, deadline: float, target: float = math.inf
) -> Chain:
    """Run a chain until it is done, has a bulk ESS of `target`, or the deadline has passed."""
    measure = partial(bulk_ess, task.entry) if math.isfinite(target) else None
    limits = {"deadline": deadline, "measure": measure, "target": target}
    return run_chain(task.entry.model, (), task.kwargs, warmup, samples, **limits, **NUTS_OPTIONS)


def _budget(task: Task) -> float:
    if task.budget is None:
        raise ValueError("Expected a budget in CPU seconds for a method of Pyro; got None.")
    return task.budget


# NumPyro's NUTS


def has_numpyro() -> bool:
    """Whether NumPyro is installed."""
    return find_spec("numpyro") is not None


def run_numpyro(task: Task) -> Result:
    """Run NumPyro's jitted NUTS: 4 chains of 1000 draws after 1000 iterations of warm-up, compilation included.

    The chains are vectorised, which on one thread takes two thirds of the time of one after another.

    Raises:
        ImportError: If NumPyro is not installed.
    """
    if not has_numpyro():
        raise ImportError(INSTALL_NUMPYRO)
    import jax
    from numpyro import infer

    from benchmarks.numpyro_models import MODELS

    with _precision_of_torch():
        jax.clear_caches()
        start = time.process_time()
        mcmc = infer.MCMC(
            infer.NUTS(MODELS[task.name]),
            num_warmup=NUMPYRO_ITERATIONS,
            num_samples=NUMPYRO_ITERATIONS,
            num_chains=NUMPYRO_CHAINS,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(
            jax.random.PRNGKey(task.seed),
            **{name: jax.numpy.asarray(v.numpy()) for name, v in task.kwargs.items()},
        )
        samples = jax.block_until_ready(mcmc.get_samples())
        seconds = time.process_time() - start
        divergences = int(mcmc.get_extra_fields()["diverging"].sum())
    draws = {name: torch.tensor(np.asarray(values)) for name, values in samples.items()}
    ess = bulk_ess(task.entry, draws, NUMPYRO_CHAINS)
    note = f"smallest bulk ESS {ess:.0f}, {divergences} divergences"
    return Result(draws, seconds, ess=ess / (NUMPYRO_CHAINS * NUMPYRO_ITERATIONS), note=note)


@contextmanager
def _precision_of_torch() -> Iterator[None]:
    """Let JAX compute in torch's default precision for a while."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", torch.get_default_dtype() == torch.float64)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


METHODS: dict[str, Callable[[Task], Result]] = {
    "pyroflows": run_pyroflows,
    "AutoNormal": partial(run_guide, _normal, 2e-2),
    "AutoMultivariateNormal": partial(run_guide, _multivariate_normal, 2e-2),
    "AutoIAFNormal": partial(run_guide, _iaf, 1e-2),
    "AutoNormalizingFlow": partial(run_guide, _normalizing_flow, 1e-2),
    "NUTS": run_nuts,
    NUTS_TO_TARGET: run_nuts_to_target,
    NUMPYRO: run_numpyro,
}
"""Methods by name; pyroflows is first, since its seconds are the others' budget."""
