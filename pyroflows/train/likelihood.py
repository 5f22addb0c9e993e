"""Maximum likelihood for any flow."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._checks import check_positive, check_size, check_tensor
from .._random import seeded
from ..distributions.flow import bijection_onto
from ..flows import Flow
from ..transforms.standardize import Standardize

__all__ = ["DensityReport", "fit_density"]

WARM_UP = 20
GRADIENT_NORM = 5.0
# An improvement of less than this many nats per point does not keep the training going.
IMPROVEMENT = 1e-4
# The step size falls to this fraction whenever a third of the patience has passed without improvement.
DECAY = 0.4
INTERRUPTED = "it was interrupted"
# Latent points beyond this mean or, up or down, this standard deviation are worth a word.
FAR, WIDE = 3.0, 5.0


@dataclass(frozen=True)
class DensityReport:
    """How a maximum-likelihood fit went.

    Attributes:
        train: Mean log-likelihood of the training points in nats, before training and during each epoch.
        validation: Mean log-likelihood of the validation points in nats, before training and after each epoch.
        best_epoch: The epoch whose parameters the flow has; 0 stands for those that it came with.
        steps: Gradient steps tried.
        skipped: How many of them were left out because the loss or its gradient was not finite.
        seconds: Wall-clock time.
        reason: Why the training ended.
        train_size: Number of training points.
        validation_size: Number of validation points.
    """

    train: tuple[float, ...]
    validation: tuple[float, ...]
    best_epoch: int
    steps: int
    skipped: int
    seconds: float
    reason: str
    train_size: int
    validation_size: int

    @property
    def log_likelihood(self) -> float:
        """Mean log-likelihood of the validation points under the flow as it is kept, in nats."""
        return self.validation[self.best_epoch]

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return len(self.validation) - 1

    def __str__(self) -> str:
        best = (
            "training did not improve on it"
            if self.best_epoch == 0
            else f"reached in epoch {self.best_epoch}"
        )
        skipped = (
            f"; {self.skipped} of {self.steps} steps were skipped as not finite"
            if self.skipped
            else ""
        )
        return (
            f"The validation log-likelihood is {self.log_likelihood:.3f} nats per point ({self.validation_size} points), "
            f"{best}; training ended after {_count(self.epochs, 'epoch')} and {self.seconds:.0f} s because "
            f"{self.reason}{skipped}."
        )


def fit_density(
    flow: nn.Module,
    x: Tensor,
    context: Tensor | None = None,
    *,
    validation: float | Tensor | Sequence[Tensor] = 0.1,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    max_epochs: int = 500,
    patience: int = 20,
    weight_decay: float = 0.0,
    seed: int | None = 0,
    time_limit: float | None = None,
    progress: bool = True,
) -> DensityReport:
    r"""Fits a flow to data by maximum likelihood.

    .. math:: \max_\phi \; \frac{1}{N} \sum_{n=1}^{N} \log p_\phi(x_n \mid c_n),

    by Adam on shuffled batches, with clipped gradients and a step size that falls along a cosine over the epochs (or over
    the time, whichever is shorter) and whenever the log-likelihood of held-out points stands still. The training ends
    when that has not improved for ``patience`` epochs, and the flow keeps the parameters that were best by it, also after
    Ctrl-C. The flow is left in ``eval()`` mode.

    A last layer :class:`pyroflows.transforms.Standardize` that was not fitted before is fitted to the training points.

    Args:
        flow: A flow, or any module whose call, with the context if there is one, returns a distribution over single
            points. Its parameters change in place; points are moved to its device and dtype.
        x: Points of shape ``(N, *event_shape)``.
        context: Their contexts, of shape ``(N, context_features)``; ``None`` for a flow without context.
        validation: Fraction of the points to hold out, chosen at random; or the held-out points themselves, of shape
            ``(M, *event_shape)``, with their contexts as a pair ``(x, context)`` where the flow has a context.
        batch_size: Points per step; the points of an epoch are split into batches of equal size, at most this.
        learning_rate: Largest step size.
        max_epochs: Most passes through the training points.
        patience: Epochs without improvement of the validation log-likelihood after which to stop.
        weight_decay: Decoupled weight decay.
        seed: Seed of the split, the batches and all else that is random here. The random state outside is left as it
            was. ``None`` draws from that state.
        time_limit: Seconds of wall-clock time.
        progress: Whether to show a progress bar.

    Returns:
        How it went; printed, a sentence.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the shapes do not fit the flow, there are too few points, points or contexts are not finite, are
            outside of the support or have no finite density to begin with, or an option is out of its range. The flow is
            then as it was.

    Reference:
        Papamakarios, Nalisnick, Rezende, Mohamed, Lakshminarayanan, "Normalizing flows for probabilistic modeling and
        inference", 2021, https://arxiv.org/abs/1912.02762

    Example:
        >>> import pyroflows as pf
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 2.0])
        >>> flow = pf.RealNVP(features=2)
        >>> report = fit_density(flow, x, max_epochs=5, progress=False)
        >>> report.epochs, len(report.validation)
        (5, 6)
    """
    start = time.perf_counter()
    options = _check_options(
        _Options(batch_size, learning_rate, max_epochs, patience, weight_decay, time_limit)
    )
    if not isinstance(flow, nn.Module):
        raise TypeError(
            f"Expected flow to be a module whose call returns a distribution; got {flow!r}."
        )
    before = {name: value.clone() for name, value in _tensors(flow).items()}
    modes = [(module, module.training) for module in flow.modules()]
    with seeded(seed), torch.enable_grad():
        try:
            flow.eval()
            train, held_out = _split(flow, x, context, validation)
            _fit_standardize(flow, train.x)
            history = (
                [_first_log_prob("x", flow, train, options)],
                [_first_log_prob("validation", flow, held_out, options)],
            )
        except BaseException:
            flow.load_state_dict(before, strict=False)
            for module, mode in modes:
                module.training = mode
            raise
        _warn_if_far(flow, train)
        return _Fit(flow, train, held_out, options, history, start).run(progress)


class _Options(NamedTuple):
    batch_size: int
    learning_rate: float
    max_epochs: int
    patience: int
    weight_decay: float
    time_limit: float | None


class _Points(NamedTuple):
    """Points with their contexts."""

    x: Tensor
    context: Tensor | None

    def rows(self, index: Any) -> _Points:
        return _Points(self.x[index], None if self.context is None else self.context[index])

    def batches(self, size: int, shuffled: bool = False) -> Iterator[_Points]:
        """Batches of equal size, at most ``size``: a small remainder would weigh as much as a batch."""
        n = len(self.x)
        order = (torch.randperm if shuffled else torch.arange)(n, device="cpu").to(self.x.device)
        for part in order.tensor_split(math.ceil(n / size)):
            yield self.rows(part)


class _Fit:
    """The training loop and what it remembers."""

    def __init__(
        self,
        flow: nn.Module,
        train: _Points,
        held_out: _Points,
        options: _Options,
        history: tuple[list[float], list[float]],
        start: float,
    ) -> None:
        self.flow, self.train, self.held_out, self.options, self.start = (
            flow,
            train,
            held_out,
            options,
            start,
        )
        self.parameters = [p for p in flow.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            weight_decay=options.weight_decay,
            fused=train.x.device.type in ("cpu", "cuda"),
        )
        self.train_history, self.history = history
        self.batches = math.ceil(len(train.x) / options.batch_size)
        self.steps = self.skipped = self.best_epoch = self.stale = 0
        self.goal = self.history[0]
        self.shrunk = 1.0
        self.best = {name: value.clone() for name, value in _tensors(flow).items()}

    def run(self, progress: bool) -> DensityReport:
        reason = None
        try:
            with tqdm(total=self.options.max_epochs, disable=not progress, desc="Fitting") as bar:
                while reason is None:
                    reason = self.epoch()
                    bar.update()
                    bar.set_postfix_str(
                        f"validation {self.history[-1]:.3f}, best {self.history[self.best_epoch]:.3f}"
                    )
        except KeyboardInterrupt:
            reason = INTERRUPTED
        finally:
            self.flow.load_state_dict(self.best, strict=False)
            self.flow.eval()
        return DensityReport(
            train=tuple(self.train_history),
            validation=tuple(self.history),
            best_epoch=self.best_epoch,
            steps=self.steps,
            skipped=self.skipped,
            seconds=time.perf_counter() - self.start,
            reason=reason,
            train_size=len(self.train.x),
            validation_size=len(self.held_out.x),
        )

    def epoch(self) -> str | None:
        """Passes through the training points once; says why the training should end, if it should."""
        self.flow.train()
        seen: list[Tensor] = []
        reason = None
        try:
            for batch in self.train.batches(self.options.batch_size, shuffled=True):
                if self.fraction_done() >= 1:
                    reason = f"the time limit of {self.options.time_limit:g} s was reached"
                    break
                seen.append(self.step(batch))
        except KeyboardInterrupt:
            reason = INTERRUPTED
        # What a pass that was cut short has learnt counts too.
        self.see(float(torch.stack(seen).nanmean()) if seen else math.nan)
        if reason is None and self.stale >= self.options.patience:
            reason = f"validation had not improved for {_count(self.options.patience, 'epoch')}"
        if reason is None and len(self.history) > self.options.max_epochs:
            reason = f"all {_count(self.options.max_epochs, 'epoch')} were done"
        return reason

    def step(self, batch: _Points) -> Tensor:
        """Takes one gradient step unless it is not finite; returns the mean log-likelihood of the batch."""
        warm_up = min(1.0, (self.steps + 1) / WARM_UP)
        rate = warm_up * self.shrunk * 0.5 * (1 + math.cos(math.pi * self.fraction_done()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.options.learning_rate
        self.steps += 1
        self.optimizer.zero_grad()
        log_prob = _log_prob(self.flow, batch).mean()
        (-log_prob).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        if bool((norm + log_prob).isfinite()):
            self.optimizer.step()
            return log_prob.detach()
        self.skipped += 1
        return torch.full_like(log_prob.detach(), math.nan)

    def see(self, train: float) -> None:
        """Judges the parameters by the validation points and keeps them if they are the best so far."""
        self.flow.eval()
        value = float(_log_probs(self.flow, self.held_out, self.options.batch_size).mean())
        if value > self.history[self.best_epoch]:
            self.best_epoch = len(self.history)
            self.best = {name: value.clone() for name, value in _tensors(self.flow).items()}
        self.train_history.append(train)
        self.history.append(value)
        if value > self.goal + IMPROVEMENT:
            self.goal, self.stale = value, 0
            return
        self.stale += 1
        if self.stale % max(1, self.options.patience // 3) == 0:
            self.shrunk *= DECAY

    def fraction_done(self) -> float:
        limit = self.options.time_limit
        by_steps = self.steps / (self.batches * self.options.max_epochs)
        return (
            by_steps if limit is None else max(by_steps, (time.perf_counter() - self.start) / limit)
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _tensors(flow: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach()
        for name, value in flow.state_dict().items()
        if isinstance(value, Tensor)
    }


def _distribution(flow: nn.Module, context: Tensor | None) -> Any:
    return flow() if context is None else flow(context)


def _log_prob(flow: nn.Module, points: _Points) -> Tensor:
    return _distribution(flow, points.context).log_prob(points.x)


@torch.no_grad()
def _log_probs(flow: nn.Module, points: _Points, batch_size: int) -> Tensor:
    """Log-density of each point, on the host."""
    parts = [
        _log_prob(flow, batch).to("cpu", torch.float64) for batch in points.batches(4 * batch_size)
    ]
    return torch.cat(parts)


# What is checked before anything changes


def _check_options(options: _Options) -> _Options:
    for name in ("batch_size", "max_epochs", "patience"):
        check_size(name, getattr(options, name))
    check_positive("learning_rate", options.learning_rate)
    if options.weight_decay != 0:
        check_positive("weight_decay", options.weight_decay)
    if options.time_limit is not None:
        check_positive("time_limit", options.time_limit)
    return options


def _split(
    flow: nn.Module, x: Tensor, context: Tensor | None, validation: Any
) -> tuple[_Points, _Points]:
    """The training points and those held out."""
    trained = next((p for p in flow.parameters() if p.requires_grad), None)
    if trained is None:
        raise ValueError(
            f"Expected a flow with parameters to train; got {type(flow).__name__} without any."
        )
    points = _points("x", flow, x, context, like=trained)
    if isinstance(validation, Real) and not isinstance(validation, bool):
        train, held_out = _hold_out(points, float(validation))
    else:
        given: Any = (validation,) if isinstance(validation, Tensor) else validation
        if not isinstance(given, Sequence) or isinstance(given, str) or not 1 <= len(given) <= 2:
            raise TypeError(
                "Expected validation to be a fraction, held-out points, or a pair of points and contexts; "
                f"got {validation!r}."
            )
        if (len(given) == 1) != (context is None):
            raise ValueError(
                "Expected validation to be a pair of points and contexts where there is a context, and points alone "
                f"where there is none; got {'no contexts' if len(given) == 1 else 'a pair'}."
            )
        train, held_out = points, _points("validation", flow, *given, like=trained)
        if len(train.x) < 2:
            raise ValueError(f"Expected at least 2 points to train on; got {len(train.x)}.")
    return train, held_out


def _points(name: str, flow: nn.Module, x: Any, context: Any = None, *, like: Tensor) -> _Points:
    """Points that a flow can be fitted to, where it is and of its dtype."""
    check_tensor(name, x, ())
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(
            f"Expected {name} to hold points along its first dimension; got shape {tuple(x.shape)}."
        )
    if context is not None:
        check_tensor("context", context, ())
        if context.dim() == 0 or len(context) != len(x):
            raise ValueError(
                f"Expected one context for each of the {len(x)} points; got shape {tuple(context.shape)}."
            )
    for what, value in ((name, x), ("context", context)):
        if value is not None:
            _check_rows(
                f"finite numbers in {what}", value.isfinite().reshape(len(value), -1).all(-1)
            )

    def placed(value: Tensor) -> Tensor:
        return value.detach().to(like.device, like.dtype)

    points = _Points(placed(x), None if context is None else placed(context))
    _check_event(name, flow, points)
    return points


def _hold_out(points: _Points, fraction: float) -> tuple[_Points, _Points]:
    if not 0 < fraction < 1:
        raise ValueError(
            f"Expected validation between 0 and 1, the fraction of points to hold out; got {fraction:g}."
        )
    n = len(points.x)
    held_out = max(1, round(fraction * n))
    if n - held_out < 2:
        raise ValueError(
            f"Expected at least 2 points to train on besides those held out; got {n} points in all."
        )
    order = torch.randperm(n, device="cpu").to(points.x.device)
    return points.rows(order[held_out:]), points.rows(order[:held_out])


def _check_event(name: str, flow: nn.Module, points: _Points) -> None:
    """Checks points against what the flow is a distribution of."""
    one = points.rows(slice(1))
    with torch.no_grad():
        distribution = _distribution(flow, one.context)
    if not isinstance(distribution, torch.distributions.Distribution):
        raise TypeError(
            f"Expected flow to return a distribution when called; got {type(distribution).__name__}."
        )
    batch, event = tuple(distribution.batch_shape), tuple(distribution.event_shape)
    if batch not in ((), (1,)) or (batch == (1,) and points.context is None):
        raise ValueError(
            f"Expected flow to return a distribution over single points; got one of batch shape {batch}."
        )
    if tuple(points.x.shape[1:]) != event:
        sizes = ", ".join(["N", *map(str, event)])
        raise ValueError(f"Expected {name} of shape ({sizes}); got {tuple(points.x.shape)}.")
    with contextlib.suppress(NotImplementedError):
        support: Any = distribution.support
        inside = support.check(points.x).reshape(len(points.x), -1).all(-1)
        _check_rows(f"{name} within the support {support}", inside)


def _check_rows(expected: str, good: Tensor) -> None:
    if not bool(good.all()):
        bad = (~good).nonzero().flatten()
        raise ValueError(
            f"Expected {expected}; {len(bad)} of {len(good)} rows are not so, the first is row {int(bad[0])}."
        )


def _first_log_prob(name: str, flow: nn.Module, points: _Points, options: _Options) -> float:
    values = _log_probs(flow, points, options.batch_size)
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"Expected a finite density at every point of {name} before training; {int((~values.isfinite()).sum())} of "
            f"{len(values)} points have none. Standardise the points, or end the flow with Standardize."
        )
    return float(values.mean())


def _fit_standardize(flow: nn.Module, x: Tensor) -> None:
    """Fits a last layer that standardises and has not been fitted."""
    if isinstance(flow, Flow):
        last = flow.transform.layers[-1]
        if isinstance(last, Standardize) and not bool(last.is_fitted):
            last.fit(_unconstrained(flow, x))


def _unconstrained(flow: Flow, x: Tensor) -> Tensor:
    return x if flow.support is None else bijection_onto(flow.support).inv(x)


@torch.no_grad()
def _warn_if_far(flow: nn.Module, points: _Points) -> None:
    """Warns if the flow takes the points far from its base, the standard normal."""
    some = points.rows(slice(1000))
    if not isinstance(flow, Flow) or flow._base is not None or len(some.x) < 100:
        return
    latent, _ = flow(some.context).transform.inverse_and_log_det(_unconstrained(flow, some.x))
    mean, sd = latent.mean(0).abs().max(), latent.std(0)
    if bool((mean > FAR) | (sd.max() > WIDE) | (sd.min() < 1 / WIDE)):
        warnings.warn(
            f"The flow starts far from the points: it takes them to means up to {float(mean):.3g} and standard deviations "
            f"from {float(sd.min()):.3g} to {float(sd.max()):.3g}, which training has to mend first. Standardise the "
            "points, or end the flow with Standardize.",
            stacklevel=3,
        )
