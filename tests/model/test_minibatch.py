"""Log densities of a part of the data at a time, and trainings on them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyroflows as pf
from pyroflows.model import data as model_data
from pyroflows.model.minibatch import LoadedDensity, SubsampledDensity, log_density_of
from pyroflows.posterior.gaussian import fit_gaussians
from pyroflows.train.checkpoint import Checkpoint
from pyroflows.train.objectives import PathELBO
from pyroflows.train.training import train

ROWS = 53


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def regression_data(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2, generator=generator)
    y = x @ torch.tensor([1.0, -0.5]) + 0.3 + torch.randn(rows, generator=generator)
    return x, y


def line(x: Tensor) -> Tensor:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    return x @ weights + offset


def subsampling(x: Tensor, y: Tensor, part: int | None = 7) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=part) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ weights + offset, 1.0), obs=y[rows])


def loaded(rows: int = ROWS) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor) -> None:
        mean = line(x)
        with pyro.plate("data", rows, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return model


def scaled(x: Tensor, y: Tensor) -> None:
    mean = line(x)
    with poutine.scale(scale=ROWS / len(x)), pyro.plate("batch", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def loader(rows: int = ROWS, **options: Any) -> DataLoader:
    return DataLoader(
        TensorDataset(*regression_data(rows)), **{"batch_size": 10, "shuffle": True, **options}
    )


def points(features: int = 3, n: int = 5) -> Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(2))


@functools.cache
def whole() -> pf.model.LogDensity:
    return pf.model.LogDensity(subsampling, (*regression_data(), None))


# The density over all data


class Dicts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        x, y = regression_data()
        return {"y": y[row], "x": x[row]}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(list(zip(*regression_data(), strict=True)))


LOADERS: dict[str, Callable[[], tuple[Callable[..., None], DataLoader]]] = {
    "shuffled": lambda: (loaded(), loader()),
    "incomplete batches dropped": lambda: (loaded(), loader(drop_last=True)),
    "poutine.scale": lambda: (scaled, loader()),
    "dictionaries": lambda: (loaded(), DataLoader(Dicts(), batch_size=20)),
    "a stream": lambda: (loaded(), DataLoader(Stream(), batch_size=20)),
    "one batch": lambda: (loaded(), loader(batch_size=ROWS)),
}


@pytest.mark.parametrize(
    ("name", "streamed"),
    [*((name, False) for name in LOADERS), ("shuffled", True), ("a stream", True)],
)
def test_all_batches_of_a_loader_are_all_data(
    name: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streamed:
        monkeypatch.setattr(model_data, "KEPT_BYTES", 500)  # two batches
    model, data = LOADERS[name]()
    density = log_density_of(model, data)
    assert isinstance(density, LoadedDensity)
    state = torch.get_rng_state()
    found = density.full.value_and_grad(points())
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, whole().value_and_grad(points()), rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("method", ["log_joint", "site_terms"])
def test_what_belongs_to_one_batch_is_not_given_for_a_loader(method: str) -> None:
    full = log_density_of(loaded(), loader(shuffle=False)).full
    with pytest.raises(ValueError, match=f"Expected data given as args in {method}; got a loader"):
        getattr(full, method)(points())
    batch = full.bind(full.args)
    total = getattr(batch, method)(points())
    if method == "site_terms":
        total = sum(term.reshape(len(term), -1).sum(-1) for term in total.values())
    torch.testing.assert_close(total.detach(), batch.log_prob(points()))


def test_a_subsampled_plate_over_all_rows_is_an_ordinary_one() -> None:
    density = log_density_of(subsampling, regression_data())
    assert isinstance(density, SubsampledDensity)
    assert density.mode == density.full.mode == "captured"
    torch.testing.assert_close(
        density.full.value_and_grad(points()), whole().value_and_grad(points())
    )
    assert density.full.subsampled == {"data": (ROWS, 7)}


def test_a_model_that_sees_its_data_is_its_own_full_density() -> None:
    density = log_density_of(subsampling, (*regression_data(), None))
    assert type(density) is pf.model.LogDensity
    assert density.full is density


def test_the_full_model_has_all_data_in_its_trace() -> None:
    density = log_density_of(subsampling, regression_data())
    trace = poutine.trace(density.full.model).get_trace(*regression_data())
    assert trace.nodes["y"]["value"].shape == (ROWS,)
    assert trace.nodes["y"]["scale"] == 1


def test_pyro_is_left_as_it_was_even_by_a_model_that_fails() -> None:
    before = SubsampleMessenger.__dict__["_subsample"].__func__

    def fails(x: Tensor, y: Tensor) -> None:
        subsampling(x, y)
        raise RuntimeError("on purpose")

    log_density_of(subsampling, regression_data())
    density = log_density_of(subsampling, regression_data()).full
    density.model.model = fails  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="on purpose"):
        density.model(*regression_data())
    assert SubsampleMessenger.__dict__["_subsample"].__func__ is before


# Mini-batches


def five_rows(x: Tensor, y: Tensor) -> None:
    subsampling(x[:5], y[:5], 2)


@pytest.mark.parametrize("anchored", [False, True])
def test_the_mean_over_all_mini_batches_is_the_full_density(
    anchored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    density = log_density_of(five_rows, regression_data())
    if anchored:
        density.anchor(torch.full((3,), 0.2))  # type: ignore[union-attr]
    drawn = iter([torch.tensor(rows) for rows in itertools.combinations(range(5), 2)])
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: next(drawn))
    values, grads = zip(*(density.value_and_grad(points()) for _ in range(10)), strict=True)
    value, grad = density.full.value_and_grad(points())
    torch.testing.assert_close(torch.stack(values).mean(0), value)
    torch.testing.assert_close(torch.stack(grads).mean(0), grad)
    assert float(torch.stack(values).std(0).min()) > 0.1


@pytest.mark.parametrize("kind", ["plate", "loader"])
def test_an_anchor_takes_most_of_the_variance_away(kind: str) -> None:
    density: Any = (
        log_density_of(subsampling, regression_data())
        if kind == "plate"
        else log_density_of(loaded(), loader())
    )
    gaussian = fit_gaussians(density.full, density.initial.unsqueeze(0))[0].one(0)
    z = gaussian.loc + torch.randn(50, 3) @ gaussian.scale_tril.mT

    def variance() -> Tensor:
        return torch.stack([density.value_and_grad(z)[1] for _ in range(60)]).var(0).mean()

    before = variance()
    density.anchor(gaussian.loc)
    # In units of the posterior's width: N / n against 1 / n.
    assert variance() < before / 10
    torch.testing.assert_close(
        density.value_and_grad(gaussian.loc), density.full.value_and_grad(gaussian.loc)
    )
    density.anchor(torch.full((3,), torch.nan))
    torch.testing.assert_close(
        density.value_and_grad(gaussian.loc), density.full.value_and_grad(gaussian.loc)
    )


def test_every_evaluation_draws_one_mini_batch_for_all_points() -> None:
    density = log_density_of(subsampling, regression_data())
    same = torch.zeros(300, 3)  # more than one evaluation takes
    first, second = density.log_prob(same), density.log_prob(same)
    # Equal rows of one batched evaluation may differ by rounding.
    torch.testing.assert_close(first, first[:1].expand_as(first))
    torch.testing.assert_close(second, second[:1].expand_as(second))
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    third = density.log_prob(same)
    torch.manual_seed(4)
    assert torch.equal(density.log_prob(same), third)


def test_an_epoch_of_a_loader_sees_every_row_once() -> None:
    density = log_density_of(loaded(), loader(batch_size=5, drop_last=True))
    assert isinstance(density, LoadedDensity)
    for _ in range(2):
        seen = torch.cat([density._next_batch()[1] for _ in range(10)])
        assert len(seen.unique()) == 50


def test_two_plates_and_a_discrete_site() -> None:
    data = torch.randn(6, 4)

    def model(rows: int | None = 3, columns: int | None = 2) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with (
            pyro.plate("rows", 6, subsample_size=rows, dim=-2) as i,
            pyro.plate("columns", 4, subsample_size=columns, dim=-1) as j,
        ):
            which = pyro.sample("which", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(loc[which.long()], 1.0), obs=data[i][:, j])

    density = log_density_of(model)
    z = points(2)
    expected = pf.model.LogDensity(model, (None, None)).value_and_grad(z)
    torch.testing.assert_close(density.full.value_and_grad(z), expected)
    drawn = [density.log_prob(z) for _ in range(100)]
    error = torch.stack(drawn).mean(0) - expected[0]
    assert bool(
        (error.abs() < 4.5 * torch.stack(drawn).std(0) / 10).all()
    )  # a standard error of a mean of 100


@pytest.mark.slow
def test_a_sequential_plate_and_pyro_subsample() -> None:
    x, y = regression_data(6)

    def model(part: int | None = 2) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        for row in pyro.plate("sequential", 6, subsample_size=part):
            pyro.sample(
                f"x{int(row) if part is None else row}", dist.Normal(loc, 1.0), obs=x[row, 0]
            )
        with pyro.plate("batch", 6, subsample_size=part):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=pyro.subsample(y, event_dim=0))

    def mean_of(values: Any, n: int = 100) -> Tensor:
        return torch.stack([values() for _ in range(n)])

    density = log_density_of(model)
    z = points(1, 2)
    torch.testing.assert_close(
        density.full.log_prob(z), pf.model.LogDensity(model, (None,)).log_prob(z)
    )
    drawn = mean_of(lambda: density.log_prob(z))
    error = drawn.mean(0) - density.full.log_prob(z)
    assert bool((error.abs() < 4.5 * drawn.std(0) / 10).all())


# Trainings


def exact(rows: int) -> tuple[Tensor, Tensor]:
    x, y = regression_data(rows)
    design = torch.cat([x, torch.ones(rows, 1)], -1)
    precision = design.mT @ design + torch.diag(torch.tensor([0.25, 0.25, 1.0]))
    covariance = torch.linalg.inv(precision)
    return covariance @ design.mT @ y, covariance


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plate", "loader"])
def test_the_posterior_of_a_regression_by_mini_batches(kind: str) -> None:
    rows = 2000
    x, y = regression_data(rows)
    density = (
        log_density_of(subsampling, (x, y, 100))
        if kind == "plate"
        else log_density_of(loaded(rows), loader(rows, batch_size=100))
    )
    mean, covariance = exact(rows)
    flow = pf.Flow([pf.transforms.LowerTriangularAffine(3)]).double()
    # Off by a standard deviation, and half as wide again.
    root = torch.linalg.cholesky(covariance)
    flow.transform.layers[-1].set(mean + covariance.diagonal().sqrt(), 1.5 * root)  # type: ignore[operator]
    train(flow, density, [], 500, whitening_step_size=2e-2)
    loc, scale_tril = flow.transform.layers[-1].loc_and_scale_tril()  # type: ignore[operator]
    # The guide's moments are known exactly, so that nothing here is an error of sampling.
    assert float(((loc - mean) / covariance.diagonal().sqrt()).abs().max()) < 0.05
    assert (
        float(((scale_tril @ scale_tril.mT).diagonal() / covariance.diagonal()).log().abs().max())
        < 0.1
    )


@pytest.mark.parametrize("kind", ["plate", "loader", "loader with a generator"])
def test_a_killed_training_on_mini_batches_goes_on_to_the_same_result(
    kind: str, tmp_path: Any
) -> None:
    generator = torch.Generator() if "generator" in kind else None
    full: Any = log_density_of(
        *(
            (subsampling, regression_data())
            if kind == "plate"
            else (loaded(), loader(generator=generator))
        )
    )

    def fit(steps: int = 10**6, checkpoint: Checkpoint | None = None) -> Tensor:
        density = full if kind == "plate" else LoadedDensity(full.full)
        if generator is not None:
            generator.manual_seed(8)
        evaluate, left = type(density)._evaluate, itertools.count(steps, -1)

        def killed(points: Tensor) -> Any:
            if not next(left):
                raise KeyError("killed")
            return evaluate(density, points)

        density._evaluate = killed
        flow = pf.Flow([pf.transforms.LowerTriangularAffine(3)]).double()
        torch.manual_seed(3)
        train(flow, density, [], 20, objective=PathELBO(8), checkpoint=checkpoint)
        return torch.cat([p.detach().flatten() for p in flow.parameters()])

    path = tmp_path / "fit.pt"
    with pytest.raises(KeyError):
        fit(9, Checkpoint(path, every=0))  # in the second epoch of six batches
    assert torch.equal(fit(checkpoint=Checkpoint(path)), fit())


# Misuse


def latents_in_the_plate(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=7) as rows:
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y[rows])


def given_rows(x: Tensor, y: Tensor) -> None:
    mean = line(x[:5])
    with pyro.plate("data", len(x), subsample=torch.arange(5)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[:5])


def fixed_part(x: Tensor, y: Tensor) -> None:
    mean = line(x[:7])
    with pyro.plate("data", len(x), subsample_size=7) as rows:
        pyro.sample("y", dist.Normal(mean, torch.ones(7)), obs=y[rows])


def unscaled(x: Tensor, y: Tensor) -> None:
    mean = line(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def both(x: Tensor, y: Tensor) -> None:
    subsampling(*regression_data(), len(x))


def subsampled_rows(x: Tensor, y: Tensor, size: int) -> None:
    mean = line(x)
    with pyro.plate("data", size, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


class Once(IterableDataset):
    def __init__(self) -> None:
        self.rows = iter(list(zip(*regression_data(), strict=True)))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self.rows


MISUSE: dict[str, tuple[Callable[..., None], Callable[[], Any], type[Exception], str]] = {
    "latents": (
        latents_in_the_plate,
        regression_data,
        ValueError,
        "got 'effect' in plate 'data', of which each",
    ),
    "given rows": (
        given_rows,
        regression_data,
        ValueError,
        "got plate 'data' with 5 of 53 given by subsample=",
    ),
    "fixed part": (
        fixed_part,
        regression_data,
        ValueError,
        "runs on all 53 rows of plate 'data' too; got ValueError (Shape mismatch",
    ),
    "unscaled": (
        unscaled,
        loader,
        ValueError,
        "likelihood of a batch of 10 up to all 53 rows; got 'y' with scale 1",
    ),
    "indices and a loader": (
        both,
        loader,
        ValueError,
        "depends on the indices that a subsampled plate draws",
    ),
    "strings": (
        loaded(),
        lambda: DataLoader(["a", "b"]),
        TypeError,
        "a batch that is a list of str",
    ),  # type: ignore[arg-type]
    "numbers": (
        loaded(),
        lambda: DataLoader(torch.ones(3), batch_size=None),  # type: ignore[arg-type]
        TypeError,
        "a tensor without dimensions",
    ),
    "plate of another size": (
        lambda x, y: subsampled_rows(x, y, 80),
        loader,
        ValueError,
        "Expected plate 'data' of the size of the data, which are 53 rows; got size 80",
    ),
    "plate too small": (
        lambda x, y: subsampled_rows(x, y, 5),
        loader,
        ValueError,
        "Expected plate 'data' of at least the 10 rows of a batch; got size 5",
    ),
    "empty batches": (
        loaded(),
        lambda: DataLoader(torch.ones(3, 1), batch_size=2, collate_fn=lambda rows: []),  # type: ignore[arg-type]
        TypeError,
        "a batch that is a list of nothing",
    ),
    "rows of numbers": (
        loaded(),
        lambda: DataLoader(TensorDataset(torch.ones(3)), batch_size=None),
        TypeError,
        "a batch that is a list of tensors without dimensions",
    ),
    "nothing": (
        loaded(),
        lambda: DataLoader([]),
        ValueError,
        "at least one batch; got an empty one",
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case: str) -> None:
    model, args, error, message = MISUSE[case]
    with pytest.raises(error, match="Expected") as raised:
        log_density_of(model, args()).full.log_prob(points())
    assert message in str(raised.value)


def test_a_stream_that_runs_dry(monkeypatch: pytest.MonkeyPatch) -> None:
    density = log_density_of(loaded(), DataLoader(Once(), batch_size=10))
    torch.testing.assert_close(density.full.log_prob(points()), whole().log_prob(points()))
    with pytest.raises(ValueError, match="again and again; got one that has run dry"):
        density.log_prob(points())
    monkeypatch.setattr(model_data, "KEPT_BYTES", 0)
    with pytest.raises(ValueError, match="of the same 53 rows every time; got 0 this time"):
        log_density_of(loaded(), DataLoader(Once(), batch_size=10)).full.log_prob(points())


def test_an_argument_comes_from_one_place() -> None:
    rows = DataLoader(
        [{"x": x, "y": y} for x, y in zip(*regression_data(), strict=True)], batch_size=10
    )  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="each argument from the loader or from kwargs; got 'y' from both"
    ):
        log_density_of(loaded(), rows, {"y": regression_data()[1]})
