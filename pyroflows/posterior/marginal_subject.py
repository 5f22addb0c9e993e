"""The globals of a structured guide before their judges, by the values of their density alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._deadline import TimeOver
from ..flows import Flow
from ..guides.guide import Guide
from ..guides.marginal import Marginal
from ..model.base import Density
from ..sampling.polishing import autocorrelation
from ..sampling.transitions import surrogate_transitions
from .census import has_missed
from .importance import ImportanceSample, resample
from .marginal_census import missed_globals
from .subject import ENOUGH, Subject, describe_values, entry_names, gained

__all__ = ["FlowOfGlobals", "GlobalDensity", "MarginalSubject"]

# Draws that are weighed; chains, and their rounds, of which each costs a value a chain. One round
# by a good surrogate forgets the start, so that more chains are worth more than more rounds.
DRAWS, CHAINS, ROUNDS = 1000, 800, 2
# How often chains go on that find more, or that remember their starts by such a correlation.
LONGER, REMEMBERED = 2, 0.3


class GlobalDensity:
    """The density of a model's globals, as :class:`MarginalSubject` reads it.

    Args:
        marginal: The marginal density of the globals.
        log_prob: Its values, from double points of shape ``(n, features)`` to ``(n,)``; those of
            the marginal by default.

    Attributes:
        features: How many globals there are.
        entry_names: Their names, such as ``theta[0]``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows.model import LogDensity
        >>> from pyroflows.model.structure import find_structure
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("groups", 5):
        ...         effect = pyro.sample("effect", dist.Normal(0.0, scale))
        ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=y)
        >>> density = LogDensity(model, (torch.arange(5.0),))
        >>> globals_ = GlobalDensity(Marginal(density, find_structure(density)))
        >>> globals_.entry_names, globals_.describe(torch.zeros(1))
        (['scale'], 'near scale = 1')
    """

    def __init__(
        self, marginal: Marginal, log_prob: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.marginal, self.features = marginal, marginal.features
        self._log_prob = log_prob or marginal.log_prob
        density, entries = marginal.density, marginal.structure.globals
        names = entry_names(density)
        self.entry_names = [names[int(entry)] for entry in entries]
        owners = [site.name for site in density.sites for _ in range(site.features)]
        self._sites = {owners[int(entry)] for entry in entries}

    def log_prob(self, g: Tensor) -> Tensor:
        """The log density of globals of shape ``(*, features)``, in double precision."""
        return self._log_prob(g.double())

    def describe(self, g: Tensor) -> str:
        """Returns globals of shape ``(features,)`` in words: the values of their first sites."""
        reference = self.marginal.reference.unsqueeze(0)
        z = self.marginal.join(g.to(reference).unsqueeze(0), reference)[0]
        values = self.marginal.density.constrain(z.to(self.marginal.density.initial))
        return describe_values({name: values[name] for name in values if name in self._sites})


class FlowOfGlobals(Guide):
    """The flow of a structured guide, as a guide of the globals alone.

    Args:
        flow: The flow.
        features: How many globals there are.
    """

    def __init__(self, flow: Flow, features: int) -> None:
        self.flow, self.features = flow, features

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws globals and scores them; see :meth:`Guide.sample_and_log_prob`."""
        return self.flow().rsample_and_log_prob((n,))

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores globals, in the dtype of the flow; see :meth:`Guide.log_prob`."""
        like = next(self.flow.parameters())
        return self.flow().log_prob(z.to(like)).to(z)


@dataclass(eq=False)
class MarginalSubject(Subject):
    r"""A guide of a model's globals, whose density has dear values and no gradient.

    All checks of :data:`pyroflows.posterior.checks.CHECKS` can be made on it. In the place of
    Hamiltonian trajectories of the density some hundreds of chains go on by
    :func:`pyroflows.sampling.transitions.surrogate_transitions`, and each value is asked for once:
    with :math:`n` draws, :math:`m` chains and :math:`r` rounds the checks cost :math:`n + m r`
    values, beside those of the census, and up to :math:`2 m r` more each where chains leave the
    guide and where the surrogate is so bad that they hardly move.

    Args:
        guide: The guide of the globals.
        density: Their density: a :class:`GlobalDensity`, or an object with its methods.
        census: A census of the modes, by
            :func:`pyroflows.posterior.marginal_census.take_marginal_census`.
        trajectories: Zero, because the draws of globals are not polished.
        remedy: As in :class:`Subject`.
        draws: How many draws of the guide are weighed.
        block: The name of the block.
        surrogate: A density near that of the globals, which has cheap gradients.
        chains: How many chains.
        rounds: How many rounds they take.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> density = pf.model.LogDensity(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> guide = pf.AutoFlow(density.model)
        >>> density.introduce(guide)
        >>> subject = MarginalSubject(guide, density, surrogate=density)
        >>> subject.moved.shape, subject.block
        (torch.Size([800, 1]), 'globals')
    """

    movers = rovers = "Metropolis chains of the globals"

    density: Any = None
    draws: int = DRAWS
    block: str | None = "globals"
    surrogate: Density = field(kw_only=True)
    chains: int = field(default=CHAINS, kw_only=True)
    rounds: int = field(default=ROUNDS, kw_only=True)
    _visited: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def entry_names(self) -> list[str]:
        """Names of the globals."""
        return list(self._density.entry_names)

    @cached_property
    @torch.no_grad()
    def sample(self) -> ImportanceSample:
        """Weighted draws of the guide; their weights are those of the globals alone."""
        z, log_q = self._guide.sample_and_log_prob(self.draws)
        return ImportanceSample(z, self._density.log_prob(z) - log_q)

    @cached_property
    def missed(self) -> Tensor:
        """Mass that the guide misses at each fit of the census, relative to the evidence."""
        log_prob, log_q = self._density.log_prob, self._guide.log_prob
        return missed_globals(log_prob, log_q, self.sample.log_evidence, self.fits)

    @cached_property
    @torch.no_grad()
    def starts(self) -> Tensor:
        """Draws from which chains start, corrected by their weights."""
        z = self.sample.z.double()
        log_p = self.sample.log_weights.to(z) + self._guide.log_prob(z)
        chosen = resample(torch.cat([z, log_p.unsqueeze(-1)], -1), self._start_weights, self.chains)
        return self._visit(chosen[:, :-1], chosen[:, -1])

    @property
    def effective_starts(self) -> float:
        """Effective number of independent draws among the starts, of which some are the same."""
        counts = self.starts.unique(dim=0, return_counts=True)[1]
        return self.chains**2 / float(counts.square().sum())

    @cached_property
    def moved(self) -> Tensor:
        """The starts after the rounds, and after more of them as long as they are remembered and
        there is time."""
        z = self._go_on(self.starts)
        with contextlib.suppress(TimeOver):
            for _ in range(LONGER):
                if float(autocorrelation(self.starts, z).amax()) < REMEMBERED:
                    break
                z = self._go_on(z)
        return z

    @property
    def roamers(self) -> Tensor:
        """The starts: chains that leave them leave the guide."""
        return self.starts

    @cached_property
    def roamed(self) -> Tensor:
        """The chains after all rounds, and after more of them as long as they find more and there
        is time."""
        z, gain = self.moved, -math.inf
        with contextlib.suppress(TimeOver):
            for _ in range(LONGER):
                before, gain = gain, gained(self.lies_beyond(self.starts), self.lies_beyond(z))
                if not (before < gain and 0.0 < gain < ENOUGH):
                    break
                z = self._go_on(z)
        return z

    def lies_beyond(self, z: Tensor) -> Tensor:
        """Tells which of some globals lie where the guide has next to no density.

        Args:
            z: Globals of shape ``(n, features)``.
        """
        with torch.no_grad():
            log_q = self._guide.log_prob(z)
        return has_missed(self._log_prob(z), log_q, self.sample.log_evidence)

    @property
    def forbidden(self) -> str:
        """Globals that the model gives no density, in words."""
        unusable = ~self.sample.usable.to(self.sample.z.device)
        z = self.sample.z[unusable & self.sample.z.isfinite().all(-1)]
        return f", such as one {self.describe(z[0])}" if len(z) else ""

    def describe(self, z: Tensor) -> str:
        """Returns globals in words."""
        return str(self._density.describe(z))

    @property
    def _density(self) -> Any:
        return self.density

    def _go_on(self, z: Tensor) -> Tensor:
        """Chains after the rounds."""
        given = self._log_prob(z)
        after = surrogate_transitions(self._density.log_prob, self.surrogate, z, self.rounds, given)
        return self._visit(after.positions[-1], after.log_density[-1])

    def _visit(self, z: Tensor, log_density: Tensor) -> Tensor:
        self._visited.append((z, log_density))
        return z

    def _log_prob(self, z: Tensor) -> Tensor:
        """The log density, which is known where chains have been."""
        for points, values in self._visited:
            if points is z:
                return values
        return self._density.log_prob(z)
