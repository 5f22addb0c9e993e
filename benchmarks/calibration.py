"""The benchmark of calibration: centred eight schools, by a mean-field guide and by `fit_posterior`, on simulated data.

Run `python -m benchmarks.calibration --workers 2 --folder DIR`; it takes some 30 CPU minutes, and goes on from DIR.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pyro.infer.autoguide import AutoNormal

import pyroflows as pf
from pyroflows.examples import load_example
from pyroflows.study import Calibration, SVIFit
from pyroflows.study.calibration import LEVEL

METHODS: dict[str, Any] = {
    "fit_posterior": functools.partial(pf.fit_posterior, progress=False),
    "AutoNormal": SVIFit(AutoNormal),
}


def prepare() -> None:
    """Let a worker process use one thread, and be silent."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def passes(name: str, found: Calibration) -> bool:
    """Whether a mean-field guide is flagged at tau, and nothing is at all for `fit_posterior`.

    Args:
        name: A key of `METHODS`.
        found: Its calibration.
    """
    if name == "fit_posterior":
        return found.p_value > LEVEL
    return bool(found.summary().loc["tau", ["sbc", "vsbc", "coverage"]].min() < LEVEL)


def describe(found: Calibration) -> dict[str, Any]:
    """Return the numbers of a calibration.

    Args:
        found: The calibration.
    """
    return {
        "sentence": found.sentence,
        "fits": found.fits,
        "p_value": found.p_value,
        "tarp": found.tarp,
        "seconds": float(found.seconds.mean()),
        "table": json.loads(found.summary().to_json(orient="index")),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, and tell whether each method does as it should.

    Args:
        argv: Arguments of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--data-sets", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("."), help="for files to go on from")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args(argv)
    example = load_example("eight_schools")
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(options.workers, initializer=prepare) as executor:
        for name in options.methods:
            found = pf.calibrate(
                example.model,
                example.args,
                example.kwargs,
                fit=METHODS[name],
                data_sets=options.data_sets,
                executor=executor,
                checkpoint=options.folder / f"calibration_{name}.pt",
            )
            results[name] = {**describe(found), "passed": passes(name, found)}
            print(f"{name}\n{found}\n{'passed' if results[name]['passed'] else 'FAILED'}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
