"""Locals that are not normal in small blocks, against integrals on fine grids."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from torch import Tensor

from pyroflows.guides.leaves import Leaves, integrate_leaves, leaves_are_small
from pyroflows.guides.marginal import Marginal
from pyroflows.guides.marginal_mode import find_marginal_mode
from pyroflows.guides.regressed_leaves import regress_leaves
from pyroflows.guides.warm_reference import WarmReference, regress_reference
from pyroflows.model import LogDensity
from pyroflows.model.structure import find_structure


class Case(NamedTuple):
    """A model, its data, and the log density of a block, at globals ``g`` and points of shape
    ``(m, entries)``; the entries of each block, the points of a grid along each of them, and how
    many nodes suffice."""

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    block: Callable[[int, Tensor, Tensor], Tensor]
    blocks: Tensor
    fine: int
    count: int


def half_normal(u: Tensor, scale: float = 1.0) -> Tensor:
    """The log density of the logarithm of a half-normal number."""
    return dist.HalfNormal(torch.tensor(scale).double()).log_prob(u.exp()) + u


def prior(g: Tensor) -> Tensor:
    """Of a mean and the logarithm of a scale, as all models have them."""
    return dist.Normal(0.0, 1.0).log_prob(g[0]) + half_normal(g[1])


def sample_prior() -> tuple[Tensor, Tensor]:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    return mean, pyro.sample("scale", dist.HalfNormal(1.0))


# One local a group

EFFECTS: dict[str, Callable[[Tensor, Tensor], dist.Distribution]] = {
    "logit": dist.Normal,
    "poisson": dist.Normal,
    "student": functools.partial(dist.StudentT, 3.0),
}
ROWS: dict[str, Callable[[Tensor], dist.Distribution]] = {
    "logit": lambda effect: dist.Bernoulli(logits=effect),
    "poisson": lambda effect: dist.Poisson(effect.exp()),
    "student": lambda effect: dist.Normal(effect, 0.7),
}


def single(kind: str, groups: int = 8, rows: int = 3) -> Case:
    effects, likelihood = EFFECTS[kind], ROWS[kind]

    def model(y: Tensor) -> None:
        mean, scale = sample_prior()
        with pyro.plate("groups", groups, dim=-1):
            effect = pyro.sample("effect", effects(mean, scale))
            with pyro.plate("rows", rows, dim=-2):
                pyro.sample("y", likelihood(effect), obs=y)

    y = likelihood(torch.linspace(-2, 2, groups)).sample((rows,))

    def block(number: int, g: Tensor, x: Tensor) -> Tensor:
        rows_of = likelihood(x).log_prob(y[:, number].double()).sum(-1)
        return effects(g[0], g[1].exp()).log_prob(x[:, 0]) + rows_of

    return Case(model, (y,), block, torch.arange(groups).unsqueeze(-1), 4001, 17)


# An intercept and a slope, or three coefficients, a group


def coefficients(entries: int, fine: int, groups: int = 4, rows: int = 6) -> Case:
    x = torch.stack([torch.linspace(-1, 1, rows) ** k for k in range(entries)], -1)

    def model(y: Tensor) -> None:
        mean, scale = sample_prior()
        with pyro.plate("groups", groups, dim=-1):
            each = dist.Normal(mean, scale).expand([groups, entries]).to_event(1)
            w = pyro.sample("w", each)
            with pyro.plate("rows", rows, dim=-2):
                pyro.sample("y", dist.Bernoulli(logits=x @ w.mT), obs=y)

    y = (torch.rand(rows, groups) < 0.7).float()

    def block(number: int, g: Tensor, w: Tensor) -> Tensor:
        likelihood = dist.Bernoulli(logits=w @ x.double().mT)
        own = dist.Normal(g[0], g[1].exp()).log_prob(w).sum(-1)
        return own + likelihood.log_prob(y[:, number].double()).sum(-1)

    places = torch.arange(groups * entries).reshape(groups, entries)
    return Case(model, (y,), block, places, fine, 7 if entries == 3 else 9)


# Schools of some classes


def schools(count: int = 3, classes: int = 2, pupils: int = 4) -> Case:
    of_class = torch.arange(count * classes) // classes

    def model(y: Tensor) -> None:
        mean, scale = sample_prior()
        with pyro.plate("schools", count):
            school = pyro.sample("school", dist.Normal(mean, scale))
        with pyro.plate("classes", count * classes, dim=-1):
            own = pyro.sample("own", dist.Normal(school[of_class], scale))
            with pyro.plate("pupils", pupils, dim=-2):
                pyro.sample("y", dist.Bernoulli(logits=own), obs=y)

    y = (torch.rand(pupils, count * classes) < 0.7).float()

    def block(number: int, g: Tensor, x: Tensor) -> Tensor:
        rows = y[:, of_class == number].double()
        scale = g[1].exp()
        first = dist.Normal(g[0], scale).log_prob(x[:, 0])
        others = dist.Normal(x[:, :1], scale).log_prob(x[:, 1:]).sum(-1)
        likelihood = dist.Bernoulli(logits=x[:, None, 1:]).log_prob(rows)
        return first + others + likelihood.sum((-1, -2))

    children = count + torch.arange(count * classes).reshape(count, classes)
    places = torch.cat([torch.arange(count).unsqueeze(-1), children], -1)
    return Case(model, (y,), block, places, 61, 9)


CASES: dict[str, Callable[[], Case]] = {
    "logit": lambda: single("logit"),
    "poisson": lambda: single("poisson"),
    "student": lambda: single("student"),
    "pairs": lambda: coefficients(2, 201),
    "triples": lambda: coefficients(3, 61),
    "schools": schools,
}


def marginal_of(case: Case, device: torch.device | None = None) -> Marginal:
    density = LogDensity(case.model, case.args, batch_size=32, device=device)
    return Marginal(density, find_structure(density))


def marginal_of_model(model: Callable[..., None], y: Tensor) -> Marginal:
    density = LogDensity(model, (y,), batch_size=64)
    return Marginal(density, find_structure(density))


@functools.cache
def prepare_on(name: str, device: torch.device) -> tuple[Case, Marginal]:
    case = CASES[name]()
    return case, marginal_of(case, device)


def prepare(name: str, device: torch.device = torch.device("cpu")) -> tuple[Case, Marginal]:
    return prepare_on(name, device)


class Grid(NamedTuple):
    """A block on a grid: its points ``(m, entries)``, their shares, and the log of its integral."""

    points: Tensor
    shares: Tensor
    log_integral: Tensor


def integrate_block(case: Case, number: int, g: Tensor, mean: Tensor, widths: Tensor) -> Grid:
    """The integral by the trapezium rule, over nine widths to both sides."""
    line = torch.linspace(-9, 9, case.fine, dtype=torch.double)
    own = case.blocks[number]
    units = torch.cartesian_prod(*[line] * len(own)).reshape(-1, len(own))
    points = mean[own] + widths[own] * units
    values = case.block(number, g, points)
    log_integral = torch.logsumexp(values, 0)
    cell = (widths[own] * (line[1] - line[0])).log().sum()
    return Grid(points, (values - log_integral).exp(), log_integral + cell)


def widths_of(marginal: Marginal, g: Tensor) -> tuple[Tensor, Tensor]:
    """The means and standard deviations of the locals by Laplace's approximation."""
    reference = marginal.reference.expand(len(g), -1)
    given = marginal.condition(g.to(reference), reference)
    columns = torch.eye(marginal.reference.numel()).to(reference)
    roots = torch.stack([given.normal.draw_centred(e.expand_as(reference)) for e in columns])
    return given.mean.cpu(), roots.square().sum(0).sqrt().cpu()


def exact_log_prob(case: Case, marginal: Marginal, g: Tensor) -> Tensor:
    means, widths = widths_of(marginal, g)
    totals = []
    for row, mean, width in zip(g, means, widths, strict=True):
        numbers = range(len(case.blocks))
        grids = [integrate_block(case, number, row, mean, width) for number in numbers]
        totals.append(prior(row) + torch.stack([grid.log_integral for grid in grids]).sum())
    return torch.stack(totals)


SOME = torch.tensor([[0.3, -0.2], [-0.5, 0.3]]).double()


@pytest.mark.parametrize("name", CASES)
def test_the_marginal_density(name: str, device: torch.device) -> None:
    case, marginal = prepare(name, device)
    g, expected = SOME.to(device), exact_log_prob(case, marginal, SOME).to(device)
    leaves = Leaves(marginal, case.count)
    values = leaves.log_prob(g, marginal.reference)
    assert (values - expected).abs().max() < 2e-3
    assert (marginal.log_prob(g) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", slow_but_for(["student"], ["logit", "poisson", "student"]))
def test_more_nodes_converge(name: str) -> None:
    case, marginal = prepare(name)
    expected = exact_log_prob(case, marginal, SOME)
    values = Leaves(marginal, 33).log_prob(SOME, marginal.reference)
    assert (values - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_conditional_distribution(name: str, device: torch.device) -> None:
    case, marginal = prepare(name, device)
    noise = torch.randn(20_000, 1, len(marginal.reference)).to(device).double()
    leaves, g = Leaves(marginal, case.count), SOME[:1].to(device)
    draws, values = leaves.sample(g, marginal.reference, noise)
    x = draws.squeeze(1).cpu()
    torch.testing.assert_close(values, leaves.log_prob(g, marginal.reference))
    means, widths = widths_of(marginal, g)
    for number, own in enumerate(case.blocks):
        grid = integrate_block(case, number, SOME[0], means[0], widths[0])
        mean = grid.shares @ grid.points
        centred = grid.points - mean
        scale = (grid.shares @ centred.square()).sqrt()
        ours, theirs = (x[:, own] - mean) / scale, centred / scale
        # First to third moments, and products of two entries, within five standard errors.
        for power in (1, 2, 3):
            _assert_same_mean(ours**power, theirs**power, grid.shares)
        _assert_same_mean(ours * ours[:, :1], theirs * theirs[:, :1], grid.shares)


def _assert_same_mean(ours: Tensor, theirs: Tensor, shares: Tensor) -> None:
    expected = shares @ theirs
    deviation = (shares @ (theirs - expected).square()).sqrt()
    error = (ours.mean(0) - expected).abs()
    assert (error < 5 * deviation / math.sqrt(len(ours))).all()


def test_heavy_tails() -> None:
    def model(y: Tensor) -> None:
        mean, scale = sample_prior()
        with pyro.plate("groups", y.shape[-1]):
            effect = pyro.sample("effect", dist.StudentT(3.0, mean, scale))
            pyro.sample("y", dist.Bernoulli(logits=effect), obs=y)

    marginal = marginal_of_model(model, torch.ones(8))
    # Substitution of a sine hyperbolic reaches as far as the tail does.
    step = torch.linspace(-16, 16, 4001).double()
    expected = []
    for g in SOME:
        effects = g[0] + step.sinh()
        terms = dist.StudentT(3.0, g[0], g[1].exp()).log_prob(effects)
        terms += torch.nn.functional.logsigmoid(effects) + step.cosh().log()
        expected.append(prior(g) + 8 * (terms.logsumexp(0) + (step[1] - step[0]).log()))
    values = Leaves(marginal, 33).log_prob(SOME, marginal.reference)
    torch.testing.assert_close(values, torch.stack(expected), rtol=0, atol=2e-3)


def test_cliffs_far_out() -> None:
    def model(y: Tensor) -> None:
        mean, scale = sample_prior()
        with pyro.plate("groups", len(y)):
            size = pyro.sample("size", dist.LogNormal(mean, 1.0))
            pyro.sample("y", dist.Normal(size, scale), obs=y)

    y = torch.tensor([0.1, 0.4, 1.0, 3.0])
    marginal = marginal_of_model(model, y)
    noise = torch.randn(2000, 1, 4).double()
    x, _ = Leaves(marginal, 33).sample(SOME[:1], marginal.reference, noise)
    line = torch.linspace(-7, 7, 2001).double().unsqueeze(-1)
    terms = dist.Normal(y.double(), SOME[0, 1].exp()).log_prob((SOME[0, 0] + line).exp())
    shares = (terms - line.square() / 2).softmax(0)
    mean = (shares * (SOME[0, 0] + line)).sum(0)
    scale = (shares * (SOME[0, 0] + line - mean).square()).sum(0).sqrt()
    assert ((x.squeeze(1).mean(0) - mean).abs() < 5 * scale / len(x) ** 0.5).all()


def test_quantiles_of_the_noise_become_quantiles_of_the_draws() -> None:
    (case, marginal), n = prepare("poisson"), 400
    means, widths = widths_of(marginal, SOME[:1])
    levels = (torch.arange(n).double() + 0.5) / n
    noise = torch.special.ndtri(levels).reshape(-1, 1, 1).expand(-1, -1, len(case.blocks))
    x, _ = Leaves(marginal, 17).sample(SOME[:1], marginal.reference, noise)
    for number in range(len(case.blocks)):
        grid = integrate_block(case, number, SOME[0], means[0], widths[0])
        found = torch.searchsorted(grid.points[:, 0], x[:, 0, number].contiguous())
        below = grid.shares.cumsum(0) - grid.shares / 2
        assert (below[found] - levels).abs().max() < 3e-3


# Normal locals, and blocks of several sizes


def normals(y: Tensor) -> None:
    mean, scale = sample_prior()
    with pyro.plate("groups", y.shape[-1]):
        first = pyro.sample("first", dist.Normal(mean, scale))
        second = pyro.sample("second", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(first + second, 0.5), obs=y)


def test_normal_locals_need_no_nodes() -> None:
    density = LogDensity(normals, (torch.randn(6),), batch_size=8)
    marginal = Marginal(density, find_structure(density))
    leaves = integrate_leaves(marginal, SOME, marginal.reference)
    expected = marginal.log_prob(SOME)
    values = leaves.log_prob(SOME, marginal.reference)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-9)
    noise = torch.randn(2, 12).double()
    x, _ = leaves.sample(SOME, marginal.reference, noise)
    given = marginal.condition(SOME, marginal.reference.expand(2, -1))
    torch.testing.assert_close(x, given.sample(noise), rtol=0, atol=0.01)


def test_blocks_of_several_sizes() -> None:
    """Schools of one to four classes, and classes without a school."""
    of_class = torch.tensor([0, 1, 1, 2, 2, 2, 2])

    def model(y: Tensor, z: Tensor) -> None:
        mean, scale = sample_prior()
        with pyro.plate("alone", len(z)):
            effect = pyro.sample("effect", dist.Normal(mean, scale))
            pyro.sample("z", dist.Bernoulli(logits=effect), obs=z)
        with pyro.plate("schools", 3):
            school = pyro.sample("school", dist.Normal(mean, scale))
        with pyro.plate("classes", len(of_class)):
            own = pyro.sample("own", dist.Normal(school[of_class], scale))
            pyro.sample("y", dist.Bernoulli(logits=2 * own), obs=y)

    y, z = torch.tensor([0.0, 1, 1, 0, 0, 1, 0]), torch.tensor([1.0, 0, 1])
    density = LogDensity(model, (y, z), batch_size=8)
    marginal = Marginal(density, find_structure(density))
    assert sorted(marginal.structure.block_sizes.tolist()) == [1, 1, 1, 2, 3, 5]
    line = torch.linspace(-9, 9, 401, dtype=torch.double)
    weights = dist.Normal(0.0, 1.0).log_prob(line) + (line[1] - line[0]).log()
    expected = []
    for g in SOME:
        effects = g[0] + g[1].exp() * line
        single = dist.Bernoulli(logits=effects).log_prob(z.double().unsqueeze(-1))
        owns = effects.unsqueeze(-1) + g[1].exp() * line
        rows = dist.Bernoulli(logits=2 * owns).log_prob(y.double()[:, None, None])
        classes = torch.logsumexp(rows + weights, -1)
        of_school = torch.zeros(3, len(line)).double().index_add(0, of_class, classes)
        terms = torch.cat([single, of_school]) + weights
        expected.append(prior(g) + torch.logsumexp(terms, -1).sum())
    values = Leaves(marginal, 33).log_prob(SOME, marginal.reference)
    torch.testing.assert_close(values, torch.stack(expected), rtol=0, atol=1e-4)


# The number of nodes, and what is refused


def test_nodes_follow_the_model() -> None:
    easy, hard = marginal_of(single("logit", rows=8)), marginal_of(single("logit", groups=300))
    g = SOME[:1] + 0.2 * torch.randn(20, 2).double()
    assert integrate_leaves(easy, g, easy.reference).nodes.count == 5
    found = integrate_leaves(hard, g, hard.reference)
    assert found.settled
    more = Leaves(hard, 33)
    change = more.log_prob(g, hard.reference) - found.log_prob(g, hard.reference)
    assert abs(float(change.mean())) < 0.01
    assert change.std() < 0.02


def test_too_few_nodes_are_told() -> None:
    """A mixture of two narrow normals a group, between which no polynomial goes."""

    def model(y: Tensor) -> None:
        mean, scale = sample_prior()
        with pyro.plate("groups", len(y)):
            effect = pyro.sample("effect", dist.Normal(mean, scale))
            pyro.sample("y", dist.Normal(10 * effect.square(), 0.1), obs=y)

    density = LogDensity(model, (torch.full((5,), 10.0),), batch_size=8)
    marginal = Marginal(density, find_structure(density))
    g = 0.1 * torch.randn(6, 2).double()
    assert not integrate_leaves(marginal, g, marginal.reference + 1).settled


def test_deep_blocks_are_refused() -> None:
    case = coefficients(5, 1, rows=8)
    marginal = marginal_of(case)
    assert not leaves_are_small(marginal)
    with pytest.raises(ValueError, match="blocks of 1 to 4 levels of locals; got 5"):
        integrate_leaves(marginal, SOME, marginal.reference)


@pytest.mark.parametrize("name", CASES)
def test_small_blocks_are_told(name: str) -> None:
    assert leaves_are_small(prepare(name)[1])


def test_globals_at_which_the_model_fails_have_no_density() -> None:
    marginal = prepare("logit")[1]
    g = SOME.clone()
    g[1, 1] = 1e4
    leaves = Leaves(marginal, 7)
    assert leaves.log_prob(g, marginal.reference).isfinite().tolist() == [True, False]
    assert not integrate_leaves(marginal, g[1:].expand(9, -1), marginal.reference).settled
    assert leaves.sample(g, marginal.reference)[0].isfinite().all()


def test_nodes_at_which_the_model_fails() -> None:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 4):
            effect = pyro.sample("effect", dist.Normal(mean, 1.0))
            # Not a number beyond four, where the last node lies.
            pyro.factor("end", torch.log(4 - (effect - mean)))

    density = LogDensity(model, batch_size=8)
    marginal = Marginal(density, find_structure(density))
    leaves = Leaves(marginal, 9)
    g = SOME[:, :1]
    values = leaves.log_prob(g, marginal.reference)
    expected = dist.Normal(0.0, 1.0).log_prob(g[:, 0]) + 4 * math.log(4)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-2)


def test_single_precision_is_kept() -> None:
    marginal = prepare("logit")[1]
    leaves = Leaves(marginal, 7)
    values = leaves.log_prob(SOME.float(), marginal.reference)
    x, _ = leaves.sample(SOME.float(), marginal.reference)
    assert values.dtype == x.dtype == torch.float
    expected = leaves.log_prob(SOME, marginal.reference).float()
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-3)


# A reference that follows the globals


def test_one_step_from_a_warm_reference() -> None:
    marginal = prepare("logit")[1]
    root = torch.tensor([[0.4, 0.0], [0.1, 0.3]]).double()
    loc = SOME[0]
    at_loc = marginal.evaluate(loc)[1]
    warm = regress_reference(marginal, loc, root, at_loc)
    g = loc + torch.randn(20, 2).double() @ root.mT
    _, means = marginal.evaluate(g, at_loc)
    cold_error = (means - at_loc).abs().amax()
    assert (means - warm(g)).abs().amax() < cold_error / 2
    few = Leaves(marginal, 9, steps=1).log_prob(g, warm(g))
    many = Leaves(marginal, 9, steps=8).log_prob(g, at_loc)
    torch.testing.assert_close(few, many, rtol=0, atol=1e-4)


# Few nodes and a correction


@pytest.mark.parametrize(("name", "base"), [("logit", 1), ("schools", 5)])
def test_the_error_of_few_nodes_is_regressed(name: str, base: int) -> None:
    case, marginal = prepare(name)
    mode = find_marginal_mode(marginal)
    warm = regress_reference(marginal, mode.loc, mode.root, mode.reference)
    leaves = Leaves(marginal, case.count)
    leaves.error = 0.0, 0.0
    regressed = regress_leaves(leaves, warm)
    assert regressed.settled
    assert regressed.base.nodes.count == base
    g = mode.loc + torch.randn(30, 2).double() @ mode.root.mT
    expected = leaves.log_prob(g, warm(g))
    found = regressed.log_prob(g, warm(g)), marginal.log_prob(g, warm(g))
    ours, laplace = (float((values - expected).square().mean() ** 0.5) for values in found)
    assert ours < min(2 * regressed.error, laplace / 5)
    assert not regress_leaves(Leaves(marginal, 3), warm).settled


def test_nothing_is_regressed_where_the_model_fails() -> None:
    marginal = prepare("logit")[1]
    loc, root = torch.full((2,), 1e4).double(), torch.eye(2).double()
    warm = WarmReference(loc, root, marginal.reference, torch.zeros(2, 8).double())
    assert not regress_leaves(Leaves(marginal, 3), warm).settled
