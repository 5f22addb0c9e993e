"""Monotone networks and integrals of positive networks: against formulas by hand, quadrature and autograd, at any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from registry import NET, C, D, normal_log_prob
from scipy.integrate import quad
from torch import Tensor
from torch.func import vmap

from pyroflows.transforms import Coupling, Elementwise, Transform
from pyroflows.univariate import Univariate
from pyroflows.univariate.monotone import MonotoneIntegral, MonotoneNetwork, _units

DTYPES = [torch.float32, torch.float64]
UNIVARIATES: dict[str, Univariate] = {
    "network": MonotoneNetwork(),
    "network-one-unit": MonotoneNetwork(units=1, layers=1),
    "network-odd": MonotoneNetwork(units=5, layers=3),
    "integral": MonotoneIntegral(),
    "integral-few-nodes": MonotoneIntegral(units=1, nodes=3, bound=0.5),
    "integral-many-nodes": MonotoneIntegral(units=6, nodes=129, bound=50.0),
}


@pytest.fixture(params=list(UNIVARIATES))
def univariate(request: pytest.FixtureRequest) -> Univariate:
    return UNIVARIATES[request.param]


def raw_for(
    univariate: Univariate, *batch: int, spread: float, device: torch.device, features: int = D
) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    raw = spread * torch.randn(
        *batch, univariate.parameters, features, generator=generator, dtype=torch.float64
    )
    return raw.to(device)


def both_ways(univariate: Univariate) -> tuple[Callable[..., tuple[Tensor, Tensor]], ...]:
    return univariate.forward_and_log_det, univariate.inverse_and_log_det


# Against formulas


def test_one_layer_of_sigmoids_by_hand(device):
    raw = raw_for(MonotoneNetwork(3, 1), spread=1.0, device=device)
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, device=device).unsqueeze(-1).expand(9, D)
    ((log_weight, log_gain, shift),) = _units(raw, 1, 3)
    torch.testing.assert_close(log_weight.exp().sum(-2), x.new_ones(D))
    p = sum(log_weight[j].exp() * torch.sigmoid(log_gain[j].exp() * x + shift[j]) for j in range(3))
    y, _ = MonotoneNetwork(3, 1).forward_and_log_det(x, raw)
    torch.testing.assert_close(y, 0.999 * torch.logit(p) + 0.001 * x)


def test_one_sigmoid_is_a_line(device):
    univariate = MonotoneNetwork(1, 1)
    raw = raw_for(univariate, spread=1.0, device=device)
    x = torch.linspace(-40, 40, 9, dtype=torch.float64, device=device).unsqueeze(-1).expand(9, D)
    ((_, log_gain, shift),) = _units(raw, 1, 1)
    y, log_det = univariate.forward_and_log_det(x, raw)
    slope = 0.999 * log_gain.exp() + 0.001
    torch.testing.assert_close(y, slope * x + 0.999 * shift)
    torch.testing.assert_close(log_det, slope.log().expand(9, D))


def test_layers_are_applied_one_after_the_other(device):
    raw = raw_for(MonotoneNetwork(4, 2), spread=1.0, device=device)
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, device=device).unsqueeze(-1).expand(9, D)
    y, total = MonotoneNetwork(4, 2).forward_and_log_det(x, raw)
    for part in raw.unflatten(-2, (2, 12)).unbind(-3):
        x, log_det = MonotoneNetwork(4, 1).forward_and_log_det(x, part)
        total = total - log_det
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(total, torch.zeros_like(total))


def integrand(univariate: MonotoneIntegral, raw: Tensor, t: float) -> float:
    """The positive network of one feature as the documentation gives it."""
    weight, centre, gain = raw[:-2, 0].reshape(3, univariate.units).numpy()
    spacing = 1.6 * math.asinh(univariate.bound) / univariate.units
    start = np.arange(univariate.units) - (univariate.units - 1) / 2
    hidden = np.tanh(np.exp(3 * np.tanh(gain / 3)) * (math.asinh(t) / spacing - start - centre))
    return math.exp(7 * math.tanh((weight * hidden).sum() / 7))


@pytest.mark.parametrize(("nodes", "tolerance"), [(65, 3e-2), (4097, 1e-5)])
def test_the_integral_is_that_of_the_network(device, nodes, tolerance):
    univariate = MonotoneIntegral(nodes=nodes)
    raw = raw_for(univariate, spread=0.7, device=device, features=1)
    x = torch.tensor(
        [-9.0, -3.0, -0.2, 0.0, 1.0, 6.0], dtype=torch.float64, device=device
    ).unsqueeze(-1)
    y, log_det = univariate.forward_and_log_det(x, raw)
    scale, shift = 3 * torch.tanh(raw[-2, 0] / 3), raw[-1, 0]
    reached, log_slope = ((y - shift) / scale.exp()).cpu(), (log_det - scale).cpu()
    for at, value, log_g in zip(
        x.flatten().tolist(), reached.flatten(), log_slope.flatten(), strict=True
    ):
        expected, _ = quad(lambda t: integrand(univariate, raw.cpu(), t), 0.0, at, limit=500)
        assert float(value) == pytest.approx(expected, rel=tolerance, abs=1e-12)
        assert float(log_g) == pytest.approx(
            math.log(integrand(univariate, raw.cpu(), at)), abs=tolerance
        )


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_the_trapezoidal_rule_is_exact(device, spread):
    """Between nodes the integrand is linear, so that its values there are all that its integral needs."""
    univariate = MonotoneIntegral(nodes=33)
    raw = raw_for(univariate, spread=spread, device=device, features=1)
    positive = torch.linspace(0, math.asinh(10.0), 17, dtype=torch.float64, device=device).sinh()
    nodes = torch.cat([-positive[1:].flip(0), positive])
    y, log_det = univariate.forward_and_log_det(nodes.unsqueeze(-1), raw)
    slopes = log_det.exp().flatten()
    areas = torch.cumulative_trapezoid(slopes, nodes)
    torch.testing.assert_close(y.flatten().diff(), areas.diff(prepend=areas.new_zeros(1)))
    middle = 0.5 * (nodes[1:] + nodes[:-1])
    _, log_det = univariate.forward_and_log_det(middle.unsqueeze(-1), raw)
    torch.testing.assert_close(log_det.exp().flatten(), 0.5 * (slopes[1:] + slopes[:-1]))


# Increasing, onto the line, with the right derivative


@pytest.mark.parametrize("spread", [0.5, 5.0, 20.0])
def test_log_det_is_that_of_autograd(univariate, device, spread):
    raw = raw_for(univariate, 50, spread=spread, device=device)
    x = (
        torch.linspace(-30, 30, 50, dtype=torch.float64, device=device)
        .unsqueeze(-1)
        .repeat(1, D)
        .requires_grad_()
    )
    for f in both_ways(univariate):
        y, log_det = f(x, raw)
        (slope,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(log_det, slope.log(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_increases_from_the_whole_line_onto_the_whole_line(univariate, device, spread):
    raw = raw_for(univariate, spread=spread, device=device)
    grid = (
        torch.linspace(-1, 1, 4001, dtype=torch.float64, device=device)
        .mul(40.0)
        .sinh()
        .unsqueeze(-1)
    )
    y, log_det = univariate.forward_and_log_det(grid.expand(-1, D), raw)
    assert bool((y.diff(dim=0) > 0).all())
    assert bool((y[0] < -1e6).all()) and bool((y[-1] > 1e6).all())
    assert bool(log_det.isfinite().all())


@pytest.mark.parametrize(("spread", "inverted"), [(0.3, True), (1.0, False)])
def test_densities_integrate_to_one(univariate, device, spread, inverted):
    """Of the variable whose image, or whose origin, is standard normal."""
    raw = raw_for(univariate, spread=spread, device=device, features=4)
    evaluate, place = both_ways(univariate)[:: -1 if inverted else 1]
    grid, _ = place(
        torch.linspace(-9, 9, 3001, dtype=torch.float64, device=device).unsqueeze(-1).expand(-1, 4),
        raw,
    )
    base, log_det = evaluate(grid, raw)
    density = (normal_log_prob(base.unsqueeze(-1)) + log_det).exp()
    torch.testing.assert_close(
        torch.trapezoid(density, grid, dim=0), base.new_ones(4), rtol=0, atol=5e-4
    )


# Sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_values_and_gradients_are_finite_at_any_size(univariate, device, dtype, spread):
    sizes = [0.0, *(sign * 10.0**e for e in (-30, -3, 0, 1, 3, 10, 30) for sign in (-1, 1))]
    x = torch.tensor(sizes, dtype=dtype, device=device).unsqueeze(-1).repeat(1, D).requires_grad_()
    raw = raw_for(univariate, len(sizes), spread=spread, device=device).to(dtype).requires_grad_()
    for f in both_ways(univariate):
        y, log_det = f(x, raw)
        assert bool(y.isfinite().all()) and bool(log_det.isfinite().all())
        for output in (y.sum(), log_det.sum()):
            for grad in torch.autograd.grad(output, (x, raw), retain_graph=True):
                assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_the_inverse_leaves_no_residual(univariate, device, dtype, spread):
    """In the value, for the argument itself is ill-conditioned where slopes reach a thousandth."""
    raw = raw_for(univariate, 60, spread=spread, device=device).to(dtype)
    y = torch.linspace(-5, 5, 60, dtype=dtype, device=device).sinh().unsqueeze(-1).repeat(1, D)
    x, _ = univariate.inverse_and_log_det(y, raw)
    again, forward_log_det = univariate.forward_and_log_det(x, raw)
    # Rounding of the argument is stretched by the slope, and shifts of some hundred add roundings of their own.
    eps = torch.finfo(dtype).eps
    allowed = (
        50 * eps * (y.abs() + x.abs() * forward_log_det.exp() + spread * univariate.parameters)
    )
    assert bool(((again - y).abs() <= allowed).all())


def test_steep_and_flat_are_both_within_reach(device):
    """Slopes that change by the factor of a million between neighbours."""
    univariate = MonotoneIntegral(units=1, nodes=9)
    raw = torch.tensor([100.0, 0.0, 100.0, 0.0, 0.0], device=device).unsqueeze(-1)
    x = torch.linspace(-20, 20, 101, device=device).unsqueeze(-1)
    y, log_det = univariate.forward_and_log_det(x, raw)
    assert float(log_det.min()) == pytest.approx(-7) and float(log_det.max()) == pytest.approx(7)
    back, inverse_log_det = univariate.inverse_and_log_det(y, raw)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-4, atol=1e-4)


# The start


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_the_identity(univariate, device, dtype):
    raw = torch.zeros(univariate.parameters, 1, dtype=dtype, device=device)
    assert univariate.identity == (0.0,) * univariate.parameters and not univariate.linear
    x = (
        torch.cat([torch.linspace(-30, 30, 41), torch.tensor([1e-30, -1e-30, 1e30, -1e30])])
        .to(raw)
        .unsqueeze(-1)
    )
    for y, log_det in (f(x, raw) for f in both_ways(univariate)):
        torch.testing.assert_close(y, x, rtol=4 * torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(
            log_det, torch.zeros_like(x), rtol=0, atol=8 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("structure", ["elementwise", "elementwise-context", "coupling"])
def test_units_part_with_the_first_step(device, optimizer, structure):
    torch.manual_seed(0)
    univariate = MonotoneNetwork(units=8, layers=2)
    make: dict[str, Callable[[], Transform]] = {
        "elementwise": lambda: Elementwise(univariate, D),
        "elementwise-context": lambda: Elementwise(univariate, D, C, **NET),
        "coupling": lambda: Coupling(univariate, D, **NET),
    }
    t = make[structure]().to(device)
    x, c = torch.randn(64, D).to(device) ** 3, None
    if t.context_features is not None:
        c = torch.randn(64, C).to(device)
    y, log_det = t.forward_and_log_det(x, c)
    step = optimizer(t.parameters(), lr=0.1)
    (0.5 * y.square().sum(-1) - log_det).mean().backward()
    step.step()
    raw = t._raw(x[:, :1], c) if isinstance(t, Coupling) else t.parameters_for(c)
    for _, gain, shift in _units(raw.detach(), 2, 8):
        pairs = torch.stack([gain, shift], -1).unsqueeze(-3) - torch.stack(
            [gain, shift], -1
        ).unsqueeze(-4)
        apart = pairs.norm(dim=-1) + torch.eye(8, device=device).unsqueeze(-1)
        assert float(apart.min()) > 1e-6


def test_the_first_gradient_tells_units_of_the_integrand_apart(device):
    univariate = MonotoneIntegral()
    raw = torch.zeros(univariate.parameters, 1, device=device, requires_grad=True)
    x = torch.linspace(-3, 3, 20, device=device).unsqueeze(-1)
    y, log_det = univariate.forward_and_log_det(x, raw)
    (grad,) = torch.autograd.grad((0.5 * y.square() - log_det).mean(), raw)
    weights = grad[: univariate.units, 0]
    gaps = (weights[:, None] - weights).abs() + torch.eye(univariate.units, device=device)
    assert float(gaps.min()) > 1e-4


@pytest.mark.parametrize(
    "univariate", [MonotoneNetwork(), MonotoneIntegral()], ids=["network", "integral"]
)
@pytest.mark.slow
def test_fits_two_modes_and_a_heavy_tail(device, univariate):
    """Far beyond what any affine map can do, and close to the entropy."""
    generator = torch.Generator().manual_seed(0)
    z, pick = torch.randn(2048, generator=generator), torch.rand(2048, generator=generator) < 0.3
    tail = torch.randn(3, 2048, generator=generator).square().mean(0).rsqrt()
    x = torch.stack([torch.where(pick, 0.3 * z - 2, 0.6 * z + 1.5), tail * z], -1).to(device)
    modes = torch.logaddexp(
        math.log(0.3) + torch.distributions.Normal(-2.0, 0.3).log_prob(x[:, 0]),
        math.log(0.7) + torch.distributions.Normal(1.5, 0.6).log_prob(x[:, 0]),
    )
    best = torch.stack([modes.mean(), torch.distributions.StudentT(3.0).log_prob(x[:, 1]).mean()])
    t = Elementwise(univariate, 2).to(device)
    optimizer = torch.optim.Adam(t.parameters(), lr=0.05)
    for _ in range(200):
        y, log_det = univariate.forward_and_log_det(x, t.raw)
        reached = (normal_log_prob(y.unsqueeze(-1)) + log_det).mean(0)
        optimizer.zero_grad()
        (-reached.sum()).backward()
        optimizer.step()
    normal = -(0.5 * math.log(2 * math.pi * math.e) + x.std(0).log())
    assert bool((reached - normal > torch.tensor([0.3, 0.1], device=device)).all())
    assert bool((best - reached).abs().max() < 0.04)


# Calls and mistakes


def test_raw_parameters_broadcast_against_points(univariate, device):
    raw = raw_for(univariate, 4, 1, spread=1.0, device=device)
    x = torch.linspace(-2, 2, 3 * D, dtype=torch.float64, device=device).reshape(3, D)
    for f in both_ways(univariate):
        y, log_det = f(x, raw)
        expected, expected_log_det = f(x.expand(4, 3, D), raw.expand(4, 3, -1, D))
        assert y.shape == log_det.shape == (4, 3, D)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(log_det, expected_log_det)
        for mapped, one in zip(vmap(f, (None, 0))(x, raw.squeeze(1)), (y, log_det), strict=True):
            torch.testing.assert_close(mapped, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["network-forward", "integral-forward", "integral-inverse"])
def test_compiles_as_one_graph(device, name):
    torch.compiler.reset()
    kind, direction = name.split("-")
    univariate = UNIVARIATES[kind]
    raw = raw_for(univariate, spread=0.5, device=device)
    x = torch.linspace(-2, 2, D, dtype=torch.float64, device=device)
    f = getattr(univariate, f"{direction}_and_log_det")
    for left, right in zip(
        torch.compile(f, fullgraph=True, backend="aot_eager")(x, raw), f(x, raw), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_repr_tells_the_options():
    assert "MonotoneNetwork(units=4, layers=1)" in repr(Elementwise(MonotoneNetwork(4, 1), D))
    assert "MonotoneIntegral(units=8, nodes=65, bound=10.0)" in repr(
        Elementwise(MonotoneIntegral(), D)
    )


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "units-zero": (lambda: MonotoneNetwork(units=0), ValueError, "units >= 1; got 0"),
    "units-float": (
        lambda: MonotoneNetwork(units=2.0),
        TypeError,
        "units to be an integer; got 2.0",
    ),
    "layers-zero": (lambda: MonotoneNetwork(layers=0), ValueError, "layers >= 1; got 0"),
    "layers-none": (
        lambda: MonotoneNetwork(layers=None),
        TypeError,
        "layers to be an integer; got None",
    ),
    "integral-units-negative": (
        lambda: MonotoneIntegral(units=-1),
        ValueError,
        "units >= 1; got -1",
    ),
    "integral-nodes-two": (lambda: MonotoneIntegral(nodes=2), ValueError, "nodes >= 3; got 2"),
    "integral-nodes-even": (
        lambda: MonotoneIntegral(nodes=64),
        ValueError,
        "nodes to be odd, so that zero .*; got 64",
    ),
    "integral-nodes-bool": (
        lambda: MonotoneIntegral(nodes=True),
        TypeError,
        "nodes to be an integer; got True",
    ),
    "integral-bound-zero": (
        lambda: MonotoneIntegral(bound=0),
        ValueError,
        "bound to be positive and finite; got 0",
    ),
    "integral-bound-infinite": (
        lambda: MonotoneIntegral(bound=math.inf),
        ValueError,
        "bound to be positive and finite; got inf",
    ),
    "integral-bound-text": (
        lambda: MonotoneIntegral(bound="10"),
        TypeError,
        "bound to be a number; got '10'",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_one_clear_sentence(name):
    make, error, fragment = MISTAKES[name]
    with pytest.raises(error, match=fragment):
        make()
