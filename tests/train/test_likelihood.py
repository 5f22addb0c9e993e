"""fit_density against known densities, its options, what it keeps, and how it fails; Standardize."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

import pyroflows as pf
from pyroflows._deadline import Deadline
from pyroflows.nn import mlp
from pyroflows.train import DensityReport, fit_density, likelihood
from pyroflows.transforms.standardize import Standardize

PRESET: dict[str, Any] = {"transforms": 2, "network": mlp((8,))}
N = 400


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quickly(flow: nn.Module, x: Tensor, *args: Any, **options: Any) -> DensityReport:
    return fit_density(flow, x, *args, **{"max_epochs": 3, "progress": False, **options})


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


class Normal(nn.Module):
    """A normal with a learnt mean, which counts its calls and may misbehave."""

    def __init__(self, act: Callable[[int], float] = lambda call: 0.0) -> None:
        super().__init__()
        self.mean, self.calls, self.act = nn.Parameter(torch.zeros(2)), 0, act

    def forward(self, context: Tensor | None = None) -> dist.Distribution:
        mean = self.mean if context is None else self.mean + context
        if self.training:
            self.calls += 1
            mean = mean + self.act(self.calls)
        return dist.Normal(mean, 1.0, validate_args=False).to_event(1)


# What is learnt


@pytest.mark.slow
def test_a_correlated_normal_is_learnt_to_its_entropy(device: torch.device) -> None:
    target = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    x, test = target.sample((2000,)), target.sample((4000,))
    flow = pf.RealNVP(2, transforms=4, network=mlp((16,))).to(device)
    report = fit_density(flow, x, max_epochs=40, learning_rate=1e-2, progress=False)
    with torch.no_grad():
        gap = target.log_prob(test) - flow().log_prob(test.to(device)).cpu()
    # The maximum-likelihood estimate of k numbers is off by k / 2n on average; k = 5 here, with room for those of the nets.
    assert (
        float(gap.mean()) + 3 * float(gap.std()) / math.sqrt(len(test)) >= 0
        and float(gap.mean()) < 0.05
    )
    assert report.log_likelihood > report.validation[0] + 0.3
    assert not flow.training


@pytest.mark.slow
def test_a_conditional_density_is_learnt() -> None:
    context = noise(3000, 1, seed=1)
    x = torch.cat([2 * context, -context], -1) + 0.1 * noise(3000, 2, seed=2)
    flow = pf.Flow([*pf.RealNVP(2, 1, **PRESET).transform.layers, Standardize(2)])
    fit_density(flow, x, context, max_epochs=60, learning_rate=1e-2, progress=False)
    draws = flow(torch.tensor([[1.0], [-1.0]])).sample((2000,))
    torch.testing.assert_close(
        draws.mean(0), torch.tensor([[2.0, -1.0], [-2.0, 1.0]]), atol=0.1, rtol=0.0
    )
    assert float(draws.std(0).max()) < 0.2


def test_any_module_that_returns_a_distribution_is_fitted() -> None:
    module, x = Normal(), 1.0 + noise(N, 2)
    report = quickly(module, x, validation=x, max_epochs=200, learning_rate=3e-2)
    torch.testing.assert_close(module.mean.detach(), x.mean(0), atol=2e-2, rtol=0.0)
    assert report.log_likelihood == pytest.approx(
        float(dist.Normal(x.mean(0), 1.0).log_prob(x).sum(-1).mean()), abs=1e-3
    )


def test_a_distribution_over_numbers_is_fitted() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(()))

        def forward(self) -> dist.Distribution:
            return dist.Normal(self.mean, 1.0)

    module = Scalar()
    quickly(module, 0.5 + noise(N), max_epochs=100, learning_rate=3e-2)
    assert float(module.mean.detach()) == pytest.approx(0.5, abs=5 / math.sqrt(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_points_follow_the_flow(
    dtype: torch.dtype, given: torch.dtype, device: torch.device
) -> None:
    flow = pf.RealNVP(2, 1, **PRESET).to(device, dtype)
    x, context = noise(N, 2).to(given), noise(N, 1).to(given)
    quickly(flow, x, context, validation=(x[:50], context[:50]))
    assert all(p.dtype == dtype and p.device.type == device.type for p in flow.parameters())
    assert x.device.type == "cpu" and x.dtype == given


# What is kept


def test_the_flow_keeps_its_best_parameters() -> None:
    x, held_out = noise(40, 2), noise(200, 2, seed=1)
    flow = pf.RealNVP(2, transforms=4, network=mlp((32,)))
    report = quickly(flow, x, validation=held_out, max_epochs=60, patience=60, learning_rate=3e-2)
    assert (
        report.best_epoch < report.epochs and report.validation[-1] < report.log_likelihood
    )  # it did overfit
    assert report.log_likelihood == max(report.validation)
    with torch.no_grad():
        now = float(flow().log_prob(held_out).double().mean())
    assert now == pytest.approx(report.log_likelihood, abs=1e-5)


def test_a_flow_that_training_only_worsens_stays_as_it_was() -> None:
    flow, held_out = Normal(), noise(200, 2, seed=1)
    before = copy_of(flow)
    report = quickly(
        flow,
        noise(20, 2) + 3.0,
        validation=held_out - held_out.mean(0),
        patience=4,
        max_epochs=50,
        learning_rate=3e-2,
    )
    assert report.best_epoch == 0 and report.epochs == 4 and same(before, copy_of(flow))
    assert "training did not improve on it" in str(
        report
    ) and "had not improved for 4 epochs" in str(report)


def test_the_same_seed_gives_the_same_flow_and_leaves_the_random_state() -> None:
    x = noise(N, 2)
    start = copy_of(pf.RealNVP(2, **PRESET))
    ends = []
    for seed in (0, 0, 1):
        flow = pf.RealNVP(2, **PRESET)
        flow.load_state_dict(start)
        torch.manual_seed(len(ends))
        state = torch.get_rng_state()
        report = quickly(flow, x, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append((copy_of(flow), report.train, report.validation))
    assert same(ends[0][0], ends[1][0]) and ends[0][1:] == ends[1][1:]
    assert ends[0][1:] != ends[2][1:]
    torch.manual_seed(0)
    quickly(pf.RealNVP(2, **PRESET), x, seed=None)
    assert not torch.equal(torch.get_rng_state(), state)


def test_every_point_is_seen_once_an_epoch_in_batches_of_equal_size() -> None:
    seen: list[Tensor] = []

    class Spy(Normal):
        def forward(self, context: Tensor | None = None) -> dist.Distribution:
            assert context is not None
            if self.training:
                seen.append(context.squeeze(-1))
            return super().forward(0 * context)

    x = noise(109, 2)
    quickly(
        Spy(), x, torch.arange(109.0).unsqueeze(-1), validation=9 / 109, batch_size=32, max_epochs=2
    )
    assert [len(batch) for batch in seen] == [25] * 8
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert len(set(first.tolist())) == 100 and set(first.tolist()) == set(second.tolist())
    assert first.tolist() != second.tolist()


def test_frozen_parameters_and_buffers_stay() -> None:
    flow = pf.Flow(
        [
            pf.transforms.AffineCoupling(2, network=mlp((8,))),
            pf.transforms.LowerTriangularAffine(2),
        ]
    )
    last = flow.transform.layers[-1].requires_grad_(False)
    before = copy_of(last)
    quickly(flow, noise(N, 2) + 1.0)
    assert same(before, copy_of(last))


def test_weight_decay_pulls_parameters_to_zero() -> None:
    module = Normal()
    quickly(module, 2.0 + noise(N, 2), max_epochs=100, learning_rate=3e-2, weight_decay=3.0)
    assert float(module.mean.detach().abs().max()) < 1.5


def test_gradient_mode_of_the_caller_does_not_matter() -> None:
    flow = pf.RealNVP(2, **PRESET)
    with torch.no_grad():
        report = quickly(flow, 2.0 + noise(N, 2))
        assert not torch.is_grad_enabled()
    assert report.best_epoch > 0


# How it ends


def test_an_interruption_keeps_what_was_learnt() -> None:
    def interrupt(call: int) -> float:
        if call == 4:
            raise KeyboardInterrupt
        return 0.0

    module, x = Normal(interrupt), 1.0 + noise(N, 2)
    report = quickly(module, x, batch_size=90, max_epochs=10, learning_rate=1e-1)
    assert report.reason == "it was interrupted" and report.steps == 4
    assert report.epochs == 1 and report.best_epoch == 1 and float(module.mean[0].detach()) > 0
    assert not module.training


def test_a_second_interruption_keeps_the_best_so_far() -> None:
    class Impatient(Normal):
        def forward(self, context: Tensor | None = None) -> dist.Distribution:
            if self.calls >= 8:
                raise KeyboardInterrupt
            return super().forward(context)

    module = Impatient()
    report = quickly(module, 1.0 + noise(N, 2), batch_size=90, max_epochs=10)
    assert report.reason == "it was interrupted" and report.epochs == 1
    assert float(module.mean[0].detach()) > 0


def test_a_failure_in_training_restores_the_best_and_is_raised() -> None:
    def fail(call: int) -> float:
        if call == 6:
            raise RuntimeError("no inverse")
        return 0.0

    module = Normal(fail)
    with pytest.raises(RuntimeError, match="no inverse"):
        quickly(module, 1.0 + noise(N, 2), batch_size=90, max_epochs=10)
    after_one = Normal()
    quickly(after_one, 1.0 + noise(N, 2), batch_size=90, max_epochs=10, patience=1)
    assert not module.training and float(module.mean[0].detach()) > 0


def test_the_time_limit_ends_the_training_within_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    timed = functools.partial(Deadline, clock=lambda: clock[0])
    monkeypatch.setattr(likelihood, "Deadline", timed)

    def tick(call: int) -> float:
        clock[0] += 1.0
        return 0.0

    module = Normal(tick)
    report = quickly(
        module, 1.0 + noise(N, 2), batch_size=90, max_epochs=100, time_limit=5.0, learning_rate=1e-1
    )
    assert report.steps == 5 and report.epochs == 2 and report.seconds == 5.0
    assert report.reason == "the time limit of 5 s was reached"
    assert report.best_epoch == 2


def test_steps_that_are_not_finite_are_skipped_and_counted() -> None:
    module = Normal(lambda call: math.nan if call % 2 else 0.0)
    report = quickly(module, 1.0 + noise(N, 2), batch_size=90, max_epochs=50, learning_rate=3e-2)
    assert (report.steps, report.skipped) == (200, 100)
    assert bool(module.mean.isfinite().all()) and float(module.mean[0].detach()) == pytest.approx(
        1.0, abs=0.3
    )
    assert all(math.isfinite(value) for value in report.train)
    assert "100 of 200 steps were skipped as not finite" in str(report)
    hopeless = quickly(Normal(lambda call: math.nan), 1.0 + noise(N, 2), patience=2, max_epochs=50)
    assert (
        hopeless.best_epoch == 0
        and hopeless.steps == hopeless.skipped
        and math.isnan(hopeless.train[-1])
    )


def test_the_report_is_a_sentence() -> None:
    report = DensityReport(
        (-3.0, -2.0, -1.5), (-3.1, -2.1, -2.2), 1, 8, 0, 2.4, "all 2 epochs were done", 90, 10
    )
    assert str(report) == (
        "The validation log-likelihood is -2.100 nats per point (10 points), reached in epoch 1; training ended after 2 "
        "epochs and 2 s because all 2 epochs were done."
    )
    assert (report.log_likelihood, report.epochs) == (-2.1, 2)
    with pytest.raises(AttributeError):
        report.steps = 3  # type: ignore[misc]


def test_progress_is_shown_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    quickly(Normal(), noise(N, 2), progress=True)
    assert "best -" in capfd.readouterr().err
    quickly(Normal(), noise(N, 2))
    assert not capfd.readouterr().err


# How it fails


class NoDistribution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self) -> Tensor:
        return self.weight


class Batched(Normal):
    def forward(self, context: Tensor | None = None) -> dist.Distribution:
        return dist.Normal(self.mean, 1.0)


def with_nan(rows: int) -> Tensor:
    x = noise(N, 2)
    x[5 : 5 + rows, 0] = math.nan
    return x


BAD: dict[str, tuple[Callable[[], DensityReport], type[Exception], str]] = {
    "flow": (lambda: quickly("flow", noise(N, 2)), TypeError, "Expected flow to be a module"),
    "no-parameters": (
        lambda: quickly(nn.Identity(), noise(N, 2)),
        ValueError,
        "parameters to train; got Identity",
    ),
    "no-distribution": (
        lambda: quickly(NoDistribution(), noise(N, 2)),
        TypeError,
        "return a distribution.*got Parameter",
    ),
    "batched": (
        lambda: quickly(Batched(), noise(N, 2)),
        ValueError,
        r"single points; got one of batch shape \(2,\)",
    ),
    "x-list": (
        lambda: quickly(small(), noise(N, 2).tolist()),
        TypeError,
        "Expected x to be a tensor",
    ),
    "x-array-of-integers": (
        lambda: quickly(small(), np.ones((N, 2), int)),
        TypeError,
        "floating-point dtype",
    ),
    "x-array-of-text": (
        lambda: quickly(small(), np.full((N, 2), "1")),
        TypeError,
        "Expected x to be a tensor",
    ),
    "x-array-with-masked-entries": (
        lambda: quickly(small(), np.ma.masked_less(noise(N, 2).numpy(), -2)),
        ValueError,
        "finite numbers in x; 18 of 400 rows",
    ),
    "x-integers": (
        lambda: quickly(small(), torch.ones(N, 2).long()),
        TypeError,
        "floating-point dtype",
    ),
    "x-width": (
        lambda: quickly(small(), noise(N, 3)),
        ValueError,
        r"x of shape \(N, 2\); got \(400, 3\)",
    ),
    "x-rank": (lambda: quickly(small(), noise(2)), ValueError, r"x of shape \(N, 2\); got \(2,\)"),
    "x-empty": (
        lambda: quickly(small(), noise(0, 2)),
        ValueError,
        r"points along its first dimension; got shape \(0, 2\)",
    ),
    "x-nan": (
        lambda: quickly(small(), with_nan(3)),
        ValueError,
        "finite numbers in x; 3 of 400 rows .* first is row 5",
    ),
    "few": (
        lambda: quickly(small(), noise(2, 2)),
        ValueError,
        "at least 2 points to train on.*got 2 points in all",
    ),
    "few-given": (
        lambda: quickly(small(), noise(1, 2), validation=noise(9, 2)),
        ValueError,
        "to train on; got 1",
    ),
    "context-unwanted": (
        lambda: quickly(small(), noise(N, 2), noise(N, 1)),
        ValueError,
        "Expected no context",
    ),
    "context-missing": (
        lambda: quickly(small(1), noise(N, 2)),
        ValueError,
        "Expected context of shape",
    ),
    "context-width": (
        lambda: quickly(small(1), noise(N, 2), noise(N, 2)),
        ValueError,
        "Expected context of shape",
    ),
    "context-rows": (
        lambda: quickly(small(1), noise(N, 2), noise(9, 1)),
        ValueError,
        "each of the 400 points; got",
    ),
    "context-nan": (
        lambda: quickly(small(2), noise(N, 2), with_nan(1)),
        ValueError,
        "in context; 1 of 400 rows",
    ),
    "support": (
        lambda: quickly(small(support=constraints.positive), noise(N, 2).abs() - 0.01),
        ValueError,
        r"x within the support .* rows are not so",
    ),
    "density": (
        lambda: quickly(small(), 1e30 * noise(N, 2)),
        ValueError,
        "finite density at every point of x before",
    ),
    "validation-0": (
        lambda: quickly(small(), noise(N, 2), validation=0.0),
        ValueError,
        "validation between 0 and 1",
    ),
    "validation-1": (
        lambda: quickly(small(), noise(N, 2), validation=1),
        ValueError,
        "validation between 0 and 1",
    ),
    "validation-nan": (
        lambda: quickly(small(), noise(N, 2), validation=math.nan),
        ValueError,
        "between 0 and 1.*got nan",
    ),
    "validation-text": (
        lambda: quickly(small(), noise(N, 2), validation="x"),
        TypeError,
        "validation to be a fraction",
    ),
    "validation-bool": (
        lambda: quickly(small(), noise(N, 2), validation=True),
        TypeError,
        "validation to be a fraction",
    ),
    "validation-width": (
        lambda: quickly(small(), noise(N, 2), validation=noise(9, 3)),
        ValueError,
        r"validation of shape \(N, 2\)",
    ),
    "validation-nan-rows": (
        lambda: quickly(small(), noise(N, 2), validation=with_nan(2)),
        ValueError,
        "finite numbers in validation; 2 of 400",
    ),
    "validation-context": (
        lambda: quickly(small(1), noise(N, 2), noise(N, 1), validation=noise(9, 2)),
        ValueError,
        "pair of points and contexts.*got no contexts",
    ),
    "batch-size": (
        lambda: quickly(small(), noise(N, 2), batch_size=0),
        ValueError,
        "batch_size >= 1",
    ),
    "learning-rate": (
        lambda: quickly(small(), noise(N, 2), learning_rate=-1.0),
        ValueError,
        "learning_rate to be pos",
    ),
    "max-epochs": (
        lambda: quickly(small(), noise(N, 2), max_epochs=0),
        ValueError,
        "max_epochs >= 1",
    ),
    "patience": (
        lambda: quickly(small(), noise(N, 2), patience=1.5),
        TypeError,
        "patience to be an integer",
    ),
    "weight-decay": (
        lambda: quickly(small(), noise(N, 2), weight_decay=-1),
        ValueError,
        "weight_decay to be positive",
    ),
    "seed": (lambda: quickly(small(), noise(N, 2), seed=-1), ValueError, "seed >= 0"),
    "time-limit": (
        lambda: quickly(small(), noise(N, 2), time_limit=0),
        ValueError,
        "time_limit to be positive",
    ),
    "constant": (
        lambda: quickly(pf.Flow([Standardize(2)]), torch.ones(N, 2)),
        ValueError,
        "parameters to train",
    ),
}


def small(context_features: int | None = None, **options: Any) -> pf.Flow:
    return pf.RealNVP(2, context_features, **PRESET, **options)


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    act, kind, sentence = BAD[case]
    with pytest.raises(kind, match=sentence) as raised:
        act()
    assert str(raised.value).endswith((".", ")."))


@pytest.mark.parametrize("x", [with_nan(1), noise(N, 3), noise(N, 2), torch.ones(N, 2)])
def test_what_is_refused_changes_nothing(x: Tensor) -> None:
    flow = pf.Flow([*pf.RealNVP(2, **PRESET).transform.layers, Standardize(2)])
    flow.transform.layers[0].eval()
    before, modes = copy_of(flow), [module.training for module in flow.modules()]
    held_out = noise(50, 2) if x.shape[-1] == 2 else noise(50, 3)
    held_out[0] = 1e35  # a standardised flow has no density there
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="Expected"):
        quickly(flow, x, validation=held_out)
    assert same(before, copy_of(flow)) and modes == [module.training for module in flow.modules()]
    assert torch.equal(torch.get_rng_state(), state)


# Standardize


def test_an_unfitted_last_layer_is_fitted_to_the_training_points() -> None:
    x, held_out = 1e4 + 1e3 * noise(N, 2), 1e4 + 1e3 * noise(50, 2, seed=1)
    flow = pf.Flow([*pf.RealNVP(2, **PRESET).transform.layers, last := Standardize(2)])
    report = quickly(flow, x, validation=held_out)
    torch.testing.assert_close(last.loc, x.mean(0))
    torch.testing.assert_close(last.scale, x.std(0))
    expected = dist.Normal(x.mean(0), x.std(0)).log_prob(held_out).sum(-1).mean()
    assert report.validation[0] == pytest.approx(float(expected), abs=1e-4)
    with pytest.warns(UserWarning, match="far from the points"):
        quickly(flow, 5.0 + noise(N, 2))
    torch.testing.assert_close(last.loc, x.mean(0))  # once fitted, it stays


def test_with_a_support_it_is_fitted_to_unconstrained_points() -> None:
    x = (5.0 + 0.1 * noise(N, 2)).exp()
    flow = pf.Flow(
        [*pf.RealNVP(2, **PRESET).transform.layers, last := Standardize(2)],
        support=constraints.positive,
    )
    quickly(flow, x, validation=x)
    torch.testing.assert_close(last.loc, x.log().mean(0))
    assert bool((flow().sample((100,)) > 0).all())


@pytest.mark.parametrize(
    "family",
    [
        functools.partial(pf.RealNVP, network=mlp((32, 32))),
        functools.partial(pf.MAF, hidden=(32, 32)),
    ],
    ids=["RealNVP", "MAF"],
)
@pytest.mark.slow
def test_independent_entries_hold_no_flow_at_a_normal(family: Callable[..., pf.Flow]) -> None:
    """For a uniform square the identity is a saddle point of affine flows, which the start must leave."""
    generator = torch.Generator().manual_seed(0)
    square, test = ((torch.rand(n, 2, generator=generator) - 0.5) * 12**0.5 for n in (3000, 5000))
    torch.manual_seed(0)
    flow = family(2, transforms=5)
    pf.fit_density(flow, square, validation=0.2, learning_rate=1e-2, max_epochs=60, progress=False)
    normal, truth = -1 - math.log(2 * math.pi), -math.log(12)
    scores = flow().log_prob(test).detach()
    error = float(scores.std()) / len(test) ** 0.5
    assert (normal + truth) / 2 < float(scores.mean()) < truth + 4 * error


def test_points_far_from_the_base_are_worth_a_word(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(UserWarning, match="The flow starts far from the points: .* means up to 100"):
        quickly(small(), 100.0 + noise(N, 2))
    with pytest.warns(UserWarning, match="standard deviations from 0.00954"):
        quickly(small(), 0.01 * noise(N, 2))
    recwarn.clear()
    quickly(pf.Flow([*small().transform.layers, Standardize(2)]), 100.0 + noise(N, 2))
    quickly(small(base=dist.Normal(100 * torch.ones(2), 1.0)), 100.0 + noise(N, 2))
    assert not recwarn.list


def test_standardize_is_an_affine_map_of_buffers(placement: torch.device) -> None:
    x = 3.0 + noise(50, 3) * torch.tensor([1e-3, 1.0, 1e3])
    t = Standardize.from_data(x).to(placement, torch.float64)
    assert not list(t.parameters()) and {"loc", "scale", "is_fitted"} == set(t.state_dict())
    z = noise(4, 3).double().to(placement)
    y, log_det = t.forward_and_log_det(z)
    back, inverse_log_det = t.inverse_and_log_det(y)
    _, _, score = t.push_score(z, -z)
    assert y.shape == back.shape == score.shape == (
        4,
        3,
    ) and log_det.shape == inverse_log_det.shape == (4,)
    if placement.type != "meta":
        torch.testing.assert_close(back, z)
        jacobian = torch.autograd.functional.jacobian(lambda v: t.forward_and_log_det(v)[0], z[0])
        torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1])
        torch.testing.assert_close(inverse_log_det, -log_det)
        torch.testing.assert_close(score, -z / x.double().std(0).to(placement), rtol=1e-6, atol=0.0)


def test_standardize_takes_numbers_of_any_size() -> None:
    x = noise(50, 3) * torch.tensor([1e-30, 1.0, 1e30])
    latent, log_det = Standardize.from_data(x).inverse_and_log_det(x)
    torch.testing.assert_close(latent.std(0), torch.ones(3))
    assert bool(log_det.isfinite().all())


def test_a_saved_standardize_is_fitted() -> None:
    fresh = Standardize(2)
    fresh.load_state_dict(Standardize.from_data(5.0 + noise(50, 2)).state_dict())
    assert bool(fresh.is_fitted) and not bool(Standardize(2).is_fitted)


@pytest.mark.parametrize(
    ("x", "kind", "sentence"),
    [
        (noise(1, 2), ValueError, "at least 2 points to standardise by; got 1"),
        (noise(2), ValueError, "at least 2 points to standardise by; got 1"),
        (noise(0, 2), ValueError, "at least 2 points to standardise by; got 0"),
        (with_nan(2), ValueError, "finite numbers in x; got 2 rows with others"),
        (
            torch.tensor([[1.0, 2.0], [3.0, 2.0]]),
            ValueError,
            r"entry of x to vary; got one value only in \[1\]",
        ),
        (noise(5, 3), ValueError, r"x of shape \(\*, 2\); got \(5, 3\)"),
        ([[1.0, 2.0]], TypeError, "x to be a tensor"),
        (torch.ones(3, 2).long(), TypeError, "floating-point"),
    ],
)
def test_what_standardize_refuses(x: Any, kind: type[Exception], sentence: str) -> None:
    t = Standardize(2)
    with pytest.raises(kind, match=sentence):
        t.fit(x)
    assert (
        not bool(t.is_fitted)
        and torch.equal(t.loc, torch.zeros(2))
        and torch.equal(t.scale, torch.ones(2))
    )


@pytest.mark.parametrize(
    ("x", "kind"), [(torch.tensor(1.0), ValueError), ([1.0], TypeError), (noise(1, 2), ValueError)]
)
def test_what_from_data_refuses(x: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="Expected"):
        Standardize.from_data(x)


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("progress", "x", "progress to be True or False"),
        ("compile", 1, "compile to be True or False"),
        ("mixed_precision", "yes", "mixed_precision to be True or False"),
        ("average", "x", "average to be a number"),
    ],
)
def test_options_of_another_type_are_told(option: str, value: Any, match: str) -> None:
    with pytest.raises(TypeError, match=f"Expected {match}; got {value!r}"):
        fit_density(pf.MAF(2), torch.randn(50, 2), **{option: value})
