"""Discrete sites summed out, against sums by hand, the forward algorithm, TraceEnum_ELBO and brute force."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyroflows._random import forked
from pyroflows.model import LogDensity
from pyroflows.model.enumeration import enumerated_log_prob
from pyroflows.model.prediction import (
    inference_data,
    log_likelihood,
    posterior_predictive,
    prior_draws,
    site_draws,
)

Model = Callable[..., Any]
Y = 1.3 * torch.sin(1.7 * torch.arange(6.0) + 1).double()


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.set_default_dtype(torch.float64)


@functools.cache
def density_of(model: Model) -> LogDensity:
    """The density of a model, captured once for all tests that only evaluate it."""
    return LogDensity(model)


def by_trace_enum(model: Model, density: LogDensity, z: Tensor) -> Tensor:
    """The log density by Pyro's enumerating ELBO, which is exact for a guide without sites."""
    values = density.constrain(z)
    conditioned = config_enumerate(poutine.condition(model, data=values), default="parallel")
    elbo = TraceEnum_ELBO(max_plate_nesting=2)
    log_det = z.new_zeros(())
    for site, part in zip(
        density.sites, z.split([site.features for site in density.sites]), strict=True
    ):
        unconstrained = part.reshape(site.unconstrained_shape)
        log_det = (
            log_det
            + site.transform.log_abs_det_jacobian(
                unconstrained, site.transform(unconstrained)
            ).sum()
        )
    return -elbo.differentiable_loss(conditioned, lambda: None) + log_det


def mixture() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    with pyro.plate("n", 6):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[k], 0.5), obs=Y)


def coin_outside() -> None:
    """One coin for all data: it must not be summed out once a datum."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    coin = pyro.sample("coin", dist.Bernoulli(0.3))
    with pyro.plate("n", 6):
        pyro.sample("y", dist.Normal(x + 2 * coin, 1.0), obs=Y)


def coin_outside_and_inside() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    outer = pyro.sample("outer", dist.Bernoulli(torch.sigmoid(x)))
    with pyro.plate("n", 6):
        inner = pyro.sample("inner", dist.Bernoulli(0.2 + 0.5 * outer))
        pyro.sample("y", dist.Normal(x + inner - outer, 1.0), obs=Y)


def nested_plates() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 3, dim=-1):
        group = pyro.sample("group", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        with pyro.plate("rows", 2, dim=-2):
            member = pyro.sample("member", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.8])[group]))
            pyro.sample("y", dist.Normal(x * group + member, 1.0), obs=Y.reshape(2, 3))


def chain() -> None:
    a = pyro.sample("a", dist.Categorical(torch.tensor([0.3, 0.7])))
    x = pyro.sample("x", dist.Normal(1.0 * a, 1.0))
    b = pyro.sample("b", dist.Categorical(torch.tensor([[0.1, 0.9], [0.6, 0.4]])[a]))
    pyro.sample("y", dist.Normal(x + b, 1.0), obs=Y[0])


def other_laws() -> None:
    x = pyro.sample("x", dist.Beta(2.0, 2.0))
    count = pyro.sample("count", dist.Binomial(3, x))
    one_hot = pyro.sample("one_hot", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))
    pyro.sample("y", dist.Normal(count + one_hot[..., 1], 1.0), obs=Y[0])


def masked_and_scaled() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 6), poutine.mask(mask=torch.arange(6) < 4), poutine.scale(scale=1.0):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(x + k, 1.0), obs=Y)


def hmm() -> None:
    stay = pyro.sample("stay", dist.Beta(torch.tensor([5.0, 3.0]), 2.0).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    transition = torch.stack(
        [torch.stack([stay[0], 1 - stay[0]]), torch.stack([1 - stay[1], stay[1]])]
    )
    state = torch.tensor(0)
    for t in pyro.markov(range(6)):
        state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
        pyro.sample(f"y_{t}", dist.Normal(locs[state], 0.5), obs=Y[t])


def hmm_in_a_plate() -> None:
    stay = pyro.sample("stay", dist.Uniform(0.5, 1.0))
    transition = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    y = torch.stack([Y, -Y, Y.flip(0)])
    with pyro.plate("series", 3, dim=-1):
        state = torch.tensor(0)
        for t in pyro.markov(range(6)):
            state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
            pyro.sample(f"y_{t}", dist.Normal(1.0 * state, 0.5), obs=y[:, t])


MODELS = [
    mixture,
    coin_outside,
    coin_outside_and_inside,
    nested_plates,
    chain,
    other_laws,
    masked_and_scaled,
    hmm,
    hmm_in_a_plate,
]


@pytest.mark.parametrize(
    "model", slow_but_for([model for model in MODELS if model is not hmm], MODELS)
)
def test_agrees_with_the_enumerating_elbo_of_pyro(model: Model) -> None:
    density = density_of(model)
    assert density.mode == "captured"
    generator = torch.Generator().manual_seed(2)
    z = density.initial + torch.randn(3, density.features, generator=generator)
    value, grad = density.value_and_grad(z)
    for row, v, g in zip(z, value, grad, strict=True):
        point = row.clone().requires_grad_()
        expected = by_trace_enum(model, density, point)
        torch.testing.assert_close(v, expected.detach())
        torch.testing.assert_close(g, torch.autograd.grad(expected, point)[0])


@pytest.mark.parametrize("model", slow_but_for([coin_outside, nested_plates, chain], MODELS))
def test_the_log_joint_carries_a_graph(model: Model) -> None:
    density = density_of(model)
    z = (density.initial + 0.1 * torch.arange(3.0).unsqueeze(-1)).requires_grad_()
    value = density.log_joint(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close((value.detach(), slope), density.value_and_grad(z.detach()))


def test_the_terms_of_many_points_are_evaluated_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    density = density_of(mixture)
    monkeypatch.setattr("pyroflows.model.pointwise._run_once", None)  # one point at a time
    z = density.initial.expand(4, -1)
    total = sum(term.reshape(4, -1).sum(-1) for term in density.site_terms(z).values())
    torch.testing.assert_close(total, density.log_prob(z))


@pytest.mark.parametrize("model", MODELS)
def test_discrete_sites_are_no_part_of_the_vector(model: Model) -> None:
    density = density_of(model)
    discrete = {"k", "coin", "outer", "inner", "group", "member", "a", "b", "count", "one_hot"}
    of_states = {f"state_{t}" for t in range(6)}
    assert set(density.discrete) <= discrete | of_states
    assert set(density.discrete).isdisjoint(density.constrain(density.initial))


def test_a_mixture_by_hand() -> None:
    density = density_of(mixture)
    z = density.initial + torch.linspace(-1, 1, density.features)
    values = density.constrain(z)
    weights, locs = values["weights"], values["locs"]
    of_data = (weights.log() + dist.Normal(locs, 0.5).log_prob(Y.unsqueeze(-1))).logsumexp(-1).sum()
    of_locs = dist.Normal(0.0, 3.0).log_prob(locs).sum()
    of_weights = dist.Dirichlet(torch.ones(3)).log_prob(weights)
    log_det = density.sites[0].transform.log_abs_det_jacobian(z[:2], weights)
    torch.testing.assert_close(density.log_prob(z), of_data + of_locs + of_weights + log_det)


def test_a_hidden_markov_model_by_the_forward_algorithm() -> None:
    density = density_of(hmm)
    z = density.initial + torch.linspace(-0.5, 0.5, density.features)
    values = density.constrain(z)
    stay, locs = values["stay"], values["locs"]
    transition = torch.stack(
        [torch.stack([stay[0], 1 - stay[0]]), torch.stack([1 - stay[1], stay[1]])]
    )
    forward = torch.tensor([1.0, 0.0])
    for y in Y:
        forward = (forward @ transition) * dist.Normal(locs, 0.5).log_prob(y).exp()
    prior = dist.Beta(torch.tensor([5.0, 3.0]), 2.0).log_prob(stay).sum()
    prior = prior + dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(locs).sum()
    log_det = density.sites[0].transform.log_abs_det_jacobian(z[:2], stay).sum()
    torch.testing.assert_close(density.log_prob(z), forward.sum().log() + prior + log_det)


def test_by_brute_force_over_all_assignments() -> None:
    density = density_of(coin_outside_and_inside)
    x = torch.tensor(0.4)
    terms = []
    for outer in (0.0, 1.0):
        for inner in product((0.0, 1.0), repeat=6):
            values = {"x": x, "outer": torch.tensor(outer), "inner": torch.tensor(inner)}
            trace = poutine.trace(
                poutine.condition(coin_outside_and_inside, data=values)
            ).get_trace()
            terms.append(trace.log_prob_sum())
    torch.testing.assert_close(density.log_prob(x.reshape(1)), torch.stack(terms).logsumexp(0))


def test_a_scale_around_all_of_the_model_weighs_the_summed_density() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 6), poutine.scale(scale=2.5):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(x + k, 1.0), obs=Y)

    x = torch.tensor(0.3)
    single = (
        dist.Bernoulli(0.3).log_prob(torch.tensor([[0.0], [1.0]]))
        + dist.Normal(x + torch.tensor([[0.0], [1.0]]), 1.0).log_prob(Y)
    ).logsumexp(0)
    expected = dist.Normal(0.0, 1.0).log_prob(x) + 2.5 * single.sum()
    density = LogDensity(model)
    torch.testing.assert_close(density.log_prob(x.reshape(1)), expected)
    by_pyro = by_trace_enum(model, density, x.reshape(1).requires_grad_())
    torch.testing.assert_close(by_pyro.detach(), expected)


def test_different_scales_around_one_sum_are_refused() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with poutine.scale(scale=2.0):
            pyro.sample("y", dist.Normal(x + k, 1.0), obs=Y[0])

    with pytest.raises(ValueError, match=r"one number as poutine\.scale"):
        LogDensity(model)


def test_a_scale_elsewhere_is_its_own() -> None:
    def model() -> None:
        with poutine.scale(scale=0.5):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(x + k, 1.0), obs=Y[0])

    z = torch.tensor([[0.2], [1.0]])
    coin = torch.tensor([0.0, 1.0])
    terms = dist.Bernoulli(0.3).log_prob(coin) + dist.Normal(z + coin, 1.0).log_prob(Y[0])
    expected = 0.5 * dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + terms.logsumexp(-1)
    torch.testing.assert_close(LogDensity(model).log_prob(z), expected)


def test_an_impossible_assignment_leaves_value_and_gradient_finite() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 6):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.0, 0.5])))
            pyro.sample("y", dist.Normal(x + k, 1.0), obs=Y)

    value, grad = LogDensity(model).value_and_grad(torch.tensor([[0.1], [3.0]]))
    assert bool(value.isfinite().all())
    assert bool(grad.isfinite().all())


def test_in_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    y = Y.float()

    def model() -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("n", 6):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("y", dist.Normal(locs[k], 0.5), obs=y)

    density = LogDensity(model)
    assert density.mode == "captured"
    z = torch.tensor([[-1.0, 1.0]])
    terms = torch.tensor([0.4, 0.6]).log() + dist.Normal(z[0], 0.5).log_prob(y.unsqueeze(-1))
    expected = terms.logsumexp(-1).sum() + dist.Normal(0.0, 3.0).log_prob(z[0]).sum()
    assert density.log_prob(z).dtype == torch.float32
    torch.testing.assert_close(density.log_prob(z)[0], expected)


def test_a_trace_without_discrete_sites_is_its_sum() -> None:
    def model() -> None:
        with pyro.plate("n", 6):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=Y)

    trace = poutine.trace(poutine.enum(config_enumerate(model), first_available_dim=-2)).get_trace()
    torch.testing.assert_close(enumerated_log_prob(trace), dist.Normal(0.0, 1.0).log_prob(Y).sum())


def test_a_discrete_site_without_finite_support_is_refused_by_name() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Gamma(1.0, 1.0))
        pyro.sample("events", dist.Poisson(x))

    with pytest.raises(
        ValueError, match="'events' with Poisson, which is discrete without a finite support"
    ):
        LogDensity(model)


def test_impossible_states_have_a_finite_gradient():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(logits=torch.tensor([0.0, -torch.inf, -torch.inf])))
        j = pyro.sample(
            "j", dist.Categorical(torch.tensor([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]])[k])
        )
        pyro.sample("y", dist.Normal(x * (1.0 + j), 1.0), obs=torch.tensor(0.3))

    density = LogDensity(model)
    value, grad = density.value_and_grad(torch.tensor([[0.2], [-1.0]]))
    assert bool(value.isfinite().all())
    assert bool(grad.isfinite().all())


@pytest.mark.slow
def test_a_star_of_discrete_sites_needs_no_table_of_all_of_them():
    leaves = 24

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        centre = pyro.sample("a_centre", dist.Bernoulli(torch.tensor(0.3)))
        for i in range(leaves):
            leaf = pyro.sample(f"leaf_{i}", dist.Bernoulli(0.2 + 0.5 * centre))
            pyro.sample(f"y_{i}", dist.Normal(x + leaf, 1.0), obs=torch.tensor(0.1 * i))

    z = torch.tensor([0.4])
    y = 0.1 * torch.arange(leaves)
    low, high = (dist.Normal(0.4 + leaf, 1.0).log_prob(y).exp() for leaf in (0.0, 1.0))
    given_centre = [
        ((1 - p) * low + p * high).log().sum() + math.log(c) for p, c in ((0.2, 0.7), (0.7, 0.3))
    ]
    expected = torch.stack(given_centre).logsumexp(0) + dist.Normal(0.0, 1.0).log_prob(z[0])
    torch.testing.assert_close(LogDensity(model).log_prob(z)[()], expected, rtol=1e-5, atol=1e-4)


# Draws of the discrete sites


def groups_and_members() -> None:
    """A discrete site outside of a plate and one inside, both with an effect on the data."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    group = pyro.sample("group", dist.Categorical(torch.tensor([0.3, 0.7])))
    with pyro.plate("n", 2):
        rate = torch.tensor([0.2, 0.6])[group]
        member = pyro.sample("member", dist.OneHotCategorical(torch.stack([rate, 1 - rate], -1)))
        pyro.deterministic("mean", x + 2 * member[..., 0])
        pyro.sample("y", dist.Normal(x + 2 * member[..., 0], 1.0), obs=torch.tensor([0.0, 1.5]))


def test_discrete_sites_are_drawn_from_their_joint_posterior() -> None:
    density = LogDensity(groups_and_members)
    z = torch.full((20_000, 1), 0.2)
    with forked(0):
        draws = site_draws(density, z, discrete=True)
    assert {name: tuple(value.shape[1:]) for name, value in draws.items()} == {
        "x": (),
        "group": (),
        "member": (2, 2),
        "mean": (2,),
    }
    torch.testing.assert_close(draws["mean"], 0.2 + 2 * draws["member"][..., 0])
    # All eight states, by hand.
    group, first, second = torch.cartesian_prod(*3 * [torch.arange(2)]).T
    weights = torch.tensor([0.3, 0.7])[group]
    for state, y in ((first, 0.0), (second, 1.5)):
        rate = torch.tensor([0.2, 0.6])[group]
        likelihood = dist.Normal(0.2 + 2.0 * state, 1.0).log_prob(torch.tensor(y)).exp()
        weights = weights * torch.where(state == 1, rate, 1 - rate) * likelihood
    exact = weights / weights.sum()
    ones = draws["member"][..., 0].long()
    drawn = 4 * draws["group"] + 2 * ones[:, 0] + ones[:, 1]
    share = drawn.bincount(minlength=8) / len(z)
    assert bool(((share - exact).abs() < 4 * (exact * (1 - exact) / len(z)).sqrt()).all())


def test_likelihoods_and_predictions_with_discrete_sites() -> None:
    density = LogDensity(mixture)
    z = density.initial.expand(50, -1)
    terms = log_likelihood(density, z)
    (name,) = terms
    torch.testing.assert_close(terms[name][0], density.site_terms(z[0])["k"])
    assert posterior_predictive(density, z[:3])[name].shape == (3, *terms[name].shape[1:])
    # One site that all observations share leaves them no likelihoods of their own.
    shared = LogDensity(groups_and_members)
    assert log_likelihood(shared, torch.zeros(2, 1)) == {}
    stats = {"lp": torch.zeros(1, 5)}
    data = inference_data(shared, torch.zeros(1, 5, 1), stats)
    assert data.attrs["log_likelihood"].startswith("Left out: y,")
    assert data["posterior_predictive"]["y"].shape == (1, 5, 2)


def test_a_model_that_runs_under_enumeration_only() -> None:
    """Detections of two objects on a line, or spurious ones: the means of each lie along the
    dimension of the discrete site, which is there under enumeration only."""
    y = torch.tensor([[-1.1, 0.9], [-0.7, 3.0], [1.4, -0.8]])
    chances = torch.tensor([0.4, 0.4, 0.2])

    def model() -> None:
        with pyro.plate("objects", 2):
            positions = pyro.sample("positions", dist.Normal(0.0, 1.0))
        with pyro.plate("detections", 2, dim=-1), pyro.plate("time", 3, dim=-2):
            object_ = pyro.sample("object", dist.Categorical(chances))
            means = torch.cat([positions, torch.zeros(1)])[object_.reshape(3)].reshape(3, 1, 1)
            spurious = object_ == 2
            pyro.sample("y", dist.Normal(means, torch.where(spurious, 5.0, 0.3)), obs=y)

    density = LogDensity(model)
    assert density.needs_enumeration
    z = torch.tensor([[-1.0, 1.0], [0.2, 0.3]])
    means = torch.cat([z, torch.zeros(2, 1)], -1)
    scales = torch.tensor([0.3, 0.3, 5.0])
    of_objects = dist.Normal(means, scales).log_prob(y[..., None, None]) + chances.log()
    expected = of_objects.logsumexp(-1).sum((0, 1)) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(density.log_prob(z), expected)
    assert prior_draws(density, 3) == {}


def test_data_are_checked_under_enumeration_too() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            means = torch.stack([x, -x])[k.reshape(2).long()].reshape(2, 1)
            pyro.sample("y", dist.Normal(means, 1.0), obs=y)

    assert LogDensity(model, (torch.zeros(3),)).needs_enumeration
    with pytest.raises((ValueError, RuntimeError)):
        LogDensity(model, (torch.zeros(3, 1),))


def test_a_factor_of_an_enumerated_site() -> None:
    y = torch.tensor([-1.1, 0.4, 2.0])

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            means = torch.stack([x, -x])[k.reshape(2).long()].reshape(2, 1)
            pyro.factor("y", dist.Normal(means, 1.0).log_prob(y))

    density = LogDensity(model)
    assert density.needs_enumeration
    z = torch.tensor([[0.3], [1.2]])
    terms = dist.Normal(torch.stack([z, -z], -1), 1.0).log_prob(y[:, None]) + math.log(0.5)
    expected = terms.logsumexp(-1).sum(-1) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(density.log_prob(z), expected)
