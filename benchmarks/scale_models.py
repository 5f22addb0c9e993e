"""Models of ten to a hundred thousand latents, with data simulated from known parameters.

A name is a family and its sizes, such as ``groups-400`` or ``crossed-200x50``; any sizes will do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

FAMILIES: dict[str, Callable[..., Case]] = {}

NAMES = (
    "eight_schools",
    "funnel-100",
    "groups-50",
    "groups-400",
    "groups-4000",
    "groups-40000",
    "slopes-400",
    "schools-30",
    "crossed-60x30",
    "crossed-200x50",
    "crossed-400x50",
    "crossed-400x300",
    "items-100x20",
    "items-500x40",
    "level_increments-300",
    "level_increments-1000",
    "level_increments-10000",
    "level_states-300",
    "level_states-1000",
    "level_states-10000",
    "volatility-1000",
    "ar2-300",
    "counts-300",
    "regions-200",
    "logistic-1000",
    "logistic-10000",
    "logistic-100000",
    "logistic-1000000",
    "hierarchical_logistic-50x100000",
    "horseshoe-100",
    "network-50",
)
"""The models that the benchmark runs."""


# The two ways to write a local level are compared on the same data.
_DATA = {"level_increments": "level", "level_states": "level"}


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Args:
        model: The Pyro model.
        args: Its arguments.
        globals: The sites by which posteriors are compared.
        rows: Observations.
    """

    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    globals: tuple[str, ...]
    rows: int

    def double(self) -> Case:
        """The same case with data in double precision."""
        args = [value.double() if value.is_floating_point() else value for value in self.args]
        return replace(self, args=tuple(args))


def make_case(name: str) -> Case:
    """Simulates the data of a model, the same each time.

    Args:
        name: A family and its sizes, such as ``crossed-200x50``.

    Raises:
        ValueError: If there is no such family, or its sizes are not integers.

    >>> make_case("groups-50").rows
    500
    """
    family, sizes = split_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(_DATA.get(family, family).encode()))
        return FAMILIES[family](*sizes)


def split_name(name: str) -> tuple[str, list[int]]:
    """Takes a name apart into a family and its sizes.

    >>> split_name("crossed-200x50")
    ('crossed', [200, 50])
    """
    family, _, rest = name.partition("-")
    sizes = rest.split("x") if rest else []
    if family not in FAMILIES or not all(size.isdecimal() for size in sizes):
        raise ValueError(
            f"Expected a name such as groups-400, of a family among {', '.join(FAMILIES)}; "
            f"got {name!r}."
        )
    return family, [int(size) for size in sizes]


def _family(make: Callable[..., Case]) -> Callable[..., Case]:
    FAMILIES[make.__name__] = make
    return make


def _scales(width: float, *names: str) -> list[Tensor]:
    return [pyro.sample(name, dist.HalfNormal(width)) for name in names]


# Groups


@_family
def eight_schools() -> Case:
    """Centred eight schools."""

    def model(y: Tensor, error: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        between = pyro.sample("between", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            effect = pyro.sample("effect", dist.Normal(mean, between))
            pyro.sample("y", dist.Normal(effect, error), obs=y)

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Case(model, (y, error), ("mean", "between"), 8)


@_family
def funnel(count: int) -> Case:
    """Neal's funnel with an observation of each of its groups."""

    def model(y: Tensor) -> None:
        log_variance = pyro.sample("log_variance", dist.Normal(0.0, 3.0))
        with pyro.plate("groups", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, (log_variance / 2).exp()))
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    y = 0.4 * torch.randn(count) + torch.randn(count)
    return Case(model, (y,), ("log_variance",), count)


@_family
def groups(count: int) -> Case:
    """A hierarchical normal model with ten rows a group."""

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        between, within = _scales(5.0, "between", "within")
        with pyro.plate("groups", len(y), dim=-2):
            effect = pyro.sample("effect", dist.Normal(mean, between))
            with pyro.plate("rows", y.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(effect, within), obs=y)

    y = 1.0 + 0.5 * torch.randn(count, 1) + torch.randn(count, 10)
    return Case(model, (y,), ("mean", "between", "within"), y.numel())


@_family
def slopes(count: int) -> Case:
    """Intercepts and slopes that vary from county to county and are correlated."""

    def model(county: Tensor, x: Tensor, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(3.0 * torch.ones(2)).to_event(1))
        correlation = pyro.sample("correlation", dist.LKJCholesky(2, 2.0))
        (noise,) = _scales(3.0, "noise")
        with pyro.plate("counties", count):
            root = scale.unsqueeze(-1) * correlation
            line = pyro.sample("line", dist.MultivariateNormal(mean, scale_tril=root))
        with pyro.plate("rows", len(y)):
            expected = line[..., county, 0] + line[..., county, 1] * x
            pyro.sample("y", dist.Normal(expected, noise), obs=y)

    county = torch.arange(10 * count) % count
    root = torch.tensor([[0.8, 0.0], [-0.16, 0.3666]])
    line = torch.tensor([1.0, 0.5]) + torch.randn(count, 2) @ root.mT
    x = torch.randn(10 * count)
    y = line[county, 0] + line[county, 1] * x + torch.randn(10 * count)
    return Case(model, (county, x, y), ("mean", "scale", "correlation", "noise"), len(y))


@_family
def schools(count: int) -> Case:
    """Tests of pupils in classes in schools; classes and schools differ in size."""
    classes, pupils = 4 * count, 40 * count

    def model(school_of: Tensor, class_of: Tensor, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        names = ("between_schools", "between_classes", "between_pupils", "within")
        of_schools, of_classes, of_pupils, within = _scales(3.0, *names)
        with pyro.plate("schools", count, dim=-1):
            school = pyro.sample("school", dist.Normal(mean, of_schools))
        with pyro.plate("classes", classes, dim=-1):
            room = pyro.sample("class", dist.Normal(school[..., school_of], of_classes))
        with pyro.plate("pupils", pupils, dim=-1):
            pupil = pyro.sample("pupil", dist.Normal(room[..., class_of], of_pupils))
            with pyro.plate("tests", len(y), dim=-2):
                pyro.sample("y", dist.Normal(pupil, within), obs=y)

    school_of, class_of = torch.randint(count, (classes,)), torch.randint(classes, (pupils,))
    room = 1.0 + 0.5 * torch.randn(count)[school_of] + 0.4 * torch.randn(classes)
    y = room[class_of] + 0.7 * torch.randn(pupils) + torch.randn(3, pupils)
    names = ("mean", "between_schools", "between_classes", "between_pupils", "within")
    return Case(model, (school_of, class_of, y), names, y.numel())


# Crossed effects


@_family
def crossed(rows: int, columns: int) -> Case:
    """Effects of rows and of columns of a table, of which three cells in ten are observed."""

    def model(row: Tensor, column: Tensor, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        between_rows, between_columns, noise = _scales(3.0, "of_rows", "of_columns", "noise")
        with pyro.plate("rows", rows):
            a = pyro.sample("a", dist.Normal(0.0, between_rows))
        with pyro.plate("columns", columns):
            b = pyro.sample("b", dist.Normal(0.0, between_columns))
        with pyro.plate("cells", len(y)):
            pyro.sample("y", dist.Normal(mean + a[..., row] + b[..., column], noise), obs=y)

    cells = torch.randperm(rows * columns)[: 3 * rows * columns // 10]
    row, column = cells // columns, cells % columns
    effects = 0.7 * torch.randn(rows)[row] + 0.5 * torch.randn(columns)[column]
    y = 1.0 + effects + torch.randn(len(cells))
    return Case(model, (row, column, y), ("mean", "of_rows", "of_columns", "noise"), len(y))


@_family
def items(persons: int, count: int) -> Case:
    """Item response with two parameters an item."""

    def model(y: Tensor) -> None:
        of_slopes = pyro.sample("mean_slope", dist.Normal(0.0, 1.0))
        of_levels = pyro.sample("mean_level", dist.Normal(0.0, 2.0))
        between_slopes = pyro.sample("sd_slope", dist.HalfNormal(1.0))
        between_levels = pyro.sample("sd_level", dist.HalfNormal(2.0))
        people, tasks = pyro.plate("persons", persons, dim=-2), pyro.plate("items", count, dim=-1)
        with tasks:
            slope = pyro.sample("log_slope", dist.Normal(of_slopes, between_slopes)).exp()
            level = pyro.sample("level", dist.Normal(of_levels, between_levels))
        with people:
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with people, tasks:
            pyro.sample("y", dist.Bernoulli(logits=slope * (ability - level)), obs=y)

    slope, level = (0.2 + 0.4 * torch.randn(count)).exp(), 0.3 + torch.randn(count)
    y = torch.bernoulli((slope * (torch.randn(persons, 1) - level)).sigmoid())
    return Case(model, (y,), ("mean_slope", "mean_level", "sd_slope", "sd_level"), y.numel())


# Series


def _walk(length: int) -> Tensor:
    return (0.2 * torch.randn(length)).cumsum(0) + 0.5 * torch.randn(length)


@_family
def level_increments(length: int) -> Case:
    """A local level, written by its increments as one vectorised site."""

    def model(y: Tensor) -> None:
        step, noise = _scales(1.0, "step", "noise")
        with pyro.plate("times", len(y)):
            level = pyro.sample("increment", dist.Normal(0.0, step)).cumsum(-1)
            pyro.sample("y", dist.Normal(level, noise), obs=y)

    return Case(model, (_walk(length),), ("step", "noise"), length)


def _vector(name: str, length: int) -> Tensor:
    """A vector whose density is given by factors."""
    flat = dist.ImproperUniform(constraints.real_vector, (), (length,))
    return pyro.sample(name, flat)


@_family
def level_states(length: int) -> Case:
    """The same local level, written by its states as a vector with factors."""

    def model(y: Tensor) -> None:
        step, noise = _scales(1.0, "step", "noise")
        level = _vector("level", len(y))
        pyro.factor("start", dist.Normal(0.0, step).log_prob(level[..., 0]))
        moves = dist.Normal(level[..., :-1], step.unsqueeze(-1)).log_prob(level[..., 1:])
        pyro.factor("walk", moves.sum(-1))
        pyro.sample("y", dist.Normal(level, noise.unsqueeze(-1)).to_event(1), obs=y)

    return Case(model, (_walk(length),), ("step", "noise"), length)


@_family
def volatility(length: int) -> Case:
    """Stochastic volatility: the log variance is autoregressive."""

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        memory = pyro.sample("memory", dist.Beta(20.0, 1.5))
        (step,) = _scales(1.0, "step")
        h = _vector("h", len(y))
        stationary = dist.Normal(mean, step / (1 - memory.square()).sqrt())
        pyro.factor("start", stationary.log_prob(h[..., 0]))
        mean, memory, step = (value.unsqueeze(-1) for value in (mean, memory, step))
        moves = dist.Normal(mean + memory * (h[..., :-1] - mean), step).log_prob(h[..., 1:])
        pyro.factor("walk", moves.sum(-1))
        pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=y)

    h = [torch.randn(()) * 0.8]
    for noise in 0.25 * torch.randn(length - 1):
        h.append(0.95 * h[-1] + noise)
    y = (-0.5 + torch.stack(h) / 2).exp() * torch.randn(length)
    return Case(model, (y,), ("mean", "memory", "step"), length)


@_family
def ar2(length: int) -> Case:
    """A second-order autoregression that is observed with noise."""

    def model(y: Tensor) -> None:
        first, second = (pyro.sample(name, dist.Normal(0.0, 0.7)) for name in ("first", "second"))
        step, noise = _scales(1.0, "step", "noise")
        x = _vector("x", len(y))
        pyro.factor("start", dist.Normal(0.0, 1.0).log_prob(x[..., :2]).sum(-1))
        first, second, step, noise = (v.unsqueeze(-1) for v in (first, second, step, noise))
        expected = first * x[..., 1:-1] + second * x[..., :-2]
        pyro.factor("walk", dist.Normal(expected, step).log_prob(x[..., 2:]).sum(-1))
        pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    x = [*torch.randn(2)]
    for step in 0.5 * torch.randn(length - 2):
        x.append(1.5 * x[-1] - 0.7 * x[-2] + step)
    y = torch.stack(x) + 0.6 * torch.randn(length)
    return Case(model, (y,), ("first", "second", "step", "noise"), length)


# Fields


def matern(distances: Tensor, length: Tensor) -> Tensor:
    """The Matérn covariance of smoothness 3/2 and variance one, with a little noise.

    Args:
        distances: Distances between the points, of shape ``(n, n)``.
        length: Length scales of shape ``(*)``.
    """
    scaled = 3**0.5 * distances / length[..., None, None]
    return (1 + scaled) * (-scaled).exp() + 1e-4 * torch.eye(len(distances))


@_family
def counts(size: int) -> Case:
    """Counts whose log rate is a Gaussian process."""

    def model(distances: Tensor, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        length = pyro.sample("length", dist.LogNormal(-1.5, 0.5))
        (scale,) = _scales(2.0, "scale")
        root = torch.linalg.cholesky(matern(distances, length))
        process = dist.MultivariateNormal(
            mean.unsqueeze(-1) * torch.ones(len(y)), scale_tril=scale[..., None, None] * root
        )
        log_rate = pyro.sample("log_rate", process)
        pyro.sample("y", dist.Poisson(log_rate.exp()).to_event(1), obs=y)

    times = torch.linspace(0.0, 1.0, size)
    distances = (times[:, None] - times).abs()
    root = torch.linalg.cholesky(matern(distances, torch.tensor(0.2)))
    y = torch.poisson((1.0 + 0.8 * root @ torch.randn(size)).exp())
    return Case(model, (distances, y), ("mean", "length", "scale"), size)


def _grid(count: int) -> Tensor:
    """Pairs of neighbours in a map of ten regions a row, of shape ``(2, pairs)``."""
    places = torch.arange(count)
    right = places[(places % 10 < 9) & (places + 1 < count)]
    below = places[places + 10 < count]
    return torch.stack([torch.cat([right, below]), torch.cat([right + 1, below + 10])])


@_family
def regions(count: int) -> Case:
    """Cases of a disease by region; the risks of neighbours are alike (proper CAR)."""
    pairs = _grid(count)
    neighbours = torch.bincount(pairs.flatten(), minlength=count).float()
    adjacency = torch.zeros(count, count)
    adjacency[pairs[0], pairs[1]] = adjacency[pairs[1], pairs[0]] = 1.0
    scaled = adjacency / (neighbours[:, None] * neighbours).sqrt()
    eigenvalues = torch.linalg.eigvalsh(scaled.double()).float()

    def model(
        x: Tensor,
        expected: Tensor,
        y: Tensor,
        spectrum: Tensor,
        pairs: Tensor,
        neighbours: Tensor,
    ) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        precision = pyro.sample("precision", dist.Gamma(2.0, 0.5))
        share = pyro.sample("share", dist.Beta(2.0, 1.0))
        risk = _vector("risk", count)
        alike = (risk[..., pairs[0]] * risk[..., pairs[1]]).sum(-1)
        square = (neighbours * risk.square()).sum(-1) - 2 * share * alike
        log_det = (1 - share.unsqueeze(-1) * spectrum).log().sum(-1)
        log_det = log_det + neighbours.log().sum() + count * (precision / (2 * torch.pi)).log()
        pyro.factor("map", 0.5 * (log_det - precision * square))
        rate = expected * (level.unsqueeze(-1) + slope.unsqueeze(-1) * x + risk).exp()
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)

    covariance = torch.linalg.inv(4.0 * (neighbours.diag() - 0.95 * adjacency))
    risk = torch.linalg.cholesky(covariance) @ torch.randn(count)
    x, expected = torch.randn(count), 5 + 25 * torch.rand(count)
    y = torch.poisson(expected * (-0.2 + 0.3 * x + risk).exp())
    names = ("level", "slope", "precision", "share")
    return Case(model, (x, expected, y, eigenvalues, pairs, neighbours), names, count)


# Regressions


@_family
def logistic(rows: int) -> Case:
    """A logistic regression on ten covariates."""

    def model(x: Tensor, y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(10), 2.0).to_event(1))
        logits = level.unsqueeze(-1) + (x @ slope.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    x = torch.randn(rows, 10)
    y = torch.bernoulli((-0.5 + x @ torch.linspace(-1.0, 1.0, 10)).sigmoid())
    return Case(model, (x, y), ("level", "slope"), rows)


@_family
def hierarchical_logistic(count: int, rows: int) -> Case:
    """A logistic regression on five covariates, with a level for each group."""

    def model(group: Tensor, x: Tensor, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        (between,) = _scales(2.0, "between")
        slope = pyro.sample("slope", dist.Normal(torch.zeros(5), 2.0).to_event(1))
        with pyro.plate("groups", count):
            level = pyro.sample("level", dist.Normal(mean, between))
        logits = level[..., group] + (x @ slope.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    group, x = torch.randint(count, (rows,)), torch.randn(rows, 5)
    level = -0.5 + 0.8 * torch.randn(count)
    logits = level[group] + x @ torch.linspace(-1.0, 1.0, 5)
    y = torch.bernoulli(logits.sigmoid())
    return Case(model, (group, x, y), ("mean", "between", "slope"), rows)


@_family
def horseshoe(covariates: int) -> Case:
    """A regression of which few coefficients are not zero, with twice as many rows."""

    def model(x: Tensor, y: Tensor) -> None:
        overall = pyro.sample("overall", dist.HalfCauchy(0.1))
        (noise,) = _scales(2.0, "noise")
        with pyro.plate("covariates", covariates):
            own = pyro.sample("own", dist.HalfCauchy(1.0))
            slope = pyro.sample("slope", dist.Normal(0.0, overall * own))
        expected = (x @ slope.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(expected, noise), obs=y)

    slope = torch.zeros(covariates)
    slope[: covariates // 20] = 2.0
    x = torch.randn(2 * covariates, covariates)
    y = x @ slope + torch.randn(2 * covariates)
    return Case(model, (x, y), ("overall", "noise"), len(y))


@_family
def network(width: int) -> Case:
    """A Bayesian neural network of one input, one hidden layer and one output."""

    def model(x: Tensor, y: Tensor) -> None:
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        (noise,) = _scales(1.0, "noise")
        with pyro.plate("units", width):
            weight = pyro.sample("weight", dist.Normal(0.0, 2.0))
            shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
            out = pyro.sample("out", dist.Normal(0.0, width**-0.5))
        hidden = (x[:, None] * weight[..., None, :] + shift[..., None, :]).tanh()
        expected = bias.unsqueeze(-1) + (hidden @ out.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(expected, noise), obs=y)

    x = torch.linspace(-2.0, 2.0, 2 * width)
    y = (2 * x).sin() + 0.2 * torch.randn(2 * width)
    return Case(model, (x, y), ("bias", "noise"), len(y))
