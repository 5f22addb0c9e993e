"""Flows whose weights are latent, and flows as likelihoods of latents."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyroflows as pf
from pyroflows.model import LogDensity

Y = torch.randn(6, 2)


def small(**options: Any) -> pf.Flow:
    network = pf.nn.mlp((4,), torch.nn.Tanh)
    return pf.NICE(2, transforms=2, network=network, **options)


def model_of(weights: Any) -> Any:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", weights(), obs=y)

    return model


def test_it_is_the_flow_at_the_weights_that_were_drawn() -> None:
    flow = small()
    weights = pf.bayesian(flow, prior=0.3)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    trace = poutine.trace(weights).get_trace()
    drawn = {
        name.removeprefix("NICE."): node["value"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
    }
    assert sorted(drawn) == sorted(name for name, _ in flow.named_parameters())
    found = trace.nodes["_RETURN"]["value"].log_prob(Y)
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())
    assert len(pyro.get_param_store()) == 0
    flow.load_state_dict(drawn, strict=False)  # buffers stay
    torch.testing.assert_close(found, flow().log_prob(Y))


def test_weights_inside_of_the_plate_of_the_rows_are_refused() -> None:
    weights = pf.bayesian(small(), prior=0.3)
    model = model_of(weights)
    with pytest.raises(ValueError, match="outside of the plates of its data"):
        model(Y)


def test_svi_learns_the_weights() -> None:
    weights = pf.bayesian(small(), prior=0.3)

    def model(y: Tensor) -> None:
        law = weights()
        with pyro.plate("data", len(y)):
            pyro.sample("y", law, obs=y)

    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    y = 2.0 + 0.3 * torch.randn(40, 2)
    losses = [svi.step(y) for _ in range(20)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_its_density_is_captured_for_many_points() -> None:
    weights = pf.bayesian(pf.Flow([pf.transforms.LowerTriangularAffine(2)]), prior=0.3)

    def model(y: Tensor) -> None:
        law = weights()
        with pyro.plate("data", len(y)):
            pyro.sample("y", law, obs=y)

    density = LogDensity(model, (Y,))
    z = 0.1 * torch.randn(3, density.features)
    singly = torch.stack([density.log_prob(row) for row in z])
    torch.testing.assert_close(density.log_prob(z), singly, atol=1e-3, rtol=1e-4)


def likelihood_model(y: Tensor, flow: Any, seen: Tensor | None = None) -> None:
    """A flow as likelihood, with context from the latents, and rows that a mask leaves out."""
    h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    law = flow(h)
    with pyro.plate("data", len(y)):
        if seen is not None:
            law = law.expand((len(y),)).mask(seen)
        pyro.sample("y", law, obs=y)


def test_a_flow_as_likelihood_of_latents_leaves_out_missing_rows() -> None:
    flow = small(context_features=2)
    flow.requires_grad_(False)
    seen = torch.tensor([True, False, True, True, False, True])
    other = Y.where(seen.unsqueeze(-1), 50.0)
    densities = [LogDensity(likelihood_model, (y, flow, seen)) for y in (Y, other)]
    z = torch.randn(4, 2)
    one, two = (density.log_prob(z) for density in densities)
    torch.testing.assert_close(one, two)
    fewer = LogDensity(likelihood_model, (Y[seen], flow)).log_prob(z)
    torch.testing.assert_close(one, fewer)


def test_nuts_runs_with_a_flow_as_likelihood() -> None:
    flow = small(context_features=2)
    flow.requires_grad_(False)
    mcmc = MCMC(NUTS(likelihood_model), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run(Y, flow)
    assert mcmc.get_samples()["h"].shape == (3, 2)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="Expected flow to be a Flow; got Linear"):
        pf.bayesian(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="prior to be positive"):
        pf.bayesian(small(), prior=-1.0)
    with pytest.raises(ValueError, match="flow with parameters; got one with none"):
        pf.bayesian(pf.Flow([pf.transforms.Reverse(2)]))
    weights = pf.bayesian(small(), prior=lambda name, value: dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"distribution of shape \(.*\) for '.*'; got \(\)"):
        weights()
    weights = pf.bayesian(small(), prior=lambda name, value: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"prior to give a distribution of pyro\.distributions"):
        weights()
    assert math.isfinite(float(pf.bayesian(small(), 0.1)().log_prob(Y).sum()))
