"""The training of a model's own parameters, together with a guide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._deadline import Deadline
from ..flows import Flow
from ..model.base import Density
from ..model.density import LogDensity
from ..model.minibatch import MiniBatchDensity
from . import processes
from .loop import INTERRUPTED, Group, Loop
from .objectives import PathELBO
from .processes import Part
from .training import OPTIONS, STEP_SIZE, WHITENING_STEP_SIZE, GuideTask

__all__ = ["choose_parameters", "learn_parameters"]

#: Draws of the guide in each step, and the step size of the parameters.
PARTICLES = 32
PARAMETER_STEP_SIZE = 2e-2


def choose_parameters(density: LogDensity, learn: bool | Sequence[str]) -> dict[str, Tensor]:
    """Finds the parameters that a user wants to be learned.

    Args:
        density: The log density of the model.
        learn: Names of parameters, or of modules that have some; ``True`` for all.

    Returns:
        The parameters by name.

    Raises:
        TypeError: If ``learn`` is neither a flag nor a sequence of names.
        ValueError: If the model has no parameter of a name, or none at all.
    """
    known = density.parameters
    if learn is False:
        return {}
    is_names = isinstance(learn, Sequence) and not isinstance(learn, (str, bytes))
    if learn is not True and not is_names:
        raise TypeError(f"Expected learn to be True, False or a sequence of names; got {learn!r}.")
    if not known:
        raise ValueError("Expected a model with parameters that require gradients; got none.")
    if learn is True:
        return dict(known)
    chosen: dict[str, Tensor] = {}
    for name in learn:
        found = {key: value for key, value in known.items() if _is_of(key, name)}
        if not found:
            raise ValueError(
                f"Expected learn to name parameters of the model, {', '.join(known)}; got {name!r}."
            )
        chosen.update(found)
    return chosen


def _is_of(key: str, name: str) -> bool:
    """Whether a parameter is that of a name, or in the module of that name."""
    return key == name or key.startswith((f"{name}.", f"{name}$$$"))  # the store's own separator


def learn_parameters(
    flow: Flow,
    density: Density,
    parameters: Mapping[str, Tensor],
    steps: int,
    *,
    deadline: Deadline | None = None,
    progress: Any = False,
) -> None:
    r"""Trains parameters of a model together with a flow; all change in place.

    .. math:: \max_{\theta, \phi}\ \mathbb{E}_{q_\phi(z)}
        [\log p_\theta(z, \mathrm{data}) - \log q_\phi(z)] \le \max_\theta \log p_\theta(\mathrm{data}),

    with the path gradient for the flow: maximum marginal likelihood, as far as the flow reaches the
    posterior.

    Args:
        flow: A flow whose last layer whitens.
        density: The log density of the model.
        parameters: Some of the model's own parameters.
        steps: Most steps to take.
        deadline: The time limit; the step size then decays with the time.
        progress: Whether to show a progress bar.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    task = _LearningTask(flow, density, parameters)
    with task.whitened(), processes.sharing():
        loop = Loop(task, OPTIONS)
        report = loop.run(steps, deadline=deadline, progress=progress)
    if report.reason == INTERRUPTED:
        raise KeyboardInterrupt


class _LearningTask(GuideTask):
    """A guide's flow, and parameters of the model."""

    def __init__(self, flow: Flow, density: Density, parameters: Mapping[str, Tensor]) -> None:
        objective = PathELBO(PARTICLES)
        super().__init__(flow, density, [], objective, (STEP_SIZE, WHITENING_STEP_SIZE))
        self.parameters = dict(parameters)
        leaves: list[Any] = list(self.parameters.values())
        self.groups = [*self.groups, Group(leaves, PARAMETER_STEP_SIZE)]
        self.module = _Together(self.module, leaves)  # type: ignore[assignment]
        self._whole: LogDensity | None = None

    def backward(self) -> Part:
        z = self.distribution.rsample((PARTICLES,))
        log_q = self.distribution.score_parts(z).entropy_term
        bound = (self._bound().log_joint(z) - log_q).mean()
        bound.neg().backward()
        # Every process has all particles.
        share = 1.0 / processes.world_size()
        for parameter in [p for group in self.groups for p in group.parameters]:
            if parameter.grad is not None and share < 1:
                parameter.grad.mul_(share)
        return Part(share * bound.detach(), torch.tensor(share))

    def _bound(self) -> LogDensity:
        """The density, of a mini-batch if it is one of these, with a graph of the parameters."""
        if isinstance(self.density, MiniBatchDensity):
            batch = self.density.next_batch()
            return batch.bind(rows=batch.inputs.rows, parameters=self.parameters)
        if self._whole is None:
            self._whole = self.density.full.bind(parameters=self.parameters)
        return self._whole


class _Together(nn.Module):
    """A flow and parameters of a model, which are saved and restored together."""

    def __init__(self, flow: nn.Module, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.flow = flow
        for k, parameter in enumerate(parameters):
            if isinstance(parameter, nn.Parameter):
                self.register_parameter(f"parameter_{k}", parameter)
            else:
                self.register_buffer(f"parameter_{k}", parameter)
