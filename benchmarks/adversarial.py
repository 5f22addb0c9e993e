"""The benchmark of honesty: densities that are hard to fit, with known moments, and what the verdict says of each fit.

Run `python -m benchmarks.adversarial`. Every model is fitted by `pyroflows.fit_posterior` as it comes, nothing by name. A
fit is right if its draws have the known moments and every mode; a verdict may be ok only then. The table of confusion counts
what was right against what was called ok; the exit status is 1 if one fit was called ok and was wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyroflows as pf
from benchmarks.arcs import Arcs, random_arcs, two_arcs, two_arcs_moments
from benchmarks.posteriors import _choose, _choose_seeds, _finite, _median, _sentence, machine

Draws = dict[str, Tensor]

DRAWS = 40_000
#: Largest error of a fit that is right, in standard deviations and as a log ratio of them.
TOLERANCE = 0.2
#: Largest error of a log evidence that is called trusted and right, where it is known.
EVIDENCE_TOLERANCE = 0.05
#: Modes of less weight may be missing.
LEAST_WEIGHT = 0.02
#: Resampling may fill a mode with copies of a draw that hit it by luck; so many different ones give its mean within 0.1 sd.
LEAST_DISTINCT = 100


# What is known of a density


@dataclass(frozen=True)
class Moments:
    """Where the entries of a site lie and how wide they are.

    Args:
        centre: Mean of every entry, or a number for all of them; with a `level`, the median.
        scale: Standard deviation of every entry, or a number; with a `level`, that of the normal whose central interval of
            this probability is as wide.
        level: None; or a probability, for an entry so heavy-tailed that the standard deviation of 40,000 exact draws says
            nothing (its fourth moment, or the second, is infinite or enormous).
    """

    centre: Tensor | float
    scale: Tensor | float
    level: float | None = None

    def errors(self, values: Tensor) -> tuple[float, float]:
        """Compare draws with the moments.

        Args:
            values: Draws of the site, `(N, *site_shape)`.

        Returns:
            The largest error of a centre, in scales, and the largest |log(scale of the draws / scale)|.
        """
        centre, scale = spread(values.to(torch.float64), self.level)
        off = ((centre - self.centre) / self.scale).abs().max()
        return float(off), float((scale / self.scale).log().abs().max())


@dataclass(frozen=True)
class Modes:
    """The modes of a density, or parts of it that a fit might lose as it loses modes.

    Args:
        weights: Probability of every mode, `(M,)`.
        assign: Maps N draws to the numbers of their modes, `(N,)`.
    """

    weights: Tensor
    assign: Callable[[Draws], Tensor]

    def shares(self, draws: Draws) -> Tensor:
        """Return the share of draws in every mode, `(M,)`."""
        labels = self.assign(draws)
        return torch.bincount(labels, minlength=len(self.weights)).to(self.weights) / len(labels)

    def missing(self, draws: Draws) -> list[str]:
        """Name the modes above `LEAST_WEIGHT` with less than half of their share, or with copies of a few draws.

        Args:
            draws: Draws of the sites, each `(N, *site_shape)`.
        """
        labels = self.assign(draws)
        rows = torch.cat([values.reshape(len(labels), -1) for values in draws.values()], -1)
        found = []
        for i, (weight, share) in enumerate(
            zip(self.weights.tolist(), self.shares(draws).tolist(), strict=True)
        ):
            distinct = len(rows[labels == i].unique(dim=0))
            if weight > LEAST_WEIGHT and (share < weight / 2 or distinct < LEAST_DISTINCT):
                found.append(
                    f"mode {i} of weight {weight:.3f} has {share:.3f} of the draws, {distinct} of them different"
                )
        return found


@dataclass(frozen=True)
class Adversary:
    """A model whose posterior is known.

    Args:
        model: The Pyro model.
        kwargs: Its keyword arguments.
        truth: Site -> its moments; None if the posterior is improper and has none.
        modes: Its modes; None if it has one.
        log_evidence: Its log evidence; None where no one has computed it.
    """

    model: Callable[..., None]
    kwargs: dict[str, Any]
    truth: dict[str, Moments] | None
    modes: Modes | None = None
    log_evidence: float | None = None


def spread(values: Tensor, level: float | None) -> tuple[Tensor, Tensor]:
    """Return centre and scale of draws, as `Moments` defines them.

    Args:
        values: Draws, `(N, *shape)`.
        level: None for mean and standard deviation, or a probability.
    """
    if level is None:
        return values.mean(0), values.std(0)
    ordered = values.sort(0).values
    low, middle, high = (ordered[round(p * (len(ordered) - 1))] for p in _tails(level))
    return middle, (high - low) / _normal_width(level)


def _tails(level: float) -> tuple[float, float, float]:
    return (1 - level) / 2, 0.5, (1 + level) / 2


def _normal_width(level: float) -> float:
    return 2 * float(torch.special.ndtri(torch.tensor(_tails(level)[2], dtype=torch.float64)))


# Quadrature


def cells(points: Tensor) -> Tensor:
    """Return the trapezoidal rule's weights of increasing points, `(N,)` to `(N,)`."""
    gaps = points.diff()
    return torch.cat([gaps[:1], gaps[1:] + gaps[:-1], gaps[-1:]]) / 2


def probabilities(points: Tensor, log_density: Tensor) -> Tensor:
    """Return probabilities of the points by the trapezoidal rule, from a log density without its constant."""
    weights = (log_density - log_density.max()).exp() * cells(points)
    return weights / weights.sum()


def moments(points: Tensor, log_density: Tensor, level: float | None = None) -> Moments:
    """Return the moments of a density on the line by quadrature.

    Args:
        points: Increasing points, `(N,)`.
        log_density: Log density at the points, without its constant, `(N,)`.
        level: As in `Moments`.
    """
    p = probabilities(points, log_density)
    if level is None:
        mean = p @ points
        return Moments(float(mean), float((p @ (points - mean).square()).sqrt()))
    # A point is in the middle of its own cell.
    below = p.cumsum(0) - p / 2
    low, middle, high = (_interpolate(q, below, points) for q in _tails(level))
    return Moments(middle, (high - low) / _normal_width(level), level)


def _interpolate(x: float, xs: Tensor, ys: Tensor) -> float:
    i = int(torch.searchsorted(xs, x).clamp(1, len(xs) - 1))
    return float(ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1]))


def _line(low: float, high: float, n: int = 20_001) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def _heavy_line(unit: float = 1.0) -> Tensor:
    """Points that are dense within a unit and reach beyond 1e12 of them."""
    return unit * _line(-30, 30).sinh()


# The models


def _flat(features: int) -> Tensor:
    return pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (features,)))


def _orthogonal(features: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(features, features, generator=generator))[0]


def normal(scale_tril: Tensor) -> None:
    """x ~ N(0, L L^T)."""
    pyro.sample(
        "x", dist.MultivariateNormal(scale_tril.new_zeros(len(scale_tril)), scale_tril=scale_tril)
    )


def _normal(covariance: Tensor) -> Adversary:
    truth = {"x": Moments(0.0, covariance.diagonal().sqrt())}
    return Adversary(normal, {"scale_tril": torch.linalg.cholesky(covariance)}, truth)


def correlated_normal() -> Adversary:
    """Eight entries with correlations 0.9^|i - j|: the one that must simply work."""
    index = torch.arange(8.0)
    return _normal(0.9 ** (index - index[:, None]).abs())


def nearly_singular() -> Adversary:
    """A normal of five entries with condition number 1e8, its axes turned away from the coordinates."""
    axes = _orthogonal(5, torch.Generator().manual_seed(0))
    return _normal(axes @ torch.logspace(0, -8, 5).diag() @ axes.T)


def skewed_sites() -> None:
    """A Gamma(0.5, 1), a LogNormal(0, 0.75) and a Beta(0.5, 0.5), independent."""
    pyro.sample("rate", dist.Gamma(0.5, 1.0))
    pyro.sample("scale", dist.LogNormal(0.0, 0.75))
    pyro.sample("share", dist.Beta(0.5, 0.5))


def skewed() -> Adversary:
    """Skewed laws on bounded supports."""
    variance = 0.75**2
    truth = {
        "rate": Moments(0.5, math.sqrt(0.5)),
        "scale": Moments(
            math.exp(variance / 2), math.sqrt(math.expm1(variance) * math.exp(variance))
        ),
        "share": Moments(0.5, math.sqrt(1 / 8)),
    }
    return Adversary(skewed_sites, {}, truth)


def mixture(weights: Tensor, locs: Tensor, scale_trils: Tensor) -> None:
    """x ~ sum_k w_k N(m_k, L_k L_k^T)."""
    x = _flat(locs.shape[-1])
    pyro.factor("log_density", _components(x, weights, locs, scale_trils).logsumexp(-1))


def _components(x: Tensor, weights: Tensor, locs: Tensor, scale_trils: Tensor) -> Tensor:
    normals = dist.MultivariateNormal(locs, scale_tril=scale_trils, validate_args=False)
    return normals.log_prob(x.unsqueeze(-2)) + weights.log()


def _mixture(
    weights: Sequence[float], locs: Tensor, scale_trils: Tensor | None = None
) -> Adversary:
    """A mixture in which the likeliest component of a draw is its mode.

    The weights of the modes are those of the components where these do not overlap, or are two of equal weight and shape.
    """
    w = torch.tensor(weights)
    roots = torch.eye(locs.shape[-1]).expand(len(w), -1, -1) if scale_trils is None else scale_trils
    mean = w @ locs
    variance = w @ (roots.square().sum(-1) + (locs - mean).square())
    kwargs = {"weights": w, "locs": locs, "scale_trils": roots}
    modes = Modes(w, lambda draws: _components(draws["x"].to(w), **kwargs).argmax(-1))
    return Adversary(mixture, kwargs, {"x": Moments(mean, variance.sqrt())}, modes)


def mixture_near() -> Adversary:
    """Two equal normals whose centres are 2.5 standard deviations apart."""
    return _mixture([0.5, 0.5], torch.tensor([[-1.25, 0.0], [1.25, 0.0]]))


def mixture_far() -> Adversary:
    """Two equal normals whose centres are 10 standard deviations apart."""
    return _mixture([0.5, 0.5], torch.tensor([[-3.0, -4.0], [3.0, 4.0]]))


def mixture_unequal() -> Adversary:
    """The lesser of two normals, of weight 0.1, lies where a fit starts; the greater is 10 standard deviations off."""
    return _mixture([0.9, 0.1], torch.tensor([[-6.0, 8.0], [0.0, 0.0]]))


def mixture_rare() -> Adversary:
    """A fit starts at the greater of two normals; the lesser, of weight 0.03, is 10 standard deviations off."""
    return _mixture([0.97, 0.03], torch.tensor([[0.0, 0.0], [8.0, -6.0]]))


def mixture_of_ten_features() -> Adversary:
    """Three normals in ten dimensions, far apart, each with axes and scales of its own (0.3 to 2)."""
    generator = torch.Generator().manual_seed(0)
    locs = 4 * torch.randn(3, 10, generator=generator)
    axes = torch.stack([_orthogonal(10, generator) for _ in range(3)])
    scales = 0.3 + 1.7 * torch.rand(3, 1, 10, generator=generator)
    return _mixture(
        [0.5, 0.3, 0.2], locs, torch.linalg.cholesky((axes * scales) @ (axes * scales).mT)
    )


SPIKE, SPIKE_SCALE, SPIKE_WEIGHT = 1.5, 0.02, 0.3


def spike_in_slab() -> Adversary:
    """A spike of weight 0.3 and scale 0.02 on the flank of a standard normal, in two dimensions."""
    locs = torch.tensor([[0.0, 0.0], [SPIKE, SPIKE]])
    found = _mixture(
        [1 - SPIKE_WEIGHT, SPIKE_WEIGHT],
        locs,
        torch.stack([torch.eye(2), SPIKE_SCALE * torch.eye(2)]),
    )

    # The spike's square also holds a little of the slab.
    def in_square(scale: float, loc: float) -> float:
        ends = (torch.tensor([-5.0, 5.0], dtype=torch.float64) * SPIKE_SCALE + SPIKE - loc) / scale
        return float(torch.special.ndtr(ends).diff()) ** 2

    inside = SPIKE_WEIGHT * in_square(SPIKE_SCALE, SPIKE) + (1 - SPIKE_WEIGHT) * in_square(1.0, 0.0)
    modes = Modes(
        torch.tensor([1 - inside, inside]),
        lambda draws: ((draws["x"] - SPIKE).abs() < 5 * SPIKE_SCALE).all(-1).long(),
    )
    return replace(found, modes=modes)


def bent_normal() -> None:
    """x ~ N(0, 10), y ~ N(0.03 (x^2 - 100), 1)."""
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    pyro.sample("y", dist.Normal(0.03 * (x.square() - 100), 1.0))


def banana() -> Adversary:
    """A normal bent along a parabola.

    References:
        Haario, Saksman, Tamminen: Adaptive proposal distribution for random walk Metropolis algorithm, 1999.
        https://doi.org/10.1007/s001800050022
    """
    return Adversary(
        bent_normal,
        {},
        {"x": Moments(0.0, 10.0), "y": Moments(0.0, math.sqrt(1 + 0.03**2 * 2 * 100**2))},
    )


def neal(others: int) -> None:
    """v ~ N(0, 3), x_i ~ N(0, exp(v / 2))."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("others", others):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def funnel() -> Adversary:
    """Neal's funnel in ten dimensions; the fourth moment of x is 24,000 times the square of its second.

    References:
        Neal: Slice sampling, 2003. https://doi.org/10.1214/aos/1056461461
    """
    v, x = _line(-30, 30, 2001), _heavy_line(1e-4)[::5]
    joint = -0.5 * (v / 3).square() - v / 2 - 0.5 * x[:, None].square() * (-v).exp()
    return Adversary(
        neal, {"others": 9}, {"v": Moments(0.0, 3.0), "x": moments(x, joint.logsumexp(-1), 0.9)}
    )


RADIUS, THICKNESS, SECTORS = 4.0, 0.2, 8


def circle() -> None:
    """The density exp(-(|x| - 4)^2 / (2 * 0.2^2)) in the plane."""
    pyro.factor("log_density", -0.5 * ((_flat(2).norm(dim=-1) - RADIUS) / THICKNESS).square())


def ring() -> Adversary:
    """A ring in the plane; an eighth of it counts as a mode, so that a gap is found."""
    r = _line(1e-6, 2 * RADIUS)
    p = probabilities(r, r.log() - 0.5 * ((r - RADIUS) / THICKNESS).square())

    def sector(draws: Draws) -> Tensor:
        x, y = draws["x"].unbind(-1)
        turn = torch.atan2(y, x) / (2 * math.pi) + 0.5
        return (turn * SECTORS).long().clamp(max=SECTORS - 1)

    truth = {"x": Moments(0.0, float((p @ r.square() / 2).sqrt()))}
    return Adversary(circle, {}, truth, Modes(torch.full((SECTORS,), 1 / SECTORS), sector))


def students(df: float, features: int) -> None:
    """Independent entries with t laws."""
    with pyro.plate("features", features):
        pyro.sample("x", dist.StudentT(df, 0.0, 1.0))


def elliptic_student(df: float, scale_tril: Tensor) -> None:
    """A multivariate t law."""
    pyro.sample(
        "x", dist.MultivariateStudentT(df, scale_tril.new_zeros(len(scale_tril)), scale_tril)
    )


def _student_moments(df: float, level: float) -> Moments:
    x = _heavy_line()
    return moments(x, -0.5 * (df + 1) * (x.square() / df).log1p(), level)


def student_3() -> Adversary:
    """Five independent t laws with three degrees; their fourth moment is infinite.

    The width holds 99 %, as the standard deviation hangs on the tails.
    """
    return Adversary(students, {"df": 3.0, "features": 5}, {"x": _student_moments(3.0, 0.99)})


def student_1_5() -> Adversary:
    """A multivariate t law of three entries with 1.5 degrees, whose variance is infinite."""
    scale_tril = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.4, 0.3, 1.0]])
    marginal = _student_moments(1.5, 0.9)
    scales = scale_tril.square().sum(-1).sqrt()
    truth = {"x": Moments(0.0, marginal.scale * scales, marginal.level)}
    return Adversary(elliptic_student, {"df": 1.5, "scale_tril": scale_tril}, truth)


def normal_means(y: Tensor, tau: float) -> None:
    """beta_j ~ N(0, tau lambda_j), lambda_j ~ Cauchy+(1), y_j ~ N(beta_j, 1)."""
    with pyro.plate("means", len(y)):
        width = pyro.sample("lambda", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, tau * width))
        pyro.sample("y", dist.Normal(beta, 1.0), obs=y)


def horseshoe() -> Adversary:
    """A sparse vector of eight means under the horseshoe, centred; given tau its coordinates separate.

    References:
        Carvalho, Polson, Scott: The horseshoe estimator for sparse signals, 2010. https://doi.org/10.1093/biomet/asq017
    """
    y, tau = torch.tensor([0.3, -0.9, 5.0, 0.1, -0.4, 2.5, 0.7, -7.0]), 0.3
    width = _line(-40, 40).exp()
    signal = (tau * width).square()
    kept = signal / (1 + signal)
    widths, means, sds = [], [], []
    for value in y.tolist():
        log_density = -width.square().log1p() - 0.5 * signal.log1p() - 0.5 * value**2 / (1 + signal)
        widths.append(moments(width, log_density, 0.9))
        p = probabilities(width, log_density)
        mean = float(p @ kept) * value
        means.append(mean)
        sds.append(math.sqrt(float(p @ (kept + (kept * value).square())) - mean**2))
    truth = {
        "lambda": Moments(
            torch.tensor([w.centre for w in widths]), torch.tensor([w.scale for w in widths]), 0.9
        ),
        "beta": Moments(torch.tensor(means), torch.tensor(sds)),
    }
    return Adversary(normal_means, {"y": y, "tau": tau}, truth)


def exchangeable(y: Tensor, scale: float) -> None:
    """mu_k ~ N(0, 4) for three k, y_i ~ the equal mixture of N(mu_k, scale)."""
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(0.0, 4.0))
    equal = dist.Categorical(logits=torch.zeros_like(mu))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(equal, dist.Normal(mu, scale)), obs=y)


def label_switching() -> Adversary:
    """A mixture likelihood with three exchangeable components: six modes, one for each order of the labels."""
    y, scale = torch.tensor([-4.2, -3.8, -3.1, -4.6, 0.3, -0.4, 0.8, 0.1, 3.3, 4.1, 4.4, 3.7]), 0.8
    mu = _line(-8, 8, 101)
    densities = (-0.5 * ((y.to(mu) - mu[:, None]) / scale).square()).exp()
    three = densities[:, None, None] + densities[:, None] + densities
    prior = -0.5 * (mu / 4).square()
    log_density = three.log().sum(-1) + prior[:, None, None] + prior[:, None] + prior
    marginal = moments(mu, log_density.logsumexp((1, 2)))

    def order(draws: Draws) -> Tensor:
        ranks = draws["mu"].argsort(-1)
        # Orders of three: the first label, and whether the other two ascend.
        return 2 * ranks[:, 0] + (ranks[:, 1] < ranks[:, 2]).long()

    return Adversary(
        exchangeable,
        {"y": y, "scale": scale},
        {"mu": marginal},
        Modes(torch.full((6,), 1 / 6), order),
    )


EDGE = -0.5


def cut_normal() -> None:
    """N(0, 1) in two entries, and nothing where the first is below -0.5."""
    x = _flat(2)
    pyro.factor("log_density", torch.where(x[..., 0] < EDGE, -math.inf, -0.5 * x.square().sum(-1)))


def cliff() -> Adversary:
    """A normal that is cut off, within the unconstrained space: 31 % of it are gone."""
    density, kept = (
        math.exp(-0.5 * EDGE**2) / math.sqrt(2 * math.pi),
        0.5 * math.erfc(EDGE / math.sqrt(2)),
    )
    mean = density / kept
    sd = math.sqrt(1 + EDGE * mean - mean**2)
    return Adversary(
        cut_normal, {}, {"x": Moments(torch.tensor([mean, 0.0]), torch.tensor([sd, 1.0]))}
    )


STEEPNESS = 0.01


def walled_normal() -> None:
    """N(0, 1) in two entries, with a wall of scale 0.01 where the first is below -0.5."""
    x = _flat(2)
    pyro.factor("log_density", -0.5 * x.square().sum(-1) - _wall(x[..., 0]))


def _wall(x: Tensor) -> Tensor:
    return 0.5 * ((EDGE - x).clamp(min=0) / STEEPNESS).square()


def wall() -> Adversary:
    """The cliff as a wall that is finite, steep and smooth."""
    x = _line(EDGE - 0.2, 10.0)
    first = moments(x, -0.5 * x.square() - _wall(x))
    truth = {"x": Moments(torch.tensor([first.centre, 0.0]), torch.tensor([first.scale, 1.0]))}
    return Adversary(walled_normal, {}, truth)


BORDER = 1.5


def logarithm() -> None:
    """The density (1.5 - x_1) exp(-|x|^2 / 2), whose logarithm is NaN where x_1 > 1.5."""
    x = _flat(2)
    pyro.factor("log_density", (BORDER - x[..., 0]).log() - 0.5 * x.square().sum(-1))


def nan_region() -> Adversary:
    """A log density that is NaN over a part of the space, which has no probability."""
    x = _line(-10.0, BORDER)[:-1]
    first = moments(x, (BORDER - x).log() - 0.5 * x.square())
    truth = {"x": Moments(torch.tensor([first.centre, 0.0]), torch.tensor([first.scale, 1.0]))}
    return Adversary(logarithm, {}, truth)


def flat_sum(y: Tensor) -> None:
    """y ~ N(a + b, 1) with flat priors on a and b."""
    a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
    b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def _arcs(arcs: Arcs) -> Adversary:
    mean, sd = arcs.moments()
    modes = Modes(arcs.weights, lambda draws: arcs.components(draws["x"]).argmax(-1))
    return Adversary(arcs.model, {}, {"x": Moments(mean, sd)}, modes, log_evidence=0.0)


def arc() -> Adversary:
    """One long thin mode, bent, in three dimensions."""
    return _arcs(random_arcs(1, 3, bend=0.5, seed=0))


def _two_arcs(bend: float) -> Adversary:
    sds, log_evidence = two_arcs_moments(bend)
    modes = Modes(torch.tensor([0.5, 0.5]), lambda draws: (draws["x"][:, 0] > 0).long())
    return Adversary(two_arcs, {"bend": bend}, {"x": Moments(0.0, sds)}, modes, log_evidence)


def two_arcs_long() -> Adversary:
    """Two long thin modes, a little bent, whose arms a fit cuts short unseen."""
    return _two_arcs(0.3)


def two_arcs_bent() -> Adversary:
    """Two long thin modes, bent more."""
    return _two_arcs(0.6)


def three_arcs() -> Adversary:
    """Three long thin modes, bent, in four dimensions."""
    return _arcs(random_arcs(3, 4, bend=0.3, seed=1))


def four_arcs() -> Adversary:
    """Four long thin modes, a little bent, in six dimensions."""
    return _arcs(random_arcs(4, 6, bend=0.2, seed=2))


def improper_direction() -> Adversary:
    """Two coefficients of which only the sum is known: the posterior is flat along a line."""
    return Adversary(flat_sum, {"y": torch.tensor([0.2, 1.1, -0.5, 0.9])}, None)


def jeffreys_scale(y: Tensor) -> None:
    """tau with density 1 / tau, theta_j ~ N(0, tau), y_j ~ N(theta_j, 1)."""
    tau = pyro.sample("tau", dist.ImproperUniform(constraints.positive, (), ()))
    pyro.factor("prior", -tau.log())
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def improper_scale() -> Adversary:
    """A hierarchical scale with the prior 1 / tau: the posterior has infinite mass at tau = 0.

    References:
        Gelman: Prior distributions for variance parameters in hierarchical models, 2006. https://doi.org/10.1214/06-BA117A
    """
    return Adversary(jeffreys_scale, {"y": torch.tensor([2.8, 0.8, -0.3, 0.7, 1.9])}, None)


ADVERSARIES: dict[str, Callable[[], Adversary]] = {
    make.__name__: make
    for make in (
        correlated_normal,
        nearly_singular,
        skewed,
        mixture_near,
        mixture_far,
        mixture_unequal,
        mixture_rare,
        mixture_of_ten_features,
        spike_in_slab,
        banana,
        funnel,
        ring,
        student_3,
        student_1_5,
        horseshoe,
        label_switching,
        cliff,
        wall,
        nan_region,
        arc,
        two_arcs_long,
        two_arcs_bent,
        three_arcs,
        four_arcs,
        improper_direction,
        improper_scale,
    )
}


# A fit and what became of it


@dataclass(frozen=True)
class Row:
    """One fit; None where it has no such number.

    Args:
        model: The model's name.
        seed: The seed.
        mean_error: Largest error of a mean, in sd (of a median, in widths, where a law is heavy-tailed).
        log_sd_error: Largest |log(sd / true sd)| (of widths, where a law is heavy-tailed).
        missing: The modes that are missing.
        evidence_error: |log evidence - true log evidence|, where it is known.
        right: Whether no error is above `TOLERANCE`, that of the log evidence not above `EVIDENCE_TOLERANCE`, and no mode is
            missing; never, for an improper posterior.
        ok: Whether the verdict is ok; no, if the fit was refused.
        refused: Whether the fit raised a ValueError.
        seconds: CPU seconds of the fit, without the drawing afterwards.
        verdict: The verdict's sentence, or that of the refusal.
        error: What else was raised, which is a failure of the library.
    """

    model: str
    seed: int
    mean_error: float | None = None
    log_sd_error: float | None = None
    missing: list[str] = field(default_factory=list)
    evidence_error: float | None = None
    right: bool = False
    ok: bool = False
    refused: bool = False
    seconds: float | None = None
    verdict: str = ""
    error: str = ""


def run_row(name: str, seed: int, time_limit: float | None = None) -> Row:
    """Fit a model and compare the fit with what is known.

    Args:
        name: A name in `ADVERSARIES`.
        seed: The seed.
        time_limit: Seconds that the fit is given, or None.
    """
    adversary = ADVERSARIES[name]()
    row = Row(name, seed)
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = pf.fit_posterior(
                adversary.model,
                (),
                adversary.kwargs,
                seed=seed,
                time_limit=time_limit,
                progress=False,
            )
    except Exception as error:
        row = replace(row, seconds=time.process_time() - start)
        if isinstance(error, ValueError):
            return replace(row, refused=True, verdict=str(error))
        return replace(row, error=_sentence(error))
    row = replace(
        row,
        seconds=time.process_time() - start,
        ok=posterior.verdict.ok,
        verdict=str(posterior.verdict),
    )
    if adversary.log_evidence is not None:
        error = abs(posterior.log_evidence - adversary.log_evidence)
        row = replace(row, evidence_error=error)
    try:
        return compare(row, adversary, posterior.sample(DRAWS, seed=seed))
    except Exception as error:
        return replace(row, error=_sentence(error))


def compare(row: Row, adversary: Adversary, draws: Draws) -> Row:
    """Fill in a row what draws are worth.

    Args:
        row: The row.
        adversary: What is known.
        draws: Draws of the sites, each `(N, *site_shape)`.
    """
    if adversary.truth is None:
        return row
    found = [known.errors(draws[site]) for site, known in adversary.truth.items()]
    # Python's max may drop a NaN.
    mean_error, log_sd_error = torch.tensor(found, dtype=torch.float64).amax(0).tolist()
    missing = adversary.modes.missing(draws) if adversary.modes else []
    right = mean_error <= TOLERANCE and log_sd_error <= TOLERANCE and not missing
    right &= row.evidence_error is None or row.evidence_error <= EVIDENCE_TOLERANCE
    return replace(
        row, mean_error=mean_error, log_sd_error=log_sd_error, missing=missing, right=right
    )


def confusion(rows: Sequence[Row]) -> dict[str, int]:
    """Count fits by whether they were right and called ok; those that failed are counted apart."""
    done = [row for row in rows if not row.error]
    return {
        "right_ok": sum(row.right and row.ok for row in done),
        "right_not_ok": sum(row.right and not row.ok for row in done),
        "wrong_ok": sum(not row.right and row.ok for row in done),
        "wrong_not_ok": sum(not row.right and not row.ok for row in done),
        "refused": sum(row.refused for row in done),
        "failed": len(rows) - len(done),
    }


def solved(rows: Sequence[Row]) -> list[str]:
    """Name the models that were right and called ok with every seed."""
    names = dict.fromkeys(row.model for row in rows)
    return [
        name
        for name in names
        if all(row.right and row.ok and not row.error for row in rows if row.model == name)
    ]


# Tables and JSON


_HEADER = f"{'model':24s} {'seed':>4s} {'mean err':>9s} {'|log sd|':>9s} {'lost':>5s} {'right':>5s} {'ok':>5s} {'CPU s':>7s}"
_LEGEND = f"""
mean err: largest |mean - true mean| / true sd; |log sd|: largest |log(sd / true sd)|; both over every constrained scalar,
by {DRAWS:,} draws, with medians and central widths where a law is heavy-tailed. lost: modes of more than
{LEAST_WEIGHT:.0%} with less than half of their share, or with copies of fewer than {LEAST_DISTINCT} draws.
right: both errors at most {TOLERANCE}, no mode lost, and the log evidence within {EVIDENCE_TOLERANCE} where it is known.
CPU s: of the fit."""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cells(row: Row) -> str:
    ok = "error" if row.error else "yes" if row.ok else "no"
    return (
        f"{row.model:24s} {row.seed:4d} {_number(row.mean_error, '.3f'):>9s} {_number(row.log_sd_error, '.3f'):>9s} "
        f"{len(row.missing):5d} {'yes' if row.right else 'no':>5s} {ok:>5s} {_number(row.seconds, '.1f'):>7s}"
    )


def _remarks(row: Row) -> str:
    verdict = f"Refused: {row.verdict}" if row.refused else row.verdict
    return "\n".join(f"    {line}" for line in [*row.missing, verdict, row.error] if line)


def table(rows: Sequence[Row]) -> str:
    """Format the medians over the seeds, a line for each model, with counts of what was right and ok."""
    lines = [_HEADER.replace("seed", "   n", 1)]
    for name in dict.fromkeys(row.model for row in rows):
        group = [row for row in rows if row.model == name]
        mean, sd, seconds = (
            _median([getattr(row, key) for row in group])
            for key in ("mean_error", "log_sd_error", "seconds")
        )
        lines.append(
            f"{name:24s} {len(group):4d} {_number(mean, '.3f'):>9s} {_number(sd, '.3f'):>9s} "
            f"{max(len(row.missing) for row in group):5d} {sum(row.right for row in group):5d} "
            f"{sum(row.ok for row in group):5d} {_number(seconds, '.1f'):>7s}"
        )
    return "\n".join(lines)


def confusion_table(rows: Sequence[Row]) -> str:
    """Format the table of confusion."""
    n = confusion(rows)
    return "\n".join(
        [
            f"{'':8s} {'ok':>6s} {'not ok':>8s}",
            f"{'right':8s} {n['right_ok']:6d} {n['right_not_ok']:8d}",
            f"{'wrong':8s} {n['wrong_ok']:6d} {n['wrong_not_ok']:8d}",
            f"Of the wrong ones that are not ok, {n['refused']} were refused. Failed: {n['failed']}.",
            f"Right and ok with every seed: {len(solved(rows))} of {len({row.model for row in rows})} models.",
        ]
    )


def write_json(path: str | Path, rows: Sequence[Row], time_limit: float | None = None) -> None:
    """Write the results.

    Args:
        path: The file.
        rows: The rows.
        time_limit: Seconds that a fit was given.
    """
    document = {
        "machine": machine(),
        "time_limit": time_limit,
        "draws": DRAWS,
        "rows": [asdict(row) for row in rows],
        "confusion": confusion(rows),
        "solved": solved(rows),
    }
    Path(path).write_text(
        json.dumps(_finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adversarial", description=__doc__)
    parser.add_argument("--models", default="all", help="all or names, by commas (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, by commas (default: 0,1,2)")
    parser.add_argument(
        "--time-limit",
        type=float,
        help="seconds that a fit is given (default: as many as it wants)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the results, rewritten after every fit"
    )
    parser.add_argument("--list", action="store_true", help="list the models and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark's command.

    Args:
        argv: The command's arguments; None takes the process's own.

    Returns:
        0; 1 where a fit was called ok and was wrong, or failed; 2 where the arguments are wrong.
    """
    args = _parser().parse_args(argv)
    try:
        names = (
            list(ADVERSARIES)
            if args.models == "all"
            else _choose(args.models, list(ADVERSARIES), "--models")
        )
        seeds = _choose_seeds(args.seeds)
        if args.time_limit is not None and not args.time_limit > 0:
            raise ValueError(f"Expected --time-limit to be positive; got {args.time_limit}.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.list:
        print(
            "\n".join(
                f"{name:24s} {(ADVERSARIES[name].__doc__ or '').splitlines()[0]}" for name in names
            )
        )
        return 0
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(args.threads)
    logging.getLogger("pyro").setLevel(logging.WARNING)
    rows: list[Row] = []
    print(_HEADER, flush=True)
    try:
        for name in names:
            for seed in seeds:
                rows.append(run_row(name, seed, args.time_limit))
                print("\n".join(filter(None, [_cells(rows[-1]), _remarks(rows[-1])])), flush=True)
                if args.json:
                    write_json(args.json, rows, args.time_limit)
    except KeyboardInterrupt:
        print("Interrupted; what follows is what was done.")
    print(_LEGEND)
    if not rows:
        return 0
    print(
        f"\nMedians over the seeds; counts of right and ok\n{table(rows)}\n\n{confusion_table(rows)}"
    )
    return int(any(row.error or (row.ok and not row.right) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
