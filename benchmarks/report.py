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
BEGIN, END = "<!-- posteriors -->\n", "<!-- /posteriors -->"


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, medians over seeds.

    Args:
        results: What `python -m benchmarks.posteriors --json FILE` writes.
    """
    lines = [
        "| posterior | method | mean error | sd error | k-hat | ESS/N | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((row["posterior"], row["method"]) for row in results["rows"])
    for posterior, method in keys:
        rows = [row for row in results["rows"] if (row["posterior"], row["method"]) == (posterior, method)]
        name = posterior.split("-")[-1].replace("_", " ")
        if all(row["mean_error"] is None for row in rows):
            lines.append(f"| {name} | {method} | no draws | | | | {_median(rows, 'seconds', '.0f')} |")
            continue
        numbers = [
            _median(rows, key, form)
            for key, form in (
                ("mean_error", ".3f"), ("log_sd_error", ".3f"), ("khat", ".2f"), ("ess", ".2f"), ("seconds", ".0f")
            )
        ]  # fmt: skip
        lines.append(f"| {name} | {method} | " + " | ".join(numbers) + " |")
    return "\n".join(lines) + "\n"


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
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)) + "\n"


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
            own = [r["test"] for r in rows if (r["data"], r["family"], r["library"]) == (data, family, library)]
            if own:
                cells[library] = statistics.median(own), 0.5 * (max(own) - min(own))
        best = max(value for value, _ in cells.values())
        line = [data, family]
        for library in libraries:
            value, spread = cells.get(library, (float("nan"), 0.0))
            text = f"{value:.2f} ± {spread:.2f}" if library in cells else ""
            line.append(f"**{text}**" if value == best else text)
        lines.append(line)
    return _rows(lines)


def speeds(results: dict[str, Any]) -> str:
    """Return CPU milliseconds, and multiples of the floor in brackets.

    Args:
        results: What `python -m benchmarks.speed --json FILE` writes.
    """
    rows = results["rows"]
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    keys = dict.fromkeys((r["family"], r["step"], r["features"], r["batch"], r["hidden"]) for r in rows)
    lines: list[list[object]] = [["family", "step", "D", "batch", "net", *contenders]]
    for key in keys:
        own = {r["contender"]: r for r in rows if (r["family"], r["step"], r["features"], r["batch"], r["hidden"]) == key}
        cells = [own.get(name) for name in contenders]
        lines.append(
            [*key]
            + [
                f"{cell['milliseconds']:.2f} ({cell['ratio']:.1f})" if cell and cell["milliseconds"] is not None else ""
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
        [row["depth"], f"{row['kept_mb']:.1f}", f"{row['recomputed_mb']:.1f}", f"{row['gradient']:.0e}"]
        for row in results["rows"]
    ]
    return _rows([head, *lines])


def page() -> str:
    """Return the page of results as Markdown."""
    stored = {name: json.loads((STORED / f"{name}.json").read_text(encoding="utf-8")) for name in TEXTS}
    parts = [f"{TEXTS[name]}\n{TABLES[name](stored[name])}" for name in TEXTS]
    return "# Results\n\nMade by `python -m benchmarks.report` from `benchmarks/results/`.\n\n" + "\n".join(parts)


TABLES = {"density": densities, "speed": speeds, "memory": memory}
TEXTS = {
    "density": """## Densities

Mean log-likelihood of held-out rows in nats: the median over the seeds and half their range, the best of a line in bold. All
libraries get the same data, batches, optimiser, numbers of steps and layers, and parameters within 5 %; validation chooses
the step size and the checkpoint. `python -m benchmarks.density --data-dir DIR --json benchmarks/results/density.json`
""",
    "speed": """## Speed

Median CPU milliseconds of one step, and in brackets multiples of the floor, the bare networks: `train` is the mean
log-density and its gradient, `score` a sample with its density and their gradients, `sample` a sample. One thread, float32,
five layers, all in turn in one process. `python -m benchmarks.speed --json benchmarks/results/speed.json`
""",
    "memory": """## Memory

Peak bytes of a training step of RealNVP layers (32 features, batch 512), with activations kept and with `reversible=True`.
`python -m benchmarks.memory --json benchmarks/results/memory.json`
""",
}


def main() -> None:
    """Rewrite the README's table and the page from the stored results."""
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))))
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
