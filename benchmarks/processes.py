"""Fits by one process beside fits by several: `python -m benchmarks.processes`.

    python -m benchmarks.processes --json benchmarks/results/processes.json

A regression on so many rows that an evaluation of its density at 256 points takes a given time is fitted by one process
and by two, in turn, each with one thread. Told are seconds of wall-clock time of the whole fit, without the loading of
libraries, and CPU seconds of the main process, which do not know of other work on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import pyroflows as pf
from benchmarks.posteriors import machine
from pyroflows.model import LogDensity
from pyroflows.train import processes

COSTS = (1.0, 5.0, 20.0, 50.0)
POINTS = 256
#: Rows whose evaluations are timed to find how many take a given time.
TRIED = (200, 4000)


def make_model(rows: int) -> Callable[[], None]:
    """Make a regression with effects of groups without data, so that a flow has work to do.

    Args:
        rows: Rows of the data.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, generator=generator)
    y = (1.5 * x[:, 0]).sin() + 0.5 * x[:, 1] + 0.5 * torch.randn(rows, generator=generator)

    def model() -> None:
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        width = pyro.sample("width", dist.Normal(0.0, 0.7))
        pyro.sample("new", dist.Normal(torch.zeros(3), width.exp()).to_event(1))
        with pyro.plate("rows", rows):
            loc = (slopes[0] * x[:, 0]).sin() + slopes[1] * x[:, 1]
            pyro.sample("y", dist.StudentT(4.0, loc, scale), obs=y)

    return model


def milliseconds(rows: int) -> float:
    """Return the CPU time of an evaluation of the density and its gradient at 256 points.

    Args:
        rows: Rows of the data.
    """
    density = LogDensity(make_model(rows), batch_size=POINTS)
    points = density.initial.expand(POINTS, -1)
    seconds = []
    for _ in range(9):
        begun = time.process_time()
        density.value_and_grad(points)
        seconds.append(time.process_time() - begun)
    return 1e3 * min(seconds)  # which other work on the machine disturbs least


def rows_for(costs: list[float]) -> dict[float, int]:
    """Return how many rows it takes for evaluations of given milliseconds.

    Args:
        costs: The milliseconds.
    """
    few, many = TRIED
    base, top = milliseconds(few), milliseconds(many)
    each = (top - base) / (many - few)
    return {cost: max(10, round(few + (cost - base) / each)) for cost in costs}


def fit(rows: int) -> dict[str, Any]:
    """Fit the model by the processes that there are, and return the time that the fit takes.

    Args:
        rows: Rows of the data.
    """
    torch.set_num_threads(1)
    with processes.initialize_from_environment(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A small fit before has libraries load what they need.
        pf.fit_posterior(make_model(10), steps=1, progress=False)
        begun, cpu = time.perf_counter(), time.process_time()
        posterior = pf.fit_posterior(make_model(rows), progress=False)
        return {
            "main": processes.is_main(),
            "seconds": time.perf_counter() - begun,
            "cpu_seconds": time.process_time() - cpu,
            "attempt": posterior.name,
            "log_evidence": posterior.verdict.log_evidence,
        }


def run(rows: int, count: int) -> dict[str, Any]:
    """Fit the model by some processes of their own.

    Args:
        rows: Rows of the data.
        count: How many processes.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "fit.json"
        worker = ["-m", "benchmarks.processes", "--worker", str(rows), "--json", str(out)]
        subprocess.run(
            [sys.executable, *torchrun, *worker],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
        return dict(json.loads(out.read_text()))


def compare(costs: list[float], counts: list[int], repeats: int) -> list[dict[str, Any]]:
    """Return a row for each cost and number of processes, medians of fits that take turns.

    Args:
        costs: Milliseconds of an evaluation.
        counts: Numbers of processes.
        repeats: Fits of each.
    """
    rows = []
    for cost, size in rows_for(costs).items():
        turns = [{count: run(size, count) for count in counts} for _ in range(repeats)]
        for count in counts:
            fits = [turn[count] for turn in turns]
            medians = {
                key: statistics.median(fit[key] for fit in fits)
                for key in ("seconds", "cpu_seconds", "log_evidence")
            }
            rows.append(
                {
                    "milliseconds": cost,
                    "rows": size,
                    "processes": count,
                    "attempt": fits[0]["attempt"],
                    **medians,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--costs", default=",".join(map(str, COSTS)), help="milliseconds")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.worker is not None:
        found = fit(options.worker)
        if found.pop("main"):
            options.json.write_text(json.dumps(found))
        return 0
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    costs = [float(cost) for cost in options.costs.split(",")]
    counts = [int(count) for count in options.processes.split(",")]
    report = {
        "machine": {**machine(), "processors": os.cpu_count(), "load": load},
        "rows": compare(costs, counts, options.repeats),
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
