"""The training of a flow: its gradient, bad steps, checkpoints, compilation."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows._archive import read_archive, write_archive
from pyroflows._deadline import Deadline
from pyroflows.distributions import FlowDistribution
from pyroflows.model.base import Density
from pyroflows.train import LoopOptions, TrainingReport, compiled, loop, train
from pyroflows.train.checkpoint import Checkpoint
from pyroflows.train.objectives import FAB, PathELBO

MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
ROOT = torch.tensor([[2.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.3, 0.2, 1.0]], dtype=torch.float64)


class Normal(Density):
    """The density of N(MEAN, ROOT ROOT'), up to a constant, in closed form; ``spoil`` may change what a call returns."""

    features = 3

    def __init__(
        self, spoil: Callable[[int, Tensor, Tensor], None] | None = None, mean: Tensor = MEAN
    ) -> None:
        self.initial, self.mean = torch.zeros(3, dtype=torch.float64), mean
        self.precision = torch.linalg.inv(ROOT @ ROOT.mT)
        self.spoil = spoil
        self.calls = 0

    @property
    def full(self) -> Normal:
        return Normal(mean=self.mean)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        away = z - self.mean
        grad = -away @ self.precision
        value = 0.5 * (away * grad).sum(-1)
        if self.spoil is not None:
            self.spoil(self.calls, value, grad)
        self.calls += 1
        return value, grad


def gaussian() -> pf.Flow:
    return pf.Flow([pf.transforms.LowerTriangularAffine(3)]).double()


def realnvp(seed: int = 0, layers: int = 2) -> pf.Flow:
    torch.manual_seed(seed)
    couplings = pf.RealNVP(3, transforms=layers, network=pf.nn.mlp((8,))).transform.layers
    return pf.Flow([*couplings, pf.transforms.LowerTriangularAffine(3)]).double()


def parameters(flow: pf.Flow) -> Tensor:
    return torch.cat([p.detach().flatten() for p in flow.parameters()])


def law(flow: pf.Flow) -> tuple[Tensor, Tensor]:
    loc, root = flow.transform.layers[-1].loc_and_scale_tril()  # type: ignore[operator]
    return loc, root @ root.mT


# The gradient


def test_the_path_gradient_is_that_of_the_sample_path() -> None:
    flow, density = realnvp(), Normal()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    distribution = FlowDistribution(flow.base, flow.transform)
    torch.manual_seed(1)
    loss = PathELBO(64).backward(distribution, density)  # type: ignore[arg-type]
    found = [p.grad for p in flow.parameters()]

    torch.manual_seed(1)
    x = flow.base.sample((64,))
    z, log_det = flow.transform.forward_and_log_det(x)
    point = z.detach().requires_grad_()
    (score,) = torch.autograd.grad(flow().log_prob(point).sum(), point)
    value, slope = density.value_and_grad(z.detach())
    by_hand = ((score - slope) * z).sum() / 64
    for p, grad in zip(flow.parameters(), found, strict=True):
        (expected,) = torch.autograd.grad(by_hand, p, retain_graph=True)
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(-loss.mean, (value - flow.base.log_prob(x) + log_det).mean())


def test_a_gaussian_guide_becomes_the_normal_it_is_trained_on() -> None:
    # The path gradient has no variance at the solution: what is left is how far the optimiser has to go still.
    flow = gaussian()
    history: list[Tensor] = []
    report = train(flow, Normal(), history, 600, whitening_step_size=5e-2)
    loc, covariance = law(flow)
    torch.testing.assert_close(loc, MEAN, rtol=0, atol=1e-2)
    torch.testing.assert_close(covariance, ROOT @ ROOT.mT, rtol=1e-2, atol=1e-2)
    log_evidence = 0.5 * (ROOT @ ROOT.mT * 2 * torch.pi).logdet()
    torch.testing.assert_close(history[-1], log_evidence, rtol=0, atol=1e-4)
    assert report == TrainingReport(600, 0, 0, "all steps were taken")
    assert len(history) == 600


def test_the_same_seed_gives_the_same_flow_and_the_whitening_map_goes_on_training() -> None:
    flows = [realnvp(), realnvp()]
    for flow in flows:
        torch.manual_seed(3)
        train(flow, Normal(), [], 20)
    assert torch.equal(*map(parameters, flows))
    assert all(p.requires_grad for p in flows[0].parameters())


class Clock:
    """A clock that moves by a second for each evaluation of a density."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, call: int, value: Tensor, grad: Tensor) -> None:
        self.now += 1.0


def test_a_deadline_that_is_over_ends_the_training_before_it_begins() -> None:
    flow, clock = gaussian(), Clock()
    before, deadline = parameters(flow), Deadline(3.0, clock)
    clock.now = 3.0
    report = train(flow, Normal(), [], 100, deadline=deadline)
    assert (report.steps, report.reason) == (0, "the time limit was reached")
    assert torch.equal(parameters(flow), before)


def test_the_step_size_falls_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a fit that begins at 4 s of 12 s, and takes a second for each step."""
    clock, rates = Clock(), []
    deadline = Deadline(12.0, clock)
    clock.now = 4.0
    step = loop.Loop.step

    def watched(self: Any, done: float) -> None:
        rates.append(done)
        step(self, done)

    monkeypatch.setattr(loop.Loop, "step", watched)
    report = train(gaussian(), Normal(clock.tick), [], 10**6, deadline=deadline)
    # One second went by as the training asked for the density at zero only if it had a checkpoint.
    assert report.steps == 8
    assert rates == [k / 8 for k in range(8)]


def test_a_resumed_training_goes_on_in_the_time_that_it_had(tmp_path: Path) -> None:
    """Killed after 5 steps of a second each; 10 s more make 15 in all, a third of them over."""
    path, clock, seen = tmp_path / "fit.pt", Clock(), []

    def killed(call: int, value: Tensor, grad: Tensor) -> None:
        clock.now += 1.0
        if call == 5:
            raise Killed

    deadline = Deadline(100.0, clock)
    with pytest.raises(Killed):
        train(gaussian(), Normal(killed), [], 10**6, deadline=deadline, checkpoint=every_step(path))
    clock.now = 0.0

    def watch(call: int, value: Tensor, grad: Tensor) -> None:
        clock.now += 1.0
        seen.append(clock.now)

    deadline = Deadline(10.0, clock)
    resumed = train(
        gaussian(), Normal(watch), [], 10**6, deadline=deadline, checkpoint=Checkpoint(path)
    )
    assert resumed.steps == 5 + 10 and len(seen) == 10


def every_step(path: Path) -> Checkpoint:
    return Checkpoint(path, every=0)


class Bar:
    def __init__(self) -> None:
        self.moved, self.text = 0, ""

    def update(self, steps: int = 1) -> None:
        self.moved += steps

    def set_postfix_str(self, text: str) -> None:
        self.text = text


def test_a_bar_that_is_given_moves_on(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    train(gaussian(), Normal(), [], 60, progress=bar)
    assert bar.moved == 60
    assert bar.text.startswith("ELBO ")
    assert capsys.readouterr().err == ""


def test_an_interruption_brings_the_best_parameters_back() -> None:
    def interrupt(call: int, value: Tensor, grad: Tensor) -> None:
        if call == 70:
            raise KeyboardInterrupt
        if call >= 50:
            grad.neg_()  # away from the solution

    flow, other = realnvp(), realnvp()
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(flow, Normal(interrupt), [], 100)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(other, Normal(lambda call, *_: interrupt(70 if call == 50 else call, *_)), [], 100)
    assert torch.equal(parameters(flow), parameters(other))


# Steps that are not finite


def test_a_step_that_is_not_finite_is_skipped_and_counted() -> None:
    def spoil(call: int, value: Tensor, grad: Tensor) -> None:
        if call in (3, 4, 7):
            grad.fill_(torch.nan)

    flow = gaussian()
    history: list[Tensor] = []
    with pytest.warns(
        UserWarning,
        match="^3 of 10 training steps were skipped because the loss or its gradient was not "
        "finite\\.$",
    ) as warned:
        report = train(flow, Normal(spoil), history, 10)
    assert [warning.filename for warning in warned] == [__file__]  # it points at the user's call
    assert report == TrainingReport(10, 3, 0, "all steps were taken")
    assert len(history) == 7
    assert bool(torch.stack(history).isfinite().all())
    assert bool(parameters(flow).isfinite().all())


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (TrainingReport(150, 1, 0, ""), False),
        (TrainingReport(150, 4, 0, ""), True),
        (TrainingReport(1500, 20, 1, ""), True),
    ],
)
def test_a_few_skipped_steps_are_not_worth_a_word(report: TrainingReport, told: bool) -> None:
    assert (report.warning is not None) == told


def test_particles_without_a_density_are_left_out() -> None:
    def cliff(call: int, value: Tensor, grad: Tensor) -> None:
        value[::2] = -torch.inf
        grad[1::4] = torch.nan

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(gaussian(), Normal(cliff), [], 10).skipped == 0


def test_after_too_many_the_best_parameters_come_back_with_half_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []

    def spoil(call: int, value: Tensor, grad: Tensor) -> None:
        if 60 <= call < 80:
            value.fill_(torch.nan)

    flow = gaussian()
    density = Normal(spoil)
    step = loop.Loop.step

    def watched(self: Any, done: float) -> None:
        step(self, done)
        seen.append(self.task.adjustment.loc.detach().clone())

    monkeypatch.setattr(loop.Loop, "step", watched)
    with pytest.warns(UserWarning, match="the best parameters so far were restored once"):
        report = train(flow, density, [], 81, whitening_step_size=1e-3)
    assert report == TrainingReport(81, 20, 1, "all steps were taken")
    best = seen[49]
    assert torch.equal(seen[79], best)
    # Adam's first step after the restoration is one of the present size in every entry.
    rate = 0.5 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 80 / 81, dtype=torch.float64)))
    torch.testing.assert_close((seen[80] - best).abs(), (1e-3 * rate).expand(3), rtol=1e-3, atol=0)


def test_a_training_that_does_not_recover_ends_with_the_best_parameters() -> None:
    def spoil(call: int, value: Tensor, grad: Tensor) -> None:
        if call >= 55:
            value.fill_(torch.nan)

    flow, good = gaussian(), gaussian()
    torch.manual_seed(0)
    with pytest.warns(
        UserWarning,
        match=r"120 of 175 .* restored 5 times, and the training ended early, with them\.",
    ):
        report = train(flow, Normal(spoil), [], 10_000)
    assert (report.steps, report.skipped, report.restored) == (175, 120, 5)
    assert report.reason == "it did not recover from steps that were not finite"
    torch.manual_seed(0)
    good_best: list[Tensor] = []

    class Stop(Exception):
        pass

    def stop(call: int, value: Tensor, grad: Tensor) -> None:
        if call == 50:
            raise Stop

    with pytest.raises(Stop):
        train(good, Normal(stop), good_best, 10_000)
    assert torch.equal(parameters(flow), parameters(good))


def test_a_density_that_is_never_finite_leaves_the_flow_as_it_was() -> None:
    flow = realnvp()
    before = parameters(flow)
    with pytest.warns(UserWarning, match="ended early"):
        report = train(flow, Normal(lambda call, value, grad: value.fill_(torch.nan)), [], 1000)  # type: ignore[arg-type]
    assert report.steps == report.skipped == 120
    assert torch.equal(parameters(flow), before)


# Checkpoints


class Killed(Exception):
    pass


def killed_at(step: int, skip: bool = True) -> Normal:
    def spoil(call: int, value: Tensor, grad: Tensor) -> None:
        if call == step:
            raise Killed
        if skip and call % 9 == 8:
            value.fill_(torch.nan)  # skipped steps count too

    return Normal(spoil)


@pytest.mark.filterwarnings("ignore:.*training steps were skipped")
@pytest.mark.parametrize(("make", "kill"), [(gaussian, 1), (realnvp, 37), (gaussian, 63)])
def test_a_killed_training_goes_on_to_the_same_result(
    make: Callable[[], pf.Flow], kill: int, tmp_path: Path
) -> None:
    path = tmp_path / "fit.pt"
    whole, history = make(), []  # type: ignore[var-annotated]
    torch.manual_seed(5)
    report = train(whole, killed_at(-1), history, 70)
    after = torch.rand(3)

    killed = make()
    torch.manual_seed(5)
    with pytest.raises(Killed):
        train(killed, killed_at(kill), [], 70, checkpoint=Checkpoint(path, {"seed": 5}, every=0))
    resumed, rest = make(), [torch.zeros((), dtype=torch.float64)]  # of a training before
    torch.manual_seed(6)
    density = killed_at(-1)
    density.calls = kill
    assert train(resumed, density, rest, 70, checkpoint=Checkpoint(path, {"seed": 5})) == report
    assert torch.equal(parameters(resumed), parameters(whole))
    assert torch.equal(torch.stack(rest[1:]), torch.stack(history))
    assert torch.equal(torch.rand(3), after)
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]


def test_a_finished_training_is_not_run_again_and_the_next_one_goes_on(tmp_path: Path) -> None:
    def fit(density: Normal, checkpoint: Checkpoint | None) -> Tensor:
        flow = realnvp()
        torch.manual_seed(0)
        train(flow, density, [], 30, checkpoint=checkpoint)
        train(flow, density, [], 20, objective=PathELBO(64), checkpoint=checkpoint)
        return parameters(flow)

    path = tmp_path / "fit.pt"
    expected = fit(Normal(), None)
    with pytest.raises(Killed):
        fit(killed_at(41, skip=False), Checkpoint(path, every=0))
    for left in (9, 0):
        density = Normal()
        assert torch.equal(fit(density, Checkpoint(path)), expected)
        assert density.calls == left


def test_a_kill_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fit.pt"
    checkpoint = Checkpoint(path)
    checkpoint.begin({})
    checkpoint.save({"step": 1})

    def killed(file: int) -> None:
        raise Killed

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(Killed):
        checkpoint.save({"step": 2})
    assert Checkpoint(path).begin({}) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]


def test_a_checkpoint_holds_numbers_only(tmp_path: Path) -> None:
    train(realnvp(), Normal(), [], 3, checkpoint=Checkpoint(tmp_path / "fit.pt"))
    content = torch.load(tmp_path / "fit.pt", weights_only=True)
    assert content["stages"][0]["state"]["counts"] == [3, 0, 0, 0]


def write_checkpoint(path: Path, **fields: Any) -> None:
    write_archive({"format": 2, "settings": {}, "stages": [], **fields}, str(path))


def forge_state(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = read_archive(str(path))
    [stage] = content["stages"]
    write_archive({**content, "stages": [{**stage, "state": change(stage["state"])}]}, str(path))


def resume(path: Path) -> None:
    train(realnvp(), Normal(), [], 3, checkpoint=Checkpoint(path))


def test_a_checkpoint_with_a_flipped_bit_is_told(tmp_path: Path) -> None:
    path, rng = tmp_path / "fit.pt", random.Random(0)
    checkpoint = Checkpoint(path)
    checkpoint.begin({})
    checkpoint.save({"step": 1, "values": torch.arange(3.0)})
    content = path.read_bytes()
    for _ in range(300):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"Expected a checkpoint of a fit; .*fit\.pt' is "):
            Checkpoint(path)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "steps": (
        lambda p: train(realnvp(), Normal(), [], 4, checkpoint=Checkpoint(p)),
        "has steps 3, and this fit has steps 4",
    ),
    "particles": (
        lambda p: train(
            realnvp(), Normal(), [], 3, objective=PathELBO(32), checkpoint=Checkpoint(p)
        ),
        "has particles 256, and this fit has particles 32",
    ),
    "step size": (
        lambda p: train(realnvp(), Normal(), [], 3, step_size=0.1, checkpoint=Checkpoint(p)),
        "has step_sizes [0.02, 0.005], and this fit has step_sizes [0.1, 0.005]",
    ),
    "objective": (
        lambda p: train(realnvp(), Normal(), [], 3, objective=FAB(256), checkpoint=Checkpoint(p)),
        "has objective PathELBO, and this fit has objective FAB",
    ),
    "average": (
        lambda p: train(
            realnvp(), Normal(), [], 3, options=LoopOptions(average=0.9), checkpoint=Checkpoint(p)
        ),
        "has average None, and this fit has average 0.9",
    ),
    "data": (
        lambda p: train(realnvp(), Normal(mean=MEAN + 1), [], 3, checkpoint=Checkpoint(p)),
        "has the log density at zero -",
    ),
    "flow": (
        lambda p: train(realnvp(layers=3), Normal(), [], 3, checkpoint=Checkpoint(p)),
        "has the shape of layers.3",
    ),
    "settings": (lambda p: Checkpoint(p, {"seed": 1}), "has seed None, and this fit has seed 1"),
    "no checkpoint": (
        lambda p: (p.write_bytes(b"other"), Checkpoint(p)),
        "fit.pt' is none",
    ),
    "no stages": (
        lambda p: (write_checkpoint(p, stages=[3]), Checkpoint(p)),
        "fit.pt' is damaged (the checkpoint.stages[0] is 3, not a dictionary)",
    ),
    "settings of another kind": (
        lambda p: (write_checkpoint(p, settings={"seed": torch.zeros(2)}), Checkpoint(p)),
        "fit.pt' is damaged (the checkpoint.settings.seed is of type Tensor)",
    ),
    "state without its parts": (
        lambda p: (forge_state(p, lambda state: {}), resume(p)),
        "fit.pt' is damaged (KeyError: 'parameters')",
    ),
    "state of another shape": (
        lambda p: (forge_state(p, lambda state: {**state, "counts": [1, 2]}), resume(p)),
        "fit.pt' is damaged (ValueError: not enough values to unpack",
    ),
    "random state of another size": (
        lambda p: (
            forge_state(p, lambda state: {**state, "random": {"cpu": torch.zeros(2)}}),
            resume(p),
        ),
        "fit.pt' is damaged (TypeError: RNG state must be a torch.ByteTensor",
    ),
    "unsealed": (
        lambda p: (torch.save({"format": 2, "settings": {}, "stages": []}, p), Checkpoint(p)),
        "fit.pt' is none",
    ),
    "no folder": (
        lambda p: Checkpoint(p.parent / "none" / "fit.pt"),
        "Expected checkpoint in a folder that exists",
    ),
    "no file": (lambda p: Checkpoint(""), "Expected checkpoint to be the name of a file; got ''"),
    "long name": (
        lambda p: Checkpoint(p.parent / ("a" * 300)),
        "Expected a checkpoint that can be written",
    ),
    "null character": (lambda p: Checkpoint("a\0b"), "Expected a checkpoint that can be written"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_of_another_fit_is_refused(case: str, tmp_path: Path) -> None:
    run, message = REFUSED[case]
    path = tmp_path / "fit.pt"
    train(realnvp(), Normal(), [], 3, checkpoint=Checkpoint(path))
    with pytest.raises(ValueError, match="Expected") as error:
        run(path)
    assert message in str(error.value)


def test_a_checkpoint_is_a_path() -> None:
    with pytest.raises(TypeError, match="Expected checkpoint to be a path; got 3"):
        Checkpoint(3)  # type: ignore[arg-type]


def test_a_checkpoint_that_cannot_be_written_later_leaves_the_fit_alone(tmp_path: Path) -> None:
    folder = tmp_path / "fits"
    folder.mkdir()
    checkpoint = Checkpoint(folder / "fit.pt")
    folder.rmdir()
    with pytest.warns(UserWarning, match="Could not write .* goes on: No such file or directory"):
        assert train(realnvp(), Normal(), [], 3, checkpoint=checkpoint).steps == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(realnvp(), Normal(), [], 3, checkpoint=checkpoint).steps == 3


# Compilation


@pytest.mark.slow
def test_the_compiler_leaves_the_validation_of_distributions_alone() -> None:
    """It turns it off in a process's first call, so a fresh process looks."""
    program = """
import torch
from pyroflows._compile import compiled
assert compiled(lambda x: x + 1)(torch.ones(2)).tolist() == [2.0, 2.0]
import pyroflows as pf
density = pf.RealNVP(2)()
score = torch.compile(density.log_prob, fullgraph=True, backend="aot_eager")  # which cannot check the value
assert score(torch.ones(3, 2)).shape == (3,)
torch.distributions.Normal(0.0, -1.0)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "Expected parameter scale" in run.stderr


@pytest.fixture
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torch.compile but the code generation, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("_quick_compiler")
@pytest.mark.slow
def test_a_compiled_training_gives_the_same_flow() -> None:
    flows = [realnvp(), realnvp()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compile")
        for flow, compile in zip(flows, (False, True), strict=True):
            torch.manual_seed(0)
            for _ in range(2):
                train(flow, Normal(), [], 15, objective=PathELBO(16), compile=compile)
    torch.testing.assert_close(*map(parameters, flows), rtol=1e-9, atol=1e-9)
    assert len(compiled._COMPILED[flows[1]]) == 1  # the second round compiled nothing


class Branching(pf.transforms.LowerTriangularAffine):
    """A layer that looks at values, which no graph can hold."""

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if bool((x > 1e9).any()):
            raise ValueError("too far out")
        return super().forward_and_log_det(x, context)


def test_what_cannot_be_compiled_is_trained_as_it_is() -> None:
    flows = [
        pf.Flow([Branching(3), pf.transforms.LowerTriangularAffine(3)]).double() for _ in range(2)
    ]
    torch.manual_seed(0)
    train(flows[0], Normal(), [], 5)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="goes on without compile=True: torch.compile failed with"):
        train(flows[1], Normal(), [], 5, compile=True)
    assert torch.equal(*map(parameters, flows))


def test_without_a_compiler_a_sentence_says_so() -> None:
    from torch._inductor import config

    without = config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True})
    with (
        without,
        pytest.warns(
            UserWarning,
            match="goes on without compile=True: torch.compile found no C\\+\\+ compiler",
        ),
    ):
        train(gaussian(), Normal(), [], 3, compile=True)


@pytest.mark.slow
def test_compiled_code_gives_the_same_flow() -> None:
    flows = [realnvp(), realnvp()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compile=True")
        for flow, compile in zip(flows, (False, True), strict=True):
            torch.manual_seed(0)
            train(flow, Normal(), [], 15, compile=compile)
    torch.testing.assert_close(*map(parameters, flows), rtol=1e-8, atol=1e-8)


def test_a_model_on_every_device(device: torch.device) -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.full((2,), 3.0, device=device), 0.5).to_event(1))

    density = pf.model.LogDensity(model, device=device)
    flow = pf.Flow([pf.transforms.LowerTriangularAffine(2)]).to(device)
    train(flow, density, [], 300, whitening_step_size=5e-2)
    loc, covariance = law(flow)
    torch.testing.assert_close(loc.cpu(), torch.full((2,), 3.0), rtol=0, atol=1e-2)
    torch.testing.assert_close(covariance.cpu(), 0.25 * torch.eye(2), rtol=0, atol=1e-2)
