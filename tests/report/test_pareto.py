"""The fit of a Pareto tail, against ArviZ's own."""

import subprocess
import sys

import numpy as np
import pytest
from arviz.stats.stats import _psislw

from pyroflows.report.pareto import smooth_tail


@pytest.mark.parametrize("draws", [40, 225, 1000, 4000])
@pytest.mark.parametrize("shape", [0.1, 0.5, 1.5])
def test_smooth_tail_agrees_with_arviz(draws: int, shape: float) -> None:
    raw = -shape * np.log(np.random.default_rng(draws).random(draws))
    length = int(np.ceil(min(draws / 5, 3 * draws**0.5)))
    smoothed, khat = smooth_tail(raw)
    expected, expected_khat = _psislw(raw.copy(), -length - 1, np.log(np.finfo(float).tiny), False)
    assert khat == pytest.approx(float(expected_khat), abs=1e-8)
    np.testing.assert_allclose(smoothed + raw.max(), expected, atol=1e-8)


def test_smooth_tail_without_a_tail_leaves_weights_alone() -> None:
    raw = np.zeros(100)
    raw[:3] = 1.0
    smoothed, khat = smooth_tail(raw)
    assert khat == np.inf
    np.testing.assert_array_equal(smoothed, raw - 1.0)


def test_weights_are_smoothed_without_loading_arviz() -> None:
    code = (
        "import sys, torch; from pyroflows.posterior.importance import ImportanceSample; "
        "ImportanceSample(torch.randn(100, 1), torch.randn(100)).khat; "
        "assert 'arviz' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
