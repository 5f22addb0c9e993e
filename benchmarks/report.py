"""Puts stored results into the README and into the page of results: `python -m benchmarks.report`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results"
RESULTS = STORED / "posteriors.json"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
ERRORS = (("mean_error", ".3f"), ("log_sd_error", ".3f"))
BEGIN, END = "<!-- posteriors -->\n", "<!-- /posteriors -->"


def table(results: dict[str, Any]) -> str:
    """Return pyroflows beside NumPyro's NUTS and the time of Pyro's, a line a posterior, medians over seeds.

    Args:
        results: What `python -m benchmarks.posteriors --json FILE` writes.
    """
    head = ["posterior", "mean error", "sd error", "ESS/N", "CPU s"]
    peers = ["NumPyro mean error", "sd error", "CPU s", "Pyro NUTS to ESS 1000, CPU s"]
    lines: list[list[str]] = [head + peers]
    for posterior in dict.fromkeys(row["posterior"] for row in results["rows"]):
        ours, numpyros, pyros = (
            [
                row
                for row in results["rows"]
                if (row["posterior"], row["method"]) == (posterior, method)
            ]
            for method in ("pyroflows", "NumPyro NUTS", "NUTS to 1000")
        )
        lines.append(
            [_name(posterior)]
            + [
                _median(ours, key, form)
                for key, form in (*ERRORS, ("ess", ".2f"), ("seconds", ".1f"))
            ]
            + [_median(numpyros, key, form) for key, form in (*ERRORS, ("seconds", ".1f"))]
            + [_bound(pyros) + _median(pyros, "seconds", ".0f")]
        )
    return _rows(lines)


def posteriors(results: dict[str, Any]) -> str:
    """Return all methods on all posteriors, medians over seeds.

    Args:
        results: What `python -m benchmarks.posteriors --json FILE` writes.
    """
    lines: list[list[str]] = [
        ["posterior", "method", "seeds", "mean error", "sd error", "k-hat", "ESS/N", "CPU s"]
    ]
    for posterior, method in dict.fromkeys(
        (row["posterior"], row["method"]) for row in results["rows"]
    ):
        rows = [
            row
            for row in results["rows"]
            if (row["posterior"], row["method"]) == (posterior, method)
        ]
        numbers = [
            _median(rows, key, form) for key, form in (*ERRORS, ("khat", ".2f"), ("ess", ".2f"))
        ]
        lines.append(
            [
                _name(posterior),
                method,
                str(len(rows)),
                *numbers,
                _bound(rows) + _median(rows, "seconds", ".1f"),
            ]
        )
    return _rows(lines)


def adversaries(results: dict[str, Any]) -> str:
    """Return what the verdict said of densities with known moments, a line a density, and the table of confusion.

    Args:
        results: What `python -m benchmarks.adversarial --json FILE` writes.
    """
    rows = results["rows"]
    lines: list[list[str]] = [
        [
            "density",
            "fits",
            "right",
            "verdict ok",
            "ok and wrong",
            "mean error",
            "sd error",
            "CPU s",
        ]
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        counts = [len(own), *(sum(map(bool, flags)) for flags in _flags(own))]
        lines.append(
            [
                name.replace("_", " "),
                *map(str, counts),
                *(_median(own, k, f) for k, f in (*ERRORS, ("seconds", ".1f"))),
            ]
        )
    right, ok, lies = (sum(map(bool, flags)) for flags in _flags(rows))
    confusion = [
        ["", "verdict ok", "verdict not ok"],
        ["right", str(ok - lies), str(right - ok + lies)],
        ["wrong", str(lies), str(len(rows) - right - lies)],
    ]
    return _rows(lines) + "\n" + _rows(confusion)


def real_models(results: dict[str, Any]) -> str:
    """Return how the fits of Pyro's own examples came out, a line a model.

    Args:
        results: What `python -m benchmarks.real_models --json FILE` writes.
    """
    rows = results["rows"]
    head = ["model", "latents", "fits", "right and trusted", "trusted and wrong", "mean error"]
    lines = [[*head, "sd error", "s", "s late"]]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        trusted = [row for row in own if row["ok"]]
        counts = [len(own), *(sum(row["right"] is r for row in trusted) for r in (True, False))]
        late = max(row["late"] for row in own)
        lines.append(
            [
                name.replace("_", " "),
                str(own[0]["features"]),
                *map(str, counts),
                *(_median(own, k, f) for k, f in (*ERRORS, ("seconds", ".1f"))),
                f"{late:.1f}",
            ]
        )
    return _rows(lines)


def _flags(rows: list[dict[str, Any]]) -> tuple[list[bool], list[bool], list[bool]]:
    """Of each fit, whether it is right, whether the verdict is ok, and whether that is a lie."""
    return (
        [r["right"] for r in rows],
        [r["ok"] for r in rows],
        [r["ok"] and not r["right"] for r in rows],
    )


def _name(posterior: str) -> str:
    return posterior.split("-")[-1].replace("_", " ")


def _bound(rows: list[dict[str, Any]]) -> str:
    """How to read the seconds: measured, extrapolated (~), or more than these (>)."""
    bounds = {row.get("bound", "") for row in rows}
    return ">" if ">" in bounds else "~" if "~" in bounds else ""


def _median(rows: Iterable[dict[str, Any]], key: str, form: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return format(statistics.median(values), form) if values else ""


def with_table(readme: str, results: dict[str, Any]) -> str:
    """Return the README with its table of posteriors made anew."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(results) + END + rest.split(END)[1]


def _rows(lines: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table, its first line the head."""
    head, *body = [[str(cell) for cell in line] for line in lines]
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)) + "\n"
    )


def densities(results: dict[str, Any]) -> str:
    """Return test log-likelihoods, medians over seeds and half their range, the best of a line in bold.

    Args:
        results: What `python -m benchmarks.density --json FILE` writes.
    """
    rows = [row for row in results["rows"] if row["test"] is not None]
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    lines: list[list[str]] = [["data", "family", *libraries]]
    for data, family in dict.fromkeys((row["data"], row["family"]) for row in rows):
        cells: dict[str, tuple[float, float]] = {}
        for library in libraries:
            own = [
                r["test"]
                for r in rows
                if (r["data"], r["family"], r["library"]) == (data, family, library)
            ]
            if own:
                cells[library] = statistics.median(own), 0.5 * (max(own) - min(own))
        best = max(value for value, _ in cells.values())
        line = [data, family]
        for library in libraries:
            value, spread = cells.get(library, (float("nan"), 0.0))
            text = f"{value:.2f} ± {spread:.2f}" if library in cells else ""
            line.append(f"**{text}**" if value == best else text)
        lines.append(line)
    return f"{_rows(lines)}\n{DENSITY_COSTS}\n{_rows(_density_costs(rows, libraries))}"


def _density_costs(rows: list[dict[str, Any]], libraries: list[str]) -> list[list[str]]:
    lines = [["family", *libraries]]
    for family in dict.fromkeys(row["family"] for row in rows):
        line = [family]
        for library in libraries:
            own = [r for r in rows if (r["family"], r["library"]) == (family, library)]
            epoch, draws = (
                statistics.median(r[what] for r in own if r[what] is not None)
                for what in ("epoch_seconds", "sample_ms")
            )
            line.append(f"{epoch:.2f}, {draws:.0f}, {sum(r['nans'] for r in own if r['nans'])}")
        lines.append(line)
    return lines


def speeds(results: dict[str, Any]) -> str:
    """Return CPU milliseconds, and multiples of the floor in brackets.

    Args:
        results: What `python -m benchmarks.speed --json FILE` writes.
    """
    rows = results["rows"]
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    keys = dict.fromkeys(
        (r["family"], r["step"], r["features"], r["batch"], r["hidden"]) for r in rows
    )
    lines: list[list[object]] = [["family", "step", "D", "batch", "net", *contenders]]
    for key in keys:
        own = {
            r["contender"]: r
            for r in rows
            if (r["family"], r["step"], r["features"], r["batch"], r["hidden"]) == key
        }
        cells = [own.get(name) for name in contenders]
        lines.append(
            [*key]
            + [
                f"{cell['milliseconds']:.2f} ({cell['ratio']:.1f})"
                if cell and cell["milliseconds"] is not None
                else ""
                for cell in cells
            ]
        )
    return _rows(lines)


def memory(results: dict[str, Any]) -> str:
    """Return peak megabytes against depth.

    Args:
        results: What `python -m benchmarks.memory --json FILE` writes.
    """
    head = ["layers", "activations kept, MB", "recomputed, MB", "gradients differ by"]
    lines = [
        [
            row["depth"],
            f"{row['kept_mb']:.1f}",
            f"{row['recomputed_mb']:.1f}",
            f"{row['gradient']:.0e}",
        ]
        for row in results["rows"]
    ]
    return _rows([head, *lines])


def several_processes(results: dict[str, Any]) -> str:
    """Return seconds of fits by one process and by several, and how many times as fast these are.

    Args:
        results: What `python -m benchmarks.processes --json FILE` writes.
    """
    rows = results["rows"]
    counts = list(dict.fromkeys(row["processes"] for row in rows))
    told = {"seconds": "wall-clock s", "cpu_seconds": "CPU s of the main process"}
    head = ["an evaluation, ms", "rows"]
    for what in told.values():
        head += [f"{what}, {_count(count)}" for count in counts] + ["times as fast"]
    lines: list[list[object]] = [head]
    for cost in dict.fromkeys(row["milliseconds"] for row in rows):
        own = {row["processes"]: row for row in rows if row["milliseconds"] == cost}
        line: list[object] = [f"{cost:g}", own[counts[0]]["rows"]]
        for key in told:
            seconds = [own[count][key] for count in counts]
            gain = f"{seconds[0] / seconds[-1]:.2f}"
            line += [f"{value:.1f}" for value in seconds] + [gain]
        lines.append(line)
    setting = results["machine"]
    load = f"Load of the {setting['processors']} processors before the run: {setting['load']:.1f}."
    return f"{_rows(lines)}\n{load}\n"


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


SCALE = (
    ("seconds", ".1f"),
    ("mean_error", ".3f"),
    ("log_sd_error", ".3f"),
    ("evidence_error", ".3f"),
    ("ess", ".2f"),
    ("memory", ".0f"),
)


def scale(results: dict[str, Any]) -> str:
    """Return pyroflows beside its peers on large models, a line a model, and the curves of cost.

    Args:
        results: What `python -m benchmarks.scale --json FILE` writes.
    """
    head = ["model", "latents", "rows", "CPU s", "mean error", "sd error", "evidence error"]
    head += ["ESS/N", "MB", "ok", "NUTS, CPU s to ESS 1000", "NUTS mean error", *GUIDES]
    lines = [head]
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["model"] == model]
        ours = _of_method(rows, "pyroflows")
        nuts = _of_method(rows, "NumPyro NUTS", "NumPyro NUTS, non-centred")
        nuts = [min(nuts, key=lambda row: row["seconds_to_target"])] if nuts else []
        oks = [row["ok"] for row in ours]
        guides = [_median(_of_method(rows, name), "mean_error", ".2f") for name in GUIDES]
        lines.append(
            [
                model.replace("_", " "),
                *(str(rows[0][key]) for key in ("latents", "rows")),
                *(_median(ours, key, form) for key, form in SCALE),
                f"{sum(oks)} of {len(oks)}" if oks else "",
                _to_target(nuts),
                _median(nuts, "mean_error", ".3f"),
                *guides,
            ]
        )
    return f"{_rows(lines)}\n{SCALE_COSTS}\n{_rows(_scale_costs(results['points']))}"


def _to_target(rows: list[dict[str, Any]]) -> str:
    """CPU seconds to the effective sample size, and in brackets those with compilation."""
    if not rows:
        return ""
    (row,) = rows
    compilation = row["seconds"] - row["compiled_seconds"]
    return f"{row['seconds_to_target']:.1f} ({row['seconds_to_target'] + compilation:.1f})"


def _of_method(rows: list[dict[str, Any]], *methods: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["method"] in methods and not row["error"]]


def _scale_costs(points: list[dict[str, Any]]) -> list[list[str]]:
    lines = [["model", "latents", "rows", "gradient, ms", "marginal, ms", "until then, s", "MB"]]
    for point in points:
        sizes = [str(point[key]) for key in ("latents", "rows")]
        costs = [
            _median([point], key, form)
            for key, form in (
                ("gradient", ".3f"),
                ("marginal", ".3f"),
                ("preparation", ".1f"),
                ("memory", ".0f"),
            )
        ]
        lines.append([point["model"].replace("_", " "), *sizes, *costs])
    return lines


def page() -> str:
    """Return the page of results as Markdown."""
    stored = {
        name: json.loads((STORED / f"{name}.json").read_text(encoding="utf-8")) for name in TEXTS
    }
    parts = [f"{TEXTS[name]}\n{TABLES[name](stored[name])}" for name in TEXTS]
    return (
        "# Results\n\nMade by `python -m benchmarks.report` from `benchmarks/results/`.\n\n"
        + "\n".join(parts)
    )


DENSITY_COSTS = """
CPU seconds of an epoch and milliseconds for 1000 draws (medians over the tables and seeds), and how many of all steps,
test rows and draws were not finite:
"""
GUIDES = ("AutoNormal", "AutoLowRankMultivariateNormal", "AutoStructured")
SCALE_COSTS = """
CPU milliseconds of the joint log density and its gradient at one point, and of one value of the marginal density of the
globals; CPU seconds of what comes before:
"""
TABLES = {
    "posteriors": posteriors,
    "adversarial": adversaries,
    "real_models": real_models,
    "scale": scale,
    "density": densities,
    "speed": speeds,
    "memory": memory,
    "processes": several_processes,
}
TEXTS = {
    "posteriors": """## Posteriors

Largest error over all parameters against posteriordb's reference draws, in reference standard deviations (mean) and as a log
ratio of standard deviations (sd); medians over the seeds. One thread, float64. Pyro's guides and `NUTS` had the CPU seconds
of an earlier version of pyroflows; `NUTS to 1000` is the time that Pyro's NUTS needs to a bulk ESS of 1000 in its worst
parameter, measured, extrapolated (~) or beyond what it was given (>).
`python -m benchmarks.posteriors --db DIR --models all --json benchmarks/results/posteriors.json`
""",
    "adversarial": """## Densities that a fit may get wrong

Right: no moment off by more than 0.2 standard deviations, no mode above 2 % lost, and the log evidence within 0.05 where it
is known. `python -m benchmarks.adversarial --json benchmarks/results/adversarial.json`
""",
    "real_models": """## Real models

Models of Pyro's examples and tutorials, written anew on small simulated data, fitted with defaults under a limit of two
minutes of wall-clock time. Right: no mean off by more than 0.2 standard deviations, no standard deviation by more than a
fifth, against closed forms, long chains or weighted draws of the prior.
`python -m benchmarks.real_models --json benchmarks/results/real_models.json`
""",
    "scale": """## Large models

Largest error over the globals on the unconstrained scale, in right standard deviations (mean) and
as a log ratio of standard deviations (sd), and the error of the log evidence, against closed forms,
quadrature or long chains, on data simulated from known parameters. One thread, float32; CPU seconds
with compilation for pyroflows. NumPyro's NUTS is jitted, two chains of 500 draws after 500 of
warm-up, of the model as it is written or non-centred, whichever was sooner: CPU seconds to an
effective sample size of 1,000 of the worst global, without compilation and, in brackets, with it.
The last columns are mean errors of Pyro's guides after 2,000 steps.
`python -m benchmarks.scale --json benchmarks/results/scale.json`, once more with `--curves`
""",
    "density": """## Densities

Mean log-likelihood of held-out rows in nats: the median over the seeds and half their range, the best of a line in bold. All
libraries get the same data, batches, optimiser, numbers of steps and layers, and parameters within 5 %; validation chooses
the step size and the checkpoint. `python -m benchmarks.density --data-dir DIR --json benchmarks/results/density.json`
""",
    "speed": """## Speed

Median CPU milliseconds of one step, and in brackets multiples of the floor, the bare networks: `train` is the mean
log-density and its gradient, `score` a sample with its density and their gradients, `sample` a sample. `layers alone` are
pyroflows' without the linear maps that its flows have between them. One thread, float32, five layers, all in turn in one
process; what takes more than five seconds a step is left out, and so is the compiler but for one size.
`python -m benchmarks.speed --json benchmarks/results/speed.json`
""",
    "memory": """## Memory

Peak bytes of a training step of RealNVP layers (32 features, batch 512), with activations kept and with `reversible=True`.
`python -m benchmarks.memory --json benchmarks/results/memory.json`
""",
    "processes": """## Several processes

A whole fit of a regression on so many rows that an evaluation of its density and gradient at 256 points takes a given time,
by one process and by several under `torchrun`, in turn, one thread each; libraries are loaded before. CPU seconds of the
main process tell what several gain where other work on the machine slows the clock.
`python -m benchmarks.processes --json benchmarks/results/processes.json`
""",
}


def main() -> None:
    """Rewrite the README's table and the page from the stored results."""
    readme = ROOT / "README.md"
    readme.write_text(
        with_table(
            readme.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))
        )
    )
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
