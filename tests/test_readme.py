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
    assert len(blocks) == 15
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


def test_the_posteriors_reach_what_is_claimed():
    results = json.loads(
        (ROOT / "benchmarks" / "results" / "posteriors.json").read_text(encoding="utf-8")
    )
    rows = [row for row in results["rows"] if row["method"] == "pyroflows"]
    assert len(rows) == 3 * 14
    for row in rows:
        assert row["mean_error"] < 0.1
        assert row["log_sd_error"] < 0.1
        assert row["ok"]
    schools = [row for row in rows if "eight_schools" in row["posterior"]]
    assert len(schools) == 6
    for row in schools:
        assert row["mean_error"] < 0.05
        assert row["log_sd_error"] < 0.07
        assert row["seconds"] <= 25
    assert sum(row["ess"] > 0.9 for row in rows) >= 0.8 * len(rows)


def test_no_verdict_is_a_lie():
    results = json.loads(
        (ROOT / "benchmarks" / "results" / "adversarial.json").read_text(encoding="utf-8")
    )
    assert not [row["model"] for row in results["rows"] if row["ok"] and not row["right"]]
    assert sum(row["ok"] for row in results["rows"]) >= 0.5 * len(results["rows"])


def test_the_page_of_laws_is_what_the_classes_say():
    from benchmarks import laws

    assert laws.PAGE.read_text(encoding="utf-8") == laws.page()


def test_the_page_of_results_is_that_of_the_stored_results():
    from benchmarks import report

    assert report.PAGE.read_text(encoding="utf-8") == report.page()
