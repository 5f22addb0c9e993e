"""A census of the modes that locals have given the globals of a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..guides.marginal import Conditional, Marginal
from ..guides.marginal_mode import find_marginal_mode
from ..model import prediction as simulate
from .census import has_missed

if TYPE_CHECKING:
    from ..guides import AutoStructuredFlow

__all__ = ["missed_locals"]

# Globals of the guide, and as many draws of the prior.
POINTS = 8
# Newton steps from a start, and the gain of one more that tells that they have not ended.
STEPS, UNSETTLED = 12, 0.1
# Another mode nearer by is seen by weights or by quadrature; in standard deviations.
FAR = 4.0
MOST_BLOCKS, MOST_ASCENTS = 32, 3


class _Others(NamedTuple):
    """Where Newton's method ends from several starts, and from the guide's, given globals."""

    g: Tensor
    own: Tensor
    own_value: Tensor
    other: Tensor
    other_value: Tensor
    # Which blocks have another mode there, of shape ``(n, blocks)``.
    far: Tensor


@torch.no_grad()
def missed_locals(guide: AutoStructuredFlow, g: Tensor, log_evidence: float) -> float:
    r"""Estimates the mass that a guide misses at other modes of the locals.

    A normal distribution of the locals has one mode. Given globals of the guide and of the prior,
    Newton's method begins at draws of the prior and at mirror images of the guide's mode. Where a
    block of locals ends far from its mode in the guide, it has another, and the mass is compared by
    Laplace's approximation: given globals of the guide at once, and given others at the marginal
    mode above them.

    Args:
        guide: The guide.
        g: Draws of its globals, of shape ``(n, globals)``.
        log_evidence: Its estimate of the log evidence.

    Returns:
        The mass, relative to the evidence.
    """
    marginal = guide.marginal
    if not len(marginal.reference):
        return 0.0
    g = g[:POINTS].double()
    own = marginal.evaluate(g, guide.reference)[1]
    near, elsewhere = [(g, -own)], [(-g, -own)]
    prior = _prior_points(marginal)
    if prior is not None:
        prior_g, prior_x = prior
        count = min(len(g), len(prior_x))
        near.append((g[:count], prior_x[:count]))
        elsewhere += [prior, (prior_g, _level(marginal, prior_x))]
    given = _find_others(guide, *map(torch.cat, zip(*near, strict=True)))
    apart = _find_others(guide, *map(torch.cat, zip(*elsewhere, strict=True)))
    return max(_missed_near(marginal, given), _missed_elsewhere(guide, apart, log_evidence))


def _level(marginal: Marginal, x: Tensor) -> Tensor:
    """The means of locals over their sites: groups that are alike may change their mode only
    together."""
    sizes = torch.tensor([site.features for site in marginal.density.sites])
    site_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[marginal.structure.locals]
    site_of = site_of.to(x.device)
    sums = x.new_zeros(len(x), len(sizes)).index_add_(-1, site_of, x)
    counts = torch.bincount(site_of, minlength=len(sizes)).clamp_min(1)
    return (sums / counts)[:, site_of]


def _prior_points(marginal: Marginal) -> tuple[Tensor, Tensor] | None:
    """Globals and locals drawn from the prior; ``None`` where it is improper."""
    prior = simulate.prior_draws(marginal.density, POINTS)
    if not prior:
        return None
    structure = marginal.structure
    w = structure.coordinates.to_sums(marginal.density.unconstrain(prior).double())
    w = w[w.isfinite().all(-1)]
    return w[:, structure.globals], w[:, structure.locals]


def _find_others(guide: AutoStructuredFlow, g: Tensor, start: Tensor) -> _Others:
    """Compares the modes that are found from the starts with the guide's."""
    marginal = guide.marginal
    size = marginal.density.batch_size
    parts = []
    for few, begin in zip(g.split(size), start.split(size), strict=True):
        own = marginal.condition(few, guide.reference.expand_as(begin), STEPS)
        other = marginal.condition(few, begin, STEPS)
        far = _distances(marginal, own, other.mean) > FAR
        settled = _settled(own) & _settled(other)
        far &= settled.unsqueeze(-1)
        parts.append((few, own.mean, own.log_marginal, other.mean, other.log_marginal, far))
    return _Others(*map(torch.cat, zip(*parts, strict=True)))


def _settled(given: Conditional) -> Tensor:
    return given.log_marginal.isfinite() & (given.gain.abs() < UNSETTLED)


def _distances(marginal: Marginal, given: Conditional, x: Tensor) -> Tensor:
    """How far the blocks of locals are from their mean, in standard deviations, of shape
    ``(n, blocks)``."""
    squares = given.normal.whiten(x - given.mean).square()
    blocks = marginal.structure.blocks.to(squares.device)
    sums = squares.new_zeros(len(x), len(marginal.structure.block_sizes))
    return sums.index_add_(-1, blocks, squares).sqrt()


def _missed_near(marginal: Marginal, others: _Others) -> float:
    """The mass of other modes of single blocks, given globals of the guide."""
    found = others.far.any(0).nonzero().squeeze(-1)
    if not len(found):
        return 0.0
    chosen = found[:MOST_BLOCKS]
    point = others.far[:, chosen].int().argmax(0)
    moved = marginal.structure.blocks.to(chosen.device) == chosen.unsqueeze(-1)
    x = others.other[point].where(moved, others.own[point])
    values = marginal.evaluate(others.g[point], x)[0]
    ratios = (values - others.own_value[point]).exp().nan_to_num(0.0)
    return float(ratios.sum()) * len(found) / len(chosen)


def _missed_elsewhere(guide: AutoStructuredFlow, others: _Others, log_evidence: float) -> float:
    """The mass about other marginal modes, whose locals lie where the guide has none."""
    beyond = others.other_value.where(others.far.any(-1), -torch.inf)
    order = beyond.argsort(descending=True)[: int(beyond.isfinite().sum())]
    mass = 0.0
    for index in order[:MOST_ASCENTS].tolist():
        mass = max(mass, _mass_above(guide, others.g[index], others.other[index], log_evidence))
    return mass


def _mass_above(guide: AutoStructuredFlow, g: Tensor, x: Tensor, log_evidence: float) -> float:
    """The mass about the marginal mode above globals, if the guide does not lie there."""
    integrated, marginal = guide.leaves or guide.marginal, guide.marginal
    mode = find_marginal_mode(integrated, start=g, reference=x)
    if not mode.found:
        return 0.0
    loc = mode.loc.unsqueeze(0)
    value = integrated.evaluate(loc, mode.reference)[0]
    own = marginal.condition(loc, guide.reference.unsqueeze(0), STEPS)
    far = _distances(marginal, own, mode.reference.unsqueeze(0)) > FAR
    beyond = has_missed(value, guide.flow().log_prob(loc.to(guide.reference)), log_evidence)
    if not (far.any() or beyond.any()):
        return 0.0
    width = torch.linalg.slogdet(mode.root)[1] + 0.5 * len(g) * math.log(2 * math.pi)
    return float((value + width - log_evidence).exp().nan_to_num(0.0))
