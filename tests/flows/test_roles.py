"""A flow in every role that a distribution has in Pyro, against what conjugacy or quadrature says."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    HMC,
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.inspect import get_dependencies
from pyro.infer.reparam import TransformReparam
from pyro.nn import PyroModule, PyroParam
from pyro.ops.stats import effective_sample_size
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.nn import mlp

Callback = Callable[..., Any]
SMALL: dict[str, Any] = {"transforms": 2, "network": mlp((8,))}


def no_latents(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latent sites."""


def fit(
    model: Callback,
    guide: Callback,
    *args: Any,
    steps: int = 300,
    lr: float = 0.05,
    elbo: Any = None,
) -> list[float]:
    optim = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.02 ** (1 / steps)})
    svi = SVI(model, guide, optim, elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)]


def gaussian_flow(features: int = 2, context_features: int | None = None, **kwargs: Any) -> pf.Flow:
    """A flow that is a normal, whose answers are known; with a context, its parameters are linear in it."""
    return pf.Flow(
        [pf.transforms.LowerTriangularAffine(features, context_features, network=mlp(()))],
        **kwargs,
    )


def moved(module: pf.Flow, scale: float = 0.4) -> pf.Flow:
    """The flow at parameters that are far from the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def moments(flow: pf.Flow) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a Gaussian flow."""
    layer = flow.transform.layers[0]
    matrix = layer.lower.tril(-1) + layer.log_diag.exp().diag()
    return layer.loc.detach(), (matrix @ matrix.T).detach()


def blob(n: int) -> Tensor:
    return torch.tensor([1.0, -2.0]) + torch.randn(n, 2) @ torch.tensor([[1.0, 0.0], [0.7, 0.5]]).T


def banana(n: int) -> Tensor:
    x = torch.randn(n)
    return torch.stack([x, x**2 + 0.5 * torch.randn(n)], -1)


# ---------------------------------------------------------------------------------------------- observed site


class PlainLikelihood:
    def __init__(self, flow: pf.Flow) -> None:
        self.flow = flow

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.flow(), obs=x)


class ModuleLikelihood(PyroModule):
    def __init__(self, flow: pf.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.flow(), obs=x)


LIKELIHOODS = {"function": (PlainLikelihood, "Flow"), "PyroModule": (ModuleLikelihood, "flow")}


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_observed_site_reaches_the_maximum_likelihood(kind: str) -> None:
    x = blob(500)
    flow = gaussian_flow()
    fit(LIKELIHOODS[kind][0](flow), no_latents, x / 1.0)
    mean, covariance = moments(flow)
    # No sampling error: both are functions of the same data.
    torch.testing.assert_close(mean, x.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(covariance, x.T.cov(correction=0), atol=5e-3, rtol=0)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_parameters_are_in_the_param_store_under_the_name_of_the_module(kind: str) -> None:
    make, prefix = LIKELIHOODS[kind]
    flow = gaussian_flow()
    assert not list(pyro.get_param_store())
    fit(make(flow), no_latents, blob(10), steps=1)
    store = pyro.get_param_store()
    assert set(store) == {f"{prefix}.{name}" for name, _ in flow.named_parameters()}
    for name, parameter in flow.named_parameters():
        assert store[f"{prefix}.{name}"].unconstrained() is parameter


def test_a_plain_call_leaves_the_param_store_alone() -> None:
    pf.RealNVP(2)().log_prob(torch.zeros(2))
    assert not list(pyro.get_param_store())


@pytest.mark.slow
def test_a_realnvp_learns_a_banana() -> None:
    train, test = banana(500), banana(2000)
    flow = pf.RealNVP(2, transforms=4, network=mlp((16,)), scale="softclip")
    fit(PlainLikelihood(flow), no_latents, train, steps=300, lr=0.02)
    truth = dist.Normal(0.0, 1.0).log_prob(test[:, 0]) + dist.Normal(test[:, 0] ** 2, 0.5).log_prob(
        test[:, 1]
    )
    gap = (truth - flow().log_prob(test)).detach()
    # The gap estimates a Kullback-Leibler divergence: not negative, and small; a Gaussian fit is at 0.9.
    assert gap.mean() > -4 * gap.std() / math.sqrt(len(gap))
    assert gap.mean() < 0.1


def test_observed_site_with_a_context_is_a_regression() -> None:
    h = torch.linspace(-1, 1, 200).unsqueeze(-1)
    x = torch.cat([2 * h + 1, -h], -1) + 0.1 * torch.randn(200, 2)
    flow = gaussian_flow(context_features=1)

    def model(h: Tensor, x: Tensor) -> None:
        with pyro.plate("data", len(h)):
            pyro.sample("x", flow(h), obs=x)

    fit(model, no_latents, h, x, steps=400)
    loc = flow(torch.tensor([0.5]))
    error = loc.sample((4000,)).mean(0) - torch.tensor([2.0, -0.5])
    # The regression's own error is 0.1 / sqrt(200), that of the draws 0.1 / sqrt(4000).
    assert error.abs().max() < 5 * 0.1 * math.hypot(200**-0.5, 4000**-0.5)


def test_partly_observed_site() -> None:
    flow = moved(pf.RealNVP(2, **SMALL))
    x, mask = torch.randn(5, 2), torch.tensor([True, False, True, True, False])

    def model() -> Tensor:
        with pyro.plate("data", 5):
            return pyro.sample("x", flow(), obs=x, obs_mask=mask)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"][mask], x[mask])
    observed = trace.nodes["x_observed"]["log_prob"]
    torch.testing.assert_close(observed, torch.where(mask, flow().log_prob(x), torch.zeros(5)))
    assert math.isfinite(fit(model, AutoNormal(model), steps=1)[0])


# ----------------------------------------------------------------------------------------------------- latent


def gaussian_prior() -> pf.Flow:
    flow = gaussian_flow(name="prior")
    flow.transform.layers[0].set(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.0], [0.8, 0.6]]))
    return flow.requires_grad_(False)


NOISE = 0.5


def latent_model(flow: pf.Flow) -> Callable[[Tensor], Tensor]:
    def model(x: Tensor) -> Tensor:
        z = pyro.sample("z", flow())
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)
        return z

    return model


def exact_posterior(flow: pf.Flow, x: Tensor) -> dist.MultivariateNormal:
    mean, covariance = moments(flow)
    precision = covariance.inverse() + torch.eye(2) / NOISE**2
    information = covariance.inverse() @ mean + x / NOISE**2
    return dist.MultivariateNormal(information @ precision.inverse(), precision_matrix=precision)


def log_evidence(flow: pf.Flow, x: Tensor) -> float:
    mean, covariance = moments(flow)
    return float(
        dist.MultivariateNormal(mean, covariance + NOISE**2 * torch.eye(2)).log_prob(x).sum()
    )


X = torch.tensor([0.3, 0.9])


@pytest.mark.parametrize(
    "elbo", slow_but_for([TraceEnum_ELBO], [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
)
def test_latent_under_auto_normal(elbo: Any) -> None:
    flow = gaussian_prior()
    model, exact = latent_model(flow), exact_posterior(flow, X)
    guide = AutoNormal(model)
    fit(
        model,
        guide,
        X,
        elbo=elbo(num_particles=32, vectorize_particles=True, strict_enumeration_warning=False),
    )
    # The best mean-field normal has the exact mean and the inverse root of the precision's diagonal.
    scale = exact.precision_matrix.diagonal().rsqrt()
    torch.testing.assert_close(
        guide.median()["z"], exact.mean, atol=0.15 * float(scale.min()), rtol=0
    )
    low, high = guide.quantiles([0.15865525, 0.84134475])["z"]
    torch.testing.assert_close((high - low) / 2, scale, rtol=0.1, atol=0)


def test_latent_under_other_guides_of_pyro() -> None:
    flow = gaussian_prior()
    model, exact = latent_model(flow), exact_posterior(flow, X)
    delta = AutoDelta(model)
    fit(model, delta, X)
    torch.testing.assert_close(delta.median()["z"], exact.mean, atol=1e-3, rtol=0)
    pyro.clear_param_store()
    laplace = AutoLaplaceApproximation(model)
    fit(model, laplace, X)
    posterior = laplace.laplace_approximation(X).get_posterior()
    torch.testing.assert_close(
        posterior.covariance_matrix, exact.covariance_matrix, atol=1e-3, rtol=1e-3
    )


@pytest.mark.slow
def test_latent_under_a_correlated_normal() -> None:
    flow = gaussian_prior()
    model, exact = latent_model(flow), exact_posterior(flow, X)
    full = AutoMultivariateNormal(model)
    fit(model, full, X, elbo=Trace_ELBO(num_particles=32, vectorize_particles=True))
    torch.testing.assert_close(
        full.get_posterior().covariance_matrix, exact.covariance_matrix, atol=0.03, rtol=0.1
    )


def test_latent_on_a_support_under_auto_normal_stays_on_it() -> None:
    flow = moved(pf.RealNVP(2, support=constraints.positive, **SMALL)).requires_grad_(False)
    model = latent_model(flow)
    guide = AutoNormal(model)
    fit(model, guide, X, steps=20)
    assert bool((Predictive(model, guide=guide, num_samples=50)(X)["z"] > 0).all())


def positive_model(x: Tensor, flow: pf.Flow) -> None:
    z = pyro.sample("z", flow())
    pyro.sample("x", dist.Normal(z.log(), NOISE).to_event(1), obs=x)


def quadrature_moments(flow: pf.Flow, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of log z under the posterior of ``positive_model``, on a grid."""
    line = torch.linspace(-6, 6, 401)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        log_weight = (
            flow().log_prob(grid.exp())
            + grid.sum(-1)
            + dist.Normal(grid, NOISE).log_prob(x).sum(-1)
        )
    weight = torch.softmax(log_weight, 0).unsqueeze(-1)
    mean = (weight * grid).sum(0)
    return mean, (weight * (grid - mean) ** 2).sum(0).sqrt()


@pytest.mark.parametrize("jit", slow_but_for([True], [False, True]))
def test_latent_under_nuts(jit: bool) -> None:
    flow = moved(pf.RealNVP(2, support=constraints.positive, **SMALL), 0.6).requires_grad_(False)
    kernel = NUTS(positive_model, jit_compile=jit, ignore_jit_warnings=True, max_tree_depth=4)
    mcmc = MCMC(kernel, num_samples=200, warmup_steps=60, disable_progbar=True)
    mcmc.run(X, flow)
    draws = mcmc.get_samples()["z"].log()
    mean, sd = quadrature_moments(flow, X)
    n = effective_sample_size(draws.unsqueeze(0)).clamp(10, len(draws))
    assert bool(((draws.mean(0) - mean).abs() < 5 * sd / n.sqrt()).all())
    assert bool(((draws.std(0) / sd).log().abs() < 5 / (2 * n).sqrt()).all())


def test_latent_under_hmc_does_not_keep_gradients_of_the_flow() -> None:
    flow = moved(pf.RealNVP(2, **SMALL))
    mcmc = MCMC(
        HMC(latent_model(flow), num_steps=2), num_samples=5, warmup_steps=5, disable_progbar=True
    )
    mcmc.run(X)
    assert mcmc.get_samples()["z"].shape == (5, 2)
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_a_model_and_a_guide_with_the_same_flow_class_need_names() -> None:
    prior, posterior = pf.RealNVP(2, **SMALL), pf.RealNVP(2, **SMALL)
    with pytest.raises(
        ValueError,
        match="Expected flows with different names in one model; got two named 'RealNVP'",
    ):
        fit(latent_model(prior), lambda x: pyro.sample("z", posterior()), X, steps=1)


@pytest.mark.slow
def test_prior_and_guide_train_together() -> None:
    """Empirical Bayes: the prior is a Gaussian flow in the model, the posterior an amortised one in the guide."""
    x = blob(200)
    prior, posterior = (
        gaussian_flow(name="prior"),
        gaussian_flow(context_features=2, name="posterior"),
    )

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    fit(model, guide, x, steps=800)
    mean, covariance = moments(prior)
    # The marginal likelihood is that of N(mean, covariance + noise), so its maximum is known; the error left is that of
    # stochastic gradients.
    torch.testing.assert_close(mean, x.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(
        covariance, x.T.cov(correction=0) - NOISE**2 * torch.eye(2), atol=0.12, rtol=0
    )


# ------------------------------------------------------------------------------------------------------ guide


class ModuleGuide(PyroModule):
    def __init__(self, flow: pf.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return pyro.sample("z", self.flow())


def plain_guide(flow: pf.Flow) -> Callback:
    return lambda x: pyro.sample("z", flow())


ELBOS = {
    "Trace": Trace_ELBO(num_particles=64, vectorize_particles=True),
    "Trace, one after the other": Trace_ELBO(num_particles=4),
    "TraceGraph": TraceGraph_ELBO(num_particles=64, vectorize_particles=True),
    "JitTrace": JitTrace_ELBO(num_particles=64, vectorize_particles=True, ignore_jit_warnings=True),
}


@pytest.mark.parametrize(
    ("kind", "elbo"),
    slow_but_for(
        [(ModuleGuide, "JitTrace"), (plain_guide, "TraceGraph")],
        zip([plain_guide, ModuleGuide] * 2, ELBOS, strict=True),
    ),
)
def test_guide_reaches_the_exact_posterior(kind: Any, elbo: str) -> None:
    prior, flow = gaussian_prior(), gaussian_flow(name="posterior")
    model, guide, exact = latent_model(prior), kind(flow), exact_posterior(prior, X)
    fit(model, guide, X, steps=200, elbo=copy.copy(ELBOS[elbo]))
    mean, covariance = moments(flow)
    tolerance = 0.25 if "one" in elbo else 0.1
    whiten = exact.scale_tril.inverse()
    assert ((mean - exact.mean) @ whiten.T).abs().max() < tolerance
    assert (whiten @ covariance @ whiten.T - torch.eye(2)).abs().max() < 2 * tolerance
    with torch.no_grad():
        loss = Trace_ELBO(num_particles=400, vectorize_particles=True).loss(model, guide, X)
    assert loss == pytest.approx(-log_evidence(prior, X), abs=0.05 if "one" in elbo else 0.02)


def test_guide_on_a_support() -> None:
    """A gamma posterior, for which a positive flow of one feature is close."""
    flow = pf.Flow(
        [pf.transforms.Elementwise(pf.univariate.Affine("exp"), 1)], support=constraints.positive
    )

    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0).expand([1]).to_event(1))
        pyro.sample("n", dist.Poisson(rate).to_event(1), obs=torch.tensor([9.0]))

    def guide() -> None:
        pyro.sample("rate", flow())

    fit(model, guide, elbo=Trace_ELBO(num_particles=32, vectorize_particles=True))
    # The lognormal nearest to Gamma(a, b): log-mean by setting the derivatives to zero, E[x] = a / b, variance 1 / a.
    a, b = 12.0, 3.0
    draws = flow().sample((20000,)).log()
    assert float(draws.mean()) == pytest.approx(math.log(a / b) - 0.5 / a, abs=0.02)
    assert float(draws.std()) == pytest.approx(a**-0.5, rel=0.05)


@pytest.mark.parametrize("batch", slow_but_for([32], [None, 32]))
def test_amortised_guide_in_a_plate(batch: int | None) -> None:
    x = blob(128)
    prior = gaussian_prior()
    encoder = nn.Linear(2, 2)
    flow = gaussian_flow(context_features=2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=batch) as index:
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x[index])

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), subsample_size=batch) as index:
            z = pyro.sample("z", flow(encoder(x[index])))
            assert z.shape == (batch or len(x), 2)

    losses = fit(model, guide, x, steps=400, lr=0.03)
    # Linear in the data and Gaussian, the guide holds the exact posterior, where the loss is minus the log evidence.
    truth = -log_evidence(prior, x)
    if batch is None:
        assert sum(losses[-20:]) / 20 == pytest.approx(truth, abs=0.02 * len(x))
    point = x[:1]
    torch.testing.assert_close(
        flow(encoder(point)).sample((8000,)).mean(0),
        exact_posterior(prior, point).mean,
        atol=0.1,
        rtol=0,
    )
    assert len(pyro.get_param_store()) == len(list(encoder.parameters())) + len(
        list(flow.parameters())
    )


# ---------------------------------------------------------------------------------------------------- mixture


def test_mixture_component() -> None:
    flow = moved(pf.RealNVP(2, context_features=3, **SMALL))
    weights, context = torch.tensor([0.2, 0.8]), torch.randn(2, 3)
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), flow(context))
    assert (mixture.batch_shape, mixture.event_shape) == ((), (2,))
    x = torch.randn(7, 2)
    parts = torch.stack([flow(c).log_prob(x) for c in context], -1) + weights.log()
    torch.testing.assert_close(mixture.log_prob(x), parts.logsumexp(-1))
    torch.testing.assert_close(mixture.expand([4]).log_prob(x[:4]), mixture.log_prob(x[:4]))
    draws = mixture.sample((4000,))
    assert draws.shape == (4000, 2)
    # The mean log-density of draws is minus the entropy, whichever of the two ways it is estimated by.
    direct = mixture.log_prob(draws).detach()
    chosen = flow(context).sample((4000,))
    by_parts = (mixture.log_prob(chosen.reshape(-1, 2)).reshape(-1, 2) * weights).sum(-1).detach()
    error = math.sqrt(float(direct.var() + by_parts.var()) / 4000)
    assert abs(float(direct.mean() - by_parts.mean())) < 5 * error


@pytest.mark.slow
def test_mixture_of_flows_learns_clusters() -> None:
    centers = torch.tensor([[3.0, 0.0], [-3.0, 1.0]])
    truth = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(centers, 0.5).to_event(1)
    )
    x = truth.sample((400,))
    flow = gaussian_flow(context_features=2)
    with torch.no_grad():
        flow.transform.layers[0].conditioner.input.weight[0] = torch.tensor([1.0, -1.0])

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.full((2,), 0.5), constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", dist.MixtureSameFamily(dist.Categorical(weights), flow(torch.eye(2))), obs=x
            )

    losses = fit(model, no_latents, x, steps=400)
    gain = 2 * (-truth.log_prob(x).sum().item() - losses[-1])
    # Twice the log-likelihood ratio to the truth is chi-squared with the number of free parameters, 11.
    assert -0.5 < gain < 11 + 5 * math.sqrt(22)


# ------------------------------------------------------------------------------------------------ enumeration


@pytest.mark.parametrize("how", ["parallel", "sequential", "config_enumerate"])
def test_enumeration_beside_a_flow(how: str) -> None:
    flow = moved(pf.RealNVP(2, context_features=3, **SMALL))
    weights, table = torch.tensor([0.2, 0.5, 0.3]), torch.randn(3, 3)
    x = torch.randn(6, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample(
                "k",
                dist.Categorical(weights),
                infer={} if how == "config_enumerate" else {"enumerate": how},
            )
            pyro.sample("x", flow(table[k]), obs=x)

    exact = (
        (torch.stack([flow(c).log_prob(x) for c in table], -1) + weights.log()).logsumexp(-1).sum()
    )
    chosen = config_enumerate(model) if how == "config_enumerate" else model
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    if (
        how == "sequential"
    ):  # Pyro enumerates a site by itself only in the guide; there the sum is over its values.
        guide = poutine.block(config_enumerate(model, default="sequential"), expose=["k"])
        log_ratio = torch.stack([flow(c).log_prob(x) for c in table], -1)
        exact = (log_ratio * weights).sum()
        single = [elbo.loss(model, guide, row.unsqueeze(0)) for row in x]
        assert sum(single) == pytest.approx(-float(exact), rel=1e-5)
        return
    assert elbo.loss(chosen, no_latents, x) == pytest.approx(-float(exact), rel=1e-5)
    elbo.differentiable_loss(chosen, no_latents, x).backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_a_latent_flow_beside_enumeration() -> None:
    flow = gaussian_prior()

    def model(x: Tensor) -> None:
        z = pyro.sample("z", flow(), infer={"unused": True})
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z[..., 0] + k * z[..., 1], 1.0), obs=x)

    guide = AutoNormal(poutine.block(model, hide=["k"]))
    losses = fit(model, guide, torch.randn(5), steps=30, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    assert all(map(math.isfinite, losses))


# ----------------------------------------------------------------------------------------------------- plates


def test_a_plate_expands_a_flow_without_context() -> None:
    flow = moved(pf.RealNVP(2, **SMALL))

    def model() -> Tensor:
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            return pyro.sample("x", flow())

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert (site["value"].shape, site["log_prob"].shape) == ((3, 4, 2), (3, 4))
    torch.testing.assert_close(site["log_prob"], flow().log_prob(site["value"].clone()))
    assert len(site["value"].reshape(-1, 2).unique(dim=0)) == 12


def test_plates_on_both_sides_of_the_batch_of_the_context() -> None:
    flow = moved(pf.RealNVP(2, context_features=3, **SMALL))
    context = torch.randn(3, 1, 3)

    def model() -> None:
        particles, rows, columns = (
            pyro.plate(n, s, dim=d) for n, s, d in [("p", 5, -3), ("r", 3, -2), ("c", 4, -1)]
        )
        with particles, rows, columns:
            pyro.sample("x", flow(context))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert (site["fn"].batch_shape, site["value"].shape, site["log_prob"].shape) == (
        (5, 3, 4),
        (5, 3, 4, 2),
        (5, 3, 4),
    )
    value = site["value"].clone()
    for row in range(3):
        torch.testing.assert_close(
            site["log_prob"][:, row], flow(context[row, 0]).log_prob(value[:, row])
        )


def test_a_subsampled_plate_scales_the_flow() -> None:
    flow, x = moved(pf.RealNVP(2, **SMALL)), torch.randn(10, 2)

    def model() -> None:
        with pyro.plate("data", 10, subsample_size=4) as index:
            pyro.sample("x", flow(), obs=x[index])

    trace = poutine.trace(model).get_trace()
    expected = 2.5 * flow().log_prob(x[trace.nodes["data"]["value"]]).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_a_plate_of_the_wrong_size_is_refused() -> None:
    flow = pf.RealNVP(2, context_features=3, **SMALL)

    def model() -> None:
        with pyro.plate("data", 4):
            pyro.sample("x", flow(torch.zeros(3, 3)))

    with pytest.raises((ValueError, RuntimeError)):
        poutine.trace(model).get_trace()


# --------------------------------------------------------------------------------------- expand, mask, to_event


@pytest.mark.parametrize("context", [None, (3,), (4, 1, 3)], ids=str)
def test_expand(context: tuple[int, ...] | None) -> None:
    flow = moved(
        pf.RealNVP(2, context_features=context and 3, support=constraints.positive, **SMALL)
    )
    d = flow(None if context is None else torch.randn(context))
    wide = d.expand([6, 4, 5])
    assert isinstance(wide, pf.distributions.FlowDistribution)
    assert (wide.batch_shape, wide.event_shape) == ((6, 4, 5), (2,))
    x = wide.rsample()
    assert x.shape == (6, 4, 5, 2)
    assert len(x.reshape(-1, 2).unique(dim=0)) == 120
    score = wide.log_prob(x)
    assert score.shape == (6, 4, 5)
    torch.testing.assert_close(score, d.log_prob(x.detach().clone()), rtol=1e-4, atol=1e-4)
    assert wide.expand([2, 6, 4, 5]).sample().shape == (2, 6, 4, 5, 2)
    assert wide.sample((7,)).shape == (7, 6, 4, 5, 2)


def test_mask() -> None:
    flow = moved(pf.RealNVP(2, **SMALL))
    x, mask = torch.randn(4, 2), torch.tensor([True, False, True, False])
    plain = flow().log_prob(x)
    masked = flow().expand([4]).mask(mask)
    torch.testing.assert_close(masked.log_prob(x), torch.where(mask, plain, torch.zeros(4)))
    assert masked.support.event_dim == 1
    assert float(flow().mask(False).log_prob(x).abs().sum()) == 0

    def model() -> None:
        with pyro.plate("data", 4), poutine.mask(mask=mask), poutine.scale(scale=2.0):
            pyro.sample("x", flow(), obs=x)

    torch.testing.assert_close(
        poutine.trace(model).get_trace().log_prob_sum(), 2 * plain[mask].sum()
    )


def test_to_event() -> None:
    flow = moved(pf.RealNVP(2, context_features=3, support=constraints.positive, **SMALL))
    d = flow(torch.randn(5, 4, 3))
    joint = d.to_event(1)
    assert (joint.batch_shape, joint.event_shape, joint.support.event_dim) == ((5,), (4, 2), 2)
    x = joint.sample()
    torch.testing.assert_close(joint.log_prob(x), d.log_prob(x).sum(-1))

    def model() -> None:
        with pyro.plate("data", 5):
            pyro.sample("z", flow(torch.zeros(4, 3)).to_event(1))

    guide = AutoNormal(model)
    fit(model, guide, steps=2)
    assert guide.median()["z"].shape == (5, 4, 2)


def test_validation_names_a_value_outside_of_the_support() -> None:
    d = pf.RealNVP(2, support=constraints.positive, **SMALL)()
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="support"):
        pf.RealNVP(2, support=constraints.positive, **SMALL)().log_prob(torch.tensor([1.0, -1.0]))
    assert bool(d.support.check(torch.tensor([1.0, 2.0])))
    assert not bool(d.support.check(torch.tensor([1.0, -2.0])))


# ------------------------------------------------------------------------------------------- Predictive, infer={}


@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "parallel"])
def test_predictive(parallel: bool) -> None:
    prior, likelihood = (
        pf.RealNVP(2, name="prior", **SMALL),
        pf.RealNVP(2, context_features=2, name="likelihood", **SMALL),
    )

    def model(x: Tensor | None = None) -> None:
        z = pyro.sample("z", prior())
        with pyro.plate("data", 3):
            pyro.sample("x", likelihood(z), obs=x)

    guide = pf.AutoFlow(model)
    guide(torch.zeros(3, 2))
    # In parallel, Predictive takes the event of a conditioned global site for a plate, whichever distribution it has.
    for given in (None,) if parallel else (None, guide):
        draws = Predictive(model, guide=given, num_samples=6, parallel=parallel)()
        assert draws["x"].shape == (6, 3, 2)
        assert draws["z"].reshape(6, -1).unique(dim=0).shape == (6, 2)


def test_prior_predictive_draws_follow_the_flow() -> None:
    flow = gaussian_prior()
    draws = Predictive(lambda: pyro.sample("z", flow()), num_samples=2000, parallel=True)()["z"]
    mean, covariance = moments(flow)
    error = draws.mean(0) - mean
    assert float(error @ covariance.inverse() @ error) * 2000 < 2 + 5 * 2


def test_infer_options() -> None:
    prior, auxiliary = gaussian_prior(), gaussian_flow(name="auxiliary")

    def guide(x: Tensor) -> None:
        u = pyro.sample("u", auxiliary(), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u, event_dim=1), infer={})

    losses = fit(
        latent_model(prior), guide, X, elbo=Trace_ELBO(num_particles=32, vectorize_particles=True)
    )
    assert losses[-1] == pytest.approx(-log_evidence(prior, X), abs=0.1)


# --------------------------------------------------------------------------------------------------- handlers


def test_handlers() -> None:
    flow = moved(pf.RealNVP(2, **SMALL))
    model = latent_model(flow)
    z = torch.tensor([0.2, -0.4])
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(X)
    expected = flow().log_prob(z) + dist.Normal(z, NOISE).log_prob(X).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    sampled = poutine.trace(model).get_trace(X)
    torch.testing.assert_close(poutine.replay(model, sampled)(X), sampled.nodes["z"]["value"])
    torch.testing.assert_close(poutine.do(model, {"z": z})(X), z)
    again = poutine.trace(poutine.uncondition(model)).get_trace(X)
    assert not again.nodes["x"]["is_observed"]
    assert "z" in trace.format_shapes()


def test_reparametrised_as_its_base() -> None:
    flow = moved(pf.RealNVP(2, **SMALL))
    model = latent_model(flow)
    trace = poutine.trace(poutine.reparam(model, {"z": TransformReparam()})).get_trace(X)
    base, z = trace.nodes["z_base"]["value"], trace.nodes["z"]["value"]
    torch.testing.assert_close(flow.transform(base), z)
    expected = flow.base.log_prob(base) + dist.Normal(z, NOISE).log_prob(X).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_dependencies_are_seen_through_a_flow() -> None:
    flow = pf.RealNVP(2, context_features=2, name="likelihood", **SMALL)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", flow(z), obs=torch.zeros(2))

    assert get_dependencies(model)["prior_dependencies"]["x"] == {"x": set(), "z": set()}


# ------------------------------------------------------------------------------------------- names and instances


@pytest.mark.parametrize("local", [False, True], ids=["store", "module_local_params"])
def test_two_flows_of_one_name_give_a_clear_error(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        first, second = pf.RealNVP(2, **SMALL), pf.RealNVP(2, **SMALL)

        def model() -> None:
            pyro.sample("a", first(), obs=torch.zeros(2))
            pyro.sample("b", second(), obs=torch.zeros(2))

        sentence = r"two named 'RealNVP'. Give each its own, as in RealNVP\(..., name='prior'\)."
        with pytest.raises(ValueError, match=sentence):
            fit(model, no_latents, steps=1)


def test_two_flows_of_two_names_and_one_flow_twice() -> None:
    first, second = pf.RealNVP(2, name="first", **SMALL), pf.RealNVP(2, name="second", **SMALL)

    def model() -> None:
        pyro.sample("a", first(), obs=torch.zeros(2))
        pyro.sample("b", second(), obs=torch.ones(2))
        pyro.sample("c", first(), obs=torch.ones(2))

    fit(model, no_latents, steps=2)
    assert {name.split(".")[0] for name in pyro.get_param_store()} == {"first", "second"}


@pytest.mark.parametrize("kind", slow_but_for(["PyroModule"], LIKELIHOODS))
def test_a_second_instance_trains_on_its_own(kind: str) -> None:
    make, x = LIKELIHOODS[kind][0], blob(200)
    first = gaussian_flow()
    fit(make(first), no_latents, x)
    kept = moments(first)
    second = gaussian_flow()
    assert float(moments(second)[0].abs().sum()) == 0
    losses = fit(make(second), no_latents, x)
    assert losses[0] > losses[-1] + 10
    torch.testing.assert_close(moments(second), kept, atol=5e-3, rtol=0)
    fit(make(second), no_latents, -x)
    torch.testing.assert_close(moments(first), kept, atol=0, rtol=0)
    # The first may go on, too, from where it was.
    assert fit(make(first), no_latents, x, steps=1)[0] == pytest.approx(losses[-1], abs=0.5)


def test_a_copy_trains_on_its_own() -> None:
    x = blob(100)
    first = gaussian_flow()
    fit(PlainLikelihood(first), no_latents, x)
    kept = moments(first)
    second = copy.deepcopy(first)
    fit(PlainLikelihood(second), no_latents, x + 1)
    torch.testing.assert_close(moments(first), kept, atol=0, rtol=0)
    torch.testing.assert_close(moments(second)[0], x.mean(0) + 1, atol=5e-3, rtol=0)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_flow_inside_a_plain_module(jit: bool) -> None:
    """``pyro.module`` and the flow both name its parameters; each may train once only."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.flow = nn.Linear(2, 2), gaussian_flow(context_features=2)

        def forward(self, x: Tensor) -> pf.distributions.FlowDistribution:
            return self.flow(self.linear(x))

    encoder, x = Encoder(), blob(50)

    def model(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("x", encoder(torch.zeros_like(x)), obs=x)

    elbo = JitTrace_ELBO(ignore_jit_warnings=True) if jit else Trace_ELBO()
    losses = fit(model, no_latents, x, steps=30, elbo=elbo)
    assert losses[-1] < losses[0]
    assert set(pyro.get_param_store()) == {
        f"encoder$$${name}" for name, _ in encoder.named_parameters()
    }


@pytest.mark.parametrize("kind", slow_but_for(["PyroModule"], LIKELIHOODS))
def test_module_local_params(kind: str) -> None:
    x = blob(200)
    with pyro.settings.context(module_local_params=True):
        flow = gaussian_flow()
        model = LIKELIHOODS[kind][0](flow)
        fit(model, no_latents, x)
        torch.testing.assert_close(moments(flow)[0], x.mean(0), atol=5e-3, rtol=0)
        assert not list(pyro.get_param_store())
        # Without a store there are no names to collide; the other way to train is by a torch optimiser.
        other = gaussian_flow()
        elbo = Trace_ELBO()(LIKELIHOODS[kind][0](other), no_latents)
        optimizer = torch.optim.Adam(other.parameters(), lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            elbo(x).backward()
            optimizer.step()
        torch.testing.assert_close(moments(other)[0], x.mean(0), atol=0.05, rtol=0)


def test_frozen_flows_stay_out_of_the_store() -> None:
    flow = gaussian_flow().requires_grad_(False)
    PlainLikelihood(flow)(blob(3))
    assert not list(pyro.get_param_store())


# ------------------------------------------------------------------------------------------ saving and loading


class AmortisedGuide(PyroModule):
    """A guide with a parameter of Pyro and a flow, both attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = PyroParam(torch.rand(2, 3), constraints.positive)
        self.flow = pf.RealNVP(2, context_features=3, mask="random", **SMALL)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.flow(x @ self.weight))


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)


def role(kind: str) -> tuple[Callback, Callback, Callable[[Tensor], Tensor]]:
    """A model, a guide and a probe that shows whether the parameters are those of another process."""
    if kind == "amortised guide":
        guide = AmortisedGuide()
        return local_model, guide, lambda x: guide.flow(x @ guide.weight).log_prob(x)
    flow = pf.RealNVP(2, mask="random", **SMALL)
    return LIKELIHOODS[kind][0](flow), no_latents, lambda x: flow().log_prob(x)


SAVED = ["function", "PyroModule", "amortised guide"]
PROBE = torch.linspace(-1, 1, 10).reshape(5, 2)
FRESH = """
import json, sys
import pyro, torch
sys.path[:0] = sys.argv[1], sys.argv[2]
from test_roles import PROBE, role
from pyro.infer import Trace_ELBO
answers = {}
for kind, path in json.loads(sys.argv[3]).items():
    for when in ("before", "after"):
        pyro.clear_param_store()
        pyro.set_rng_seed(99)
        model, guide, probe = role(kind)
        if when == "after":
            Trace_ELBO().loss(model, guide, PROBE)
        pyro.get_param_store().load(path)
        Trace_ELBO().loss(model, guide, PROBE)
        answers[f"{kind}, {when}"] = probe(PROBE).tolist()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def saved_and_restored(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What each role answers in this process, and in a fresh one that loaded the param store."""
    folder = tmp_path_factory.mktemp("stores")
    expected, paths = {}, {}
    for number, kind in enumerate(SAVED):
        pyro.clear_param_store()
        model, guide, probe = role(kind)
        fit(model, guide, blob(50), steps=20)
        expected[kind] = probe(PROBE).detach()
        paths[kind] = str(folder / f"{number}.store")
        pyro.get_param_store().save(paths[kind])
    here = Path(__file__).parent
    command = [sys.executable, "-c", FRESH, str(here), str(here.parent), json.dumps(paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return expected, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", SAVED)
def test_param_store_restores_in_a_fresh_process(
    saved_and_restored: tuple[dict[str, Tensor], dict[str, Any]], kind: str, when: str
) -> None:
    expected, restored = saved_and_restored
    torch.testing.assert_close(torch.tensor(restored[f"{kind}, {when}"]), expected[kind])


def test_a_store_of_another_shape_is_refused(tmp_path: Path) -> None:
    fit(PlainLikelihood(pf.RealNVP(2, **SMALL)), no_latents, blob(5), steps=1)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    with pytest.raises(
        ValueError,
        match=r"Expected the param store to hold RealNVP.* of shape \(16, 1\); got \(8, 1\)",
    ):
        fit(
            PlainLikelihood(pf.RealNVP(2, transforms=2, network=mlp((16,)))),
            no_latents,
            blob(5),
            steps=1,
        )


def test_a_checkpoint_of_the_store_rewinds_a_flow() -> None:
    x, flow = blob(50), gaussian_flow()
    model = PlainLikelihood(flow)
    fit(model, no_latents, x, steps=30)
    kept, state = moments(flow), copy.deepcopy(pyro.get_param_store().get_state())
    fit(model, no_latents, -x, steps=30)
    pyro.get_param_store().set_state(state)
    model(x)  # the store speaks up at the next call in a model
    poutine.trace(model).get_trace(x)
    torch.testing.assert_close(moments(flow), kept)
