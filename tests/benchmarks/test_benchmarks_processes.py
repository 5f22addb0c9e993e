"""The benchmark of several processes: its costs, its rows and their table, with fits that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import processes as benchmark
from benchmarks.report import several_processes


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made_up(rows: int, count: int) -> dict[str, Any]:
    seconds = 2.0 + rows / 100 / count
    return {
        "seconds": seconds,
        "cpu_seconds": seconds / 2,
        "attempt": "flow",
        "log_evidence": -1.0,
    }


def test_rows_take_the_time_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "milliseconds", lambda rows: 0.5 + rows / 100)
    assert benchmark.rows_for([1.0, 20.5]) == {1.0: 50, 20.5: 2000}


def test_the_table_says_how_many_times_as_fast_several_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        benchmark, "rows_for", lambda costs: {cost: int(100 * cost) for cost in costs}
    )
    monkeypatch.setattr(benchmark, "run", made_up)
    file = tmp_path / "processes.json"
    assert benchmark.main(["--costs", "1,20", "--repeats", "2", "--json", str(file)]) == 0
    results = json.loads(file.read_text(encoding="utf-8"))
    assert [row["processes"] for row in results["rows"]] == [1, 2, 1, 2]
    table = several_processes(results).splitlines()
    assert table[2] == "| 1 | 100 | 3.0 | 2.5 | 1.20 | 1.5 | 1.2 | 1.20 |"
    assert table[3] == "| 20 | 2000 | 22.0 | 12.0 | 1.83 | 11.0 | 6.0 | 1.83 |"


def test_the_model_is_fitted_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[dict[str, Any]] = []

    class Fitted:
        name = "flow"

        class verdict:
            log_evidence = -1.0

    def fit_posterior(model: Any, **options: Any) -> Any:
        fits.append(options)
        return Fitted

    monkeypatch.setattr(benchmark.pf, "fit_posterior", fit_posterior)
    found = benchmark.fit(30)
    assert found["main"] and found["attempt"] == "flow" and len(fits) == 2
