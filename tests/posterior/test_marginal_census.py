"""The census of globals by values alone: what it finds, what it costs, and what it leaves be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from pyroflows._deadline import Deadline, TimeOver, check_time
from pyroflows.guides.marginal_mode import MarginalMode, find_marginal_mode
from pyroflows.posterior.census import Census
from pyroflows.posterior.gaussian import Gaussian
from pyroflows.posterior.marginal_census import (
    find_flat_ridge,
    missed_globals,
    take_marginal_census,
)


class Toy:
    """A log density of globals by a formula, as a marginal without locals, that counts values."""

    def __init__(self, formula: Callable[[Tensor], Tensor], features: int) -> None:
        self.formula, self.features = formula, features
        self.initial = torch.zeros(features).double()
        self.reference = torch.zeros(0).double()
        self.is_normal = True
        self.values = 0

    def log_prob(self, g: Tensor) -> Tensor:
        assert len(g), "a marginal takes at least one point"
        self.values += len(g)
        return self.formula(g)

    def evaluate(self, g: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prob(g), g.new_zeros(len(g), 0)

    def ascend(self, start: Tensor) -> MarginalMode:
        return find_marginal_mode(self, start=start)  # type: ignore[arg-type]

    def census(self, mode: MarginalMode, prior: Tensor | None = None, seed: int = 0) -> Census:
        self.values = 0
        return take_marginal_census(self.log_prob, mode, self.ascend, prior, seed=seed)


def normal(z: Tensor, loc: float = 0.0, scale: float = 1.0) -> Tensor:
    return Normal(loc, scale).log_prob(z)


def mixture(weights: list[float], parts: list[Tensor]) -> Tensor:
    logs = torch.tensor(weights).log()
    return torch.stack([log + part for log, part in zip(logs, parts, strict=True)]).logsumexp(0)


def banana(z: Tensor) -> Tensor:
    x, y = z[:, :2].unbind(-1)
    return normal(x, 0, 2) + normal(y - 0.5 * x.square(), 0, 0.3) + normal(z[:, 2:]).sum(-1)


@pytest.mark.parametrize("features", [1, 2, 5, 20])
def test_one_mode_is_one_and_costs_few_values(features: int) -> None:
    scales = torch.logspace(-2, 1, features).double()
    toy = Toy(lambda z: normal(z / scales).sum(-1), features)
    mode = toy.ascend(torch.zeros(features).double())
    census = toy.census(mode, torch.randn(20, features))
    assert census.finished and census.flat_direction is None
    assert census.weights.tolist() == [1.0]
    assert len(census.fits.loc) == 1
    assert toy.values < 700


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("features", [2, 12])
def test_a_sign_ambiguity_is_two_modes(features: int, seed: int) -> None:
    loadings = features // 2

    def formula(z: Tensor) -> Tensor:
        far = 2 * torch.arange(1, loadings + 1).to(z)
        signs = [normal(z[:, :loadings], k * far, 0.3).sum(-1) for k in (-1, 1)]
        return mixture([0.5, 0.5], signs) + normal(z[:, loadings:], 0.1, 0.2).sum(-1)

    toy = Toy(formula, features)
    census = toy.census(toy.ascend(torch.ones(features).double()), seed=seed)
    torch.testing.assert_close(census.weights, torch.full((2,), 0.5).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("features", [4, 10])
def test_a_mode_in_any_direction_is_found(features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(features, generator=generator).double()
    far = 7 * direction / direction.norm()

    def formula(z: Tensor) -> Tensor:
        return mixture([0.6, 0.4], [normal(z).sum(-1), normal(z - far).sum(-1)])

    toy = Toy(formula, features)
    census = toy.census(toy.ascend(torch.zeros(features).double()), seed=seed)
    expected = torch.tensor([0.6, 0.4]).double()
    torch.testing.assert_close(census.weights, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_narrow_mode_far_away_is_found_with_its_mass(seed: int) -> None:
    def formula(z: Tensor) -> Tensor:
        parts = [normal(z).sum(-1), normal(z - 8 / math.sqrt(2), 0, 0.3).sum(-1)]
        return mixture([0.8, 0.2], parts)

    toy = Toy(formula, 2)
    census = toy.census(toy.ascend(torch.zeros(2).double()), seed=seed)
    expected = torch.tensor([0.8, 0.2]).double()
    torch.testing.assert_close(census.weights, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_mode_in_the_neck_of_a_hierarchy_is_found(seed: int) -> None:
    def formula(z: Tensor) -> Tensor:
        mean, log_tau, log_s = z.unbind(-1)
        neck = normal(log_tau, -6, 1) + normal(mean, 0.5, 0.3)
        body = normal(log_tau, 0, 0.4) + normal(mean, 0, 0.5)
        return mixture([0.3, 0.7], [neck, body]) + normal(log_s, 0, 0.1)

    toy = Toy(formula, 3)
    census = toy.census(toy.ascend(torch.zeros(3).double()), 3 * torch.randn(20, 3), seed)
    expected = torch.tensor([0.7, 0.3]).double()
    torch.testing.assert_close(census.weights, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("features", [2, 6])
def test_a_curved_ridge_is_one_mode(features: int, seed: int) -> None:
    toy = Toy(banana, features)
    census = toy.census(toy.ascend(torch.zeros(features).double()), seed=seed)
    assert census.weights.tolist() == [1.0]


def heavy(z: Tensor) -> Tensor:
    return -(1 + z.square()).log().sum(-1)


def skewed(z: Tensor) -> Tensor:
    return (z - z.exp()).sum(-1)


@pytest.mark.parametrize("formula", [heavy, skewed])
@pytest.mark.parametrize("features", [3, 20])
def test_tails_that_are_not_normal_are_no_modes(
    formula: Callable[[Tensor], Tensor], features: int
) -> None:
    toy = Toy(formula, features)
    mode = toy.ascend(torch.zeros(features).double())
    census = toy.census(mode, 30 * torch.randn(20, features))
    assert census.weights.tolist() == [1.0] and census.flat_direction is None
    assert toy.values < 850


def test_a_density_that_does_not_fall_off_is_improper_even_if_it_fails_further_out() -> None:
    def formula(z: Tensor) -> Tensor:
        mean, log_tau = z.unbind(-1)
        law = normal(mean) + torch.logaddexp(normal(log_tau), torch.sigmoid(-9 * log_tau).log() - 3)
        return law.where(log_tau > -300, math.nan)

    toy = Toy(formula, 2)
    direction = toy.census(toy.ascend(torch.zeros(2).double())).flat_direction
    assert direction is not None
    assert direction[0].abs() < 1e-3 and direction[1] < 0


@pytest.mark.parametrize("allowed", [1, 3, 20])
def test_when_the_time_is_over_the_first_fit_is_left(allowed: int) -> None:
    toy = Toy(lambda z: -0.5 * ((z.squeeze(-1).abs() - 5) / 0.5).square(), 1)
    mode = toy.ascend(torch.ones(1).double())
    ticks = iter(range(1000))
    deadline = Deadline(allowed + 0.5, clock=lambda: next(ticks))

    def timed(z: Tensor) -> Tensor:
        check_time()
        return toy.formula(z)

    def ascend(start: Tensor) -> MarginalMode:
        raise TimeOver

    with deadline.enforced():
        census = take_marginal_census(timed, mode, ascend)
    assert not census.finished
    assert len(census.fits.loc) == 1 and not len(census.modes.loc)
    torch.testing.assert_close(census.best.loc, mode.loc)


def test_an_ascent_without_an_end_is_a_fit_but_no_mode() -> None:
    toy = Toy(lambda z: -0.5 * ((z.squeeze(-1).abs() - 5) / 0.5).square(), 1)
    mode = toy.ascend(torch.ones(1).double())

    def ascend(start: Tensor) -> MarginalMode:
        return toy.ascend(start)._replace(found=False)

    census = take_marginal_census(toy.log_prob, mode, ascend)
    assert len(census.fits.loc) == 2 and len(census.modes.loc) == 1


def test_the_mass_that_a_guide_misses() -> None:
    toy = Toy(lambda z: mixture([0.7, 0.3], [normal(z, 0, 1), normal(z, 9, 0.5)]).sum(-1), 1)
    census = toy.census(toy.ascend(torch.zeros(1).double()))
    missed = missed_globals(toy.log_prob, lambda z: normal(z).sum(-1), math.log(0.7), census.fits)
    assert float(missed.max()) == pytest.approx(0.3 / 0.7, rel=0.02)


def test_the_same_seed_gives_the_same_census_and_the_state_outside_is_left() -> None:
    toy = Toy(banana, 2)
    mode = toy.ascend(torch.zeros(2).double())
    state = torch.get_rng_state()
    first, second = toy.census(mode, seed=4), toy.census(mode, seed=4)
    assert torch.equal(first.fits.elbo, second.fits.elbo)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_ridge_is_followed_though_its_direction_is_rough() -> None:
    """A sum is known, and its terms are not; their direction is off in the fifth digit."""

    def log_prob(z: Tensor) -> Tensor:
        return -0.5 * (z[:, 0] + z[:, 1]).square() - 0.5 * z[:, 2].square()

    root = torch.tensor([[90.0, 0.0, 0.0], [-89.999, 0.9, 0.0], [1e-4, 0.0, 1.1]]).double()
    fit = Gaussian(torch.zeros(3).double(), root, math.nan)
    direction = find_flat_ridge(log_prob, fit)
    assert direction is not None
    assert (direction / direction[0] - torch.tensor([1.0, -1.0, 0.0])).abs().max() < 1e-4

    def proper(z: Tensor) -> Tensor:
        return log_prob(z) - 1e-4 * z[:, 0].abs()

    assert find_flat_ridge(proper, fit) is None
