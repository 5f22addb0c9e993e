"""Likelihoods of the globals with the locals integrated out, for the models of
:mod:`benchmarks.scale_models` that have them in closed form or by quadrature.

Each takes the values of the globals by site, of shape ``(n, *shape)``, and the arguments of the
model, all in double precision, and returns ``log p(y | globals)`` of shape ``(n,)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.scale_models import matern

Values = dict[str, Tensor]

CLOSED_FORMS: dict[str, Callable[..., Tensor]] = {}

LOG_TWO_PI = math.log(2 * math.pi)
# Nodes of Gauss and Hermite, draws of Laplace's approximation, and steps to the mode about which
# they are set.
NODES, PAIRS, STEPS = 15, 384, 8
# Of Laplace's approximation: the most steps, the longest, and the one with which they end.
MOST_STEPS, LONGEST, SETTLED = 50, 2.0, 1e-6
# Steps from the mode to the mean.
TO_MEAN = 2


def _closed_form(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    CLOSED_FORMS[function.__name__] = function
    return function


class Message(NamedTuple):
    r"""What data say of some normal variables: :math:`\exp(c + hx - Px^2/2)` of each.

    Attributes:
        constant: c, of shape ``(n, variables)``.
        linear: h, of the same shape.
        precision: P, of the same shape.
    """

    constant: Tensor
    linear: Tensor
    precision: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The sum over the variables at values that broadcast against them, of shape ``(n,)``."""
        terms = self.constant + self.linear * x - 0.5 * self.precision * x.square()
        return terms.sum(-1)

    def integrate(self, scale: Tensor) -> Message:
        """What the data say of the means of variables of a standard deviation of shape ``(n,)``."""
        variance = scale.square().unsqueeze(-1)
        shrink = 1 / (1 + self.precision * variance)
        gain = 0.5 * (shrink.log() + self.linear.square() * variance * shrink)
        return Message(self.constant + gain, self.linear * shrink, self.precision * shrink)

    def gather(self, parent: Tensor, count: int) -> Message:
        """The sums over the children of each of `count` parents; `parent` has one of each child."""
        return Message(*(_sum_by(values, parent, count) for values in self))


def _sum_by(values: Tensor, group: Tensor, count: int) -> Tensor:
    zeros = values.new_zeros(*values.shape[:-1], count)
    return zeros.index_add(-1, group, values)


def observe(y: Tensor, noise: Tensor) -> Message:
    """What rows say of their means.

    Args:
        y: Rows of shape ``(variables, rows)``.
        noise: Standard deviations that broadcast against ``(n, variables)``.
    """
    precision = noise.square().reciprocal()
    count = y.shape[1]
    squares = y.square().sum(1) * precision + count * (LOG_TWO_PI - precision.log())
    precision = precision.expand_as(squares)
    return Message(-0.5 * squares, y.sum(1) * precision, count * precision)


# Groups


@_closed_form
def eight_schools(values: Values, y: Tensor, error: Tensor) -> Tensor:
    """Schools integrated out."""
    schools = observe(y[:, None], error.unsqueeze(0))
    return schools.integrate(values["between"])(values["mean"].unsqueeze(-1))


@_closed_form
def funnel(values: Values, y: Tensor) -> Tensor:
    """Groups integrated out."""
    scale = (values["log_variance"] / 2).exp()
    return observe(y[:, None], y.new_ones(1, 1)).integrate(scale)(y.new_zeros(1))


@_closed_form
def groups(values: Values, y: Tensor) -> Tensor:
    """Groups integrated out."""
    rows = observe(y, values["within"].unsqueeze(-1))
    return rows.integrate(values["between"])(values["mean"].unsqueeze(-1))


@_closed_form
def schools(values: Values, school_of: Tensor, class_of: Tensor, y: Tensor) -> Tensor:
    """Pupils, then classes, then schools integrated out."""
    tests = observe(y.mT, values["within"].unsqueeze(-1))
    pupils = tests.integrate(values["between_pupils"])
    classes = pupils.gather(class_of, len(school_of)).integrate(values["between_classes"])
    count = len(school_of) // 4
    of_schools = classes.gather(school_of, count).integrate(values["between_schools"])
    return of_schools(values["mean"].unsqueeze(-1))


@_closed_form
def slopes(values: Values, county: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Lines integrated out, from the sums of each county."""
    count = int(county.max()) + 1
    design = torch.stack([torch.ones_like(x), x], -1)
    outer = (design.unsqueeze(-1) * design.unsqueeze(-2)).flatten(1)
    squares = _sum_by(outer.mT, county, count).mT.reshape(count, 2, 2)
    products = _sum_by((design * y.unsqueeze(-1)).mT, county, count).mT
    precision = values["noise"].square().reciprocal()
    root = values["scale"].unsqueeze(-1) * values["correlation"]
    prior = torch.cholesky_inverse(root).unsqueeze(1)
    mean = values["mean"][:, None, :, None]
    matrix = prior + precision[:, None, None, None] * squares
    vector = prior @ mean + (precision[:, None, None] * products).unsqueeze(-1)
    solved = torch.linalg.solve(matrix, vector)
    forms = (vector * solved).sum((-1, -2)) - (mean * (prior @ mean)).sum((-1, -2))
    log_dets = matrix.logdet() - prior.logdet()
    rows = len(y) * (LOG_TWO_PI - precision.log()) + y.square().sum() * precision
    return 0.5 * ((forms - log_dets).sum(-1) - rows)


@_closed_form
def crossed(values: Values, row: Tensor, column: Tensor, y: Tensor) -> Tensor:
    """Rows, then columns integrated out."""
    rows, columns = int(row.max()) + 1, int(column.max()) + 1
    table = y.new_zeros(rows, columns).index_put((row, column), torch.ones_like(y))
    precision = values["noise"].square().reciprocal().unsqueeze(-1)
    a, b = (values[name].square().reciprocal() for name in ("of_rows", "of_columns"))
    rest = y - values["mean"].unsqueeze(-1)
    linear_a, linear_b = (_sum_by(precision * rest, *by) for by in ((row, rows), (column, columns)))
    diagonal = a.unsqueeze(-1) + precision * table.sum(1)
    coupling = precision.unsqueeze(-1) * table
    share = coupling / diagonal.unsqueeze(-1)
    core = (b.unsqueeze(-1) + precision * table.sum(0)).diag_embed() - coupling.mT @ share
    vector = linear_b - (share.mT @ linear_a.unsqueeze(-1)).squeeze(-1)
    root = torch.linalg.cholesky(core)
    solved = torch.cholesky_solve(vector.unsqueeze(-1), root).squeeze(-1)
    forms = (linear_a.square() / diagonal).sum(-1) + (vector * solved).sum(-1)
    log_dets = diagonal.log().sum(-1) + 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_dets = log_dets - rows * a.log() - columns * b.log()
    squares = (precision * rest.square()).sum(-1) + len(y) * (LOG_TWO_PI - precision.log())[:, 0]
    return 0.5 * (forms - log_dets - squares)


# Series


@_closed_form
def level_increments(values: Values, y: Tensor) -> Tensor:
    """The level integrated out by a Kalman filter."""
    step, noise = values["step"].square(), values["noise"].square()
    mean, variance, total = torch.zeros_like(step), torch.zeros_like(step), torch.zeros_like(step)
    for value in y:
        variance = variance + step
        spread, error = variance + noise, value - mean
        total = total - 0.5 * (error.square() / spread + spread.log() + LOG_TWO_PI)
        gain = variance / spread
        mean, variance = mean + gain * error, variance * (1 - gain)
    return total


CLOSED_FORMS["level_states"] = level_increments


@_closed_form
def ar2(values: Values, y: Tensor) -> Tensor:
    """The series integrated out by a Kalman filter; its state is the last two values."""
    first, second = values["first"], values["second"]
    step, noise = values["step"].square(), values["noise"].square()
    rows = [torch.stack([first, second], -1), first.new_tensor([1.0, 0.0]).expand(len(first), 2)]
    move = torch.stack(rows, -2)
    added = F.pad(step[:, None, None], (0, 1, 0, 1))
    mean = y.new_zeros(len(first), 2, 1)
    covariance = torch.eye(2).to(y).expand(len(first), 2, 2)
    total = torch.zeros_like(first)
    # The first two values are independent, so they are the state after the second time.
    for time, value in enumerate(y):
        seen = 1 if time == 0 else 0
        if time > 1:
            mean, covariance = move @ mean, move @ covariance @ move.mT + added
        spread = covariance[:, seen, seen] + noise
        error = value - mean[:, seen, 0]
        total = total - 0.5 * (error.square() / spread + spread.log() + LOG_TWO_PI)
        gain = covariance[:, :, seen, None] / spread[:, None, None]
        mean = mean + gain * error[:, None, None]
        covariance = covariance - gain @ covariance[:, None, seen]
    return total


# Latent Gaussian models


def latent_gaussian(
    mean: Tensor, precision: Tensor, log_likelihood: Callable[[Tensor], Tensor]
) -> Tensor:
    """Integrates normal variables out by weighted draws of Laplace's approximation, which is moved
    from the mode to the mean.

    The draws are the same each time, so that their error does not average out over the globals.

    Args:
        mean: The mean of the variables, of shape ``(d,)``.
        precision: Their precision, of shape ``(d, d)``.
        log_likelihood: The likelihood of each, from ``(*, d)`` to ``(*, d)``.

    Returns:
        A scalar.
    """
    with torch.no_grad():
        mode = mean
        for _ in range(MOST_STEPS):
            slope, bend = _differentiate(log_likelihood, mode)
            root = torch.linalg.cholesky(precision + bend.clamp_min(0).diag())
            rise = slope - precision @ (mode - mean)
            move = torch.cholesky_solve(rise.unsqueeze(-1), root).squeeze(-1)
            # A rate that is far too small would send its logarithm far too high.
            length = move.abs().amax()
            mode = mode + move / (length / LONGEST).clamp_min(1.0)
            if length < SETTLED:
                break
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(PAIRS, len(mean), generator=generator, dtype=torch.float64)
        moves = torch.linalg.solve_triangular(root.mT, noise.mT, upper=True).mT
        centre = mode
        for _ in range(TO_MEAN):
            slope = _differentiate(log_likelihood, torch.cat([centre + moves, centre - moves]))[0]
            rise = slope.mean(0) - precision @ (centre - mean)
            centre = centre + torch.cholesky_solve(rise.unsqueeze(-1), root).squeeze(-1)
        draws = torch.cat([centre + moves, centre - moves])
        log_q = root.diagonal().log().sum() - 0.5 * noise.square().sum(-1).repeat(2)
    errors = draws - mean
    log_p = 0.5 * (precision.logdet() - ((errors @ precision) * errors).sum(-1))
    log_weights = log_p + log_likelihood(draws).sum(-1) - log_q
    return log_weights.logsumexp(0) - math.log(2 * PAIRS)


def _differentiate(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative, and the second derivative with its sign changed, of each entry."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x)
    return slope.detach(), -bend


def _poisson(y: Tensor, log_exposure: Tensor) -> Callable[[Tensor], Tensor]:
    constant = torch.lgamma(y + 1)

    def log_likelihood(x: Tensor) -> Tensor:
        log_rate = log_exposure + x
        return y * log_rate - log_rate.exp() - constant

    return log_likelihood


@_closed_form
def volatility(values: Values, y: Tensor) -> Tensor:
    """Log variances integrated out."""

    def log_likelihood(h: Tensor) -> Tensor:
        return -0.5 * (y.square() * (-h).exp() + h + LOG_TWO_PI)

    inner = y.new_ones(len(y))
    inner[[0, -1]] = 0.0
    neighbours = torch.ones(len(y) - 1).to(y)
    steps = neighbours.diag_embed(1) + neighbours.diag_embed(-1)
    totals = []
    for mean, memory, step in zip(values["mean"], values["memory"], values["step"], strict=True):
        precision = torch.eye(len(y)).to(y) + memory.square() * inner.diag() - memory * steps
        precision = precision / step.square()
        totals.append(latent_gaussian(mean.expand(len(y)), precision, log_likelihood))
    return torch.stack(totals)


@_closed_form
def counts(values: Values, distances: Tensor, y: Tensor) -> Tensor:
    """Log rates integrated out."""
    log_likelihood = _poisson(y, torch.zeros_like(y))
    covariances = values["scale"].square()[:, None, None] * matern(distances, values["length"])
    pairs = zip(values["mean"], covariances, strict=True)
    totals = [
        latent_gaussian(mean.expand(len(y)), torch.linalg.inv(covariance), log_likelihood)
        for mean, covariance in pairs
    ]
    return torch.stack(totals)


@_closed_form
def regions(
    values: Values,
    x: Tensor,
    expected: Tensor,
    y: Tensor,
    spectrum: Tensor,
    pairs: Tensor,
    neighbours: Tensor,
) -> Tensor:
    """Risks integrated out."""
    adjacency = y.new_zeros(len(y), len(y))
    adjacency[pairs[0], pairs[1]] = adjacency[pairs[1], pairs[0]] = 1.0
    sites = [values[name] for name in ("level", "slope", "precision", "share")]
    totals = []
    for level, slope, precision, share in zip(*sites, strict=True):
        matrix = precision * (neighbours.diag() - share * adjacency)
        log_likelihood = _poisson(y, expected.log() + level + slope * x)
        totals.append(latent_gaussian(torch.zeros_like(y), matrix, log_likelihood))
    return torch.stack(totals)


# Regressions


@_closed_form
def logistic(values: Values, x: Tensor, y: Tensor) -> Tensor:
    """The likelihood itself, because there are no locals."""
    logits = values["level"].unsqueeze(-1) + values["slope"] @ x.mT
    return (y * logits - F.softplus(logits)).sum(-1)


@_closed_form
def hierarchical_logistic(values: Values, group: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Levels integrated out by adaptive quadrature of Gauss and Hermite."""
    count = int(group.max()) + 1
    mean, scale = (values[name].unsqueeze(-1) for name in ("mean", "between"))
    offset = values["slope"] @ x.mT

    def terms(levels: Tensor) -> Tensor:
        logits = levels[:, group] + offset
        rows = _sum_by(y * logits - F.softplus(logits), group, count)
        errors = ((levels - mean) / scale).square()
        return rows - 0.5 * errors - scale.log() - 0.5 * LOG_TWO_PI

    with torch.no_grad():
        levels = mean.expand(-1, count)
        for _ in range(STEPS):
            rates = (levels[:, group] + offset).sigmoid()
            slope = _sum_by(y - rates, group, count) - (levels - mean) / scale.square()
            bend = _sum_by(rates * (1 - rates), group, count) + 1 / scale.square()
            levels = levels + slope / bend
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    parts = [
        terms(levels + node / bend.sqrt()) + 0.5 * node**2 + math.log(weight)
        for node, weight in zip(nodes, weights, strict=True)
    ]
    return (torch.stack(parts).logsumexp(0) - 0.5 * bend.log()).sum(-1)
