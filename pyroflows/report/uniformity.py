r"""Tests of ranks: whether the point that made the data is one more draw of its posterior.

Among :math:`L` draws of the right posterior, the rank :math:`r = \#\{\theta_l < \theta^*\}` of the
point :math:`\theta^*` that made the data is each of :math:`0, \dots, L` with the same probability.
All p-values here are exact for whole ranks, by a recursion over their empirical distribution, and
not those of a continuous limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = [
    "asymmetry_p_value",
    "central_coverage",
    "coverage_p_value",
    "ecdf_band",
    "holm",
    "rank_among",
    "uniformity_p_value",
]

# Chances below it are left out of a step of the recursion.
NEGLIGIBLE = 1e-18
# Statistics that differ by less are ties, told apart by rounding alone.
TIE = 1e-9


def rank_among(point: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Counts the draws below a point, entry by entry; ties are broken at random.

    Args:
        point: Shape ``(*shape)``.
        draws: Shape ``(draws, *shape)``.
        rng: Breaks the ties.

    Returns:
        Whole numbers from 0 to ``draws``, of shape ``(*shape)``.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> rank_among(np.array([2.5, 9.0]), np.array([[1.0, 1.0], [3.0, 3.0]]), rng).tolist()
        [1, 2]
    """
    below = (draws < point).sum(0)
    return np.asarray(below + rng.integers((draws == point).sum(0) + 1))


def uniformity_p_value(ranks: np.ndarray, chances: np.ndarray) -> float:
    r"""Tests whether ranks have certain chances, by their empirical distribution function.

    The statistic is the smallest tail probability of the empirical distribution function over all
    its steps,

    .. math:: \gamma = 2 \min_k \min\{\Pr(B_k \le S_k), \Pr(B_k \ge S_k)\},
        \quad B_k \sim \mathrm{Binomial}(N, F_k),

    with the number :math:`S_k` of ranks up to :math:`k` and its chance :math:`F_k`, so that ranks
    heaped at either end count as much as those in the middle. The p-value is the exact probability
    of so small a :math:`\gamma`: conditioned on their sum, independent Poisson counts are the
    multinomial counts of the ranks, so that the probability of staying inside of a band is a
    recursion of convolutions.

    Args:
        ranks: Whole numbers below ``len(chances)``, of shape ``(n,)``.
        chances: The probability of each rank.

    Returns:
        The p-value; 1 without ranks.

    Reference:
        Säilynoja, Bürkner, Vehtari, "Graphical test for discrete uniformity and its applications in
        goodness-of-fit evaluation and multiple sample comparison", 2022,
        https://doi.org/10.1007/s11222-022-10090-6

        Moscovich, Nadler, "Fast calculation of boundary crossing probabilities for Poisson
        processes", 2017, https://arxiv.org/abs/1503.04363

    Example:
        >>> even = np.full(10, 0.1)
        >>> round(uniformity_p_value(np.arange(10), even), 2)
        1.0
        >>> uniformity_p_value(np.zeros(10, dtype=int), even) < 1e-8
        True
    """
    n = len(ranks)
    if not n or len(chances) < 2:
        return 1.0
    tails = _tail_probabilities(n, chances)
    counts = np.cumsum(np.bincount(ranks, minlength=len(chances)))[:-1]
    gamma = tails[np.arange(len(counts)), counts].min()
    return _clip(1.0 - _stay_probability(n, chances, tails > gamma * (1 + TIE)))


def ecdf_band(n: int, chances: np.ndarray, probability: float = 0.95) -> np.ndarray:
    r"""Finds the band in which the whole empirical distribution function of ranks stays.

    Args:
        n: How many ranks.
        chances: The probability of each rank.
        probability: With which probability it stays there at least.

    Returns:
        The least and the largest share of ranks up to each, of shape ``(len(chances), 2)``.

    Reference:
        See :func:`uniformity_p_value`.

    Example:
        >>> ecdf_band(100, np.full(4, 0.25))[1].tolist()
        [0.39, 0.61]
    """
    tails = _tail_probabilities(n, chances)
    low, high = 0.0, 1.0 - probability
    for _ in range(20):
        gamma = (low + high) / 2
        wide = _stay_probability(n, chances, tails > gamma) >= probability
        low, high = (gamma, high) if wide else (low, gamma)
    inside = tails > low
    least = inside.argmax(-1)
    most = n - inside[:, ::-1].argmax(-1)
    ends = np.stack([least, most], -1) / n
    return np.concatenate([ends, np.ones((1, 2))])


def coverage_p_value(ranks: np.ndarray, count: int) -> float:
    r"""Tests whether central intervals of all levels hold as many points as they should.

    The distance of a rank from the middle, :math:`|r - L / 2|`, is tested as in
    :func:`uniformity_p_value`, so that it does not matter to which side a point lies.

    Args:
        ranks: Whole numbers below ``count``, of shape ``(n,)``.
        count: How many ranks there are, one more than draws.

    Returns:
        The p-value.

    Example:
        >>> coverage_p_value(np.repeat([0, 9], 10), 10) < 1e-8
        True
    """
    distances = np.abs(2 * ranks - (count - 1)) // 2
    every = np.abs(2 * np.arange(count) - (count - 1)) // 2
    return uniformity_p_value(distances, np.bincount(every) / count)


def central_coverage(ranks: np.ndarray, count: int, level: float) -> tuple[float, float]:
    """Returns the share of points in the central interval of a level.

    Args:
        ranks: Whole numbers below ``count``, of shape ``(n,)``.
        count: How many ranks there are, one more than draws.
        level: The probability that the interval should hold.

    Returns:
        The share, and the nearest probability to ``level`` that an interval between two of the
        draws has.

    Example:
        >>> central_coverage(np.arange(200), 200, 0.9)
        (0.9, 0.9)
    """
    outside = round((1 - level) / 2 * count)
    inside = (ranks >= outside) & (ranks < count - outside)
    return float(inside.mean()), (count - 2 * outside) / count


def asymmetry_p_value(ranks: np.ndarray, count: int) -> float:
    r"""Tests whether ranks are as often left as right of the middle, at all distances from it.

    Given their distances from the middle, ranks that are symmetric about it lie left or right by
    tosses of a fair coin. The statistic is the largest excess of one side among the ranks that are
    at least so far out, over all distances; it is the two-sample distance of Kolmogorov and Smirnov
    between the ranks and their mirror images, and its p-value is exact given the distances, by the
    recursion of a random walk between two bounds.

    Args:
        ranks: Whole numbers below ``count``, of shape ``(n,)``.
        count: How many ranks there are, one more than draws.

    Returns:
        The p-value; 1 if no rank is off the middle.

    Reference:
        Yao, Vehtari, Simpson, Gelman, "Yes, but did it work? Evaluating variational inference",
        2018, https://arxiv.org/abs/1802.02538

        Butler, "A test for symmetry using the sample distribution function", 1969,
        https://doi.org/10.1214/aoms/1177697401

    Example:
        >>> asymmetry_p_value(np.repeat([0, 9], 10), 10)
        1.0
        >>> asymmetry_p_value(np.arange(5, 10).repeat(4), 10) < 1e-5
        True
    """
    offsets = 2 * ranks - (count - 1)
    distances = np.unique(np.abs(offsets[offsets != 0]))[::-1]
    right = np.cumsum([(offsets == distance).sum() for distance in distances])
    left = np.cumsum([(offsets == -distance).sum() for distance in distances])
    if not len(distances):
        return 1.0
    tossed = right + left
    largest = np.abs(right - left).max()
    n = int(tossed[-1])
    inside = np.abs(2 * np.arange(n + 1) - tossed[:, None]) < largest
    groups = np.diff(tossed, prepend=0)
    steps = (_tosses(size) for size in groups)
    return _clip(1.0 - float(_walk(n, steps, inside).sum()))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Corrects p-values for their number, by Holm's procedure.

    The chance that one of those whose hypothesis holds falls below a level is at most that level,
    however they depend on each other.

    Args:
        p_values: The p-values.

    Returns:
        The corrected p-values, in the same order.

    Reference:
        Holm, "A simple sequentially rejective multiple test procedure", 1979,
        https://www.jstor.org/stable/4615733

    Example:
        >>> holm([0.01, 0.5, 0.02]).round(2).tolist()
        [0.03, 0.5, 0.04]
    """
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    factors = len(given) - np.arange(len(given))
    corrected = np.maximum.accumulate(given[order] * factors).clip(max=1.0)
    result = np.empty_like(given)
    result[order] = corrected
    return result


def _tail_probabilities(n: int, chances: np.ndarray) -> np.ndarray:
    """Twice the smaller tail of each count of ranks up to each but the last, ``(ranks - 1, n + 1)``."""
    from scipy.special import bdtr

    total = np.cumsum(chances)[:-1, None]
    up_to = bdtr(np.arange(n + 1), n, total)
    # As many beyond, by the mirror image.
    from_on = bdtr(np.arange(n, -1, -1), n, 1 - total)
    return np.asarray(2 * np.minimum(up_to, from_on))


def _stay_probability(n: int, chances: np.ndarray, inside: np.ndarray) -> float:
    """The probability that the number of ranks up to each but the last is inside."""
    everywhere = np.ones((1, n + 1), dtype=bool)
    different, which = np.unique(chances, return_inverse=True)
    steps = [_without_tail(_poisson(n, n * chance)) for chance in different]
    weights = _walk(n, (steps[i] for i in which), np.concatenate([inside, everywhere]))
    return float(weights[n] / _poisson(n, n * chances.sum())[n])


def _walk(n: int, steps: Iterable[np.ndarray], inside: np.ndarray) -> np.ndarray:
    """The probability of each sum from 0 to n of independent steps, all partial sums inside."""
    weights = np.zeros(n + 1)
    weights[0] = 1.0
    for step, allowed in zip(steps, inside, strict=True):
        weights = np.convolve(weights, step)[: n + 1] * allowed
    return weights


def _poisson(n: int, mean: float) -> np.ndarray:
    """The Poisson probabilities of 0 to n."""
    from scipy.special import gammaln, xlogy

    counts = np.arange(n + 1)
    return np.asarray(np.exp(xlogy(counts, mean) - gammaln(counts + 1) - mean))


def _tosses(n: int) -> np.ndarray:
    """The probabilities of 0 to n heads of a fair coin."""
    from scipy.special import gammaln

    heads = np.arange(n + 1)
    logs = gammaln(n + 1) - gammaln(heads + 1) - gammaln(n - heads + 1) - n * np.log(2)
    return np.asarray(np.exp(logs))


def _without_tail(pmf: np.ndarray) -> np.ndarray:
    kept: np.ndarray = np.trim_zeros(np.where(pmf > NEGLIGIBLE, pmf, 0.0), "b")
    return kept


def _clip(p_value: float) -> float:
    return min(1.0, max(0.0, p_value))
