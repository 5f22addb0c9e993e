"""Estimates of memory, before any of it is allocated."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroflows import _machine
from pyroflows._machine import free_memory
from pyroflows.model import LogDensity, memory
from pyroflows.model.structure import find_structure


def model(y: torch.Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def test_too_little_memory_is_told_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    density = LogDensity(model, (torch.zeros(50),))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    monkeypatch.setattr("pyroflows.model.structure.DoubleDensity", None)
    with pytest.raises(ValueError, match="GB of free memory for the structure of 51 latent"):
        find_structure(density)


def test_unknown_memory_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    memory.check_memory(LogDensity(model, (torch.zeros(50),)))


def test_the_estimate_grows_with_entries_and_rows() -> None:
    few, many = (LogDensity(model, (torch.zeros(n),)) for n in (10, 1000))
    assert memory.estimate_memory(many) > 50 * memory.estimate_memory(few)


def test_a_container_may_leave_less(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    usual = free_memory(torch.device("cpu"))
    assert usual is not None
    assert usual > 1e7
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert free_memory(torch.device("cpu")) == 3000


def test_a_machine_that_tells_little(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "GROUP", tmp_path)
    monkeypatch.setattr(_machine, "MEMINFO", tmp_path / "none")
    assert free_memory(torch.device("cpu"))
    monkeypatch.delattr("os.sysconf")
    assert free_memory(torch.device("cpu")) is None
