"""What the loop gives to every training: averages, mixed precision, checkpoints of both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.model.base import Density
from pyroflows.train import LoopOptions, fit_density, loop, train
from pyroflows.train.averaging import Average, Best
from pyroflows.train.checkpoint import Checkpoint
from pyroflows.train.objectives import PathELBO
from pyroflows.train.precision import MixedPrecision


def points(n: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, generator=generator) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])


def flow(seed: int = 0, **options: Any) -> pf.Flow:
    torch.manual_seed(seed)
    return pf.RealNVP(2, transforms=2, network=pf.nn.mlp((8,)), **options)


def numbers(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Quadratic(Density):
    """The density of a standard normal about a point, up to a constant."""

    features = 2

    def __init__(self) -> None:
        self.initial = torch.zeros(2)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        away = z - 2.0
        return -0.5 * away.square().sum(-1), -away


# Averages


def test_an_average_forgets_its_start_and_then_weighs_the_past() -> None:
    p = nn.Parameter(torch.full((1,), 100.0))
    average = Average([p], decay=0.9)
    expected, values = torch.tensor([100.0]), torch.linspace(0, 1, 200)
    for step, value in enumerate(values, 1):
        p.data = value.reshape(1)
        average.update()
        decay = min(0.9, step / (step + 9))
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        torch.testing.assert_close(p.data, expected)
        # Behind the last value by the mean age of what is averaged, nine steps.
        assert float(p.data) == pytest.approx(1 - 9 / 199, abs=1e-3)
    assert float(p.detach()) == 1.0


def test_what_is_validated_with_averages_is_what_is_kept() -> None:
    x = points()
    made = flow()
    report = fit_density(made, x, validation=x, max_epochs=4, average=0.9, progress=False)
    plain = flow()
    fit_density(plain, x, validation=x, max_epochs=4, progress=False)
    with torch.no_grad():
        now = float(made().log_prob(x).double().mean())
    assert now == pytest.approx(report.log_likelihood, abs=1e-5)
    assert not torch.equal(numbers(made), numbers(plain))


def test_a_guide_ends_with_its_average() -> None:
    """A Gaussian guide on the way to a mean of 2 is behind with its average."""
    ends = []
    for average in (None, 0.95):
        guide = pf.Flow([pf.transforms.LowerTriangularAffine(2)])
        torch.manual_seed(0)
        options = LoopOptions(average=average)
        train(guide, Quadratic(), [], 60, whitening_step_size=2e-2, options=options)
        last: Any = guide.transform.layers[-1]
        ends.append(last.loc_and_scale_tril()[0])
    assert bool((ends[1] < ends[0]).all()) and bool((ends[1] > 0.3 * ends[0]).all())


def test_an_average_that_restarts_forgets_the_past() -> None:
    parameter = torch.nn.Parameter(torch.full((1,), 100.0))
    average = Average([parameter], decay=0.5)
    with torch.no_grad():
        parameter.fill_(2.0)
    average.restart()
    with average.applied():
        assert parameter.item() == 2.0


@pytest.mark.parametrize("average", [0.0, 1.0, 2.0])
def test_an_average_has_a_weight_between_0_and_1(average: float) -> None:
    with pytest.raises(ValueError, match=r"Expected average between 0 and 1; got"):
        fit_density(flow(), points(), average=average, progress=False)


# The best parameters


def test_the_best_parameters_come_back() -> None:
    module = nn.Linear(1, 1)
    best = Best(module)
    start = numbers(module)
    nn.init.constant_(module.weight, 1.0)
    best.restore()  # nothing to go back to
    assert float(module.weight.detach()) == 1.0
    best.restore(or_start=True)
    assert torch.equal(numbers(module), start)
    assert best.see(3.0) and not best.see(2.0) and not best.see(float("nan"))
    nn.init.constant_(module.weight, 5.0)
    best.restore()
    assert torch.equal(numbers(module), start)


# Mixed precision


def products(module: nn.Module, act: Callable[[], Any]) -> set[torch.dtype]:
    """The dtypes that the linear layers of a flow compute in."""
    seen = set()
    hooks = [
        layer.register_forward_hook(lambda _, given, out: seen.add(out.dtype))
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    ]
    act()
    for hook in hooks:
        hook.remove()
    return seen


def test_networks_run_in_bfloat16_and_all_else_in_float32(device: torch.device) -> None:
    made, x = flow(mixing=None).to(device), points().to(device)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    exact = made().log_prob(x)
    precision = MixedPrecision(made)
    with precision:
        values = made().log_prob(x)
        assert products(made, lambda: made().log_prob(x)) == {torch.bfloat16}
        z, log_prob, score = made().rsample_and_score((5,))
    assert values.dtype == z.dtype == log_prob.dtype == score.dtype == torch.float32
    # Parameters of maps have 8 bits; log-determinants are exact for these.
    torch.testing.assert_close(values, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(values, exact)
    back, _ = made.transform.forward_and_log_det(x)
    torch.testing.assert_close(made().log_prob(x), exact)  # outside of the block nothing changes
    precision.remove()
    assert torch.equal(made.transform.forward_and_log_det(x)[0], back)
    assert products(made, lambda: made().log_prob(x)) == {torch.float32}
    assert not [name for m in made.modules() for name in vars(m) if name in ("forward", "evaluate")]


@pytest.mark.parametrize(
    ("family", "network"),
    [
        (pf.RealNVP, {"network": pf.nn.mlp((16,))}),
        (pf.MAF, {"hidden": (16,)}),
        pytest.param(pf.NSF, {"network": pf.nn.mlp((16,))}, marks=pytest.mark.slow),
    ],
)
def test_a_density_in_mixed_precision_is_as_good(
    family: Callable[..., pf.Flow], network: dict[str, Any], device: torch.device
) -> None:
    x, reports = points(2000), []
    for mixed in (False, True):
        torch.manual_seed(0)
        made = family(2, transforms=2, **network).to(device)
        options: dict[str, Any] = {"max_epochs": 15, "learning_rate": 1e-2, "progress": False}
        reports.append(fit_density(made, x, validation=x, mixed_precision=mixed, **options))
        assert all(p.dtype == torch.float32 for p in made.parameters())
    assert reports[1].train != reports[0].train
    assert reports[1].log_likelihood == pytest.approx(reports[0].log_likelihood, abs=0.02)


def test_a_guide_in_mixed_precision_reaches_its_target() -> None:
    torch.manual_seed(0)
    body = pf.RealNVP(2, transforms=2, network=pf.nn.mlp((8,)), mixing=None).transform.layers
    guide = pf.Flow([*body, pf.transforms.LowerTriangularAffine(2)])
    options = LoopOptions(betas=(0.9, 0.99), mixed_precision=True)
    history: list[Tensor] = []
    train(guide, Quadratic(), history, 300, whitening_step_size=5e-2, options=options)
    # The log evidence of an unnormalised standard normal in two dimensions is log 2 pi.
    assert float(torch.stack(history[-20:]).mean()) == pytest.approx(1.8379, abs=0.02)


# Checkpoints and interruptions of a density


class Killed(Exception):
    pass


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    take = loop.Loop.step

    def watched(self: Any, done: float) -> None:
        if self.steps == step:
            raise error
        take(self, done)

    monkeypatch.setattr(loop.Loop, "step", watched)
    save = Checkpoint.__init__
    monkeypatch.setattr(
        Checkpoint, "__init__", lambda self, path, settings: save(self, path, settings, every=0)
    )


@pytest.mark.parametrize("kill", [1, 6, 9])
@pytest.mark.parametrize("average", [None, 0.9])
def test_a_killed_density_goes_on_to_the_same_result(
    kill: int, average: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 90 make four steps an epoch, so that all but the first kill are within one."""
    options: dict[str, Any] = {"batch_size": 90, "max_epochs": 4, "average": average}

    def fit(made: pf.Flow, path: Path | None) -> Any:
        return fit_density(made, points(), checkpoint=path, progress=False, **options)

    whole, path = flow(), tmp_path / "density.pt"
    report = fit(whole, None)
    with monkeypatch.context() as patch:
        killed_at(kill, patch, Killed)
        with pytest.raises(Killed):
            fit(flow(), path)
    resumed = flow(seed=7)  # whatever it starts from
    again = fit(resumed, path)
    assert torch.equal(numbers(resumed), numbers(whole))
    assert (again.train, again.validation) == (report.train, report.validation)
    assert (again.steps, again.reason) == (report.steps, report.reason)
    finished = flow(seed=8)  # and once more from the end
    assert fit(finished, path).validation == report.validation
    assert torch.equal(numbers(finished), numbers(whole))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 100}, "has batch_size 90, and this fit has batch_size 100"),
        ({"seed": 1}, "has seed 0, and this fit has seed 1"),
        ({"max_epochs": 3}, "has steps 8, and this fit has steps 12"),
        ({"learning_rate": 0.1}, "has step_sizes"),
        ({"mixed_precision": True}, "has mixed_precision False"),
    ],
)
def test_a_checkpoint_of_another_density_is_refused(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"batch_size": 90, "max_epochs": 2, "progress": False}
    path = tmp_path / "density.pt"
    fit_density(flow(), points(), checkpoint=path, **options)
    with pytest.raises(ValueError, match=sentence):
        fit_density(flow(), points(), checkpoint=path, **{**options, **change})
    with pytest.raises(ValueError, match="has the mean of the training points"):
        fit_density(flow(), points() + 1.0, checkpoint=path, **options)


def test_an_interrupted_density_keeps_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(10, monkeypatch, KeyboardInterrupt)
    made = flow()
    report = fit_density(made, points(), batch_size=90, max_epochs=9, progress=False)
    assert report.reason == "it was interrupted" and (report.steps, report.epochs) == (10, 3)
    assert report.log_likelihood == max(report.validation)


def test_a_density_that_does_not_recover_says_so() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(2))

        def forward(self) -> dist.Distribution:
            mean = self.mean * (float("nan") if self.training else 1.0)
            return dist.Normal(mean, 1.0, validate_args=False).to_event(1)

    made = Broken()
    report = fit_density(made, points(), batch_size=2, max_epochs=5, progress=False)
    assert report.reason == "it did not recover from steps that were not finite"
    assert report.steps == report.skipped == 120
    assert torch.equal(made.mean.detach(), torch.zeros(2))


# Compilation of a density


@pytest.mark.parametrize("context", slow_but_for([True], [False, True]))
def test_a_compiled_density_gives_the_same_flow(
    context: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    x = points()
    given = x[:, :1] if context else None
    flows = []
    for compile in (False, True):
        torch.manual_seed(0)
        made = pf.RealNVP(2, 1 if context else None, transforms=2, network=pf.nn.mlp((8,))).double()
        options: dict[str, Any] = {"batch_size": 90, "max_epochs": 2, "progress": False}
        fit_density(made, x, given, compile=compile, **options)
        flows.append(made)
    torch.testing.assert_close(*map(numbers, flows), rtol=1e-9, atol=1e-9)
    assert not [w for w in recwarn.list if "compile" in str(w.message)]


def test_a_density_that_cannot_be_compiled_is_fitted_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(function: Any, **options: Any) -> Any:
        raise RuntimeError("no graph")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(UserWarning, match="goes on without compile=True: .* no graph") as warned:
        fit_density(flow(), points(), max_epochs=1, compile=True, progress=False)
    assert warned[0].filename == __file__


# The path gradient is optional


@pytest.mark.parametrize("path", [True, False])
def test_a_guide_trains_by_either_gradient(path: bool) -> None:
    guide = pf.Flow([pf.transforms.LowerTriangularAffine(2)])
    torch.manual_seed(0)
    objective = PathELBO(256, path=path)
    train(guide, Quadratic(), [], 400, whitening_step_size=5e-2, objective=objective)
    last: Any = guide.transform.layers[-1]
    loc, root = last.loc_and_scale_tril()
    # Without the path gradient the noise of 256 draws is left at the end.
    error = 1e-2 if path else 5e-2
    torch.testing.assert_close(loc, torch.full((2,), 2.0), rtol=0, atol=error)
    torch.testing.assert_close(root @ root.mT, torch.eye(2), rtol=0, atol=2 * error)
