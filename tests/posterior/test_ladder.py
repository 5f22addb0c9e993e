"""The loop over rungs: what is tried, what is kept, and when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from torch.utils._python_dispatch import TorchDispatchMode

import pyroflows as pf
from pyroflows._deadline import Deadline, check_time
from pyroflows._random import forked
from pyroflows.guides import Guide
from pyroflows.model import LogDensity
from pyroflows.posterior import Finding, Posterior, Rung, Verdict
from pyroflows.posterior import climb as climb_module
from pyroflows.posterior.climb import Climb, choose_better, climb_ladder
from pyroflows.posterior.importance import ImportanceSummary
from pyroflows.posterior.ladder import LADDER, make_own_rung
from pyroflows.posterior.verdict import FAILED, HELD, NOT_JUDGED, TIME_OVER
from pyroflows.sampling.roaming import roam


def banana() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x[0] + (2 * x[1]).exp(), 0.2), obs=torch.tensor(1.0))


def new_climb(steps: int = 10, deadline: Deadline | None = None, own: Any = None) -> Climb:
    torch.manual_seed(0)
    return Climb(LogDensity(banana), steps, deadline or Deadline(), own)


def names(posterior: Posterior) -> list[str]:
    return [attempt.name for attempt in posterior.rungs]


GAUSSIAN = next(rung for rung in LADDER if rung.name == "Gaussian")


def test_rungs_are_tried_in_order_until_the_steps_are_used_up() -> None:
    posterior = climb_ladder(new_climb(steps=10), LADDER)
    assert names(posterior)[:2] == ["Gaussian", "flow, 10 steps"]
    assert not [name for name in names(posterior) if name.startswith("wide flow")]
    assert len(posterior.history) == 10
    seconds = [attempt.seconds for attempt in posterior.rungs]
    assert seconds == sorted(seconds)


def test_a_rung_that_is_of_no_use_is_passed_over() -> None:
    useless = Rung("useless", make=lambda climb: None)
    assert names(climb_ladder(new_climb(), [GAUSSIAN, useless])) == ["Gaussian"]


def test_a_trusted_guide_ends_the_climb() -> None:
    def fine() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    climb = Climb(LogDensity(fine), 10, Deadline())
    assert names(climb_ladder(climb, LADDER)) == ["Gaussian"]


class Clock:
    """A clock that moves by a second for each evaluation of a density."""

    def __init__(self, density: LogDensity) -> None:
        self.now = 0.0
        self.run, density._program.run = density._program.run, self.tick

    def __call__(self) -> float:
        return self.now

    def tick(self, points: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.now += 1.0
        return self.run(points)


def late_by(limit: float | None, steps: int = 40) -> tuple[float, Posterior]:
    """How many evaluations a fit of the banana makes after its time is over."""
    density = LogDensity(banana, batch_size=2000)
    climb = Climb(density, steps, Deadline())
    clock = Clock(density)
    climb.deadline = Deadline(limit, clock)
    with forked(0):
        posterior = climb_ladder(climb, LADDER)
    return clock.now - (limit or 0.0), posterior


def test_a_fit_makes_at_most_one_evaluation_after_its_time_is_over() -> None:
    whole, _ = late_by(None)
    for limit in (0.5, *(whole * k / 6 for k in range(1, 6))):
        late, posterior = late_by(limit)
        assert late <= 1, limit
        ended = f"ime limit of {limit:g} s ended the fit at the "
        reason = posterior.verdict.reason
        assert "There was no time to check: " in reason or ended in reason
        assert set(posterior.sample(3)) == {"x"}


@pytest.mark.slow
def test_time_is_left_for_a_verdict_on_what_was_trained() -> None:
    _, posterior = late_by(500.0, steps=10_000)
    last = posterior.rungs[-1]
    assert "flow" in last.name
    assert last.verdict.importance is not None


def test_a_census_leaves_time_for_a_verdict() -> None:
    whole, _ = late_by(None, steps=0)
    for limit in (whole / 3, whole / 2):
        _, posterior = late_by(limit)
        assert posterior.rungs[0].verdict.importance is not None
        assert "has not been judged" not in posterior.verdict.reason


@pytest.mark.parametrize(("seconds", "taken"), [(74.0, True), (76.0, False)])
def test_a_census_may_take_three_quarters_of_the_time(
    seconds: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def take(density: LogDensity, start: Any) -> str:
        nonlocal now
        now += seconds
        check_time()
        return "census"

    monkeypatch.setattr(climb_module, "take_census", take)
    climb = new_climb(deadline=Deadline(100.0, clock=lambda: now))
    climb.take_census()
    assert (climb.census is not None) == taken


@pytest.mark.parametrize("limit", slow_but_for([200.0], [200.0, 300.0]))
def test_a_guide_of_the_users_is_judged_before_the_time_is_over(limit: float) -> None:
    density = LogDensity(banana, batch_size=2000)
    guide = pf.AutoFlow(banana)
    density.introduce(guide)
    climb = Climb(density, 10_000, Deadline(), guide)
    climb.deadline = Deadline(limit, Clock(density))
    rung = make_own_rung(guide, fresh=True, steps=10_000, limited=True)
    with forked(0):
        posterior = climb_ladder(climb, [rung])
    assert names(posterior)[0] == "guide"
    assert len(posterior.history) > 0
    assert posterior.rungs[0].verdict.importance is not None
    assert "has not been judged" not in posterior.verdict.reason


@pytest.mark.parametrize(("limit", "tried"), [(None, 3), (1000.0, 3), (10.0, 1)])
def test_the_time_limit_ends_the_climb(limit: float | None, tried: int) -> None:
    """By a clock that jumps while the first rung makes its guide."""
    now = 0.0

    def make(climb: Climb) -> Any:
        nonlocal now
        now += 20.0
        return climb.first_flow

    rung = Rung("slow", make)
    posterior = climb_ladder(new_climb(0, Deadline(limit, clock=lambda: now)), [rung] * 3)
    assert len(posterior.rungs) == tried
    assert posterior.rungs[0].seconds == 20.0
    assert posterior.seconds == 20.0 * tried


def test_a_guide_of_the_users_keeps_its_best_numbers() -> None:
    guide = pf.AutoFlow(banana)
    climb = new_climb(own=guide)
    climb.density.introduce(guide)

    def make(climb: Climb) -> pf.AutoFlow:
        assert climb.census is not None
        guide.whiten(climb.census.best.loc, climb.census.best.scale_tril)
        return guide

    kept: dict[str, torch.Tensor] = {}

    def spoil(climb: Climb, guide: pf.AutoFlow, steps: int) -> int:
        kept.update({name: value.clone() for name, value in guide.state_dict().items()})
        guide.whiten(torch.full((2,), 9.0), torch.eye(2))
        return steps

    posterior = climb_ladder(climb, [Rung("guide", make, rounds=(0, 5), train=spoil)])
    assert names(posterior) == ["guide", "guide, 5 steps"]
    assert posterior.name == "guide"
    assert posterior.guide is guide
    torch.testing.assert_close(dict(guide.state_dict()), kept)


def test_attempts_are_judged_on_copies() -> None:
    def spoil(climb: Climb, guide: pf.AutoFlow, steps: int) -> int:
        guide.whiten(torch.full((2,), 9.0), torch.eye(2))
        return steps

    rung = Rung("flow", make=lambda climb: climb.first_flow, rounds=(0, 5), train=spoil)
    posterior = climb_ladder(new_climb(), [rung])
    assert posterior.name == "flow"
    best, last = posterior.rungs[0].verdict, posterior.rungs[1].verdict
    assert best.ess > last.ess
    assert float(posterior.sample_unconstrained(100, seed=0).mean()) < 5


def test_ctrl_c_in_a_rung_returns_the_best_so_far() -> None:
    def press(climb: Climb) -> Any:
        raise KeyboardInterrupt

    posterior = climb_ladder(new_climb(), [GAUSSIAN, Rung("pressed", press)])
    assert posterior.interrupted
    assert names(posterior) == ["Gaussian", "interrupted"]


def posterior_with(ok: bool, missed: float, ess: float) -> Posterior:
    guide = Guide()
    summary = ImportanceSummary(1000, 0.5, ess, 0.0, 0.0, 0.0)
    status = FAILED if missed > 0.02 else HELD
    findings = (
        Finding("census", status, missed, 0.02, "a mode."),
        Finding("shift", HELD if ok else FAILED, None, None, "a shift.", grounds=True),
    )
    return Posterior(guide, None, Verdict(findings, summary))


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ((True, 0.0, 0.5), (False, 0.0, 0.9)),
        ((False, 0.0, 0.1), (False, 0.5, 0.9)),
        ((False, 0.0, 0.3), (False, 0.0, 0.2)),
        ((False, 0.01, 0.3), (False, 0.0, 0.2)),
        # What misses half is worse than what misses 3 %, however exact it is on the other half.
        ((False, 0.03, 0.2), (False, 1.0, 1.0)),
        # A small miss is better than hardly an effective draw.
        ((False, 0.03, 0.8), (False, 0.0, 0.02)),
    ],
)
def test_the_better_of_two(
    better: tuple[bool, float, float], worse: tuple[bool, float, float]
) -> None:
    a, b = posterior_with(*better), posterior_with(*worse)
    assert choose_better(a, b) is a
    assert choose_better(b, a) is a


def test_the_reason_why_no_guide_can_be_trusted_is_kept() -> None:
    better, improper = (posterior_with(False, 0.0, ess) for ess in (0.5, 0.0))
    flat = Finding("proper", FAILED, 1.0, 0.0, "it cannot be normalised.")
    improper.verdict = Verdict((flat,), improper.verdict.importance)
    assert choose_better(better, improper) is improper
    assert choose_better(improper, better) is improper


def test_of_equals_the_later_one_is_kept() -> None:
    first, second = (posterior_with(True, 0.0, 0.5) for _ in range(2))
    assert choose_better(first, second) is second


def test_an_attempt_that_was_judged_is_kept_before_one_for_which_there_was_no_time() -> None:
    judged, late = (posterior_with(False, 0.0, 0.5) for _ in range(2))
    shift = Finding("shift", NOT_JUDGED, None, None, TIME_OVER, grounds=True)
    late.verdict = Verdict((shift,), judged.verdict.importance)
    assert choose_better(judged, late) is judged
    assert str(late.verdict).endswith("not been judged, because the time limit was reached.")


def test_polished_draws_of_a_guide_that_is_a_little_off_are_trusted(tmp_path: Path) -> None:
    def fine() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def make(climb: Climb) -> pf.AutoFlow:
        climb.first_flow.whiten(torch.full((2,), 0.5), 0.9 * torch.eye(2))
        return climb.first_flow

    climb = Climb(LogDensity(fine), 0, Deadline())
    posterior = climb_ladder(climb, [Rung("off", make), Rung("polish", make, trajectories=30)])
    assert names(posterior) == ["off", "polish, 30 trajectories"]
    before, after = (attempt.verdict for attempt in posterior.rungs)
    assert not before.ok
    assert after.ok
    assert "polished by 30 Hamiltonian trajectories" in after.reason
    statuses = {finding.name: finding.status for finding in after.findings}
    assert statuses["drift"] == statuses["polish"] == statuses["census"] == HELD
    assert statuses["weights"] == statuses["shift"] == NOT_JUDGED
    assert after.shift == before.shift > 0.1
    x = posterior.sample(4000, seed=0)["x"]
    assert float(x.mean(0).abs().max()) < 5 / 4000**0.5
    posterior.save(tmp_path / "polished.pt")
    loaded = pf.load_posterior(tmp_path / "polished.pt", fine)
    assert torch.equal(loaded.sample(10, seed=0)["x"], posterior.sample(10, seed=0)["x"])


def coupled() -> None:
    n = 280
    x = pyro.sample("x", dist.StudentT(3.0, torch.zeros(n), 1.0).to_event(1))
    pyro.factor("sum", -((x.sum(-1) - 1.0) ** 2))
    pyro.factor("wave", (x.cumsum(-1)).sin().sum(-1))


class NoSquares(TorchDispatchMode):
    """Refuses matrices of as many rows and columns as there are latents."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in [out] if isinstance(out, torch.Tensor) else []:
            assert tensor.shape[-2:] != (280, 280), func
        return out


def test_above_so_many_latents_a_fit_is_short_and_makes_no_matrix_of_them() -> None:
    climb = Climb(LogDensity(coupled), 5, Deadline(), progress=False)
    rungs = [rung for rung in LADDER if rung.needs_census and not rung.trajectories]
    with NoSquares():
        posterior = climb_ladder(climb, rungs)
    assert not posterior.verdict.ok
    assert [attempt.name for attempt in posterior.rungs] == ["Gaussian", "flow, 5 steps"]
    z, _ = posterior.guide.sample_and_log_prob(500)
    with NoSquares():
        roam(posterior.density, posterior.guide, z[:20])
