"""Maximum likelihood for any flow."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import caller_level, check_flag, check_positive, check_size
from .._deadline import Deadline
from .._outliers import bounded, few, list_rows, outlying, tail_end
from .._random import seeded
from ..distributions.flow import bijection_onto
from ..flows import Flow
from ..transforms.base import channels_last
from ..transforms.standardize import Standardize
from . import processes
from .averaging import Best, copy_tensors, tensors_of
from .checkpoint import Checkpoint
from .compiled import compiled_log_prob
from .loop import INTERRUPTED, TIME_OVER, Group, Loop, LoopOptions, Task
from .points import Data, Points, batches, log_prob, log_probs, shared_log_probs, split
from .processes import Part

__all__ = ["DensityReport", "fit_density"]

GRADIENT_NORM = 5.0
# An improvement of less than this many nats per point does not keep the training going.
IMPROVEMENT = 1e-4
# The step size falls to this fraction whenever a third of the patience has passed without
# improvement.
DECAY = 0.4
# Log-likelihoods less than this many nats below their median are never bounded.
REACH = 20.0
# Latent points beyond this mean or, up or down, this standard deviation are worth a word.
FAR, WIDE = 3.0, 5.0


@dataclass(frozen=True)
class DensityReport:
    """How a maximum-likelihood fit went.

    Attributes:
        train: Mean log-likelihood of the training points in nats, before training and during each
            epoch, without outliers.
        validation: Mean log-likelihood of the validation points in nats, before training and after
            each epoch.
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
            f"The validation log-likelihood is {self.log_likelihood:.3f} nats per point "
            f"({self.validation_size} points), "
            f"{best}; training ended after {_count(self.epochs, 'epoch')} and {self.seconds:.0f} s "
            "because "
            f"{self.reason}{skipped}."
        )


def fit_density(
    flow: nn.Module,
    x: Data,
    context: Data | None = None,
    *,
    validation: float | Data | Sequence[Data] = 0.1,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    max_epochs: int = 500,
    patience: int = 20,
    weight_decay: float = 0.0,
    seed: int | None = 0,
    time_limit: float | None = None,
    progress: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    compile: bool = False,
    average: float | None = None,
    mixed_precision: bool = False,
) -> DensityReport:
    r"""Fits a flow to data by maximum likelihood.

    .. math:: \max_\phi \; \frac{1}{N} \sum_{n=1}^{N} \log p_\phi(x_n \mid c_n),

    by Adam on shuffled batches, with clipped gradients and a step size that falls along a cosine
    over the epochs (or over the time, whichever is shorter) and whenever the log-likelihood of
    held-out points stands still. The training ends when that has not improved for ``patience``
    epochs, and the flow keeps the parameters that were best by it, also after Ctrl-C. The flow is
    left in ``eval()`` mode.

    A few outliers, at most a percent of the rows, steer nothing. Rows with an entry far beyond
    where the tail of its column ends are left out of training; log-likelihoods held out that are
    far below the others count as the end of their tail in the choice of the best parameters.
    Warnings name these rows. The report counts those of validation in full.

    Under an initialised ``torch.distributed`` group all processes call this alike; the points of a
    batch are shared out among them, and the result is that of one process. (Layers that look at a
    whole batch, such as ``BatchNorm``, see the share of their process.)

    A last layer :class:`pyroflows.transforms.Standardize` that was not fitted before is fitted to
    the training points.

    Args:
        flow: A flow, or any module whose call, with the context if there is one, returns a
            distribution over single points. Its parameters change in place; points are moved to
            its device and dtype.
        x: Points of shape ``(N, *event_shape)``, a tensor or an array of numpy; so are the other
            points and contexts.
        context: Their contexts, of shape ``(N, context_features)``; ``None`` for a flow without
            context.
        validation: Fraction of the points to hold out, chosen at random; or the held-out points
            themselves, of shape ``(M, *event_shape)``, with their contexts as a pair
            ``(x, context)`` where the flow has a context.
        batch_size: Points per step; the points of an epoch are split into batches of equal size,
            at most this.
        learning_rate: Largest step size.
        max_epochs: Most passes through the training points.
        patience: Epochs without improvement of the validation log-likelihood after which to stop.
        weight_decay: Decoupled weight decay.
        seed: Seed of the split, the batches and all else that is random here. The random state
            outside is left as it was. ``None`` draws from that state.
        time_limit: Seconds of wall-clock time.
        progress: Whether to show a progress bar.
        checkpoint: A file that is written as the training goes on, and from which a fit that was
            killed goes on to the same result.
        compile: Whether to compile the flow's density by ``torch.compile``: half a minute at
            first, then faster steps.
        average: Weight of the past in a moving average of the parameters, such as 0.999; the
            averages are what is validated and kept then. ``None`` for the parameters themselves.
        mixed_precision: Whether networks run in bfloat16 during training; the maps whose
            parameters they give, with their log-determinants, stay in the flow's dtype.

    Returns:
        How it went; printed, a sentence.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the shapes do not fit the flow, there are too few points, points or contexts
            are not finite, are outside of the support or have no finite density to begin with, or
            an option is out of its range. The flow is then as it was.

    Reference:
        Papamakarios, Nalisnick, Rezende, Mohamed, Lakshminarayanan, "Normalizing flows for
        probabilistic modeling and inference", 2021, https://arxiv.org/abs/1912.02762

    Example:
        >>> import pyroflows as pf
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(500, 2, generator=generator) * torch.tensor([0.5, 2.0])
        >>> flow = pf.RealNVP(features=2)
        >>> report = fit_density(flow, x, max_epochs=5, progress=False)
        >>> report.epochs, len(report.validation)
        (5, 6)
    """
    options = _Options(batch_size, learning_rate, max_epochs, patience, weight_decay)
    check_options(options._asdict())
    if time_limit is not None:
        check_positive("time_limit", time_limit)
    deadline = Deadline(time_limit)
    check_flag("progress", progress)
    check_flag("compile", compile)
    stepping = LoopOptions(
        gradient_norm=GRADIENT_NORM,
        weight_decay=weight_decay,
        average=average,
        mixed_precision=mixed_precision,
    )
    if not isinstance(flow, nn.Module):
        raise TypeError(
            f"Expected flow to be a module whose call returns a distribution; got {flow!r}."
        )
    file = None if checkpoint is None else Checkpoint(checkpoint, {"seed": seed})
    with processes.warning_once(), seeded(processes.agree(seed)), torch.enable_grad():
        task = _prepare(flow, x, context, validation, options)
        _warn_of_start(flow, task.train)
        if compile:
            first = task.train.rows(slice(task.options.batch_size))
            task.log_prob = compiled_log_prob(flow, first) or task.log_prob
        return _run(task, Loop(task, stepping), deadline, progress, file)


def _prepare(
    flow: nn.Module, x: Data, context: Data | None, validation: Any, options: _Options
) -> _DataTask:
    """Checks everything and sets out the points; an error leaves the flow as it was."""
    before = copy_tensors(flow)
    modes = [(module, module.training) for module in flow.modules()]
    processes.agree_on_random_state(torch.device("cpu"))
    processes.take_from_main(tensors_of(flow).values())
    try:
        flow.eval()
        train, held_out = split(flow, x, context, validation)
        far = _far_rows(flow, train)
        outliers, train = train.rows(far), train.rows(~far)
        smallest = len(train.x) // batches(len(train.x), options.batch_size)
        if smallest < processes.world_size():
            raise ValueError(
                f"Expected batches with a point for each process; got {smallest} points for "
                f"{processes.world_size()} processes."
            )
        _fit_standardize(flow, train.x)
        first = _first_log_probs(flow, train, options, allowed=0)
        # A percent of the points held out steers nothing, wherever they are.
        held = _first_log_probs(flow, held_out, options, allowed=len(held_out.x) // 100)
    except BaseException:
        flow.load_state_dict(before, strict=False)
        for module, mode in modes:
            module.training = mode
        raise
    _warn_of_outliers(outliers)
    return _DataTask(flow, train, held_out, options, (first, held))


class _Options(NamedTuple):
    batch_size: int
    learning_rate: float
    max_epochs: int
    patience: int
    weight_decay: float


class _DataTask(Task):
    """A flow trained on shuffled batches, and judged by the points held out after each epoch."""

    def __init__(
        self,
        flow: nn.Module,
        train: Points,
        held_out: Points,
        options: _Options,
        first: tuple[Tensor, Tensor],
    ) -> None:
        self.module, self.train, self.held_out, self.options = flow, train, held_out, options
        parameters = [p for p in flow.parameters() if p.requires_grad]
        self.groups = [Group(parameters, options.learning_rate)]
        self.look_every = batches(len(train.x), options.batch_size)
        self.log_prob: Callable[[Points], Tensor] = functools.partial(log_prob, flow)
        self.history: dict[str, list[float]] = {"train": [], "validation": [], "score": []}
        self._batches: list[Tensor] = []
        self._taken = 0
        self._seen: list[Tensor] = []
        self._stale, self._shrunk = 0, 1.0
        self.reach = _reach(first[0])
        self.history["train"].append(float(first[0].mean()))
        self._goal = self._judge(first[1])

    @property
    def looked(self) -> bool:
        """Whether the last epoch that was begun has been judged."""
        return self._taken == 0

    def backward(self) -> Part:
        if self._taken == 0:
            self._begin_epoch()
        batch = self._batches[self._taken]
        self._taken += 1
        mine = batch[processes.rows(len(batch))]
        total = self.log_prob(self.train.rows(mine)).sum()
        (-total / len(batch)).backward()
        return Part(total.detach(), total.new_tensor(len(mine)))

    def _begin_epoch(self) -> None:
        order = torch.randperm(len(self.train.x), device="cpu").to(self.train.x.device)
        # A flow may draw random numbers, of which processes with other shares draw others.
        processes.take_from_main([order])
        self._shuffle(order)

    def _shuffle(self, order: Tensor) -> None:
        """Begins a pass in a given order.

        Batches have equal size, because a small remainder would weigh as much as a batch.
        """
        self._batches = list(order.tensor_split(self.look_every))
        self.module.train()

    def note(self, value: Tensor) -> None:
        self._seen.append(value)

    def look(self) -> float:
        """The bounded log-likelihood of the points held out; ends the epoch, complete or not."""
        self.module.eval()
        values = shared_log_probs(self.module, self.held_out, self.options.batch_size)
        seen = float(torch.stack(self._seen).mean()) if self._seen else math.nan
        self.history["train"].append(seen)
        self._taken = 0
        self._seen.clear()
        return self._judge(values)

    def _judge(self, values: Tensor) -> float:
        """Notes log-likelihoods of the points held out; returns the mean of the bounded ones."""
        self.history["validation"].append(float(values.mean()))
        values = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        self.reach = min(self.reach, _reach(values))
        kept = bounded(values, self.reach)
        row_numbers = self.held_out.row_numbers
        self.beyond = row_numbers[(kept > values).to(row_numbers.device)]
        self.history["score"].append(float(kept.mean()))
        return self.history["score"][-1]

    def conclude(self, best: Best) -> str | None:
        scores, options = self.history["score"], self.options
        if scores[-1] > self._goal + IMPROVEMENT:
            self._goal, self._stale = scores[-1], 0
        else:
            self._stale += 1
            if self._stale % max(1, options.patience // 3) == 0:
                self._shrunk *= DECAY
        if self._stale >= options.patience:
            return f"validation had not improved for {_count(options.patience, 'epoch')}"
        if len(scores) > options.max_epochs:
            return f"all {_count(options.max_epochs, 'epoch')} were done"
        return None

    @property
    def rate(self) -> float:
        """The step size falls where validation stands still."""
        return self._shrunk

    def describe(self, best: Best) -> str:
        return f"validation {self.history['score'][-1]:.3f}, best {best.value:.3f}"

    def settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.options.batch_size,
            "patience": self.options.patience,
            "the number of training points": len(self.train.x),
            "the mean of the training points": float(self.train.x.double().mean()),
            "the mean of the points held out": float(self.held_out.x.double().mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "order": torch.cat(self._batches) if self._taken else torch.zeros(0),
            "taken": self._taken,
            "seen": torch.stack(self._seen) if self._seen else torch.zeros(0),
            "patience": [self._goal, self._stale, self._shrunk, self.reach],
            "beyond": self.beyond,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.train.x.device
        self.history = {name: list(values) for name, values in state["history"].items()}
        self._seen = list(state["seen"].to(device).unbind())
        self._goal, self._stale, self._shrunk, self.reach = state["patience"]
        self.beyond = state["beyond"].to(self.held_out.row_numbers.device)
        self._taken = state["taken"]
        if self._taken:
            self._shuffle(state["order"].to(device))


def _run(
    task: _DataTask, loop: Loop, deadline: Deadline, progress: bool, checkpoint: Checkpoint | None
) -> DensityReport:
    """Trains to the end, judges an epoch that was cut short, and restores the best parameters."""
    steps = task.look_every * task.options.max_epochs
    loop.best.see(task.history["score"][0])
    try:
        done = loop.run(steps, deadline=deadline, progress=progress, checkpoint=checkpoint)
        if not task.looked:
            loop.look()
        reason = done.reason
    except KeyboardInterrupt:  # a second time
        reason = INTERRUPTED
    finally:
        loop.best.restore()
        task.module.eval()
    if reason == TIME_OVER:
        reason = f"the time limit of {deadline.seconds:g} s was reached"
    _warn_of_bounded_rows(task)
    return DensityReport(
        train=tuple(task.history["train"]),
        validation=tuple(task.history["validation"]),
        best_epoch=task.history["score"].index(loop.best.value),
        steps=loop.steps,
        skipped=loop.skipped,
        seconds=deadline.elapsed,
        reason=reason,
        train_size=len(task.train.x),
        validation_size=len(task.held_out.x),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# What is checked before anything changes


def check_options(options: Mapping[str, Any]) -> None:
    """Raises an error if one of these options of :func:`fit_density` is out of its range."""
    for name, value in options.items():
        if name in ("batch_size", "max_epochs", "patience"):
            check_size(name, value)
        elif name == "learning_rate" or (name == "weight_decay" and value != 0):
            check_positive(name, value)


def _first_log_probs(flow: nn.Module, points: Points, options: _Options, allowed: int) -> Tensor:
    values = log_probs(flow, points, options.batch_size)
    odd = ~values.isfinite()
    if int(odd.sum()) > allowed:
        rows = points.row_numbers[odd.to(points.row_numbers.device)].sort().values
        raise ValueError(
            f"Expected a finite density at every point of {points.name} before training; "
            f"{len(rows)} of {len(values)} points have none: {list_rows(rows)}. Standardise the "
            "points, or end the flow with Standardize."
        )
    return values


def _reach(values: Tensor) -> float:
    """How far below their median log-likelihoods count in full."""
    return max(REACH, tail_end((values.median() - values).clamp(min=0)))


def _far_rows(flow: nn.Module, points: Points) -> Tensor:
    """Tells which rows have an entry that is an outlier of its column; a few rows or none."""
    x = _unconstrained(flow, points.x) if isinstance(flow, Flow) else points.x
    far = torch.zeros(len(x), dtype=torch.bool, device="cpu")
    for value in (x, points.context):
        if value is not None and value.numel():
            value = value.detach().to("cpu", torch.float64)
            columns = channels_last(value, value.shape[1:])
            far |= outlying(columns).reshape(len(value), -1).any(-1)
    return (far & (far.sum() <= few(len(far)))).to(points.x.device)


def _warn_of_outliers(outliers: Points) -> None:
    """Warns of rows that training leaves out."""
    if len(outliers.x):
        rows = list_rows(outliers.row_numbers.sort().values)
        _warn(
            f"Training leaves out {rows} of x, because entries lie far beyond where the tails of "
            "their columns end."
        )


def _warn_of_bounded_rows(task: _DataTask) -> None:
    """Warns of rows held out whose log-likelihoods the choice of the parameters bounds."""
    if len(task.beyond):
        rows = f"{list_rows(task.beyond.sort().values)} of {task.held_out.name}"
        _warn(
            f"Early stopping counted {rows} as {task.reach:.3g} nats below the median, because of "
            "a far lower log-likelihood, which the report's mean has in full."
        )


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=caller_level())


def _fit_standardize(flow: nn.Module, x: Tensor) -> None:
    """Fits a last layer that standardises and has not been fitted."""
    if isinstance(flow, Flow):
        last = flow.transform.layers[-1]
        if isinstance(last, Standardize) and not bool(last.is_fitted):
            last.fit(_unconstrained(flow, x))


def _unconstrained(flow: Flow, x: Tensor) -> Tensor:
    return x if flow.support is None else bijection_onto(flow.support).inv(x)


def _warn_of_start(flow: nn.Module, points: Points) -> None:
    """Warns of columns that hardly vary, or else of points far from a standard normal base."""
    if not isinstance(flow, Flow):
        return
    x = points.x.reshape(len(points.x), -1)
    others = (x != x[:100].median(0).values).sum(0)
    constant = others <= len(x) // 100
    if bool(constant.any()):
        columns = list_rows(constant.nonzero().flatten(), noun="column")
        _warn(
            "The likelihood has no maximum, because each density is surpassed by one that is "
            f"narrower in {columns} of x, where at least 99 % of the rows are the same; leave "
            "constant columns out."
        )
        return
    some = points.rows(slice(1000))
    if len(some.x) < 100:
        return
    if isinstance(flow.given_base, torch.distributions.Distribution):
        return
    with torch.no_grad():
        x = _unconstrained(flow, some.x)
        latent, _ = flow(some.context).transform.inverse_and_log_det(x)
    mean, sd = latent.mean(0).abs().max(), latent.std(0)
    if bool((mean > FAR) | (sd.max() > WIDE) | (sd.min() < 1 / WIDE)):
        _warn(
            f"The flow starts far from the points: it takes them to means up to {float(mean):.3g} "
            "and standard deviations "
            f"from {float(sd.min()):.3g} to {float(sd.max()):.3g}, which training has to mend "
            "first. Standardise the "
            "points, or end the flow with Standardize."
        )
