"""The block autoregressive layer: by hand, by quadrature, against autograd, and in the direction that is solved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from registry import C, D, context_for, normal_log_prob, perturbed, points
from torch import Tensor
from torch.func import jacrev

from pyroflows.transforms import Transform
from pyroflows.transforms.block_autoregressive import BlockAutoregressive, _Layer

DTYPES = [torch.float32, torch.float64]


def layers(t: BlockAutoregressive) -> list[_Layer]:
    return list(t._layers())


def made(
    device: torch.device, *args: Any, scale: float = 0.5, **options: Any
) -> BlockAutoregressive:
    torch.manual_seed(0)
    return perturbed(BlockAutoregressive(*args, **options).double(), scale).to(device)


# The mathematics


def test_one_hidden_layer_by_hand(device):
    t = made(device, 2, C, hidden=(3,), fast="forward")
    first, last = layers(t)
    assert first.lower is not None and first.context is not None and last.mixing is not None
    assert last.lower is not None and last.context is not None and first.steepness is not None
    x, c = points(t, 1).to(device)[0], context_for(t, 1).to(device)[0]
    y, log_det = t.forward_and_log_det(x, c)
    seen: list[Tensor] = []
    for i in range(2):
        free = first.bias[i] + first.context[i] @ c + (first.lower[i, :, 0, 0] * x[0] if i else 0)
        shift, gain = free[:3], (3 * torch.tanh(free[3:] / 3)).exp()
        bend = (5 * torch.tanh(first.steepness[i] / 5)).exp() - 1
        h = gain * x[i] + bend * torch.tanh(gain * x[i] + shift)
        slope = gain * (1 + bend / torch.cosh(gain * x[i] + shift) ** 2)
        free = last.bias[i] + last.context[i] @ c + (last.lower[i, :, 0] @ seen[0] if i else 0)
        seen.append(torch.tanh(gain * x[i] + shift))
        weights = (3 * torch.tanh(free[1] / 3)).exp() * last.mixing[i, 0].softmax(-1)
        torch.testing.assert_close(y[i], weights @ h + free[0])
        log_det = log_det - (weights @ slope).log()
    torch.testing.assert_close(log_det, torch.zeros_like(log_det))


def test_without_hidden_layers_it_is_an_affine_autoregression(device):
    t = made(device, 2, hidden=(), fast="forward")
    (layer,) = layers(t)
    assert layer.lower is not None
    x = points(t, 5).to(device)
    free = layer.bias[1] + layer.lower[1, :, 0, 0] * x[:, :1]
    gain = 3 * torch.tanh(torch.stack([layer.bias[0, 1].expand(5), free[:, 1]], -1) / 3)
    y, log_det = t.forward_and_log_det(x)
    torch.testing.assert_close(
        y, gain.exp() * x + torch.stack([layer.bias[0, 0].expand(5), free[:, 0]], -1)
    )
    torch.testing.assert_close(log_det, gain.sum(-1))


@pytest.mark.parametrize(
    ("order", "entries"),
    [("natural", [0, 1, 2, 3]), ("reversed", [3, 2, 1, 0]), ([2, 0, 3, 1], [2, 0, 3, 1])],
)
def test_the_jacobian_is_triangular_in_the_order(device, order, entries):
    t = made(device, 4, C, order=order)
    c = context_for(t, 1).to(device)[0]
    jacobian = jacrev(lambda y: t.inverse_and_log_det(y, c)[0])(points(t, 1).to(device)[0])[
        entries
    ][:, entries]
    assert bool((jacobian.triu(1) == 0).all()) and bool(
        (jacobian.tril() != 0)[torch.ones(4, 4).tril() > 0].all()
    )
    assert bool((jacobian.diagonal() > 0).all())
    _, log_det = t.inverse_and_log_det(points(t, 1).to(device)[0], c)
    torch.testing.assert_close(log_det, jacobian.diagonal().log().sum())


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("fast", ["inverse", "forward"])
def test_integrates_to_one_in_one_dimension(device, fast, scale):
    t = made(device, 1, fast=fast, scale=scale)
    # A grid where the mass is: the image of an even one.
    base = torch.linspace(-9, 9, 4001, dtype=torch.float64, device=device).unsqueeze(-1)
    with torch.no_grad():
        grid, _ = t.forward_and_log_det(base)
        back, log_det = t.inverse_and_log_det(grid)
    density = (normal_log_prob(back) + log_det).exp()
    assert float(torch.trapezoid(density, grid.squeeze(-1))) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("context_features", [None, C])
def test_integrates_to_one_in_two_dimensions(device, context_features):
    t = made(device, 2, context_features, hidden=(5, 4), order="reversed")
    c = context_for(t, 1)
    far = torch.linspace(-1, 1, 501, dtype=torch.float64, device=device).mul(6.0).sinh() / 4
    with torch.no_grad():
        grid = torch.cartesian_prod(far, far)
        back, log_det = t.inverse_and_log_det(grid, None if c is None else c.to(device))
    density = (normal_log_prob(back) + log_det).exp().reshape(501, 501)
    assert float(torch.trapezoid(torch.trapezoid(density, far), far)) == pytest.approx(
        1.0, abs=1e-3
    )
    assert bool((back.reshape(501, 501, 2)[0, 0] < -8).all()) and bool(
        (back.reshape(501, 501, 2)[-1, -1] > 8).all()
    )


@pytest.mark.parametrize("scale", [0.5, 20.0])
def test_every_entry_runs_over_the_whole_line(device, scale):
    t = made(device, D, fast="forward", scale=scale)
    line = torch.linspace(-1, 1, 501, dtype=torch.float64, device=device).mul(40).sinh()
    for i in range(D):
        x = points(t, 1).to(device).repeat(501, 1)
        x[:, i] = line
        with torch.no_grad():
            y = t.forward_and_log_det(x)[0][:, i]
        # Weights near a thousand are rounded away next to one another, but nothing decreases.
        assert bool((y.diff() > 0).all()) and float(y[0]) < -1e6 and float(y[-1]) > 1e6


# The direction that is solved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.5, 20.0])
@pytest.mark.parametrize("context_features", [None, C])
def test_the_solved_direction_leaves_no_residual(device, dtype, scale, context_features):
    t = made(device, D, context_features, scale=scale).to(dtype)
    x = (torch.linspace(-6, 6, 50, dtype=dtype, device=device).sinh()).unsqueeze(-1).repeat(1, D)
    c = context_for(t, 50, dtype=dtype)
    c = None if c is None else c.to(device)
    with torch.no_grad():
        y, log_det = t.forward_and_log_det(x, c)
        again, inverse_log_det = t.inverse_and_log_det(y, c)
    # Gains stretch the rounding of y by up to e^9, and steep activations that of shifts by up to e^5 more.
    shifts = scale * (1 + torch.maximum(x.abs(), y.abs()).amax(-1, keepdim=True))
    allowed = 20 * torch.finfo(dtype).eps * math.exp(9.0) * (1 + y.abs() + math.exp(5.0) * shifts)
    assert bool(((again - x).abs() <= allowed).all())
    if scale < 1:
        torch.testing.assert_close(
            again, x, rtol=2e3 * torch.finfo(dtype).eps, atol=2e3 * torch.finfo(dtype).eps
        )
        torch.testing.assert_close(
            inverse_log_det, -log_det, rtol=1e-3 if dtype == torch.float32 else 1e-10, atol=1e-3
        )


@pytest.mark.parametrize("context_features", [None, C])
def test_its_gradients_are_those_of_the_implicit_function_theorem(device, context_features):
    t = made(device, 2, context_features, hidden=(3,))
    x, c = points(t, 1).to(device)[0], context_for(t, 1)
    c = None if c is None else c.to(device)[0]
    parameters = list(t.parameters())
    y, _ = t.forward_and_log_det(x, c)
    jacobian = jacrev(lambda y: t.inverse_and_log_det(y, c)[0])(y.detach())
    for i in range(2):
        by_parameters = torch.autograd.grad(y[i], parameters, retain_graph=True, allow_unused=True)
        back, _ = t.inverse_and_log_det(y.detach(), c)
        weights = -torch.linalg.inv(jacobian)[i].detach()
        expected = torch.autograd.grad(weights @ back, parameters, allow_unused=True)
        for left, right in zip(by_parameters, expected, strict=True):
            assert left is not None and right is not None
            torch.testing.assert_close(left, right)


def test_the_two_kinds_are_inverse_to_each_other(device):
    scores, draws = (
        made(device, D, C, order="random"),
        made(device, D, C, order="random", fast="forward", scale=0.1),
    )
    draws.load_state_dict(scores.state_dict())
    x, c = points(scores, 20).to(device), context_for(scores, 20).to(device)
    for left, right in zip(
        scores.forward_and_log_det(x, c), draws.inverse_and_log_det(x, c), strict=True
    ):
        torch.testing.assert_close(left, right)
    for left, right in zip(
        scores.inverse_and_log_det(x, c), draws.forward_and_log_det(x, c), strict=True
    ):
        torch.testing.assert_close(left, right)
    assert "fast: scoring" in repr(scores) and "fast: sampling" in repr(draws)
    assert "fast: sampling" in repr(scores.inv)


@pytest.mark.parametrize("context_features", [None, C])
def test_the_score_is_pushed_without_a_search(device, context_features, monkeypatch):
    t = made(device, D, context_features, order=[2, 0, 1], fast="forward")
    x, c = points(t, 6).to(device), context_for(t, 6)
    c = None if c is None else c.to(device)
    expected = Transform.push_score(t, x, -x, c)

    def never(*_: Any) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr("pyroflows.transforms.block_autoregressive.invert", never)
    for left, right in zip(t.push_score(x, -x, c), expected, strict=True):
        torch.testing.assert_close(left, right)


# Sizes, the start, mistakes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("fast", ["inverse", "forward"])
def test_values_and_gradients_are_finite_at_any_size(device, dtype, scale, fast):
    t = made(device, D, C, fast=fast, scale=scale).to(dtype)
    sizes = torch.tensor(
        [0.0, *(s * 10.0**e for e in (-30, -3, 0, 1, 3, 10, 30) for s in (-1, 1))], dtype=dtype
    )
    x = sizes.to(device).unsqueeze(-1).repeat(1, D).requires_grad_()
    c = context_for(t, len(sizes), dtype=dtype).to(device)
    for f in (t.forward_and_log_det, t.inverse_and_log_det):
        y, log_det = f(x, c)
        assert bool(y.isfinite().all()) and bool(log_det.isfinite().all())
        for output in (y.sum(), log_det.sum()):
            for grad in torch.autograd.grad(
                output, (x, *t.parameters()), retain_graph=True, allow_unused=True
            ):
                assert grad is None or bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [(), (8,), (3, 5, 7)])
def test_starts_at_the_identity(device, dtype, hidden):
    for fast in ("inverse", "forward"):
        t = BlockAutoregressive(D, C, hidden=hidden, fast=fast).to(device=device, dtype=dtype)
        x = 30 * points(t, 20, dtype=dtype).to(device)
        c = context_for(t, 20, dtype=dtype).to(device)
        for y, log_det in (t.forward_and_log_det(x, c), t.inverse_and_log_det(x, c)):
            torch.testing.assert_close(y, x, rtol=8 * torch.finfo(dtype).eps, atol=0)
            torch.testing.assert_close(
                log_det, torch.zeros_like(log_det), rtol=0, atol=8 * torch.finfo(dtype).eps
            )


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_units_part_with_the_first_steps(device, optimizer):
    torch.manual_seed(0)
    t = BlockAutoregressive(D, hidden=(6, 6)).to(device)
    y = torch.randn(64, D).to(device) ** 3
    step = optimizer(t.parameters(), lr=0.01)
    for _ in range(2):
        x, log_det = t.inverse_and_log_det(y)
        step.zero_grad()
        (0.5 * x.square().sum(-1) - log_det).mean().backward()
        step.step()
    for layer in layers(t)[:-1]:
        units = torch.cat(
            [layer.bias.detach()[:, :6, None], layer.lower.detach()[:, :6].flatten(2)], -1
        )  # type: ignore[union-attr]
        gaps = (units[:, :, None] - units[:, None]).norm(dim=-1) + torch.eye(6, device=device)
        assert float(gaps.min()) > 1e-3
        assert bool((layer.steepness.detach() != 0).all())  # type: ignore[union-attr]


def test_fits_what_no_affine_autoregression_can(device):
    """Two crescents, which a single layer of normals cannot part."""
    generator = torch.Generator().manual_seed(0)
    angle = math.pi * torch.rand(1024, generator=generator)
    arc = torch.stack([angle.cos(), angle.sin()], -1)
    arc = torch.where(
        torch.rand(1024, 1, generator=generator) < 0.5, arc, torch.tensor([1.0, 0.5]) - arc
    )
    y = ((arc + 0.1 * torch.randn(1024, 2, generator=generator)) * 1.5).to(device)

    def fitted(hidden: tuple[int, ...]) -> float:
        torch.manual_seed(0)
        t = BlockAutoregressive(2, hidden=hidden).to(device)
        optimizer = torch.optim.Adam(t.parameters(), lr=0.02)
        for _ in range(200):
            x, log_det = t.inverse_and_log_det(y)
            reached = (normal_log_prob(x) + log_det).mean()
            optimizer.zero_grad()
            (-reached).backward()
            optimizer.step()
        return float(reached.detach())

    assert fitted((8, 8)) > fitted(()) + 0.5


def test_a_random_order_depends_on_its_seed_alone():
    orders = []
    for global_seed, seed in ((0, 1), (5, 1), (0, 2)):
        torch.manual_seed(global_seed)
        orders.append(BlockAutoregressive(12, order="random", seed=seed).order.tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(12))


@pytest.mark.parametrize("direction", ["inverse", pytest.param("forward", marks=pytest.mark.slow)])
def test_both_directions_compile_as_one_graph(device, direction):
    torch.compiler.reset()
    t = made(device, 2, hidden=(2,))
    x = points(t, 5).to(device)
    f = getattr(t, f"{direction}_and_log_det")
    with torch.no_grad():
        for left, right in zip(
            torch.compile(f, fullgraph=True, backend="eager")(x), f(x), strict=True
        ):
            torch.testing.assert_close(left, right)


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "features-zero": (lambda: BlockAutoregressive(0), ValueError, "features >= 1; got 0"),
    "features-float": (
        lambda: BlockAutoregressive(3.0),
        TypeError,
        "features to be an integer; got 3.0",
    ),
    "context-zero": (lambda: BlockAutoregressive(3, 0), ValueError, "context_features >= 1; got 0"),
    "hidden-zero": (
        lambda: BlockAutoregressive(3, hidden=(8, 0)),
        ValueError,
        "hidden >= 1; got 0",
    ),
    "hidden-number": (
        lambda: BlockAutoregressive(3, hidden=8),
        TypeError,
        "hidden to be a sequence",
    ),
    "order-name": (
        lambda: BlockAutoregressive(3, order="backwards"),
        ValueError,
        "order to be .*; got 'backwards'",
    ),
    "order-twice": (
        lambda: BlockAutoregressive(3, order=[0, 0, 1]),
        ValueError,
        "order to hold each of 0 .. 2 once",
    ),
    "order-short": (
        lambda: BlockAutoregressive(3, order=[0, 1]),
        ValueError,
        "order to hold each of 0 .. 2 once",
    ),
    "order-number": (
        lambda: BlockAutoregressive(3, order=1),
        TypeError,
        "order to be a sequence of integers; got 1",
    ),
    "fast-both": (
        lambda: BlockAutoregressive(3, fast="both"),
        ValueError,
        "fast to be inverse .* or forward .*; got 'both'",
    ),
    "seed-negative": (
        lambda: BlockAutoregressive(3, order="random", seed=-1),
        ValueError,
        "seed >= 0; got -1",
    ),
    "no-context": (
        lambda: BlockAutoregressive(3, C)(torch.zeros(3)),
        ValueError,
        r"context of shape \(\*, 2\) .* got None",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_one_clear_sentence(name):
    make, error, fragment = MISTAKES[name]
    with pytest.raises(error, match=fragment):
        make()
