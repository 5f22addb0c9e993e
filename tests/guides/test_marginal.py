"""Marginal densities of globals against closed forms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyroflows._deadline import Deadline, TimeOver
from pyroflows.guides.marginal import Marginal
from pyroflows.guides.marginal_mode import find_marginal_mode
from pyroflows.model import LogDensity
from pyroflows.model.structure import find_structure


def half_normal(u: Tensor, scale: float = 1.0) -> Tensor:
    """The log density of the logarithm of a half-normal number."""
    return dist.HalfNormal(torch.tensor(scale).double()).log_prob(u.exp()) + u


def marginal_of(
    model: Callable[..., None], *args: Tensor, device: torch.device | None = None
) -> Marginal:
    density = LogDensity(model, args, batch_size=8, device=device)
    return Marginal(density, find_structure(density))


def normal(y: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    return MultivariateNormal(mean.expand(len(y)), covariance).log_prob(y.double())


# Groups


def groups(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    between = pyro.sample("between", dist.HalfNormal(1.0))
    within = pyro.sample("within", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(y), dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, between))
        with pyro.plate("rows", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(effect, within), obs=y)


def exact_groups(y: Tensor, g: Tensor) -> Tensor:
    mean, between, within = g[0], g[1].exp(), g[2].exp()
    rows = y.shape[1]
    covariance = between**2 + within**2 * torch.eye(rows).double()
    prior = dist.Normal(0.0, 1.0).log_prob(mean) + half_normal(g[1]) + half_normal(g[2])
    rows_given = MultivariateNormal(mean.expand(rows), covariance)
    return prior + rows_given.log_prob(y.double()).sum()


# A local level


def level(y: Tensor) -> None:
    step = pyro.sample("step", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    flat = dist.ImproperUniform(dist.constraints.real_vector, (), (len(y),))
    x = pyro.sample("x", flat)
    pyro.factor("start", dist.Normal(0.0, 3.0).log_prob(x[0]))
    pyro.factor("walk", dist.Normal(x[:-1], step).log_prob(x[1:]).sum())
    pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def exact_level(y: Tensor, g: Tensor) -> Tensor:
    """By a Kalman filter."""
    step, noise = g[0].exp() ** 2, g[1].exp() ** 2
    mean, variance = torch.zeros(2).double()
    variance = variance + 9.0
    total = half_normal(g[0]) + half_normal(g[1])
    for value in y.double():
        spread = variance + noise
        total = total + dist.Normal(mean, spread.sqrt()).log_prob(value)
        gain = variance / spread
        mean = mean + gain * (value - mean)
        variance = variance * (1 - gain) + step
    return total


# Crossed effects, and increments of a walk


PERSONS, ITEMS = 14, 6
CELLS = torch.arange(PERSONS * ITEMS)[torch.arange(PERSONS * ITEMS) % 7 > 1]


def crossed(y: Tensor) -> None:
    first = pyro.sample("first", dist.HalfNormal(1.0))
    second = pyro.sample("second", dist.HalfNormal(1.0))
    with pyro.plate("persons", PERSONS):
        a = pyro.sample("a", dist.Normal(0.0, first))
    with pyro.plate("items", ITEMS):
        b = pyro.sample("b", dist.Normal(0.0, second))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[CELLS // ITEMS] + b[CELLS % ITEMS], 0.5), obs=y)


def exact_crossed(y: Tensor, g: Tensor) -> Tensor:
    first, second = g.exp() ** 2
    person, item = CELLS // ITEMS, CELLS % ITEMS
    covariance = first * (person == person.unsqueeze(-1)) + second * (item == item.unsqueeze(-1))
    prior = half_normal(g[0]) + half_normal(g[1])
    return prior + normal(
        y, torch.zeros(()).double(), covariance + 0.25 * torch.eye(len(y)).double()
    )


def increments(y: Tensor) -> None:
    step = pyro.sample("step", dist.HalfNormal(1.0))
    with pyro.plate("times", len(y)):
        x = pyro.sample("dx", dist.Normal(0.0, step)).cumsum(-1)
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def exact_increments(y: Tensor, g: Tensor) -> Tensor:
    times = torch.arange(1, len(y) + 1).double()
    covariance = g[0].exp() ** 2 * torch.minimum(times, times.unsqueeze(-1))
    zero = torch.zeros(()).double()
    return half_normal(g[0]) + normal(y, zero, covariance + 0.25 * torch.eye(len(y)).double())


CASES = {
    "groups": (groups, exact_groups, (12, 3)),
    "level": (level, exact_level, (40,)),
    "crossed": (crossed, exact_crossed, (len(CELLS),)),
    "increments": (increments, exact_increments, (25,)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_exact_for_normal_locals(name: str, device: torch.device) -> None:
    model, exact, shape = CASES[name]
    y = torch.randn(shape)
    marginal = marginal_of(model, y, device=device)
    g = marginal.initial.double() + 0.5 * torch.randn(20, marginal.features).to(device).double()
    expected = torch.stack([exact(y, point) for point in g.cpu()]).to(device)
    torch.testing.assert_close(marginal.log_prob(g), expected)
    far = marginal.reference + torch.randn(20, len(marginal.reference)).to(device).double()
    torch.testing.assert_close(marginal.log_prob(g, far), expected)


def test_the_joint_density_factorises(device: torch.device) -> None:
    y = torch.randn(40)
    marginal = marginal_of(level, y, device=device)
    g = marginal.initial.double() + 0.3 * torch.randn(5, 2).to(device).double()
    given = marginal.condition(g, marginal.reference.expand(5, -1))
    x = given.sample(torch.randn_like(given.mean))
    joint = marginal.density.log_joint(marginal.join(g, x))
    torch.testing.assert_close(given.log_marginal + given.log_prob(x), joint)


def logit(y: Tensor) -> None:
    between = pyro.sample("between", dist.HalfNormal(1.0))
    with pyro.plate("groups", y.shape[-1]):
        effect = pyro.sample("effect", dist.Normal(0.0, between))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=3 * effect), obs=y)


def test_several_steps_reach_the_mode(device: torch.device) -> None:
    y = (torch.rand(5, 20) < torch.linspace(0.1, 0.9, 20)).float()
    marginal = marginal_of(logit, y, device=device)
    g = torch.tensor([[-1.0], [0.0], [1.5]]).to(device).double()
    given = marginal.condition(g, 8 * torch.randn(3, 20).to(device).double(), steps=25)
    z = marginal.join(g, given.mean).requires_grad_()
    (slope,) = torch.autograd.grad(marginal.density.log_joint(z).sum(), z)
    assert slope[:, marginal.structure.locals].abs().max() < 1e-6
    chance = torch.sigmoid(3 * given.mean)
    curvature = 5 * 9 * chance * (1 - chance) + (-2 * g).exp()
    laplace = -0.5 * (curvature / (2 * math.pi)).log().sum(-1)
    joint = marginal.density.log_joint(z)
    torch.testing.assert_close(given.log_marginal, joint.detach() + laplace)


def test_a_model_without_locals_is_its_own_marginal() -> None:
    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(weights.sum(), 1.0).expand([3]).to_event(1), obs=y)

    marginal = marginal_of(model, torch.randn(3))
    g = torch.randn(2, 5, 2).double()
    torch.testing.assert_close(marginal.log_prob(g), marginal.density.log_joint(g))


def kinks(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", y.shape[-1]):
        effect = pyro.sample("effect", dist.Laplace(0.0, scale))
        pyro.sample("y", dist.Normal(effect, scale), obs=y[0])


@pytest.mark.parametrize(("model", "expected"), [(groups, True), (logit, False), (kinks, False)])
def test_normal_locals_are_told_from_others(
    model: Callable[[Tensor], None], expected: bool
) -> None:
    assert marginal_of(model, torch.ones(6, 3)).is_normal is expected


# The mode


def test_the_mode_of_the_marginal(device: torch.device) -> None:
    y = torch.randn(12, 3) + torch.randn(12, 1)
    marginal = marginal_of(groups, y, device=device)
    mode = find_marginal_mode(marginal)
    assert mode.loc.device.type == mode.root.device.type == device.type
    exact, loc, root = functools.partial(exact_groups, y), mode.loc.cpu(), mode.root.cpu()
    hessian = -torch.autograd.functional.hessian(exact, loc)
    gradient = torch.autograd.functional.jacobian(exact, loc)
    assert mode.found
    assert mode.rounds < 10
    assert not find_marginal_mode(marginal, rounds=1).found
    # In units of the posterior's widths; differences over .3 of them see the third derivatives.
    assert (gradient @ root).norm() < 0.1
    assert (root.mT @ hessian @ root - torch.eye(3)).abs().max() < 0.2
    zero = torch.zeros(1, 12).to(device).double()
    direct = marginal.condition(mode.loc.unsqueeze(0), zero).mean
    torch.testing.assert_close(mode.reference, direct[0], rtol=0, atol=0.2)


def test_a_centred_hierarchy_is_kept_from_its_neck() -> None:
    y = 0.1 * torch.randn(8, 1)
    marginal = marginal_of(groups, y)
    mode = find_marginal_mode(marginal)
    assert mode.loc.abs().max() < 5
    assert torch.linalg.cond(mode.root) < 100


def test_the_mode_where_locals_are_not_normal() -> None:
    y = (torch.rand(5, 20) < torch.linspace(0.1, 0.9, 20)).float()
    marginal = marginal_of(logit, y)
    mode = find_marginal_mode(marginal)
    line = mode.loc + torch.linspace(-1, 1, 21).unsqueeze(-1).double() * mode.root
    values = marginal.log_prob(line, mode.reference)
    assert abs(int(values.argmax()) - 10) <= 1


def test_a_search_from_given_globals() -> None:
    marginal = marginal_of(groups, torch.randn(12, 3) + torch.randn(12, 1))
    usual = find_marginal_mode(marginal)
    mode = find_marginal_mode(marginal, start=torch.tensor([0.5, -0.5, 0.2]))
    assert (torch.linalg.solve(usual.root, mode.loc - usual.loc)).norm() < 0.3
    asked = []
    evaluate = marginal.evaluate
    marginal.evaluate = lambda g, *rest: (asked.append(g), evaluate(g, *rest))[1]
    find_marginal_mode(marginal, start=usual.loc, rounds=1)
    assert torch.equal(asked[0], usual.loc.unsqueeze(0))


class Exact:
    """A density of globals without a model."""

    is_normal = True
    reference = torch.zeros(0).double()

    def __init__(self, log_prob: Callable[[Tensor], Tensor], features: int) -> None:
        self.log_prob, self.features, self.values = log_prob, features, 0
        self.initial = torch.zeros(features)

    def evaluate(self, g: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        self.values += len(g)
        return self.log_prob(g), g.new_zeros(len(g), 0)


def test_many_globals_take_few_values() -> None:
    half = torch.randn(15, 15).double()
    precision = torch.eye(15).double() + half @ half.mT
    density = Exact(
        lambda g: MultivariateNormal(torch.ones(15).double(), precision).log_prob(g), 15
    )
    mode = find_marginal_mode(density)
    assert mode.found
    torch.testing.assert_close(mode.loc, torch.ones(15).double())
    torch.testing.assert_close(mode.root @ mode.root.mT, precision)
    assert density.values < 600


def test_of_many_rows_values_that_fall_by_far_within_a_step_are_told_apart() -> None:
    rows, groups = 4e5, 4e4

    def log_prob(g: Tensor) -> Tensor:
        mean, between, noise = g.unbind(-1)
        variance = (2 * between).exp() + (2 * noise).exp() / 10
        of_groups = variance.log() + (0.8 + (mean - 1) ** 2) / variance
        return -0.9 * rows * (noise + (-2 * noise).exp() / 8) - groups / 2 * of_groups

    mode = find_marginal_mode(Exact(log_prob, 3), start=torch.tensor([3.0, -1.0, 1.0]))
    assert mode.found
    torch.testing.assert_close(mode.loc[0], torch.tensor(1.0).double())


POLES = {
    "pole": lambda g: -g.sub(0.3).abs().log().sum(-1),
    "slope": lambda g: g.sum(-1).exp(),
    "cliff": lambda g: torch.where(g.sum(-1) < 0.1, g.sum(-1), -torch.inf),
    "rough": lambda g: -g.mul(1e6).sin().sum(-1),
}


@pytest.mark.parametrize("name", POLES)
def test_a_search_without_a_mode_ends_early(name: str) -> None:
    mode = find_marginal_mode(Exact(POLES[name], 2))
    assert not mode.found
    assert mode.rounds < 15
    assert mode.loc.isfinite().all()


def test_a_search_reads_the_deadline() -> None:
    marginal = marginal_of(groups, torch.randn(4, 2))
    with Deadline(0.0).enforced(), pytest.raises(TimeOver):
        find_marginal_mode(marginal)


def test_locals_without_globals() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("columns", 17):
            weights = pyro.sample("weights", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 17):
            pyro.sample("y", dist.Normal(weights + weights.sum(), 1.0), obs=y)

    marginal = marginal_of(model, torch.randn(17))
    mode = find_marginal_mode(marginal)
    assert mode.found
    assert mode.root.shape == (0, 0)


def test_no_start_is_told() -> None:
    marginal = marginal_of(groups, torch.randn(4, 2))
    marginal.initial = torch.full((3,), 1e6)
    with pytest.raises(ValueError, match="density is not zero"):
        find_marginal_mode(marginal)


def test_globals_at_which_the_model_fails_have_no_density() -> None:
    marginal = marginal_of(groups, torch.randn(6, 2))
    g = torch.zeros(2, 3).double()
    g[1, 1] = 1e4
    assert marginal.log_prob(g).isfinite().tolist() == [True, False]


def test_single_precision_is_kept() -> None:
    marginal = marginal_of(groups, torch.randn(6, 2))
    g = torch.zeros(2, 3)
    assert marginal.log_prob(g).dtype == torch.float
    torch.testing.assert_close(
        marginal.log_prob(g), marginal.log_prob(g.double()).float(), rtol=1e-5, atol=1e-4
    )
