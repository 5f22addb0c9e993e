"""What Pyro offers to distributions, transforms and guides works with ours: one place that names each thing.

Every test compares numbers with a closed form, an autograd Jacobian or a sum written out. More cases of the same things:
`transforms/test_pyros_exam.py` (every layer in Pyro's distributions and under its ELBOs), `flows/test_roles.py` (a flow as
prior, likelihood and guide), `guides/test_auto_flow.py` (AutoFlow under every ELBO, in lists and in NeuTra).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.distributions import ConditionalTransformedDistribution, TransformedDistribution
from pyro.infer import (
    HMC,
    MCMC,
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, AutoNormalizingFlow
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.stats import effective_sample_size
from registry import perturbed
from torch import Tensor
from torch.func import jacrev, vmap

import pyroflows as pf
from pyroflows.transforms import (
    AffineCoupling,
    Autoregressive,
    Compose,
    LowerTriangularAffine,
    Transform,
)
from pyroflows.univariate import RationalQuadraticSpline

Callback = Callable[..., Any]
jitted = pytest.mark.filterwarnings("ignore:.torch.jit.trace.:DeprecationWarning")


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def no_latents(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latent sites."""


def train(
    model: Callback,
    guide: Callback,
    *args: Any,
    elbo: Any = None,
    steps: int = 300,
    lr: float = 0.05,
) -> list[float]:
    """Losses of a training whose step size decays a hundredfold."""
    optimiser = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optimiser, elbo or Trace_ELBO(32, vectorize_particles=True))
    return [svi.step(*args) for _ in range(steps)]


# A Gaussian with everything known: z ~ N(0, I), x ~ N(A z, I).

DESIGN = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, 0.4]], dtype=torch.float64)
X = torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64)


def linear(x: Tensor | None = X) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    loc = (DESIGN @ z.unsqueeze(-1)).squeeze(-1)
    pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def posterior() -> dist.MultivariateNormal:
    precision = torch.eye(2) + DESIGN.mT @ DESIGN
    covariance = precision.inverse()
    return dist.MultivariateNormal(covariance @ DESIGN.mT @ X, covariance)


def evidence() -> float:
    covariance = torch.eye(3) + DESIGN @ DESIGN.mT
    return float(dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(X))


def check_is_posterior(draws: Tensor, errors: float = 5.0) -> None:
    """Compares the moments of draws, one a row, with the posterior's, up to some standard errors."""
    exact = posterior()
    count = effective_sample_size(draws.unsqueeze(0)).clamp(10, len(draws)).min()
    sd = exact.covariance_matrix.diagonal().sqrt()
    assert bool(((draws.mean(0) - exact.mean).abs() < errors * sd / count.sqrt()).all())
    correlation = draws.T.cov() / torch.outer(sd, sd)
    expected = exact.covariance_matrix / torch.outer(sd, sd)
    # The standard error of a covariance of unit normals is at most the root of 2 / n.
    assert bool(((correlation - expected).abs() < errors * (2 / count).sqrt()).all())


def check_elbo(model: Callback, guide: Callback, log_evidence: float, gap: float = 0.01) -> None:
    """The ELBO of a guide that has nearly found the posterior is the evidence, by 2000 draws."""
    with torch.no_grad():
        elbo = -Trace_ELBO(2000, vectorize_particles=True).loss(model, guide)
    assert abs(elbo - log_evidence) < gap


def log_det(f: Callback, x: Tensor) -> Tensor:
    """Log-determinants of the Jacobians of a map of vectors, at the rows of a matrix."""
    return torch.linalg.slogdet(vmap(jacrev(f))(x))[1]


def density(base: dist.TorchDistribution, inverse: Callback, y: Tensor) -> Tensor:
    """The log-density at the rows of a matrix by the formula of a change of variables."""
    return base.log_prob(inverse(y)) + log_det(inverse, y)


def inverse_of(layers: list[Transform], context: Tensor | None = None) -> Callback:
    """The map of vectors that undoes layers in their turn."""

    def inverse(y: Tensor) -> Tensor:
        for layer in reversed(layers):
            known = layer if layer.context_features is None else layer.condition(context)
            y = known.inv(y)
        return y

    return inverse


# Distributions


def test_transformed_distribution(device: torch.device) -> None:
    layers = [
        perturbed(AffineCoupling(3)).to(device),
        perturbed(LowerTriangularAffine(3)).to(device),
        perturbed(Autoregressive(RationalQuadraticSpline(), 3)).to(device).inv,
    ]
    base = dist.Normal(torch.zeros(3, device=device), 1.5).to_event(1)
    d = TransformedDistribution(base, layers)
    y = d.sample((20,))
    expected = density(base, inverse_of(layers), y)
    torch.testing.assert_close(d.log_prob(y.clone()), expected)
    torch.testing.assert_close(d.log_prob(y), expected)  # of what it remembers
    assert (d.batch_shape, d.event_shape) == ((), (3,))


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)], ids=str)
def test_conditional_transformed_distribution(batch: tuple[int, ...], device: torch.device) -> None:
    layers = [
        perturbed(AffineCoupling(3, context_features=2)).to(device),
        perturbed(Autoregressive(RationalQuadraticSpline(), 3, context_features=2)).to(device).inv,
        perturbed(LowerTriangularAffine(3)).to(device),
    ]
    base = dist.Normal(torch.zeros(3, device=device), 1.0).to_event(1)
    contexts = torch.randn(*batch, 2, device=device)
    d = ConditionalTransformedDistribution(base, layers).condition(contexts)
    y = d.sample((5,))
    assert d.batch_shape == batch and y.shape == (5, *batch, 3)
    assert bool(d.support.check(y).all())
    points = y.reshape(5, -1, 3)
    rows = []
    for column, context in enumerate(contexts.reshape(-1, 2)):
        inverse = inverse_of(layers, context)
        rows.append(density(base, inverse, points[:, column]))
    expected = torch.stack(rows, -1).reshape(5, *batch)
    torch.testing.assert_close(d.log_prob(y), expected)


def test_mixture_same_family(device: torch.device) -> None:
    flow = perturbed(pf.Flow([LowerTriangularAffine(2, context_features=3)])).to(device)
    weights = torch.tensor([0.2, 0.5, 0.3], device=device)
    contexts = torch.randn(3, 3, device=device)
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), flow(contexts))
    x = torch.randn(7, 2, device=device)
    parts = torch.stack([flow(context).log_prob(x) for context in contexts], -1)
    torch.testing.assert_close(mixture.log_prob(x), (parts + weights.log()).logsumexp(-1))
    # An affine map of the standard normal: its mean is where zero goes.
    means = flow.transform.condition(contexts)(torch.zeros_like(x[:3]))
    draws = mixture.sample((4000,))
    error = draws.std(0) / math.sqrt(4000)
    assert bool(((draws.mean(0) - weights @ means).abs() < 5 * error).all())

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample(
                "x", dist.MixtureSameFamily(dist.Categorical(weights), flow(contexts)), obs=x
            )

    # As a likelihood: a latent site of this kind has a support that Pyro's biject_to does not know.
    trace = poutine.trace(model).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), mixture.log_prob(x).sum())


# Guides


@pytest.mark.parametrize(
    "transform",
    [
        LowerTriangularAffine,
        lambda features: Compose([AffineCoupling(features), LowerTriangularAffine(features)]),
    ],
    ids=["affine", "composed"],
)
def test_auto_normalizing_flow(transform: Callback) -> None:
    guide = AutoNormalizingFlow(linear, transform)
    train(linear, guide)
    check_elbo(linear, guide, evidence())
    with torch.no_grad():
        z = guide.get_posterior().sample((4000,))
    check_is_posterior(z)
    base, some = dist.Normal(torch.zeros(2), 1.0).to_event(1), z[:20]
    expected = density(base, inverse_of([guide.get_transform()]), some)
    torch.testing.assert_close(guide.get_posterior().log_prob(some), expected)


def test_auto_guide_list() -> None:
    def model() -> None:
        linear()
        pyro.sample("scale", dist.LogNormal(0.5, 0.2))

    guide = AutoGuideList(model)
    guide.append(pf.AutoFlow(poutine.block(model, expose=["z"])))
    guide.append(AutoNormal(poutine.block(model, expose=["scale"])))
    train(model, guide)
    check_elbo(model, guide, evidence())
    draws = Predictive(guide, num_samples=1000)()
    check_is_posterior(draws["z"])
    logs = draws["scale"].log().flatten()
    assert abs(float(logs.mean()) - 0.5) < 0.05 and abs(float(logs.std()) / 0.2 - 1) < 0.15


def test_neutra_reparam() -> None:
    guide = pf.AutoFlow(linear)
    train(linear, guide, steps=100)
    neutra = NeuTraReparam(guide.requires_grad_(False))
    kernel = HMC(neutra.reparam(linear), step_size=0.5, num_steps=3, adapt_step_size=False)
    chain = MCMC(kernel, num_samples=400, warmup_steps=20, disable_progbar=True)
    chain.run()
    latent = chain.get_samples()["z_shared_latent"]
    draws = neutra.transform_sample(latent)["z"]
    check_is_posterior(draws)
    # In the base space the posterior is close to the standard normal.
    assert bool((latent.std(0).log().abs() < 0.4).all())


def test_predictive() -> None:
    guide = pf.AutoFlow(linear)
    train(linear, guide)
    draws = Predictive(linear, guide=guide, num_samples=1500)(None)
    check_is_posterior(draws["z"])
    exact = posterior()
    mean = DESIGN @ exact.mean
    covariance = torch.eye(3) + DESIGN @ exact.covariance_matrix @ DESIGN.mT
    error = (covariance.diagonal() / 1500).sqrt()
    assert bool(((draws["x"].mean(0) - mean).abs() < 5 * error).all())
    torch.testing.assert_close(draws["x"].T.cov(), covariance, rtol=0, atol=0.25)


# Inference


def test_enumeration() -> None:
    flow = perturbed(pf.RealNVP(2, context_features=3))
    weights, table = torch.tensor([0.2, 0.5, 0.3]), torch.randn(3, 3)
    x = torch.randn(6, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            kind = pyro.sample("kind", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", flow(table[kind]), obs=x)

    joint = torch.stack([flow(context).log_prob(x) for context in table], -1) + weights.log()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.differentiable_loss(model, no_latents, x)
    torch.testing.assert_close(loss, -joint.logsumexp(-1).sum())
    parameters = list(flow.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(-joint.logsumexp(-1).sum(), parameters)
    torch.testing.assert_close(gradients, expected)
    marginal = elbo.compute_marginals(model, no_latents, x)["kind"]
    torch.testing.assert_close(marginal.probs, joint.softmax(-1))


@jitted
def test_jit_trace_elbo_of_a_likelihood() -> None:
    x = 1.0 + 0.5 * torch.randn(50, 2)
    losses = []
    for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        flow = perturbed(pf.RealNVP(2))

        def model(x: Tensor, flow: pf.Flow = flow) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("x", flow(), obs=x)

        losses.append(train(model, no_latents, x, elbo=elbo, steps=5))
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and losses[0][-1] < losses[0][0]


@jitted
def test_jit_trace_elbo_of_a_guide() -> None:
    guide = pf.AutoFlow(linear)
    elbo = JitTrace_ELBO(32, vectorize_particles=True, ignore_jit_warnings=True)
    train(linear, guide, elbo=elbo)
    check_elbo(linear, guide, evidence())


def test_param_store(tmp_path: Path) -> None:
    file = str(tmp_path / "store.pt")
    x = 1.0 + 0.5 * torch.randn(50, 2)

    def likelihood(flow: pf.Flow) -> Callback:
        def model() -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("x", flow(), obs=x)

        return model

    first = likelihood(pf.RealNVP(2))
    losses = train(first, no_latents, steps=30, elbo=Trace_ELBO())
    trained = Trace_ELBO().loss(first, no_latents)
    pyro.get_param_store().save(file)
    names = set(pyro.get_param_store())
    # A second instance has its own parameters, though it goes by the same name, and trains them.
    second = likelihood(perturbed(pf.RealNVP(2), seed=5))
    fresh = train(second, no_latents, steps=30, elbo=Trace_ELBO())
    assert abs(fresh[0] - trained) > 1.0 and fresh[-1] < fresh[0]
    pyro.clear_param_store()
    pyro.get_param_store().load(file)
    third = likelihood(perturbed(pf.RealNVP(2), seed=6))
    assert Trace_ELBO().loss(third, no_latents) == pytest.approx(trained, rel=1e-12)
    assert set(pyro.get_param_store()) == names and trained < losses[0]


# Forecasts


class Trend(ForecastingModel):
    """Data on a line through zero, of unknown slope, with normal noise of scale 0.5."""

    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        prediction = covariates * slope
        self.predict(dist.Normal(torch.zeros(2), 0.5), prediction)


def test_forecast_with_a_flow_as_guide() -> None:
    times = torch.arange(1.0, 15.0).unsqueeze(-1) / 10
    data = times[:10] * torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(10, 2)
    model = Trend()
    forecaster = Forecaster(
        model,
        data,
        times[:10],
        guide=pf.AutoFlow(model),
        num_steps=600,
        learning_rate=0.03,
        log_every=0,
    )
    draws = forecaster(data, times, num_samples=4000)
    assert draws.shape == (4000, 4, 2)
    variance = 1 / (1 + times[:10].square().sum() / 0.25)
    slope = variance * (times[:10] * data).sum(0) / 0.25
    sd = (times[10:].square() * variance + 0.25).sqrt()
    assert bool(((draws.mean(0) - times[10:] * slope).abs() < 0.1 * sd).all())
    assert bool(((draws.std(0) / sd).log().abs() < 0.1).all())


class Shocks(ForecastingModel):
    """Data that are draws from a flow, observed with a little normal noise."""

    def __init__(self, flow: pf.Flow) -> None:
        super().__init__()
        self.flow = flow

    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        with self.time_plate:
            shocks = pyro.sample("shocks", self.flow())
        self.predict(dist.Normal(torch.zeros(2), 0.1), shocks)


def test_forecast_with_a_flow_over_time() -> None:
    flow = perturbed(pf.Flow([LowerTriangularAffine(2)])).requires_grad_(False)
    model, times = Shocks(flow), torch.zeros(14, 0)
    data = flow().sample((10,))
    forecaster = Forecaster(model, data, times[:10], num_steps=20, log_every=0)
    draws = forecaster(data, times, num_samples=1000)
    assert draws.shape == (1000, 4, 2)
    layer = flow.transform
    loc = layer(torch.zeros(2))
    scale = torch.stack([layer(unit) - loc for unit in torch.eye(2)], -1)
    rows = draws.reshape(-1, 2)
    sd = (scale @ scale.mT + 0.01 * torch.eye(2)).diagonal().sqrt()
    assert bool(((rows.mean(0) - loc).abs() < 5 * sd / math.sqrt(4000)).all())
    torch.testing.assert_close(
        rows.T.cov() / torch.outer(sd, sd),
        (scale @ scale.mT + 0.01 * torch.eye(2)) / torch.outer(sd, sd),
        rtol=0,
        atol=5 * math.sqrt(2 / 4000),
    )
