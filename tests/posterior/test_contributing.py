"""The check and the rung of CONTRIBUTING.md: each is written in ten lines, and nothing else needs
to know of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows._deadline import Deadline
from pyroflows.model import LogDensity
from pyroflows.posterior import checks, ladder
from pyroflows.posterior.climb import Climb, climb_ladder

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
CHECK, RUNG = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def banana() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x[0] + (2 * x[1]).exp(), 0.2), obs=torch.tensor(1.0))


@pytest.fixture
def lists() -> Iterator[None]:
    """The lists of checks and rungs, as they were before."""
    before = list(checks.CHECKS), list(ladder.LADDER)
    yield
    checks.CHECKS[:], ladder.LADDER[:] = before


@pytest.mark.parametrize("code", [CHECK, RUNG])
def test_each_is_ten_lines(code: str) -> None:
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


@pytest.mark.usefixtures("lists")
def test_the_check_is_among_the_findings(tmp_path: Path) -> None:
    exec(CHECK, {**vars(checks)})
    posterior = pf.fit_posterior(banana, steps=0, progress=False)
    finding = posterior.verdict.finding("range")
    assert finding is not None
    assert (finding.status, finding.limit) == ("held", 1e6)
    assert finding.sentence.startswith("unconstrained draws reach")
    assert posterior.to_arviz(10).attrs["check_range"] == "held"
    posterior.save(tmp_path / "p.pt")
    assert pf.load_posterior(tmp_path / "p.pt", banana).verdict.finding("range") == finding


@pytest.mark.usefixtures("lists")
def test_the_posterior_of_the_rung_is_saved_and_loaded(tmp_path: Path) -> None:
    exec(RUNG, {**vars(ladder), "NSF": pf.NSF})
    climb = Climb(LogDensity(banana), steps=20, deadline=Deadline())
    posterior = climb_ladder(climb, ladder.LADDER[-1:])
    assert posterior.name == "spline flow, 20 steps"
    posterior.save(tmp_path / "p.pt")
    loaded = pf.load_posterior(tmp_path / "p.pt", banana)
    torch.testing.assert_close(loaded.sample(10, seed=0), posterior.sample(10, seed=0))
