r"""Hamiltonian Monte Carlo for many chains at a time.

``hmc(target, start, trajectories)`` moves all rows of ``start`` together; a target maps positions
of shape ``(chains, features)`` to log densities and gradients. ``latent_target(density,
transform)`` is the target in the base space of a flow, where :math:`x` has the density
:math:`p(f(x)) |\det J_f(x)|`, which is close to that of the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_positive, check_size
from .._sharing import in_shares
from ..guides.guide import Map
from ..model.density import LogDensity
from ..transforms.base import vjp

__all__ = ["HMCResult", "Target", "hmc", "latent_target"]

#: From positions of shape ``(chains, features)`` to log densities ``(chains,)`` and gradients
#: ``(chains, features)``.
Target = Callable[[Tensor], tuple[Tensor, Tensor]]
LogFactor = Callable[[Tensor], Tensor]

ACCEPTANCE = 0.8
# The inverse slope of the acceptance in the logarithm of the step size, where eight in ten are
# accepted.
NEWTON_GAIN = 2.5
# The step sizes of the chains lie between a quarter and seven quarters of their mean.
SPREAD = 0.75
# A quarter of a period of a standard normal.
PATH_LENGTH = math.pi / 2
LEAPFROG = 32
# An error of the energy at which the integrator has lost the orbit.
DIVERGENCE = 1000.0


class HMCResult(NamedTuple):
    """Where the chains of :func:`hmc` are, and by what moves.

    Attributes:
        position: Tensor of shape ``(chains, features)``.
        log_density: Tensor of shape ``(chains,)``; ``-inf`` for a chain that has yet to find the
            support.
        acceptance: Mean probability of acceptance; while the step size adapts, of the second half.
        step_size: The last mean step size.
        trajectories: How many were made.
        divergences: How many trajectories, of all chains, lost the orbit.
        history: Positions after each trajectory, of shape ``(trajectories, chains, features)``, or
            ``None``.
    """

    position: Tensor
    log_density: Tensor
    acceptance: float
    step_size: float
    trajectories: int
    divergences: int
    history: Tensor | None


class Point(NamedTuple):
    """Positions with log densities and slopes, which are ``-inf`` and 0 where not finite."""

    position: Tensor
    log_density: Tensor
    slope: Tensor


def hmc(
    target: Target,
    start: Tensor,
    trajectories: int,
    path_length: float = PATH_LENGTH,
    leapfrog: int = LEAPFROG,
    step_size: float | None = None,
    adapt: bool = True,
    keep: bool = False,
) -> HMCResult:
    r"""Hamiltonian Monte Carlo with identity mass, for many chains at a time.

    With momentum :math:`v \sim N(0, I)` each trajectory takes leapfrog steps of size
    :math:`\epsilon`,

    .. math:: v \leftarrow v + \tfrac{\epsilon}{2} \nabla \log p(x), \quad
        x \leftarrow x + \epsilon v, \quad
        v \leftarrow v + \tfrac{\epsilon}{2} \nabla \log p(x),

    and is accepted with probability :math:`\min(1, e^{-\Delta H})`, :math:`H = |v|^2 / 2 - \log
    p(x)`. In each trajectory each chain draws its :math:`\epsilon` evenly between a quarter and
    seven quarters of ``step_size``, so that no orbit closes and a chain in a narrow place comes by
    small steps. That size is shared by all chains and adapted to an acceptance of 0.8, pooled over
    them, by stochastic approximation.

    Where the target is not finite its density counts as zero: chains do not go there, and chains
    that start there leave it as soon as they meet the support. The draws come from torch's random
    state.

    Args:
        target: The log density and its gradient, for all chains in one call.
        start: Positions of shape ``(chains, features)``.
        trajectories: How many to make.
        path_length: Mean length of a trajectory, step size times leapfrog steps.
        leapfrog: Most leapfrog steps of a trajectory; where the step size is small it ends short of
            ``path_length``.
        step_size: The mean step size to begin with; :math:`D^{-1/4}` by default.
        adapt: Whether the step size adapts. Chains that are to be exact take a fixed one, from an
            earlier call.
        keep: Whether to keep the positions after each trajectory.

    Returns:
        The positions and how they came about.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range, or if ``start`` or what the target returns has
            another shape.

    Reference:
        Neal, "MCMC using Hamiltonian dynamics", 2011, https://arxiv.org/abs/1206.1901

        Beskos, Pillai, Roberts, Sanz-Serna, Stuart, "Optimal tuning of the hybrid Monte Carlo
        algorithm", 2013, https://arxiv.org/abs/1001.4460

    Example:
        >>> _ = torch.manual_seed(0)
        >>> normal = lambda x: (-0.5 * x.square().sum(-1), -x)
        >>> result = hmc(normal, torch.full((1000, 2), 5.0), trajectories=10)
        >>> bool(result.position.mean().abs() < 0.1), bool((result.position.std() - 1).abs() < 0.1)
        (True, True)
    """
    _check_start(start)
    check_size("trajectories", trajectories, least=0)
    kernel = Kernel(target, start.shape[-1], step_size, path_length, leapfrog)
    point = evaluate(target, start.detach())
    acceptances: list[float] = []
    history: list[Tensor] = []
    divergences = 0
    for _ in range(trajectories):
        point, move = kernel.move(point, adapt)
        acceptances.append(move.acceptance)
        divergences += move.divergences
        if keep:
            history.append(point.position)
    counted = acceptances[len(acceptances) // 2 :] if adapt else acceptances
    return HMCResult(
        position=point.position,
        log_density=point.log_density,
        acceptance=sum(counted) / len(counted) if counted else math.nan,
        step_size=kernel.step_size,
        trajectories=len(acceptances),
        divergences=divergences,
        history=_stacked(history, start) if keep else None,
    )


def latent_target(
    density: LogDensity, transform: Map, log_factor: LogFactor | None = None
) -> Target:
    r"""The log density in the base space of a flow, as a target for :func:`hmc`.

    .. math:: \log \tilde p(x) = \log p(f(x)) + \log|\det J_f(x)|, \qquad
        \nabla \log \tilde p(x) = J_f(x)^\top \nabla \log p(f(x)) + \nabla \log|\det J_f(x)|.

    Args:
        density: The density of the model.
        transform: The transform :math:`f` of a guide, from its base to the unconstrained vector.
        log_factor: The logarithm of a factor of the density, from vectors of shape ``(chains,
            features)`` to ``(chains,)``. Its gradient is left out: leapfrog steps may follow any
            slope, for the acceptance makes them exact.

    Returns:
        A function from positions of shape ``(chains, features)`` to log densities and gradients,
        without graph.

    Reference:
        Parno, Marzouk, "Transport map accelerated Markov chain Monte Carlo", 2018,
        https://arxiv.org/abs/1412.5492

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 2.0))
        >>> shift = pf.transforms.LowerTriangularAffine(1)
        >>> shift.set(torch.tensor([3.0]), torch.tensor([[2.0]]))
        >>> latent_target(pf.model.LogDensity(model), shift)(torch.ones(1, 1))[1]
        tensor([[-1.]])
    """

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            z, log_det = transform.forward_and_log_det(point)
        value, slope = density.value_and_grad(z)
        gradient = vjp([(z, slope), (log_det, torch.ones_like(log_det))], point)
        value = value + log_det.detach()
        return value if log_factor is None else value + log_factor(z.detach()), gradient.detach()

    return target


class Move(NamedTuple):
    """One trajectory of all chains: the mean probability of acceptance, and how many diverged."""

    acceptance: float
    divergences: int


class Kernel:
    r"""The transition of :func:`hmc`, with the step size that it learns.

    The step size is adapted by stochastic approximation of the mean probability of acceptance
    :math:`\alpha`,

    .. math:: \log \epsilon \leftarrow \log \epsilon + \gamma_k (\alpha - 0.8),

    where :math:`k` counts how often :math:`\alpha - 0.8` has changed its sign, so that a start far
    off is left at full speed and noise is averaged later. The first gain is that of Newton's
    method: in many dimensions :math:`\alpha = 2 \Phi(-c\, \epsilon^2)`.

    Args:
        target: The target.
        features: Entries of a position.
        step_size: The step size to begin with.
        path_length: Mean length of a trajectory.
        leapfrog: Most leapfrog steps of a trajectory.

    Reference:
        Kesten, "Accelerated stochastic approximation", 1958,
        https://doi.org/10.1214/aoms/1177706705
    """

    def __init__(
        self,
        target: Target,
        features: int,
        step_size: float | None = None,
        path_length: float = PATH_LENGTH,
        leapfrog: int = LEAPFROG,
    ) -> None:
        self.target = target
        self.step_size = (
            features**-0.25 if step_size is None else check_positive("step_size", step_size)
        )
        self.path_length = check_positive("path_length", path_length)
        self.leapfrog = check_size("leapfrog", leapfrog)
        self._error = 0.0
        self._turns = 0

    def move(self, start: Point, adapt: bool = False) -> tuple[Point, Move]:
        """Makes one trajectory of all chains, and learns from it if it may."""
        stretch = 1 + SPREAD * (2 * torch.rand_like(start.position[:, :1]) - 1)
        steps = min(self.leapfrog, max(1, round(self.path_length / self.step_size)))
        momentum = torch.randn_like(start.position)
        end, momentum_end = integrate(self.target, start, momentum, self.step_size * stretch, steps)
        log_ratio = log_acceptance(start, momentum, end, momentum_end)
        # Chains still outside of the support say nothing about the step size.
        inside = start.log_density.isfinite()
        probability = log_ratio[inside].clamp(max=0).exp()
        acceptance = float(probability.mean()) if len(probability) else ACCEPTANCE
        divergences = int((inside & (log_ratio < -DIVERGENCE)).sum())
        if adapt:
            self._adapt(acceptance)
        return choose(torch.rand_like(log_ratio).log() < log_ratio, end, start), Move(
            acceptance, divergences
        )

    def _adapt(self, acceptance: float) -> None:
        error = acceptance - ACCEPTANCE
        self._turns += error * self._error < 0
        self._error = error
        self.step_size *= math.exp(NEWTON_GAIN / (1 + self._turns) ** 0.75 * error)


def evaluate(target: Target, position: Tensor) -> Point:
    """Evaluates a target; where it is not finite, the density is zero and the slope too."""
    log_density, slope = in_shares(target, position, width=1 + position.shape[-1])
    if log_density.shape != position.shape[:-1] or slope.shape != position.shape:
        expected = f"{tuple(position.shape[:-1])} and {tuple(position.shape)}"
        got = f"{tuple(log_density.shape)} and {tuple(slope.shape)}"
        raise ValueError(f"Expected target to return tensors of shapes {expected}; got {got}.")
    finite = log_density.isfinite() & slope.isfinite().all(-1)
    return Point(
        position, log_density.where(finite, -math.inf), slope.where(finite.unsqueeze(-1), 0.0)
    )


def integrate(
    target: Target, start: Point, momentum: Tensor, step_size: Tensor, steps: int
) -> tuple[Point, Tensor]:
    """Leapfrog steps from all points at a time, of a size each, of shape ``(chains, 1)``.

    An orbit that overflows stays where it began, as a point of density zero.
    """
    point = start
    for _ in range(steps):
        momentum = momentum + step_size / 2 * point.slope
        position = point.position + step_size * momentum
        sound = position.isfinite().all(-1, keepdim=True)
        point = evaluate(target, position.where(sound, start.position))
        if not bool(sound.all()):
            lost = ~sound.squeeze(-1)
            momentum = momentum.where(sound, math.nan)
            point = point._replace(log_density=point.log_density.masked_fill(lost, -math.inf))
        momentum = momentum + step_size / 2 * point.slope
    return point, momentum


def log_acceptance(start: Point, momentum: Tensor, end: Point, momentum_end: Tensor) -> Tensor:
    """The logarithm of the Metropolis ratio; ``-inf`` where the end has density zero."""
    kinetic = 0.5 * (momentum.square().sum(-1) - momentum_end.square().sum(-1))
    log_ratio = end.log_density - start.log_density + kinetic
    return log_ratio.where(end.log_density.isfinite() & ~log_ratio.isnan(), -math.inf)


def choose(accepted: Tensor, proposal: Point, point: Point) -> Point:
    """Moves the chains that are accepted."""
    rows = accepted.unsqueeze(-1)
    return Point(
        proposal.position.where(rows, point.position),
        proposal.log_density.where(accepted, point.log_density),
        proposal.slope.where(rows, point.slope),
    )


def _stacked(history: list[Tensor], start: Tensor) -> Tensor:
    return torch.stack(history) if history else start.new_empty(0, *start.shape)


def _check_start(start: Any) -> None:
    if not isinstance(start, Tensor):
        raise TypeError(
            "Expected start to be a tensor of shape (chains, features); "
            f"got {type(start).__name__}."
        )
    if not start.is_floating_point():
        raise TypeError(f"Expected start of a floating-point dtype; got {start.dtype}.")
    if start.dim() != 2 or not start.numel():
        raise ValueError(f"Expected start of shape (chains, features); got {tuple(start.shape)}.")
    if not bool(start.isfinite().all()):
        raise ValueError("Expected start to be finite; got positions with NaN or infinity.")
