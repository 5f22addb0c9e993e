"""The structure that is found of a model, against the one that its author knows."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.model import LogDensity
from pyroflows.model.coordinates import PartialSums
from pyroflows.model.curvature import multiply_hessian
from pyroflows.model.double import DoubleDensity
from pyroflows.model.sparsity import SymmetricEntries, find_entries
from pyroflows.model.structure import Structure, find_structure

Model = Callable[..., None]


def structure_of(model: Model, *args: Tensor) -> tuple[Structure, dict[str, Tensor]]:
    """The structure, and the entries of each site."""
    density = LogDensity(model, args)
    places = torch.arange(density.features).split([site.features for site in density.sites])
    names = [site.name for site in density.sites]
    return find_structure(density), dict(zip(names, places, strict=True))


def globals_of(structure: Structure, entries: dict[str, Tensor]) -> set[str]:
    chosen = set(structure.globals.tolist())
    for places in entries.values():
        shared = chosen.intersection(places.tolist())
        assert len(shared) in (0, len(places))
    return {name for name, places in entries.items() if places[0].item() in chosen}


def local_pairs(structure: Structure) -> set[tuple[int, int]]:
    """The edges between locals, by their entries."""
    pairs = structure.locals[structure.local_edges]
    return {(i, j) for i, j in pairs.tolist()}


def scales(*names: str) -> list[Tensor]:
    return [pyro.sample(name, dist.HalfNormal(2.0)) for name in names]


def groups(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    between, within = scales("between", "within")
    with pyro.plate("groups", len(y), dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, between))
        with pyro.plate("rows", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(effect, within), obs=y)


@pytest.mark.parametrize("count", [3, 50, 4000])
def test_groups_touch_no_other_group(count: int) -> None:
    structure, entries = structure_of(groups, torch.randn(count, 5))
    assert globals_of(structure, entries) == {"mean", "between", "within"}
    assert len(structure.local_edges) == 0
    assert len(structure.edges) >= 3 * count
    assert structure.block_sizes.tolist() == [1] * count


def test_rows_reached_by_indexing() -> None:
    county = torch.arange(60) % 12

    def model(x: Tensor, y: Tensor) -> None:
        (between,) = scales("between")
        with pyro.plate("counties", 12):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            level = pyro.sample("level", dist.Normal(0.0, between))
        with pyro.plate("rows", 60):
            mean = level[county] + slope[county] * x
            pyro.sample("y", dist.Bernoulli(logits=mean), obs=y)

    y = (torch.arange(60) % 3 == 0).float()
    structure, entries = structure_of(model, torch.randn(60), y)
    assert globals_of(structure, entries) == {"between"}
    pairs = zip(entries["slope"].tolist(), entries["level"].tolist(), strict=True)
    assert local_pairs(structure) == set(pairs)
    assert structure.block_sizes.tolist() == [2] * 12


def test_three_levels() -> None:
    school_of = torch.arange(24) // 4
    class_of = torch.arange(120) // 5

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        schools, classes, pupils, rest = scales("schools", "classes", "pupils", "rest")
        with pyro.plate("school", 6):
            a = pyro.sample("a", dist.Normal(mean, schools))
        with pyro.plate("class", 24):
            b = pyro.sample("b", dist.Normal(a[school_of], classes))
        with pyro.plate("pupil", 120):
            c = pyro.sample("c", dist.Normal(b[class_of], pupils))
            pyro.sample("y", dist.Normal(c, rest), obs=y)

    structure, entries = structure_of(model, torch.randn(120))
    assert globals_of(structure, entries) == {"mean", "schools", "classes", "pupils", "rest"}
    a, b, c = (entries[name] for name in "abc")
    up = [*zip(a[school_of].tolist(), b.tolist(), strict=True)]
    up += zip(b[class_of].tolist(), c.tolist(), strict=True)
    assert local_pairs(structure) == set(up)
    assert structure.block_sizes.tolist() == [25] * 6
    assert not structure.dense.any()


def test_crossed_siblings() -> None:
    torch.manual_seed(1)
    cells = torch.randperm(40 * 8)[:150]
    person, item = cells // 8, cells % 8

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        persons, items, rest = scales("persons", "items", "rest")
        with pyro.plate("person", 40):
            a = pyro.sample("a", dist.Normal(0.0, persons))
        with pyro.plate("item", 8):
            b = pyro.sample("b", dist.Normal(0.0, items))
        with pyro.plate("rows", 150):
            pyro.sample("y", dist.Normal(mean + a[person] + b[item], rest), obs=y)

    structure, entries = structure_of(model, torch.randn(150))
    assert globals_of(structure, entries) == {"mean", "persons", "items", "rest"}
    pairs = zip(entries["a"][person].tolist(), entries["b"][item].tolist(), strict=True)
    assert local_pairs(structure) == set(pairs)


def neighbours_in_time(entries: list[int]) -> set[tuple[int, int]]:
    return set(itertools.pairwise(entries))


def test_markov_chain() -> None:
    def model(y: Tensor) -> None:
        step, noise = scales("step", "noise")
        x = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x{t}", dist.Normal(x, step))
            pyro.sample(f"y{t}", dist.Normal(x, noise), obs=y[t])

    structure, entries = structure_of(model, torch.randn(20))
    assert globals_of(structure, entries) == {"step", "noise"}
    states = [int(entries[f"x{t}"]) for t in range(20)]
    assert local_pairs(structure) == neighbours_in_time(states)


def test_chain_as_a_vector_with_a_factor() -> None:
    def model(y: Tensor) -> None:
        step, noise = scales("step", "noise")
        flat = dist.ImproperUniform(dist.constraints.real_vector, (), (len(y),))
        x = pyro.sample("x", flat)
        pyro.factor("walk", dist.Normal(x[:-1], step).log_prob(x[1:]).sum())
        pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    structure, entries = structure_of(model, torch.randn(200))
    assert globals_of(structure, entries) == {"step", "noise"}
    assert local_pairs(structure) == neighbours_in_time(entries["x"].tolist())


def test_chain_as_a_vector_of_increments() -> None:
    def model(y: Tensor) -> None:
        step, noise = scales("step", "noise")
        with pyro.plate("times", len(y)):
            x = pyro.sample("dx", dist.Normal(0.0, step)).cumsum(-1)
            pyro.sample("y", dist.Normal(x, noise), obs=y)

    structure, entries = structure_of(model, torch.randn(90))
    assert globals_of(structure, entries) == {"step", "noise"}
    assert local_pairs(structure) == neighbours_in_time(entries["dx"].tolist())
    (chain,) = structure.coordinates.chains
    assert torch.equal(chain, entries["dx"].unsqueeze(0))


def test_a_long_chain_of_increments() -> None:
    def model(y: Tensor) -> None:
        (step,) = scales("step")
        with pyro.plate("times", len(y)):
            x = pyro.sample("dx", dist.Normal(0.0, step)).cumsum(-1)
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    structure, entries = structure_of(model, torch.randn(1200))
    assert local_pairs(structure) == neighbours_in_time(entries["dx"].tolist())


def test_a_local_trend_is_seen_by_sums_of_sums() -> None:
    def model(y: Tensor) -> None:
        (step,) = scales("step")
        with pyro.plate("times", len(y)):
            u = pyro.sample("u", dist.Normal(0.0, step))
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal((u.cumsum(-1) + v).cumsum(-1), 1.0), obs=y)

    structure, entries = structure_of(model, torch.randn(40))
    u, v = entries["u"].unsqueeze(0), entries["v"].unsqueeze(0)
    for chain, expected in zip(structure.coordinates.chains, (u, u, v), strict=True):
        assert torch.equal(chain, expected)
    assert len(structure.local_edges) < 4 * 80


def test_several_chains_of_increments() -> None:
    def model(y: Tensor) -> None:
        (step,) = scales("step")
        with pyro.plate("times", 12, dim=-2), pyro.plate("series", 3, dim=-1):
            x = pyro.sample("dx", dist.Normal(0.0, step)).cumsum(-2)
            pyro.sample("y", dist.Poisson(x.exp()), obs=y)

    structure, entries = structure_of(model, torch.ones(12, 3))
    chains = entries["dx"].reshape(12, 3).T
    pairs = [neighbours_in_time(chain) for chain in chains.tolist()]
    assert local_pairs(structure) == set().union(*pairs)
    assert structure.block_sizes.tolist() == [12] * 3


def test_sums_are_other_coordinates() -> None:
    twice = torch.tensor([[1, 3, 5], [2, 4, 6]])
    sums = PartialSums([twice, twice, torch.tensor([[5, 7, 0]])])
    z, weights = torch.randn(2, 4, 8, dtype=torch.double)
    w = sums.to_sums(z).requires_grad_()
    torch.testing.assert_close(sums.from_sums(w), z)
    (gradient,) = torch.autograd.grad((sums.from_sums(w) * weights).sum(), w)
    torch.testing.assert_close(gradient, sums.pull_back(weights))


def test_latents_of_a_gaussian_process_make_a_dense_block() -> None:
    x = torch.linspace(0, 1, 40)
    near = torch.exp(-8 * (x - x.unsqueeze(-1)).square())

    def model(y: Tensor) -> None:
        (size,) = scales("size")
        root = torch.linalg.cholesky(size**2 * near + 1e-2 * torch.eye(40))
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(40), scale_tril=root))
        pyro.sample("y", dist.Poisson(f.exp()).to_event(1), obs=y)

    structure, entries = structure_of(model, torch.ones(40))
    assert globals_of(structure, entries) == {"size"}
    assert structure.dense.tolist() == [True]
    assert not structure.coordinates.chains


def test_arrays_in_single_precision() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            effect = pyro.sample("effect", dist.Normal(slope * x, 1.0))
            buffer = torch.zeros(len(y))
            buffer[:] = effect  # rounds
            pyro.sample("y", dist.Normal(buffer, 1.0), obs=y)

    structure, entries = structure_of(model, torch.randn(60), torch.randn(60))
    assert globals_of(structure, entries) == {"slope"}
    assert len(structure.local_edges) == 0


def test_a_model_without_plates_has_globals_only() -> None:
    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        (noise,) = scales("noise")
        x = torch.vander(torch.linspace(-1, 1, len(y)), 3)
        pyro.sample("y", dist.Normal(x @ weights, noise).to_event(1), obs=y)

    structure, entries = structure_of(model, torch.randn(10))
    assert globals_of(structure, entries) == {"weights", "noise"}
    assert len(structure.locals) == len(structure.block_sizes) == 0


@pytest.mark.parametrize(("size", "count"), [(16, 16), (17, 0)])
def test_a_few_entries_that_all_touch_each_other_are_globals(size: int, count: int) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("columns", size):
            weights = pyro.sample("weights", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=x @ weights).to_event(1), obs=y)

    structure, _ = structure_of(model, torch.randn(30, size), torch.ones(30))
    assert len(structure.globals) == count
    assert structure.dense.tolist() == [True] * (count == 0)


def test_the_scale_of_a_global_is_one() -> None:
    def model(y: Tensor) -> None:
        width = pyro.sample("width", dist.HalfCauchy(1.0))
        between = pyro.sample("between", dist.HalfNormal(width))
        with pyro.plate("groups", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, between))
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    structure, entries = structure_of(model, torch.randn(30))
    assert globals_of(structure, entries) == {"width", "between"}


def test_a_plate_that_is_a_loop_has_locals() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        for i in pyro.plate("groups", len(y)):
            effect = pyro.sample(f"effect{i}", dist.Normal(mean, 1.0))
            pyro.sample(f"y{i}", dist.Normal(effect, 1.0), obs=y[i])

    structure, entries = structure_of(model, torch.randn(20))
    assert globals_of(structure, entries) == {"mean"}


# The search of entries


def sparse_matrix(size: int, edges: int, blocks: int = 0) -> Tensor:
    matrix = torch.zeros(size, size, dtype=torch.double)
    matrix[torch.randint(size, (edges,)), torch.randint(size, (edges,))] = 1 + torch.rand(
        edges, dtype=torch.double
    )
    matrix[:blocks, :blocks] = torch.randn(blocks, blocks, dtype=torch.double)
    matrix[0] = 1.0
    return matrix + matrix.mT + torch.eye(size, dtype=torch.double)


@pytest.mark.parametrize(("size", "edges", "block"), [(5, 3, 0), (600, 1500, 0), (1500, 900, 90)])
def test_every_entry_is_found(size: int, edges: int, block: int) -> None:
    matrix = sparse_matrix(size, edges, block)
    asked = []

    def multiply(directions: Tensor) -> Tensor:
        asked.append(len(directions))
        return directions @ matrix

    found = find_entries(multiply, matrix[0], torch.Generator().manual_seed(0))
    rows, columns = matrix.triu().nonzero().unbind(-1)
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.columns, columns)
    torch.testing.assert_close(found.values, matrix[rows, columns])
    assert sum(asked) <= min(size, 500) + 3


def test_entries_among_rounded_products() -> None:
    matrix = sparse_matrix(300, 500)

    def multiply(directions: Tensor) -> Tensor:
        return (directions.float() @ matrix.float()).double()

    found = find_entries(multiply, matrix[0], torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack([found.rows, found.columns], -1), matrix.triu().nonzero())


def test_too_many_dense_rows_are_refused() -> None:
    matrix = torch.ones(1200, 1200, dtype=torch.double)
    with pytest.raises(ValueError, match="entries that touch many"):
        find_entries(lambda v: v @ matrix, matrix[0], torch.Generator())


def test_products_of_entries() -> None:
    matrix = sparse_matrix(7, 5)
    rows, columns = torch.triu_indices(7, 7)
    entries = SymmetricEntries(7, rows, columns, matrix[rows, columns])
    directions = torch.randn(3, 7, dtype=torch.double)
    torch.testing.assert_close(entries.multiply(directions), directions @ matrix)


def test_hessian_products_agree_with_autograd() -> None:
    density = DoubleDensity(LogDensity(groups, (torch.randn(3, 4),)), 4)
    points = 0.3 * torch.randn(6, density.features, dtype=torch.double)
    directions = torch.randn(2, density.features, dtype=torch.double)
    found = multiply_hessian(density, points, directions)
    for i, point in enumerate(points):
        hessian = torch.autograd.functional.hessian(density.log_joint, point)
        torch.testing.assert_close(found.products[i], directions @ hessian)
    torch.testing.assert_close(found.values, density.log_joint(points))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_derivatives_by_some_sites_only(batch_size: int) -> None:
    density = DoubleDensity(LogDensity(groups, (torch.randn(3, 4),)), batch_size)
    points = 0.3 * torch.randn(4, density.features, dtype=torch.double)
    directions = torch.randn(2, density.features, dtype=torch.double)
    directions[:, :3] = 0
    every = multiply_hessian(density, points, directions)
    some = multiply_hessian(density, points, directions, {"mean", "between", "within"})
    torch.testing.assert_close(some.products[..., 3:], every.products[..., 3:])
    torch.testing.assert_close(some.gradients[:, 3:], every.gradients[:, 3:])
    assert not some.gradients[:batch_size, :3].any()
