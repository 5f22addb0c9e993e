"""The training of a flow on a log density by path gradients."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._random import random_state, set_random_state
from ..flows import Flow
from ..transforms import Compose, LowerTriangularAffine, Transform
from ..transforms.triangular import compose_affine
from . import processes as distributed
from .checkpoint import Checkpoint
from .compiled import compiled_push_score

__all__ = ["TrainingReport", "path_gradient", "train"]

PARTICLES = 256
STEP_SIZE = 2e-2
# The whitening map moves all of the guide at once, so that it is stepped more carefully than the networks.
WHITENING_STEP_SIZE = 5e-3
WARM_UP = 20
GRADIENT_NORM = 10.0
# Steps over which the ELBO is averaged to tell which parameters were the best.
WINDOW = 50
# Steps without a finite gradient in a row, after which the last good parameters are restored.
PATIENCE = 20
# How often they are restored before the training gives up.
RESTORATIONS = 5


class Density(Protocol):
    """What a training asks of a log density."""

    @property
    def features(self) -> int:
        """Entries of a point."""
        ...

    @property
    def initial(self) -> Tensor:
        """A point, of shape ``(features,)``."""
        ...

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log density and its gradient, of shapes ``(*)`` and ``(*, features)``, for ``(*, features)``."""
        ...


@dataclass(frozen=True)
class TrainingReport:
    """What happened in a training.

    Attributes:
        steps: Steps taken, those that were skipped included.
        skipped: Steps skipped because the ELBO or its gradient was not finite.
        restored: How often the last good parameters were restored, with half the step size from there on.
    """

    steps: int
    skipped: int
    restored: int


def train(
    flow: Flow,
    density: Density,
    history: list[Tensor],
    steps: int,
    *,
    deadline: float | None = None,
    progress: Any = False,
    particles: int = PARTICLES,
    step_size: float = STEP_SIZE,
    whitening_step_size: float = WHITENING_STEP_SIZE,
    anneal: Callable[[float], float] | None = None,
    compile: bool = False,
    checkpoint: Checkpoint | None = None,
) -> TrainingReport:
    r"""Maximises the ELBO of a flow whose last layer whitens, by path gradients; its parameters change in place.

    Adam, with a step size that decays to zero along a cosine, and gradients clipped in norm. A step whose ELBO or gradient
    is not finite is skipped; after twenty in a row the best parameters so far come back and the step size is halved, and
    after five of these the training ends.

    In an initialised :mod:`torch.distributed` group every process works on its share of the particles, with the result of
    one process that has them all.

    Args:
        flow: A flow whose last layer is a :class:`LowerTriangularAffine`; a Gaussian where that is the only one.
        density: The log density.
        history: A list to which the ELBO of each step that was not skipped is appended.
        steps: Most steps to take.
        deadline: The reading of ``time.perf_counter`` at which to end; the step size then decays with the time.
        progress: Whether to show a progress bar, or a bar to move on.
        particles: Draws for each step.
        step_size: Peak step size of the networks.
        whitening_step_size: Peak step size of the whitening map.
        anneal: Inverse temperature of the density as a function of the fraction of the training that is done.
        compile: Whether to compile the flow's part of a step, which then takes about half as long. To compile it takes as
            long as some ten thousand steps, so that this pays for the longest trainings only.
        checkpoint: Where to save the state every so often, and from where to go on.

    Returns:
        What happened.

    Raises:
        ValueError: If there are fewer particles than processes, or if the checkpoint is one of another training.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.tensor([3.0, 4.0]), 1.0).to_event(1))
        >>> flow = pf.Flow([pf.transforms.LowerTriangularAffine(2)])
        >>> train(flow, pf.model.LogDensity(model), [], steps=10)
        TrainingReport(steps=10, skipped=0, restored=0)
    """
    if particles < distributed.world_size():
        raise ValueError(f"Expected at least as many particles as processes; got {particles}.")
    start = time.perf_counter()
    training = _Training(flow, density, history, particles, step_size, whitening_step_size)
    settings = {
        "steps": steps,
        "step_size": step_size,
        "whitening_step_size": whitening_step_size,
        "annealing": [1.0 if anneal is None else anneal(done) for done in (0.0, 0.25, 0.5, 0.75)],
    }
    with training.whitened(), _bar(progress, steps) as bar:
        saved = (
            None if checkpoint is None else checkpoint.begin({**settings, **training.settings()})
        )
        training.share_start()
        if saved is not None:
            training.load_state_dict(saved)
            start -= saved["seconds"]
            bar.update(training.steps)
        if compile:
            training.compile()
        resumed_at_end = training.ended
        while not training.ended:
            done = _fraction_done(training.steps, steps, start, deadline)
            if done >= 1:
                break
            training.step(done, 1.0 if anneal is None else anneal(done))
            bar.update()
            if training.steps % WINDOW == 0 and training.taken:
                bar.set_postfix_str(f"ELBO {training.see():.2f}")
            if checkpoint is not None:
                checkpoint.save_if_due(lambda: training.state_dict(time.perf_counter() - start))
        distributed.take_from_main(training.stack.state_dict().values())
        training.ended = True
        if checkpoint is not None and not resumed_at_end:
            checkpoint.save(training.state_dict(time.perf_counter() - start))
    return training.report()


def path_gradient(
    transform: Transform,
    base: Any,
    density: Density,
    beta: float = 1.0,
    push: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Adds the path gradient of the negative ELBO to the gradients of a transform's parameters.

    .. math:: -\nabla_\phi \mathcal{L} = \mathbb{E}\big[(\nabla_z \log q_\phi(z) - \beta \nabla_z \log p(z))^\top
        \partial f_\phi(x) / \partial \phi\big], \quad z = f_\phi(x).

    A particle without a finite density counts nothing. Among several processes, this one takes its share of the particles.

    Args:
        transform: The transform from the base to the latent vector.
        base: The base, expanded to the number of particles.
        density: The log density.
        beta: Inverse temperature of the density.
        push: In place of ``transform.push_score``, which it is by default.

    Returns:
        The sum of :math:`\log p(z) - \log q_\phi(z)` over the particles (whatever ``beta``), and their number, both
        without gradient.
    """
    x = base.sample()
    point = x.requires_grad_()
    log_base = base.log_prob(point)
    (score,) = torch.autograd.grad(log_base.sum(), point)
    particles = len(x)
    x, log_base, score = (distributed.shard(rows.detach()) for rows in (x, log_base, score))
    z, log_det, score = (push or transform.push_score)(x, score)
    with torch.no_grad():
        log_joint, slope = density.value_and_grad(z)
        finite = log_joint.isfinite() & slope.isfinite().all(-1)
        pull = torch.where(finite.unsqueeze(-1), score - beta * slope, 0.0)
        log_weight = torch.where(finite, log_joint - log_base + log_det, 0.0)
    z.backward(pull / particles)
    return log_weight.sum(), finite.sum().to(log_weight)


class _Training:
    """The state of a training: parameters, optimiser, the best so far, counts."""

    def __init__(
        self,
        flow: Flow,
        density: Density,
        history: list[Tensor],
        particles: int,
        step_size: float,
        whitening: float,
    ) -> None:
        self.flow, self.density, self.history = flow, density, history
        networks, self.whitening = list(flow.transform.layers[:-1]), flow.transform.layers[-1]
        assert isinstance(self.whitening, LowerTriangularAffine)
        # Steps in whitened units, z = mu + L (delta + M x): in its own units a step on L would depend on the model's.
        self.adjustment = LowerTriangularAffine(density.features).to(density.initial)
        self.stack = Compose([*networks, self.adjustment, self.whitening])  # type: ignore[list-item]
        groups = [
            ([p for network in networks for p in network.parameters()], step_size),
            (list(self.adjustment.parameters()), whitening),
        ]
        self.trained = [p for parameters, _ in groups for p in parameters]
        self.optimizer = torch.optim.Adam(
            [
                {"params": parameters, "lr": peak, "peak": peak}
                for parameters, peak in groups
                if parameters
            ],
            betas=(0.9, 0.99),
            fused=density.initial.device.type in ("cpu", "cuda"),
        )
        self.particles = particles
        self.base = flow().base_dist.expand((particles,))
        self.push: Callable[..., Any] = self.stack.push_score
        self.best = _Best(self.stack)
        self.first = len(history)
        self.steps = self.skipped = self.bad_in_a_row = self.restored = 0
        self.ended = self.gave_up = False

    @property
    def taken(self) -> list[Tensor]:
        """ELBOs of this training's steps."""
        return self.history[self.first :]

    @contextlib.contextmanager
    def whitened(self) -> Iterator[None]:
        """Trains the adjustment in place of the whitening map, and puts both into that map at the end."""
        self.whitening.requires_grad_(False)
        try:
            yield
        except KeyboardInterrupt:
            self.best.restore()
            raise
        finally:
            self.whitening.requires_grad_(True)
            both = compose_affine(
                self.adjustment.loc_and_scale_tril(), self.whitening.loc_and_scale_tril()
            )  # type: ignore[operator]
            self.whitening.set(*both)  # type: ignore[operator]

    def share_start(self) -> None:
        """Gives every process the parameters and the random state of the main one."""
        distributed.take_from_main(self.stack.state_dict().values())
        distributed.agree_on_random_state(self.density.initial.device)
        self.best = _Best(self.stack)
        if hasattr(self.density, "anchor"):
            self.density.anchor(self.whitening.loc_and_scale_tril()[0])  # type: ignore[operator]

    def compile(self) -> None:
        """Compiles the flow's part of a step."""
        x = self.density.initial.new_zeros(self.particles, self.density.features)
        self.push = compiled_push_score(self.stack, distributed.shard(x), self.flow)

    def step(self, done: float, beta: float) -> None:
        """One step, at which a fraction of the training is done."""
        rate = (
            0.5**self.restored
            * min(1.0, (self.steps + 1) / WARM_UP)
            * 0.5
            * (1 + math.cos(math.pi * done))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        self.optimizer.zero_grad()
        total, count = path_gradient(self.stack, self.base, self.density, beta, self.push)
        distributed.sum_over_ranks(
            [total, count, *(p.grad for p in self.trained if p.grad is not None)]
        )
        elbo = total / count
        norm = torch.nn.utils.clip_grad_norm_(self.trained, GRADIENT_NORM)
        self.steps += 1
        if bool((norm + elbo).isfinite()):
            self.bad_in_a_row = 0
            self.history.append(elbo)
            self.optimizer.step()
        else:
            self.bad_in_a_row += 1
            self._skip()

    def _skip(self) -> None:
        self.skipped += 1
        if self.bad_in_a_row < PATIENCE:
            return
        self.best.restore(or_start=True)
        self.bad_in_a_row = 0
        if self.restored == RESTORATIONS:
            self.ended = self.gave_up = True
        else:
            self.optimizer.state.clear()
            self.restored += 1

    def see(self) -> float:
        """Notes the parameters if they are the best so far; returns the mean of the last ELBOs."""
        elbo = float(torch.stack(self.taken[-WINDOW:]).mean())
        self.best.see(elbo)
        return elbo

    def report(self) -> TrainingReport:
        """What happened, with a warning if steps were skipped."""
        report = TrainingReport(self.steps, self.skipped, self.restored)
        if report.skipped:
            back = (
                f"; the last good parameters were restored {report.restored} times"
                if report.restored
                else ""
            )
            end = ", and the training ended early, with them" if self.gave_up else ""
            warnings.warn(
                f"{report.skipped} of {report.steps} training steps were skipped, for their ELBO or gradient was not "
                f"finite{back}{end}.",
                stacklevel=3,
            )
        return report

    # Checkpoints

    def settings(self) -> dict[str, Any]:
        """What tells this training from others: sizes, and what the density says at one point."""
        zero = torch.zeros_like(self.density.initial)
        at_zero = getattr(self.density, "full", self.density).value_and_grad(zero)[0].nan_to_num()
        parameters = {
            f"the shape of {name}": list(value.shape)
            for name, value in self.stack.state_dict().items()
        }
        return {
            "particles": self.particles,
            "dtype": str(self.density.initial.dtype),
            "the number of latent entries": self.density.features,
            "the log density at zero": float(at_zero),
            **parameters,
        }

    def state_dict(self, seconds: float) -> dict[str, Any]:
        """All that a training goes on from, as tensors and numbers."""
        return {
            "parameters": self.stack.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": torch.stack(self.taken) if self.taken else torch.zeros(0),
            "best": {"elbo": self.best.elbo, "state": self.best.state, "start": self.best.start},
            "counts": [self.steps, self.skipped, self.bad_in_a_row, self.restored],
            "ended": self.ended,
            "gave_up": self.gave_up,
            "seconds": seconds,
            "random": random_state(self.density.initial.device),
            "density": self.density.state_dict() if hasattr(self.density, "state_dict") else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        device = self.density.initial.device
        self.stack.load_state_dict(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history.extend(state["history"].to(device).unbind())
        self.best.elbo = state["best"]["elbo"]
        for name in ("state", "start"):
            setattr(
                self.best,
                name,
                {key: value.to(device) for key, value in state["best"][name].items()},
            )
        self.steps, self.skipped, self.bad_in_a_row, self.restored = state["counts"]
        self.ended, self.gave_up = state["ended"], state["gave_up"]
        if state["density"]:
            self.density.load_state_dict(state["density"])  # type: ignore[attr-defined]
        set_random_state(state["random"], device)


class _Best:
    """The parameters with the best ELBO so far, for the case that what follows fails."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.elbo = -math.inf
        self.start = self._copy()
        self.state: dict[str, Tensor] = {}

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.module.state_dict().items()}

    def see(self, elbo: float) -> None:
        if elbo > self.elbo:
            self.elbo = elbo
            self.state = self._copy()

    def restore(self, or_start: bool = False) -> None:
        state = self.state or (self.start if or_start else {})
        if state:
            self.module.load_state_dict(state)


def _fraction_done(step: int, steps: int, start: float, deadline: float | None) -> float:
    if step >= steps:
        return 1.0
    if deadline is None:
        return step / steps
    now = time.perf_counter()
    by_time = 1.0 if now >= deadline else (now - start) / (deadline - start)
    return max(step / steps, distributed.agree(by_time))


def _bar(progress: Any, steps: int) -> Any:
    """A bar of its own, or the one that was given, which stays open."""
    if isinstance(progress, bool):
        return tqdm(
            total=steps,
            disable=not (progress and distributed.is_main()),
            desc="Fitting",
            leave=True,
        )
    return contextlib.nullcontext(progress)
