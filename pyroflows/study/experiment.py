"""Experiments in approximation: guides and objectives side by side, under equal budgets."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO

from .._checks import check_positive, check_seed, check_size
from .._compat import without_handlers
from .._random import forked, seeded
from ..flows import Flow
from ..guides import AutoFlow, as_guide
from ..model import prediction as simulate
from ..model.checks import check_arguments
from ..model.density import LogDensity
from ..model.faults import describe_error
from ..posterior import fit_posterior
from ..posterior.fingerprint import take_fingerprint
from ..posterior.importance import draw_importance_sample
from ..posterior.posterior import Posterior
from ..report.accuracy import moments
from ..report.statistics import diagnostics
from .comparison import Experiment, read_reference
from .fits import Fit, SVIFit, as_fit, draw, name_of_fit, name_of_objective, run_fit
from .nuts import NUTSFit
from .simulation import holding
from .work import Ledger, Running, check_running, do_all

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["experiment"]

NUTS_NAME = "NUTS"
DRAWS = 4000
FLOW_LEARNING_RATE = 0.01


class Options(Running, total=False):
    """How an experiment is run; see :func:`experiment`."""

    draws: int


class Task(NamedTuple):
    """One cell of an experiment.

    Attributes:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        state: Parameters of the model in Pyro's param store.
        fit: What fits it.
        draws: How many draws to compare.
        seed: Seed of the fit and of the draws.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    fit: Fit
    draws: int
    seed: int


class Budget(NamedTuple):
    """What each method may spend: gradient steps, or CPU seconds in the place of them."""

    steps: int
    cpu_seconds: float | None


def experiment(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    guides: Sequence[Any] | Mapping[str, Any],
    objectives: Sequence[Any] | Mapping[str, Any] = (),
    reference: Any = None,
    seeds: int | Sequence[int] = 1,
    steps: int = 2000,
    cpu_seconds: float | None = None,
    **options: Unpack[Options],
) -> Experiment:
    r"""Fits a model by every guide with every objective, under one budget, and compares the results.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        guides: The methods, as a list, or as a mapping from names: classes of autoguides such as
            ``AutoNormal`` and callables from a model to a guide, or flows such as
            ``pyroflows.RealNVP``, of which an :class:`AutoFlow` is made, each of them trained for
            each objective by ``SVI`` with a first step size of 0.05, that of flows 0.01, or with
            that of a :class:`pyroflows.study.SVIFit` of it; and rows of their own,
            :func:`fit_posterior` (or ``functools.partial`` of it) and ``"NUTS"``.
        objectives: Losses of Pyro's, such as ``Trace_ELBO(num_particles=16)``, and those of
            :mod:`pyroflows.train.objectives`, as a list or as a mapping from names;
            ``Trace_ELBO()`` by default.
        reference: Draws that are taken for the truth, by site, of shape ``(n, *site_shape)``;
            chains, of :func:`pyroflows.posterior.neutra` or of ``pyro.infer.MCMC``; or ArviZ's
            container with a group ``posterior``. Without it there are no errors.
        seeds: The seeds of each fit, or how many: 0, 1, and so on.
        steps: Gradient steps that each may take; NUTS makes so many iterations, half of them to
            warm up.
        cpu_seconds: CPU seconds that each may take, in the place of steps.
        options: How it is run: ``executor``, ``checkpoint`` and ``progress``, as for
            :func:`calibrate`; and ``draws`` (4000), how many draws of each method to compare.

    Returns:
        A table with a row for each fit, medians over seeds, and a picture.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no guide, if two have one name, if the model cannot be evaluated, or
            if the reference does not fit the model.

    Reference:
        Agrawal, Sheldon, Domke, "Advances in black-box VI: Normalizing flows, importance weighting,
        and optimization", 2020, https://arxiv.org/abs/2006.10343

    Example:
        >>> import pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
        >>> truth = {"x": 1 + 0.5**0.5 * torch.randn(1000)}
        >>> found = pf.experiment(
        ...     model, guides=[AutoNormal, pf.fit_posterior], reference=truth, steps=50,
        ...     progress=False)
        >>> list(found.table["method"])
        ['AutoNormal', 'fit_posterior']
    """
    draws = check_size("draws", options.pop("draws", DRAWS), least=100)
    running = check_running(options)
    chosen = _check_seeds(seeds)
    budget = _check_budget(steps, cpu_seconds)
    fits = _make_fits(guides, objectives, budget)
    args, kwargs = check_arguments(args, kwargs)
    store = pyro.get_param_store()
    with holding(store.get_state()), without_handlers():
        with forked(0):
            density = LogDensity(model, args, kwargs)
        state = store.get_state()
        fingerprint = list(take_fingerprint(density))
    settings = {"budget": list(budget), "draws": draws, "model": fingerprint}
    known = None if reference is None else read_reference(reference, density)
    ledger = Ledger(running["checkpoint"], "experiment", settings)
    tasks = {
        _key(*labels, seed): Task(model, args, kwargs, state, fit, draws, seed)
        for labels, fit in fits.items()
        for seed in chosen
    }
    results = dict(do_all(_fit_one, tasks, ledger, running, unit="fits"))
    cells = [((*labels, seed), results[_key(*labels, seed)]) for labels in fits for seed in chosen]
    return Experiment(cells, known)


def _key(method: str, objective: str, seed: int) -> str:
    return " | ".join([method, objective, str(seed)])


# The methods


def _check_seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, Sequence) and not isinstance(seeds, str):
        chosen = [check_seed(seed) for seed in seeds]
    else:
        chosen = list(range(check_size("seeds", seeds)))
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"Expected one seed or more, each once; got {chosen}.")
    return chosen


def _check_budget(steps: Any, cpu_seconds: Any) -> Budget:
    seconds = None if cpu_seconds is None else check_positive("cpu_seconds", cpu_seconds)
    return Budget(check_size("steps", steps, least=2), seconds)


def _named(what: str, given: Any, name: Callable[[Any], str]) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return {str(key): value for key, value in given.items()}
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"Expected {what} to be a list, or a mapping from names; got {given!r}.")
    names = [name(value) for value in given]
    for one in names:
        if names.count(one) > 1:
            raise ValueError(
                f"Expected {what} with names of their own; got {one!r} twice. Give a mapping."
            )
    return dict(zip(names, given, strict=True))


def _make_fits(guides: Any, objectives: Any, budget: Budget) -> dict[tuple[str, str], Fit]:
    """The fit of each method and objective, in their order."""
    methods = _named("guides", guides, _name_of_guide)
    losses = _named("objectives", objectives, name_of_objective)
    if not methods:
        raise ValueError("Expected guides with one method at least; got none.")
    for name, loss in losses.items():
        if not isinstance(loss, ELBO):
            raise TypeError(
                "Expected objectives of pyro.infer or pyroflows.train.objectives, such as "
                f"Trace_ELBO(); got {loss!r} for {name!r}."
            )
    losses = losses or {"Trace_ELBO": Trace_ELBO()}
    fits: dict[tuple[str, str], Fit] = {}
    for name, method in methods.items():
        alone = _row_of_its_own(method, budget)
        if alone is not None:
            fits[name, ""] = alone
            continue
        trained = _as_svi_fit(method)
        for objective, loss in losses.items():
            fits[name, objective] = SVIFit(
                trained.guide, budget.steps, trained.learning_rate, loss, budget.cpu_seconds
            )
    return fits


def _name_of_guide(guide: Any) -> str:
    if isinstance(guide, SVIFit):
        return name_of_fit(guide.guide)
    return guide if isinstance(guide, str) else name_of_fit(guide)


def _row_of_its_own(method: Any, budget: Budget) -> Fit | None:
    """The fit of a method that has an objective of its own."""
    if method == NUTS_NAME:
        return NUTSFit(budget.steps, budget.cpu_seconds)
    if getattr(method, "func", method) is fit_posterior:
        limits = {"steps": budget.steps}
        if budget.cpu_seconds is not None:
            # Of the clock, which on one thread goes as fast.
            limits = {"time_limit": budget.cpu_seconds}  # type: ignore[dict-item]
        return functools.partial(as_fit(method), **{"progress": False, **limits})
    return None


def _as_svi_fit(method: Any) -> SVIFit:
    """A guide with its step size, to be trained for any objective."""
    if isinstance(method, SVIFit):
        return method
    if isinstance(method, type) and issubclass(method, Flow):
        make = functools.partial(_make_auto_flow, flow=method)
        return SVIFit(make, learning_rate=FLOW_LEARNING_RATE)
    if isinstance(method, (str, torch.nn.Module)) or not callable(method):
        raise TypeError(
            "Expected guides to be classes such as AutoNormal, callables from a model to a guide, "
            f"flows, pyroflows.fit_posterior or 'NUTS'; got {method!r}."
        )
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        raise TypeError(
            f"Expected a guide to be made by a call with the model alone; got {method!r}. Use a "
            "lambda or functools.partial for its options."
        ) from None
    except ValueError:  # written in C, without a signature
        pass
    return SVIFit(method)


def _make_auto_flow(model: Callable[..., Any], flow: Any) -> AutoFlow:
    return AutoFlow(model, flow)


# One cell


def _fit_one(task: Task) -> dict[str, Any]:
    """Fits a model, and measures what came out."""
    with holding(task.state), seeded(task.seed), without_handlers():
        start = time.process_time()
        try:
            fitted = run_fit(task.fit, task.model, task.args, task.kwargs, task.seed)
            seconds = time.process_time() - start
            found, numbers = _measure(fitted, task)
        except Exception as error:
            return {"error": describe_error(error), "seconds": time.process_time() - start}
    plain = {
        name: [torch.as_tensor(part) for part in moments(values)] for name, values in found.items()
    }
    return {"error": "", "seconds": seconds, "moments": plain, **numbers}


Measured = tuple[dict[str, np.ndarray], dict[str, Any]]


def _measure(fitted: Any, task: Task) -> Measured:
    """Draws, and the numbers that tell of their quality without a reference."""
    if isinstance(fitted, Posterior):
        drawn = draw(fitted, task.args, task.kwargs, task.draws, task.seed)
        return drawn, {**_weights_of(fitted.verdict), "ok": fitted.verdict.ok}
    if hasattr(fitted, "get_samples"):
        chain = {name: value.detach().numpy() for name, value in fitted.get_samples().items()}
        return chain, {"ess": _smallest_ess(chain)}
    density = LogDensity(task.model, task.args, task.kwargs)
    with forked(task.seed):
        sample = draw_importance_sample(as_guide(fitted, density), density, task.draws)
        drawn = {
            name: value.detach().cpu().numpy()
            for name, value in simulate.site_draws(density, sample.z).items()
        }
    return drawn, _weights_of(sample)


def _weights_of(known: Any) -> dict[str, float]:
    names = ("elbo", "khat", "ess", "log_evidence", "log_evidence_error")
    return {name: float(getattr(known, name)) for name in names}


def _smallest_ess(draws: Mapping[str, np.ndarray]) -> float:
    """The smallest bulk effective sample size of one chain, as a share of its draws."""
    count = len(next(iter(draws.values()))) // 2 * 2
    # ArviZ counts every draw of a chain that never moves.
    if any((np.ptp(values, axis=0) == 0).any() for values in draws.values()):
        return 0.0
    halves = {name: v[:count].reshape(2, count // 2, *v.shape[1:]) for name, v in draws.items()}
    sizes = diagnostics(halves)["ess_bulk"].values()
    return float(np.min([np.min(size) for size in sizes])) / count
