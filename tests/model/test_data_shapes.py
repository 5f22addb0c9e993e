"""Which shapes of data, means, masks and factors a model may bring together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyroflows as pf
from pyroflows.model import LogDensity
from pyroflows.model.checks import check_data
from pyroflows.model.minibatch import log_density_of

N = 6
X = torch.linspace(-1.0, 1.0, N)
Y = 2 * X + 0.3 * torch.sin(37 * X)
Model = Callable[..., Any]


def regression(
    plates: tuple[tuple[int, int], ...] = (), x: Tensor = X, law: Callable[..., Any] | None = None
) -> Model:
    """A regression on x whose data stand in plates of given dimensions and sizes."""
    make = law or (lambda mean: dist.Normal(mean, 1.0))

    def model(y: Any) -> None:
        mean = pyro.sample("w", dist.Normal(0.0, 1.0)) * x
        stack = [pyro.plate(f"p{-dim}", size, dim=dim) for dim, size in plates]
        for plate in stack:
            plate.__enter__()
        pyro.sample("y", make(mean), obs=y)
        for plate in reversed(stack):
            plate.__exit__(None, None, None)

    return model


def constant(plates: tuple[tuple[int, int], ...] = ()) -> Model:
    return regression(plates, x=torch.tensor(1.0))


def vectors(mean: Tensor) -> Any:
    return dist.MultivariateNormal(mean.unsqueeze(-1) * torch.ones(2), torch.eye(2))


def event(mean: Tensor) -> Any:
    return dist.Normal(mean, 1.0).to_event(1)


def counts(mean: Tensor) -> Any:
    return dist.Poisson(mean.exp())


def categories(mean: Tensor) -> Any:
    return dist.Categorical(logits=torch.stack([mean, -mean], -1))


ROWS = ((-1, N),)
COLUMN = X[:, None]

# Each model with data that broadcast their site.
WRONG: dict[str, tuple[Model, Tensor]] = {
    "column": (regression(), Y[:, None]),
    "column in a plate": (regression(ROWS), Y[:, None]),
    "square": (regression(), Y.expand(N, N)),
    "square in a plate": (regression(ROWS), Y.expand(N, N)),
    "three rows": (regression(), Y.expand(3, N)),
    "three rows in a plate": (regression(ROWS), Y.expand(3, N)),
    "three dimensions": (regression(), Y.expand(2, 1, N)),
    "three dimensions in a plate": (regression(ROWS), Y.expand(2, 1, N)),
    "column of one mean in a plate": (constant(ROWS), Y[:, None]),
    "square of one mean in a plate": (constant(ROWS), Y.expand(N, N)),
    "too few rows": (regression(), Y[:4]),
    "too few rows in a plate": (constant(ROWS), Y[:4]),
    "three columns in a plate": (constant(ROWS), Y[:, None].expand(N, 3)),
    "row in a plate of rows": (constant(((-2, N),)), Y),
    "columns in a plate of rows": (constant(((-2, N),)), Y[:, None].expand(N, 3)),
    "column of inputs": (regression(x=COLUMN), Y),
    "column of inputs in a plate": (regression(ROWS, x=COLUMN), Y),
    "columns of inputs and data in a plate": (regression(ROWS, x=COLUMN), Y[:, None]),
    "column of inputs and a number in a plate": (regression(ROWS, x=COLUMN), torch.tensor(0.3)),
    "mean in a wrong plate": (regression(((-2, N),)), Y[:, None]),
    "square of means in a plate": (regression(ROWS, x=X * COLUMN), Y),
    "rows for many means": (regression(x=X * torch.ones(3, 1)), Y),
    "transposed plates": (constant(((-2, 2), (-1, 3))), torch.zeros(3, 2)),
    "a third dimension beside two plates": (constant(((-2, 2), (-1, 3))), torch.zeros(5, 2, 3)),
    "event as column": (regression(law=event), Y[:, None]),
    "event as number": (regression(law=event), torch.tensor(0.3)),
    "event of another size": (regression(law=event), Y[:4]),
    "vectors as column": (regression(ROWS, law=vectors), torch.zeros(N, 1, 2)),
    "vectors of another size": (regression(ROWS, law=vectors), torch.zeros(N, 3)),
    "vectors without rows": (regression(ROWS, law=vectors), torch.zeros(N, N, 2)),
    "counts as column": (regression(ROWS, law=counts), torch.ones(N, 1)),
    "categories as column": (regression(ROWS, law=categories), torch.ones(N, 1).long()),
}

# Each model with data that fit their site.
RIGHT: dict[str, tuple[Model, Any]] = {
    "rows": (regression(), Y),
    "rows in a plate": (regression(ROWS), Y),
    "draws of one distribution": (constant(), Y),
    "a column of draws of one distribution": (constant(), Y[:, None]),
    "a table of draws of one distribution": (constant(), torch.zeros(3, N)),
    "a number for all rows of a plate": (regression(ROWS), torch.tensor(0.3)),
    "one entry for all rows of a plate": (regression(ROWS), torch.tensor([0.3])),
    "one number for one mean in a plate": (constant(((-1, 3),)), torch.tensor(1.0)),
    "a float": (regression(ROWS), 0.3),
    "a number for all means": (regression(), torch.tensor(0.0)),
    "whole numbers": (regression(ROWS), torch.arange(N)),
    "column in a plate of rows": (constant(((-2, N),)), Y[:, None]),
    "columns of inputs and data": (regression(x=COLUMN), Y[:, None]),
    "columns of inputs and data in a plate of rows": (
        regression(((-2, N),), x=COLUMN),
        Y[:, None],
    ),
    "rows shared along a plate": (constant(((-2, 3), (-1, N))), Y),
    "columns shared along a plate": (constant(((-2, N), (-1, 3))), Y[:, None]),
    "a table in two plates": (constant(((-2, 3), (-1, N))), Y.expand(3, N)),
    "a model in a plate of particles": (regression(((-2, 3),)), Y),
    "series in a plate": (regression(((-1, N),), x=X * torch.ones(4, 1)), Y.expand(4, N)),
    "event": (regression(law=event), Y),
    "rows of events in a plate": (regression(((-1, 3),), law=event), Y.expand(3, N)),
    "one event for all rows of a plate": (regression(((-1, 3),), law=event), Y),
    "draws of one event": (regression(law=event), Y.expand(3, N)),
    "vectors": (regression(ROWS, law=vectors), torch.zeros(N, 2)),
    "one vector for all rows": (regression(ROWS, law=vectors), torch.zeros(2)),
    "counts": (regression(ROWS, law=counts), torch.ones(N)),
    "categories": (regression(ROWS, law=categories), torch.ones(N).long()),
    "categories as numbers": (regression(ROWS, law=categories), torch.ones(N)),
}


@pytest.mark.parametrize("validate", [True, False], ids=["validated", "unvalidated"])
@pytest.mark.parametrize("name", WRONG)
def test_data_that_broadcast_their_site_are_refused(name: str, validate: bool) -> None:
    model, y = WRONG[name]
    with pyro.validation_enabled(validate), pytest.raises(ValueError, match="'y'") as caught:
        LogDensity(model, (y,))
    said = str(caught.value)
    assert "\n" not in said
    assert f"observes shape {tuple(y.shape)}" in said


@pytest.mark.parametrize("name", WRONG)
def test_data_given_by_a_condition_are_refused_too(name: str) -> None:
    model, y = WRONG[name]
    trace = poutine.trace(poutine.condition(model, data={"y": y})).get_trace(None)
    with pytest.raises(ValueError, match=r"site 'y' observes shape"):
        check_data(trace)


@pytest.mark.parametrize("validate", [True, False], ids=["validated", "unvalidated"])
@pytest.mark.parametrize("name", RIGHT)
def test_data_that_fit_their_site_are_taken(name: str, validate: bool) -> None:
    model, y = RIGHT[name]
    with pyro.validation_enabled(validate):
        check_data(poutine.trace(model).get_trace(y))


@pytest.mark.parametrize(
    "name", ["a number for all rows of a plate", "a float", "a model in a plate of particles"]
)
def test_data_that_are_shared_count_for_each_row(name: str) -> None:
    model, y = RIGHT[name]
    density = LogDensity(model, (y,))
    conditioned = poutine.condition(model, data={"w": torch.tensor(0.7)})
    expected = poutine.trace(conditioned).get_trace(torch.as_tensor(y)).log_prob_sum()
    torch.testing.assert_close(density.log_prob(torch.tensor([0.7])), expected)


def test_a_vector_under_a_flow_counts_for_each_row_of_a_plate() -> None:
    flow = pf.RealNVP(features=2).eval()

    def model() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", flow(), obs=torch.zeros(2))

    standard_normal = dist.Normal(0.0, 1.0).log_prob(torch.zeros(()))
    found = LogDensity(model).log_prob(torch.zeros(1))
    torch.testing.assert_close(found, (1 + 3 * 2) * standard_normal)


def test_the_sentence_has_both_shapes_and_the_plate() -> None:
    model, y = WRONG["column in a plate"]
    with pytest.raises(ValueError, match="Expected data") as caught:
        LogDensity(model, (y,))
    assert str(caught.value) == (
        "Expected data of the shape of their site; site 'y' observes shape (6, 1) under a "
        "distribution of batch shape (6,) in plate 'p1' of 6 rows, which together make (6, 6)."
    )


# The same in other kinds of plates and sites


def test_a_column_in_a_stack_of_plates_is_refused() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate_stack("rows", (2, N)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=torch.zeros(2, N, 1))

    with pytest.raises(ValueError, match=r"'y' observes shape \(2, 6, 1\)"):
        LogDensity(model)


def test_a_column_under_an_expanded_distribution_is_refused() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0).expand([N]), obs=Y[:, None])

    with pytest.raises(ValueError, match=r"'y' observes shape \(6, 1\)"):
        LogDensity(model)


def test_a_column_in_a_subsampled_plate_is_refused() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", N, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(w * X[rows], 1.0), obs=Y[rows, None])

    with pytest.raises(
        ValueError, match=r"'y' observes shape \(2, 1\).*'rows' with 2 of \d+ rows,"
    ):
        log_density_of(model)


def test_a_column_of_a_loader_is_refused() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", N, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    loader = DataLoader(TensorDataset(X, Y[:, None]), batch_size=3)
    with pytest.raises(ValueError, match=r"'y' observes shape \(3, 1\)"):
        log_density_of(model, loader)


def test_a_column_that_is_bound_later_is_refused() -> None:
    density = LogDensity(regression(ROWS), (Y,))
    with pytest.raises(ValueError, match=r"'y' observes shape \(6, 1\)"):
        density.bind((Y[:, None],))


def mixture(y: Tensor) -> None:
    means = pyro.sample("means", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", N):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(means[k], 1.0), obs=y)


def test_a_column_beside_enumerated_sites_is_refused() -> None:
    assert LogDensity(mixture, (Y,)).batched
    with pytest.raises(ValueError, match=r"'y' observes shape \(6, 1\)"):
        LogDensity(mixture, (Y[:, None],))


def test_a_conditioned_latent_that_broadcasts_is_refused() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", N):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    assert LogDensity(poutine.condition(model, data={"z": Y})).features == 1
    with pytest.raises(ValueError, match=r"'z' observes shape \(6, 1\)"):
        LogDensity(poutine.condition(model, data={"z": Y[:, None]}))


def test_latents_that_meet_data_as_a_column_are_refused() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(N, 1), 1.0).to_event(2))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(a, 1.0), obs=Y)

    with pytest.raises(ValueError, match=r"batch shape \(6, 6\) in plate 'rows' of 6 rows"):
        LogDensity(model)


def test_a_series_of_any_length_under_a_homogeneous_hidden_markov_model() -> None:
    one, normal = torch.eye(1), dist.MultivariateNormal(torch.zeros(1), torch.eye(1))
    law = dist.GaussianHMM(normal, one, normal, one, normal)
    assert law.event_shape == (1, 1)
    check_data(poutine.trace(lambda: pyro.sample("y", law, obs=torch.zeros(5, 1))).get_trace())


# Masks, scales and factors


@pytest.mark.parametrize("kind", ["mask", "scale"])
@pytest.mark.parametrize("observed", [True, False])
def test_a_column_as_mask_or_scale_is_refused(kind: str, observed: bool) -> None:
    weights = {"mask": X[:, None] > 0, "scale": (2 + X)[:, None]}[kind]

    def model(weights: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", N), getattr(poutine, kind)(None, weights):
            pyro.sample("y", dist.Normal(w, 1.0), obs=Y if observed else None)

    run = poutine.trace(model).get_trace
    with pytest.raises(ValueError, match=r"'y' .* \(6,\) has one of shape \(6, 1\)"):
        check_data(run(weights))
    check_data(run(weights.squeeze(-1)))
    check_data(run(weights[0]))


def test_a_distribution_masked_by_a_column_is_refused() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(w * X, 1.0).mask(X[:, None] > 0), obs=Y)

    with pytest.raises(ValueError, match=r"'y' observes shape \(6,\).*batch shape \(6, 6\)"):
        LogDensity(model)


def factor_model(term: Callable[[Tensor], Tensor], plates: tuple[tuple[int, int], ...]) -> Model:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        stack = [pyro.plate(f"p{-dim}", size, dim=dim) for dim, size in plates]
        for plate in stack:
            plate.__enter__()
        pyro.factor("f", term(w))
        for plate in reversed(stack):
            plate.__exit__(None, None, None)

    return model


@pytest.mark.parametrize(
    "term",
    [lambda w: -((w * X - COLUMN) ** 2), lambda w: -((w - COLUMN) ** 2)],
    ids=["square", "column"],
)
def test_a_factor_beyond_its_plates_is_refused(term: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"'f' of shape \(6, .\) in plate 'p1' of 6 rows"):
        LogDensity(factor_model(term, ROWS))


@pytest.mark.parametrize(
    ("term", "plates"),
    [
        (lambda w: -((w - X) ** 2), ROWS),
        (lambda w: -(w**2), ROWS),
        (lambda w: -((w - X) ** 2), ()),
        (lambda w: -((w - X * COLUMN) ** 2), ()),
        (lambda w: -((w - X) ** 2), ((-2, 3), (-1, N))),
    ],
    ids=["rows", "number", "vector", "table", "two plates"],
)
def test_a_factor_within_its_plates_is_taken(
    term: Callable[[Tensor], Tensor], plates: tuple[tuple[int, int], ...]
) -> None:
    check_data(poutine.trace(factor_model(term, plates)).get_trace())
