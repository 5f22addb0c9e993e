"""The evidence against closed forms, its standard error against the scatter of many seeds, and the comparison of models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from torch import Tensor
from torch.distributions import Normal

import pyroflows as pf
from pyroflows.guides import AutoMixture
from pyroflows.model import LogDensity
from pyroflows.posterior import Posterior
from pyroflows.posterior.chains import flow_mc
from pyroflows.posterior.checks import judge_subject
from pyroflows.posterior.comparison import compare
from pyroflows.posterior.evidence import Evidence, bridge, evidence
from pyroflows.posterior.gaussian import fit_gaussians
from pyroflows.posterior.subject import Subject
from pyroflows.transforms import Transform

DOUBLE = torch.float64
Model = Callable[[], None]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=DOUBLE)


def judged(guide: Any, density: LogDensity) -> Posterior:
    """A posterior with the verdict of its weights and of a drift."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Posterior(guide, density, judge_subject(Subject(guide, density)))


def posterior_of(
    model: Model,
    loc: Any,
    scale: Any,
    flow: Callable[[int], Any] = pf.transforms.LowerTriangularAffine,
) -> Posterior:
    """A posterior whose guide is N(loc, scale^2), or what a flow makes of a standard normal, scaled and shifted so."""
    density = LogDensity(model)
    guide = pf.AutoFlow(density.continuous_model, flow=flow)
    density.introduce(guide)
    loc, scale = (torch.as_tensor(value, dtype=DOUBLE) for value in (loc, scale))
    root = scale if scale.dim() == 2 else torch.diag(scale.expand(density.features))
    guide.whiten(*(value.to(density.initial) for value in (loc.expand(density.features), root)))
    return judged(guide, density)


def gaussian_fit(model: Model) -> Posterior:
    density = LogDensity(model)
    fit = fit_gaussians(density, density.initial.unsqueeze(0))[0].one(0)
    return posterior_of(model, fit.loc, fit.scale_tril)


# Models whose evidence has a closed form


def normal_normal() -> tuple[Model, float]:
    y = 1 + numbers(12)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.5), 2.0))
        with pyro.plate("data", 12):
            pyro.sample("y", dist.Normal(mu, 1.3), obs=y)

    law = dist.MultivariateNormal(
        torch.full_like(y, 0.5), 1.3**2 * torch.eye(12, dtype=DOUBLE) + 4.0
    )
    return model, float(law.log_prob(y))


def regression() -> tuple[Model, float]:
    n, features, shape, rate, width = 30, 4, 2.5, 1.5, 4.0
    x = torch.cat([torch.ones(n, 1, dtype=DOUBLE), numbers(n, features - 1)], 1)
    y = x @ torch.tensor([1.0, -0.5, 2.0, 0.0], dtype=DOUBLE) + 0.7 * numbers(n, seed=1)

    def model() -> None:
        variance = pyro.sample("variance", dist.InverseGamma(number(shape), number(rate)))
        beta = pyro.sample(
            "beta", dist.Normal(y.new_zeros(features), (width * variance).sqrt()).to_event(1)
        )
        with pyro.plate("data", n):
            pyro.sample("y", dist.Normal(x @ beta, variance.sqrt()), obs=y)

    # y is a multivariate t of location zero, 2 shape degrees of freedom and scale rate / shape (I + width x x').
    scale = rate / shape * (torch.eye(n, dtype=DOUBLE) + width * x @ x.mT)
    law = dist.MultivariateStudentT(number(2 * shape), y.new_zeros(n), torch.linalg.cholesky(scale))
    return model, float(law.log_prob(y))


def beta_binomial() -> tuple[Model, float]:
    def model() -> None:
        p = pyro.sample("p", dist.Beta(number(2.0), 3.0))
        pyro.sample("k", dist.Binomial(20, p), obs=number(7.0))

    return model, float(dist.BetaBinomial(number(2.0), number(3.0), 20).log_prob(number(7.0)))


def gamma_poisson() -> tuple[Model, float]:
    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(number(1.5), 0.5))
        pyro.sample("count", dist.Poisson(rate), obs=number(4.0))

    return model, float(dist.GammaPoisson(number(1.5), number(0.5)).log_prob(number(4.0)))


def ten_dimensions() -> tuple[Model, float]:
    root, y = numbers(10, 10), 2 * numbers(10, seed=1)
    covariance = root @ root.mT / 10 + 0.1 * torch.eye(10, dtype=DOUBLE)

    def model() -> None:
        x = pyro.sample("x", dist.MultivariateNormal(y.new_zeros(10), covariance))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    law = dist.MultivariateNormal(y.new_zeros(10), covariance + 0.25 * torch.eye(10, dtype=DOUBLE))
    return model, float(law.log_prob(y))


def banana() -> tuple[Model, float]:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(number(0.0), 1.0))
        pyro.sample("y", dist.Normal(x**2, 0.5))
        pyro.factor("constant", number(-3.7))

    return model, -3.7


class Bend(Transform):
    """(x, y) to (x, y + 2 x^2)."""

    def __init__(self, features: int) -> None:
        super().__init__(features)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return torch.stack([x[..., 0], x[..., 1] + 2 * x[..., 0] ** 2], -1), torch.zeros_like(
            x[..., 0]
        )

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return torch.stack([y[..., 0], y[..., 1] - 2 * y[..., 0] ** 2], -1), torch.zeros_like(
            y[..., 0]
        )


CLOSED = [normal_normal, regression, beta_binomial, gamma_poisson, ten_dimensions, banana]


def fitted(case: Callable[[], tuple[Model, float]]) -> tuple[Posterior, float]:
    model, exact = case()
    return (
        posterior_of(model, 0.0, [1.1, 0.605], flow=Bend) if case is banana else gaussian_fit(model)
    ), exact


@pytest.mark.parametrize("case", slow_but_for([normal_normal, banana], CLOSED))
def test_the_evidence_where_it_is_known(case: Callable[[], tuple[Model, float]]) -> None:
    posterior, exact = fitted(case)
    for method, draws in (("importance", 20_000), ("bridge", 4000)):
        found = evidence(posterior, method, draws=draws)
        assert found.log_evidence == pytest.approx(exact, abs=0.02)
        # A guide that is exact leaves rounding only.
        assert abs(found.log_evidence - exact) < 4 * found.log_evidence_error + 1e-9
        assert found.log_evidence_error < 0.01
        assert method == "importance" or not found.caution


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "bridge"])
@pytest.mark.parametrize(
    "case", [beta_binomial, gamma_poisson, banana], ids=lambda case: case.__name__
)
def test_standard_errors_are_those_of_many_seeds(
    case: Callable[[], tuple[Model, float]], method: str
) -> None:
    """The variance of n z-scores scatters by sqrt(2 / n) around one; four of these are allowed, and four of the mean."""
    posterior, exact = fitted(case)
    n = 24
    found = [evidence(posterior, method, seed=seed) for seed in range(n)]
    z = torch.tensor([(one.log_evidence - exact) / one.log_evidence_error for one in found])
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert float(z.square().mean()) < 1 + 4 * math.sqrt(2 / n)
    assert float(z.var()) > 0.2
    assert max(abs(one.log_evidence - exact) for one in found) < 0.05


# The bridge by itself


def log_weights(z: Tensor, loc: float = 0.4, scale: float = 1.2, constant: float = -5.0) -> Tensor:
    """Of a guide N(loc, scale^2) and a posterior N(0, 1) of a given log evidence."""
    return constant + Normal(0.0, 1.0).log_prob(z) - Normal(loc, scale).log_prob(z)


def autoregressive(
    chains: int, draws: int, correlation: float, generator: torch.Generator
) -> Tensor:
    z = torch.randn(chains, draws, generator=generator, dtype=DOUBLE)
    for t in range(1, draws):
        z[:, t] = correlation * z[:, t - 1] + math.sqrt(1 - correlation**2) * z[:, t]
    return z


def test_the_bridge_is_the_fixed_point_of_meng_and_wong() -> None:
    of_guide, of_posterior = (
        log_weights(0.4 + 1.2 * numbers(500)),
        log_weights(numbers(4, 250, seed=1)),
    )
    # Their iteration, with all draws independent; so nearly are those above.
    effective = 1000.0
    share = effective / (effective + 500)
    w, w_posterior, estimate = of_guide.exp(), of_posterior.flatten().exp(), 1.0
    for _ in range(200):
        above = (w / (share * w + (1 - share) * estimate)).mean()
        below = (1 / (share * w_posterior + (1 - share) * estimate)).mean()
        estimate = float(above / below)
    found, error = bridge(of_guide, of_posterior)
    # A tenth of the standard error: the effective number is not quite 1000.
    assert found == pytest.approx(math.log(estimate), abs=0.1 * error)


def test_the_error_is_that_of_fruehwirth_schnatter() -> None:
    z_guide, z_posterior = 0.4 + 1.2 * numbers(4000), numbers(8, 500, seed=1)
    _, error = bridge(log_weights(z_guide), log_weights(z_posterior))

    def parts(z: Tensor) -> tuple[Tensor, Tensor]:
        p, q = Normal(0.0, 1.0).log_prob(z).exp(), Normal(0.4, 1.2).log_prob(z).exp()
        return p / (p / 2 + q / 2), q / (p / 2 + q / 2)

    f1, f2 = parts(z_guide)[0], parts(z_posterior)[1]
    expected = math.sqrt(float(f1.var() / f1.mean() ** 2 + f2.var() / f2.mean() ** 2) / 4000)
    assert error == pytest.approx(
        expected, rel=0.1
    )  # ArviZ counts 4000 independent draws to within a tenth


def test_the_bridge_of_equal_weights_is_their_value() -> None:
    found, error = bridge(
        torch.full((100,), -7.25, dtype=DOUBLE), torch.full((2, 50), -7.25, dtype=DOUBLE)
    )
    assert found == pytest.approx(-7.25, abs=1e-12)
    assert error == pytest.approx(0, abs=1e-12)


def test_huge_log_weights_do_not_overflow() -> None:
    of_guide, of_posterior = (
        log_weights(0.4 + 1.2 * numbers(500)),
        log_weights(numbers(4, 250, seed=1)),
    )
    expected, error = bridge(of_guide, of_posterior)
    for constant in (-1e6, 1e6):
        found, same_error = bridge(of_guide + constant, of_posterior + constant)
        assert found - constant == pytest.approx(expected, abs=1e-8)
        assert same_error == pytest.approx(error, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_error_of_the_bridge_counts_dependent_draws(correlation: float) -> None:
    """z-scores of 40 repetitions: their mean square scatters by sqrt(2 / 40) = 0.22, of which three are allowed."""
    generator = torch.Generator().manual_seed(0)
    found, naive = [], []
    for _ in range(40):
        # A narrow guide, so that much hangs on the draws of the posterior.
        of_guide = log_weights(0.6 * torch.randn(2000, generator=generator, dtype=DOUBLE), 0.0, 0.6)
        of_posterior = log_weights(autoregressive(4, 250, correlation, generator), 0.0, 0.6)
        value, error = bridge(of_guide, of_posterior)
        found.append((value + 5) / error)
        if correlation:
            shuffled = of_posterior.flatten()[torch.randperm(1000, generator=generator)].reshape(
                4, 250
            )
            naive.append((value + 5) / bridge(of_guide, shuffled)[1])
    square = float(np.mean(np.square(found)))
    assert 1 - 3 * 0.22 < square < 1 + 3 * 0.22
    if correlation:
        assert float(np.mean(np.square(naive))) > 2 * square


# Guides that are off


def standard_normal() -> None:
    pyro.sample("x", dist.Normal(number(0.0), 1.0))
    pyro.factor("constant", number(-5.0))


@cache
def exact_guide() -> Posterior:
    return posterior_of(standard_normal, 0.0, 1.0)


def test_the_bridge_bears_a_guide_with_light_tails() -> None:
    """For a normal of width s on a standard normal the weights have a tail of shape 1 - s^2, here 0.84: no variance."""
    posterior = posterior_of(standard_normal, 0.0, 0.4)
    by_importance = evidence(posterior, "importance", draws=10_000)
    assert "k-hat" in by_importance.caution
    assert "use the bridge" in str(by_importance)
    found = evidence(posterior, samples=numbers(4, 1000, 1))
    assert not found.caution
    assert abs(found.log_evidence + 5) < 4 * found.log_evidence_error < 0.2
    # So with draws of its own.
    found = evidence(posterior)
    assert abs(found.log_evidence + 5) < 4 * found.log_evidence_error < 0.2


def test_the_bridge_bears_a_guide_that_ends() -> None:
    """A uniform on (-1, 1) sees 0.683 of a standard normal, all that importance sampling can know."""
    base = dist.Uniform(
        -torch.ones(1, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE), validate_args=False
    ).to_event(1)
    posterior = posterior_of(
        standard_normal,
        0.0,
        1.0,
        lambda n: pf.Flow([pf.transforms.LowerTriangularAffine(n)], base=base),
    )
    by_importance = evidence(posterior, "importance", draws=10_000)
    assert by_importance.log_evidence == pytest.approx(-5 + math.log(0.6827), abs=0.01)
    found = evidence(posterior, samples=numbers(4, 1000, 1))
    assert abs(found.log_evidence + 5) < 4 * found.log_evidence_error < 0.16


def test_guides_far_off_come_with_a_caution() -> None:
    posterior = posterior_of(standard_normal, 30.0, 1.0)
    found = evidence(posterior, samples=numbers(4, 1000, 1))
    assert "hardly overlap" in found.caution
    assert evidence(posterior, "importance").caution


def test_chains_that_do_not_mix_come_with_a_caution() -> None:
    stuck = numbers(4, 500, 1) * 0.1 + torch.tensor([0.0, 0.6, 1.2, 1.8], dtype=DOUBLE).view(
        4, 1, 1
    )
    found = evidence(posterior_of(standard_normal, 0.3, 1.1), samples=stuck)
    assert "R-hat" in found.caution


def test_a_guide_outside_of_the_support_finds_no_evidence() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(number(0.0), 1.0))
        pyro.factor("cliff", torch.where(x < 100, 0.0, -math.inf))

    posterior = posterior_of(model, 200.0, 1.0)
    for method in ("importance", "bridge"):
        found = evidence(posterior, method)
        assert found.log_evidence == -math.inf
        assert found.log_evidence_error == math.inf
        assert "supports" in found.caution


@pytest.mark.slow
def test_two_modes_that_the_guide_knows() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(number(0.0), 100.0))
        halves = torch.stack(
            [Normal(-6.0, 1.0).log_prob(x), Normal(6.0, 1.0).log_prob(x)]
        ).logsumexp(0)
        pyro.factor("halves", halves - Normal(0.0, 100.0).log_prob(x))

    density = LogDensity(model)
    guide = AutoMixture(model, components=2, flow=pf.transforms.LowerTriangularAffine)
    density.introduce(guide)
    for component, loc in enumerate((-6.2, 6.1)):
        guide.whiten(
            component, torch.tensor([loc], dtype=DOUBLE), torch.tensor([[1.1]], dtype=DOUBLE)
        )
    posterior = judged(guide, density)
    for method in ("importance", "bridge"):
        found = evidence(posterior, method)
        assert abs(found.log_evidence - math.log(2)) < 4 * found.log_evidence_error < 0.1


# Draws of the user


def test_all_forms_of_samples_say_the_same() -> None:
    model, exact = gamma_poisson()
    posterior = gaussian_fit(model)
    chains = flow_mc(posterior, draws=100, chains=8, progress=False)
    by_chains = evidence(posterior, samples=chains)
    assert by_chains == evidence(posterior, samples=chains.unconstrained)
    by_name = evidence(posterior, samples={"rate": chains.draws["rate"]})
    assert by_name.log_evidence == pytest.approx(by_chains.log_evidence, abs=1e-9)
    assert abs(by_chains.log_evidence - exact) < 4 * by_chains.log_evidence_error


def test_exact_draws_of_a_conjugate_posterior() -> None:
    model, exact = gamma_poisson()
    samples = {"rate": dist.Gamma(number(5.5), 1.5).sample((4, 1000))}
    found = evidence(gaussian_fit(model), samples=samples)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_error < 0.02


# The record


def test_the_sentence() -> None:
    assert str(Evidence(-12.5031, 0.0042, "bridge", 4000)) == (
        "The log evidence is -12.503 with a standard error of 0.0042, by bridge sampling with 4000 draws of the guide."
    )
    assert str(Evidence(0.0, 1.0, "importance", 100, "Beware.")).endswith("of the guide. Beware.")


@pytest.mark.parametrize("method", ["importance", "bridge"])
def test_a_seed_fixes_the_result_and_leaves_the_random_state(method: str) -> None:
    posterior = posterior_of(standard_normal, 0.2, 1.1)
    state = torch.get_rng_state()
    first = evidence(posterior, method, draws=400, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert evidence(posterior, method, draws=400, seed=3) == first
    assert evidence(posterior, method, draws=400, seed=4) != first
    torch.manual_seed(1)
    one = evidence(posterior, method, draws=400, seed=None)
    torch.manual_seed(1)
    assert evidence(posterior, method, draws=400, seed=None) == one


def test_importance_sampling_is_that_of_the_verdict() -> None:
    posterior = posterior_of(standard_normal, 0.2, 1.1)
    found = evidence(posterior, "importance", draws=posterior.verdict.draws, seed=0)
    assert (found.log_evidence, found.log_evidence_error) == (
        posterior.verdict.log_evidence,
        posterior.verdict.log_evidence_error,
    )


def test_single_precision() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))

    exact = float(Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(2.0)))
    for method in ("importance", "bridge"):
        assert evidence(gaussian_fit(model), method, draws=1000).log_evidence == pytest.approx(
            exact, abs=1e-3
        )


# The comparison

Y = 0.4 + numbers(20)


def location(prior_scale: float, data: Tensor = Y, name: str = "y", scale: float = 1.0) -> Model:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), prior_scale))
        with pyro.plate("data", len(data)):
            pyro.sample(name, dist.Normal(mu, scale), obs=data)

    return model


def exact_posterior(prior_scale: float, scale: float = 1.0) -> Posterior:
    """The conjugate posterior, as a guide."""
    precision = len(Y) / scale**2 + prior_scale**-2
    loc = float(Y.sum()) / scale**2 / precision
    return posterior_of(location(prior_scale, scale=scale), loc, precision**-0.5)


def exact_evidence(prior_scale: float, scale: float = 1.0) -> float:
    n = len(Y)
    covariance = scale**2 * torch.eye(n, dtype=DOUBLE) + prior_scale**2
    return float(dist.MultivariateNormal(Y.new_zeros(n), covariance).log_prob(Y))


def exact_elpd(prior_scale: float, scale: float = 1.0) -> Tensor:
    """Log predictive density of each observation given the others."""
    precision = (len(Y) - 1) / scale**2 + prior_scale**-2
    loc = (Y.sum() - Y) / scale**2 / precision
    return Normal(loc, math.sqrt(scale**2 + 1 / precision)).log_prob(Y)


@pytest.fixture(scope="module")
def three() -> dict[str, Posterior]:
    return {
        "vague": exact_posterior(50.0),
        "right": exact_posterior(1.0),
        "wide": exact_posterior(1.0, scale=1.6),
    }


def test_the_comparison_against_closed_forms(three: dict[str, Posterior]) -> None:
    table = compare(three, draws=4000)
    cases = {"vague": (50.0, 1.0), "right": (1.0, 1.0), "wide": (1.0, 1.6)}
    logs = {name: exact_evidence(*case) for name, case in cases.items()}
    elpds = {name: exact_elpd(*case) for name, case in cases.items()}
    assert list(table.index) == sorted(logs, key=logs.__getitem__, reverse=True)
    assert table.index[0] == "right"
    total = sum(math.exp(value - logs["right"]) for value in logs.values())
    # Cross-validation rests on 4000 draws, whose error in one elpd is well below 0.05.
    best = max(elpds, key=lambda name: float(elpds[name].sum()))
    for name, row in table.iterrows():
        assert row["log_evidence"] == pytest.approx(logs[name], abs=1e-6)
        assert row["log_bayes_factor"] == pytest.approx(logs[name] - logs["right"], abs=1e-6)
        assert row["probability"] == pytest.approx(
            math.exp(logs[name] - logs["right"]) / total, abs=1e-6
        )
        assert row["elpd_loo"] == pytest.approx(float(elpds[name].sum()), abs=0.05)
        assert row["elpd_loo_error"] == pytest.approx(
            float(elpds[name].std(correction=0)) * math.sqrt(20), abs=0.05
        )
        difference = elpds[name] - elpds[best]
        assert row["elpd_difference"] == pytest.approx(float(difference.sum()), abs=0.05)
        assert row["elpd_difference_error"] == pytest.approx(
            float(difference.std(correction=0)) * math.sqrt(20), abs=0.03
        )
        assert 0.3 < row["p_loo"] < 1.5  # one parameter
        assert row["bad_khat"] == 0
        assert row["ok"]
    assert table.loc["right", "log_bayes_factor_error"] == 0
    assert table["probability"].sum() == pytest.approx(1.0)


def test_cross_validation_is_arvizs(three: dict[str, Posterior]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    theirs = arviz.loo(three["wide"].to_arviz(draws=2000, seed=5))
    ours = compare({"wide": three["wide"]}, by="loo", draws=2000, seed=5).loc["wide"]
    assert ours["elpd_loo"] == pytest.approx(
        float(getattr(theirs, "elpd_loo", getattr(theirs, "elpd", None))), abs=1e-6
    )
    assert ours["elpd_loo_error"] == pytest.approx(float(theirs.se), abs=1e-6)
    assert ours["p_loo"] == pytest.approx(
        float(getattr(theirs, "p_loo", getattr(theirs, "p", None))), abs=1e-6
    )


def test_one_criterion_at_a_time(three: dict[str, Posterior]) -> None:
    by_evidence = compare(three, by="evidence", method="importance", draws=200)
    assert "log_evidence" in by_evidence and "elpd_loo" not in by_evidence
    by_loo = compare(three, by="loo", draws=1000)
    assert "elpd_loo" in by_loo and "log_evidence" not in by_loo
    assert by_loo["elpd_loo"].is_monotonic_decreasing
    # Cross-validation hardly sees a vague prior; the evidence does.
    assert by_loo.loc["vague", "elpd_difference"] > -0.5
    assert by_evidence.loc["vague", "log_bayes_factor"] < -2


def test_the_errors_of_bayes_factors_add_in_squares() -> None:
    posteriors = {
        "a": posterior_of(standard_normal, 0.2, 1.1),
        "b": posterior_of(standard_normal, -0.1, 1.2),
    }
    table = compare(posteriors, by="evidence", method="importance")
    errors = table["log_evidence_error"].to_numpy()
    assert table["log_bayes_factor_error"].tolist() == pytest.approx([0.0, math.hypot(*errors)])


def test_a_posterior_that_is_not_ok_is_marked(three: dict[str, Posterior]) -> None:
    bad = posterior_of(location(1.0), 5.0, 0.1)
    with pytest.warns(UserWarning, match="evidence of model 'bad' is not reliable"):
        table = compare({"bad": bad, "right": three["right"]}, by="evidence", method="importance")
    assert table["ok"].to_dict() == {"bad": False, "right": True}


def test_influential_observations_are_counted() -> None:
    data = torch.cat([Y, number(25.0).unsqueeze(0)])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), 10.0))
        with pyro.plate("data", 21):
            pyro.sample("y", dist.Normal(mu, 0.3), obs=data)

    table = compare({"outlier": gaussian_fit(model)}, by="loo")
    assert table.loc["outlier", "bad_khat"] >= 1


def test_a_model_without_observed_sites_has_an_evidence_only(three: dict[str, Posterior]) -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), 1.0))
        pyro.factor("likelihood", Normal(mu, 1.0).log_prob(Y).sum())

    precision = len(Y) + 1
    posterior = posterior_of(model, float(Y.sum()) / precision, precision**-0.5)
    with pytest.warns(UserWarning, match="'factor' has no observed site"):
        table = compare({"factor": posterior, "right": three["right"]})
    assert table.loc["factor", "log_evidence"] == pytest.approx(
        table.loc["right", "log_evidence"], abs=1e-6
    )
    assert table.loc["factor", ["elpd_loo", "p_loo", "bad_khat", "elpd_difference"]].isna().all()
    assert table.loc["right", "elpd_difference"] == 0
    with pytest.warns(UserWarning, match="no observed site"):
        assert compare({"factor": posterior}, by="loo")["elpd_loo"].isna().all()


def test_a_model_with_discrete_latents() -> None:
    """Two components of known means: integrals over the weight."""
    data = torch.tensor([-1.0, 1.2], dtype=DOUBLE)

    def model() -> None:
        p = pyro.sample("p", dist.Beta(number(1.0), 1.0))
        with pyro.plate("data", 2):
            k = pyro.sample("k", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(2 * k - 1, 1.0), obs=data)

    p = (torch.arange(10_000, dtype=DOUBLE) + 0.5) / 10_000
    likelihood = torch.stack(
        [
            (1 - p) * Normal(-1.0, 1.0).log_prob(y).exp() + p * Normal(1.0, 1.0).log_prob(y).exp()
            for y in data
        ]
    )
    row = compare({"mixture": gaussian_fit(model)}).loc["mixture"]
    evidence = float(likelihood.prod(0).mean().log())
    assert row["log_evidence"] == pytest.approx(evidence, abs=4 * row["log_evidence_error"])
    assert row["log_evidence_error"] < 0.01
    of_one = likelihood.mean(1).log()
    assert row["elpd_loo"] == pytest.approx(float((evidence - of_one).sum()), abs=0.05)


def test_observations_that_share_a_discrete_site_have_no_cross_validation() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(number(0.0), 1.0))
        k = pyro.sample("k", dist.Bernoulli(number(0.5)))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(x + 2 * k, 1.0), obs=torch.ones(2, dtype=DOUBLE))

    with pytest.warns(UserWarning, match="discrete latent sites that observations share"):
        row = compare({"mixture": gaussian_fit(model)}, by="loo").loc["mixture"]
    assert math.isnan(row["elpd_loo"])


def test_improper_priors_are_warned_of() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    posterior = posterior_of(model, float(Y.mean()), 20**-0.5)
    with pytest.warns(UserWarning, match="improper prior at site 'mu'"):
        compare({"flat": posterior}, by="evidence", method="importance")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare({"flat": posterior}, by="loo")


# The same data


def test_the_same_data_under_another_name_or_type(three: dict[str, Posterior]) -> None:
    others = {
        "named": posterior_of(location(1.0, name="outcome"), 0.4, 0.22),
        "single": posterior_of(location(1.0, data=Y.float().double()), 0.4, 0.22),
    }
    assert len(compare({**three, **others}, by="evidence", method="importance", draws=200)) == 5


def two_sites(first: Tensor, second: Tensor) -> Model:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), 1.0))
        pyro.sample("a", dist.Normal(mu, 1.0).expand(first.shape).to_event(1), obs=first)
        pyro.sample("b", dist.Normal(mu, 1.0).expand(second.shape).to_event(1), obs=second)

    return model


@pytest.mark.parametrize(
    "model",
    [
        location(1.0, data=Y + 1e-3),
        location(1.0, data=Y[:10]),
        location(1.0, data=Y.flip(0)),
        two_sites(Y[:10], Y[10:]),
    ],
    ids=["values", "fewer", "order", "sites"],
)
def test_different_data_are_refused(three: dict[str, Posterior], model: Model) -> None:
    with pytest.raises(
        ValueError,
        match="models of the same data; got other observed values for 'other' than for 'vague'",
    ):
        compare({**three, "other": posterior_of(model, 0.4, 0.2)})


def test_data_split_into_other_observations_are_refused_for_cross_validation(
    three: dict[str, Posterior],
) -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([20]).to_event(1), obs=Y)

    posteriors = {"right": three["right"], "whole": posterior_of(model, 0.4, 0.22)}
    table = compare(posteriors, by="evidence", method="importance")
    assert abs(table["log_bayes_factor"].iloc[1]) < 0.02
    with pytest.raises(ValueError, match=r"the same observations; got \{'right': 20, 'whole': 1\}"):
        compare(posteriors, by="loo")


# Misuse


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"method": "laplace"},
            ValueError,
            "Expected method to be one of 'bridge', 'importance'; got 'laplace'",
        ),
        ({"method": None}, ValueError, "Expected method"),
        ({"draws": 10}, ValueError, "Expected draws >= 100; got 10"),
        ({"draws": 1e4}, TypeError, "Expected draws to be an integer"),
        ({"seed": -1}, ValueError, "Expected seed >= 0"),
        (
            {"method": "importance", "samples": torch.zeros(1, 9, 1)},
            ValueError,
            "samples with method='bridge' only",
        ),
        ({"samples": [[1.0]]}, TypeError, "Expected samples to be a tensor"),
        (
            {"samples": torch.zeros(1, 9, 1, dtype=torch.long)},
            TypeError,
            "Expected samples of a floating-point dtype",
        ),
        ({"samples": torch.zeros(1, 9, 2)}, ValueError, "Expected samples of shape"),
        (
            {"samples": torch.zeros(9, 1)},
            ValueError,
            r"Expected samples of shape \(chains, draws, 1\); got \(9, 1\)",
        ),
        ({"samples": torch.zeros(2, 3, 1)}, ValueError, "at least 4 draws a chain"),
        (
            {"samples": torch.full((1, 9, 1), math.nan)},
            ValueError,
            "9 of 9 where it has no density",
        ),
        ({"samples": torch.zeros(2, 9, 1)}, ValueError, "got the same vector in every draw"),
        (
            {"samples": {"y": torch.zeros(1, 9)}},
            ValueError,
            "samples of every latent site; got none of 'x'",
        ),
        (
            {"samples": {"x": torch.zeros(9)}},
            ValueError,
            r"samples\['x'\] of shape \(chains, draws\); got \(9,\)",
        ),
        ({"samples": {"x": 3.0}}, TypeError, r"Expected samples\['x'\] to be a tensor"),
    ],
)
def test_misuse_of_evidence(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evidence(exact_guide(), **arguments)


@pytest.mark.parametrize(
    ("posteriors", "arguments", "error", "message"),
    [
        ([], {}, TypeError, "Expected posteriors to be a mapping of names to posteriors; got list"),
        ({}, {}, ValueError, "at least one posterior"),
        (
            {"a": 3},
            {},
            TypeError,
            r"Expected posteriors\['a'\] to be a Posterior, as fit_posterior returns it; got int",
        ),
        (
            {},
            {"by": "waic"},
            ValueError,
            "Expected by to be one of 'evidence', 'loo', 'both'; got 'waic'",
        ),
        ({}, {"method": "laplace"}, ValueError, "Expected method to be one of"),
        ({}, {"draws": 0}, ValueError, "Expected draws >= 100"),
    ],
)
def test_misuse_of_compare(
    posteriors: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare(posteriors, **arguments)


def test_a_posterior_is_asked_for() -> None:
    with pytest.raises(
        TypeError,
        match="Expected posterior to be a Posterior, as fit_posterior returns it; got function",
    ):
        evidence(standard_normal)  # type: ignore[arg-type]
