"""Training on draws that are annealed from the guide to the posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import check_positive, check_size
from ...distributions.flow import log_prob_and_score
from ...model.density import LogDensity
from ...sampling.hamiltonian import Target, hmc
from .draws import VectorObjective

__all__ = ["FAB"]

# The acceptance of Hamiltonian Monte Carlo at which a unit of distance costs least.
ACCEPTANCE = 0.65
# Where the length of its steps starts, in widths of the guide.
STEP_SIZE = 0.5


class FAB(VectorObjective):
    r"""Flow annealed importance sampling bootstrap: a forward divergence on annealed draws from a
    replay buffer.

    Draws of the guide :math:`q` are carried by annealed importance sampling, with Hamiltonian
    Monte Carlo, over :math:`g_\beta \propto q\,(p / q)^{\alpha \beta}` to :math:`g_1 \propto
    p^\alpha q^{1 - \alpha}`, get weights :math:`w_i` there, and train the guide by

    .. math:: \nabla_\phi \ell = -\sum_i \bar w_i \nabla_\phi \log q_\phi(z_i) \approx
        -\mathbb{E}_{g_1}[\nabla_\phi \log q_\phi(z)],

    the gradient of the forward :math:`\mathrm{KL}(p \| q)` for :math:`\alpha = 1`, and of
    :math:`\log \int p^2 / q` for :math:`\alpha = 2`, which seeks what the guide lacks. A mode
    outside of the guide is found by the annealing and kept by the buffer, where a reverse
    divergence would not miss it.

    Each step takes draws from the buffer with probability :math:`\propto w_i`, corrects for what
    the guide has become since, :math:`(q_\mathrm{old} / q)^{\alpha - 1}`, clipped at 10, and
    updates their weights; every ``reuse`` steps the buffer gets new draws. The guide is one over
    an unconstrained vector, as for :class:`ForwardKL`. Data and parameters of the model stay what
    they were in the first step. The loss is a cross-entropy.

    Args:
        num_particles: Draws for each step, and chains of the annealing.
        alpha: Power of the posterior in the target, at least 1.
        temperatures: Stages of the annealing.
        leapfrog_steps: Most leapfrog steps of a stage.
        reuse: Steps between annealings.
        capacity: Most draws that are kept; the oldest go.

    Raises:
        TypeError: If an argument is of the wrong type; in a step, if the guide is of another kind.
        ValueError: If an argument is out of range; in a step, if model or arguments are others
            than in the first.

    Reference:
        Midgley, Stimper, Simm, Schoelkopf, Hernandez-Lobato, "Flow annealed importance sampling
        bootstrap", 2023, https://arxiv.org/abs/2208.01893

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer import SVI
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> adam = pyro.optim.Adam({"lr": 0.01})
        >>> loss = SVI(model, pf.AutoFlow(model), adam, loss=FAB(32)).step()
    """

    def __init__(
        self,
        num_particles: int = 128,
        alpha: float = 2.0,
        temperatures: int = 4,
        leapfrog_steps: int = 5,
        reuse: int = 4,
        capacity: int = 16384,
    ) -> None:
        super().__init__(check_size("num_particles", num_particles, least=2))
        self.alpha = check_positive("alpha", alpha)
        if self.alpha < 1:
            raise ValueError(f"Expected alpha >= 1; got {alpha}.")
        self.temperatures = check_size("temperatures", temperatures)
        self.leapfrog_steps = check_size("leapfrog_steps", leapfrog_steps)
        self.reuse = check_size("reuse", reuse)
        self.capacity = check_size("capacity", capacity, least=num_particles)
        self._begin(None)

    def _begin(self, density: LogDensity | None) -> None:
        self._density, self._steps, self.step_size = density, 0, STEP_SIZE
        self._buffer: _Annealed | None = None

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "alpha": self.alpha, "temperatures": self.temperatures}

    def state_dict(self) -> dict[str, Any]:
        buffer = [] if self._buffer is None else list(self._buffer)
        return {"buffer": buffer, "steps": self._steps, "step_size": self.step_size}

    def load_state_dict(self, state: Mapping[str, Any], density: LogDensity) -> None:
        self._begin(density)
        if state["buffer"]:
            parts = [part.to(density.initial.device) for part in state["buffer"]]
            self._buffer = _Annealed(*parts)
        self._steps, self.step_size = state["steps"], state["step_size"]

    def _target(
        self, model: Any, guide: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> LogDensity:
        known = self._density
        if known is None:
            self._begin(LogDensity(model, args, kwargs))
        elif not (known.model is model and _same(known.args, args) and _same(known.kwargs, kwargs)):
            raise ValueError(
                "Expected the model and arguments of the first step, to which the draws in the "
                "buffer belong; got others. "
                "Make another FAB() for them."
            )
        assert self._density is not None
        return self._density

    def _loss(self, distribution: Any, density: LogDensity) -> Tensor:
        if density is not self._density:
            self._begin(density)
        if self._buffer is None:
            self._buffer = self._anneal(distribution, density)
        if self._steps % self.reuse == 0:
            parts = zip(self._buffer, self._anneal(distribution, density), strict=True)
            self._buffer = _Annealed(*(torch.cat(part)[-self.capacity :] for part in parts))
        self._steps += 1
        z, log_weight, log_guide = self._buffer
        rows = log_weight.softmax(0).multinomial(self.num_particles, replacement=True)
        log_prob = distribution.log_prob(z[rows])
        correction = (self.alpha - 1) * (log_guide[rows] - log_prob.detach())
        log_weight[rows] += correction
        log_guide[rows] = log_prob.detach()
        return -(correction.exp().clamp(max=10.0) * log_prob).mean()

    def _anneal(self, distribution: Any, density: LogDensity) -> _Annealed:
        """Annealed importance sampling from a guide, in units of the widths of its draws."""
        with torch.no_grad():
            z = distribution.sample((self.num_particles,))
        scale = z.std(0).clamp_min(torch.finfo(z.dtype).tiny)
        log_weight = torch.zeros_like(z[:, 0])
        for stage in range(1, self.temperatures + 1):
            log_weight = log_weight + self.alpha / self.temperatures * _log_ratio(
                distribution, density, z
            )
            target = _tempered(distribution, density, self.alpha * stage / self.temperatures, scale)
            moved = hmc(
                target,
                z / scale,
                1,
                leapfrog=self.leapfrog_steps,
                step_size=self.step_size,
                adapt=False,
            )
            z = moved.position * scale
            self.step_size *= math.exp(0.2 * (moved.acceptance - ACCEPTANCE))
        with torch.no_grad():
            log_guide = distribution.log_prob(z)
        sound = log_weight.isfinite() & log_guide.isfinite()
        if not bool(sound.any()):
            raise ValueError(
                f"Expected a finite log density at a draw of the guide; got none at {len(z)}."
            )
        return _Annealed(z[sound], log_weight[sound], log_guide[sound])


class _Annealed(NamedTuple):
    """Annealed draws ``(n, features)``, their log weights and the guide's log densities then, ``(n,)``."""

    z: Tensor
    log_weight: Tensor
    log_guide: Tensor


@torch.no_grad()
def _log_ratio(distribution: Any, density: LogDensity, z: Tensor) -> Tensor:
    return density.log_prob(z) - distribution.log_prob(z)


def _tempered(distribution: Any, density: LogDensity, power: float, scale: Tensor) -> Target:
    """The log density of a guide times a power of the weights, as a function of scaled points."""

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        z = x * scale
        log_guide, score = log_prob_and_score(distribution.log_prob, z)
        log_joint, slope = density.value_and_grad(z)
        return log_guide + power * (log_joint - log_guide), (
            score + power * (slope - score)
        ) * scale

    return target


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, (Real, str)) and a == b)
