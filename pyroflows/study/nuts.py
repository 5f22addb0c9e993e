"""Pyro's NUTS within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from .._checks import check_positive, check_size

__all__ = ["Chain", "NUTSFit", "run_chain", "run_within"]

Draws = dict[str, Tensor]

# Iterations, and share of the time, of the pilot that measures what an iteration costs.
PILOT, PILOT_SHARE = 50, 0.15
# Share of the rest that the warm-up is meant to take, and its iterations.
WARMUP_SHARE = 0.4
WARMUP = (50, 1000)
MOST_DRAWS = 10_000
# Draws after which the effective sample size is looked at first.
FIRST_LOOK = 200.0


@dataclass
class Chain:
    """A chain of NUTS.

    Attributes:
        draws: Draws after the warm-up, by site.
        iterations: How many iterations were made, those of the warm-up included.
        warmup: CPU seconds of the warm-up.
        sampling: CPU seconds of what followed.
    """

    draws: Draws = field(default_factory=dict)
    iterations: int = 0
    warmup: float = 0.0
    sampling: float = 0.0

    @property
    def count(self) -> int:
        """Draws after the warm-up."""
        return len(next(iter(self.draws.values()))) if self.draws else 0

    def get_samples(self) -> Draws:
        """The draws, as those of ``pyro.infer.MCMC``."""
        return self.draws


class NUTSFit:
    """Runs one chain of Pyro's NUTS.

    Args:
        steps: Iterations in all, of which the first half is the warm-up.
        cpu_seconds: CPU seconds in the place of them. A pilot of 15 % of the time measures the cost
            of an iteration; the warm-up is then meant to take 40 % of what is left.
        options: Further options of :class:`pyro.infer.NUTS`.

    Raises:
        TypeError: If a number is none.
        ValueError: If it is out of its range.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> NUTSFit(steps=20)(model, (), {}).count
        10
    """

    def __init__(self, steps: int = 2000, cpu_seconds: float | None = None, **options: Any) -> None:
        self.steps = check_size("steps", steps, least=2)
        self.cpu_seconds = (
            None if cpu_seconds is None else check_positive("cpu_seconds", cpu_seconds)
        )
        self.options = options

    def __repr__(self) -> str:
        budget = f"cpu_seconds={self.cpu_seconds:g}" if self.cpu_seconds else f"steps={self.steps}"
        return f"NUTSFit({budget})"

    def __call__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Chain:
        """Runs a chain.

        Args:
            model: The model.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            RuntimeError: If no four draws follow the warm-up.
        """
        if self.cpu_seconds is not None:
            return run_within(self.cpu_seconds, model, args, kwargs, **self.options)
        warmup = self.steps // 2
        return run_chain(model, args, kwargs, warmup, self.steps - warmup, **self.options)


class _BudgetSpent(Exception):
    """The CPU seconds of a chain are used up, or it has all that it was to reach."""


def run_within(
    cpu_seconds: float,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    **options: Any,
) -> Chain:
    """Runs a chain for so many CPU seconds; see :class:`NUTSFit`.

    Args:
        cpu_seconds: The seconds.
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        options: Further options of :class:`pyro.infer.NUTS`.

    Returns:
        The chain, whose ``warmup`` contains the pilot.

    Raises:
        RuntimeError: If no four draws follow the warm-up.
    """
    start = time.process_time()
    pilot = run_chain(
        model, args, kwargs, PILOT, 0, deadline=start + PILOT_SHARE * cpu_seconds, **options
    )
    spent = time.process_time() - start
    meant = WARMUP_SHARE * (cpu_seconds - spent) * pilot.iterations / spent
    warmup = int(np.clip(meant, *WARMUP))
    deadline = start + cpu_seconds
    chain = run_chain(model, args, kwargs, warmup, MOST_DRAWS, deadline=deadline, **options)
    if chain.count < 4:
        done = min(chain.iterations, warmup)
        raise RuntimeError(f"no draw after warm-up ({done} of {warmup} warm-up iterations done)")
    chain.warmup += spent
    return chain


def run_chain(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    warmup: int,
    samples: int,
    *,
    deadline: float = math.inf,
    measure: Callable[[Draws], float] | None = None,
    target: float = math.inf,
    **options: Any,
) -> Chain:
    """Runs a chain until it is done, has reached a target, or the time is over.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        warmup: Iterations of the warm-up.
        samples: Draws after it.
        deadline: The reading of ``time.process_time`` at which to end.
        measure: Gives the effective sample size of the draws so far.
        target: The size at which to end.
        options: Further options of :class:`pyro.infer.NUTS`.

    Returns:
        The chain.
    """
    chain = Chain()
    points: list[Draws] = []
    start = time.process_time()
    warm: float | None = None
    next_look = FIRST_LOOK

    def stack() -> Draws:
        return {
            name: kernel.transforms[name].inv(torch.stack([point[name] for point in points]))
            for name in points[0]
        }

    def watched(*args: Any, **kwargs: Any) -> None:
        # One trajectory may be a thousand gradients long, so the clock is read at every one.
        if time.process_time() > deadline:
            raise _BudgetSpent
        model(*args, **kwargs)

    def hook(kernel: NUTS, params: Draws, stage: str, i: int) -> None:
        nonlocal warm, next_look
        chain.iterations += 1
        if chain.iterations == warmup:
            warm = time.process_time()
        if not stage.startswith("Sample"):
            return
        points.append({name: value.clone() for name, value in params.items()})
        if measure is not None and len(points) >= next_look:
            ess = measure(stack())
            if ess >= target:
                raise _BudgetSpent
            grown = len(points) * min(max(target / ess, 1.05), 2.0) if ess > 0 else 0.0
            next_look = grown or 2.0 * len(points)

    kernel = NUTS(watched, **{"init_strategy": init_to_uniform, **options})
    mcmc = MCMC(
        kernel, num_samples=max(samples, 1), warmup_steps=warmup, hook_fn=hook, disable_progbar=True
    )
    try:
        mcmc.run(*args, **kwargs)
    except _BudgetSpent:
        pass
    end = time.process_time()
    chain.warmup = (warm or end) - start
    chain.sampling = end - (warm or end)
    chain.draws = stack() if points else {}
    return chain
