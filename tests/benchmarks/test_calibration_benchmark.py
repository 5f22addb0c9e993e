"""The benchmark of calibration, on one data set each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import calibration
from pyroflows.study import SVIFit


def test_the_benchmark_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = SVIFit(calibration.METHODS["AutoNormal"].guide, steps=3)
    monkeypatch.setitem(calibration.METHODS, "AutoNormal", short)
    arguments = ["--methods", "AutoNormal", "--folder", str(tmp_path), "--workers", "1"]
    numbers = tmp_path / "numbers.json"
    for count in ("2", "3"):
        code = calibration.main([*arguments, "--data-sets", count, "--json", str(numbers)])
        found = json.loads(numbers.read_text())["AutoNormal"]
        assert found["fits"] == int(count) and code == (0 if found["passed"] else 1)
    assert (tmp_path / "calibration_AutoNormal.pt").exists() and "tau" in found["table"]
