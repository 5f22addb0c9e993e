"""The benchmark of posteriors: pyroflows beside Pyro's guides, Pyro's NUTS and NumPyro's, against reference draws.

Run `python -m benchmarks.posteriors --db DIR`, with DIR a clone of posteriordb (or a part of one).
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import check as checks
from benchmarks.methods import (
    INSTALL_NUMPYRO,
    METHODS,
    NUMPYRO,
    NUTS_TO_TARGET,
    Result,
    Task,
    has_numpyro,
)
from benchmarks.models import MODELS
from benchmarks.posteriordb import PosteriorDB, Reference, flatten
from pyroflows.report import accuracy
from pyroflows.report.accuracy import moments

EIGHT = [checks.CENTERED, checks.NONCENTERED]
DEFAULT_BUDGET = 30.0
UNLIMITED = ("pyroflows", NUMPYRO)
"""Methods that decide themselves when they are done."""
LIMIT = 0.1
"""A row passes if both its errors are below this."""
EFFICIENT = 0.9
"""ESS/N above which the summary counts a posterior."""


@dataclass(frozen=True)
class Row:
    """One line of the table; None where a method has no such number.

    Args:
        posterior: The posterior's name.
        method: The method's name.
        seed: The seed.
        mean_error: Largest |mean - reference mean| / reference sd over every constrained scalar.
        log_sd_error: Largest |log(sd / reference sd)| over every constrained scalar.
        passed: Whether both errors are below `LIMIT`; None where the method only measures seconds.
        khat: Pareto k-hat of the importance weights.
        ess: Effective sample size as a fraction of the draws (`benchmarks.methods.Result`).
        elbo: Evidence lower bound.
        seconds: CPU seconds used.
        bound: How to read `seconds`: "" measured, "~" extrapolated, ">" a lower bound.
        budget: CPU seconds allowed; `NUTS to 1000` may take more (`benchmarks.methods.NUTS_BUDGET`).
        draws: How many draws the errors are taken from.
        ok: The method's own verdict.
        note: A remark of the method.
        error: Why the method gave no draws.
    """

    posterior: str
    method: str
    seed: int
    mean_error: float | None = None
    log_sd_error: float | None = None
    passed: bool | None = None
    khat: float | None = None
    ess: float | None = None
    elbo: float | None = None
    seconds: float | None = None
    bound: str = ""
    budget: float | None = None
    draws: int | None = None
    ok: bool | None = None
    note: str = ""
    error: str = ""


def errors(draws: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> tuple[float, float]:
    """Compare draws with reference draws.

    Args:
        draws: Scalar name -> array `(N,)`.
        reference: Scalar name -> array `(M,)`.

    Returns:
        The largest |mean - reference mean| / reference sd and the largest |log(sd / reference sd)|.

    Raises:
        ValueError: If a scalar of the reference is missing from `draws`.

    >>> errors({"x": np.array([1.0, 3.0])}, {"x": np.array([0.0, 2.0])})
    (1.0, 0.0)
    """
    known = {name: moments(values) for name, values in reference.items()}
    found = accuracy.errors({name: moments(values) for name, values in draws.items()}, known)
    return found.mean, found.log_sd


def noise_floor(
    reference: dict[str, np.ndarray], repeats: int = 50, seed: int = 0
) -> tuple[float, float]:
    """Return the median errors of two independent sets of as many draws as the reference has.

    Args:
        reference: Scalar name -> array `(M,)` of independent draws, from which pairs of sets are
            bootstrapped.
        repeats: Pairs.
        seed: Seed of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    count = len(next(iter(reference.values())))

    def resample() -> dict[str, np.ndarray]:
        index = rng.integers(count, size=count)
        return {name: values[index] for name, values in reference.items()}

    mean, log_sd = zip(*(errors(resample(), resample()) for _ in range(repeats)), strict=True)
    return statistics.median(mean), statistics.median(log_sd)


def run_row(reference: Reference, method: str, seed: int, budget: float | None) -> Row:
    """Run one method on one posterior; a failure gives a row that says why.

    Args:
        reference: Data and reference draws.
        method: A name in `benchmarks.methods.METHODS`.
        seed: The seed.
        budget: CPU seconds allowed, or None.
    """
    row = Row(reference.name, method, seed, budget=budget)
    start = time.process_time()
    entry = MODELS[reference.name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = METHODS[method](
                Task(entry, entry.kwargs(reference.data), seed, budget, reference.name)
            )
        return _filled(row, result, reference)
    except Exception as error:
        return replace(
            row, error=_sentence(error), passed=False, seconds=time.process_time() - start
        )


def _filled(row: Row, result: Result, reference: Reference) -> Row:
    numbers = {
        name: getattr(result, name)
        for name in ("khat", "ess", "elbo", "seconds", "bound", "ok", "note")
    }
    row = replace(row, draws=0, **numbers)
    if not result.draws:
        return row
    arrays = MODELS[reference.name].to_stan(result.draws)
    scalars = flatten({name: values.detach().cpu().numpy() for name, values in arrays.items()})
    mean_error, log_sd_error = errors(scalars, reference.draws)
    # A chain that was cut short to extrapolate its seconds is not there for its moments.
    passed = None if result.bound else mean_error < LIMIT and log_sd_error < LIMIT
    count = len(next(iter(scalars.values())))
    return replace(
        row, mean_error=mean_error, log_sd_error=log_sd_error, passed=passed, draws=count
    )


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def run(
    references: Sequence[Reference],
    methods: Sequence[str],
    seeds: Sequence[int],
    budget: float | None = None,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Run every method with every seed on every posterior.

    Args:
        references: The posteriors.
        methods: Names in `benchmarks.methods.METHODS`.
        seeds: The seeds.
        budget: CPU seconds for Pyro's methods; None gives them what pyroflows took with the same seed
            (`DEFAULT_BUDGET` where it did not run or failed).
        report: Called with each row as it is ready.

    Returns:
        The rows in order.
    """
    rows = []
    for reference in references:
        for seed in seeds:
            allowed = budget
            for method in sorted(methods, key=list(METHODS).index):
                row = run_row(
                    reference,
                    method,
                    seed,
                    None if method in UNLIMITED else allowed or DEFAULT_BUDGET,
                )
                if method == "pyroflows" and budget is None and not row.error:
                    allowed = row.seconds
                rows.append(row)
                report(row)
    return rows


def medians(rows: Sequence[Row]) -> list[Row]:
    """Return the medians over the seeds that gave draws, one row for each posterior and method.

    The row's `ok` says whether every seed's verdict was ok, its `passed` whether every seed passed, its `seed` is the
    number of seeds, and its `error` how many of them failed. Its `bound` is ">" or "~" where that of any seed is.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.posterior, row.method), []).append(row)
    result = []
    for (posterior, method), group in groups.items():
        good = [row for row in group if not row.error]
        numbers: dict[str, Any] = {
            name: _median([getattr(row, name) for row in (group if name == "budget" else good)])
            for name in ("mean_error", "log_sd_error", "khat", "ess", "elbo", "seconds", "budget")
        }
        failed = len(group) - len(good)
        result.append(
            Row(
                posterior,
                method,
                len(group),
                passed=_all([row.passed for row in group]),
                bound=max((row.bound for row in good), key=["", "~", ">"].index, default=""),
                ok=_all([row.ok for row in good]),
                error=f"{failed} of {len(group)} failed" if failed else "",
                **numbers,
            )
        )
    return result


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _all(values: Sequence[bool | None]) -> bool | None:
    known = [value for value in values if value is not None]
    return all(known) if known else None


# The table


_COLUMNS = [
    ("posterior", "posterior", "s"),
    ("method", "method", "s"),
    ("seed", "seed", "d"),
    ("mean_error", "mean err", ".3f"),
    ("log_sd_error", "|log sd|", ".3f"),
    ("passed", "pass", ""),
    ("khat", "k-hat", ".2f"),
    ("ess", "ESS/N", ".3f"),
    ("elbo", "ELBO", ".2f"),
    ("seconds", "CPU s", ".1f"),
    ("budget", "budget s", ".1f"),
    ("ok", "ok", ""),
]
_WIDTHS = [40, 22, 4, 9, 9, 4, 6, 6, 11, 8, 8, 3]
_LEGEND = """
mean err: largest |mean - reference mean| / reference sd; |log sd|: largest |log(sd / reference sd)|; both
over every constrained scalar. pass: both below 0.1. ESS/N: of the importance weights; for NUTS the smallest
bulk ESS of a scalar. CPU s: of the inference, without drawing from a guide afterwards; compilation included.
NUTS to 1000: CPU seconds of Pyro's NUTS to a bulk ESS of 1000, which are those of a warm-up of 500 iterations
plus 1000 times those of an effective draw; ~ extrapolated from a shorter chain, > not even 20 draws by then."""


def _cells(row: Row) -> list[str]:
    cells = []
    for field, _, form in _COLUMNS:
        value = getattr(row, field)
        if isinstance(value, bool):
            cells.append("yes" if value else "no")
        else:
            bound = row.bound if field == "seconds" else ""
            cells.append("-" if value is None else bound + format(value, form))
    return cells


def _line(cells: Sequence[str], error: str = "") -> str:
    padded = [
        cell.ljust(w) if i < 2 else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(cells, _WIDTHS, strict=True))
    ]
    return " ".join([*padded, f" {error}" if error else ""]).rstrip()


def header(seed: str = "seed") -> str:
    """Return the table's first line, under another name for the seed's column where it counts seeds."""
    return _line([seed if field == "seed" else title for field, title, _ in _COLUMNS])


def table(rows: Sequence[Row], seed: str = "seed") -> str:
    """Format rows as a table.

    Args:
        rows: The rows.
        seed: Title of the seed's column.
    """
    return "\n".join([header(seed), *(_line(_cells(row), row.error) for row in rows)])


def summary(rows: Sequence[Row]) -> str:
    """Return one line for each method, and one for pyroflows beside each NUTS that was timed.

    Args:
        rows: One row for each posterior and method, as `medians` returns them.
    """
    methods = {name: {row.posterior: row for row in rows if row.method == name} for name in METHODS}
    lines = [_method_line(name, list(group.values())) for name, group in methods.items() if group]
    ours = methods["pyroflows"]
    for name in (NUTS_TO_TARGET, NUMPYRO):
        pairs = [(ours[p], row) for p, row in methods[name].items() if p in ours]
        pairs = [
            (our, row) for our, row in pairs if our.seconds is not None and row.seconds is not None
        ]
        if pairs:
            lines.append(_versus_line(name, pairs))
    return "\n".join(lines)


def _method_line(name: str, rows: Sequence[Row]) -> str:
    parts = []
    if judged := [row.passed for row in rows if row.passed is not None]:
        parts.append(f"{sum(judged)} of {len(judged)} posteriors pass for every seed")
    if ess := [row.ess for row in rows if row.ess is not None]:
        parts.append(
            f"ESS/N > {EFFICIENT} on {sum(value > EFFICIENT for value in ess)} of {len(ess)}"
        )
    if timed := [row for row in rows if row.seconds is not None]:
        slowest = max(timed, key=lambda row: row.seconds or 0.0)
        parts.append(f"median {_median([row.seconds for row in timed]):.1f} CPU s")
        parts.append(f"slowest {slowest.bound}{slowest.seconds:.1f} ({slowest.posterior})")
    return f"{name}: {'; '.join(parts) or 'no row'}."


def _versus_line(name: str, pairs: Sequence[tuple[Row, Row]]) -> str:
    ratios = [(our.seconds or 0.0) / (row.seconds or math.inf) for our, row in pairs]
    parts = [
        f"CPU s at most {limit:g} times those of {name} on {sum(r <= limit for r in ratios)}"
        for limit in (1, 0.5, 0.1)
    ]
    if name == NUMPYRO:
        for field, title in (("mean_error", "mean err"), ("log_sd_error", "|log sd|")):
            known = [(getattr(our, field), getattr(row, field)) for our, row in pairs]
            smaller = sum(
                ours < theirs for ours, theirs in known if ours is not None and theirs is not None
            )
            parts.append(f"smaller {title} on {smaller}")
    return f"pyroflows: {', '.join(parts)}, of {len(pairs)} posteriors."


# JSON


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: processor, versions, threads, date."""
    packages = ("torch", "pyro-ppl", "pyroflows", "arviz", "numpy", "numpyro", "jax")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_json(
    path: str | Path, rows: Sequence[Row], floors: dict[str, tuple[float, float]]
) -> None:
    """Write the results.

    Args:
        path: The file.
        rows: The rows.
        floors: Posterior -> its noise floor (`noise_floor`).
    """
    document = {
        "machine": machine(),
        "noise_floor": {
            name: {"mean_error": m, "log_sd_error": s} for name, (m, s) in floors.items()
        },
        "rows": [asdict(row) for row in rows],
        "medians": [{**asdict(row), "seeds": row.seed, "seed": None} for row in medians(rows)],
    }
    text = json.dumps(_finite(document), indent=1, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.posteriors", description=__doc__)
    parser.add_argument("--db", required=True, metavar="DIR", help="a posteriordb folder")
    parser.add_argument(
        "--models",
        default="eight",
        help="all, eight (both eight schools; default) or names, by commas",
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds, by commas (default: 0,1,2)")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="methods, by commas (default: all)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument(
        "--budget", type=float, help="CPU seconds for Pyro's methods (default: what pyroflows took)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the results, rewritten after every row"
    )
    parser.add_argument(
        "--check", action="store_true", help="check the models against the reference draws and stop"
    )
    return parser


def _choose(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"Expected {what} to be among {', '.join(known)}; got {text!r}.")
    return names


def _choose_models(text: str, db: PosteriorDB) -> list[str]:
    known = [name for name in MODELS if name in db.names()]
    if text == "all":
        return known
    return _choose(",".join(EIGHT) if text == "eight" else text, known, "--models")


def _choose_seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected --seeds to be integers, by commas; got {text!r}.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark's command.

    Args:
        argv: The command's arguments; None takes the process's own.

    Returns:
        0, 1 where a check failed, 2 where the arguments are wrong.
    """
    args = _parser().parse_args(argv)
    try:
        db = PosteriorDB(args.db)
        references = [db.load(name) for name in _choose_models(args.models, db)]
        methods, seeds = (
            _choose(args.methods, list(METHODS), "--methods"),
            _choose_seeds(args.seeds),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(args.threads)
    if args.threads == 1:
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    logging.getLogger("pyro").setLevel(
        logging.WARNING
    )  # "Guessed max_plate_nesting" would cut the table
    if args.check:
        outcomes = [checks.check(reference) for reference in references]
        print(checks.table(outcomes))
        return 0 if all(outcome.ok for outcome in outcomes) else 1
    if NUMPYRO in methods and not has_numpyro():
        print(f"{NUMPYRO} is left out. {INSTALL_NUMPYRO}")
        methods.remove(NUMPYRO)
        if not methods:
            return 2
    return _benchmark(references, methods, seeds, args.budget, args.json)


def _benchmark(
    references: Sequence[Reference],
    methods: Sequence[str],
    seeds: Sequence[int],
    budget: float | None,
    file: str | None,
) -> int:
    floors = {reference.name: noise_floor(reference.draws) for reference in references}
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        print(_line(_cells(row), row.error), flush=True)
        if file:
            write_json(file, rows, floors)

    given = "what pyroflows took" if budget is None else f"{budget:g} CPU seconds"
    print(f"Budget of Pyro's methods: {given}. {machine()['threads']} thread(s), float64.")
    print(header(), flush=True)
    try:
        run(references, methods, seeds, budget, report)
    except KeyboardInterrupt:
        print("Interrupted; what follows is what was done.")
    print(_LEGEND)
    if rows:
        print(f"\nMedians over the seeds\n{table(medians(rows), 'n')}")
        print(f"\n{summary(medians(rows))}")
        print("\nNoise floor, 10,000 draws against 10,000: mean err, |log sd|")
        print(
            "\n".join(
                f"{name:40s} {mean:.3f} {log_sd:.3f}" for name, (mean, log_sd) in floors.items()
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
