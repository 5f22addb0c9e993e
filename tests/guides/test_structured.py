"""A guide of globals by a flow and of locals by their normal distribution given these."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

import pyroflows as pf
from pyroflows.guides import AutoStructuredFlow, from_spec
from pyroflows.guides.marginal_mode import find_marginal_mode
from pyroflows.model import LogDensity
from pyroflows.posterior.chains import neutra
from pyroflows.posterior.posterior import Posterior

GROUPS = torch.tensor([0.5, -1.0, 2.0, 1.5, 0.0, 3.0, -0.5, 1.0])


def hierarchy(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, scale))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def local_level(y: Tensor) -> None:
    step = pyro.sample("step", dist.HalfNormal(1.0))
    with pyro.plate("time", len(y)):
        change = pyro.sample("change", dist.Normal(0.0, step))
    level = change.cumsum(-1)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def logit(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Binomial(10, logits=effect), obs=y)


COUNTS = torch.tensor([3.0, 5.0, 7.0, 2.0, 8.0, 5.0])
MODELS = [(hierarchy, GROUPS), (local_level, GROUPS.cumsum(0)), (logit, COUNTS)]


def started(model: Callable[..., Any], y: Tensor) -> AutoStructuredFlow:
    torch.manual_seed(0)
    guide = AutoStructuredFlow(model)
    guide(y)
    guide.start_at(find_marginal_mode(guide.marginal))
    return guide


@pytest.mark.parametrize(("model", "y"), MODELS)
def test_scores_what_it_draws(model: Callable[..., Any], y: Tensor, device: torch.device) -> None:
    guide = started(model, y.to(device))
    z, log_q = guide.sample_and_log_prob(40)
    assert z.shape == (40, guide.features)
    torch.testing.assert_close(guide.log_prob(z), log_q, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("model", "y"), MODELS[:2])
def test_is_exact_given_the_globals(
    model: Callable[..., Any], y: Tensor, device: torch.device
) -> None:
    """For locals that are normal given the globals, weights depend on the globals alone."""
    guide = started(model, y.to(device))
    z, log_weights = guide.sample_and_weigh(guide.marginal.density, 50)
    g = z[:, guide.marginal.structure.globals]
    expected = guide.log_marginal(g) - guide.flow().log_prob(g)
    torch.testing.assert_close(log_weights, expected.double(), atol=1e-4, rtol=0)
    by_model = guide.marginal.density.log_prob(z) - guide.log_prob(z)
    torch.testing.assert_close(by_model.double(), log_weights, atol=1e-3, rtol=0)


def test_parts_make_the_whole(device: torch.device) -> None:
    guide = started(hierarchy, GROUPS.to(device))
    first, second = guide.parts()
    z, _ = guide.sample_and_log_prob(20)
    torch.testing.assert_close(first.log_prob(z) + second.log_prob(z), guide.log_prob(z))
    g, _ = first.sample_and_log_prob(20, z[:, :0])
    x, log_prob = second.sample_and_log_prob(20, g)
    assert (len(first.entries), len(second.entries)) == (g.shape[-1], x.shape[-1])
    whole = torch.empty_like(z).index_copy(-1, first.entries, g).index_copy(-1, second.entries, x)
    torch.testing.assert_close(second.log_prob(whole), log_prob, atol=1e-3, rtol=1e-5)


def test_the_gradient_is_that_of_the_marginal(device: torch.device) -> None:
    """At fixed locals the mean gradient by the globals is the marginal's, by Fisher's identity."""
    guide = started(hierarchy, GROUPS.to(device))
    density = guide.marginal.density
    g = guide.flow.whitening.loc.detach().double() + 0.3
    n = 4000
    conditional = guide.marginal.condition(g.expand(n, -1), guide.reference.expand(n, -1))
    x = conditional.sample(torch.randn_like(conditional.mean))
    z = guide.marginal.join(g.expand(n, -1), x)
    _, slopes = density.value_and_grad(z.float())
    slopes = slopes[:, guide.marginal.structure.globals].double()
    step = 1e-4 * torch.eye(len(g)).to(g)
    up, down = (guide.log_marginal(g + s) for s in (step, -step))
    error = (slopes.mean(0) - (up - down) / 2e-4) / (slopes.std(0) / n**0.5)
    assert float(error.abs().amax()) < 4


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(num_particles=16, vectorize_particles=True),
        pytest.param(Trace_ELBO(num_particles=4), marks=pytest.mark.slow),
        pytest.param(TraceMeanField_ELBO(num_particles=4), marks=pytest.mark.slow),
    ],
)
def test_an_svi_trains_it(elbo: Any) -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = AutoStructuredFlow(hierarchy)
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    losses = torch.tensor([svi.step(GROUPS) for _ in range(40)])
    assert losses[-10:].mean() < losses[:10].mean() - 1
    drawn = Predictive(hierarchy, guide=guide, num_samples=7)(GROUPS)
    assert drawn["effect"].shape == (7, 8)
    assert set(guide.median()) == {"mean", "scale", "effect"}


def test_is_saved_and_copied() -> None:
    guide = started(hierarchy, GROUPS)
    z, _ = guide.sample_and_log_prob(5)
    wanted = guide.log_prob(z)
    assert torch.equal(copy.deepcopy(guide).log_prob(z), wanted)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    other = AutoStructuredFlow(hierarchy)
    other.load_state_dict(torch.load(file))
    other(GROUPS)
    assert torch.equal(other.log_prob(z), wanted)
    density = LogDensity(hierarchy, (GROUPS,))
    made = from_spec(guide.spec(), density)
    made.load_state_dict(guide.state_dict())
    assert torch.equal(made.log_prob(z), wanted)
    with pytest.raises(RuntimeError, match="pickles hold no model"):
        pickle.loads(pickle.dumps(guide)).log_prob(z)


def coins(y: Tensor) -> None:
    """One row a group, which leaves Laplace's approximation far off."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    log_scale = pyro.sample("log_scale", dist.Normal(0.5, 0.5))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, log_scale.exp()))
        pyro.sample("y", dist.Binomial(2, logits=effect), obs=y)


def test_regressed_integrals_stay_right_when_the_guide_starts_elsewhere() -> None:
    guide = started(coins, torch.tensor([0.0, 1.0, 2.0, 2.0]).repeat(10))
    mode = find_marginal_mode(guide.marginal)
    leaves = guide.integrate_leaves()
    assert leaves is not None
    assert guide.regress_leaves() is not None
    noise = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()
    g = mode.loc + noise @ mode.root.mT
    expected = leaves.log_prob(g, guide.reference)
    guide.start_at(mode._replace(loc=mode.loc + mode.root.sum(-1), root=3 * mode.root))
    # Some times the standard deviation that a regression may leave.
    assert float((guide.log_marginal(g) - expected).abs().amax()) < 4 * 0.02


def test_takes_another_flow() -> None:
    guide = AutoStructuredFlow(hierarchy, flow=pf.NSF)
    guide(GROUPS)
    assert guide.flow.event_shape == (2,)
    wrong = AutoStructuredFlow(hierarchy, flow=lambda n: pf.RealNVP(n + 1))
    with pytest.raises(ValueError, match="Expected a flow of 2 features"):
        wrong(GROUPS)


def counted_walk(y: Tensor) -> None:
    step = pyro.sample("step", dist.HalfNormal(1.0))
    with pyro.plate("time", len(y)):
        change = pyro.sample("change", dist.Normal(0.0, step))
        pyro.sample("y", dist.Poisson((change.cumsum(-1) - 1.0).exp()), obs=y)


def test_locals_are_drawn_about_their_mean_where_that_takes_noise_from_their_weights() -> None:
    y = torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0] * 8)
    guide = started(counted_walk, y)
    guide.repeats.fill_(1)
    _, about_mode = guide.sample_and_weigh(guide.marginal.density, 400)
    guide.repeat_locals()
    assert bool(guide.shift.any())
    guide.repeats.fill_(1)
    _, about_mean = guide.sample_and_weigh(guide.marginal.density, 400)
    assert float(about_mean.var()) < 0.7 * float(about_mode.var())
    drawn, log_prob = guide.sample_and_log_prob(3)
    torch.testing.assert_close(guide.log_prob(drawn), log_prob, rtol=1e-4, atol=1e-3)


def test_neutra_asks_for_a_flow_over_all_latents() -> None:
    guide, density = started(hierarchy, GROUPS), LogDensity(hierarchy, (GROUPS,))
    advice = r"AutoStructuredFlow.* guide=pyroflows.RealNVP"
    with pytest.raises(TypeError, match=advice):
        neutra(Posterior(guide, density))
    reparam = NeuTraReparam(guide)
    with pytest.raises(ValueError, match=advice):
        reparam.reparam(hierarchy)(GROUPS)
