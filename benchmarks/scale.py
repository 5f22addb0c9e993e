"""The benchmark of large models: pyroflows, NumPyro's NUTS and Pyro's guides; and curves of cost.

Run `python -m benchmarks.scale [NAME ...] --json benchmarks/results/scale.json`; rows that the file
has of other models and methods are kept. Models are in :mod:`benchmarks.scale_models`, the right
numbers in :mod:`benchmarks.scale_references`. Each row and each point of a curve has a process of
its own, one thread, data in single precision and all defaults.

- pyroflows is `pf.fit_posterior(model, args)`;
- NumPyro's NUTS is jitted, two chains of 500 draws after 500 of warm-up, of the model as it is
  written, or non-centred;
- Pyro's guides are trained by a short SVI; their evidence is the ELBO.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoGuide,
    AutoLowRankMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor

import pyroflows as pf
from benchmarks.methods import NUMPYRO, start_at
from benchmarks.posteriors import machine
from benchmarks.pyro_models import entries
from benchmarks.real_models import compare
from benchmarks.scale_models import NAMES, Case, make_case, split_name
from benchmarks.scale_references import Globals, Reference, read_references, use_one_thread

PYROFLOWS = "pyroflows"
NONCENTRED = f"{NUMPYRO}, non-centred"
# Draws by which posteriors are compared: of small models, of large ones, of Pyro's guides.
DRAWS, FEWER_DRAWS, GUIDE_DRAWS = 20_000, 4_000, 1_000
LARGE = 1_000
# Entries of draws at once.
ROOM = 20_000_000
STEPS, STEP_SIZE, LAST_STEP_SIZE = 2_000, 5e-2, 1e-3
ELBO_PARTICLES = 100
# A fit is right if no mean of a global is off by more standard deviations, and no log sd by more.
RIGHT = 0.1
PROCESS_SECONDS = 1_800.0


@dataclass(frozen=True)
class Row:
    """One method on one model; None where it has no such number.

    Args:
        model: The model's name.
        method: The method's name.
        seed: The seed.
        latents: Entries of the unconstrained vector.
        rows: Observations.
        seconds: CPU seconds, compilation included.
        compiled_seconds: CPU seconds without compilation.
        seconds_to_target: CPU seconds to an effective sample size of 1,000 of the worst global,
            without compilation.
        ok: The verdict.
        log_evidence: The log evidence; of Pyro's guides the ELBO.
        evidence_error: By how much it differs from the right one.
        mean_error: Largest |mean - right mean| / right sd over the globals.
        log_sd_error: Largest |log(sd / right sd)| over the globals.
        worst: The global with the larger of the two.
        ess: Effective sample size as a fraction of the draws, of the worst global for chains.
        memory: Peak megabytes of the process, beyond those before.
        note: The verdict in words, or a remark.
        error: Why there is no answer.
    """

    model: str
    method: str
    seed: int
    latents: int = 0
    rows: int = 0
    seconds: float | None = None
    compiled_seconds: float | None = None
    seconds_to_target: float | None = None
    ok: bool | None = None
    log_evidence: float | None = None
    evidence_error: float | None = None
    mean_error: float | None = None
    log_sd_error: float | None = None
    worst: str = ""
    ess: float | None = None
    memory: float | None = None
    note: str = ""
    error: str = ""

    @property
    def right(self) -> bool | None:
        """Whether both errors are at most `RIGHT`; `None` where they are not known."""
        if self.mean_error is None or self.log_sd_error is None:
            return None
        return max(self.mean_error, self.log_sd_error) <= RIGHT


@dataclass(frozen=True)
class Found:
    """What a method found: the fields of a row that it knows, and draws of the globals.

    Args:
        scalars: Draws of each entry of the globals on the unconstrained scale, of shape ``(n,)``.
        fields: Fields of the row by name.
    """

    scalars: dict[str, Tensor]
    fields: dict[str, Any]


# Methods


def run_pyroflows(name: str, seed: int, time_limit: float | None) -> Found:
    """Fits the default posterior."""
    # Loaded before the clock starts, as all imports are.
    import torch._dynamo

    case = make_case(name)
    start = time.process_time()
    posterior = pf.fit_posterior(
        case.model, case.args, seed=seed, time_limit=time_limit, progress=False
    )
    seconds = time.process_time() - start
    verdict, latents = posterior.verdict, posterior.density.features
    total = DRAWS if latents <= LARGE else FEWER_DRAWS
    size = min(total, max(1, ROOM // latents))
    parts = [_of_globals(case, posterior.sample(size, seed=s)) for s in range(-(-total // size))]
    scalars = {scalar: torch.cat([part[scalar] for part in parts]) for scalar in parts[0]}
    known = {
        "seconds": seconds,
        "ok": verdict.ok,
        "log_evidence": verdict.log_evidence,
        "ess": verdict.ess,
        "note": f"{posterior.name}. {verdict}",
    }
    return Found(scalars, known)


def _of_globals(case: Case, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    globals_ = {name: draws[name].detach() for name in case.globals}
    return entries(Globals(case).unconstrain(globals_))


def run_numpyro(name: str, seed: int, time_limit: float | None, *, noncentred: bool) -> Found:
    """Runs NumPyro's NUTS; it knows no limit of time."""
    from benchmarks import scale_numpyro

    chains = scale_numpyro.run_nuts(name, noncentred=noncentred, seed=seed)
    scalars = {k: torch.as_tensor(v.copy()).flatten() for k, v in chains.scalars.items()}
    count = len(next(iter(scalars.values())))
    compiled = chains.warmup + chains.sampling
    known = {
        "seconds": chains.compilation + compiled,
        "compiled_seconds": compiled,
        "seconds_to_target": chains.to_target,
        "ess": chains.ess / count,
        "note": f"R-hat {chains.rhat:.3f}, {chains.divergences} divergences",
    }
    return Found(scalars, known)


def run_guide(
    name: str, seed: int, time_limit: float | None, *, build: Callable[..., AutoGuide]
) -> Found:
    """Trains one of Pyro's guides for so many steps; it knows no limit of time."""
    case = make_case(name)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = build(case.model, init_loc_fn=start_at)
    decay = (LAST_STEP_SIZE / STEP_SIZE) ** (1 / STEPS)
    adam = pyro.optim.ClippedAdam({"lr": STEP_SIZE, "lrd": decay})
    svi = SVI(case.model, guide, adam, Trace_ELBO())
    start = time.process_time()
    with pyro.validation_enabled(False):
        for _ in range(STEPS):
            svi.step(*case.args)
        seconds = time.process_time() - start
        losses = [svi.evaluate_loss(*case.args) for _ in range(ELBO_PARTICLES)]
        sites = list(case.globals)
        draws = Predictive(guide, num_samples=GUIDE_DRAWS, return_sites=sites)(*case.args)
    known = {"seconds": seconds, "log_evidence": -sum(losses) / len(losses)}
    return Found(_of_globals(case, draws), known)


METHODS: dict[str, Callable[[str, int, float | None], Found]] = {
    PYROFLOWS: run_pyroflows,
    NUMPYRO: partial(run_numpyro, noncentred=False),
    NONCENTRED: partial(run_numpyro, noncentred=True),
    "AutoNormal": partial(run_guide, build=AutoNormal),
    "AutoLowRankMultivariateNormal": partial(run_guide, build=AutoLowRankMultivariateNormal),
    "AutoStructured": partial(run_guide, build=AutoStructured),
}


def applies(name: str, method: str) -> bool:
    """Whether a method is another than the others for a model."""
    if method != NONCENTRED:
        return True
    from benchmarks import scale_numpyro

    return split_name(name)[0] in scale_numpyro.NONCENTRED


def run_row(name: str, method: str, seed: int, time_limit: float | None = None) -> Row:
    """Runs one method on one model in this process; a failure gives a row that says why.

    Args:
        name: The model's name.
        method: A name in `METHODS`.
        seed: The seed.
        time_limit: Seconds for a fit of pyroflows.
    """
    use_one_thread()
    case = make_case(name)
    row = Row(name, method, seed, Globals(case).latents, case.rows)
    before = peak_megabytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = METHODS[method](name, seed, time_limit)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return replace(row, error=f"{type(error).__name__}: {first[:200]}")
    row = replace(row, memory=peak_megabytes() - before, **found.fields)
    return with_errors(row, found.scalars, read_references().get(name))


def with_errors(row: Row, scalars: dict[str, Tensor], right: Reference | None) -> Row:
    """Returns the row with its errors, where the right numbers are known."""
    if right is None:
        return row
    pairs = {s: compare({s: scalars[s].double()}, {s: m}) for s, m in right.moments.items()}
    evidence = None
    if right.log_evidence is not None and row.log_evidence is not None:
        evidence = row.log_evidence - right.log_evidence
    return replace(
        row,
        evidence_error=evidence,
        mean_error=max(mean for mean, _ in pairs.values()),
        log_sd_error=max(log_sd for _, log_sd in pairs.values()),
        worst=max(pairs, key=lambda scalar: max(pairs[scalar])),
    )


def peak_megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Curves

CURVES = {
    "groups": [f"groups-{n}" for n in (100, 1_000, 10_000, 100_000)],
    "level_states": [f"level_states-{n}" for n in (100, 1_000, 10_000, 100_000)],
    "logistic": [f"logistic-{n}" for n in (1_000, 10_000, 100_000, 1_000_000)],
}
"""Models of which only one size varies."""
POINTS, REPEATS = 8, 3


@dataclass(frozen=True)
class Point:
    """One point of a curve.

    Args:
        model: The model's name.
        latents: Entries of the unconstrained vector.
        rows: Observations.
        gradient: CPU milliseconds of the joint log density and its gradient at a point.
        marginal: CPU milliseconds of a value of the globals' marginal density.
        preparation: CPU seconds until the first of these: capture and structure.
        memory: Peak megabytes of the process, beyond those before.
        error: Why there is no answer.
    """

    model: str
    latents: int = 0
    rows: int = 0
    gradient: float | None = None
    marginal: float | None = None
    preparation: float | None = None
    memory: float | None = None
    error: str = ""


def run_point(name: str) -> Point:
    """Times the steps of a fit on one model in this process."""
    from pyroflows.guides.marginal import Marginal
    from pyroflows.model import LogDensity
    from pyroflows.model.structure import find_structure

    use_one_thread()
    case = make_case(name)
    point = Point(name, Globals(case).latents, case.rows)
    before = peak_megabytes()
    try:
        start = time.process_time()
        density = LogDensity(case.model, case.args)
        marginal = Marginal(density, find_structure(density))
        preparation = time.process_time() - start
        z = marginal.density.initial.expand(POINTS, -1)
        g = marginal.initial.double().expand(POINTS, -1)
        gradient = milliseconds(lambda: marginal.density.value_and_grad(z))
        value = milliseconds(lambda: marginal.log_prob(g))
    except Exception as error:
        return replace(point, error=f"{type(error).__name__}: {error}")
    memory = peak_megabytes() - before
    return replace(point, gradient=gradient, marginal=value, preparation=preparation, memory=memory)


def milliseconds(run: Callable[[], Any]) -> float:
    """The least CPU milliseconds a point of `POINTS` points, after a first run."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1_000 * min(times) / POINTS


def plot(points: Sequence[Point], path: Path) -> None:
    """Draws the curves: cost against latents, and against rows for models of few latents.

    Args:
        points: The points.
        path: The image.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.0, 4.0), layout="constrained")
    for family in dict.fromkeys(split_name(point.model)[0] for point in points):
        own = [p for p in points if split_name(p.model)[0] == family and not p.error]
        sizes = [split_name(p.model)[1][0] for p in own]
        axes.loglog(sizes, [p.marginal for p in own], marker="o", label=family.replace("_", " "))
    axes.set(xlabel="groups, times or rows", ylabel="CPU ms of a value of the marginal density")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


# Processes


def run_apart(function: Callable[..., Any], args: Sequence[Any], seconds: float) -> tuple[Any, str]:
    """Runs a function in a process of its own.

    Args:
        function: The function, which can be pickled as its result can.
        args: Its arguments.
        seconds: When they are over the process is ended.

    Returns:
        Its result or None, and why there is none.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return None, f"stopped after {seconds:.0f} s"
        return ours.recv(), ""
    except EOFError:
        process.join()
        return None, f"the process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _send(connection: Any, function: Callable[..., Any], args: Sequence[Any]) -> None:
    connection.send(function(*args))


# The table and the JSON

_COLUMNS = (
    ("model", 31, "s"),
    ("method", 29, "s"),
    ("latents", 7, "d"),
    ("seconds", 8, ".1f"),
    ("compiled_seconds", 8, ".1f"),
    ("seconds_to_target", 9, ".1f"),
    ("ok", 3, ""),
    ("mean_error", 8, ".3f"),
    ("log_sd_error", 8, ".3f"),
    ("evidence_error", 8, ".3f"),
    ("ess", 6, ".3f"),
    ("memory", 7, ".0f"),
)
_TITLES = (
    "model",
    "method",
    "latents",
    "CPU s",
    "compiled",
    "to 1000",
    "ok",
    "mean err",
    "|log sd|",
)
_TITLES += ("evidence", "ESS/N", "MB")


def table(rows: Sequence[Row]) -> str:
    """Formats rows as a table."""
    return "\n".join([_line(_TITLES), *(_line(_cells(row)) + _remark(row) for row in rows)])


def _remark(row: Row) -> str:
    return f"  {row.error or row.worst}".rstrip()


def _cells(row: Row) -> list[str]:
    cells = []
    for field, _, form in _COLUMNS:
        value = getattr(row, field)
        if isinstance(value, bool):
            cells.append("yes" if value else "no")
        else:
            cells.append("-" if value is None else format(value, form))
    return cells


def _line(cells: Sequence[str]) -> str:
    pairs = zip(cells, _COLUMNS, strict=True)
    return " ".join(
        cell.ljust(width) if form == "s" else cell.rjust(width) for cell, (_, width, form) in pairs
    )


def read_rows(path: Path) -> tuple[list[Row], list[Point]]:
    """The rows and the points of a file; none if it does not exist."""
    if not path.exists():
        return [], []
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**row) for row in content["rows"]]
    return rows, [Point(**point) for point in content["points"]]


def merge(old: Sequence[Any], new: Sequence[Any], *keys: str) -> list[Any]:
    """Rows of both, of which the new ones take the places of those with the same keys.

    >>> merge([Row("a", "m", 0), Row("b", "m", 0)], [Row("a", "m", 0, ok=True)], "model")[0].ok
    True
    """
    found = {tuple(getattr(row, key) for key in keys): row for row in [*old, *new]}
    return list(found.values())


def write_json(path: Path, rows: Sequence[Row], points: Sequence[Point]) -> None:
    """Writes rows and points beside those of other models and methods that the file has."""
    old_rows, old_points = read_rows(path)
    content = {
        "machine": machine(),
        "rows": [asdict(row) for row in merge(old_rows, rows, "model", "method", "seed")],
        "points": [asdict(point) for point in merge(old_points, points, "model")],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# The command


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    options = _parse(argv)
    points: list[Point] = []
    if options.curves:
        points = _run_points(options)
    else:
        _run_rows(options)
    if options.plot is not None:
        plot(points or read_rows(options.json)[1], options.plot)


def _run_rows(options: argparse.Namespace) -> None:
    print(_line(_TITLES), flush=True)
    names = options.names or NAMES
    for name, method, seed in itertools.product(names, options.methods, range(options.seeds)):
        if not applies(name, method):
            continue
        job = (name, method, seed, options.time_limit)
        found, error = run_apart(run_row, job, options.process_seconds)
        row = found or Row(name, method, seed, error=error)
        print(_line(_cells(row)) + _remark(row), flush=True)
        if options.json is not None:
            write_json(options.json, [row], [])


def _run_points(options: argparse.Namespace) -> list[Point]:
    points = []
    for name in itertools.chain(*CURVES.values()):
        found, error = run_apart(run_point, (name,), options.process_seconds)
        points.append(found or Point(name, error=error))
        print(points[-1], flush=True)
        if options.json is not None:
            write_json(options.json, [], points)
    return points


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all by default")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds per model and method")
    parser.add_argument("--time-limit", type=float, help="seconds per fit of pyroflows")
    parser.add_argument(
        "--process-seconds", type=float, default=PROCESS_SECONDS, help="seconds per row"
    )
    parser.add_argument("--curves", action="store_true", help="time the curves of cost instead")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    options = parser.parse_args(argv)
    if options.plot is not None and options.json is None and not options.curves:
        parser.error("Expected --json or --curves with --plot; got neither.")
    for name in options.names:
        try:
            split_name(name)
        except ValueError as error:
            parser.error(str(error))
    return options


if __name__ == "__main__":
    main()
