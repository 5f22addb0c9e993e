"""Runs the tests marked `device` within a limited time, for `python -m benchmarks.gpu`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu_parts import Row, Send, Task

ROOT = Path(__file__).resolve().parent.parent
#: Tests that go before all others: every transform and flow lives where it is put.
PLACEMENT = ("test_places_itself", "test_is_made_in_place", "test_it_runs_where_it_is_told")


def run(task: Task, send: Send) -> None:
    """Run the tests marked `device`, and send how many passed, failed, and were not reached in time.

    Args:
        task: The task.
        send: Takes the rows.
    """
    plugin = InTime(task, send)
    options = ["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider"]
    chosen = ["-m", "device and not slow", "-k", task.device.type, "--rootdir", str(ROOT)]
    paths = [str(ROOT / path) for path in task.sizes.paths]
    code = pytest.main([*options, *chosen, *paths], plugins=[plugin])
    for outcome in ("passed", "failed", "skipped"):
        send(Row("tests", "all", outcome, plugin.outcomes[outcome]))
    send(Row("tests", "all", "not reached", plugin.chosen - plugin.outcomes.total()))
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        send(Row("tests", "all", "run", note=f"pytest ended with code {int(code)}"))


class InTime:
    """A plugin of pytest: orders the tests, tells of failures, and ends the run in time.

    The tests of placement go first; of all others the first case of each, then the second, and so on.

    Args:
        task: The task.
        send: Takes a row for each failure.
    """

    def __init__(self, task: Task, send: Send) -> None:
        self.end = time.perf_counter() + 0.9 * task.seconds
        self.most, self.send = task.sizes.tests, send
        self.chosen = 0
        self.outcomes: Counter[str] = Counter()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the tests, and keep as many as are wanted."""
        turns: Counter[str] = Counter()

        def turn(item: pytest.Item) -> int:
            function = item.nodeid.split("[")[0]
            turns[function] += 1
            return 0 if function.endswith(PLACEMENT) else turns[function]

        items.sort(key=turn)
        del items[self.most :]
        self.chosen = len(items)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Let the test run; stop after it if the time is up."""
        yield
        if time.perf_counter() > self.end:
            item.session.shouldstop = "the time is up"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count outcomes: that of the call, or of a setup or teardown that did not pass."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.outcomes[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = (crash.message if crash else report.longreprtext).strip().splitlines()
            self.send(Row("tests", report.nodeid, "failed", note=(lines or [""])[0][:200]))
