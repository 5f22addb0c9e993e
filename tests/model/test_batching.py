"""Operations that vmap refuses, data read as numbers, and branches on latent sites, in a batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyroflows.model import LogDensity
from pyroflows.model.evaluator import agree

Y = torch.tensor([0.3, 1.7, 0.9, 2.4, 0.1])
Z = torch.tensor([[-1.3], [-0.4], [0.2], [0.8], [1.6], [2.3]])
Function = Callable[[Tensor, Tensor], Tensor]


def density_of(function: Function, *args: Tensor) -> LogDensity:
    """The density of data around a function of a latent site and of the data."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(function(x, y), 1.0), obs=y)

    return LogDensity(model, args or (Y,), batch_size=4)


def check(density: LogDensity, z: Tensor = Z) -> None:
    """Compares values and gradients with those of single traces."""
    alone = density.bind()
    alone._program = alone._evaluator.make_program(alone.inputs, 1, "loop")
    for found, right in zip(density.value_and_grad(z), alone.value_and_grad(z), strict=True):
        assert agree(found, right)
    z = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(density.log_joint(z).sum(), z)
    assert agree(slope, alone.value_and_grad(z.detach())[1])


# Writes in place


def by_entry(x: Tensor, y: Tensor) -> Tensor:
    loc = torch.zeros(5)
    for i in range(5):
        loc[i] = x * i
    return loc


def by_slices(x: Tensor, y: Tensor) -> Tensor:
    loc = torch.empty(5)
    loc[:2], loc[2:] = x, 2 * x
    loc += x
    loc.mul_(x).clamp_(min=-3)
    return loc


def by_index(x: Tensor, y: Tensor) -> Tensor:
    loc = torch.zeros(5)
    loc.index_put_((torch.tensor([0, 1]),), torch.stack([x, 2 * x]))
    loc[torch.tensor([2, 3])] = x
    loc.index_add_(0, torch.tensor([0, 4, 4]), torch.stack([x, x, x]))
    return loc


def into_rows_of_a_matrix(x: Tensor, y: Tensor) -> Tensor:
    matrix = torch.eye(2)
    row = matrix[0]
    row[1] = x
    matrix[1][0] = 2 * x
    matrix.diagonal().add_(x.exp())
    flat = matrix.view(-1)
    flat[0] += x
    return matrix.sum() + row.sum()


def into_copies_of_data(x: Tensor, y: Tensor) -> Tensor:
    loc = y.clone()
    loc[:1][0] = x
    rest = loc.narrow(0, 1, 4)
    rest.copy_(x)
    return loc + y


def by_swapped_dimensions(x: Tensor, y: Tensor) -> Tensor:
    loc = (x * y).reshape(5, 1)
    return loc.swapaxes_(0, 1).swapdims_(0, 1).transpose_(0, 1)[0]


def by_a_mask_of_data(x: Tensor, y: Tensor) -> Tensor:
    loc = x * y
    loc[y > 1] = 0.0
    loc[y < 0.5] = x
    return loc


def by_a_mask_of_latents(x: Tensor, y: Tensor) -> Tensor:
    loc = x * y - 0.5
    loc[loc > 0] = 1.0
    return loc


def through_data(x: Tensor, y: Tensor) -> Tensor:
    loc = x * y
    loc.data[loc != loc] = 0
    return loc


# Data read as numbers


def as_a_number(x: Tensor, y: Tensor) -> Tensor:
    return x * y.mean().item() + float(y[0])


def as_a_range(x: Tensor, y: Tensor) -> Tensor:
    total = 0 * x
    for i in range(int(y.max())):
        total = total + i * x
    for _ in range(y.max().long()):
        total = total + x
    return total


def as_a_branch(x: Tensor, y: Tensor) -> Tensor:
    return x if y.sum() > 5 else 2 * x


def as_a_list(x: Tensor, y: Tensor) -> Tensor:
    return x * sum(y.tolist()) + x * float(y.numpy().sum()) + x * float(np.asarray(y).max())


def as_a_selection(x: Tensor, y: Tensor) -> Tensor:
    places = torch.where(y > 1)[0]
    chosen = y[y > 1].mean() + y[places].sum() + (y > 1).nonzero().sum()
    return x * chosen + (x * y)[y > 1].sum() + torch.masked_select(x * y, y > 1).sum()


def as_counts(x: Tensor, y: Tensor) -> Tensor:
    return x * len(y.round().unique()) + torch.bincount(y.long()).sum()


# Other operations


def by_search(x: Tensor, y: Tensor) -> Tensor:
    steps = torch.tensor([-1.0, 0.0, 1.0])
    left = torch.searchsorted(steps, x.clamp(-2, 2))
    right = torch.bucketize(x * Y, steps, right=True)
    return y[left] * x + right


def as_a_place(x: Tensor, y: Tensor) -> Tensor:
    matrix = y.unsqueeze(-1) * torch.arange(3)
    matrix = matrix * matrix[: (x > 0).long() + 1].sum()
    place = (x > 0).long()
    return matrix[:, place] * x + matrix[place, 1] + matrix[..., -1 - place, None][:, 0]


def in_print(x: Tensor, y: Tensor) -> Tensor:
    assert f"{x}" and str(x) and f"{y.sum():.2f}"
    return x


# Branches on latent sites


def on_its_sign(x: Tensor, y: Tensor) -> Tensor:
    return x if x > 0 else 2 * x


def on_whether_any(x: Tensor, y: Tensor) -> Tensor:
    loc = x * y
    if not (loc > 2).any():
        return loc
    assert not torch.isnan(loc).any()
    return loc.clamp(max=2)


def on_a_whole_number(x: Tensor, y: Tensor) -> Tensor:
    total = x
    for i in range(int(x.abs()) + 1):
        total = total + i * x
    return total * torch.ones((x > 0).long() + 1).sum()


def on_a_comparison(x: Tensor, y: Tensor) -> Tensor:
    return x if torch.allclose(x, x.round(), atol=0.3) else x**2


FUNCTIONS: list[Function] = [
    *(by_entry, by_slices, by_index, into_rows_of_a_matrix, into_copies_of_data),
    *(by_swapped_dimensions, by_a_mask_of_data, by_a_mask_of_latents, through_data),
    *(as_a_number, as_a_range, as_a_branch, as_a_list, as_a_selection, as_counts),
    *(by_search, as_a_place, in_print),
    *(on_its_sign, on_whether_any, on_a_whole_number, on_a_comparison),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_batch_agrees_with_single_traces(function: Function) -> None:
    density = density_of(function)
    assert density.mode == "captured"
    check(density)


@pytest.mark.parametrize("function", [by_entry, as_a_branch, as_a_list, on_its_sign])
def test_without_a_capture_too(function: Function) -> None:
    density = density_of(function)
    density._program = density._evaluator.make_program(density.inputs, 4, "vmap")
    check(density)


@pytest.mark.parametrize("function", [as_a_number, as_a_range, as_a_branch, as_a_list])
def test_numbers_that_were_read_are_those_of_the_data_bound(function: Function) -> None:
    density = density_of(function)
    other = 3 - Y
    check(density.bind((other,)))
    torch.testing.assert_close(
        density.bind((other,)).log_prob(Z), density_of(function, other).log_prob(Z)
    )
    check(density)


def test_only_data_that_are_read_become_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(y: Tensor, lengths: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        for t in range(lengths.max()):
            with pyro.plate(f"rows {t}", 2), poutine.mask(mask=t < lengths):
                pyro.sample(f"y {t}", dist.Normal(0.0, scale), obs=y[:, t])

    y, lengths = torch.arange(6.0).reshape(2, 3), torch.tensor([3, 1])
    density = LogDensity(model, (y, lengths), batch_size=4)
    check(density)
    monkeypatch.setattr("pyroflows.model.evaluator.capture", None)  # the graph is shared
    check(density.bind((y + 1, lengths)))


def test_more_branches_than_are_followed_are_evaluated_alone() -> None:
    density = density_of(lambda x, y: x * int(10 * x))
    z = torch.linspace(-1.55, 1.55, 24).unsqueeze(-1)
    with pytest.warns(UserWarning, match="branches on values of its latent sites in more ways"):
        density.log_prob(z)
    check(density.bind((Y,)), z[::8])


def test_data_that_are_read_and_change_all_the_time_are_not_captured_every_time() -> None:
    density = density_of(as_a_number)
    modes = [density.bind((Y + i,)).mode for i in range(12)]
    assert modes[:4] == ["captured"] * 4
    assert modes[-1] == "vmap"
    check(density.bind((Y + 20,)))
    assert density.bind().mode == "captured"


def test_terms_follow_the_branches_of_each_point() -> None:
    density = density_of(on_its_sign)
    total = sum(term.reshape(len(Z), -1).sum(-1) for term in density.site_terms(Z).values())
    torch.testing.assert_close(total, density.log_prob(Z))


def test_an_error_on_a_branch_is_that_of_its_points_only() -> None:
    def refuse(x: Tensor, y: Tensor) -> Tensor:
        if x > 1:
            raise ValueError("x is too large. It must be small")
        return x

    density = density_of(refuse)
    value, _ = density.value_and_grad(Z)
    assert value.isnan().tolist() == (Z[:, 0] > 1).tolist()
    assert density.failures.reason == "x is too large"


def test_an_index_out_of_range_is_an_error_of_its_points_only() -> None:
    levels = torch.tensor([0.5, 1.0])

    def look_up(x: Tensor, y: Tensor) -> Tensor:
        return x * levels.tolist()[int(x.abs())]

    density = density_of(look_up)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, _ = density.value_and_grad(Z)
    assert density.mode == "captured"
    assert value.isnan().tolist() == (Z[:, 0].abs() >= 2).tolist()
    assert "out of range" in density.failures.reason


def test_functions_of_autograd_of_any_style() -> None:
    class Clipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * x.exp().clamp(max=2)

    density = density_of(lambda x, y: Clipped.apply(x))
    assert density.mode == "captured"
    check(density)
    assert math.isfinite(float(Clipped.apply(torch.tensor(1.0))))


# Slow ways


class Sinh(torch.autograd.Function):
    """A function that leaves torch, so that it takes batches, but neither vmap nor a capture."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sinh(x.detach().numpy()))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.from_numpy(np.cosh(x.detach().numpy()))


def through_numpy(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        slope = pyro.sample("slope", dist.Normal(x, 1.0))
        pyro.sample("y", dist.Normal(Sinh.apply(slope) + weights[..., 0], 1.0), obs=y)


def test_a_plate_around_the_model_comes_before_the_loop() -> None:
    with pytest.warns(UserWarning, match="cannot be captured as a graph of operations"):
        density = LogDensity(through_numpy, (Y,), batch_size=4)
    assert density.mode == "plate"
    assert density.batched
    torch.manual_seed(0)
    check(density, 0.5 * torch.randn(6, density.features))


def test_a_slow_way_is_told_once_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no capture today. Or ever")

    monkeypatch.setattr("pyroflows.model.evaluator.capture", refuse)
    with pytest.warns(UserWarning, match="slow. What the capture says: no capture today$") as told:
        density = density_of(by_entry)
    density.bind((Y + 1,)).log_prob(Z)
    assert density.mode == "vmap"
    assert len(told) == 1


class Lookup:
    """A table that a batch cannot read, because a branch looks for the shape of one point."""

    def __getitem__(self, index):
        if torch._C._functorch.is_batchedtensor(index):
            raise IndexError("one at a time")
        return 1.0 + index


def test_an_error_that_only_a_batch_raises_on_a_branch_is_no_failure_of_its_points():
    def model():
        x = pyro.sample("x", dist.Normal(-3.0, 1.0))
        pyro.factor("f", Lookup()[x] if x > 0 else 2.0 * x)

    density = LogDensity(model)
    z = torch.tensor([[-3.0], [1.0], [2.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = density.log_prob(z)
    prior = dist.Normal(-3.0, 1.0).log_prob(z[:, 0])
    assert torch.allclose(found, prior + torch.tensor([-6.0, 2.0, 3.0]))
