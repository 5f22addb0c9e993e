"""Markov chains that make a fitted guide exact.

``neutra(posterior)`` runs Hamiltonian Monte Carlo or NUTS in the base space of the guide's flow,
and ``flow_mc(posterior)`` mixes independent proposals from the guide, any guide, with local moves.
Both return :class:`Chains`: ``.draws`` by site, of shape ``(chains, draws, *shape)``,
``.unconstrained``, ``.rhat``, ``.ess``, ``.summary()``, ``.to_arviz()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import NUTS
from torch import Tensor
from tqdm.auto import tqdm

from .._checks import check_choice, check_size
from .._deadline import Deadline
from .._random import forked
from ..guides import BaseSpace, Guide
from ..guides.guide import Map
from ..model import prediction as simulate
from ..model.density import LogDensity
from ..report import statistics
from ..sampling.hamiltonian import Kernel, Point, Target, choose, evaluate, latent_target
from ..sampling.spaces import plain_space
from .posterior import Posterior, check_posterior

if TYPE_CHECKING:
    import numpy
    import pandas

__all__ = ["Chains", "flow_mc", "neutra"]

KERNELS = ("hmc", "nuts")
# Draws of a guide from which its scale is read where it has no transform, and among which a start
# is sought.
SCALE_DRAWS = 4000
START_TRIES = 20
# Where jumps go far, local moves need not.
LOCAL_LEAPFROG = 8


@dataclass(frozen=True, eq=False, repr=False)
class Chains:
    """Draws by chain, as :func:`neutra` and :func:`flow_mc` return them.

    Attributes:
        density: The log density of the model.
        unconstrained: Draws as unconstrained vectors, of shape ``(chains, draws, features)``.
        log_density: Their log joint density, of shape ``(chains, draws)``.
        acceptance: Mean probability that a local move was accepted after the warm-up.
        step_size: The step size of the local moves; the mean over chains where each has its own.
        divergences: How many trajectories after the warm-up lost their orbit. A few are the longest
            steps at a steep wall; many, at one place, say that it is not explored.
        jump_acceptance: Mean probability that an independent proposal was accepted; ``None`` where
            there were none.
        seconds: Wall-clock time.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> from pyroflows.posterior.chains import neutra
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        >>> posterior = pf.fit_posterior(model, steps=0, progress=False)
        >>> chains = neutra(posterior, draws=50, warmup=20, progress=False)
        >>> chains.draws["x"].shape, bool((chains.rhat["x"] < 1.1).all())
        (torch.Size([32, 50, 2]), True)
    """

    density: LogDensity
    unconstrained: Tensor
    log_density: Tensor
    acceptance: float
    step_size: float
    divergences: int
    jump_acceptance: float | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        chains, draws = self.log_density.shape
        sites = ", ".join(f"{site.name}{list(site.shape) or ''}" for site in self.density.sites)
        divergences = f", {self.divergences} divergences" if self.divergences else ""
        return f"<Chains of {sites}: {draws} draws in each of {chains} chains{divergences}>"

    @cached_property
    def draws(self) -> dict[str, Tensor]:
        """For each latent and deterministic site a tensor ``(chains, draws, *site_shape)``."""
        rows = self.unconstrained.flatten(0, 1)
        values = simulate.site_draws(self.density, rows)
        return {name: value.unflatten(0, self.log_density.shape) for name, value in values.items()}

    @property
    def rhat(self) -> dict[str, numpy.ndarray]:
        """R-hat of every entry, of split and rank-normalised chains; NaN for a constant."""
        return self._diagnostics["rhat"]

    @property
    def ess(self) -> dict[str, numpy.ndarray]:
        """Bulk effective sample size of every entry of every site."""
        return self._diagnostics["ess_bulk"]

    def summary(self) -> pandas.DataFrame:
        """A table with moments, intervals and diagnostics of every scalar parameter.

        Returns:
            A data frame, one row a scalar, columns ``mean``, ``sd``, ``hdi_3%``, ``hdi_97%``,
            ``mcse_mean``, ``ess_bulk``, ``ess_tail``, ``rhat``.
        """
        table = statistics.summary(
            {name: values.reshape(-1, *values.shape[2:]) for name, values in self._arrays.items()},
            circular=self.density.centres,
        )
        for kind in ("mcse_mean", "ess_bulk", "ess_tail", "rhat"):
            table[kind] = [
                float(value)
                for values in self._diagnostics[kind].values()
                for value in values.ravel()
            ]
        return table

    def to_arviz(self) -> Any:
        """The chains in ArviZ's container, with the groups that :meth:`Posterior.to_arviz` makes.

        Returns:
            An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x).
        """
        attrs = {
            "inference_library": "pyroflows",
            "acceptance": self.acceptance,
            "jump_acceptance": self.jump_acceptance,
            "step_size": self.step_size,
            "divergences": self.divergences,
            "sampling_time": self.seconds,
        }
        with forked(0):
            return simulate.inference_data(
                self.density, self.unconstrained, {"lp": self.log_density}, attrs
            )

    @cached_property
    def _arrays(self) -> dict[str, numpy.ndarray]:
        return {name: value.cpu().numpy() for name, value in self.draws.items()}

    @cached_property
    def _diagnostics(self) -> dict[str, dict[str, numpy.ndarray]]:
        return statistics.diagnostics(self._arrays, circular=self.density.centres)


def neutra(
    posterior: Posterior,
    draws: int = 250,
    chains: int = 32,
    warmup: int = 100,
    kernel: str = "hmc",
    seed: int | None = 0,
    progress: bool = True,
) -> Chains:
    r"""Hamiltonian Monte Carlo in the base space of a flow (NeuTra).

    The chains have the stationary density

    .. math:: \tilde p(x) \propto p(f(x), \mathrm{data})\, |\det J_f(x)|,

    which is that of the base where the flow is exact, so that they mix fast, and the draws are
    :math:`z = f(x)`. What the flow misses costs time and not exactness, as long as it reaches all
    the mass; for modes that lie apart see :func:`flow_mc`.

    Args:
        posterior: A fitted posterior whose guide has one base space, as an :class:`AutoFlow` has.
        draws: How many to keep of each chain.
        chains: How many chains.
        warmup: Draws of each chain that are left out, in which the kernel adapts.
        kernel: ``"hmc"``, all chains at a time, with one step size for all; or ``"nuts"``, Pyro's
            No-U-Turn sampler, one chain after the other, for which few and longer chains are
            better.
        seed: Seed of the draws; ``None`` takes torch's random state.
        progress: Whether to show a progress bar.

    Returns:
        The chains.

    Raises:
        TypeError: If ``posterior`` is none, or its guide has no base space or several.
        ValueError: If a number is out of range, if ``kernel`` is unknown, or if the guide meets no
            point of finite density.

    Reference:
        Hoffman, Sountsov, Dillon, Langmore, Tran, Vasudevan, "NeuTra-lizing bad geometry in
        Hamiltonian Monte Carlo using neural transport", 2019, https://arxiv.org/abs/1903.03704

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Exponential(1.0))
        >>> posterior = pf.fit_posterior(model, steps=0, progress=False)
        >>> float(neutra(posterior, progress=False).draws["x"].mean().round())
        1.0
    """
    _check(posterior, draws, chains, warmup)
    check_choice("kernel", kernel, KERNELS)
    spaces = posterior.guide.base_spaces()
    if len(spaces) != 1:
        kind = type(posterior.guide).__name__
        raise TypeError(
            "Expected a posterior whose guide has one base space, such as an AutoFlow; "
            f"got {kind}, which has {len(spaces)}. Fit with guide=pyroflows.RealNVP, or see flow_mc."
        )
    clock = Deadline()
    (space,) = spaces
    target = latent_target(posterior.density, space.transform)
    with forked(seed):
        start = _start(target, space, chains)
        if kernel == "nuts":
            run = _nuts(target, start.position, draws, warmup, progress)
        else:
            run = _run(Kernel(target, start.position.shape[-1]), start, draws, warmup, progress)
    return _chains(posterior.density, space.transform, run, clock)


def flow_mc(
    posterior: Posterior,
    draws: int = 250,
    chains: int = 32,
    warmup: int = 100,
    jumps: int = 4,
    seed: int | None = 0,
    progress: bool = True,
) -> Chains:
    r"""Independent proposals from the guide, mixed with local moves (flow Monte Carlo).

    Between two draws each chain makes one trajectory of Hamiltonian Monte Carlo and then ``jumps``
    Metropolis moves whose proposals :math:`z' \sim q` come from the guide and do not depend on
    where the chain is, accepted with probability

    .. math:: \min\left(1, \frac{p(z', \mathrm{data})\, q(z)}{p(z, \mathrm{data})\, q(z')}\right).

    The jumps take the chains between modes that the guide knows of, however far apart, and the
    trajectories go where the guide is thin. They run in the base space of a guide that has one, and
    for other guides in units of its draws.

    Args:
        posterior: A fitted posterior.
        draws: How many to keep of each chain.
        chains: How many chains.
        warmup: Draws of each chain that are left out, in which the step size adapts.
        jumps: Independent proposals a draw.
        seed: Seed of the draws; ``None`` takes torch's random state.
        progress: Whether to show a progress bar.

    Returns:
        The chains.

    Raises:
        TypeError: If ``posterior`` is none.
        ValueError: If a number is out of range, or if the guide meets no point of finite density.

    Reference:
        Gabrié, Rotskoff, Vanden-Eijnden, "Adaptive Monte Carlo augmented with normalizing flows",
        2022, https://arxiv.org/abs/2105.12603

        Samsonov, Lagutin, Gabrié, Durmus, Naumov, Moulines, "Local-global MCMC kernels: the best of
        both worlds", 2022, https://arxiv.org/abs/2111.02702

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Exponential(1.0))
        >>> posterior = pf.fit_posterior(model, steps=0, progress=False)
        >>> float(flow_mc(posterior, progress=False).draws["x"].mean().round())
        1.0
    """
    _check(posterior, draws, chains, warmup)
    check_size("jumps", jumps, least=0)
    clock = Deadline()
    with forked(seed):
        space = _one_space(posterior.guide)
        target = latent_target(posterior.density, space.transform)
        start = _start(target, space, chains)
        jump = _Jump(target, space, jumps)
        kernel = Kernel(target, start.position.shape[-1], leapfrog=LOCAL_LEAPFROG)
        run = _run(kernel, start, draws, warmup, progress, jump)
    return _chains(posterior.density, space.transform, run, clock)


def _one_space(guide: Guide) -> BaseSpace:
    """The base space of a guide that has one for the whole, or else the space of its draws."""
    spaces = guide.base_spaces()
    if len(spaces) == 1:
        return spaces[0]
    with torch.no_grad():
        draws, _ = guide.sample_and_log_prob(SCALE_DRAWS)
    return plain_space(guide, draws)


class _Jump:
    """Independent Metropolis moves of all chains, whose proposals are evaluated in one batch."""

    def __init__(self, target: Target, space: BaseSpace, moves: int) -> None:
        self.target = target
        self.space = space
        self.moves = moves

    @torch.no_grad()
    def __call__(self, point: Point) -> tuple[Point, float]:
        """The chains after the moves, and the mean probability of acceptance."""
        chains = len(point.position)
        x = self.space.base.sample((self.moves * chains,))
        proposals = evaluate(self.target, x)
        log_weights = proposals.log_density - self.space.base.log_prob(x)
        log_weight = point.log_density - self.space.base.log_prob(point.position)
        acceptance = 0.0
        for rows in torch.arange(self.moves * chains, device=x.device).split(chains):
            proposal = Point(*(part[rows] for part in proposals))
            log_ratio = log_weights[rows] - log_weight
            log_ratio = log_ratio.where(
                proposal.log_density.isfinite() & ~log_ratio.isnan(), -math.inf
            )
            accepted = torch.rand_like(log_ratio).log() < log_ratio
            point = choose(accepted, proposal, point)
            log_weight = log_weights[rows].where(accepted, log_weight)
            acceptance += float(log_ratio.clamp(max=0).exp().mean()) / self.moves
        return point, acceptance


@dataclass(frozen=True)
class _Run:
    """Positions of shape ``(chains, draws, features)``, and what there is to say of them."""

    positions: Tensor
    acceptance: float
    step_size: float
    divergences: int
    jump_acceptance: float | None = None


def _run(
    kernel: Kernel, point: Point, draws: int, warmup: int, progress: bool, jump: _Jump | None = None
) -> _Run:
    """Moves all chains through warm-up and draws."""
    positions, acceptance, jump_acceptance, divergences = [], 0.0, 0.0, 0
    for t in tqdm(range(warmup + draws), disable=not progress, desc="Sampling", leave=True):
        point, move = kernel.move(point, adapt=t < warmup)
        jumped = 0.0
        if jump is not None and jump.moves:
            point, jumped = jump(point)
        if t >= warmup:
            positions.append(point.position)
            acceptance += move.acceptance / draws
            jump_acceptance += jumped / draws
            divergences += move.divergences
    has_jumps = jump is not None and jump.moves > 0
    return _Run(
        torch.stack(positions, 1),
        acceptance,
        kernel.step_size,
        divergences,
        jump_acceptance if has_jumps else None,
    )


def _nuts(target: Target, start: Tensor, draws: int, warmup: int, progress: bool) -> _Run:
    """Runs Pyro's sampler, one chain after the other."""
    positions, acceptances, step_sizes, divergences = [], [], [], 0
    bar = tqdm(
        total=len(start) * (warmup + draws), disable=not progress, desc="Sampling", leave=True
    )
    for x in start:
        kernel = NUTS(potential_fn=_potential(target))
        at = {"x": x}
        kernel.initial_params = at
        kernel.setup(warmup)
        of_chain = []
        for t in range(warmup + draws):
            at = kernel.sample(at)
            bar.update()
            if t >= warmup:
                of_chain.append(at["x"])
        found: dict[str, Any] = kernel.diagnostics()
        positions.append(torch.stack(of_chain))
        acceptances.append(found["acceptance rate"])
        step_sizes.append(float(kernel.step_size))
        divergences += len(found["divergences"])
    bar.close()
    chains = len(start)
    return _Run(
        torch.stack(positions), sum(acceptances) / chains, sum(step_sizes) / chains, divergences
    )


def _potential(target: Target) -> Callable[[dict[str, Tensor]], Tensor]:
    """The potential energy that Pyro asks for, whose gradient comes from the target."""

    def potential(at: dict[str, Tensor]) -> Tensor:
        x = at["x"]
        point = evaluate(target, x.detach().unsqueeze(0))
        # Linear in x with the slope of the target, so that torch differentiates nothing else.
        return -(point.log_density[0] + (point.slope[0] * (x - x.detach())).sum())

    return potential


def _start(target: Target, space: BaseSpace, chains: int) -> Point:
    """Draws of the guide at which the density is finite."""
    point = evaluate(target, space.base.sample((chains,)))
    for _ in range(START_TRIES):
        outside = ~point.log_density.isfinite()
        if not bool(outside.any()):
            return point
        point = choose(outside, evaluate(target, space.base.sample((chains,))), point)
    raise ValueError(
        "Expected a guide whose draws have a finite log density; too few of its draws have one."
    )


def _chains(density: LogDensity, transform: Map, run: _Run, clock: Deadline) -> Chains:
    with torch.no_grad():
        z, _ = transform.forward_and_log_det(run.positions.flatten(0, 1))
    shape = run.positions.shape
    return Chains(
        density=density,
        unconstrained=z.reshape(shape),
        log_density=density.log_prob(z).reshape(shape[:2]),
        acceptance=run.acceptance,
        step_size=run.step_size,
        divergences=run.divergences,
        jump_acceptance=run.jump_acceptance,
        seconds=clock.elapsed,
    )


def _check(posterior: Any, draws: Any, chains: Any, warmup: Any) -> None:
    check_posterior("posterior", posterior)
    check_size("draws", draws)
    check_size("chains", chains)
    check_size("warmup", warmup, least=0)
