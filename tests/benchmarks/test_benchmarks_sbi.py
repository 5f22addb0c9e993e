"""The benchmark of simulation-based inference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from benchmarks import sbi
from benchmarks.sbi_tasks import TASKS, Task

SIZES = {
    "two_moons": (2, 2),
    "gaussian_linear": (10, 10),
    "gaussian_mixture": (2, 2),
    "gaussian_linear_uniform": (10, 10),
    "slcp": (5, 8),
    "sir": (2, 10),
    "lotka_volterra": (4, 20),
}


@pytest.mark.parametrize("name", TASKS)
def test_simulators_give_data_of_their_shapes(name: str) -> None:
    task, (parameters, entries) = TASKS[name], SIZES[name]
    theta = task.prior.sample()
    assert theta.shape == (parameters,)
    x = task.simulate(theta)
    assert x.shape == (entries,) and bool(x.isfinite().all())


def test_points_of_slcp_have_their_covariance() -> None:
    theta = torch.tensor([0.7, -2.9, -1.0, -0.9, 0.6])
    points = torch.cat([TASKS["slcp"].simulate(theta).reshape(4, 2) for _ in range(2000)])
    correlation = math.tanh(0.6)
    expected = torch.tensor([[1.0, 0.81 * correlation], [0.81 * correlation, 0.81**2]])
    torch.testing.assert_close(points.mean(0), theta[:2], atol=0.05, rtol=0)
    torch.testing.assert_close(points.T.cov(), expected, atol=0.06, rtol=0)


def test_the_classifier_tells_what_differs() -> None:
    generator = np.random.default_rng(0)
    reference, same = generator.normal(size=(2, 400, 1))
    assert abs(sbi.c2st(reference, same) - 0.5) < 0.06
    assert sbi.c2st(reference, same + 10) > 0.99


def quick(task: Task, simulations: int, seed: int) -> Any:
    return pf.fit_amortized(
        task.simulate,
        task.prior,
        simulations,
        seed=seed,
        ensemble=1,
        max_epochs=1,
        progress=False,
    )


def test_it_runs_and_writes_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    linear = Task(prior, lambda theta: theta + torch.randn(1))
    monkeypatch.setitem(sbi.TASKS, "linear", linear)
    monkeypatch.setattr(sbi, "fit", quick)
    monkeypatch.setattr(sbi, "FRESH", 50)
    reference = 0.5 + math.sqrt(0.5) * np.random.default_rng(0).normal(size=(5000, 1))
    np.savez(tmp_path / "sbibm_linear.npz", obs_1=np.ones(1), ref_1=reference)
    np.savez(tmp_path / "sbibm_other.npz", obs_1=np.ones(1))
    out = tmp_path / "out.json"
    arguments = ["--dir", str(tmp_path), "--simulations", "500", "--observations", "1"]
    assert sbi.main([*arguments, "--json", str(out)]) == 0
    [row] = json.loads(out.read_text())
    assert row["task"] == "linear" and abs(row["c2st"][0] - 0.5) < 0.05
    assert row["calibration"] > 0.001
    printed = capsys.readouterr().out
    assert "other" in printed and "left out" in printed
