"""Puts the results of a benchmark into the README: `python -m benchmarks.report`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "posteriors.json"
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


def main() -> None:
    """Rewrite the README's table from the stored results."""
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
