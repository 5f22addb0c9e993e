"""Draws of a guide, weighted by how much denser the posterior is there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from pyro.ops.stats import weighed_quantile
from torch import Tensor

from ..report.arviz_bridge import psis

if TYPE_CHECKING:
    from ..guides.guide import Guide
    from ..model.density import LogDensity

__all__ = ["ImportanceSample", "ImportanceSummary", "draw_importance_sample", "resample"]

# Tail probability of a central 90 % interval.
TAIL = 0.05


@dataclass(frozen=True)
class ImportanceSummary:
    r"""The numbers that importance weights give.

    Attributes:
        draws: How many draws they rest on.
        khat: Shape of the Pareto tail of the weights; ``-inf`` where they have no tail.
        ess: Effective sample size of the smoothed weights, as a fraction of the draws.
        elbo: Evidence lower bound, the mean of :math:`\log w_i`.
        log_evidence: :math:`\log \tfrac{1}{N} \sum_i w_i`, with smoothed weights.
        log_evidence_error: Its Monte Carlo standard error.
    """

    draws: int
    khat: float
    ess: float
    elbo: float
    log_evidence: float
    log_evidence_error: float


class ImportanceSample:
    r"""Draws of a guide with importance weights, which are Pareto-smoothed once.

    Draws :math:`z_i \sim q` have weights :math:`w_i = p(z_i, \mathrm{data}) / q(z_i)`.

    Args:
        z: The unconstrained draws, of shape ``(draws, features)``.
        log_weights: Log joint less log guide, of shape ``(draws,)``; NaN and infinity count as zero
            density.

    Attributes:
        z: The draws.
        usable: Which draws are finite and have a density, of shape ``(draws,)``.
        log_weights: The raw log weights in double precision, ``-inf`` where a draw is not usable.

    Reference:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", 2024,
        https://arxiv.org/abs/1507.02646

    Example:
        >>> z = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> sample = ImportanceSample(z, torch.zeros(1000))
        >>> round(sample.ess, 3), sample.log_evidence
        (1.0, 0.0)
    """

    def __init__(self, z: Tensor, log_weights: Tensor) -> None:
        raw = log_weights.detach().to("cpu", torch.float64)
        self.z = z
        self.usable = raw.isfinite() & z.detach().isfinite().all(-1).cpu()
        self.log_weights = raw.masked_fill(~self.usable, -math.inf)

    def __len__(self) -> int:
        return len(self.log_weights)

    @property
    def empty(self) -> bool:
        """Whether no draw is usable."""
        return not bool(self.usable.any())

    @cached_property
    def _smoothed(self) -> tuple[Tensor, float]:
        if self.empty:
            return torch.full_like(self.log_weights, -math.log(len(self))), math.inf
        smoothed, khat = psis(self.log_weights.numpy())
        return torch.from_numpy(smoothed), khat

    @property
    def weights(self) -> Tensor:
        """The smoothed weights, of shape ``(draws,)``, which sum to one."""
        return self._smoothed[0].exp()

    @property
    def even_weights(self) -> Tensor:
        """Equal weights of the usable draws, or of all draws if there are none."""
        usable = (self.usable | self.empty).to(torch.float64)
        return usable / usable.sum()

    @property
    def khat(self) -> float:
        """Shape of the Pareto tail of the weights; above 0.7 they are unreliable."""
        return self._smoothed[1]

    @cached_property
    def ess(self) -> float:
        """Effective sample size of the smoothed weights, as a fraction of the draws."""
        return 0.0 if self.empty else float(1 / self.weights.square().sum()) / len(self)

    @property
    def elbo(self) -> float:
        r"""Evidence lower bound, the mean of :math:`\log w_i`."""
        return float(self.log_weights.mean())

    @cached_property
    def log_evidence(self) -> float:
        """Logarithm of the mean of the smoothed weights."""
        if self.empty:
            return -math.inf
        # PSIS smooths at most a fifth of the draws, and divides all of them by one constant. The
        # largest weight that it leaves alone shows the constant with the least rounding.
        rank = min(len(self) // 5, int(self.usable.sum()) - 1)
        index = int(self.log_weights.argsort(descending=True)[rank])
        constant = float(self.log_weights[index] - self._smoothed[0][index])
        return constant - math.log(len(self))

    @property
    def log_evidence_error(self) -> float:
        """Monte Carlo standard error of the log evidence, of the region that draws reach."""
        return math.sqrt(max(1 / self.ess - 1, 0.0) / len(self)) if self.ess > 0 else math.inf

    @property
    def zero_share(self) -> float:
        """Share of the draws that have no density under the model."""
        return 1 - float(self.usable.double().mean())

    @property
    def smoothed_away(self) -> float:
        """Share of the raw weights that smoothing takes away, from the few largest of them."""
        raw = float(self.log_weights.logsumexp(0)) - math.log(len(self))
        return 1 - math.exp(min(self.log_evidence - raw, 0.0))

    @cached_property
    def shifts(self) -> Tensor:
        """How far weights move each mean, and each central 90 % width in logarithms.

        Returns:
            The larger of the two for each entry, of shape ``(features,)``, in standard deviations.
        """
        z = self.z.detach().to("cpu", torch.float64)[self.usable]
        weights = self.weights[self.usable]
        moved = (weights @ z - z.mean(0)).abs() / z.std(0)
        # A standard deviation under heavy tails depends on a few draws; quantiles do not.
        widened = (_width(z, weights) / _width(z, torch.ones_like(weights))).log().abs()
        return torch.maximum(moved, widened)

    def heaviest(self, count: int = 8) -> Tensor:
        """Returns the usable draws of greatest weight, of shape ``(count, features)``, or fewer."""
        order = self.log_weights.argsort(descending=True)[: min(count, int(self.usable.sum()))]
        return self.z[order.to(self.z.device)]

    def summary(self) -> ImportanceSummary:
        """Returns the numbers without the draws."""
        return ImportanceSummary(
            draws=len(self),
            khat=self.khat,
            ess=self.ess,
            elbo=self.elbo,
            log_evidence=self.log_evidence,
            log_evidence_error=self.log_evidence_error,
        )


def draw_importance_sample(guide: Guide, density: LogDensity, draws: int) -> ImportanceSample:
    """Draws from a guide and weighs the draws.

    Args:
        guide: The guide.
        density: The log density.
        draws: How many draws; they come from torch's random state.

    Returns:
        The weighted draws.
    """
    return ImportanceSample(*guide.sample_and_weigh(density, draws))


def resample(z: Tensor, weights: Tensor, n: int) -> Tensor:
    """Resamples draws systematically, in random order: each ``n w_i`` times, rounded up or down.

    Args:
        z: Draws of shape ``(draws, features)``.
        weights: Their weights, of shape ``(draws,)``, which sum to one.
        n: How many to take.

    Returns:
        Tensor of shape ``(n, features)``.
    """
    offset = torch.rand((), dtype=weights.dtype, device=weights.device)
    order = torch.randperm(n, device=weights.device)
    positions = (torch.arange(n, dtype=weights.dtype, device=weights.device) + offset) / n
    index = torch.searchsorted(weights.cumsum(0), positions).clamp(max=len(weights) - 1)
    return z[index[order].to(z.device)]


def _width(z: Tensor, weights: Tensor) -> Tensor:
    levels = z.new_tensor([TAIL, 1 - TAIL])
    low, high = weighed_quantile(z, levels, weights.log(), dim=0)
    return high - low
