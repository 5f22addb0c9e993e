"""What the README says is true: its code runs, and its numbers are those of the stored benchmark."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


@pytest.mark.slow
def test_the_examples_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 9
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["posterior"].verdict.ok
    assert names["thetas"].shape == (10, 8)


def test_the_table_is_that_of_the_stored_results():
    from benchmarks import report

    text = README.read_text(encoding="utf-8")
    results = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert report.with_table(text, results) == text


def test_the_first_posteriors_reach_what_is_claimed():
    results = json.loads((ROOT / "benchmarks" / "results" / "posteriors.json").read_text(encoding="utf-8"))
    rows = [row for row in results["rows"] if row["method"] == "pyroflows" and "eight_schools" in row["posterior"]]
    assert len(rows) == 6
    for row in rows:
        assert row["mean_error"] < 0.05
        assert row["log_sd_error"] < 0.07
        assert row["ess"] > 0.85
        assert row["seconds"] <= 25


def test_the_page_of_laws_is_what_the_classes_say():
    from benchmarks import laws

    assert laws.PAGE.read_text(encoding="utf-8") == laws.page()


def test_the_page_of_results_is_that_of_the_stored_results():
    from benchmarks import report

    assert report.PAGE.read_text(encoding="utf-8") == report.page()
