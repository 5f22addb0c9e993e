"""One loop for all training: steps, schedule, bad steps, the best parameters, checkpoints."""

from __future__ import annotations

import abc
import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._checks import check_flag
from .._deadline import Deadline
from .._random import random_state, set_random_state
from . import processes
from .averaging import Average, Best, tensors_of
from .checkpoint import Checkpoint
from .precision import MixedPrecision
from .processes import Part

__all__ = [
    "INTERRUPTED",
    "TIME_OVER",
    "Group",
    "Loop",
    "LoopOptions",
    "Task",
    "TrainingReport",
]

# Steps without a finite gradient in a row, after which the last good parameters are restored.
PATIENCE = 20
#: The share of skipped steps that changes no fit, so that a user need not hear of it.
FEW = 0.02
# How often they are restored before the training gives up.
RESTORATIONS = 5

ALL_STEPS = "all steps were taken"
TIME_OVER = "the time limit was reached"
INTERRUPTED = "it was interrupted"
GAVE_UP = "it did not recover from steps that were not finite"


class Group(NamedTuple):
    """Parameters with one step size.

    Attributes:
        parameters: The parameters.
        step_size: Their largest step size.
    """

    parameters: Sequence[nn.Parameter]
    step_size: float


@dataclass(frozen=True)
class LoopOptions:
    r"""How a loop steps: by Adam, with the step size

    .. math:: \eta_t = \eta\, 2^{-r} \min\!\left(1, \frac{t + 1}{w}\right) \frac{1 + \cos \pi f}{2},

    where :math:`w` is the warm-up, :math:`f` the fraction of the steps or of the time that is over,
    whichever is larger, and :math:`r` the number of restorations.

    Args:
        gradient_norm: Gradients are clipped to this norm.
        warm_up: Steps over which the step size rises.
        betas: Decay rates of Adam's moments.
        weight_decay: Decoupled weight decay.
        average: Weight of the past in the moving average of the parameters, which is what is
            judged and kept then; ``None`` for the parameters themselves.
        mixed_precision: Whether networks run in bfloat16 during steps.

    Raises:
        ValueError: If ``average`` is not between 0 and 1.
    """

    gradient_norm: float = 10.0
    warm_up: int = 20
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    average: float | None = None
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        check_flag("mixed_precision", self.mixed_precision)
        if self.average is None:
            return
        if isinstance(self.average, bool) or not isinstance(self.average, Real):
            raise TypeError(f"Expected average to be a number; got {self.average!r}.")
        if not 0 < self.average < 1:
            raise ValueError(f"Expected average between 0 and 1; got {self.average!r}.")


class Task(abc.ABC):
    """What a loop trains: parameters, a loss, and a judgement of what was learnt.

    Attributes:
        module: The module whose parameters and buffers are saved, and restored after bad steps.
        groups: The parameters that are trained.
        look_every: Steps between two looks.
    """

    module: nn.Module
    groups: Sequence[Group]
    look_every: int

    @abc.abstractmethod
    def backward(self) -> Part:
        """Adds this process's part of the gradient of the next step's loss.

        Returns:
            Its part of what is to be maximised, without gradient.
        """

    def note(self, value: Tensor) -> None:  # noqa: B027
        """Takes note of the value of a step that was finite."""

    @abc.abstractmethod
    def look(self) -> float:
        """Says how good the present parameters are: the higher, the better."""

    def conclude(self, best: Best) -> str | None:
        """Why to stop after a look, if there is a reason; told the best parameters so far."""
        return None

    @property
    def rate(self) -> float:
        """A factor of the step size beside the schedule's."""
        return 1.0

    def describe(self, best: Best) -> str:
        """What the progress bar says after a look."""
        return f"best {best.value:.3f}"

    def settings(self) -> dict[str, Any]:
        """What the training depends on, so that a checkpoint of another one is refused."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What it goes on from, as tensors and numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Goes back to a state."""


@dataclass(frozen=True)
class TrainingReport:
    """What happened in a training.

    Attributes:
        steps: Steps tried.
        skipped: How many of them were left out because the loss or its gradient was not finite.
        restored: How often the best parameters were restored, with half the step size from there
            on.
        reason: Why it ended.
    """

    steps: int
    skipped: int
    restored: int
    reason: str

    @property
    def warning(self) -> str | None:
        """A sentence about steps that were skipped, if they were more than a few."""
        if self.skipped <= FEW * self.steps and not self.restored:
            return None
        times = "once" if self.restored == 1 else f"{self.restored} times"
        back = f"; the best parameters so far were restored {times}" if self.restored else ""
        end = ", and the training ended early, with them" if self.reason == GAVE_UP else ""
        return (
            f"{self.skipped} of {self.steps} training steps were skipped because the loss or its "
            f"gradient was not finite{back}{end}."
        )


class Loop:
    """Trains a task.

    A step whose value or gradient is not finite is skipped; after twenty in a row the best
    parameters so far come back and the step size is halved, and after five of these the training
    ends. In an initialised :mod:`torch.distributed` group the gradients of all processes are
    summed, and all begin with the parameters and the random state of the main one.

    Args:
        task: What to train.
        options: How to step.

    Attributes:
        best: The best parameters so far.
        steps: Steps tried so far.
    """

    def __init__(self, task: Task, options: LoopOptions) -> None:
        self.task, self.options = task, options
        self.parameters = [p for group in task.groups for p in group.parameters]
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(group.parameters), "lr": group.step_size, "peak": group.step_size}
                for group in task.groups
                if group.parameters
            ],
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.steps = self.skipped = self.restored = self._bad_in_a_row = 0
        self._reason: str | None = None
        self._begun = self._time_spent = 0.0
        self._deadline = Deadline()
        self._start()

    def _start(self) -> None:
        """Gives every process the parameters and the random state of the main one."""
        self._share_parameters()
        processes.agree_on_random_state(self.device)
        self.best = Best(self.task.module)
        decay = self.options.average
        self.average = None if decay is None else Average(self.parameters, decay)
        self.precision: contextlib.AbstractContextManager[Any] = (
            MixedPrecision(self.task.module)
            if self.options.mixed_precision
            else contextlib.nullcontext()
        )

    def run(
        self,
        steps: int,
        *,
        deadline: Deadline | None = None,
        progress: Any = False,
        checkpoint: Checkpoint | None = None,
    ) -> TrainingReport:
        """Takes steps until there is a reason to stop, such as Ctrl-C, which is not raised.

        Args:
            steps: Most steps to take.
            deadline: The time limit, which the step size decays with, too.
            progress: Whether to show a progress bar, or a bar to move on.
            checkpoint: Where to save the state every so often, and from where to go on.

        Returns:
            What happened.

        Raises:
            ValueError: If the checkpoint is one of another training.
        """
        self._deadline = Deadline() if deadline is None else deadline
        self._begun = self._deadline.elapsed
        finished = self._resume(steps, checkpoint)
        if processes.world_size() > 1:
            self._time_spent = processes.agree(self._deadline.fraction_since(self._begun))
        try:
            with _bar(progress, steps) as bar:
                bar.update(self.steps)
                while self._reason is None:
                    self._advance(steps, bar)
                    if checkpoint is not None:
                        checkpoint.save_if_due(self.state_dict)
        except KeyboardInterrupt:
            self._reason = INTERRUPTED
            return self.report
        finally:
            if isinstance(self.precision, MixedPrecision):
                self.precision.remove()
        self._share_parameters()
        if self.average is not None and self.average.steps:
            self.average.copy_to_parameters()
        if checkpoint is not None and not finished:
            checkpoint.save(self.state_dict())
        return self.report

    @property
    def report(self) -> TrainingReport:
        """What happened so far."""
        return TrainingReport(self.steps, self.skipped, self.restored, self._reason or "")

    def _advance(self, steps: int, bar: Any) -> None:
        """Takes a step, and a look where it is time, unless the steps or the time are over."""
        done = self._fraction_done(steps)
        if done >= 1:
            self._reason = ALL_STEPS if self.steps >= steps else TIME_OVER
            return
        self.step(done)
        bar.update()
        if self.steps % self.task.look_every == 0 and self._reason is None:
            self.look()
            bar.set_postfix_str(self.task.describe(self.best))

    def step(self, done: float) -> None:
        """Takes one step, at which a fraction of the training is done."""
        self._set_step_sizes(done)
        self.steps += 1
        self.optimizer.zero_grad()
        value = self._backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.gradient_norm)
        if not bool((norm + value).isfinite()):
            self._skip()
            return
        self._bad_in_a_row = 0
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        self.task.note(value)

    def _backward(self) -> Tensor:
        """Sets the gradient of the next step's loss, and returns its value, by one message."""
        if processes.world_size() == 1:
            with self.precision:
                return self.task.backward().mean
        sizes = [parameter.numel() for parameter in self.parameters]
        dtypes = [parameter.dtype for parameter in self.parameters]
        dtype = functools.reduce(torch.promote_types, dtypes)
        with processes.add_up(3 + sum(sizes), self.device, dtype) as message:
            numbers, gradients = message[:3], message[3:].split(sizes)
            with self.precision:
                numbers[:2] = torch.stack(self.task.backward())
            if processes.is_main():
                numbers[2] = self._deadline.fraction_since(self._begun)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if parameter.grad is not None:
                    gradient.copy_(parameter.grad.flatten())
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(gradient.view_as(parameter))
        self._time_spent = float(numbers[2])
        return Part(*numbers[:2]).mean

    def look(self) -> None:
        """Judges the parameters, and keeps them if they are the best so far."""
        self._share_parameters()
        with self._averaged():
            self.best.see(processes.agree(self.task.look()))
        self._reason = self.task.conclude(self.best)

    def _set_step_sizes(self, done: float) -> None:
        warm_up = min(1.0, (self.steps + 1) / self.options.warm_up)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        rate = 0.5**self.restored * warm_up * self.task.rate * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]

    def _skip(self) -> None:
        self.skipped += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row < PATIENCE:
            return
        self._bad_in_a_row = 0
        self.best.restore(or_start=True)
        if self.average is not None:
            self.average.restart()
        if self.restored == RESTORATIONS:
            self._reason = GAVE_UP
        else:
            self.optimizer.state.clear()
            self.restored += 1

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        average = self.average
        used = average is not None and average.steps
        return average.applied() if average is not None and used else contextlib.nullcontext()

    def _share_parameters(self) -> None:
        processes.take_from_main(tensors_of(self.task.module).values())

    def _fraction_done(self, steps: int) -> float:
        by_steps = 1.0 if self.steps >= steps else self.steps / steps
        if processes.world_size() == 1:
            self._time_spent = self._deadline.fraction_since(self._begun)
        # Else each step's message brought the main process's answer, because their clocks differ.
        return max(by_steps, self._time_spent)

    # Checkpoints

    def _resume(self, steps: int, checkpoint: Checkpoint | None) -> bool:
        """Goes back to the state in the checkpoint; tells whether the training ended in it."""
        saved = None if checkpoint is None else checkpoint.begin(self._settings(steps))
        if checkpoint is None or saved is None:
            return False
        with checkpoint.restoring():
            self.load_state_dict(saved)
            self._begun = self._deadline.elapsed - saved["seconds"]
        return self._reason is not None

    def _settings(self, steps: int) -> dict[str, Any]:
        state = tensors_of(self.task.module)
        shapes = {f"the shape of {name}": list(value.shape) for name, value in state.items()}
        options = {name: value for name, value in vars(self.options).items() if name != "betas"}
        sizes = [group.step_size for group in self.task.groups]
        return {"steps": steps, "step_sizes": sizes, **options, **self.task.settings(), **shapes}

    def state_dict(self) -> dict[str, Any]:
        """All that the training goes on from, as tensors and numbers."""
        return {
            "parameters": tensors_of(self.task.module),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "counts": [self.steps, self.skipped, self._bad_in_a_row, self.restored],
            "reason": self._reason,
            "seconds": self._deadline.elapsed - self._begun,
            "random": random_state(self.device),
            "task": self.task.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state."""
        self.task.module.load_state_dict(state["parameters"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.best.load_state_dict(state["best"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.steps, self.skipped, self._bad_in_a_row, self.restored = state["counts"]
        self._reason = state["reason"]
        self.task.load_state_dict(state["task"])
        set_random_state(state["random"], self.device)


def _bar(progress: Any, steps: int) -> Any:
    """A bar of its own, or the one that was given, which stays open."""
    if not isinstance(progress, bool):
        return contextlib.nullcontext(progress)
    hidden = not (progress and processes.is_main())
    return tqdm(total=steps, disable=hidden, desc="Fitting", leave=True)
