"""The training of a flow on a log density."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._checks import caller_level
from .._deadline import Deadline
from ..distributions import FlowDistribution
from ..flows import Flow
from ..model.base import Density
from ..transforms import Compose, LowerTriangularAffine, Transform
from ..transforms.low_rank import LowRankAffine
from ..transforms.triangular import compose_affine
from . import processes
from .averaging import Best
from .checkpoint import Checkpoint
from .compiled import PushScore, compiled_push_score
from .loop import INTERRUPTED, Group, Loop, LoopOptions, Task, TrainingReport
from .objectives import Objective, PathELBO
from .objectives.objective import check_distribution
from .processes import Part

__all__ = ["OPTIONS", "PARTICLES", "STEP_SIZE", "WHITENING_STEP_SIZE", "GuideTask", "train"]

PARTICLES = 256
STEP_SIZE = 2e-2
# The whitening map moves all of the guide at once, so it is stepped more carefully than the
# networks.
WHITENING_STEP_SIZE = 5e-3
# Steps over which the ELBO is averaged to tell which parameters were the best.
WINDOW = 50
OPTIONS = LoopOptions(betas=(0.9, 0.99))
#: The last layer of a guide's flow.
Whitening: TypeAlias = LowerTriangularAffine | LowRankAffine


def train(
    flow: Flow,
    density: Density,
    history: list[Tensor],
    steps: int,
    *,
    deadline: Deadline | None = None,
    progress: Any = False,
    compile: bool = False,
    checkpoint: Checkpoint | None = None,
    objective: Objective | None = None,
    step_size: float = STEP_SIZE,
    whitening_step_size: float = WHITENING_STEP_SIZE,
    options: LoopOptions = OPTIONS,
) -> TrainingReport:
    r"""Trains a flow whose last layer whitens on a log density; its parameters change in place.

    By default it maximises the ELBO by path gradients. The steps are those of
    :class:`pyroflows.train.loop.Loop`. In an initialised :mod:`torch.distributed` group every
    process works on its share of the particles of a bound, with the result of one process that has
    them all.

    Args:
        flow: A flow whose last layer is a :class:`LowerTriangularAffine`; a Gaussian where that is
            the only one.
        density: The log density.
        history: A list to which the ELBO of each step that was not skipped is appended; with
            another objective its loss with the opposite sign.
        steps: Most steps to take.
        deadline: The time limit; the step size then decays with the time.
        progress: Whether to show a progress bar, or a bar to move on.
        compile: Whether to compile the flow's part of a step, which then takes about half as long.
            To compile it takes as long as some ten thousand steps, so that this pays for the
            longest trainings only.
        checkpoint: Where to save the state every so often, and from where to go on.
        objective: What to minimise, with its number of particles; by default
            ``PathELBO(num_particles=256)``.
        step_size: Peak step size of the networks.
        whitening_step_size: Peak step size of the whitening map.
        options: How to step.

    Returns:
        What happened.

    Raises:
        KeyboardInterrupt: After Ctrl-C, with the best parameters so far in the flow.
        ValueError: If there are fewer particles than processes, or if the checkpoint is one of
            another training.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.tensor([3.0, 4.0]), 1.0).to_event(1))
        >>> flow = pf.Flow([pf.transforms.LowerTriangularAffine(2)])
        >>> train(flow, pf.model.LogDensity(model), [], steps=10).reason
        'all steps were taken'
    """
    objective = PathELBO(PARTICLES) if objective is None else objective
    if objective.num_particles < processes.world_size():
        got = objective.num_particles
        raise ValueError(f"Expected at least as many particles as processes; got {got}.")
    task = GuideTask(flow, density, history, objective, (step_size, whitening_step_size))
    with task.whitened(), processes.sharing():
        loop = Loop(task, options)
        task.begin(compile)
        report = loop.run(steps, deadline=deadline, progress=progress, checkpoint=checkpoint)
        if report.reason == INTERRUPTED:
            loop.best.restore()
    if report.reason == INTERRUPTED:
        raise KeyboardInterrupt
    if report.warning is not None:
        warnings.warn(report.warning, stacklevel=caller_level())
    return report


class GuideTask(Task):
    """A guide's flow, trained in whitened units for an objective."""

    look_every = WINDOW

    def __init__(
        self,
        flow: Flow,
        density: Density,
        history: list[Tensor],
        objective: Objective,
        step_sizes: tuple[float, float],
    ) -> None:
        self.flow, self.density, self.objective, self.history = flow, density, objective, history
        body, self.whitening = _split(flow)
        # z = mu + L (delta + M x): a step on L itself would depend on the model's units. A root of
        # low rank has none.
        if isinstance(self.whitening, LowRankAffine):
            self.adjustment: Whitening = self.whitening
            before: list[Transform] = []
        else:
            self.adjustment = LowerTriangularAffine(density.features).to(density.initial)
            before = [self.adjustment]
        self.module: _Stack = _Stack([*body, *before, self.whitening])
        networks = [p for layer in body for p in layer.parameters()]
        parts = (networks, list(self.adjustment.parameters()))
        self.groups = [Group(*pair) for pair in zip(parts, step_sizes, strict=True)]
        self.distribution = FlowDistribution(flow().base_dist, self.module, path_gradient=True)
        check_distribution(self.distribution, density)  # type: ignore[arg-type]
        self._first = len(history)
        self._elbo = math.nan

    @contextlib.contextmanager
    def whitened(self) -> Iterator[None]:
        """Trains the adjustment in place of the whitening map, and puts both into it at the end."""
        self.whitening.requires_grad_(isinstance(self.whitening, LowRankAffine))
        try:
            yield
        finally:
            self.whitening.requires_grad_(True)
            _settle(self.adjustment, self.whitening)

    def begin(self, compile: bool) -> None:
        """Does what waits for the parameters that all processes share."""
        self.density.anchor(self.whitening.loc.detach().clone())
        if compile:
            everyone = self.density.initial.new_zeros(
                self.objective.num_particles, self.density.features
            )
            points = everyone[processes.rows(len(everyone))]
            self.module.compiled = compiled_push_score(self.module, points, self.flow)

    def backward(self) -> Part:
        loss = self.objective.backward(self.distribution, self.density)  # type: ignore[arg-type]
        return Part(-loss.total, loss.weight)

    def note(self, value: Tensor) -> None:
        self.history.append(value)

    def look(self) -> float:
        """The mean of the last ELBOs."""
        taken = self.history[self._first :]
        self._elbo = float(torch.stack(taken[-WINDOW:]).mean()) if taken else -math.inf
        return self._elbo

    def describe(self, best: Best) -> str:
        return f"ELBO {self._elbo:.2f}"

    def settings(self) -> dict[str, Any]:
        """Sizes, the objective, and what the density says at one point."""
        initial = self.density.initial
        at_zero = self.density.full.value_and_grad(torch.zeros_like(initial))[0].nan_to_num()
        return {
            **self.objective.settings(),
            "dtype": str(initial.dtype),
            "the number of latent entries": self.density.features,
            "the log density at zero": float(at_zero),
        }

    def state_dict(self) -> dict[str, Any]:
        taken = self.history[self._first :]
        return {
            "history": torch.stack(taken) if taken else torch.zeros(0),
            "objective": self.objective.state_dict(),
            "density": self.density.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history.extend(state["history"].to(self.density.initial.device).unbind())
        if state["objective"]:
            self.objective.load_state_dict(state["objective"], self.density)  # type: ignore[arg-type]
        if state["density"]:
            self.density.load_state_dict(state["density"])


class _Stack(Compose):
    """The layers of a guide's flow, whose score may be carried by compiled code."""

    compiled: PushScore | None = None

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.compiled is None:
            return super().push_score(x, score, context)
        return self.compiled(x, score)


def _settle(adjustment: Whitening, whitening: Whitening) -> None:
    """Puts what was learned into a whitening map."""
    if isinstance(adjustment, LowRankAffine):
        adjustment.centre()  # it is the whitening map
    elif isinstance(whitening, LowerTriangularAffine):
        parts = (adjustment.loc_and_scale_tril(), whitening.loc_and_scale_tril())
        whitening.set(*compose_affine(*parts))


def _split(flow: Flow) -> tuple[list[Transform], Whitening]:
    """The layers of a guide's flow, and the last of them, which whitens."""
    *body, whitening = flow.transform.layers
    if not isinstance(whitening, (LowerTriangularAffine, LowRankAffine)):
        got = type(whitening).__name__
        raise TypeError(f"Expected a flow whose last layer is a LowerTriangularAffine; got {got}.")
    return body, whitening  # type: ignore[return-value]
