"""What a GPU makes of pyroflows: run `python -m benchmarks.gpu`; it ends within eight minutes.

Each part (`benchmarks.gpu_parts`) runs in a process of its own and for a limited time, so that one that
fails, hangs or crashes costs its own rows only:

- `steps`: milliseconds of a training step (forward, backward, Adam), beside Zuko's and normflows' where
  they are installed;
- `waits`: how often the host waits for the device, and at which line of source;
- `kernels`: the share of a training step's time in which kernels run;
- `memory`: the peak megabytes of a training step, beyond parameters, data and the optimiser's state;
- `bf16`: the loss under bfloat16 autocast less that in float32, and milliseconds of a training step;
- `tests`: the tests marked `device`, in what is left of the time.

Without a GPU all parts run on the CPU with small sizes, and an operation counts as a wait if it would be
one on a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.density import versions
from benchmarks.gpu_parts import FULL, PARTS, READY_MADE, SMALL, Row, Sizes, Task
from benchmarks.posteriors import machine

# Running the parts


def run_part(name: str, task: Task) -> list[Row]:
    """Run a part in a process of its own; a row says so where it does not end well.

    Args:
        name: A name in `PARTS`.
        task: The task; the process is ended when its seconds are over.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, task, theirs))
    end = time.perf_counter() + task.seconds
    process.start()
    theirs.close()
    rows: list[Row] = []
    note = f"stopped after {task.seconds:.0f} s"
    try:
        while ours.poll(max(0.0, end - time.perf_counter())):
            rows.append(ours.recv())
    except EOFError:
        process.join()
        note = f"ended with code {process.exitcode}" if process.exitcode else ""
    finally:
        process.kill()
        process.join()
    return [*rows, Row(name, "all", "part", note=note)] if note else rows


def _work(name: str, task: Task, connection: Connection) -> None:
    """What the process of a part does."""
    if task.device.type == "cpu":
        torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of itself
    run, _ = PARTS[name]
    run(task, connection.send)


def run(
    parts: Sequence[str],
    device: torch.device,
    sizes: Sizes,
    flows: Sequence[str],
    report: Callable[[str, list[Row]], None] = lambda name, rows: None,
) -> list[Row]:
    """Run parts one after another.

    Args:
        parts: Names in `PARTS`.
        device: Where.
        sizes: How much.
        flows: Names in `READY_MADE`.
        report: Called with the rows of each part as it is done.

    Returns:
        All rows.
    """
    end = time.perf_counter() + sizes.seconds
    rows: list[Row] = []
    for name in parts:
        seconds = min(PARTS[name][1], max(1.0, end - time.perf_counter()))
        made = run_part(name, Task(device, sizes, tuple(flows), seconds))
        report(name, made)
        rows += made
    return rows


# The table and the JSON


def columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return part and quantity of the table's columns, in the order of `PARTS`."""
    found = dict.fromkeys((row.part, row.quantity) for row in rows if row.subject in READY_MADE)
    return sorted(found, key=lambda column: list(PARTS).index(column[0]))


def table(rows: Sequence[Row]) -> str:
    """Format rows as a table with a line for each flow, then what is told of other things.

    Args:
        rows: The rows.
    """
    values = {(row.subject, row.part, row.quantity): row for row in rows}
    shown = columns(rows)
    lines = [["", *(part for part, _ in shown)], ["flow", *(quantity for _, quantity in shown)]]
    for name in dict.fromkeys(row.subject for row in rows if row.subject in READY_MADE):
        lines.append([name, *(_cell(values.get((name, *column))) for column in shown)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join([*(_line(line, widths) for line in lines), *_remarks(rows)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = [f"{cell:>{width}s}" for cell, width in zip(cells, widths, strict=True)]
    return "  ".join([f"{first.strip():{widths[0]}s}", *rest])


def _cell(row: Row | None) -> str:
    if row is None or row.value is None:
        return "-" if row is None else "failed"
    if row.part == "kernels":
        return f"{row.value:.0%}"
    return f"{row.value:.3g}"


def _remarks(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        named = f"{row.part} {row.subject} {row.quantity}"
        if row.value is None:
            lines.append(f"{named}: {row.note}")
        elif row.subject not in READY_MADE and row.part != "sources":
            lines.append(f"{named}: {row.value:g}")
    return lines + _sources(rows)


def _sources(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each line that waits, the worst first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.part == "sources":
            found.setdefault(row.subject, []).append(row)
    totals = {line: sum(row.value or 0.0 for row in own) for line, own in found.items()}
    sentences = []
    for line in sorted(totals, key=totals.__getitem__, reverse=True):
        where = ", ".join(row.quantity for row in found[line])
        sentences.append(f"waits at {line}: {totals[line]:g} ({where})")
    return sentences


def document(rows: Sequence[Row], device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Return what the JSON holds: machine, sizes and rows.

    Args:
        rows: The rows.
        device: Where they are from.
        sizes: How much was asked for.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    place = {"device": str(device), "device_name": name, "cuda": torch.version.cuda}
    return {
        "machine": machine() | versions() | place | {"dtype": "torch.float32"},
        "sizes": asdict(sizes),
        "rows": [asdict(row) for row in rows],
    }


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write the results.

    Args:
        path: The file.
        content: What `document` returns.
    """
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there, help=f"where to run (default: {there})")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts, by commas (default: all)")
    parser.add_argument(
        "--flows", default=",".join(READY_MADE), help="ready-made flows, by commas (default: all)"
    )
    parser.add_argument(
        "--small", action="store_true", help="small sizes, which are the default on a CPU"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the results, rewritten after every part"
    )
    return parser


def chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    """Return names given by commas.

    Args:
        text: The names.
        known: The names that there are.
        what: The option.

    Raises:
        ValueError: If one is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(known):
        raise ValueError(f"Expected {what} to be among {', '.join(known)}; got {text!r}.")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark's command.

    Args:
        argv: The command's arguments; None takes the process's own.

    Returns:
        0; 1 where a test failed, 2 where the arguments are wrong.
    """
    args = _parser().parse_args(argv)
    try:
        device = torch.device(args.device)
        parts = chosen(args.parts, list(PARTS), "--parts")
        flows = chosen(args.flows, list(READY_MADE), "--flows")
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = SMALL if args.small or device.type == "cpu" else FULL
    done: list[Row] = []

    def report(name: str, rows: list[Row]) -> None:
        done.extend(rows)
        print(f"{name}: {len(rows)} rows, {sum(row.value is None for row in rows)} without a value")
        if args.json:
            write_json(args.json, document(done, device, sizes))

    rows = run(parts, device, sizes, flows, report)
    print(table(rows))
    return int(any(row.part == "tests" and row.quantity == "failed" and row.value for row in rows))


if __name__ == "__main__":
    sys.exit(main())
