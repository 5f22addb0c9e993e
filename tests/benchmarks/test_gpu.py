"""The GPU script, run on the CPU with small sizes."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.device_tests import InTime
from benchmarks.gpu import main, run_part, table
from benchmarks.gpu_parts import PARTS, READY_MADE, SMALL, Row, Task, attempt
from benchmarks.waits import waits

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_command_measures_tells_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    assert main(["--device", "cpu", "--flows", "NICE,MAF", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["machine"]["torch"] and document["machine"]["device"] == "cpu"
    rows = [Row(**row) for row in document["rows"]]
    assert {row.part for row in rows} == {*PARTS, "sources"}
    assert not [row for row in rows if row.value is None]
    values = {(row.part, row.subject, row.quantity): row.value or 0.0 for row in rows}
    for name in ("NICE", "MAF"):
        assert values["steps", name, "16"] > 0 and values["bf16", name, "ms"] > 0
        assert values["memory", name, "16"] > 0 and 0 < values["kernels", name, "16"] <= 1
        assert abs(values["bf16", name, "loss"]) < 0.1
    # Couplings never wait; an autoregressive flow looks whether its equations are solved.
    assert [values["waits", "NICE", what] for what in ("forward", "inverse", "sample")] == [0, 0, 0]
    assert values["waits", "MAF", "forward"] > 0 == values["waits", "MAF", "inverse"]
    lines = {row.subject for row in rows if row.part == "sources"}
    assert any(line.startswith("pyroflows/transforms/autoregressive.py:") for line in lines)
    assert values["tests", "all", "passed"] == SMALL.tests and not values["tests", "all", "failed"]
    out = capsys.readouterr().out
    assert table(rows) in out and "\nNICE " in out and "\nMAF " in out


def test_every_ready_made_flow_is_measured() -> None:
    task = Task(CPU, SMALL, tuple(READY_MADE), 60.0)
    rows: list[Row] = []
    PARTS["memory"][0](task, rows.append)
    assert len(READY_MADE) == 17 and "Flow" not in READY_MADE
    assert [row.subject for row in rows] == list(READY_MADE)
    assert not [row for row in rows if row.note]


@pytest.mark.parametrize(
    ("part", "seconds", "note"),
    [
        ("steps", 0.0, "stopped after 0 s"),
        pytest.param("no such part", 60.0, "ended with code 1", marks=pytest.mark.slow),
    ],
)
def test_a_part_that_does_not_end_well_is_a_row(part: str, seconds: float, note: str) -> None:
    assert run_part(part, Task(CPU, SMALL, ("NICE",), seconds)) == [
        Row(part, "all", "part", note=note)
    ]


def test_what_cannot_be_measured_is_a_row() -> None:
    def fails() -> float:
        raise RuntimeError("out of memory\nTried to allocate")

    rows: list[Row] = []
    for measure in (fails, lambda: math.nan, lambda: 2):
        attempt(rows.append, Row("steps", "NICE", "16"), measure)
    assert [(row.value, row.note) for row in rows] == [
        (None, "RuntimeError: out of memory"),
        (None, "the value is nan"),
        (2.0, ""),
    ]
    assert table(rows).splitlines()[2].split() == ["NICE", "2"]


def test_waits_are_what_reads_values() -> None:
    x = torch.randn(5, requires_grad=True)
    y = x.detach()
    with waits(CPU) as found:
        (x.exp()[:3] @ x[torch.arange(3)]).backward()
    assert not found
    with waits(CPU) as found:
        float(y.sum())
        bool((y > 0).any())
        y[y > 0].sum()
    assert found.total() == 3
    assert all(line.startswith("tests/benchmarks/test_gpu.py:") for line in found)


def test_waits_on_a_gpu_are_those_of_which_torch_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits(torch.device("cuda")) as found:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", 0] and list(found.values()) == [2]
    assert next(iter(found)).startswith("tests/benchmarks/test_gpu.py:")


@pytest.mark.parametrize("option", ["--parts", "--flows", "--device"])
def test_unknown_names_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option, "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


# The plugin that runs the tests marked `device`


def item(nodeid: str) -> Any:
    return SimpleNamespace(nodeid=nodeid, session=SimpleNamespace(shouldstop=False))


def test_placement_goes_first_and_then_each_test_in_turn() -> None:
    names = ["a.py::test_x[1]", "a.py::test_x[2]", "b.py::test_y[1]", "b.py::test_places_itself[1]"]
    plugin = InTime(Task(CPU, SMALL, (), 60.0), lambda row: None)
    items = [item(name) for name in names]
    plugin.pytest_collection_modifyitems(items)
    assert [one.nodeid for one in items] == [names[3], names[0], names[2], names[1]]
    assert plugin.chosen == 4


@pytest.mark.parametrize(("seconds", "stops"), [(0.0, True), (60.0, False)])
def test_the_run_ends_in_time(seconds: float, stops: bool) -> None:
    plugin, test = InTime(Task(CPU, SMALL, (), seconds), lambda row: None), item("a.py::test_x")
    assert len(list(plugin.pytest_runtest_protocol(test))) == 1
    assert bool(test.session.shouldstop) is stops


def test_outcomes_are_counted_and_failures_told() -> None:
    rows: list[Row] = []
    plugin = InTime(Task(CPU, SMALL, (), 60.0), rows.append)
    for when, outcome in (("setup", "passed"), ("call", "failed"), ("teardown", "passed")):
        failed = outcome == "failed"
        crash = SimpleNamespace(message="assert 1 == 2\n + where")
        report: Any = SimpleNamespace(
            nodeid="a.py::test_x",
            when=when,
            outcome=outcome,
            failed=failed,
            longrepr=SimpleNamespace(reprcrash=crash),
        )
        plugin.pytest_runtest_logreport(report)
    assert plugin.outcomes == {"failed": 1}
    assert rows == [Row("tests", "a.py::test_x", "failed", note="assert 1 == 2")]
