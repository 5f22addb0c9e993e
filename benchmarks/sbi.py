r"""Posteriors from simulations against reference posteriors: `python -m benchmarks.sbi --dir FOLDER`.

FOLDER holds files `sbibm_TASK.npz`, each with observations `obs_k` and 5,000 draws `ref_k` of the reference posteriors. One
configuration serves all tasks. The measure is that of Lueckmann et al. (2021): the accuracy with which a classifier tells
draws from reference draws, 0.5 at best. Simulation-based calibration looks at the posteriors of fresh simulations.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2  # type: ignore[import-untyped]
from sklearn.model_selection import KFold, cross_val_score  # type: ignore[import-untyped]
from sklearn.neural_network import MLPClassifier  # type: ignore[import-untyped]

import pyroflows as pf
from benchmarks.sbi_tasks import TASKS, Task
from pyroflows.posterior import AmortizedPosterior

#: Published results of neural posterior estimation, and the targets, at 10,000 simulations.
PUBLISHED = {"two_moons": 0.606, "gaussian_linear": 0.552, "gaussian_mixture": 0.615}
TARGETS = {"two_moons": 0.58, "gaussian_linear": 0.54, "gaussian_mixture": 0.60}
#: Fresh simulations for calibration, draws of the posterior of each, and bins of their ranks.
FRESH, RANKED, BINS = 300, 99, 10


@dataclass(frozen=True)
class Row:
    """The result on one task.

    Args:
        task: Its name.
        simulations: How many.
        seed: Seed of all that is random.
        c2st: Accuracy of the classifier for each observation.
        calibration: The smallest p-value of uniform ranks, times the number of parameters.
        cpu_seconds: CPU time of simulations and training.
    """

    task: str
    simulations: int
    seed: int
    c2st: list[float]
    calibration: float
    cpu_seconds: float

    def __str__(self) -> str:
        mean = sum(self.c2st) / max(1, len(self.c2st))
        known = (f"{table.get(self.task, math.nan):9.3f}" for table in (PUBLISHED, TARGETS))
        return (
            f"{self.task:24} {self.simulations:11} {mean:6.3f} {' '.join(known)} "
            f"{self.calibration:11.3f} {self.cpu_seconds:11.0f}"
        )


HEADER = (
    f"{'task':24} {'simulations':>11} {'C2ST':>6} {'published':>9} {'target':>9} {'calibration':>11} "
    f"{'CPU seconds':>11}"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line.

    Args:
        arguments: The arguments; None for those of the process.

    Returns:
        The exit status, 0.
    """
    options = parse(arguments)
    files = {path.stem.removeprefix("sbibm_"): path for path in sorted(options.dir.glob("*.npz"))}
    rows = []
    print(HEADER)
    for name, path in files.items():
        if options.tasks and name not in options.tasks:
            continue
        if name not in TASKS:
            print(f"{name:24} left out, because its simulator is not in benchmarks/sbi_tasks.py")
            continue
        references = np.load(path)
        numbers = range(1, options.observations + 1)
        row = run(name, references, options.simulations, options.seed, numbers, options.jobs)
        print(row, flush=True)
        rows.append(asdict(row))
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sbi", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="the folder of the references")
    parser.add_argument("--tasks", nargs="*", help="names of tasks; all by default")
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--observations", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes of the classifier")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args(arguments)


def run(
    name: str, references: Any, simulations: int, seed: int, numbers: Sequence[int], jobs: int = 1
) -> Row:
    """Run one task.

    Args:
        name: A key of `TASKS`.
        references: Arrays `obs_k` and `ref_k`.
        simulations: How many.
        seed: Seed of all that is random.
        numbers: The observations.
        jobs: Processes of the classifier.
    """
    task = TASKS[name]
    before = time.process_time()
    amortized = fit(task, simulations, seed)
    seconds = time.process_time() - before
    scores = []
    for number in numbers:
        x = torch.from_numpy(references[f"obs_{number}"]).float().flatten()
        draws = amortized.posterior_for(x).sample(5000, seed)["theta"].numpy()
        scores.append(c2st(references[f"ref_{number}"], draws, jobs=jobs))
    return Row(name, simulations, seed, scores, calibration(amortized, seed + 1), seconds)


def fit(task: Task, simulations: int, seed: int) -> AmortizedPosterior:
    """Learn the posterior of a task, in the one configuration that serves all."""
    return pf.fit_amortized(task.simulate, task.prior, simulations, seed=seed, progress=False)


def c2st(reference: Any, draws: Any, seed: int = 1, jobs: int = 1) -> float:
    """The accuracy with which a classifier tells draws from reference draws.

    Args:
        reference: Array of shape `(n, d)`.
        draws: Array of shape `(n, d)`.
        seed: Seed of the classifier and of the folds.
        jobs: Processes.

    Returns:
        The mean over five folds of the accuracy of a network with two hidden layers of `10 d` units.
    """
    mean, sd = reference.mean(0), reference.std(0)
    points = (np.concatenate([reference, draws]) - mean) / sd
    labels = np.repeat([0, 1], [len(reference), len(draws)])
    width = 10 * points.shape[1]
    network = MLPClassifier(hidden_layer_sizes=(width, width), max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return float(cross_val_score(network, points, labels, cv=folds, n_jobs=jobs).mean())


@torch.no_grad()
def calibration(amortized: AmortizedPosterior, seed: int) -> float:
    """The smallest p-value of uniform ranks of the parameters, times their number.

    Args:
        amortized: The posterior.
        seed: Seed of fresh simulations.
    """
    fresh = pf.simulate(amortized.simulator, count=FRESH, seed=seed)
    z = amortized.layout.vectors(fresh)
    x = amortized.layout.join(fresh.x)
    torch.manual_seed(seed)
    draws = [amortized.guide_for(each).sample(RANKED) for each in x]
    ranks = (torch.stack(draws) < z.unsqueeze(1)).sum(1)
    expected = len(z) / BINS
    values = []
    for column in (ranks * BINS // (RANKED + 1)).T:
        counts = column.bincount(minlength=BINS).double()
        values.append(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), BINS - 1))
    return float(min(1.0, min(values) * len(values)))


if __name__ == "__main__":
    sys.exit(main())
