"""The generalised Pareto distribution of the largest of many weights."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["fit_tail", "smooth_tail"]

# Fewer weights show no tail.
FEWEST = 5
# The prior of the scale has this many times its weight at the first quartile of the tail, and that
# of the shape, .5, counts as so many weights.
QUARTILE, SHAPE, PRIOR_WEIGHTS = 3.0, 0.5, 10
# Profile likelihoods with less of the mass are left out.
NEGLIGIBLE = 10 * np.finfo(float).eps


def smooth_tail(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    r"""Replaces the largest weights by quantiles of the Pareto distribution fitted to them.

    The ``M`` largest of ``N`` weights, with :math:`M = \lceil \min(N / 5, 3 \sqrt N) \rceil`, take
    the quantiles at :math:`(i - \tfrac12) / M`, and no weight becomes larger than the largest.

    Args:
        log_weights: Log weights of shape ``(draws,)``; ``-inf`` is a draw of weight zero.

    Returns:
        The log weights, not normalised, and the shape of the fit; ``inf`` if there is none, and the
        weights are as they were then.

    Reference:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", 2024,
        https://arxiv.org/abs/1507.02646

    Example:
        >>> draws = np.random.default_rng(0).pareto(2.0, 4000)
        >>> log_weights, shape = smooth_tail(np.log1p(draws))
        >>> round(shape, 1), log_weights.shape
        (0.6, (4000,))
    """
    log_weights = log_weights - log_weights.max()
    order = np.argsort(log_weights)
    length = math.ceil(min(len(order) / 5, 3 * math.sqrt(len(order))))
    cutoff = log_weights[order[-length - 1]]
    tail = order[-length:]
    tail = tail[log_weights[tail] > cutoff]
    if len(tail) < FEWEST:
        return log_weights, math.inf
    threshold = math.exp(cutoff)
    shape, scale = fit_tail(threshold * np.expm1(log_weights[tail] - cutoff))
    if not math.isfinite(shape):
        return log_weights, math.inf
    survival = -np.log1p(-(np.arange(len(tail)) + 0.5) / len(tail))
    quantiles = scale * (np.expm1(shape * survival) / shape if shape else survival)
    log_weights[tail] = np.minimum(np.log(quantiles + threshold), 0.0)
    return log_weights, shape


def fit_tail(excesses: np.ndarray) -> tuple[float, float]:
    r"""Fits the generalised Pareto distribution to excesses over a threshold.

    Args:
        excesses: Positive numbers in ascending order, of shape ``(n,)``.

    Returns:
        The shape, shrunk a little to one half, and the scale: the posterior means of an empirical
        prior.

    Reference:
        Zhang, Stephens, "A new and efficient estimation method for the generalized Pareto
        distribution", 2009, https://doi.org/10.1198/tech.2009.08017

    Example:
        >>> shape, scale = fit_tail(np.sort(np.random.default_rng(0).exponential(2.0, 10_000)))
        >>> round(abs(shape), 1), round(scale)
        (0.0, 2)
    """
    n = len(excesses)
    count = 30 + int(math.sqrt(n))
    ratios = 1 - np.sqrt(count / (np.arange(1, count + 1) - 0.5))
    quartile = excesses[int(n / 4 + 0.5) - 1]
    with np.errstate(all="ignore"):
        slopes = ratios / (QUARTILE * quartile) + 1 / excesses[-1]
        shapes = np.log1p(-slopes[:, None] * excesses).mean(1)
        log_likelihood = n * (np.log(-slopes / shapes) - shapes - 1)
        weights = 1 / np.exp(log_likelihood - log_likelihood[:, None]).sum(1)
        kept = weights >= NEGLIGIBLE
        slope = float((slopes[kept] * weights[kept]).sum() / weights[kept].sum())
        shape = float(np.log1p(-slope * excesses).mean())
    shrunk = (n * shape + PRIOR_WEIGHTS * SHAPE) / (n + PRIOR_WEIGHTS)
    return shrunk, -shape / slope
