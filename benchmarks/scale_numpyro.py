"""The models of :mod:`benchmarks.scale_models` in NumPyro, and its NUTS as the baseline.

Each takes the same arguments and has the same density on the unconstrained scale. Where the shape
of the posterior asks for it there is a second, non-centred way to write it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from numpyro.distributions import constraints
from numpyro.handlers import reparam
from numpyro.infer import NUTS
from numpyro.infer.reparam import LocScaleReparam

from benchmarks.scale_models import make_case, split_name

Model = Callable[..., None]


def _scales(width: float, *names: str) -> list[Array]:
    return [numpyro.sample(name, dist.HalfNormal(width)) for name in names]


# Groups


def eight_schools(y: Array, error: Array) -> None:
    """Centred eight schools."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    between = numpyro.sample("between", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        effect = numpyro.sample("effect", dist.Normal(mean, between))
        numpyro.sample("y", dist.Normal(effect, error), obs=y)


def funnel(y: Array) -> None:
    """Neal's funnel with an observation of each of its groups."""
    log_variance = numpyro.sample("log_variance", dist.Normal(0.0, 3.0))
    with numpyro.plate("groups", len(y)):
        effect = numpyro.sample("effect", dist.Normal(0.0, jnp.exp(log_variance / 2)))
        numpyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def groups(y: Array) -> None:
    """A hierarchical normal model."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
    between, within = _scales(5.0, "between", "within")
    with numpyro.plate("groups", len(y), dim=-2):
        effect = numpyro.sample("effect", dist.Normal(mean, between))
        with numpyro.plate("rows", y.shape[1], dim=-1):
            numpyro.sample("y", dist.Normal(effect, within), obs=y)


def slopes(county: Array, x: Array, y: Array, *, counties: int) -> None:
    """Correlated intercepts and slopes."""
    mean = numpyro.sample("mean", dist.Normal(jnp.zeros(2), 5.0).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(3.0 * jnp.ones(2)).to_event(1))
    correlation = numpyro.sample("correlation", dist.LKJCholesky(2, 2.0))
    (noise,) = _scales(3.0, "noise")
    with numpyro.plate("counties", counties):
        root = scale[:, None] * correlation
        line = numpyro.sample("line", dist.MultivariateNormal(mean, scale_tril=root))
    with numpyro.plate("rows", len(y)):
        expected = line[county, 0] + line[county, 1] * x
        numpyro.sample("y", dist.Normal(expected, noise), obs=y)


def schools(school_of: Array, class_of: Array, y: Array) -> None:
    """Pupils in classes in schools."""
    classes, pupils = len(school_of), len(class_of)
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    names = ("between_schools", "between_classes", "between_pupils", "within")
    of_schools, of_classes, of_pupils, within = _scales(3.0, *names)
    with numpyro.plate("schools", classes // 4, dim=-1):
        school = numpyro.sample("school", dist.Normal(mean, of_schools))
    with numpyro.plate("classes", classes, dim=-1):
        room = numpyro.sample("class", dist.Normal(school[school_of], of_classes))
    with numpyro.plate("pupils", pupils, dim=-1):
        pupil = numpyro.sample("pupil", dist.Normal(room[class_of], of_pupils))
        with numpyro.plate("tests", len(y), dim=-2):
            numpyro.sample("y", dist.Normal(pupil, within), obs=y)


# Crossed effects


def crossed(row: Array, column: Array, y: Array, *, rows: int, columns: int) -> None:
    """Effects of rows and of columns."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    between_rows, between_columns, noise = _scales(3.0, "of_rows", "of_columns", "noise")
    with numpyro.plate("rows", rows):
        a = numpyro.sample("a", dist.Normal(0.0, between_rows))
    with numpyro.plate("columns", columns):
        b = numpyro.sample("b", dist.Normal(0.0, between_columns))
    with numpyro.plate("cells", len(y)):
        numpyro.sample("y", dist.Normal(mean + a[row] + b[column], noise), obs=y)


def items(y: Array) -> None:
    """Item response with two parameters an item."""
    of_slopes = numpyro.sample("mean_slope", dist.Normal(0.0, 1.0))
    of_levels = numpyro.sample("mean_level", dist.Normal(0.0, 2.0))
    between_slopes = numpyro.sample("sd_slope", dist.HalfNormal(1.0))
    between_levels = numpyro.sample("sd_level", dist.HalfNormal(2.0))
    people = numpyro.plate("persons", y.shape[0], dim=-2)
    tasks = numpyro.plate("items", y.shape[1], dim=-1)
    with tasks:
        slope = jnp.exp(numpyro.sample("log_slope", dist.Normal(of_slopes, between_slopes)))
        level = numpyro.sample("level", dist.Normal(of_levels, between_levels))
    with people:
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
    with people, tasks:
        numpyro.sample("y", dist.Bernoulli(logits=slope * (ability - level)), obs=y)


# Series


def level_increments(y: Array) -> None:
    """A local level, written by its increments."""
    step, noise = _scales(1.0, "step", "noise")
    with numpyro.plate("times", len(y)):
        level = numpyro.sample("increment", dist.Normal(0.0, step)).cumsum()
        numpyro.sample("y", dist.Normal(level, noise), obs=y)


def _vector(name: str, length: int) -> Array:
    flat = dist.ImproperUniform(constraints.real_vector, (), (length,))
    return numpyro.sample(name, flat)


def level_states(y: Array) -> None:
    """A local level, written by its states."""
    step, noise = _scales(1.0, "step", "noise")
    level = _vector("level", len(y))
    numpyro.factor("start", dist.Normal(0.0, step).log_prob(level[0]))
    numpyro.factor("walk", dist.Normal(level[:-1], step).log_prob(level[1:]).sum())
    numpyro.sample("y", dist.Normal(level, noise).to_event(1), obs=y)


def _volatility() -> tuple[Array, Array, Array]:
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    memory = numpyro.sample("memory", dist.Beta(20.0, 1.5))
    (step,) = _scales(1.0, "step")
    return mean, memory, step


def volatility(y: Array) -> None:
    """Stochastic volatility, by states."""
    mean, memory, step = _volatility()
    h = _vector("h", len(y))
    stationary = dist.Normal(mean, step / jnp.sqrt(1 - memory**2))
    numpyro.factor("start", stationary.log_prob(h[0]))
    moves = dist.Normal(mean + memory * (h[:-1] - mean), step)
    numpyro.factor("walk", moves.log_prob(h[1:]).sum())
    numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)).to_event(1), obs=y)


def volatility_noncentred(y: Array) -> None:
    """Stochastic volatility, by standard normal shocks."""
    mean, memory, step = _volatility()
    shocks = numpyro.sample("shocks", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))

    def move(h: Array, shock: Array) -> tuple[Array, Array]:
        h = memory * h + step * shock
        return h, h

    start = step * shocks[0] / jnp.sqrt(1 - memory**2)
    _, rest = lax.scan(move, start, shocks[1:])
    h = mean + jnp.append(start, rest)
    numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)).to_event(1), obs=y)


def ar2(y: Array) -> None:
    """A second-order autoregression that is observed with noise."""
    first = numpyro.sample("first", dist.Normal(0.0, 0.7))
    second = numpyro.sample("second", dist.Normal(0.0, 0.7))
    step, noise = _scales(1.0, "step", "noise")
    x = _vector("x", len(y))
    numpyro.factor("start", dist.Normal(0.0, 1.0).log_prob(x[:2]).sum())
    moves = dist.Normal(first * x[1:-1] + second * x[:-2], step)
    numpyro.factor("walk", moves.log_prob(x[2:]).sum())
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


# Fields


def _process(distances: Array) -> tuple[Array, Array]:
    """The mean and the root of the covariance."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    length = numpyro.sample("length", dist.LogNormal(-1.5, 0.5))
    (scale,) = _scales(2.0, "scale")
    scaled = 3**0.5 * distances / length
    covariance = (1 + scaled) * jnp.exp(-scaled) + 1e-4 * jnp.eye(len(distances))
    return mean, scale * jnp.linalg.cholesky(covariance)


def counts(distances: Array, y: Array) -> None:
    """Counts whose log rate is a Gaussian process."""
    mean, root = _process(distances)
    process = dist.MultivariateNormal(mean * jnp.ones(len(y)), scale_tril=root)
    log_rate = numpyro.sample("log_rate", process)
    numpyro.sample("y", dist.Poisson(jnp.exp(log_rate)).to_event(1), obs=y)


def counts_noncentred(distances: Array, y: Array) -> None:
    """The same in whitened coordinates."""
    mean, root = _process(distances)
    noise = numpyro.sample("noise", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    numpyro.sample("y", dist.Poisson(jnp.exp(mean + root @ noise)).to_event(1), obs=y)


def regions(
    x: Array, expected: Array, y: Array, spectrum: Array, pairs: Array, neighbours: Array
) -> None:
    """Cases of a disease by region."""
    count = len(y)
    level = numpyro.sample("level", dist.Normal(0.0, 2.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
    precision = numpyro.sample("precision", dist.Gamma(2.0, 0.5))
    share = numpyro.sample("share", dist.Beta(2.0, 1.0))
    risk = _vector("risk", count)
    alike = (risk[pairs[0]] * risk[pairs[1]]).sum()
    square = (neighbours * risk**2).sum() - 2 * share * alike
    log_det = jnp.log(1 - share * spectrum).sum() + jnp.log(neighbours).sum()
    log_det = log_det + count * jnp.log(precision / (2 * jnp.pi))
    numpyro.factor("map", 0.5 * (log_det - precision * square))
    rate = expected * jnp.exp(level + slope * x + risk)
    numpyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


# Regressions


def logistic(x: Array, y: Array) -> None:
    """A logistic regression."""
    level = numpyro.sample("level", dist.Normal(0.0, 2.0))
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(x.shape[1]), 2.0).to_event(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=level + x @ slope), obs=y)


def hierarchical_logistic(group: Array, x: Array, y: Array, *, count: int) -> None:
    """A logistic regression with a level for each group."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    (between,) = _scales(2.0, "between")
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(x.shape[1]), 2.0).to_event(1))
    with numpyro.plate("groups", count):
        level = numpyro.sample("level", dist.Normal(mean, between))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=level[group] + x @ slope), obs=y)


def horseshoe(x: Array, y: Array) -> None:
    """A regression of which few coefficients are not zero."""
    overall = numpyro.sample("overall", dist.HalfCauchy(0.1))
    (noise,) = _scales(2.0, "noise")
    with numpyro.plate("covariates", x.shape[1]):
        own = numpyro.sample("own", dist.HalfCauchy(1.0))
        slope = numpyro.sample("slope", dist.Normal(0.0, overall * own))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ slope, noise), obs=y)


def network(x: Array, y: Array, *, width: int) -> None:
    """A Bayesian neural network."""
    bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
    (noise,) = _scales(1.0, "noise")
    with numpyro.plate("units", width):
        weight = numpyro.sample("weight", dist.Normal(0.0, 2.0))
        shift = numpyro.sample("shift", dist.Normal(0.0, 2.0))
        out = numpyro.sample("out", dist.Normal(0.0, width**-0.5))
    hidden = jnp.tanh(x[:, None] * weight + shift)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(bias + hidden @ out, noise), obs=y)


MODELS: dict[str, Callable[[list[int]], Model]] = {
    "eight_schools": lambda sizes: eight_schools,
    "funnel": lambda sizes: funnel,
    "groups": lambda sizes: groups,
    "slopes": lambda sizes: partial(slopes, counties=sizes[0]),
    "schools": lambda sizes: schools,
    "crossed": lambda sizes: partial(crossed, rows=sizes[0], columns=sizes[1]),
    "items": lambda sizes: items,
    "level_increments": lambda sizes: level_increments,
    "level_states": lambda sizes: level_states,
    "volatility": lambda sizes: volatility,
    "ar2": lambda sizes: ar2,
    "counts": lambda sizes: counts,
    "regions": lambda sizes: regions,
    "logistic": lambda sizes: logistic,
    "hierarchical_logistic": lambda sizes: partial(hierarchical_logistic, count=sizes[0]),
    "horseshoe": lambda sizes: horseshoe,
    "network": lambda sizes: partial(network, width=sizes[0]),
}
"""NumPyro models by family, given the sizes."""


def _noncentred(model: Model, *sites: str) -> Model:
    return reparam(model, config={site: LocScaleReparam(0) for site in sites})


NONCENTRED: dict[str, Model] = {
    "eight_schools": _noncentred(eight_schools, "effect"),
    "funnel": _noncentred(funnel, "effect"),
    "items": _noncentred(items, "log_slope"),
    "volatility": volatility_noncentred,
    "counts": counts_noncentred,
    "horseshoe": _noncentred(horseshoe, "slope"),
}
"""Families that are better written another way."""


# NUTS


@dataclass(frozen=True)
class Schedule:
    """How long chains are.

    Args:
        chains: Chains, run side by side.
        warmup: Iterations of warm-up of each.
        draws: Draws of each.
        float64: Whether in double precision.
        accept: The acceptance probability that step sizes are adapted to.
    """

    chains: int
    warmup: int
    draws: int
    float64: bool = False
    accept: float = 0.8


USUAL = Schedule(2, 500, 500)
LONG = Schedule(4, 1500, 4000, float64=True, accept=0.9)
# The effective sample size that the baseline is timed to.
TARGET = 1000


@dataclass(frozen=True)
class Chains:
    """What chains found.

    Args:
        scalars: Draws of each entry of the globals on the unconstrained scale, of shape
            ``(chains, draws)``.
        ess: The smallest bulk effective sample size of these.
        rhat: The largest R-hat of these.
        compilation: CPU seconds of the compilation.
        warmup: CPU seconds of the warm-up.
        sampling: CPU seconds of the draws.
        divergences: Divergent iterations after the warm-up.
    """

    scalars: dict[str, np.ndarray]
    ess: float
    rhat: float
    compilation: float
    warmup: float
    sampling: float
    divergences: int

    @property
    def to_target(self) -> float:
        """CPU seconds to an effective sample size of `TARGET`, without compilation."""
        return self.warmup + self.sampling * TARGET / self.ess


def run_nuts(
    name: str, schedule: Schedule = USUAL, noncentred: bool = False, seed: int = 0
) -> Chains:
    """Runs NumPyro's NUTS on a model.

    Args:
        name: The model's name in :mod:`benchmarks.scale_models`.
        schedule: How long.
        noncentred: Whether to take the model of `NONCENTRED`, where there is one.
        seed: The seed.
    """
    family, sizes = split_name(name)
    case, model = make_case(name), MODELS[family](sizes)
    if noncentred:
        model = NONCENTRED.get(family, model)
    with jax.enable_x64(schedule.float64):
        args = as_arrays(case.args, schedule.float64)
        start = time.process_time()
        kernel = NUTS(model, target_accept_prob=schedule.accept)
        keys = jax.random.split(jax.random.PRNGKey(seed), schedule.chains)
        state = kernel.init(keys, schedule.warmup, None, args, {})
        advance = jax.jit(_advance(kernel, case.globals), static_argnums=2)
        warm_up = advance.lower(state, args, schedule.warmup).compile()
        draw = warm_up
        if schedule.draws != schedule.warmup:
            draw = advance.lower(state, args, schedule.draws).compile()
        compiled = time.process_time()
        state, _ = jax.block_until_ready(warm_up(state, args))
        warm = time.process_time()
        _, (draws, diverging) = jax.block_until_ready(draw(state, args))
        end = time.process_time()
    scalars = _entries({site: np.asarray(values) for site, values in draws.items()})
    return Chains(
        scalars,
        min(float(arviz.ess(values, method="bulk")) for values in scalars.values()),
        max(float(arviz.rhat(values)) for values in scalars.values()),
        compiled - start,
        warm - compiled,
        end - warm,
        int(diverging.sum()),
    )


def _advance(kernel: NUTS, sites: tuple[str, ...]) -> Callable[..., Any]:
    """Iterations of a kernel, which keep the unconstrained values of some sites."""

    def advance(state: Any, args: Any, iterations: int) -> Any:
        def step(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, args, {})
            return state, ({site: state.z[site] for site in sites}, state.diverging)

        return lax.scan(step, state, None, length=iterations)

    return advance


def as_arrays(args: tuple[Any, ...], float64: bool) -> tuple[Array, ...]:
    """Returns the arguments of a model as JAX arrays.

    Args:
        args: Tensors.
        float64: Whether those that are not integers are of double precision.
    """
    arrays = [value.numpy() for value in args]
    dtype = np.float64 if float64 else np.float32
    return tuple(jnp.asarray(a.astype(dtype) if a.dtype.kind == "f" else a) for a in arrays)


def _entries(draws: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes draws of shape ``(draws, chains, *shape)`` apart into scalars."""
    scalars = {}
    for name, values in draws.items():
        flat = values.reshape(*values.shape[:2], -1)
        for i in range(flat.shape[-1]):
            scalars[name if flat.shape[-1] == 1 else f"{name}[{i}]"] = flat[..., i].T
    return scalars
