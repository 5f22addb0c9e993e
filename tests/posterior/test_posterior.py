"""What a posterior hands on: draws, tables, ArviZ, files, and its guide."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

import pyroflows as pf
from pyroflows import AutoFlow, fit_posterior, load_posterior
from pyroflows._archive import write_archive
from pyroflows.posterior import importance
from pyroflows.posterior.loading import Saved
from pyroflows.posterior.subject import JUDGE_DRAWS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

Model = Callable[..., Any]
SIGMA = torch.tensor([1.0, 0.8, 1.2])
Y = torch.tensor([0.5, -0.3, 1.5])


def hierarchy(sigma: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("group", 3):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)
    pyro.deterministic("total", theta.sum(-1))


def mixed() -> None:
    """Sites of many shapes and supports."""
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    root = pyro.sample("root", dist.LKJCholesky(2, 2.0))
    with pyro.plate("columns", 2, dim=-1):
        b = pyro.sample("b", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("count", dist.Poisson(b), obs=torch.ones(3, 2))
    pyro.sample("k", dist.Categorical(p), obs=torch.tensor(1))
    pyro.sample(
        "x", dist.MultivariateNormal(torch.zeros(2), scale_tril=root), obs=torch.tensor([0.3, -0.5])
    )


@cache
def _fitted(model: Model, args: tuple[Any, ...], steps: int) -> pf.Posterior:
    """Of a flow: draws that are polished by trajectories cost ten times as much."""
    return fit_posterior(model, args, guide=pf.RealNVP, steps=steps, progress=False)


def fitted(model: Model, *args: Any, steps: int = 60) -> pf.Posterior:
    return _fitted(model, args, steps)


@pytest.fixture
def posterior() -> pf.Posterior:
    return fitted(hierarchy, SIGMA, Y)


# Draws


def test_draws_have_the_shapes_and_supports_of_the_sites() -> None:
    draws = fitted(mixed, steps=2).sample(7)
    shapes = {name: tuple(value.shape) for name, value in draws.items()}
    assert shapes == {"p": (7, 3), "root": (7, 2, 2), "b": (7, 2), "w": (7, 3, 2)}
    assert bool(constraints.simplex.check(draws["p"]).all())
    assert bool(constraints.corr_cholesky.check(draws["root"]).all())
    assert bool((draws["b"] > 0).all())
    assert not any(value.requires_grad for value in draws.values())


@pytest.mark.parametrize("n", [1, 2, 17, 4000])
def test_as_many_draws_as_asked_for(n: int, posterior: pf.Posterior) -> None:
    draws = posterior.sample(n)
    assert {len(value) for value in draws.values()} == {n}
    assert posterior.sample_unconstrained(n).shape == (n, 5)


def test_four_thousand_draws_by_default(posterior: pf.Posterior) -> None:
    assert len(posterior.sample()["mu"]) == 4000


@pytest.mark.parametrize(
    ("n", "kind"),
    [(0, ValueError), (-1, ValueError), (2.5, TypeError), ("all", TypeError), (True, TypeError)],
)
def test_a_bad_number_of_draws_is_refused(
    n: Any, kind: type[Exception], posterior: pf.Posterior
) -> None:
    with pytest.raises(kind, match="Expected n "):
        posterior.sample(n)


@pytest.mark.parametrize(("seed", "kind"), [(-1, ValueError), (0.5, TypeError), ("x", TypeError)])
def test_a_bad_seed_is_refused(seed: Any, kind: type[Exception], posterior: pf.Posterior) -> None:
    with pytest.raises(kind, match="Expected seed "):
        posterior.sample(5, seed=seed)


def test_a_seed_gives_the_same_draws_and_leaves_the_random_state_alone(
    posterior: pf.Posterior,
) -> None:
    state = torch.get_rng_state()
    first, second, other = (posterior.sample(50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["mu"], second["mu"])
    assert not torch.equal(first["mu"], other["mu"])


def test_without_a_seed_draws_come_from_the_random_state(posterior: pf.Posterior) -> None:
    torch.manual_seed(1)
    first, second = posterior.sample(50)["mu"], posterior.sample(50)["mu"]
    torch.manual_seed(1)
    assert torch.equal(posterior.sample(50)["mu"], first)
    assert not torch.equal(first, second)


def test_deterministic_sites_are_computed_from_the_same_draws(posterior: pf.Posterior) -> None:
    draws = posterior.sample(100, seed=0)
    theta = draws["mu"].unsqueeze(-1) + draws["tau"].unsqueeze(-1) * draws["eta"]
    torch.testing.assert_close(draws["theta"], theta)
    torch.testing.assert_close(draws["total"], theta.sum(-1))


def test_draws_are_in_no_order(posterior: pf.Posterior) -> None:
    """Resampling takes some draws twice; these must not come one after the other."""
    draws = posterior.sample(4000, seed=0)["mu"]
    centred = draws - draws.mean()
    autocorrelation = float((centred[1:] * centred[:-1]).mean() / centred.square().mean())
    assert abs(autocorrelation) < 5 / math.sqrt(4000)


def skewed() -> None:
    pyro.sample("x", dist.Gumbel(torch.zeros(2), 1.0).to_event(1))


def biased_posterior(loc: Tensor, scale: float) -> pf.Posterior:
    """Of a posterior N(0, 1) in two dimensions with a guide that is off by as much as is asked for."""

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoFlow(model)
    guide()
    guide.whiten(loc, scale * torch.eye(2))
    return fit_posterior(model, guide=guide, steps=0, progress=False)


def test_resampling_corrects_a_biased_guide() -> None:
    posterior = biased_posterior(torch.tensor([0.3, -0.3]), 1.3)
    assert posterior.verdict.khat < 0.7
    assert posterior.corrects
    n = 4000
    x = posterior.sample(n, seed=1)["x"]
    plain = posterior.guide.get_posterior().sample((n,))
    # An importance-resampled draw is worth less than an independent one; three quarters are effective here.
    error = 5 / math.sqrt(0.5 * n)
    assert float(x.mean(0).abs().max()) < error < float(plain.mean(0).abs().min())
    assert float(x.std(0).log().abs().max()) < error < float(plain.std(0).log().abs().min())


def test_an_unreliable_guide_is_not_resampled() -> None:
    posterior = biased_posterior(torch.zeros(2), 0.2)
    assert not posterior.verdict.ok
    assert not posterior.corrects
    x = posterior.sample(2000, seed=1)["x"]
    assert float((x.std(0) / 0.2).log().abs().max()) < 0.1


def test_an_exact_guide_is_not_resampled() -> None:
    posterior = biased_posterior(torch.zeros(2), 1.0)
    assert posterior.verdict.ok
    assert not posterior.corrects
    assert len(torch.unique(posterior.sample(500, seed=1)["x"][:, 0])) == 500


def test_resampled_draws_are_seldom_the_same() -> None:
    posterior = biased_posterior(torch.tensor([0.3, -0.3]), 1.3)
    x = posterior.sample(1000, seed=1)["x"][:, 0]
    assert len(torch.unique(x)) > 850


# Judgement


def test_the_verdict_and_its_sentence(posterior: pf.Posterior) -> None:
    verdict = posterior.verdict
    assert posterior.log_evidence == verdict.log_evidence
    assert verdict.draws == JUDGE_DRAWS
    assert str(verdict) in repr(posterior)
    assert "eta[3]" in repr(posterior)


def test_names_of_entries() -> None:
    names = fitted(mixed, steps=2).entry_names
    assert names[:3] == ["p[0]", "p[1]", "root[0]"]
    assert names[-2:] == ["w[2, 0]", "w[2, 1]"]
    assert len(names) == fitted(mixed, steps=2).density.features


def test_site_dims_name_the_plates() -> None:
    assert fitted(mixed, steps=2).site_dims == {
        "p": (None,),
        "root": (None, None),
        "b": ("columns",),
        "w": ("rows", "columns"),
    }


# Tables


def test_the_summary_has_a_row_for_every_scalar(posterior: pf.Posterior) -> None:
    table = posterior.summary(2000)
    labels = [
        "mu",
        "tau",
        *(f"eta[{i}]" for i in range(3)),
        *(f"theta[{i}]" for i in range(3)),
        "total",
    ]
    assert list(table.index) == labels
    assert list(table.columns) == ["mean", "sd", "hdi_3%", "hdi_97%"]
    draws = posterior.sample(2000, seed=0)
    assert table.loc["mu", "mean"] == pytest.approx(float(draws["mu"].mean()), abs=1e-5)
    assert table.loc["theta[1]", "sd"] == pytest.approx(float(draws["theta"][:, 1].std()), rel=1e-4)
    inside = (draws["mu"] >= table.loc["mu", "hdi_3%"]) & (
        draws["mu"] <= table.loc["mu", "hdi_97%"]
    )
    assert float(inside.float().mean()) == pytest.approx(0.94, abs=0.005)
    assert posterior.summary(2000).equals(table)


def test_the_covariance_goes_with_the_summary(posterior: pf.Posterior) -> None:
    covariance = posterior.covariance(2000)
    labels = ["mu", "tau", *(f"eta[{i}]" for i in range(3))]
    assert list(covariance.index) == list(covariance.columns) == labels
    sd = posterior.summary(2000).loc[labels, "sd"].to_numpy()
    assert covariance.to_numpy().diagonal() ** 0.5 == pytest.approx(sd, rel=1e-4)
    draws = posterior.sample(2000, seed=0)
    both = torch.stack([draws["mu"], draws["theta"][:, 2]]).cov()
    chosen = posterior.covariance(2000, sites=["theta", "mu"])
    assert chosen.loc["mu", "theta[2]"] == chosen.loc["theta[2]", "mu"]
    assert chosen.loc["mu", "theta[2]"] == pytest.approx(float(both[0, 1]), rel=1e-3, abs=1e-4)
    assert posterior.covariance(2, sites=["mu"]).shape == (1, 1)
    assert pf.Posterior(posterior.guide).covariance(10).shape == (5, 5)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"n": 1}, ValueError, "Expected n >= 2; got 1."),
        ({"sites": "mu"}, TypeError, "Expected sites to be a sequence of names; got 'mu'."),
        ({"sites": []}, ValueError, "Expected sites to name one site or more, each once; got []."),
        ({"sites": ["mu", "mu"]}, ValueError, "one site or more, each once; got ['mu', 'mu']."),
        ({"sites": ["nu"]}, ValueError, "Expected sites to be among mu, tau, eta, theta, total"),
    ],
)
def test_a_covariance_that_cannot_be_is_told(posterior, options, error, sentence) -> None:
    with pytest.raises(error, match=re.escape(sentence)):
        posterior.covariance(**{"n": 10, **options})


# ArviZ


def groups(data: Any) -> set[str]:
    return (
        set(data.groups())
        if callable(data.groups)
        else {name.strip("/") for name in data.groups} - {""}
    )


@pytest.fixture(scope="module")
def exported() -> Any:
    return fitted(hierarchy, SIGMA, Y).to_arviz(500)


def test_all_groups_are_there(exported: Any) -> None:
    assert groups(exported) == {
        "posterior",
        "sample_stats",
        "log_likelihood",
        "posterior_predictive",
        "prior",
        "observed_data",
    }


def test_dimensions_are_named_by_the_plates(exported: Any) -> None:
    assert exported["posterior"]["mu"].dims == ("chain", "draw")
    for group in ("posterior", "prior"):
        assert exported[group]["eta"].dims == ("chain", "draw", "group")
    assert exported["posterior"]["theta"].dims == ("chain", "draw", "group")
    assert exported["log_likelihood"]["y"].dims == ("chain", "draw", "group")
    assert exported["posterior_predictive"]["y"].dims == ("chain", "draw", "group")
    assert exported["observed_data"]["y"].dims == ("group",)
    assert exported["posterior"]["eta"].shape == (1, 500, 3)
    assert list(exported["posterior"].coords["group"].values) == [0, 1, 2]


def test_nested_plates_and_events() -> None:
    data = fitted(mixed, steps=2).to_arviz(20)
    assert data["posterior"]["w"].dims == ("chain", "draw", "rows", "columns")
    assert data["posterior"]["p"].dims == ("chain", "draw", "p_dim_0")
    assert data["log_likelihood"]["count"].dims == ("chain", "draw", "rows", "columns")
    assert data["log_likelihood"]["x"].dims == ("chain", "draw")
    assert data["observed_data"]["count"].dims == ("rows", "columns")
    assert data["posterior_predictive"]["x"].shape == (1, 20, 2)


def test_draws_are_those_of_sample(exported: Any, posterior: pf.Posterior) -> None:
    draws = posterior.sample(500, seed=0)
    for name, value in draws.items():
        np.testing.assert_allclose(exported["posterior"][name].values[0], value.numpy(), rtol=1e-6)


def test_the_log_likelihood_is_that_of_each_datum(exported: Any) -> None:
    theta = torch.as_tensor(exported["posterior"]["theta"].values[0])
    expected = dist.Normal(theta, SIGMA).log_prob(Y)
    np.testing.assert_allclose(
        exported["log_likelihood"]["y"].values[0], expected.numpy(), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(exported["observed_data"]["y"].values, Y.numpy())


def test_the_log_weight_is_log_joint_less_log_guide(exported: Any, posterior: pf.Posterior) -> None:
    values = {
        name: torch.as_tensor(exported["posterior"][name].values[0])
        for name in ("mu", "tau", "eta")
    }
    z = posterior.density.unconstrain(values)
    log_joint = (
        dist.Normal(0.0, 2.0).log_prob(values["mu"])
        + dist.HalfNormal(1.0).log_prob(values["tau"])
        + values["tau"].log()
        + dist.Normal(0.0, 1.0).log_prob(values["eta"]).sum(-1)
        + torch.as_tensor(exported["log_likelihood"]["y"].values[0]).sum(-1)
    )
    stats = exported["sample_stats"]
    np.testing.assert_allclose(stats["lp"].values[0], log_joint.numpy(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        log_guide = posterior.guide.get_posterior().log_prob(z)
    np.testing.assert_allclose(
        stats["log_weight"].values[0], (log_joint - log_guide).numpy(), atol=5e-3
    )
    weights = torch.as_tensor(stats["log_weight"].values[0])
    # Draws are resampled by their weights, so that the reciprocal weights average to one over the evidence.
    if posterior.corrects:
        estimate = -(float((-weights).double().logsumexp(0)) - math.log(500))
        assert estimate == pytest.approx(posterior.log_evidence, abs=0.1)


def test_predictions_and_prior_come_from_the_model(exported: Any) -> None:
    theta = exported["posterior"]["theta"].values[0]
    standardised = (exported["posterior_predictive"]["y"].values[0] - theta) / SIGMA.numpy()
    assert abs(standardised.mean()) < 5 / math.sqrt(1500)
    assert abs(math.log(standardised.std())) < 5 / math.sqrt(3000)
    prior = exported["prior"]
    assert abs(prior["mu"].values.mean()) / 2 < 5 / math.sqrt(500)
    assert abs(math.log(prior["mu"].values.std() / 2)) < 5 / math.sqrt(1000)
    assert (prior["tau"].values > 0).all()
    assert abs(prior["tau"].values.mean() - math.sqrt(2 / math.pi)) < 5 * 0.6 / math.sqrt(500)


def test_arviz_can_work_with_it(exported: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loo = az.loo(exported)
        table = az.summary(exported, var_names=["mu", "tau"])
        assert math.isfinite(float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd))
        assert list(table.index) == ["mu", "tau"]
        exported.to_netcdf(str(tmp_path / "posterior.nc"), engine="h5netcdf")


def test_attributes_say_how_far_to_trust_it(exported: Any, posterior: pf.Posterior) -> None:
    attrs = exported.attrs
    assert attrs["inference_library"] == "pyroflows"
    assert attrs["verdict"] == str(posterior.verdict)
    assert attrs["khat"] == posterior.verdict.khat
    assert attrs["log_evidence"] == posterior.log_evidence
    assert attrs["importance_resampled"] == int(posterior.corrects)
    for finding in posterior.verdict.findings:
        assert attrs[f"check_{finding.name}"] == finding.status
        assert attrs.get(f"check_{finding.name}_value") == finding.value


def test_the_seed_of_an_export(posterior: pf.Posterior) -> None:
    first, second, other = (posterior.to_arviz(20, seed=seed) for seed in (0, 0, 1))
    for group in ("posterior", "posterior_predictive", "prior"):
        for name in first[group].data_vars:
            np.testing.assert_array_equal(first[group][name].values, second[group][name].values)
    assert (first["posterior"]["mu"].values != other["posterior"]["mu"].values).any()


def without_data() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))


def by_a_factor() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", -(x**2))


def without_a_prior() -> None:
    x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))


def with_a_coin() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(x + 0.1 * k, 1.0), obs=Y)


def with_data_that_cannot_be_drawn() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.ImproperUniform(constraints.real, (), ()), obs=torch.tensor(0.5))
    pyro.sample("z", dist.Normal(x, 1.0), obs=torch.tensor(0.1))


def with_a_number_for_data() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))


def with_data_of_counts() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample(
            "y",
            dist.Binomial(torch.tensor([3.0, 5.0, 2.0]), logits=x),
            obs=torch.tensor([1.0, 2.0, 2.0]),
        )


def with_missing_data() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y, obs_mask=torch.tensor([True, False, True]))


@pytest.mark.parametrize(
    ("model", "there"),
    [
        (without_data, {"prior"}),
        (by_a_factor, {"prior"}),
        (without_a_prior, {"log_likelihood", "posterior_predictive", "observed_data"}),
        (with_a_coin, {"prior", "log_likelihood", "posterior_predictive", "observed_data"}),
        (with_data_that_cannot_be_drawn, {"log_likelihood", "observed_data"}),
        (
            with_a_number_for_data,
            {"prior", "log_likelihood", "posterior_predictive", "observed_data"},
        ),
        (with_data_of_counts, {"prior", "log_likelihood", "posterior_predictive", "observed_data"}),
        (with_missing_data, set()),
    ],
)
def test_a_group_that_a_model_does_not_allow_is_left_out(model: Model, there: set[str]) -> None:
    posterior = fit_posterior(model, steps=5, progress=False)
    data = posterior.to_arviz(10)
    assert groups(data) >= {"posterior", "sample_stats"} | there
    if there:
        assert groups(data) - {"posterior", "sample_stats"} <= there | {"prior"}
    assert data["posterior"]["x"].shape == (1, 10)


def test_predicted_counts_follow_their_law() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = fit_posterior(with_data_of_counts, steps=5, progress=False).to_arviz(2000)
    counts = data["posterior_predictive"]["y"].values[0]
    x = torch.as_tensor(data["posterior"]["x"].values[0])
    law = dist.Binomial(torch.tensor([3.0, 5.0, 2.0]), logits=x.unsqueeze(-1))
    assert (counts <= [3, 5, 2]).all()
    residual = (counts - law.mean.numpy()) / law.stddev.numpy()
    assert np.abs(residual.mean(0)).max() < 5 / math.sqrt(2000)
    assert np.abs(np.log(residual.std(0))).max() < 5 / math.sqrt(4000)


def test_log_likelihood_sums_to_the_likelihood_part_of_the_joint() -> None:
    data = fit_posterior(with_a_number_for_data, steps=5, progress=False).to_arviz(10)
    assert data["log_likelihood"]["y"].shape == (1, 10, 3)
    x = torch.as_tensor(data["posterior"]["x"].values[0])
    expected = dist.Normal(x, 1.0).log_prob(torch.tensor(0.5))
    np.testing.assert_allclose(
        data["log_likelihood"]["y"].values[0, :, 2], expected.numpy(), rtol=1e-5
    )


def test_a_model_with_a_name_twice_for_plate_and_dimension() -> None:
    """Two plates of one name and different sizes have no common dimension."""

    def model() -> None:
        for i, size in enumerate((2, 3)):
            with pyro.plate(f"part_{i}", size):
                pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))

    data = fit_posterior(model, steps=2, progress=False).to_arviz(5)
    assert data["posterior"]["x_0"].dims == ("chain", "draw", "part_0")
    assert data["posterior"]["x_1"].dims == ("chain", "draw", "part_1")


@pytest.mark.parametrize("draws", [0, -3, 1.5])
def test_a_bad_number_of_exported_draws_is_refused(draws: Any, posterior: pf.Posterior) -> None:
    with pytest.raises((ValueError, TypeError), match="Expected"):
        posterior.to_arviz(draws)


# Files


def assert_same(a: pf.Posterior, b: pf.Posterior) -> None:
    first, second = a.sample(50, seed=2), b.sample(50, seed=2)
    assert list(first) == list(second)
    for name in first:
        torch.testing.assert_close(first[name], second[name])
    assert b.verdict == a.verdict
    assert b.history == a.history
    assert b.seconds == a.seconds
    assert b.interrupted == a.interrupted
    assert b.site_dims == a.site_dims


def test_saved_and_loaded(posterior: pf.Posterior, tmp_path: Path) -> None:
    path = tmp_path / "posterior.pt"
    posterior.save(path)
    assert_same(posterior, load_posterior(path, hierarchy))
    posterior.save(str(path))
    assert_same(posterior, load_posterior(str(path), hierarchy, (SIGMA, Y)))
    assert path.stat().st_size < 1_000_000


def test_a_loaded_posterior_can_do_what_a_fitted_one_can(
    posterior: pf.Posterior, tmp_path: Path
) -> None:
    path = tmp_path / "posterior.pt"
    posterior.save(path)
    loaded = load_posterior(path, hierarchy)
    assert loaded.summary(100).shape == (9, 4)
    assert "log_likelihood" in groups(loaded.to_arviz(10))
    loaded.save(path)
    assert_same(posterior, load_posterior(path, hierarchy))
    further = fit_posterior(hierarchy, (SIGMA, Y), guide=loaded.guide, steps=2, progress=False)
    assert further.verdict.elbo == pytest.approx(posterior.verdict.elbo, abs=0.2)


def changed_realnvp(features: int) -> pf.Flow:
    return pf.RealNVP(features, transforms=2, network=pf.nn.mlp((8,)), reversible=True)


@pytest.mark.parametrize(
    "flow", slow_but_for([pf.NSF, changed_realnvp], [pf.RealNVP, pf.NICE, pf.NSF, changed_realnvp])
)
def test_a_flow_is_remembered_with_its_options(flow: Any, tmp_path: Path) -> None:
    posterior = fit_posterior(skewed, guide=flow, steps=5, progress=False)
    posterior.save(tmp_path / "p.pt")
    assert_same(posterior, load_posterior(tmp_path / "p.pt", skewed))


def test_in_double_precision_and_into_a_single_default(tmp_path: Path) -> None:
    y = Y.double()

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(y, 1.0).to_event(1), obs=y)

    posterior = fit_posterior(model, steps=5, progress=False)
    posterior.save(tmp_path / "p.pt")
    loaded = load_posterior(tmp_path / "p.pt", model)
    assert loaded.sample(3)["x"].dtype == torch.float64
    assert_same(posterior, loaded)


def test_with_discrete_sites(tmp_path: Path) -> None:
    posterior = fit_posterior(with_a_coin, steps=5, progress=False)
    posterior.save(tmp_path / "p.pt")
    assert_same(posterior, load_posterior(tmp_path / "p.pt", with_a_coin))


SCRIPT = """
import sys
import pyro, torch
import pyro.distributions as dist
import pyroflows as pf

def model(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("group", 3):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)
    pyro.deterministic("total", theta.sum(-1))

loaded = pf.load_posterior(sys.argv[1], model)
print(loaded.verdict.ok, loaded.log_evidence, float(loaded.sample(20, seed=3)["theta"].sum()))
"""


def test_loaded_in_a_fresh_process(posterior: pf.Posterior, tmp_path: Path) -> None:
    posterior.save(tmp_path / "p.pt")
    root = Path(pf.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "p.pt")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    ok, evidence, total = run.stdout.split()
    assert ok == str(posterior.verdict.ok)
    assert float(evidence) == pytest.approx(posterior.log_evidence, abs=1e-4)
    assert float(total) == pytest.approx(
        float(posterior.sample(20, seed=3)["theta"].sum()), rel=1e-4
    )


class OwnTransform(pf.transforms.Elementwise):
    """A transform of a user's own, which no file can name."""


def test_a_flow_of_ones_own_needs_a_guide_to_load_into(tmp_path: Path) -> None:
    def flow(features: int) -> pf.transforms.Transform:
        return OwnTransform(pf.univariate.MonotoneNetwork(), features)

    posterior = fit_posterior(skewed, guide=flow, steps=5, progress=False)
    posterior.save(tmp_path / "p.pt")
    with pytest.raises(ValueError, match="Expected a guide made as the one"):
        load_posterior(tmp_path / "p.pt", skewed)
    assert_same(posterior, load_posterior(tmp_path / "p.pt", skewed, guide=AutoFlow(skewed, flow)))
    with pytest.raises(ValueError, match="Expected a guide made as the one saved") as caught:
        load_posterior(tmp_path / "p.pt", skewed, guide=AutoFlow(skewed))
    assert "\n" not in str(caught.value)


def test_arguments_that_a_file_cannot_hold(tmp_path: Path) -> None:
    def model(options: Any) -> None:
        pyro.sample("x", dist.Normal(0.0, options.scale))

    class Options:
        scale = 2.0

    posterior = fit_posterior(model, (Options(),), steps=2, progress=False)
    posterior.save(tmp_path / "p.pt")
    with pytest.raises(ValueError, match="Expected args and kwargs of the model"):
        load_posterior(tmp_path / "p.pt", model)
    assert_same(posterior, load_posterior(tmp_path / "p.pt", model, (Options(),)))
    assert_same(posterior, load_posterior(tmp_path / "p.pt", model, kwargs={"options": Options()}))


def other_name(sigma: Tensor, y: Tensor) -> None:
    pyro.sample("nu", dist.Normal(0.0, 1.0))


def other_shape(sigma: Tensor, y: Tensor) -> None:
    pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize("model", [other_name, other_shape])
def test_the_wrong_model_is_refused(model: Model, posterior: pf.Posterior, tmp_path: Path) -> None:
    posterior.save(tmp_path / "p.pt")
    with pytest.raises(
        ValueError, match=r"Expected the model of the saved posterior, with latent sites .*'mu'"
    ):
        load_posterior(tmp_path / "p.pt", model)


def _pickled_code(path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return print, ("run",)

    torch.save({"format": 1, "trap": Trap()}, path)


GARBAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("theta,1.0\n"),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "zip": lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 100),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "other dictionary": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "code": _pickled_code,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_what_is_no_saved_posterior_is_refused(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.pt"
    GARBAGE[kind](path)
    with pytest.raises(
        ValueError, match=r"Expected the file of a saved posterior; .*p\.pt"
    ) as caught:
        load_posterior(path, hierarchy)
    assert "\n" not in str(caught.value)
    assert "run" not in capfd.readouterr().out


def test_a_truncated_file_is_refused(posterior: pf.Posterior, tmp_path: Path) -> None:
    path = tmp_path / "p.pt"
    posterior.save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="Expected the file of a saved posterior"):
        load_posterior(path, hierarchy)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    write_archive({"format": 99}, str(tmp_path / "p.pt"))
    with pytest.raises(ValueError, match=r"of format 5; .* has format 99"):
        load_posterior(tmp_path / "p.pt", hierarchy)


@pytest.mark.parametrize("name", Saved.__annotations__)
def test_a_file_that_lacks_a_field_is_refused(
    name: str, posterior: pf.Posterior, tmp_path: Path
) -> None:
    path = tmp_path / "p.pt"
    posterior.save(path)
    state = torch.load(path, weights_only=True)
    del state[name]
    write_archive(state, str(path))
    with pytest.raises(
        ValueError, match=rf"Expected the file of a saved posterior; .* lacks {name}"
    ):
        load_posterior(path, hierarchy)


def test_loading_judges_nothing(
    posterior: pf.Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior.save(tmp_path / "p.pt")
    monkeypatch.setattr(importance, "psis", None)
    loaded = load_posterior(tmp_path / "p.pt", hierarchy)
    assert loaded.verdict == posterior.verdict
    assert loaded.rungs == posterior.rungs
    assert loaded.name == posterior.name == posterior.rungs[-1].name


@pytest.mark.parametrize("where", ["missing.pt", "folder/missing.pt", "."])
def test_a_missing_file_is_refused(where: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"Expected the file of a saved posterior; .* cannot be read"
    ):
        load_posterior(tmp_path / where, hierarchy)


@pytest.mark.parametrize("where", ["no/such/folder/p.pt", "."])
def test_a_path_that_cannot_be_written_is_refused(
    where: str, posterior: pf.Posterior, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="Expected a path that can be written; got") as caught:
        posterior.save(tmp_path / where)
    assert "\n" not in str(caught.value)


# The guide in Pyro


@pytest.mark.slow
def test_the_guide_works_with_predictive(posterior: pf.Posterior) -> None:
    predictive = Predictive(hierarchy, guide=posterior.guide, num_samples=50)
    draws = predictive(SIGMA)
    assert draws["y"].shape[0] == 50
    assert draws["y"].shape[-1] == 3
    mu = Predictive(hierarchy, guide=posterior.guide, num_samples=300, return_sites=["mu"])(SIGMA)[
        "mu"
    ]
    reference = posterior.sample(4000, seed=0)["mu"]
    # Uncorrected draws of the guide: as near as the guide is.
    assert abs(float(mu.mean() - reference.mean()) / float(reference.std())) < 0.1 + 5 / math.sqrt(
        300
    )


@pytest.mark.slow
def test_the_guide_works_with_neutra_and_nuts(posterior: pf.Posterior) -> None:
    neutra = NeuTraReparam(posterior.guide)
    model = neutra.reparam(hierarchy)
    mcmc = MCMC(NUTS(model), num_samples=40, warmup_steps=50, disable_progbar=True)
    mcmc.run(SIGMA, Y)
    (latent,) = [
        value for name, value in mcmc.get_samples().items() if name.endswith("_shared_latent")
    ]
    # A dimension for the plate, as Pyro asks for.
    draws = neutra.transform_sample(latent.unsqueeze(-2))
    assert draws["eta"].shape == (40, 3)
    assert bool((draws["tau"] > 0).all())
    # In the flow's coordinates the posterior is all but a standard normal.
    assert float(latent.mean(0).abs().max()) < 5 / math.sqrt(20)


def test_the_guide_has_medians_and_quantiles(posterior: pf.Posterior) -> None:
    median = posterior.guide.median()
    draws = posterior.sample(4000, seed=0)
    for name in ("mu", "tau", "eta"):
        expected = draws[name].median(0).values
        assert float(((median[name] - expected) / draws[name].std(0)).abs().max()) < 0.2


@pytest.mark.slow
def test_a_single_seeded_draw_is_a_draw_from_the_posterior():
    """Over seeds, single draws have the moments of the posterior, for proposal and resampling are independent."""

    def model():
        pyro.sample("x", dist.Gamma(3.0, 1.0))

    posterior = pf.fit_posterior(model, steps=0, progress=False)
    assert posterior.corrects
    draws = torch.stack([posterior.sample(1, seed=seed)["x"][0] for seed in range(150)])
    assert abs(float(draws.mean()) - 3.0) < 4 * (3.0 / 150) ** 0.5
    # The relative variance of a sample variance is (kurtosis - 1) / n, and the kurtosis is 5.
    assert abs(float(draws.var()) / 3.0 - 1) < 4 * (4.0 / 150) ** 0.5


def test_a_reparametrised_site_is_among_the_draws():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("j", 3):
            theta = pyro.sample("theta", dist.Normal(mu, 2.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.zeros(3))

    centred = pyro.poutine.reparam(model, config={"theta": pyro.infer.reparam.LocScaleReparam(0.0)})
    posterior = pf.fit_posterior(centred, steps=0, progress=False)
    assert posterior.sample(5)["theta"].shape == (5, 3)
    data = posterior.to_arviz(draws=50)
    assert list(data.observed_data.data_vars) == ["y"]
    assert list(data.log_likelihood.data_vars) == ["y"]


def test_a_class_of_guides_is_made_for_the_model():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    assert isinstance(
        pf.fit_posterior(model, guide=pf.AutoFlow, steps=0, progress=False).guide, pf.AutoFlow
    )


def test_saving_to_no_path_is_refused():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    posterior = pf.fit_posterior(model, steps=0, progress=False)
    with pytest.raises(TypeError, match="Expected path to be a path; got 3"):
        posterior.save(3)


def test_the_covariance_of_angles_is_that_of_their_deviations_on_the_circle() -> None:
    def model() -> None:
        pyro.sample("angle", dist.VonMises(3.1, 4.0))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = pf.fit_posterior(model, steps=0, progress=False)
    # The variance about the mode, by quadrature; the guide is a normal at least as wide.
    angle = torch.linspace(-math.pi, math.pi, 10_001, dtype=torch.double)
    weight = (4.0 * angle.cos()).exp()
    variance = float((weight * angle.square()).sum() / weight.sum())
    found = float(posterior.covariance(20_000).loc["angle", "angle"])
    assert found == pytest.approx(variance, rel=0.15)
