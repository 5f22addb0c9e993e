"""Splines against formulas written out, a peer's numbers, autograd, quadrature, and what is extreme."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import Spline
from registry import D, perturbed
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jacrev, vmap

import pyroflows as pf
from pyroflows.nn import mlp
from pyroflows.transforms import Coupling, Elementwise, coupling_masks
from pyroflows.univariate import Affine, Univariate
from pyroflows.univariate.splines import (
    CircularSpline,
    LinearRationalSpline,
    RationalQuadraticSpline,
)

LINES: dict[str, Univariate] = {
    "rational-quadratic": RationalQuadraticSpline(bound=3.0),
    "rational-quadratic-2": RationalQuadraticSpline(2, bound=3.0, min_size=0.1, min_slope=0.1),
    "linear-rational": LinearRationalSpline(bound=3.0),
}
SPLINES: dict[str, Univariate] = {**LINES, "circular": CircularSpline()}
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=list(SPLINES))
def spline(request: pytest.FixtureRequest) -> Univariate:
    return SPLINES[request.param]


def raw_for(
    spline: Univariate, *batch: int, spread: float = 1.0, features: int = D, seed: int = 4
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(
        *batch, spline.parameters, features, generator=generator, dtype=torch.float64
    )


def inputs_for(spline: Univariate, *batch: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = spread * torch.randn(*batch, D, generator=generator, dtype=torch.float64)
    return (
        torch.remainder(x + math.pi, 2 * math.pi) - math.pi
        if spline.support != constraints.real
        else x
    )


def directions(spline: Univariate) -> tuple[Callable[..., tuple[Tensor, Tensor]], ...]:
    return spline.forward_and_log_det, spline.inverse_and_log_det


# The formulas


def knots_by_hand(
    raw: list[float], bins: int, bound: float, min_size: float
) -> tuple[list[float], list[float]]:
    sides = []
    for part in (raw[:bins], raw[bins : 2 * bins]):
        total = sum(math.exp(a) for a in part)
        knots = [-bound]
        for a in part:
            knots.append(
                knots[-1] + 2 * bound * (min_size + (1 - bins * min_size) * math.exp(a) / total)
            )
        sides.append(knots)
    return sides[0], sides[1]


def slope_by_hand(a: float, min_slope: float) -> float:
    clip = -math.log(min_slope)
    return math.exp(clip * math.tanh(a / clip))


@pytest.mark.parametrize("name", ["rational-quadratic", "rational-quadratic-2", "circular"])
def test_rational_quadratic_by_hand(name, device):
    """The formula as the paper prints it, in plain Python."""
    spline = SPLINES[name]
    bins, bound = spline.bins, getattr(spline, "bound", math.pi)
    raw, x = raw_for(spline, 40), inputs_for(spline, 40)
    y, log_slope = (t.cpu() for t in spline.forward_and_log_det(x.to(device), raw.to(device)))
    for n in range(40):
        for i in range(D):
            values = raw[n, :, i].tolist()
            xs, ys = knots_by_hand(values, bins, bound, spline.min_size)
            inner = [
                slope_by_hand(a, spline.min_slope)
                for a in values[2 * bins : spline.box.slopes + 2 * bins]
            ]
            slopes = [*inner, inner[0]] if name == "circular" else [1.0, *inner, 1.0]
            point = float(x[n, i])
            expected, slope = point, 1.0
            for k in range(bins):
                if xs[k] <= point < xs[k + 1]:
                    w, h = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
                    s, p = h / w, (point - xs[k]) / w
                    bottom = s + (slopes[k + 1] + slopes[k] - 2 * s) * p * (1 - p)
                    expected = ys[k] + h * (s * p**2 + slopes[k] * p * (1 - p)) / bottom
                    slope = (
                        s**2
                        * (slopes[k + 1] * p**2 + 2 * s * p * (1 - p) + slopes[k] * (1 - p) ** 2)
                        / bottom**2
                    )
            if name == "circular":
                expected = (expected + values[-1] + math.pi) % (2 * math.pi) - math.pi
            assert float(y[n, i]) == pytest.approx(expected, abs=1e-12)
            assert float(log_slope[n, i]) == pytest.approx(math.log(slope), abs=1e-11)


@pytest.mark.parametrize(
    ("order", "kind"), [("linear", LinearRationalSpline), ("quadratic", RationalQuadraticSpline)]
)
def test_agrees_with_pyro_given_the_same_knots(order, kind, device):
    bins, bound = 6, 3.0
    spline = kind(bins, bound=bound)
    peer = Spline(D, bins, bound=bound, order=order).double()
    raw, x = raw_for(spline), inputs_for(spline, 200)
    widths, heights, slopes = raw[: 3 * bins - 1].split([bins, bins, bins - 1])
    with torch.no_grad():
        peer.unnormalized_widths.copy_(widths.mT)
        peer.unnormalized_heights.copy_(heights.mT)
        clip = -math.log(spline.min_slope)
        d = (clip * (slopes / clip).tanh()).exp()
        peer.unnormalized_derivatives.copy_(
            (d - 1e-3).expm1().log().mT
        )  # Pyro adds its least slope to a softplus
        if order == "linear":
            peer.unnormalized_lambdas.copy_(raw[3 * bins - 1 :].mT)
    y, log_slope = (t.cpu() for t in spline.forward_and_log_det(x.to(device), raw.to(device)))
    expected = peer(x)
    # In Pyro the slope is 0.999 at the outer knots, so only the bins between are the same.
    sizes = 2 * bound * (1e-3 + (1 - bins * 1e-3) * widths.softmax(0))
    inner = (x > sizes[0] - bound) & (x < bound - sizes[-1])
    assert int(inner.sum()) > 200
    torch.testing.assert_close(y[inner], expected[inner])
    torch.testing.assert_close(log_slope[inner], peer.log_abs_det_jacobian(x, expected)[inner])


def test_log_slope_is_that_of_autograd(spline, device):
    raw, x = raw_for(spline, 30).to(device), inputs_for(spline, 30).to(device)
    for f in directions(spline):
        slope = vmap(jacrev(lambda x, raw, f=f: f(x, raw)[0]))(x, raw).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(f(x, raw)[1], slope.log())


@pytest.mark.parametrize("bins", [2, 3, 8, 13])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [RationalQuadraticSpline, LinearRationalSpline, CircularSpline])
def test_is_the_identity_to_the_last_bit(kind, bins, dtype, device):
    spline = kind(bins)
    raw = torch.tensor(spline.identity, dtype=dtype, device=device).unsqueeze(-1)
    x = torch.cat([torch.linspace(-3.1415, 3.1415, 999), torch.tensor([1e-30, -1e-20, 1e-7, 0.0])])
    x = x.to(device, dtype).unsqueeze(-1)
    for f in directions(spline):
        y, log_slope = f(x, raw)
        assert torch.equal(y, x)
        assert float(log_slope.abs().max()) <= 4 * torch.finfo(dtype).eps


def test_knots_keep_their_least_distance_and_slopes_their_bounds(device):
    """Raw parameters that leave all but one bin the least size, and the steepest and flattest slopes."""
    spline = RationalQuadraticSpline(4, bound=2.0, min_size=0.05, min_slope=0.01)
    raw = torch.zeros(11, 1, dtype=torch.float64, device=device)
    raw[0], raw[7], raw[8:, 0] = 1e4, 1e4, torch.tensor([1e4, 0.0, -1e4], dtype=torch.float64)
    # Widths 3.4, 0.2, 0.2, 0.2 and heights 0.2, 0.2, 0.2, 3.4.
    x = torch.tensor([[1.4], [1.6], [1.8]], dtype=torch.float64, device=device)
    y, log_slope = spline.forward_and_log_det(x, raw)
    torch.testing.assert_close(
        y.flatten().cpu(), torch.tensor([-1.8, -1.6, -1.4], dtype=torch.float64)
    )
    torch.testing.assert_close(
        log_slope.exp().flatten().cpu(), torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64)
    )


# What is extreme


@pytest.mark.parametrize("spread", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_finite_whatever_comes(spline, dtype, spread, device):
    edge = getattr(spline, "bound", math.pi)
    below = torch.nextafter(torch.tensor(edge, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    special = [
        edge,
        -edge,
        float(below),
        -float(below),
        0.0,
        1e-30,
        -1e-30,
        1e30,
        -1e30,
        10.0,
        -10.0,
    ]
    x = torch.cat(
        [3 * torch.randn(3000, dtype=dtype), torch.tensor(special, dtype=dtype).repeat(100)]
    ).unsqueeze(-1)
    raw = raw_for(spline, len(x), spread=spread, features=1).to(dtype)
    for points in (x, torch.full_like(x, 100.0)):
        points, given = points.to(device).requires_grad_(), raw.to(device).requires_grad_()
        for f in directions(spline):
            y, log_slope = f(points, given)
            for value in (
                y,
                log_slope,
                *torch.autograd.grad(y.sum() + log_slope.sum(), (points, given)),
            ):
                assert bool(value.isfinite().all())


@pytest.mark.parametrize(
    ("name", "spread"), [("rational-quadratic", s) for s in (1, 20, 100)] + [("linear-rational", 1)]
)
def test_the_inverse_misses_y_by_few_roundings(name, spread, device):
    """In single precision, by the residual in y, against what roundings of x and y are worth."""
    spline = SPLINES[name]
    generator = torch.Generator().manual_seed(6)
    y = (2 * torch.randn(20_000, 1, generator=generator)).to(device)
    raw = raw_for(spline, len(y), spread=spread, features=1).float().to(device)
    x, _ = spline.inverse_and_log_det(y, raw)
    again, log_slope = spline.forward_and_log_det(x.double(), raw.double())
    worth = torch.finfo(torch.float32).eps * spline.bound * (1 + log_slope.exp())
    assert float(((again - y).abs() / worth).max()) < 20


@pytest.mark.parametrize("name", list(LINES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_identity_begins_at_the_edge(name, dtype, device):
    spline = LINES[name]
    raw = raw_for(spline, 100).to(device, dtype)
    for sign in (-1.0, 1.0):
        edge = torch.full((100, D), sign * spline.bound, dtype=dtype, device=device)
        for f in directions(spline):
            for x in (edge, 1.5 * edge, edge * 1e30):
                y, log_slope = f(x, raw)
                assert torch.equal(y, x) and torch.equal(log_slope, torch.zeros_like(x))
            inside = torch.nextafter(edge, torch.zeros_like(edge))
            y, log_slope = f(inside, raw)
            near = 100 * torch.finfo(dtype).eps * raw.abs().amax().exp()
            torch.testing.assert_close(y, edge, rtol=0, atol=float(near))


# Gradients


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_the_gradient_in_closed_form_is_that_of_the_formulas(spline, spread, device):
    """Function transforms differentiate the formulas, plain backward has a closed form."""
    raw, x = raw_for(spline, 40, spread=spread).to(device), inputs_for(spline, 40).to(device)
    u, v = torch.randn(2, 40, D, dtype=torch.float64, device=device)

    def total(f: Callable[..., tuple[Tensor, Tensor]], x: Tensor, raw: Tensor) -> Tensor:
        y, log_slope = f(x, raw)
        return (u * y + v * log_slope).sum()

    for f in directions(spline):
        x.requires_grad_(), raw.requires_grad_()
        grads = torch.autograd.grad(total(f, x, raw), (x, raw))
        expected = torch.func.grad(partial(total, f), argnums=(0, 1))(x.detach(), raw.detach())
        for left, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


def test_gradients_are_those_of_finite_differences_to_second_order(spline, device):
    # Second differences of a map of large curvature need small slopes.
    raw = raw_for(spline, 2, spread=0.3, features=1).to(device).requires_grad_()
    x = (0.7 * inputs_for(spline, 2)[:, :1]).to(device).requires_grad_()
    for f in directions(spline):
        torch.autograd.gradcheck(f, (x, raw), check_batched_grad=device.type == "cpu")
        torch.autograd.gradgradcheck(f, (x, raw))


def test_gradients_of_what_is_broadcast_are_summed(spline, device):
    x, table = inputs_for(spline, 4, 1).to(device), raw_for(spline).to(device)
    raw = raw_for(spline, 3).to(device)
    for f in directions(spline):
        for points, given in ((x, table), (x, raw), (x[0, 0], raw), (x[0, 0], table)):
            points, given = points.clone().requires_grad_(), given.clone().requires_grad_()
            batch = torch.broadcast_shapes(points.shape[:-1], given.shape[:-2])
            wide = points.expand(*batch, -1), given.expand(*batch, -1, -1)
            y, log_slope = f(points, given)
            assert y.shape == log_slope.shape == (*batch, D)
            grads = torch.autograd.grad((y.sin() + log_slope).sum(), (points, given))
            y, log_slope = f(*(w.contiguous() for w in wide))
            expected = torch.autograd.grad((y.sin() + log_slope).sum(), (points, given))
            for left, right in zip(grads, expected, strict=True):
                torch.testing.assert_close(left, right)


def test_only_the_gradients_asked_for(spline, device):
    raw, x = raw_for(spline, 5).to(device), inputs_for(spline, 5).to(device)
    for f in directions(spline):
        both = [t.clone().requires_grad_() for t in (x, raw)]
        grads = torch.autograd.grad(f(*both)[0].sum(), both)
        for create_graph in (False, True):
            (of_x,) = torch.autograd.grad(
                f(both[0], raw)[0].sum(), both[0], create_graph=create_graph
            )
            (of_raw,) = torch.autograd.grad(
                f(x, both[1])[0].sum(), both[1], create_graph=create_graph
            )
            torch.testing.assert_close(of_x, grads[0])
            torch.testing.assert_close(of_raw, grads[1])


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_forward_mode_and_traces(spline, device):
    raw, x = raw_for(spline, 5).to(device), inputs_for(spline, 5).to(device)
    tangent = torch.ones_like(x)
    for f in directions(spline):
        y, log_slope = f(x, raw)
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent), raw)[0])
        torch.testing.assert_close(moved.tangent, log_slope.exp())
        torch.testing.assert_close(torch.jit.trace(f, (x, raw), check_trace=False)(x, raw)[0], y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "rational-quadratic",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("linear-rational", "circular")),
    ],
)
def test_compiles_as_one_graph(name, device):
    spline = SPLINES[name]
    torch.compiler.reset()
    raw, x = (
        raw_for(spline, 5).to(device).requires_grad_(),
        inputs_for(spline, 5).to(device).requires_grad_(),
    )

    def both(x: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
        y, log_slope = spline.forward_and_log_det(x, raw)
        return y, log_slope, *spline.inverse_and_log_det(y, raw)

    compiled, expected = (
        torch.compile(both, fullgraph=True, backend="aot_eager")(x, raw),
        both(x, raw),
    )
    for left, right in zip(compiled, expected, strict=True):
        torch.testing.assert_close(left, right)
    totals = (
        outputs[0].sum() + outputs[1].sum() + outputs[3].sum() for outputs in (compiled, expected)
    )
    for left, right in zip(
        *(torch.autograd.grad(total, (x, raw)) for total in totals), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-9)


def test_a_meta_tensor_passes(spline, placement):
    raw, x = (
        raw_for(spline, 5).to(placement).requires_grad_(),
        inputs_for(spline, 5).to(placement).requires_grad_(),
    )
    for f in directions(spline):
        y, log_slope = f(x, raw)
        grads = torch.autograd.grad(y.sum() + log_slope.sum(), (x, raw))
        assert all(value.device.type == placement.type for value in (y, log_slope, *grads))


# Densities


def midpoints(width: float, n: int, device: torch.device) -> Tensor:
    return ((torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n * 2 - 1) * width


@pytest.mark.parametrize("name", list(LINES))
@torch.no_grad()
def test_integrates_to_one_in_one_dimension(name, device):
    flow = perturbed(pf.Flow([Elementwise(LINES[name], 1)]), 1.0).to(device).double()
    y = midpoints(10.0, 40_000, device)
    assert float(flow().log_prob(y.unsqueeze(-1)).exp().mean() * 20) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", list(LINES))
@torch.no_grad()
def test_integrates_to_one_in_two_dimensions(name, device):
    layers = [Coupling(LINES[name], 2, mask=[i, not i], network=mlp((8,))) for i in (True, False)]
    flow = perturbed(pf.Flow(layers), 0.5).to(device).double()
    side = midpoints(9.0, 450, device)
    total = flow().log_prob(torch.cartesian_prod(side, side)).exp().mean() * 18**2
    assert float(total) == pytest.approx(1.0, abs=2e-3)


def torus(features: int, spread: float = 0.5) -> pf.Flow:
    flat = dist.Uniform(-math.pi * torch.ones(features), math.pi).to_event(1)
    layers: list[Any] = [Elementwise(CircularSpline(4), features)]
    if features > 1:
        masks = coupling_masks("half", features, 2)
        layers += [
            Coupling(CircularSpline(4), features, mask=mask, network=mlp((8,))) for mask in masks
        ]
    return perturbed(pf.Flow(layers, base=flat), spread)


@pytest.mark.parametrize(("features", "n"), [(1, 20_000), (2, 700)])
@torch.no_grad()
def test_integrates_to_one_on_the_torus(features, n, device):
    flow = torus(features).to(device).double()
    grid = torch.cartesian_prod(*[midpoints(math.pi, n, device)] * features).reshape(-1, features)
    total = flow().log_prob(grid).exp().mean() * (2 * math.pi) ** features
    assert float(total) == pytest.approx(1.0, abs=1e-3)


# The circle


def test_the_circle_has_no_seam(device):
    """Value, slope and density meet at -pi and pi, and the rotation moves the seam."""
    spline = CircularSpline(5)
    raw = raw_for(spline, 50).to(device)
    step = 1e-9
    left, right = (
        torch.full((50, D), s * (math.pi - step), dtype=torch.float64, device=device)
        for s in (-1, 1)
    )
    for f in directions(spline):
        (y0, l0), (y1, l1) = f(left, raw), f(right, raw)
        gap = torch.remainder(y0 - y1 + math.pi, 2 * math.pi) - math.pi
        torch.testing.assert_close(gap, 2 * step * l0.exp(), rtol=1e-3, atol=1e-12)
        torch.testing.assert_close(l0, l1, rtol=0, atol=1e-5)
        assert float((y0.abs() - math.pi).abs().median()) > 0.1
    flow = torus(2).to(device).double()
    y = torch.tensor(
        [[-math.pi + step, 0.5], [math.pi - step, 0.5]], dtype=torch.float64, device=device
    )
    torch.testing.assert_close(*flow().log_prob(y), rtol=0, atol=1e-5)


def test_the_circle_keeps_its_order_and_its_support(device):
    spline = CircularSpline()
    raw = raw_for(spline, spread=3.0).to(device)
    x = midpoints(math.pi, 5000, device).unsqueeze(-1).expand(-1, D)
    for dtype in DTYPES:
        for f in directions(spline):
            y, _ = f(x.to(dtype), raw.to(dtype))
            assert bool(spline.support.check(y).all())
            # Once around, in one sense: one step back at the most.
            assert bool(((y.double().diff(dim=0) < -1e-5).sum(0) <= 1).all())


def test_structures_say_where_the_circle_lives(device):
    circle = constraints.independent(constraints.interval(-math.pi, math.pi), 1)
    for t in (
        Elementwise(CircularSpline(), D),
        Coupling(CircularSpline(), D),
        Coupling(CircularSpline(), D, 2).inv,
    ):
        for constraint in (t.domain, t.codomain):
            assert constraint.event_dim == 1
            inside, outside = torch.tensor([[3.0] * D, [3.2] * D])
            assert bool(constraint.check(inside)) and not bool(constraint.check(outside))
    with pyro.validation_enabled():  # torch.compile switches it off for the whole process
        d = torus(3).to(device)()
    assert str(d.support) == str(circle)
    y = d.sample((1000,))
    assert bool(d.support.check(y).all())
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.full((3,), 4.0, device=device))


def test_networks_see_cosine_and_sine(device):
    t = perturbed(
        Coupling(CircularSpline(4), 3, mask=[True, True, False], network=mlp((8,))).double()
    ).to(device)
    assert t.conditioner.input.in_features == 4
    x = torch.tensor([1.0, -math.pi, 0.3], dtype=torch.float64, device=device)
    turned = x + torch.tensor([0.0, 2 * math.pi, 0.0], dtype=torch.float64, device=device)
    torch.testing.assert_close(t.forward_and_log_det(x)[0][2], t.forward_and_log_det(turned)[0][2])
    seen = CircularSpline().encode(x)
    torch.testing.assert_close(seen, torch.cat([x.cos(), x.sin()]))
    assert Affine().encode(x) is x and Affine().codes == 1 and CircularSpline().codes == 2
    assert Affine().support is constraints.real


def test_a_circle_learns_a_peak_at_the_seam(device):
    """By maximum likelihood, beside the likelihood of the law that the data are from."""
    law = dist.VonMises(torch.tensor(math.pi), torch.tensor(4.0))
    x = law.sample((2000,)).unsqueeze(-1)
    flow, given = torus(1, spread=0.0).to(device), x.to(device)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    for _ in range(200):
        loss = -flow().log_prob(given).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A spline of 13 parameters gains about 13 / 2 nats in all on the data it learns from.
    assert float(loss.detach()) == pytest.approx(float(-law.log_prob(x).mean()), abs=0.02)


# Mistakes

MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"bins": 1}, ValueError, "bins >= 2; got 1"),
    ({"bins": 0}, ValueError, "bins >= 2; got 0"),
    ({"bins": -3}, ValueError, "bins >= 2; got -3"),
    ({"bins": 4.0}, TypeError, "bins to be an integer; got 4.0"),
    ({"bins": True}, TypeError, "bins to be an integer; got True"),
    ({"bins": None}, TypeError, "bins to be an integer; got None"),
    ({"min_size": 0.0}, ValueError, "min_size to be positive and finite; got 0.0"),
    ({"min_size": -0.1}, ValueError, "min_size to be positive and finite; got -0.1"),
    ({"min_size": "small"}, TypeError, "min_size to be a number; got 'small'"),
    (
        {"min_size": 0.125},
        ValueError,
        "min_size < 1 / bins, for bins that fill the box; got 0.125 with 8 bins",
    ),
    (
        {"bins": 2000},
        ValueError,
        "min_size < 1 / bins, for bins that fill the box; got 0.001 with 2000 bins",
    ),
    ({"min_slope": 0.0}, ValueError, "min_slope to be positive and finite; got 0.0"),
    ({"min_slope": 1.0}, ValueError, "min_slope < 1; got 1.0"),
    ({"min_slope": float("nan")}, ValueError, "min_slope to be positive and finite; got nan"),
    ({"min_slope": None}, TypeError, "min_slope to be a number; got None"),
]
BOUNDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"bound": 0.0}, ValueError, "bound to be positive and finite; got 0.0"),
    ({"bound": -5}, ValueError, "bound to be positive and finite; got -5"),
    ({"bound": float("inf")}, ValueError, "bound to be positive and finite; got inf"),
    ({"bound": "5"}, TypeError, "bound to be a number; got '5'"),
]


@pytest.mark.parametrize(
    ("kind", "options", "error", "fragment"),
    [
        (kind, *row)
        for kind, rows in (
            (RationalQuadraticSpline, MISTAKES + BOUNDS),
            (LinearRationalSpline, MISTAKES + BOUNDS),
            (CircularSpline, MISTAKES),
        )
        for row in rows
    ],
)
def test_mistakes_are_named(kind, options, error, fragment):
    with pytest.raises(error, match=fragment.replace("(", r"\(")):
        kind(**options)


@pytest.mark.parametrize("name", ["rational-quadratic", "linear-rational"])
def test_a_round_trip_loses_no_more_than_roundings_of_the_image(name, device):
    """Where the spline is flat, these are large in the point: its slope falls to 1e-5."""
    spline = SPLINES[name]
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(spline.parameters, 20_000, generator=generator).to(device)
    x = (6 * torch.rand(20_000, generator=generator) - 3).to(device)
    y, _ = spline.forward_and_log_det(x, raw)
    back, _ = spline.inverse_and_log_det(y, raw)
    again, log_slope = spline.forward_and_log_det(back, raw)
    rounding = torch.finfo(x.dtype).eps * 3 * (1 + log_slope.exp())
    assert float(((again - y).abs() / rounding).max()) < 16
