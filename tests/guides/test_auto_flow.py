"""AutoFlow as a guide: on every model that autoguides of Pyro take, with every tool that takes an autoguide."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import pickle
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
from marks import slow_but_for
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoNormal,
    init_to_mean,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule
from pyro.ops.stats import effective_sample_size
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.examples import load_example
from pyroflows.nn import mlp

Callback = Callable[..., Any]
SMALL = functools.partial(pf.RealNVP, transforms=2, network=pf.nn.mlp((8,)))


def fit(
    model: Callback,
    guide: Callback,
    *args: Any,
    steps: int = 200,
    lr: float = 0.03,
    elbo: Any = None,
) -> list[float]:
    optim = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.02 ** (1 / steps)})
    svi = SVI(model, guide, optim, elbo or Trace_ELBO(num_particles=64, vectorize_particles=True))
    return [svi.step(*args) for _ in range(steps)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in {**one, **other})


def moved(guide: pf.AutoFlow, scale: float = 0.3) -> pf.AutoFlow:
    """A guide at parameters that are far from where it started."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return guide


# A posterior that is known: independent standard normals a and b with x = a + b + noise observed.
NOISE, OBSERVED = 0.5, torch.tensor(1.5)


def line_model(x: Tensor = OBSERVED) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(a + b, NOISE), obs=x)


def line_posterior() -> dist.MultivariateNormal:
    precision = torch.eye(2) + torch.ones(2, 2) / NOISE**2
    information = torch.full((2,), float(OBSERVED) / NOISE**2)
    return dist.MultivariateNormal(
        torch.linalg.solve(precision, information), precision_matrix=precision
    )


LINE_EVIDENCE = float(dist.Normal(0.0, math.sqrt(2 + NOISE**2)).log_prob(OBSERVED))


# ---------------------------------------------------------------------------------------------------- exactness


def test_is_an_autoguide_of_pyro() -> None:
    assert issubclass(pf.AutoFlow, AutoContinuous)
    guide = pf.AutoFlow(line_model)
    values = guide(OBSERVED)
    assert sorted(values) == ["a", "b"]
    assert guide.latent_dim == 2
    assert guide.sample_latent().shape == (2,)
    posterior = guide.get_posterior()
    assert isinstance(posterior, pf.distributions.FlowDistribution)
    again = dist.TransformedDistribution(guide.get_base_dist(), guide.get_transform())
    z = torch.randn(5, 2)
    torch.testing.assert_close(again.log_prob(z), posterior.log_prob(z))


ELBOS: dict[str, Callable[[], Any]] = {
    "Trace": lambda: Trace_ELBO(num_particles=64, vectorize_particles=True),
    "TraceGraph": lambda: TraceGraph_ELBO(num_particles=64, vectorize_particles=True),
    "TraceEnum": lambda: TraceEnum_ELBO(
        num_particles=64, vectorize_particles=True, strict_enumeration_warning=False
    ),
    "TraceMeanField": lambda: TraceMeanField_ELBO(num_particles=64, vectorize_particles=True),
    "JitTrace": lambda: JitTrace_ELBO(
        num_particles=64, vectorize_particles=True, ignore_jit_warnings=True
    ),
    "JitTraceGraph": lambda: JitTraceGraph_ELBO(
        num_particles=64, vectorize_particles=True, ignore_jit_warnings=True
    ),
    "JitTraceEnum": lambda: JitTraceEnum_ELBO(
        num_particles=64,
        vectorize_particles=True,
        ignore_jit_warnings=True,
        strict_enumeration_warning=False,
    ),
    "Renyi": lambda: RenyiELBO(num_particles=64, vectorize_particles=True, alpha=0.5),
}


@pytest.mark.parametrize("name", slow_but_for(["JitTrace"], ELBOS))
def test_reaches_the_exact_posterior_with_every_elbo(name: str) -> None:
    guide, exact = pf.AutoFlow(line_model, flow=SMALL), line_posterior()
    # Renyi's bound leaves larger gradients at its end.
    fit(
        line_model,
        guide,
        OBSERVED,
        elbo=ELBOS[name](),
        steps=300 if name == "Renyi" else 150,
        lr=0.05,
    )
    with torch.no_grad():
        draws = guide.get_posterior().sample((20000,))
    whitened = (draws - exact.mean) @ torch.linalg.inv(exact.scale_tril).T
    assert whitened.mean(0).abs().max() < 0.1
    assert (whitened.T.cov() - torch.eye(2)).abs().max() < 0.15
    # The loss of the exact posterior is minus the log evidence, whatever is drawn.
    loss = Trace_ELBO(num_particles=1000, vectorize_particles=True).loss(
        line_model, guide, OBSERVED
    )
    assert loss == pytest.approx(-LINE_EVIDENCE, abs=0.03)


@pytest.mark.parametrize("name", [name for name in ELBOS if name.startswith("Jit")])
def test_jit_gives_the_loss_of_the_plain_elbo(name: str) -> None:
    guide = pf.AutoFlow(line_model, flow=SMALL)
    guide(OBSERVED)
    moved(guide)
    compiled, plain = ELBOS[name](), ELBOS[name.removeprefix("Jit")]()
    losses = []
    for elbo in (compiled, plain):
        elbo.loss_and_grads(line_model, guide, OBSERVED)  # compiles, and counts the plates
        pyro.set_rng_seed(3)
        losses.append(elbo.loss_and_grads(line_model, guide, OBSERVED))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_jit_mean_field_elbo_runs() -> None:
    # Pyro 1.9 compiles this one anew at each step.
    elbo = JitTraceMeanField_ELBO(
        num_particles=64, vectorize_particles=True, ignore_jit_warnings=True
    )
    guide = pf.AutoFlow(line_model, flow=SMALL)
    guide(OBSERVED)
    guide.whiten(line_posterior().mean, line_posterior().scale_tril)
    assert fit(line_model, guide, OBSERVED, steps=3, lr=1e-3, elbo=elbo) == pytest.approx(
        [-LINE_EVIDENCE] * 3, abs=1e-2
    )


def test_jit_trains_a_second_instance() -> None:
    for _ in range(2):
        guide = pf.AutoFlow(line_model, flow=SMALL)
        losses = fit(line_model, guide, OBSERVED, steps=60, elbo=ELBOS["JitTrace"]())
        assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("vectorized", slow_but_for([True], [False, True]))
def test_particles(vectorized: bool) -> None:
    def model() -> None:
        with pyro.plate("rows", 2, dim=-2):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(0.0, scale))
        pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))

    guide = pf.AutoFlow(model, flow=SMALL)
    guide()
    losses = []
    for _ in range(60 if vectorized else 12):
        pyro.set_rng_seed(len(losses) + 100 * vectorized)
        elbo = Trace_ELBO(num_particles=20, vectorize_particles=vectorized)
        losses.append(elbo.loss(model, guide))
    # Both ways estimate one number, which 20000 draws give.
    with torch.no_grad():
        trace = poutine.trace(pyro.plate("particles", 20000, dim=-3)(guide)).get_trace()
        replayed = poutine.trace(
            poutine.replay(pyro.plate("particles", 20000, dim=-3)(model), trace)
        ).get_trace()
    single = (
        torch.stack(
            [-float(s) * torch.ones(()) for s in [replayed.log_prob_sum() - trace.log_prob_sum()]]
        )
        / 20000
    )
    spread = torch.tensor(losses).std() / math.sqrt(len(losses))
    assert abs(float(torch.tensor(losses).mean() - single)) < 5 * float(spread)


# ---------------------------------------------------------------------------------------------- every support


def plates() -> None:
    scale = pyro.sample("scale", dist.Gamma(4.0, 4.0))
    with pyro.plate("rows", 2, dim=-2):
        row = pyro.sample("row", dist.Normal(0.0, scale))
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("cell", dist.Normal(row, 1.0))


def simplexes() -> None:
    with pyro.plate("plate", 2):
        pyro.sample("simplex", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))


def intervals() -> None:
    pyro.sample("unit", dist.Beta(2.0, 3.0).expand([2]).to_event(1))
    pyro.sample("interval", dist.Uniform(-2.0, 3.0))


def positives() -> None:
    pyro.sample("gamma", dist.Gamma(3.0, 2.0))
    pyro.sample("pareto", dist.Pareto(1.5, 4.0))


def ordered() -> None:
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    pyro.sample("ordered", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))


def corr_cholesky() -> None:
    pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(2.0)))


def correlated() -> None:
    pyro.sample(
        "vector", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    )
    pyro.sample("matrix", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))


def single() -> None:
    pyro.sample("x", dist.Gumbel(0.0, 1.0))


def flow_prior() -> None:
    pyro.sample("z", PRIOR())


def masked() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=torch.tensor(False)):
        pyro.sample("free", dist.Beta(1.0, 1.0))


PRIOR = pf.RealNVP(2, transforms=2, network=pf.nn.mlp((8,)), support=constraints.interval(0.0, 2.0))
PRIOR.requires_grad_(False).double()

PROPER = [
    plates,
    simplexes,
    intervals,
    positives,
    ordered,
    corr_cholesky,
    correlated,
    single,
    flow_prior,
]


def heavy(features: int) -> pf.Flow:
    """A flow with heavier tails than the targets, so that importance weights are bounded."""
    layers = (
        [pf.transforms.LowerTriangularAffine(features)]
        if features == 1
        else [pf.transforms.AffineCoupling(features, network=mlp((8,)))]
    )
    return pf.Flow(layers, base=dist.StudentT(4.0).expand([features]).to_event(1))


@pytest.mark.parametrize("model", slow_but_for([plates, corr_cholesky, flow_prior], PROPER))
def test_a_prior_has_evidence_one(model: Callback) -> None:
    """Importance weights of the guide have mean one under a normalised target, if its density is right."""
    torch.set_default_dtype(
        torch.float64
    )  # far out in the tails, float32 takes neighbours for equals
    guide = pf.AutoFlow(model, flow=heavy, init_scale=1.0)
    fit(model, guide, steps=100)
    n = 4000
    with torch.no_grad():
        wide = pyro.plate("draws", n, dim=-3)
        guide_trace = poutine.trace(wide(guide)).get_trace()
        model_trace = poutine.trace(poutine.replay(wide(model), guide_trace)).get_trace()
        log_weight = torch.zeros(n)
        for trace, sign in ((model_trace, 1.0), (guide_trace, -1.0)):
            trace.compute_log_prob()
            for site in (
                site for _, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)
            ):
                log_weight += sign * torch.as_tensor(site["log_prob"]).expand(
                    n, *site["fn"].batch_shape[1:]
                ).reshape(n, -1).sum(-1)
    for name, site in model_trace.iter_stochastic_nodes():
        if not site_is_subsample(site):
            assert bool(site["fn"].support.check(site["value"]).all()), name
    weight = log_weight.exp()
    assert abs(float(weight.mean()) - 1) < 5 * float(weight.std()) / math.sqrt(n)
    assert float(weight.mean() ** 2 / weight.square().mean()) > 0.05


IMPROPER: dict[str, tuple[constraints.Constraint, tuple[int, ...]]] = {
    "real": (constraints.real, ()),
    "vector": (constraints.independent(constraints.real, 1), (3,)),
    "positive": (constraints.positive, ()),
    "ordered_vector": (constraints.ordered_vector, (3,)),
    "positive_ordered_vector": (constraints.positive_ordered_vector, (3,)),
    "simplex": (constraints.simplex, (3,)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "softplus_positive": (constraints.softplus_positive, ()),
}


@pytest.mark.parametrize("name", IMPROPER)
def test_improper_priors_on_every_support(name: str) -> None:
    support, shape = IMPROPER[name]

    def model() -> None:
        with pyro.plate("plate", 2):
            value = pyro.sample("x", dist.ImproperUniform(support, (), shape))
        pyro.factor("likelihood", -value.square().sum())

    guide = pf.AutoFlow(model, flow=SMALL)
    losses = fit(model, guide, steps=5, elbo=Trace_ELBO())
    assert all(map(math.isfinite, losses))
    draws = Predictive(guide, num_samples=20)()["x"]
    assert draws.shape[-1 - len(shape) :] == (2, *shape)
    assert bool(support.check(draws).all())
    assert bool(support.check(guide.median()["x"]).all())


@pytest.mark.slow
def test_an_improper_prior_gives_the_normalised_likelihood() -> None:
    def model() -> None:
        x = pyro.sample(
            "x", dist.ImproperUniform(constraints.independent(constraints.real, 1), (), (2,))
        )
        pyro.sample("y", dist.Normal(x, 2.0).to_event(1), obs=torch.tensor([30.0, -5.0]))

    guide = pf.AutoFlow(
        model, flow=SMALL, init_loc_fn=init_to_value(values={"x": torch.tensor([28.0, -3.0])})
    )
    fit(model, guide, lr=0.1)
    loss = Trace_ELBO(num_particles=1000, vectorize_particles=True).loss(model, guide)
    assert loss == pytest.approx(0.0, abs=0.03)  # the integral of the likelihood over x is one
    torch.testing.assert_close(guide.median()["x"], torch.tensor([30.0, -5.0]), atol=0.2, rtol=0)


def test_masked_latents() -> None:
    guide = pf.AutoFlow(masked)
    fit(masked, guide)
    # A masked site on which nothing depends is no unknown; it is given a value, for the model's sake.
    assert guide.features == 1
    assert guide()["free"].shape == ()
    assert float(guide.quantiles([0.5])["x"][0].abs()) < 0.15


# --------------------------------------------------------------------------------------------- discrete sites

DATA = torch.tensor([-1.2, -0.8, -1.0, 2.1, 1.9])


@config_enumerate
def enumerated(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(loc + 3 * k, 0.5), obs=x)


def marginal(x: Tensor) -> None:
    """The same model with the discrete site summed out by hand."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    weights = dist.Categorical(torch.tensor([0.6, 0.4]))
    with pyro.plate("data", len(x)):
        pyro.sample(
            "x",
            dist.MixtureSameFamily(weights, dist.Normal(torch.stack([loc, loc + 3], -1), 0.5)),
            obs=x,
        )


def test_discrete_sites_are_summed_out() -> None:
    guide = pf.AutoFlow(poutine.block(enumerated, hide=["k"]))
    guide(DATA)
    losses = []
    for elbo, model in (
        (TraceEnum_ELBO(max_plate_nesting=1), enumerated),
        (Trace_ELBO(), marginal),
    ):
        pyro.set_rng_seed(5)
        losses.append(elbo.loss(model, guide, DATA))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    steps = fit(
        enumerated,
        guide,
        DATA,
        steps=100,
        lr=0.1,
        elbo=TraceEnum_ELBO(8, max_plate_nesting=1, vectorize_particles=True),
    )
    assert steps[-1] < steps[0]
    line = torch.linspace(-6, 6, 4001)
    density = torch.stack([dist.Normal(line, 0.5).log_prob(v) for v in DATA.unsqueeze(-1)])
    shifted = torch.stack([dist.Normal(line + 3, 0.5).log_prob(v) for v in DATA.unsqueeze(-1)])
    joint = torch.logaddexp(math.log(0.6) + density, math.log(0.4) + shifted).sum(0) + dist.Normal(
        0.0, 2.0
    ).log_prob(line)
    weight = torch.softmax(joint, 0)
    mean = (weight * line).sum()
    sd = (weight * (line - mean) ** 2).sum().sqrt()
    assert float(guide.median()["loc"]) == pytest.approx(float(mean), abs=0.25 * float(sd))


def test_discrete_sites_beside_the_guide_in_a_list() -> None:
    guide = AutoGuideList(enumerated)
    guide.append(pf.AutoFlow(poutine.block(enumerated, hide=["k"])))
    guide.append(AutoDiscreteParallel(poutine.block(enumerated, expose=["k"])))
    losses = fit(enumerated, guide, DATA, steps=20, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    assert all(map(math.isfinite, losses))


# ----------------------------------------------------------------------------------------- median and quantiles


def test_median_and_quantiles() -> None:
    """What Pyro asks of every continuous autoguide after a fit."""

    def model() -> None:
        pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    guide = pf.AutoFlow(model, flow=SMALL)
    fit(model, guide, lr=0.02)
    levels = [0.1, 0.5, 0.9]
    quantiles, median = guide.quantiles(levels), guide.median()
    exact = {"x": dist.Normal(0.0, 1.0).icdf, "y": dist.LogNormal(0.0, 1.0).icdf}
    for name, icdf in exact.items():
        torch.testing.assert_close(
            quantiles[name], icdf(torch.tensor(levels)), atol=0.12, rtol=0.12
        )
    torch.testing.assert_close(quantiles["z"][1], torch.full((2,), 0.5), atol=0.05, rtol=0)
    torch.testing.assert_close(quantiles["z"][0], 1 - quantiles["z"][2], atol=0.05, rtol=0)
    for name, value in quantiles.items():
        assert value.shape == (3, *((2,) if name == "z" else ()))
        assert not value.requires_grad and not median[name].requires_grad
        torch.testing.assert_close(value[1], median[name])
        assert bool((value[1:] > value[:-1]).all())
    low, high = guide.quantiles([0.15865525, 0.84134475])["x"]
    draws = guide.get_posterior().sample((20000,))[:, -1]
    assert float(high - low) / 2 == pytest.approx(float(draws.std()), rel=0.05)


def test_medians_leave_random_numbers_alone() -> None:
    guide = pf.AutoFlow(line_model)
    guide(OBSERVED)
    before = torch.get_rng_state()
    first, second = guide.median(), guide.median()
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, second)


@pytest.mark.parametrize("levels", [[-0.1], [0.5, 1.5]], ids=str)
def test_levels_outside_of_the_unit_interval(levels: list[float]) -> None:
    guide = pf.AutoFlow(line_model)
    guide(OBSERVED)
    with pytest.raises(ValueError, match="Expected quantiles between 0 and 1"):
        guide.quantiles(levels)
    assert guide.quantiles(torch.tensor([0.0, 1.0]))["a"].shape == (2,)


@pytest.mark.parametrize(
    "call", ["median", "quantiles", "get_posterior", "get_transform", "get_base_dist", "whiten"]
)
def test_a_guide_that_has_not_met_its_model_says_so(call: str) -> None:
    arguments = {"quantiles": ([0.5],), "whiten": (torch.zeros(2), torch.eye(2))}.get(call, ())
    with pytest.raises(RuntimeError, match="Expected a guide that has met its model; call guide"):
        getattr(pf.AutoFlow(line_model), call)(*arguments)


# ------------------------------------------------------------------------------------------------- Predictive


@pytest.mark.parametrize("parallel", slow_but_for([True], [False, True]))
def test_predictive(parallel: bool) -> None:
    def model(x: Tensor | None = None) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.tensor([2.0, 3.0, 2.5, 2.5])
    guide = pf.AutoFlow(model)
    fit(model, guide, x, lr=0.3)
    n = 2000 if parallel else 200
    draws = Predictive(model, guide=guide, num_samples=n, parallel=parallel)()
    assert draws["x"].shape == (n, 4)
    # loc | x is nearly N(2.5, 1/4), so a new x has variance 5/4.
    error = math.sqrt(1.25 / n)
    assert float(draws["x"][:, 0].mean()) == pytest.approx(2.5, abs=5 * error + 0.05)
    assert float(draws["x"][:, 0].std()) == pytest.approx(
        math.sqrt(1.25), rel=5 / math.sqrt(2 * n) + 0.05
    )


# ------------------------------------------------------------------------------------------------------ NeuTra


def funnel(dim: int = 3) -> None:
    y = pyro.sample("y", dist.Normal(0.0, 1.5))
    with pyro.plate("D", dim):
        pyro.sample("x", dist.Normal(0.0, torch.exp(y / 2)))


@pytest.mark.parametrize("jit", slow_but_for([True], [False, True]))
def test_neutra_with_nuts(jit: bool) -> None:
    guide = pf.AutoFlow(
        funnel, flow=functools.partial(SMALL, network=pf.nn.mlp((16,)), transforms=4)
    )
    fit(funnel, guide, steps=100)
    neutra = NeuTraReparam(guide.requires_grad_(False))
    kernel = NUTS(
        neutra.reparam(funnel), jit_compile=jit, ignore_jit_warnings=True, max_tree_depth=5
    )
    mcmc = MCMC(kernel, num_samples=100, warmup_steps=40, disable_progbar=True)
    mcmc.run()
    latent = mcmc.get_samples()["y_shared_latent"]
    draws = neutra.transform_sample(latent.unsqueeze(-2))
    y = draws["y"].flatten()
    n = float(effective_sample_size(y.reshape(1, -1, 1)).clamp(10, len(y)))
    assert abs(float(y.mean())) < 5 * 1.5 / math.sqrt(n)
    assert abs(math.log(float(y.std()) / 1.5)) < 5 / math.sqrt(2 * n)
    assert draws["x"].shape[0] == len(y)


def test_neutra_keeps_the_log_joint() -> None:
    guide = pf.AutoFlow(funnel, flow=SMALL)
    guide()
    moved(guide)
    neutra = NeuTraReparam(guide)
    reparametrised = neutra.reparam(funnel)
    trace = poutine.trace(reparametrised).get_trace()
    x = trace.nodes["y_shared_latent"]["value"].detach().reshape(-1)
    z = guide.get_transform()(x)
    log_det = guide.get_transform().log_abs_det_jacobian(x, z)
    values = {
        name: value.reshape(()) if name == "y" else value
        for name, value in neutra.transform_sample(x).items()
    }
    plain = poutine.trace(poutine.condition(funnel, values)).get_trace().log_prob_sum()
    torch.testing.assert_close(trace.log_prob_sum(), plain + log_det)


# ------------------------------------------------------------------------------------- lists and other guides


def two_sites() -> None:
    pyro.sample("x", dist.Normal(1.0, 0.3))
    with pyro.plate("plate", 2):
        pyro.sample("y", dist.LogNormal(0.0, 0.3))


def in_a_list(model: Callback) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    guide.append(pf.AutoFlow(poutine.block(model, expose=["y"]), flow=SMALL))
    return guide


def two_in_a_list(model: Callback) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(pf.AutoFlow(poutine.block(model, expose=["x"])))
    guide.append(pf.AutoFlow(poutine.block(model, expose=["y"]), flow=SMALL))
    return guide


def nested_flows(model: Callback) -> AutoGuideList:
    guide = AutoGuideList(model)
    inner = AutoGuideList(poutine.block(model, expose=["y"]))
    inner.z = pf.AutoFlow(poutine.block(model, expose=["y"]), flow=SMALL)
    guide.append(inner)
    guide.append(pf.AutoFlow(poutine.block(model, expose=["x"])))
    return guide


def nested_lists(model: Callback) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["x"])))
    inner = AutoGuideList(poutine.block(model, expose=["y"]))
    inner.z = pf.AutoFlow(poutine.block(model, expose=["y"]), flow=SMALL)
    guide.append(inner)
    return guide


class InAModule(PyroModule):
    def __init__(self, model: Callback) -> None:
        super().__init__()
        self.flow = pf.AutoFlow(poutine.block(model, expose=["y"]), flow=SMALL)
        self.loc = nn.Parameter(torch.tensor(0.0))

    def forward(self) -> dict[str, Tensor]:
        pyro.sample("x", dist.Normal(self.loc, 0.3))
        return self.flow()

    def median(self) -> dict[str, Tensor]:
        return {"x": self.loc.detach(), **self.flow.median()}


class InAFunction:
    def __init__(self, model: Callback) -> None:
        self.flow = pf.AutoFlow(poutine.block(model, expose=["y"]), flow=SMALL)

    def __call__(self) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, 0.3))
        self.flow()

    def median(self) -> dict[str, Tensor]:
        return {"x": pyro.param("loc").detach(), **self.flow.median()}


@pytest.mark.parametrize(
    "make",
    slow_but_for(
        [nested_lists, InAFunction],
        [in_a_list, two_in_a_list, nested_lists, InAModule, InAFunction],
    ),
)
def test_nested_in_other_guides(make: Callback) -> None:
    guide = make(two_sites)
    fit(two_sites, guide, steps=100, lr=0.1)
    median = guide.median()
    assert float(median["x"]) == pytest.approx(1.0, abs=0.1)
    torch.testing.assert_close(median["y"], torch.ones(2), atol=0.1, rtol=0)
    store = pyro.get_param_store()
    assert len({id(value.unconstrained()) for value in store.values()}) == len(store)
    if isinstance(guide, nn.Module):
        trained = {id(parameter) for parameter in guide.parameters()}
        assert {id(value.unconstrained()) for value in store.values()} == trained


def test_names_in_a_list_are_those_of_its_places() -> None:
    guide = two_in_a_list(two_sites)
    trace = poutine.trace(guide).get_trace()
    assert {name.split(".flow.")[0] for name in trace.param_nodes} == {
        "AutoGuideList.0",
        "AutoGuideList.1",
    }
    assert {"_AutoGuideList.0_latent", "_AutoGuideList.1_latent"} < set(trace.stochastic_nodes)
    assert all(part.master() is guide for part in guide)


# --------------------------------------------------------------------------------------------------- the start


def start_model() -> None:
    pyro.sample("x", dist.Normal(3.0, 1.0))
    pyro.sample("y", dist.MultivariateNormal(torch.arange(5.0), torch.eye(5)))
    pyro.sample("s", dist.LogNormal(1.0, 1.0))


@pytest.mark.parametrize("flow", [None, pf.NICE, SMALL], ids=["default", "NICE", "small RealNVP"])
def test_init_loc_fn_is_used(flow: Any) -> None:
    values = {"x": torch.tensor(-2.0), "y": torch.randn(5), "s": torch.tensor(0.3)}
    guide = pf.AutoFlow(start_model, flow=flow, init_loc_fn=init_to_value(values=values))
    guide()
    torch.testing.assert_close(
        {name: guide.median()[name] for name in values}, values, atol=1e-4, rtol=1e-4
    )


def test_init_loc_fns_of_pyro() -> None:
    for init in (init_to_mean, init_to_sample, init_to_uniform, lambda site: site["fn"].sample()):
        pyro.set_rng_seed(1)
        guide = pf.AutoFlow(start_model, init_loc_fn=init)
        guide()
        assert sorted(guide.median()) == ["s", "x", "y"]
    guide = pf.AutoFlow(start_model, init_loc_fn=init_to_mean)
    guide()
    torch.testing.assert_close(guide.median()["y"], torch.arange(5.0))


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1, 5.0])
def test_init_scale_is_used(scale: float) -> None:
    guide = pf.AutoFlow(
        start_model, init_scale=scale, init_loc_fn=init_to_value(values={"x": torch.tensor(0.0)})
    )
    guide()
    draws = guide.get_posterior().sample((4000,))
    torch.testing.assert_close(draws.std(0) / scale, torch.ones(7), atol=0.1, rtol=0)
    loc, spread = guide._loc_scale()
    assert loc.shape == spread.shape == (7,)
    torch.testing.assert_close(spread / scale, torch.ones(7), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("scale", "error"),
    [(0.0, ValueError), (-1.0, ValueError), ("0.1", TypeError), (math.nan, ValueError)],
)
def test_init_scale_that_is_no_scale(scale: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="Expected init_scale to be"):
        pf.AutoFlow(start_model, init_scale=scale)


def test_whiten() -> None:
    guide = pf.AutoFlow(line_model, flow=SMALL)
    guide(OBSERVED)
    exact = line_posterior()
    guide.whiten(exact.mean, exact.scale_tril)
    # The flow before it is the identity, so this is the posterior, and every draw has the same ratio.
    losses = [Trace_ELBO().loss(line_model, guide, OBSERVED) for _ in range(3)]
    assert losses == pytest.approx([-LINE_EVIDENCE] * 3, abs=1e-4)
    with pytest.raises(ValueError, match="Expected scale_tril with a positive diagonal"):
        guide.whiten(exact.mean, torch.zeros(2, 2))


def test_a_fresh_guide_is_a_normal() -> None:
    guide = pf.AutoFlow(line_model, init_scale=0.3, init_loc_fn=init_to_mean)
    guide(OBSERVED)
    z = torch.randn(6, 2)
    torch.testing.assert_close(
        guide.get_posterior().log_prob(z),
        dist.Normal(0.0, 0.3).log_prob(z).sum(-1),
        atol=1e-4,
        rtol=1e-4,
    )


# ---------------------------------------------------------------------------------------- instances and storage


@pytest.mark.slow
def test_a_second_instance_trains() -> None:
    first = pf.AutoFlow(line_model, flow=SMALL)
    fit(line_model, first, OBSERVED, steps=5)
    kept = first.median()
    second = pf.AutoFlow(line_model, flow=SMALL)
    losses = fit(line_model, second, OBSERVED)
    assert losses[0] > losses[-1] + 1
    assert losses[-1] == pytest.approx(-LINE_EVIDENCE, abs=0.1)
    assert same(first.median(), kept)


def built(**options: Any) -> pf.AutoFlow:
    guide = pf.AutoFlow(line_model, flow=SMALL, **options)
    guide(OBSERVED)
    return guide


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "make",
    [lambda: pf.AutoFlow(two_sites, flow=SMALL), lambda: two_in_a_list(two_sites)],
    ids=["alone", "list"],
)
def test_state_dict(make: Callable[[], Any], when: str) -> None:
    guide = make()
    fit(two_sites, guide, steps=30)
    state, expected = guide.state_dict(), guide.median()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    pyro.clear_param_store()
    other = make()
    if when == "after":
        other()
    result = other.load_state_dict(torch.load(buffer))
    assert not result.missing_keys and not result.unexpected_keys
    assert sorted(other.state_dict()) == sorted(state)
    other()
    torch.testing.assert_close(other.median(), expected)
    fit(two_sites, other, steps=3)
    assert not same(other.median(), expected)


def test_a_state_that_waits_is_its_own() -> None:
    guide = built()
    other = pf.AutoFlow(line_model, flow=SMALL)
    other.load_state_dict(guide.state_dict())
    expected = guide.median()
    moved(guide)
    other(OBSERVED)
    assert same(other.median(), expected)


def test_a_state_of_another_flow_is_refused_each_time() -> None:
    guide = pf.AutoFlow(line_model, flow=pf.NICE)
    guide.load_state_dict(built().state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="state_dict"):
            guide(OBSERVED)


SETUPS: dict[str, Callable[[], Any]] = {
    "AutoFlow": lambda: pf.AutoFlow(two_sites),
    "AutoGuideList": lambda: two_in_a_list(two_sites),
    "nested": lambda: nested_flows(two_sites),
}
FRESH = """
import json, sys
import pyro, torch
sys.path[:0] = sys.argv[1], sys.argv[2]
from test_auto_flow import SETUPS, as_list
answers = {}
for key, path in json.loads(sys.argv[3]).items():
    kind, how = key.split(", ")
    for when in ("before", "after"):
        pyro.clear_param_store()
        pyro.set_rng_seed(99)
        guide = SETUPS[kind]()
        if when == "after":
            guide()
        if how == "store":
            pyro.get_param_store().load(path)
        else:
            guide.load_state_dict(torch.load(path))
        guide()
        answers[f"{key}, {when}"] = as_list(guide.median())
print(json.dumps(answers))
"""


def as_list(median: dict[str, Tensor]) -> list[float]:
    return torch.cat([median[name].flatten() for name in sorted(median)]).tolist()


@pytest.fixture(scope="module")
def saved_and_restored(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Medians of trained guides in this process, and in a fresh one that loaded the store or the state."""
    folder = tmp_path_factory.mktemp("guides")
    expected, paths = {}, {}
    for kind, make in SETUPS.items():
        pyro.clear_param_store()
        guide = make()
        fit(two_sites, guide, steps=10)
        for how in ("store", "state_dict"):
            path = paths[f"{kind}, {how}"] = str(folder / f"{kind}.{how}")
            if how == "store":
                pyro.get_param_store().save(path)
            else:
                torch.save(guide.state_dict(), path)
            expected[f"{kind}, {how}"] = as_list(guide.median())
    here = Path(__file__).parent
    command = [sys.executable, "-c", FRESH, str(here), str(here.parent), json.dumps(paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return expected, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["store", "state_dict"])
@pytest.mark.parametrize("kind", SETUPS)
def test_restored_in_a_fresh_process(
    saved_and_restored: tuple[dict[str, Any], dict[str, Any]], kind: str, how: str, when: str
) -> None:
    expected, restored = saved_and_restored
    assert restored[f"{kind}, {how}, {when}"] == pytest.approx(expected[f"{kind}, {how}"], rel=1e-4)


def twin(guide: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(guide)
    if how == "pickle":
        return pickle.loads(pickle.dumps(guide))
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (built, "deepcopy"),
        (lambda: two_in_a_list(two_sites), "pickle"),
        (built, "torch.save"),
    ],
)
def test_copies_after_svi(make: Callable[[], Any], how: str) -> None:
    guide = make()
    model, args = (line_model, (OBSERVED,)) if isinstance(guide, pf.AutoFlow) else (two_sites, ())
    fit(model, guide, *args, steps=20)
    expected = guide.median()
    other = twin(guide, how)
    torch.testing.assert_close(other.median(), expected)
    fit(model, other, *args, steps=5)
    assert not same(other.median(), expected)
    assert same(guide.median(), expected)
    if isinstance(guide, pf.AutoFlow):
        assert guide.model is not None
    fit(model, guide, *args, steps=5)
    assert not same(guide.median(), expected)


def test_copies_before_the_first_call() -> None:
    guide = pf.AutoFlow(line_model, flow=SMALL)
    other = copy.deepcopy(guide)
    assert other.model is guide.model
    fit(line_model, other, OBSERVED, steps=2)
    fit(line_model, guide, OBSERVED, steps=2)
    unpickled = pickle.loads(pickle.dumps(pf.AutoFlow(line_model, flow=SMALL)))
    with pytest.raises(
        RuntimeError,
        match="Expected a guide with a model; got one that was pickled before its first call",
    ):
        unpickled(OBSERVED)


def test_a_model_with_a_flow_in_it_does_not_hinder_pickling() -> None:
    prior = pf.RealNVP(2, name="prior", transforms=2, network=pf.nn.mlp((8,)))

    def model() -> None:
        pyro.sample("z", prior())

    guide = pf.AutoFlow(model, flow=SMALL)
    fit(model, guide, steps=2)
    torch.testing.assert_close(twin(guide, "pickle").median(), guide.median())


# ------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize(
    ("default", "dtype"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str
)
def test_follows_the_dtype_of_the_model(default: torch.dtype, dtype: torch.dtype) -> None:
    torch.set_default_dtype(default)
    one = torch.ones((), dtype=dtype)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0 * one, one))
        s = pyro.sample("s", dist.Gamma(2 * one, one))
        with pyro.plate("plate", 3):
            pyro.sample("y", dist.Normal(x, s), obs=torch.zeros(3, dtype=dtype))

    guide = pf.AutoFlow(model, flow=SMALL)
    losses = fit(model, guide, steps=5)
    assert all(map(math.isfinite, losses))
    assert {parameter.dtype for parameter in guide.parameters()} == {dtype}
    assert (
        guide()["s"].dtype
        == guide.median()["s"].dtype
        == guide.quantiles([0.2])["s"].dtype
        == dtype
    )
    assert guide.get_posterior().log_prob(torch.zeros(2, dtype=dtype)).dtype == dtype
    state, restored = guide.state_dict(), pf.AutoFlow(model, flow=SMALL)
    restored.load_state_dict(state)
    restored()
    assert restored.median()["s"].dtype == dtype
    torch.testing.assert_close(restored.median(), guide.median(), rtol=0, atol=0)


def test_follows_the_device_of_the_model(device: torch.device) -> None:
    zeros = torch.zeros(3, device=device)

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(zeros, 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(zeros.sum(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale.unsqueeze(-1)).to_event(1), obs=x)

    x = torch.ones(5, 3, device=device)
    guide = pf.AutoFlow(model, flow=SMALL)
    losses = fit(model, guide, x, steps=5)
    assert all(map(math.isfinite, losses))
    assert {tensor.device.type for tensor in (*guide.parameters(), *guide.buffers())} == {
        device.type
    }
    assert {value.device.type for value in (*guide(x).values(), *guide.median().values())} == {
        device.type
    }
    assert Predictive(model, guide=guide, num_samples=3)(x)["scale"].device.type == device.type


def test_float64_models_get_float64_numbers() -> None:
    """A standard deviation of 1e-9 around one is lost in float32."""
    loc, scale = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1e-9, dtype=torch.float64)

    def model() -> None:
        pyro.sample("x", dist.Normal(loc, scale))

    guide = pf.AutoFlow(model, init_scale=1e-9, init_loc_fn=init_to_mean)
    assert Trace_ELBO().loss(model, guide) == pytest.approx(0.0, abs=1e-5)


# --------------------------------------------------------------------------------------- TraceMeanField, scales


def scaled(n: int | None = None) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with (
        poutine.scale(scale=0.5),
        poutine.mask(mask=torch.tensor([True, False, True])),
        pyro.plate("latent", 3),
    ):
        y = pyro.sample("y", dist.Gamma(2.0, 1.0))
    with pyro.plate(
        "data", 10, subsample_size=n, subsample=torch.arange(10) if n is None else torch.arange(n)
    ):
        pyro.sample(
            "obs",
            dist.Normal(x.sum() + y.sum(), 1.0).expand([n or 10]),
            obs=torch.linspace(0, 1, n or 10),
        )
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).mask(torch.tensor(True)))


@pytest.mark.parametrize("n", [None, 4], ids=["all data", "mini-batch"])
def test_mean_field_elbo_is_the_plain_one(n: int | None) -> None:
    """Trap 10 of Pyro's guides made of deltas; draw for draw, with scales and masks of the model."""
    guide = pf.AutoFlow(scaled, flow=SMALL)
    guide(n)
    moved(guide, 0.1)
    losses = []
    for elbo in (Trace_ELBO(num_particles=3), TraceMeanField_ELBO(num_particles=3)):
        pyro.set_rng_seed(11)
        losses.append(elbo.loss(scaled, guide, n))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_mean_field_elbo_of_the_exact_posterior_is_zero() -> None:
    def model() -> None:
        pyro.sample("x", dist.LogNormal(0.3, 0.5))

    guide = pf.AutoFlow(
        model, init_loc_fn=init_to_value(values={"x": torch.tensor(0.3).exp()}), init_scale=0.5
    )
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO()):
        assert elbo.loss(model, guide) == pytest.approx(0.0, abs=1e-5)


# ----------------------------------------------------------------------------------------------- path gradient


class TotalGradient(pf.AutoFlow):
    """The same guide, with the score term left in."""

    def get_posterior(self, *args: Any, **kwargs: Any) -> pf.distributions.FlowDistribution:
        return self.flow()


def gradients(guide: pf.AutoFlow, model: Callback, elbo: Any, repeats: int) -> Tensor:
    """Gradients of the loss, one row per repeat."""
    rows = []
    for _ in range(repeats):
        for parameter in guide.parameters():
            parameter.grad = None
        elbo.loss_and_grads(model, guide)
        rows.append(torch.cat([p.grad.flatten() for p in guide.parameters() if p.grad is not None]))
    return torch.stack(rows)


def curved() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(x**2, s), obs=torch.tensor(1.0))


WITH_PATH = {
    "Trace": lambda: Trace_ELBO(num_particles=32, vectorize_particles=True),
    "Trace, one after the other": lambda: Trace_ELBO(num_particles=2),
    "TraceGraph": lambda: TraceGraph_ELBO(num_particles=32, vectorize_particles=True),
    "TraceMeanField": lambda: TraceMeanField_ELBO(num_particles=32, vectorize_particles=True),
    "JitTrace": lambda: JitTrace_ELBO(
        num_particles=32, vectorize_particles=True, ignore_jit_warnings=True
    ),
}


def pair_of_guides(model: Callback) -> tuple[pf.AutoFlow, pf.AutoFlow]:
    flow = functools.partial(pf.RealNVP, transforms=2, network=pf.nn.mlp((4,)))
    path, total = (
        pf.AutoFlow(model, flow=flow, init_scale=0.5),
        TotalGradient(model, flow=flow, init_scale=0.5),
    )
    path()
    total()
    total.load_state_dict(moved(path, 0.15).state_dict())
    return path, total


@pytest.fixture(scope="module")
def total_gradients() -> Tensor:
    """Gradients with the score term, at the parameters of :func:`pair_of_guides` under seed 0."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    _, total = pair_of_guides(curved)
    pyro.set_rng_seed(1)
    return gradients(total, curved, WITH_PATH["Trace"](), 200)


@pytest.mark.parametrize("name", slow_but_for(["JitTrace"], WITH_PATH))
def test_path_gradient_is_unbiased(name: str, total_gradients: Tensor) -> None:
    path, _ = pair_of_guides(curved)
    a, b = gradients(path, curved, WITH_PATH[name](), 200), total_gradients
    assert a.shape[1] == b.shape[1] > 40
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    score = (a.mean(0) - b.mean(0)) / error.clamp_min(1e-7)
    # The largest of some forty standard normals; their mean square is one.
    assert float(score.abs().max()) < 5
    assert float(score.square().mean()) < 4


@pytest.mark.parametrize("name", slow_but_for(["TraceMeanField"], WITH_PATH))
def test_path_gradient_has_the_lower_variance_near_the_optimum(name: str) -> None:
    path, total = pair_of_guides(line_model)
    exact = line_posterior()
    for guide in (path, total):
        guide.whiten(exact.mean, exact.scale_tril)
        for parameter in guide.flow.transform.layers[:-1].parameters():
            nn.init.normal_(parameter, std=0.02)
    total.load_state_dict(path.state_dict())
    spread = [gradients(g, line_model, WITH_PATH[name](), 40).var(0).sum() for g in (path, total)]
    assert float(spread[0]) < 0.2 * float(spread[1])


@pytest.mark.parametrize("name", WITH_PATH)
def test_path_gradient_vanishes_at_the_exact_posterior(name: str) -> None:
    guide, other = built(), TotalGradient(line_model, flow=SMALL)
    other(OBSERVED)
    exact = line_posterior()
    for each in (guide, other):
        each.whiten(exact.mean, exact.scale_tril)
    assert float(gradients(guide, line_model, WITH_PATH[name](), 3).abs().max()) < 1e-4
    assert float(gradients(other, line_model, WITH_PATH[name](), 3).abs().max()) > 1e-2


# ------------------------------------------------------------------------------------------------ custom flows


FLOWS: dict[str, Callable[[int], Any]] = {
    "NICE": pf.NICE,
    "RealNVP": pf.RealNVP,
    "partial": functools.partial(
        pf.RealNVP, transforms=3, mask="checkerboard", network=pf.nn.mlp(activation=nn.Tanh)
    ),
    "function of a Flow": lambda n: pf.Flow(
        [pf.transforms.AffineCoupling(n), pf.transforms.Reverse(n), pf.transforms.AffineCoupling(n)]
    ),
    "function of a Transform": lambda n: pf.transforms.Elementwise(pf.univariate.Affine(), n),
    "an inverse": lambda n: pf.transforms.AffineCoupling(n).inv,
    "nested composes": lambda n: pf.transforms.Compose(
        [
            pf.transforms.Compose([pf.transforms.AffineCoupling(n), pf.transforms.Permute(n)]),
            pf.transforms.Rescale(n),
        ]
    ),
    "a base with heavy tails": lambda n: pf.RealNVP(
        n, transforms=2, base=dist.StudentT(5.0).expand([n]).to_event(1)
    ),
    "a correlated base": lambda n: pf.RealNVP(
        n, transforms=2, base=dist.MultivariateNormal(torch.zeros(n), torch.eye(n))
    ),
}


#: One of each form.
FORMS = ["function of a Flow", "function of a Transform"]


@pytest.mark.parametrize("name", slow_but_for(FORMS, FLOWS))
def test_custom_flows(name: str) -> None:
    guide = pf.AutoFlow(line_model, flow=FLOWS[name])
    losses = fit(line_model, guide, OBSERVED, steps=150, lr=0.04 if name == "RealNVP" else 0.1)
    assert min(losses[-10:]) < -LINE_EVIDENCE + 0.15
    assert sum(losses[-10:]) / 10 > -LINE_EVIDENCE - 0.05
    assert float(guide.median()["a"]) == pytest.approx(float(line_posterior().mean[0]), abs=0.25)


# ---------------------------------------------------------------------------------------------------- refusals


def subsampled_latents() -> None:
    with pyro.plate("patients", 100, subsample_size=10):
        pyro.sample("effect", dist.Normal(0.0, 1.0))


def discrete() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("k", dist.Bernoulli(0.5))


def nothing() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(()))


def sphere() -> None:
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


REFUSED: dict[str, tuple[Callback, Any, type[Exception], str]] = {
    "latents in a subsampled plate": (
        subsampled_latents,
        None,
        ValueError,
        r"Expected latent sites outside of subsampled plates; got 'effect' in plate 'patients', of which each run sees 10 "
        r"of 100\. .* use AutoAmortizedFlow, an amortised guide",
    ),
    "discrete latents": (
        discrete,
        None,
        ValueError,
        "discrete sample site 'k'. Consider enumerating",
    ),
    "no latents": (nothing, None, RuntimeError, "AutoFlow found no latent variables"),
    "a support without a bijection": (
        lambda: pyro.sample("L", dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2))),
        None,
        ValueError,
        "got 'L' on LowerCholesky.*, for which biject_to knows none",
    ),
    "a sphere": (sphere, None, ValueError, "'direction'. Consider using ProjectedNormal"),
    "a flow with context": (
        line_model,
        lambda n: pf.RealNVP(n, context_features=3),
        ValueError,
        "Expected a flow without context in AutoFlow; got one with context_features.",
    ),
    "a transform with context": (
        line_model,
        lambda n: pf.transforms.AffineCoupling(n, context_features=3),
        ValueError,
        "Expected a flow without context in AutoFlow",
    ),
    "a flow with a support": (
        line_model,
        lambda n: pf.RealNVP(n, support=constraints.positive),
        ValueError,
        "Expected a flow over the whole space in AutoFlow; got one with support",
    ),
    "a flow of other features": (
        line_model,
        lambda n: pf.RealNVP(n + 1),
        ValueError,
        r"Expected a flow of 2 features, as the model has; got \(3,\)",
    ),
    "a transform of Pyro": (
        line_model,
        lambda n: dist.transforms.AffineTransform(0.0, 1.0),
        TypeError,
        r"Expected flow\(features\) to return a Flow or a Transform; got",
    ),
    "nothing in return": (
        line_model,
        lambda n: None,
        TypeError,
        r"Expected flow\(features\) to return .*; got None",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    model, flow, error, sentence = REFUSED[name]
    guide = pf.AutoFlow(model, flow=flow)
    for _ in range(2):  # a guide that has refused once must not go on half made
        with pytest.raises(error, match=sentence):
            guide()


@pytest.mark.parametrize(
    "flow", [pf.RealNVP(2), "realnvp", 3], ids=lambda flow: type(flow).__name__
)
def test_a_flow_that_cannot_be_made(flow: Any) -> None:
    with pytest.raises(TypeError, match="Expected flow to be a"):
        pf.AutoFlow(line_model, flow=flow)


@pytest.mark.slow
def test_sub_sampling_the_likelihood_is_fine() -> None:
    x = torch.randn(40) + 2

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 40, subsample_size=8) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])

    guide = pf.AutoFlow(model)
    fit(model, guide, steps=300, lr=0.05)
    # The noise of mini-batches shakes the mean by less than the posterior's own width.
    assert float(guide.median()["loc"]) == pytest.approx(float(x.mean()), abs=2 / math.sqrt(40))


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide = pf.AutoFlow(line_model)
        fit(line_model, guide, OBSERVED, steps=2)
        guide.median()


@pytest.mark.parametrize("seed", slow_but_for([0], [0, 4, 5, 6, 10]))
def test_the_default_guide_survives_plain_svi_on_a_funnel(seed):
    # Networks that grow without bound gave infinite draws here, within thirty steps, for some of these seeds.
    example = load_example("eight_schools")
    pyro.set_rng_seed(seed)
    guide = pf.AutoFlow(example.model)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(example.model, guide, pyro.optim.ClippedAdam({"lr": 5e-3}), elbo)
    losses = [svi.step(*example.args, **example.kwargs) for _ in range(60)]
    assert sum(losses[-10:]) / 10 < 45.0


def loop(y: Tensor, size: int | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    for i in pyro.plate("groups", 3, subsample_size=size):
        effect = pyro.sample(f"effect_{i}", dist.Normal(mean, 1.0))
        with pyro.plate(f"rows_{i}", 2):
            pyro.sample(f"y_{i}", dist.Normal(effect, 1.0), obs=y[i])


def test_a_plate_that_is_a_loop_has_sites_of_its_own() -> None:
    guide, y = pf.AutoFlow(loop), torch.zeros(3, 2)
    assert set(guide(y)) == {"mean", "effect_0", "effect_1", "effect_2"}
    svi = SVI(loop, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(y))


def test_a_loop_over_some_of_the_rows_of_a_plate_is_refused() -> None:
    with pytest.raises(ValueError, match="latent sites outside of subsampled plates; got 'effect_"):
        pf.AutoFlow(loop)(torch.zeros(3, 2), 2)
