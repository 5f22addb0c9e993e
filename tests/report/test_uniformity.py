"""Exact tests of ranks, against enumeration and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pyroflows.report.uniformity import (
    asymmetry_p_value,
    coverage_p_value,
    ecdf_band,
    holm,
    rank_among,
    uniformity_p_value,
)


@pytest.mark.parametrize(
    ("test", "count"),
    [
        (lambda ranks: uniformity_p_value(ranks, np.full(4, 0.25)), 4),
        (lambda ranks: uniformity_p_value(ranks, np.array([0.5, 0.3, 0.2])), 3),
        (lambda ranks: coverage_p_value(ranks, 4), 4),
        (lambda ranks: coverage_p_value(ranks, 5), 5),
        (lambda ranks: asymmetry_p_value(ranks, 4), 4),
        (lambda ranks: asymmetry_p_value(ranks, 3), 3),
    ],
)
def test_no_p_value_falls_below_a_level_more_often_than_it_may(test, count):
    """Over all outcomes, each with its probability; the largest p-values reach their level."""
    chances = np.array([0.5, 0.3, 0.2]) if count == 3 else np.full(count, 1 / count)
    if "asymmetry" in test.__code__.co_names[0]:
        chances = np.full(count, 1 / count)
    outcomes = list(itertools.product(range(count), repeat=5))
    p_values = np.array([test(np.array(outcome)) for outcome in outcomes])
    weights = np.array([np.prod(chances[list(outcome)]) for outcome in outcomes])
    for level in np.unique(p_values):
        assert weights[p_values <= level * (1 + 1e-9)].sum() <= level * (1 + 1e-6)


def test_the_p_value_of_uniformity_is_attained():
    """A p-value is the probability of one so small, and not a bound on it."""
    chances = np.full(3, 1 / 3)
    outcomes = np.array(list(itertools.product(range(3), repeat=6)))
    p_values = np.array([uniformity_p_value(outcome, chances) for outcome in outcomes])
    for level in np.unique(p_values.round(9)):
        assert (p_values <= level + 1e-8).mean() == pytest.approx(level, abs=1e-8)


def test_the_band_holds_the_whole_function_as_often_as_it_says():
    rng = np.random.default_rng(0)
    n, count = 50, 20
    band = ecdf_band(n, np.full(count, 1 / count), 0.9)
    ranks = rng.integers(count, size=(4000, n))
    reached = (ranks[:, :, None] <= np.arange(count)).mean(1)
    inside = ((band[:, 0] <= reached + 1e-9) & (reached <= band[:, 1] + 1e-9)).all(-1).mean()
    assert 0.9 - 3 * (0.09 / 4000) ** 0.5 <= inside < 0.97


def test_ties_are_broken_evenly():
    rng = np.random.default_rng(0)
    ranks = rank_among(np.zeros(3000), np.zeros((2, 3000)), rng)
    counts = np.bincount(ranks, minlength=3)
    assert np.abs(counts - 1000).max() < 4 * (3000 * 2 / 9) ** 0.5


def test_the_correction_for_many_is_that_of_holm():
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    assert len(holm([])) == 0
