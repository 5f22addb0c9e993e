"""Crossed locals that are not normal: a few are drawn, the rest integrated."""

from __future__ import annotations

import functools
import io
import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflows.guides import AutoStructuredFlow, from_spec
from pyroflows.guides.core import SampledCore, has_core
from pyroflows.guides.marginal import Marginal
from pyroflows.guides.marginal_mode import find_marginal_mode
from pyroflows.guides.skew_noise import SkewNoise
from pyroflows.model import LogDensity
from pyroflows.model.structure import find_structure

PERSONS, ITEMS = 8, 5


def crossed(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    people, tasks = pyro.plate("persons", PERSONS, dim=-2), pyro.plate("items", ITEMS, dim=-1)
    with tasks:
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
    with people:
        ability = pyro.sample("ability", dist.Normal(0.0, scale))
    with people, tasks:
        pyro.sample("y", dist.Binomial(3, logits=ability - level), obs=y)


def normal(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    people, tasks = pyro.plate("persons", PERSONS, dim=-2), pyro.plate("items", ITEMS, dim=-1)
    with tasks:
        level = pyro.sample("level", dist.Normal(mean, 1.0))
    with people:
        ability = pyro.sample("ability", dist.Normal(mean, 1.0))
    with people, tasks:
        pyro.sample("y", dist.Normal(ability - level, 1.0), obs=y)


def answers() -> Tensor:
    odds = torch.linspace(-1.5, 1.5, PERSONS).unsqueeze(-1) - torch.linspace(-1.0, 2.0, ITEMS)
    return (3 * odds.sigmoid()).round()


def started(y: Tensor) -> AutoStructuredFlow:
    torch.manual_seed(0)
    guide = AutoStructuredFlow.of(LogDensity(crossed, (y,)))
    mode = find_marginal_mode(guide.marginal)
    guide.start_at(mode)
    leaves = guide.integrate_leaves()
    guide.start_at(find_marginal_mode(leaves, start=mode.loc, reference=mode.reference))
    return guide


@functools.cache
def on_host() -> AutoStructuredFlow:
    return started(answers())


def brute_force(guide: AutoStructuredFlow, g: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The log density at globals of shape ``(1, 1)`` and the moments of the locals, by importance
    draws wider than Laplace's approximation."""
    given = guide.marginal.condition(g, guide.near(g))
    noise = torch.randn(count, len(guide.reference)).double()
    x = given.mean + 1.15 * given.normal.draw_centred(noise.unsqueeze(1)).squeeze(1)
    log_q = given.log_prob(given.mean) - noise.square().sum(-1) / 2
    log_q = log_q - len(guide.reference) * math.log(1.15)
    values = [guide.marginal.log_joint(g.expand(len(few), -1), few) for few in x.split(1000)]
    log_weights = torch.cat(values) - log_q
    weights = log_weights.softmax(0)
    mean = weights @ x
    return log_weights.logsumexp(0) - math.log(count), mean, (weights @ (x - mean) ** 2).sqrt()


def test_values_and_draws_are_those_of_brute_force() -> None:
    guide = on_host()
    g = guide.flow().sample((1,)).double()
    exact, mean, deviation = brute_force(guide, g, 4000)
    torch.manual_seed(1)
    x, values = guide.leaves.sample(g.expand(400, -1), guide.near(g))
    value = values.logsumexp(0) - math.log(len(values))
    torch.testing.assert_close(value, exact, atol=0.05, rtol=0)
    torch.testing.assert_close(guide.log_marginal(g)[0], exact, atol=0.1, rtol=0)
    weights = values.softmax(0)
    moved = (weights @ x - mean) / deviation
    assert moved.abs().amax() < 0.15
    spread = (weights @ (x - weights @ x) ** 2).sqrt() / deviation
    assert (spread.log().abs() < 0.15).all()
    assert values.std() < 0.2


def test_finds_the_core() -> None:
    """The core is the smaller factor, and locals that are normal need none."""
    guide = on_host()
    assert isinstance(guide.leaves, SampledCore)
    assert len(guide.leaves.core) == ITEMS
    assert len(guide.leaves.rest) == PERSONS
    density = LogDensity(normal, (answers(),))
    assert not has_core(Marginal(density, find_structure(density)))


def test_the_density_holds_far_out() -> None:
    """As the scale goes to zero its prior is left, times a likelihood that is constant."""
    guide = on_host()
    g = torch.tensor([[-8.0], [-12.0]]).double()
    near, far = guide.log_marginal(g)
    torch.testing.assert_close(near - far, torch.tensor(4.0).double(), atol=0.05, rtol=0)


def test_weighs_draws(device: torch.device) -> None:
    """Weights belong to draws of the whole, and there is no density where the model fails."""
    guide = started(answers().to(device))
    z, log_weights = guide.sample_and_weigh(guide.marginal.density, 60)
    assert z.shape == (60, guide.features) and log_weights.isfinite().all()
    g = z[:, guide.marginal.structure.globals]
    expected = guide.log_marginal(g) - guide.flow().log_prob(g)
    assert (log_weights - expected).abs().mean() < 0.3
    far = guide.log_marginal(torch.full((2, 1), 300.0).to(z))
    assert not far.isnan().any() and (far < expected.amin()).all()


def test_survives_saving() -> None:
    guide = on_host()
    file = io.BytesIO()
    torch.save((guide.spec(), guide.state_dict()), file)
    file.seek(0)
    spec, state = torch.load(file, weights_only=True)
    again = from_spec(spec, guide.marginal.density)
    again.load_state_dict(state)
    g = guide.flow().sample((20,)).double()
    torch.testing.assert_close(again.log_marginal(g), guide.log_marginal(g))


def test_noise_has_the_slopes_of_a_skew_distribution(device: torch.device) -> None:
    """Two coordinates, of which the second bends with the first, become those of a normal
    distribution."""
    noise = SkewNoise(torch.tensor([[-1], [0]])).to(device)
    n = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)).to(device).double()
    wide = torch.ones_like(n)

    def log_prob(e: Tensor) -> Tensor:
        first, second = e[:, 0], e[:, 1] - 0.3 * (e[:, 0] ** 2 - 1)
        return 2 * first / 2**0.5 - 2 * (first / 2**0.5).exp() - second**2 / 2

    for _ in range(4):
        epsilon = noise.transform(n, wide)[0].detach().requires_grad_()
        (slopes,) = torch.autograd.grad(log_prob(epsilon).sum(), epsilon)
        noise.regress(n, wide, slopes)
    epsilon, log_det = noise.transform(n, wide)
    log_weights = log_prob(epsilon) + log_det + n.square().sum(-1) / 2
    plain = log_prob(n) + n.square().sum(-1) / 2
    assert log_weights.std() < 0.2 < 0.5 < plain.std()
