"""fit_posterior against closed-form posteriors and evidences, its options, and how it fails."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

import pyroflows as pf
from pyroflows import AutoFlow, fit_posterior
from pyroflows.examples import load_example
from pyroflows.posterior import census as census_module
from pyroflows.posterior import climb as climb_module
from pyroflows.posterior import ladder as ladder_module
from pyroflows.posterior import subject as subject_module
from pyroflows.train import loop as loop_module

Model = Callable[..., Any]


def quickly(model: Model, *args: Any, steps: int = 60, **options: Any) -> pf.Posterior:
    return fit_posterior(model, *args, steps=steps, progress=False, **options)


# Conjugate models


class Conjugate(NamedTuple):
    """A model whose posterior and evidence are known."""

    model: Model
    args: tuple[Tensor, ...]
    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    log_evidence: float


def normal_normal(dtype: torch.dtype) -> Conjugate:
    y = torch.tensor([1.2, 0.4, 2.9, 2.2], dtype=torch.float64)
    prior, noise = 2.0, 1.5

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), prior))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(mu, noise), obs=y)

    precision = 1 / prior**2 + 4 / noise**2
    covariance = noise**2 * torch.eye(4, dtype=y.dtype) + prior**2
    evidence = dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
    mean = y.sum() / noise**2 / precision
    return Conjugate(
        model, (y.to(dtype),), {"mu": mean}, {"mu": torch.tensor(precision**-0.5)}, float(evidence)
    )


def beta_binomial(dtype: torch.dtype) -> Conjugate:
    a, b, n, k = 2.0, 5.0, 20, 7.0

    def model(k: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(k.new_tensor(a), b))
        pyro.sample("k", dist.Binomial(n, p), obs=k)

    after = dist.Beta(torch.tensor(a + k, dtype=torch.float64), b + n - k)

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    evidence = math.log(math.comb(n, int(k))) + log_beta(a + k, b + n - k) - log_beta(a, b)
    return Conjugate(
        model, (torch.tensor(k, dtype=dtype),), {"p": after.mean}, {"p": after.stddev}, evidence
    )


def linear_regression(dtype: torch.dtype) -> Conjugate:
    x = torch.stack(
        [torch.ones(12), torch.linspace(-1, 3, 12), torch.linspace(0, 2, 12) ** 2], -1
    ).double()
    noise, prior = 0.7, 2.0
    y = (
        x @ torch.tensor([0.5, -1.0, 0.8]).double()
        + noise * torch.sin(9 * torch.arange(12.0)).double()
    )

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), prior).to_event(1))
        with pyro.plate("n", 12):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    covariance = torch.linalg.inv(x.mT @ x / noise**2 + torch.eye(3).double() / prior**2)
    marginal = noise**2 * torch.eye(12).double() + prior**2 * x @ x.mT
    evidence = dist.MultivariateNormal(torch.zeros_like(y), marginal).log_prob(y)
    mean = covariance @ (x.mT @ y) / noise**2
    return Conjugate(
        model,
        (x.to(dtype), y.to(dtype)),
        {"w": mean},
        {"w": covariance.diagonal().sqrt()},
        float(evidence),
    )


def gamma_poisson(dtype: torch.dtype) -> Conjugate:
    a, b = 3.0, 0.5
    counts = torch.tensor([4.0, 7.0, 2.0], dtype=torch.float64)

    def model(counts: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(a), b))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Poisson(rate), obs=counts)

    after = dist.Gamma(a + counts.sum(), b + 3)
    evidence = (
        a * math.log(b)
        - math.lgamma(a)
        + math.lgamma(a + float(counts.sum()))
        - (a + float(counts.sum())) * math.log(b + 3)
        - float((counts + 1).lgamma().sum())
    )
    return Conjugate(
        model, (counts.to(dtype),), {"rate": after.mean}, {"rate": after.stddev}, evidence
    )


def assert_moments(
    posterior: pf.Posterior, mean: dict[str, Tensor], sd: dict[str, Tensor], n: int = 4000
) -> None:
    """Means and standard deviations within five standard errors of n draws."""
    for name, draws in posterior.sample(n, seed=1).items():
        if name in mean:
            draws = draws.double()
            assert float(((draws.mean(0) - mean[name]) / sd[name]).abs().max()) < 5 / math.sqrt(
                n
            ), name
            assert float((draws.std(0) / sd[name]).log().abs().max()) < 6 / math.sqrt(2 * n), name


SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.mark.parametrize(
    ("make", "default", "dtype"),
    [
        (normal_normal, SINGLE, SINGLE),
        (gamma_poisson, SINGLE, SINGLE),
        (linear_regression, DOUBLE, DOUBLE),
        (beta_binomial, SINGLE, DOUBLE),
    ],
)
def test_a_conjugate_model(
    make: Callable[[torch.dtype], Conjugate], default: torch.dtype, dtype: torch.dtype
) -> None:
    truth = make(dtype)
    torch.set_default_dtype(default)
    posterior = quickly(truth.model, truth.args)
    (draws,) = posterior.sample(10).values()
    assert draws.dtype == dtype
    assert posterior.verdict.ok, posterior
    rounding = 1e-4 if dtype == torch.float64 else 2e-3
    assert (
        abs(posterior.log_evidence - truth.log_evidence)
        < 4 * posterior.verdict.log_evidence_error + rounding
    )
    assert posterior.verdict.elbo < truth.log_evidence + rounding
    assert_moments(posterior, truth.mean, truth.sd)


def test_priors_in_single_and_data_in_double_precision() -> None:
    truth = normal_normal(torch.float64)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(mu, 1.5), obs=y)

    posterior = quickly(model, truth.args)
    assert posterior.density.mode == "captured"
    assert abs(posterior.log_evidence - truth.log_evidence) < 2e-3
    assert_moments(posterior, truth.mean, truth.sd)


# Harder models


def schools_by_quadrature() -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Moments of eight schools: theta integrated out in closed form, mu and log tau on a grid."""
    example = load_example("eight_schools")
    y, sigma = example.kwargs["y"].double(), example.kwargs["sigma"].double()
    mu = torch.linspace(-35, 45, 801).double()
    log_tau = torch.linspace(-14, 7, 1401).double()
    m, t = torch.meshgrid(mu, log_tau.exp(), indexing="ij")
    log_p = (
        dist.Normal(0.0, 5.0).log_prob(m)
        + dist.HalfCauchy(torch.tensor(5.0).double()).log_prob(t)
        + t.log()
    )
    for y_j, sigma_j in zip(y, sigma, strict=True):
        log_p = log_p + dist.Normal(m, (sigma_j**2 + t**2).sqrt()).log_prob(y_j)
    cell = float((mu[1] - mu[0]) * (log_tau[1] - log_tau[0]))
    evidence = float(log_p.flatten().logsumexp(0)) + math.log(cell)
    weight = (log_p - evidence).exp() * cell

    def expect(value: Tensor) -> Tensor:
        return (weight * value).sum()

    mean = {"mu": expect(m), "tau": expect(t)}
    second = {"mu": expect(m**2), "tau": expect(t**2)}
    shrunk = [(y_j / s**2 * t**2 + m) / (1 + t**2 / s**2) for y_j, s in zip(y, sigma, strict=True)]
    spread = [t**2 / (1 + t**2 / s**2) for s in sigma]
    mean["theta"] = torch.stack([expect(value) for value in shrunk])
    second["theta"] = torch.stack(
        [expect(value**2 + v) for value, v in zip(shrunk, spread, strict=True)]
    )
    sd = {name: (second[name] - mean[name] ** 2).sqrt() for name in mean}
    return mean, sd, evidence


#: Over eight seeds the effective share of a centred fit is .85, with a standard deviation of .06;
#: three of these below it.
LEAST_CENTRED_ESS = 0.66


@pytest.mark.slow
def test_eight_schools_centred() -> None:
    mean, sd, evidence = schools_by_quadrature()
    example = load_example("eight_schools")
    posterior = quickly(example.model, example.args, example.kwargs, steps=1500)
    assert posterior.verdict.ok, posterior
    assert posterior.verdict.ess > LEAST_CENTRED_ESS
    # The error is that of the draws; what the guide leaves out where tau is all but zero is a hundredth of the mass.
    assert abs(posterior.log_evidence - evidence) < 0.02
    for name, draws in posterior.sample(20_000, seed=1).items():
        assert float(((draws.mean(0) - mean[name]) / sd[name]).abs().max()) < 0.05, name
        assert float((draws.std(0) / sd[name]).log().abs().max()) < 0.07, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight_schools", "eight_schools_noncentered"])
@pytest.mark.parametrize(
    ("seed", "dtype"),
    [(0, torch.float32), (1, torch.float32), (2, torch.float32), (0, torch.float64)],
)
def test_eight_schools_for_every_seed(name: str, seed: int, dtype: torch.dtype) -> None:
    mean, sd, evidence = schools_by_quadrature()
    torch.set_default_dtype(dtype)
    example = load_example(name)
    posterior = fit_posterior(
        example.model, example.args, example.kwargs, seed=seed, progress=False
    )
    assert posterior.verdict.ok, posterior
    assert posterior.verdict.ess > (LEAST_CENTRED_ESS if name == "eight_schools" else 0.85)
    assert abs(posterior.log_evidence - evidence) < 0.02
    draws = posterior.sample(20_000, seed=1)
    for site in mean:
        assert float(((draws[site].mean(0) - mean[site]) / sd[site]).abs().max()) < 0.05, site
        assert float((draws[site].std(0) / sd[site]).log().abs().max()) < 0.07, site


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_funnel(seed: int) -> None:
    example = load_example("funnel")
    posterior = fit_posterior(example.model, seed=seed, progress=False)
    assert posterior.verdict.ess > 0.8
    assert abs(posterior.log_evidence) < 4 * posterior.verdict.log_evidence_error + 0.01
    v = posterior.sample(20_000, seed=1)["v"]
    assert abs(float(v.mean()) / 3) < 0.08
    assert abs(math.log(float(v.std()) / 3)) < 0.15


@pytest.mark.slow
def test_the_funnel_in_two_dimensions() -> None:
    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 1.5))
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    posterior = quickly(model, steps=300)
    assert abs(posterior.log_evidence) < 4 * posterior.verdict.log_evidence_error + 0.01
    v = posterior.sample(4000, seed=1)["v"]
    assert abs(float(v.mean()) / 1.5) < 0.1
    assert abs(math.log(float(v.std()) / 1.5)) < 0.1


def test_discrete_sites_are_summed_out() -> None:
    y = torch.tensor([-2.1, -1.7, 1.9, 2.4, 2.2, -1.8, 2.0])

    def model() -> None:
        # So narrow a prior leaves the mirror image at -2 without mass.
        mu = pyro.sample("mu", dist.Normal(2.0, 0.5))
        with pyro.plate("n", 7):
            k = pyro.sample("k", dist.Bernoulli(0.6))
            pyro.sample("y", dist.Normal(mu * (2 * k - 1), 0.5), obs=y)

    grid = torch.linspace(-6, 8, 4001).double().unsqueeze(-1)
    of_data = torch.logaddexp(
        dist.Normal(grid, 0.5).log_prob(y) + math.log(0.6),
        dist.Normal(-grid, 0.5).log_prob(y) + math.log(0.4),
    ).sum(-1)
    log_p = of_data + dist.Normal(2.0, 0.5).log_prob(grid[:, 0])
    width = float(grid[1] - grid[0])
    evidence = float(log_p.logsumexp(0)) + math.log(width)
    weight = (log_p - evidence).exp() * width
    mean = (weight * grid[:, 0]).sum()
    sd = (weight * (grid[:, 0] - mean) ** 2).sum().sqrt()

    posterior = quickly(model)
    assert posterior.verdict.ok, posterior
    assert abs(posterior.log_evidence - evidence) < 4 * posterior.verdict.log_evidence_error + 1e-3
    assert set(posterior.sample(10)) == {"mu"}
    assert_moments(posterior, {"mu": mean}, {"mu": sd})


def test_a_model_that_is_a_module() -> None:
    class Linear(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PyroModule[torch.nn.Linear](2, 1, bias=False)
            self.layer.weight = PyroSample(dist.Normal(0.0, 2.0).expand([1, 2]).to_event(2))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            mean = self.layer(x).squeeze(-1)
            with pyro.plate("n", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.5), obs=y)
            return mean

    x = torch.stack([torch.linspace(-1, 1, 8), torch.ones(8)], -1)
    y = 0.7 * x[:, 0] - 0.2
    covariance = torch.linalg.inv(x.mT @ x / 0.25 + torch.eye(2) / 4)
    mean = covariance @ (x.mT @ y) / 0.25
    posterior = quickly(Linear(), (x, y))
    assert posterior.verdict.ok
    assert_moments(
        posterior,
        {"layer.weight": mean.reshape(1, 2)},
        {"layer.weight": covariance.diagonal().sqrt()},
    )


def test_a_start_of_zero_density_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder_module, "POLISH_TRAJECTORIES", 4)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Uniform(x - 1, x + 1), obs=torch.tensor(1.5))

    posterior = quickly(model)
    x = posterior.sample(500, seed=0)["x"]
    assert abs(float(x.mean()) - 1.4) < 0.3


def test_a_model_that_cannot_be_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(climb_module, "JUDGE_DRAWS", 300)
    # A search of one point at a time takes its time by every one of these.
    monkeypatch.setattr(ladder_module, "POLISH_TRAJECTORIES", 2)
    monkeypatch.setattr(subject_module, "ROAMERS", 8)
    monkeypatch.setattr(subject_module, "CHAINS", 50)
    monkeypatch.setattr(census_module, "GRADIENTS", 0)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        noise = 1.0 if x.item() > -20 else 2.0
        pyro.sample("y", dist.Normal(x, noise), obs=torch.tensor(1.0))

    with pytest.warns(UserWarning, match="one point at a time") as caught:
        posterior = fit_posterior(model, steps=2, progress=False)
    assert [warning.filename for warning in caught] == [__file__]
    evidence = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(1.0)))
    assert abs(posterior.log_evidence - evidence) < 0.02


# Randomness and state


def correlated() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x[0] + (2 * x[1]).exp(), 0.2), obs=torch.tensor(1.0))


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_the_same_seed_gives_the_same_posterior() -> None:
    first = quickly(correlated, seed=5, steps=10)
    torch.manual_seed(99)
    second, other = (quickly(correlated, seed=seed, steps=10) for seed in (5, 6))
    assert first.history == second.history
    assert first.verdict == second.verdict
    for a, b in zip(first.guide.parameters(), second.guide.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.history != first.history


def test_the_random_state_outside_is_left_as_it_was() -> None:
    before = random_states()
    posterior = quickly(correlated, steps=3)
    posterior.sample(10, seed=0)
    posterior.summary(10)
    posterior.to_arviz(10)
    assert random_states() == before


def test_without_a_seed_the_state_outside_decides() -> None:
    histories = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        histories.append(quickly(correlated, steps=3, seed=None).history)
    assert histories[0] == histories[1] != histories[2]


def test_the_param_store_and_the_data_are_left_as_they_were() -> None:
    pyro.param("mine", torch.tensor(3.0))
    truth = linear_regression(torch.float32)
    before = [value.clone() for value in truth.args]
    posterior = quickly(truth.model, truth.args, steps=3)
    posterior.sample(10)
    posterior.to_arviz(10)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert float(pyro.param("mine").detach()) == 3.0
    assert all(torch.equal(a, b) for a, b in zip(truth.args, before, strict=True))
    assert not any(value.requires_grad for value in truth.args)


def test_a_surrounding_trace_and_plate_see_nothing() -> None:
    with poutine.trace() as outer:
        quickly(correlated, steps=2)
    assert not [name for name, site in outer.trace.nodes.items() if site["type"] == "sample"]


def test_validation_is_left_as_it_was() -> None:
    for enabled in (True, False):
        with pyro.validation_enabled(enabled):
            quickly(correlated, steps=2)
            assert dist.Normal(0.0, 1.0)._validate_args is enabled


# Guides


@pytest.mark.parametrize(
    "guide",
    [
        pytest.param("auto", marks=pytest.mark.slow),  # the other tests have it
        pf.RealNVP,
        pytest.param(pf.NICE, marks=pytest.mark.slow),
        lambda features: pf.RealNVP(features, transforms=2, network=pf.nn.mlp((8,))),
        lambda features: pf.Flow([pf.transforms.AffineCoupling(features)]),
        lambda features: pf.transforms.AffineCoupling(features),
    ],
    ids=["auto", "RealNVP", "NICE", "callable", "flow", "transform"],
)
def test_every_form_of_guide(guide: Any) -> None:
    posterior = quickly(correlated, steps=20, guide=guide)
    assert isinstance(posterior.guide, AutoFlow)
    assert len(posterior.history) == 20
    assert posterior.history[-1] > -6
    assert posterior.sample(5)["x"].shape == (5, 2)


def test_an_own_guide_is_trained_in_place_and_on() -> None:
    guide = AutoFlow(correlated)
    first = quickly(correlated, guide=guide, steps=40)
    assert first.guide is guide
    kept = [p.detach().clone() for p in guide.parameters()]
    untouched = quickly(correlated, guide=guide, steps=0)
    assert all(torch.equal(a, b) for a, b in zip(guide.parameters(), kept, strict=True))
    assert untouched.verdict.elbo == pytest.approx(first.verdict.elbo, abs=1e-5)
    second = quickly(correlated, guide=guide, steps=20, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(guide.parameters(), kept, strict=True))
    # It goes on from where it was, not from the start.
    assert sum(second.history[:5]) / 5 > first.history[0]
    assert second.verdict.elbo > first.verdict.elbo - 0.05


def test_a_guide_from_svi_is_trained_on() -> None:
    guide = AutoFlow(correlated, init_scale=0.5)
    svi = SVI(
        correlated,
        guide,
        pyro.optim.Adam({"lr": 1e-2}),
        Trace_ELBO(num_particles=4, vectorize_particles=False),
    )
    for _ in range(20):
        svi.step()
    before = quickly(correlated, guide=guide, steps=0).verdict.elbo
    after = quickly(correlated, guide=guide, steps=40).verdict.elbo
    assert after > before


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(pf.train.objectives.PathELBO(num_particles=32), marks=pytest.mark.slow),
        pf.train.objectives.ImportanceWeightedBound(num_particles=64),
    ],
    ids=["PathELBO", "ImportanceWeightedBound"],
)
def test_flows_are_trained_for_the_objective_that_is_asked_for(objective: Any) -> None:
    before, after = (
        quickly(correlated, steps=steps, guide=pf.RealNVP, objective=objective) for steps in (0, 60)
    )
    assert len(after.history) == 60
    assert sum(after.history[-20:]) > sum(after.history[:20])
    assert after.verdict.ess > before.verdict.ess


# Progress, time, interruption


def test_without_progress_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quickly(correlated, steps=3)
    assert capfd.readouterr() == ("", "")


def test_with_progress_a_bar_with_the_elbo_is_shown_on_stderr(
    capfd: pytest.CaptureFixture[str],
) -> None:
    fit_posterior(correlated, steps=60)
    out, err = capfd.readouterr()
    assert out == ""
    assert "60/60" in err
    assert "ELBO -" in err


def test_the_time_limit_is_respected() -> None:
    quickly(correlated, steps=1)
    posterior = quickly(load_example("funnel").model, steps=1_000_000, time_limit=1)
    # Less than a rung's steps, on a machine of any speed that begins the rung at all.
    assert len(posterior.history) < 150 + 1500 + 2500
    assert not posterior.interrupted


def test_a_time_limit_that_is_over_at_once_still_gives_a_posterior() -> None:
    posterior = quickly(correlated, time_limit=1e-6)
    assert str(posterior.verdict) == (
        "Do not trust this posterior: it has not been judged, because the time limit of 1e-06 s "
        "ended the fit at the Gaussian; allow more time."
    )
    assert posterior.history == []
    assert posterior.sample(3)["x"].shape == (3, 2)


class Bar:
    """A progress bar at which Ctrl-C is pressed."""

    at = 0
    act: Callable[[int], None] = staticmethod(lambda step: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.step = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass

    def update(self, steps: int = 1) -> None:
        if not steps:
            return
        self.step += 1
        type(self).act(self.step)
        if self.step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 60])
def test_an_interruption_returns_the_posterior_so_far(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "tqdm", type("Pressed", (Bar,), {"at": at}))
    posterior = quickly(correlated, steps=1000)
    assert posterior.interrupted
    assert "interrupted" in repr(posterior)
    assert len(posterior.history) == at
    assert posterior.sample(3)["x"].shape == (3, 2)
    assert math.isfinite(posterior.log_evidence)


def test_an_interruption_brings_the_best_parameters_back(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = AutoFlow(correlated)
    seen: list[list[Tensor]] = []

    def networks() -> list[Tensor]:
        return [p for layer in guide.flow.transform.layers[:-1] for p in layer.parameters()]

    def spoil(step: int) -> None:
        if step == 50:
            seen.append([p.detach().clone() for p in networks()])
        if step == 70:
            with torch.no_grad():
                for p in networks():
                    p += 1.0

    monkeypatch.setattr(
        loop_module, "tqdm", type("Pressed", (Bar,), {"at": 75, "act": staticmethod(spoil)})
    )
    posterior = quickly(correlated, guide=guide, steps=1000)
    assert posterior.interrupted
    assert all(torch.equal(a, b) for a, b in zip(networks(), seen[0], strict=True))


def test_an_interruption_before_the_training_returns_a_posterior(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pressed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(climb_module, "take_census", pressed)
    posterior = quickly(correlated)
    assert posterior.interrupted
    assert posterior.history == []
    assert posterior.sample(3)["x"].shape == (3, 2)


@pytest.mark.filterwarnings("ignore:This model cannot be evaluated")
def test_an_interruption_within_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(climb_module, "JUDGE_DRAWS", 100)
    calls = 0

    def model() -> None:
        nonlocal calls
        calls += 1
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if float(x.detach()) > 1e9 or calls == 1000:
            raise KeyboardInterrupt

    posterior = quickly(model, steps=10)
    assert posterior.interrupted
    assert posterior.sample(3)["x"].shape == (3,)


# Arguments


def test_keyword_arguments_reach_the_model() -> None:
    def model(*, y: Tensor, scale: float = 1.0) -> None:
        x = pyro.sample("x", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    posterior = quickly(model, kwargs={"y": torch.tensor(1.0), "scale": 3.0}, steps=5)
    evidence = float(dist.Normal(0.0, math.sqrt(10.0)).log_prob(torch.tensor(1.0)))
    assert abs(posterior.log_evidence - evidence) < 1e-2


def test_it_runs_where_it_is_told(device: torch.device) -> None:
    truth = linear_regression(torch.float32)
    posterior = quickly(truth.model, truth.args, steps=20, device=str(device))
    assert posterior.sample(10)["w"].device.type == device.type
    assert posterior.verdict.ok
    assert (
        abs(posterior.log_evidence - truth.log_evidence)
        < 4 * posterior.verdict.log_evidence_error + 2e-3
    )
    summary = posterior.summary(100)
    assert len(summary) == 3
    assert posterior.to_arviz(20)["posterior"]["w"].shape == (1, 20, 3)


# Failures


def fine() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def without_latents() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def without_sites() -> None:
    pass


def only_empty() -> None:
    pyro.sample("nothing", dist.Normal(torch.zeros(0), 1.0).to_event(1))


def only_discrete() -> None:
    pyro.sample("coin", dist.Bernoulli(0.5))


def counts() -> None:
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    pyro.sample("events", dist.Poisson(rate))


def random_log_density() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.rand(()))


def subsampled() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=5) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.zeros(10)[index])


def nan_in_the_data() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("good", dist.Normal(mu, 1.0), obs=torch.tensor(0.0))
    with pyro.plate("data", 2):
        pyro.sample("bad", dist.Normal(mu, 1.0), obs=torch.tensor([1.0, math.nan]))


def nan_in_a_predictor() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 2):
        pyro.sample("bad", dist.Normal(mu * torch.tensor([1.0, math.nan]), 1.0), obs=torch.zeros(2))


def impossible_data() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("good", dist.Normal(mu, 1.0), obs=torch.tensor(0.0))
    pyro.sample("bad", dist.Uniform(0.0, 1.0), obs=torch.tensor(2.0))


def impossible_factor() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("bad", torch.where(mu > 100, 0.0, -math.inf))


def infinite_factor() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("bad", 0 * mu + math.inf)


def nan_factor() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("bad", (-(mu**2) - 1).sqrt())


def changing_shape() -> Model:
    runs = 0

    def model() -> None:
        nonlocal runs
        runs += 1
        pyro.sample("x", dist.Normal(torch.zeros(runs), 1.0).to_event(1))

    return model


def changing_sites() -> Model:
    runs = 0

    def model() -> None:
        nonlocal runs
        runs += 1
        pyro.sample("x", dist.Normal(0.0, 1.0))
        if runs % 2 == 0:
            pyro.sample("x_even", dist.Normal(0.0, 1.0))

    return model


def bounded_by_a_latent() -> None:
    width = pyro.sample("width", dist.Gamma(2.0, 1.0))
    pyro.sample("u", dist.Uniform(0.0, width))


def of_unknown_support() -> None:
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


def guide_of(model: Model) -> AutoFlow:
    guide = AutoFlow(model)
    guide()
    return guide


def other_names() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def other_shape() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def on_the_simplex() -> None:
    pyro.sample("x", dist.Dirichlet(torch.ones(2)))


def on_the_positive_half() -> None:
    pyro.sample("x", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))


FAILURES: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("no latent site", without_latents, {}, ValueError, "Expected a model with a latent site"),
    ("no site", without_sites, {}, ValueError, "Expected a model with a latent site"),
    ("only empty", only_empty, {}, ValueError, r"got only empty ones \('nothing'\)"),
    ("only discrete", only_discrete, {}, ValueError, r"got only discrete ones \('coin'\)"),
    ("infinite discrete", counts, {}, ValueError, "got 'events' with Poisson"),
    ("random", random_log_density, {}, ValueError, "random numbers outside of pyro.sample"),
    (
        "NaN in the data",
        nan_in_the_data,
        {},
        ValueError,
        r"site 'bad' gives nan\. Look for NaN in the data",
    ),
    (
        "NaN in a predictor",
        nan_in_a_predictor,
        {},
        ValueError,
        r"site 'bad' gives nan\. Look for NaN in the data",
    ),
    ("impossible data", impossible_data, {}, ValueError, "site 'bad' gives -inf"),
    ("impossible factor", impossible_factor, {}, ValueError, "site 'bad' gives -inf"),
    ("infinite factor", infinite_factor, {}, ValueError, "site 'bad' gives inf"),
    ("NaN factor", nan_factor, {}, ValueError, "site 'bad' gives nan"),
    (
        "bounded by a latent",
        bounded_by_a_latent,
        {},
        ValueError,
        "got 'u', whose support depends on other latent sites",
    ),
    ("unknown support", of_unknown_support, {}, ValueError, "'direction'"),
    ("model is a number", 3, {}, TypeError, "Expected model to be a callable"),
    ("model is None", None, {}, TypeError, "Expected model to be a callable"),
    (
        "args is a tensor",
        fine,
        {"args": torch.zeros(2)},
        TypeError,
        "Expected args to be a sequence",
    ),
    ("args is a number", fine, {"args": 3}, TypeError, "Expected args to be a sequence"),
    ("args is a string", fine, {"args": "ab"}, TypeError, "Expected args to be a sequence"),
    ("kwargs is a list", fine, {"kwargs": [1]}, TypeError, "Expected kwargs to be a mapping"),
    ("steps below zero", fine, {"steps": -1}, ValueError, "Expected steps >= 0; got -1"),
    (
        "steps is a fraction",
        fine,
        {"steps": 1.5},
        TypeError,
        "Expected steps to be an integer; got 1.5",
    ),
    (
        "steps is a word",
        fine,
        {"steps": "many"},
        TypeError,
        "Expected steps to be an integer; got 'many'",
    ),
    (
        "time is zero",
        fine,
        {"time_limit": 0},
        ValueError,
        "Expected time_limit to be positive and finite; got 0",
    ),
    (
        "time is negative",
        fine,
        {"time_limit": -3.0},
        ValueError,
        "Expected time_limit to be positive",
    ),
    (
        "time is NaN",
        fine,
        {"time_limit": math.nan},
        ValueError,
        "Expected time_limit to be positive",
    ),
    (
        "time is a word",
        fine,
        {"time_limit": "1 min"},
        TypeError,
        "Expected time_limit to be a number",
    ),
    ("seed below zero", fine, {"seed": -1}, ValueError, "Expected seed >= 0; got -1"),
    (
        "seed is a fraction",
        fine,
        {"seed": 0.5},
        TypeError,
        "Expected seed to be an integer; got 0.5",
    ),
    ("seed is a word", fine, {"seed": "x"}, TypeError, "Expected seed to be an integer; got 'x'"),
    ("seed is too large", fine, {"seed": 2**32}, ValueError, r"Expected seed < 2\*\*32; got"),
    (
        "device is a word",
        fine,
        {"device": "gpu"},
        ValueError,
        "Expected device to name a torch device such as cpu or cuda:0; got 'gpu'",
    ),
    (
        "device is not there",
        fine,
        {"device": "cuda:97"},
        ValueError,
        "Cannot compute on device cuda:97",
    ),
    ("device is a number", fine, {"device": 3.5}, (TypeError, ValueError), "Expected device"),
    (
        "an option that is none",
        fine,
        {"progres": True},
        TypeError,
        "Expected the options progress, compile, checkpoint, objective, learn of a fit; got 'progres'",
    ),
    (
        "objective is a word",
        fine,
        {"objective": "elbo"},
        TypeError,
        "Expected objective to be one of pyroflows.train.objectives; got 'elbo'",
    ),
    (
        "guide is a word",
        fine,
        {"guide": "realnvp"},
        (TypeError, ValueError),
        "Expected guide to be 'auto'",
    ),
    ("guide is a number", fine, {"guide": 3}, TypeError, "Expected guide to be 'auto'"),
    (
        "guide is a univariate map",
        fine,
        {"guide": pf.univariate.Affine},
        TypeError,
        "Expected guide to be a flow; got the univariate map Affine",
    ),
    ("guide is None", fine, {"guide": None}, TypeError, "Expected guide to be 'auto'"),
    (
        "guide is a made flow",
        fine,
        {"guide": pf.RealNVP(2)},
        TypeError,
        "Expected guide to be 'auto'",
    ),
    (
        "guide gives a number",
        fine,
        {"guide": lambda n: 3},
        TypeError,
        "to return a Flow or a Transform; got 3",
    ),
    (
        "guide of a wrong width",
        fine,
        {"guide": lambda n: pf.RealNVP(n + 1)},
        ValueError,
        "2 features",
    ),
    (
        "guide of other names",
        fine,
        {"guide": lambda: guide_of(other_names)},
        ValueError,
        "guide of this model",
    ),
    (
        "guide of another shape",
        fine,
        {"guide": lambda: guide_of(other_shape)},
        ValueError,
        "guide of this model",
    ),
    (
        "guide on the simplex",
        fine,
        {"guide": lambda: guide_of(on_the_simplex)},
        ValueError,
        "guide of this model",
    ),
    (
        "guide on half a line",
        fine,
        {"guide": lambda: guide_of(on_the_positive_half)},
        ValueError,
        "guide of this model",
    ),
]


@pytest.mark.parametrize(
    ("model", "options", "kind", "said"), [f[1:] for f in FAILURES], ids=[f[0] for f in FAILURES]
)
def test_a_failure_is_one_clear_sentence(
    model: Any, options: dict[str, Any], kind: Any, said: str
) -> None:
    options = {"progress": False, "steps": 2, **options}
    made = options.get("guide")
    if getattr(made, "__name__", "") == "<lambda>" and not made.__code__.co_argcount:
        options["guide"] = made()
    before = random_states()
    with pytest.raises(kind, match=said) as caught:
        fit_posterior(model, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    assert "Trace Shapes" not in text
    assert random_states() == before


@pytest.mark.parametrize("make", [changing_shape, changing_sites])
def test_a_latent_that_changes_is_refused_by_name(make: Callable[[], Model]) -> None:
    with pytest.raises(
        ValueError, match=r"one shape in every run of the model; 'x\w*' was"
    ) as caught:
        fit_posterior(make(), progress=False)
    assert "\n" not in str(caught.value)


def test_sites_in_another_order_are_another_model() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(5.0, 1.0))

    def turned() -> None:
        pyro.sample("b", dist.Normal(5.0, 1.0))
        pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="guide of this model"):
        quickly(turned, guide=guide_of(model), steps=2)


def test_an_improper_posterior_is_not_trusted() -> None:
    posterior = quickly(
        lambda: pyro.sample("x", dist.ImproperUniform(constraints.real, (), (2,))), steps=5
    )
    assert not posterior.verdict.ok


def test_an_error_of_the_model_comes_through() -> None:
    def model() -> None:
        raise KeyError("weight")

    with pytest.raises(KeyError, match="weight"):
        fit_posterior(model)


# The ladder


def two_modes() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    near = dist.Normal(torch.tensor([-5.0, 0.0]), 1.0).log_prob(x).sum() + math.log(0.8)
    far = dist.Normal(torch.tensor([5.0, 3.0]), 0.5).log_prob(x).sum() + math.log(0.2)
    pyro.factor(
        "modes", torch.logaddexp(near, far) - dist.Normal(torch.zeros(2), 10.0).log_prob(x).sum()
    )


def test_a_normal_posterior_needs_no_flow() -> None:
    truth = linear_regression(torch.float64)
    posterior = quickly(truth.model, truth.args)
    assert [rung.name for rung in posterior.rungs] == ["Gaussian"]
    assert posterior.history == []


def test_a_curved_posterior_needs_a_flow() -> None:
    posterior = quickly(correlated, steps=150)
    assert [rung.name for rung in posterior.rungs[:2]] == ["Gaussian", "flow, 150 steps"]
    assert len(posterior.history) == 150
    gaussian, trained = (attempt.verdict for attempt in posterior.rungs[:2])
    assert trained.ess > gaussian.ess
    assert trained.elbo > gaussian.elbo + 0.1
    assert sum(posterior.history[-20:]) / 20 == pytest.approx(trained.elbo, abs=0.05)
    assert posterior.rungs[1].seconds > posterior.rungs[0].seconds


def test_two_modes_get_a_mixture_with_the_right_weights() -> None:
    posterior = quickly(two_modes)
    assert posterior.verdict.ok, posterior
    assert isinstance(posterior.guide, pf.guides.AutoMixture)
    # The density is normalised. Weights are set by 4,000 draws, and the share is told by as many.
    assert abs(posterior.log_evidence) < 0.01
    share = float((posterior.sample(4000, seed=1)["x"][:, 0] > 0).double().mean())
    assert share == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / 4000) + 0.01)


def test_a_guide_on_one_mode_is_told_of_the_other() -> None:
    guide = AutoFlow(two_modes)
    guide()
    guide.whiten(torch.tensor([-5.0, 0.0]), torch.eye(2))
    posterior = quickly(two_modes, guide=guide, steps=0)
    # Importance sampling sees nothing of it.
    assert posterior.verdict.ess > 0.9
    assert not posterior.verdict.ok
    assert posterior.verdict.missed == pytest.approx(0.2 / 0.8, rel=0.1)
    assert "20%" in posterior.verdict.reason


def test_a_narrow_mode_is_found_by_the_draws_that_hit_it() -> None:
    scale = torch.tensor(0.02)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        slab = dist.Normal(0.0, 1.0).log_prob(x).sum()
        spike = dist.Normal(1.5, scale).log_prob(x).sum()
        pyro.factor("spike", torch.logaddexp(slab + math.log(0.7), spike + math.log(0.3)) - slab)

    posterior = quickly(model)
    assert posterior.verdict.ok, posterior
    assert abs(posterior.log_evidence) < 0.01


def test_an_improper_posterior_is_named_and_ends_the_ladder() -> None:
    torch.set_default_dtype(torch.float64)

    def model() -> None:
        a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("c", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a - b, 1.0), obs=torch.tensor(1.0))

    posterior = quickly(model)
    assert not posterior.verdict.ok
    assert "does not fall off along a and b" in posterior.verdict.reason
    assert len(posterior.rungs) == 1


def test_a_fit_goes_on_from_its_checkpoint(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quickly(correlated, guide=pf.RealNVP, steps=12)
    path = tmp_path / "fit.pt"
    monkeypatch.setattr(loop_module, "tqdm", type("Pressed", (Bar,), {"at": 8}))
    from pyroflows.train.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "save_if_due", lambda self, state: self.save(state()))
    cut = quickly(correlated, guide=pf.RealNVP, steps=12, checkpoint=path)
    assert cut.interrupted
    monkeypatch.undo()
    resumed = quickly(correlated, guide=pf.RealNVP, steps=12, checkpoint=path)
    assert resumed.history == whole.history
    assert resumed.verdict == whole.verdict
    with pytest.raises(
        ValueError, match=r"checkpoint of this fit; .* seed 0, and this fit has seed 1"
    ):
        quickly(correlated, guide=pf.RealNVP, steps=12, checkpoint=path, seed=1)


@pytest.mark.slow
def test_mini_batches_by_a_plate_and_by_a_loader() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2, generator=generator)
    y = x @ torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(600, generator=generator)

    def by_plate() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", 600, subsample_size=50) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ w, 0.5), obs=y[rows])

    def by_loader(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", 600, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    covariance = torch.linalg.inv(x.mT @ x / 0.25 + torch.eye(2) / 4)
    mean = covariance @ (x.mT @ y) / 0.25
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=50)
    for posterior in (quickly(by_plate), quickly(by_loader, loader)):
        assert posterior.verdict.ok, posterior
        assert_moments(posterior, {"w": mean}, {"w": covariance.diagonal().sqrt()})


@pytest.mark.parametrize("option", ["progress", "compile"])
def test_switches_of_a_fit_are_true_or_false(option: str) -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(TypeError, match=f"Expected {option} to be True or False; got 'yes'"):
        pf.fit_posterior(model, steps=0, **{option: "yes"})


@pytest.mark.parametrize("kind", [AutoNormal, pf.guides.AutoMixture, torch.nn.Linear])
def test_classes_of_other_guides_are_told(kind: Any) -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(TypeError, match="Expected guide to be 'auto', an AutoFlow, an AutoStr"):
        pf.fit_posterior(model, guide=kind, steps=0, progress=False)


def test_a_guide_of_another_signature_is_told() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(TypeError, match=r"Expected flow to be called with .features."):
        pf.fit_posterior(model, guide=lambda: pf.RealNVP(2), steps=0, progress=False)
