"""The training of a flow on a log density whose values are dear and whose gradient is not known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..distributions.quadrature import quasi_normal
from ..flows import Flow
from ..guides.marginal_mode import MarginalMode
from ..guides.surrogate import PolynomialDensity, count_terms

__all__ = ["MarginalFit"]

# Points of the first design, at least and for each coefficient of the polynomial, and how much
# wider than the normal approximation they lie.
LEAST_POINTS, POINTS_PER_TERM, WIDER = 256, 2, 1.3
# One point in four lies further out by this factor, for the tails.
FURTHER = 2.0
# Draws of the flow by which it is looked at, and the share of effective ones that will do.
DRAWS, GOOD = 256, 0.95
# From that share on of the normal distribution, as the polynomial says, nothing is to be trained.
EXACT = 0.995
#: How often the polynomial is found anew, by the draws of the flow too.
ROUNDS = 3


class MarginalFit:
    r"""Trains flows on a polynomial through the values of a log density.

    The first values are those at quasi-random points of a normal distribution 1.3 times as wide as
    the normal approximation at the mode. A flow that is trained on the polynomial is drawn from;
    the values at its draws give weights :math:`p / q`, and join the others, until most draws are
    effective. A training costs some five hundred to two thousand values, and no gradient.

    Args:
        log_prob: The log density of points of shape ``(n, features)``, in double precision.
        mode: Its mode.
        like: A tensor of the dtype and on the device of the flow.

    Attributes:
        surrogate: The polynomial.
        trained: Whether a flow has been trained, or found to need no training.

    Example:
        >>> import pyroflows as pf
        >>> mode = MarginalMode(torch.zeros(2), torch.eye(2), torch.zeros(0), 1, True)
        >>> fit = MarginalFit(lambda g: -g.square().sum(-1) / 2, mode, torch.zeros(()))
        >>> fit.error < 1e-6
        True
    """

    def __init__(
        self, log_prob: Callable[[Tensor], Tensor], mode: MarginalMode, like: Tensor
    ) -> None:
        self.log_prob, self.like = log_prob, like
        self.trained = False
        self.surrogate = PolynomialDensity(mode.loc.to(like), mode.root.to(like))
        features = self.surrogate.features
        count = max(LEAST_POINTS, POINTS_PER_TERM * count_terms(features))
        noise = quasi_normal(count, features)
        noise[::4] *= FURTHER
        self.points = self.surrogate.unwhiten(WIDER * noise)
        self.values = log_prob(self.points)
        self.error = self.surrogate.fit(self.points, self.values)

    def train(
        self, flow: Flow, train: Callable[[PolynomialDensity, float], int], good: float = GOOD
    ) -> int:
        """Trains a flow, and finds the polynomial anew as long as that is of use.

        At first the flow takes the mean and the covariance of the polynomial. If it is as near then
        as training takes it, it is trained in the next call only.

        Args:
            flow: The flow.
            train: Trains it on a density, with its step sizes multiplied by a number, and returns
                how many steps it took.
            good: The share of effective draws at which the flow is good enough; with 1 all rounds
                are made, because so few draws do not tell how far a thin tail goes.

        Returns:
            How many steps were taken.
        """
        if self._starts_well(flow):
            return 0
        taken = train(self.surrogate, 1.0)
        for number in range(1, ROUNDS):
            if self._add_draws(flow) > good:
                break
            taken += train(self.surrogate, 1.0 / (1 + number))
        return taken

    @torch.no_grad()
    def _starts_well(self, flow: Flow) -> bool:
        """Whether a flow is fresh, and near by the polynomial's mean and covariance alone."""
        if self.trained:
            return False
        self.trained = True
        loc, root, share = self.surrogate.find_normal()
        if share < EXACT:
            return False
        flow.whiten(loc.to(self.like), root.to(self.like))
        return True

    @torch.no_grad()
    def _add_draws(self, flow: Flow) -> float:
        """Finds the polynomial anew with draws of a flow, and returns the share of effective ones
        among them."""
        g, log_q = flow().rsample_and_log_prob((DRAWS,))
        values = self.log_prob(g.double())
        log_weights = (values - log_q).nan_to_num(nan=-torch.inf)
        self.points = torch.cat([self.points, g.double()])
        self.values = torch.cat([self.values, values])
        self.error = self.surrogate.fit(self.points, self.values)
        share = 1 / log_weights.softmax(0).square().sum() / DRAWS
        return float(share.nan_to_num(0.0))
