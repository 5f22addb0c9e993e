"""Nearly normal locals whose mean and precision are regressed on the globals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions.sparse_normal import SparseNormal
from .marginal import Marginal
from .warm_reference import FARTHEST, WarmReference

__all__ = ["NormalLocals", "RegressedLocals", "regress_precision"]

# Newton steps given globals further from the mode than the regression reaches.
STEPS = 2


class NormalLocals(NamedTuple):
    """The normal distribution of locals given some values of the globals.

    Attributes:
        mean: Of shape ``(n, locals)``.
        normal: The distribution about that mean.
    """

    mean: Tensor
    normal: SparseNormal

    def sample(self, noise: Tensor) -> Tensor:
        """Draws of the locals, of shape ``(n, locals)``, made of standard normal noise."""
        return self.mean + self.normal.draw_centred(noise)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log density at locals of shape ``(n, locals)``."""
        return self.normal.log_prob(x, self.mean)


class RegressedLocals:
    r"""The locals given globals, by a regression of their mean and precision on the globals.

    .. math:: x \mid g \sim \mathcal N\bigl(a + B u,\; (P_0 + P(u))^{-1}\bigr),
        \quad u = L^{-1} (g - g^*)

    with :math:`P` linear. Where many rows of data speak of each local, its distribution given the
    globals is nearly normal, and bends so little that a step of Newton's method is not needed: a
    draw costs no evaluation of the model, and a value of the globals' log density,

    .. math:: \log p(g) \approx \log p(a + B u, g) - \log \mathcal N(a + B u),

    one without derivatives. Further than three whitened units from the mode, steps are taken.

    Args:
        marginal: The log density of the globals.
        warm: The mean of the locals.
        precisions: The values of :math:`P_0`, and of the change of the precision with each of the
            whitened globals, of shape ``(1 + globals, entries)``.
    """

    def __init__(self, marginal: Marginal, warm: WarmReference, precisions: Tensor) -> None:
        self.marginal, self.warm, self.precisions = marginal, warm, precisions

    def condition(self, g: Tensor) -> NormalLocals:
        """The locals given globals of shape ``(n, globals)``."""
        u = self.warm.whiten(g).clamp(-FARTHEST, FARTHEST)
        constant, slopes = self.precisions[0].to(g), self.precisions[1:].to(g)
        precision = constant + u @ slopes
        normal = SparseNormal(self.marginal.elimination, precision, repaired=True)
        return NormalLocals(self.warm(g), normal)

    @torch.no_grad()
    def log_prob(self, g: Tensor) -> Tensor:
        """The log density of globals of shape ``(n, globals)``; ``-inf`` where the model fails."""
        far = self.warm.whiten(g).abs().amax(-1) > FARTHEST
        values = g.new_empty(len(g))
        if far.any():
            values[far] = self.marginal.log_prob(g[far], self.warm(g[far]), STEPS)
        values[~far] = self._log_prob_near(g[~far])
        return values

    def _log_prob_near(self, g: Tensor) -> Tensor:
        found = [g.new_zeros(0)]
        for few in g.split(self.marginal.density.batch_size):
            given = self.condition(few)
            value = self.marginal.log_joint(few, given.mean) - given.log_prob(given.mean)
            found.append(value.where(value.isfinite(), -torch.inf))
        return torch.cat(found)


def regress_precision(marginal: Marginal, warm: WarmReference) -> Tensor:
    """Regresses the precision of the locals, at their mean, on the globals.

    The design has the mode, and a whitened unit to both sides along each axis.

    Args:
        marginal: The log density of the globals.
        warm: The mean of the locals.

    Returns:
        The constant and the slopes, of shape ``(1 + globals, entries)``.
    """
    units = torch.eye(len(warm.loc)).to(warm.root)
    g = warm.loc + torch.cat([0 * units[:1], units, -units]) @ warm.root.mT
    values = marginal.precision(g, warm(g))
    up, down = values[1:].chunk(2)
    return torch.cat([values.mean(0, keepdim=True), (up - down) / 2])
