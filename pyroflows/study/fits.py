"""Fits of any kind, and draws from whatever they return."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.optim import LambdaLR  # type: ignore[attr-defined]  # made at import from torch's
from torch import Tensor

from .._checks import check_positive, check_size
from .._random import forked
from ..model.sites import sample_nodes
from ..posterior import fit_posterior

__all__ = [
    "Fit",
    "SVIFit",
    "WrongDrawsError",
    "array_of",
    "as_fit",
    "draw",
    "name_of_fit",
    "name_of_objective",
    "run_fit",
]

#: Takes a model, its positional and its keyword arguments, and perhaps a ``seed``.
Fit = Callable[..., Any]

# The step size falls to this share of the first.
LAST_RATE = 0.1
CLIP_NORM = 10.0


class WrongDrawsError(ValueError):
    """A fit returns what cannot be its draws, so that all its data sets would fail."""


class SVIFit:
    r"""Trains a fresh guide by Pyro's ``SVI``, as tutorials do.

    Adam takes all steps, with a step size that falls exponentially to a tenth, and gradients whose
    norm is clipped at 10. Parameters of the model are held, as :func:`fit_posterior` does.

    Args:
        guide: Makes a guide from a model, such as the class ``AutoNormal``.
        steps: How many steps.
        learning_rate: The first step size.
        objective: A loss of Pyro's, or one of :mod:`pyroflows.train.objectives`; ``Trace_ELBO()``
            by default.
        cpu_seconds: CPU seconds in the place of ``steps``.

    Raises:
        TypeError: If ``guide`` is not callable, or a number none.
        ValueError: If a number is out of its range.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> fit = SVIFit(AutoNormal, steps=10)
        >>> type(fit(model, (torch.tensor(1.0),), {})).__name__
        'AutoNormal'
    """

    def __init__(
        self,
        guide: Callable[..., Any],
        steps: int = 2000,
        learning_rate: float = 0.05,
        objective: Any = None,
        cpu_seconds: float | None = None,
    ) -> None:
        if not callable(guide) or isinstance(guide, torch.nn.Module):
            raise TypeError(
                "Expected guide to make a guide from a model, as the class AutoNormal does; got "
                f"{guide!r}."
            )
        self.guide = guide
        self.steps = check_size("steps", steps, least=0)
        self.learning_rate = check_positive("learning_rate", learning_rate)
        self.objective = Trace_ELBO() if objective is None else objective
        self.cpu_seconds = (
            None if cpu_seconds is None else check_positive("cpu_seconds", cpu_seconds)
        )

    def __repr__(self) -> str:
        budget = f"cpu_seconds={self.cpu_seconds:g}" if self.cpu_seconds else f"steps={self.steps}"
        options = f"{budget}, learning_rate={self.learning_rate}"
        objective = name_of_objective(self.objective)
        return f"SVIFit({_name(self.guide)}, {options}, objective={objective})"

    def __call__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Trains a guide of a model.

        Args:
            model: The model.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            The guide, whose parameters are in the param store of Pyro.

        Raises:
            RuntimeError: If the loss becomes NaN.
        """
        guide = self.guide(model)
        start, taken = time.process_time(), 0

        def spent() -> float:
            if self.cpu_seconds is None:
                return taken / max(1, self.steps)
            return (time.process_time() - start) / self.cpu_seconds

        schedule = LambdaLR(
            {
                "optimizer": torch.optim.Adam,
                "optim_args": {"lr": self.learning_rate},
                "lr_lambda": lambda _: LAST_RATE ** min(1.0, spent()),
            },
            clip_args={"clip_norm": CLIP_NORM},
        )
        # A loss may remember the plates of its first model, which it runs to count them.
        held = poutine.block(model, hide_types=["param"])
        svi = SVI(held, guide, schedule, copy.deepcopy(self.objective))
        while spent() < 1 and (taken < self.steps or self.cpu_seconds is not None):
            if math.isnan(svi.step(*args, **kwargs)):
                raise RuntimeError(f"the loss became NaN at step {taken}")
            schedule.step()
            taken += 1
        return guide


def as_fit(fit: Any) -> Fit:
    """Returns a callable that fits a model to its data.

    Args:
        fit: Such a callable, with the first three arguments of :func:`fit_posterior`; the class of
            an autoguide, which is trained as :class:`SVIFit` does; or an amortised posterior.

    Raises:
        TypeError: If it is none of them.
    """
    if isinstance(fit, type) and issubclass(fit, AutoGuide):
        return SVIFit(fit)
    if hasattr(fit, "posterior_for"):
        return AmortizedFit(fit)
    if isinstance(fit, torch.nn.Module):
        kind = type(fit).__name__
        raise TypeError(
            f"Expected fit to train a guide for each data set, as the class {kind} says; got a "
            f"made {kind}."
        )
    if isinstance(fit, type) or not callable(fit):
        raise TypeError(
            "Expected fit to be pyroflows.fit_posterior, another callable with its first three "
            "arguments, the class of a guide such as AutoNormal, or an amortised posterior; got "
            f"{fit!r}."
        )
    return functools.partial(fit, progress=False) if fit is fit_posterior else fit


class AmortizedFit:
    """The posterior that an amortised one has for the data of a model, for which nothing is
    trained.

    Args:
        amortized: What has ``posterior_for(x)``, with the value of the observed site, or a
            dictionary of the values where there are more. Its draws are taken as they are, without
            the corrections that take longer: with ``judge=False`` if it has that option.
    """

    def __init__(self, amortized: Any) -> None:
        self.amortized = amortized

    def __call__(self, model: Any, args: Any, kwargs: Any) -> Any:
        """Looks up the posterior of a :class:`~pyroflows.study.simulation.GivenData`."""
        data = dict(model.data)
        x = data if len(data) > 1 else next(iter(data.values()))
        options = {"judge": False} if _takes(self.amortized.posterior_for, "judge") else {}
        return self.amortized.posterior_for(x, **options)


def name_of_fit(fit: Any) -> str:
    """A short name of a fit, for tables and to tell files of one from those of another.

    Args:
        fit: The fit.

    Example:
        >>> name_of_fit(functools.partial(fit_posterior, steps=100))
        'fit_posterior(steps=100)'
    """
    if hasattr(fit, "posterior_for"):
        return f"{type(fit).__name__}.posterior_for"
    if isinstance(fit, functools.partial):
        given = [_name(value) for value in fit.args]
        named = [f"{key}={_name(value)}" for key, value in fit.keywords.items()]
        return f"{name_of_fit(fit.func)}({', '.join([*given, *named])})"
    return _name(fit)


def name_of_objective(objective: Any) -> str:
    """A short name of a loss, with its number of particles if they are several.

    Args:
        objective: The loss.

    Example:
        >>> name_of_objective(Trace_ELBO(num_particles=8))
        'Trace_ELBO(8)'
    """
    particles = getattr(objective, "num_particles", 1)
    name = type(objective).__name__
    return name if particles == 1 else f"{name}({particles})"


def _name(value: Any) -> str:
    """The name of a function or class, or what an object says of itself without its address."""
    if type(value).__repr__ is object.__repr__:
        return type(value).__name__
    text: str = getattr(value, "__name__", "") or repr(value)
    return text.partition(" at 0x")[0]


def run_fit(fit: Fit, model: Any, args: Any, kwargs: Any, seed: int) -> Any:
    """Calls a fit, with a seed if it takes one."""
    return fit(model, args, kwargs, **({"seed": seed} if _takes(fit, "seed") else {}))


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of some name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C, or a callable that hides its signature
        return False


def draw(fitted: Any, args: Any, kwargs: Any, n: int, seed: int) -> dict[str, np.ndarray]:
    """Draws from what a fit has returned.

    Args:
        fitted: A posterior, which has ``sample(n, seed)``; draws by site, of shape
            ``(at least n, *site_shape)``, of which n are taken at equal distances, or what has such
            by ``get_samples()``; or a guide.
        args: Positional arguments of the guide.
        kwargs: Its keyword arguments.
        n: How many draws.
        seed: Their seed.

    Returns:
        For each site an array of shape ``(n, *site_shape)``.

    Raises:
        WrongDrawsError: If it is none of these, or if there are fewer draws than n.
    """
    if getattr(fitted, "interrupted", False):
        raise KeyboardInterrupt  # the fit took it for itself
    if hasattr(fitted, "get_samples"):
        fitted = fitted.get_samples()
    if isinstance(fitted, Mapping):
        return {name: _thin(name, values, n) for name, values in fitted.items()}
    is_guide = isinstance(fitted, torch.nn.Module)
    if not is_guide and callable(getattr(fitted, "sample", None)):
        return {name: array_of(values) for name, values in fitted.sample(n, seed).items()}
    if not callable(fitted):
        raise WrongDrawsError(
            "Expected a fit to return a posterior, draws by site, or a trained guide; got "
            f"{type(fitted).__name__}."
        )
    with forked(seed):
        return _draw_guide(fitted, args, kwargs, n)


@torch.no_grad()
def _draw_guide(guide: Any, args: Any, kwargs: Any, n: int) -> dict[str, np.ndarray]:
    rows: list[dict[str, np.ndarray]] = []
    for _ in range(n):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        rows.append({name: array_of(node["value"]) for name, node in sample_nodes(trace)})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _thin(name: str, values: Any, n: int) -> np.ndarray:
    array = array_of(values)
    if array.ndim == 0 or len(array) < n:
        got = len(array) if array.ndim else "a number"
        raise WrongDrawsError(f"Expected {n} draws of {name!r} at least; got {got}.")
    return array[np.linspace(0, len(array) - 1, n).round().astype(int)]


def array_of(values: Any) -> np.ndarray:
    """Returns a tensor, or what numpy takes, as an array."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
