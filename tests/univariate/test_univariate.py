"""Monotone maps of one number, by themselves and in the structures that take them."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from registry import SCALES, UNIVARIATES, D, points, tolerance
from torch import Tensor, nn
from torch.func import jacrev, vmap

from pyroflows import RealNVP
from pyroflows.nn import mlp
from pyroflows.transforms import AffineCoupling, Coupling, Elementwise, Rescale, Transform
from pyroflows.univariate import Affine, Scale, Shift, Univariate

BOUNDED = ("softclip",)


@pytest.fixture(params=list(UNIVARIATES))
def univariate(request: pytest.FixtureRequest) -> Univariate:
    return UNIVARIATES[request.param]


def raw_for(univariate: Univariate, *batch: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return spread * torch.randn(
        *batch, univariate.parameters, D, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_round_trip(univariate, dtype, spread):
    raw = raw_for(univariate, 40, spread=spread).to(dtype)
    x = torch.randn(40, D, dtype=dtype)
    y, log_det = univariate.forward_and_log_det(x, raw)
    back, inverse_log_det = univariate.inverse_and_log_det(y, raw)
    assert y.dtype == log_det.dtype == dtype
    # A rounding of y is worth this much of x.
    worth = log_det.neg().exp() * torch.maximum(y.abs(), x.abs() * log_det.exp()).clamp_min(1.0)
    if univariate.parameters == 2:
        worth = worth + (raw[:, 1].abs() * log_det.neg().exp())
    torch.testing.assert_close(
        (back - x) / (x.abs() + worth), torch.zeros_like(x), **tolerance(dtype, 8)
    )
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=0)


def test_log_derivative_is_that_of_autograd(univariate):
    raw, x = raw_for(univariate, 10), torch.randn(10, D, dtype=torch.float64)
    for f in (univariate.forward_and_log_det, univariate.inverse_and_log_det):
        slope = vmap(jacrev(lambda x, raw, f=f: f(x, raw)[0]))(x, raw).diagonal(dim1=-2, dim2=-1)
        assert bool((slope > 0).all())
        torch.testing.assert_close(f(x, raw)[1], slope.log())


def test_says_whether_its_derivative_is_the_same_everywhere(univariate):
    raw = raw_for(univariate)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None].expand(7, D)
    log_det = univariate.forward_and_log_det(x, raw)[1]
    assert univariate.linear == torch.allclose(log_det, log_det[:1].expand(7, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_identity_where_it_says(univariate, dtype):
    raw = torch.tensor(univariate.identity, dtype=dtype)[:, None].expand(-1, D)
    assert raw.shape == (univariate.parameters, D)
    x = torch.randn(20, D, dtype=dtype)
    for f in (univariate.forward_and_log_det, univariate.inverse_and_log_det):
        y, log_det = f(x, raw)
        torch.testing.assert_close(y, x, **tolerance(dtype, 2))
        torch.testing.assert_close(log_det, torch.zeros_like(x), **tolerance(dtype, 2))


def test_one_table_serves_any_batch(univariate):
    table = raw_for(univariate)
    for batch in [(), (4,), (2, 1, 3), (0,)]:
        x = torch.randn(*batch, D, dtype=torch.float64)
        for f in (univariate.forward_and_log_det, univariate.inverse_and_log_det):
            y, log_det = f(x, table)
            assert y.shape == log_det.shape == (*batch, D)
            expected = f(x, table.expand(*batch, *table.shape))
            torch.testing.assert_close(y, expected[0])
            torch.testing.assert_close(log_det, expected[1])
    y, log_det = univariate.forward_and_log_det(
        torch.zeros(D, dtype=torch.float64), raw_for(univariate, 5)
    )
    assert y.shape == log_det.shape == (5, D)


def test_gradients_are_finite_for_wild_parameters(univariate):
    for dtype in (torch.float32, torch.float64):
        column = torch.tensor([-80.0, -31.0, -30.0, -29.0, -1.0, 0.0, 1.0, 30.0, 80.0], dtype=dtype)
        raw = column[:, None, None].repeat(1, univariate.parameters, D).requires_grad_()
        x = torch.ones(len(column), D, dtype=dtype, requires_grad=True)
        y, log_det = univariate.forward_and_log_det(x, raw)
        assert bool(log_det.isfinite().all()) and bool(y.isfinite().all())
        total = y.sum() + log_det.sum()
        for grad in torch.autograd.grad(total, (x, raw)):
            assert bool(grad.isfinite().all())


def test_values_and_keeps_its_settings(univariate):
    assert univariate == copy.deepcopy(univariate) == pickle.loads(pickle.dumps(univariate))
    assert hash(univariate) == hash(copy.deepcopy(univariate))
    assert repr(univariate).startswith(type(univariate).__name__)
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        univariate.bound = 3.0


# The four kinds of scale


@pytest.mark.parametrize("kind", [Affine, Scale])
def test_formulas_of_the_scales(kind):
    a = torch.linspace(-20.0, 20.0, 41, dtype=torch.float64)
    offset = math.log(math.e - 1)
    expected = {
        "softclip": 3 * torch.tanh(a / 3),
        "exp": a,
        "softplus": torch.log(torch.log1p(torch.exp(a + offset))),
        "sigmoid": torch.log(2 / (1 + torch.exp(-a))),
    }
    assert set(expected) == set(SCALES)
    for scale, log_scale in expected.items():
        torch.testing.assert_close(kind(scale, bound=3.0).log_scale(a), log_scale)


def test_soft_clip_keeps_its_bound_and_its_gradient():
    univariate = Affine(bound=1.5)
    a = torch.tensor([-1e6, -1.0, 0.0, 1.0, 1e6], dtype=torch.float64, requires_grad=True)
    s = univariate.log_scale(a)
    assert bool((s.abs() <= 1.5).all())
    (grad,) = torch.autograd.grad(s.sum(), a)
    assert grad[2] == 1.0 and bool((grad >= 0).all())


def test_defaults_are_the_same_everywhere():
    assert Affine() == AffineCoupling(D).univariate == RealNVP(D).transform.layers[0].univariate
    assert Affine().scale == Scale().scale == "softclip" and Affine().bound == Scale().bound
    assert Scale("exp", Affine().bound) == Rescale(D).univariate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_does_not_underflow(dtype):
    a = torch.tensor([-1e4, -200.0, -100.0, -40.0], dtype=dtype, requires_grad=True)
    s = Affine("softplus").log_scale(a)
    torch.testing.assert_close(s, a + math.log(math.e - 1))
    (grad,) = torch.autograd.grad(s.sum(), a)
    torch.testing.assert_close(grad, torch.ones_like(a))
    # The two branches meet.
    near = torch.linspace(-31.0, -30.0, 101, dtype=dtype) - math.log(math.e - 1)
    torch.testing.assert_close(
        Affine("softplus").log_scale(near).diff(), near.diff(), rtol=1e-3, atol=0
    )


def test_sigmoid_at_most_doubles():
    a = torch.tensor([-1e4, 0.0, 1e4], dtype=torch.float32)
    s = Affine("sigmoid").log_scale(a)
    assert (
        bool(s.isfinite().all()) and float(s[2].exp()) == pytest.approx(2.0) and float(s[1]) == 0.0
    )


def test_shift_keeps_volumes():
    x, raw = torch.randn(5, D), torch.randn(5, 1, D)
    y, log_det = Shift().forward_and_log_det(x, raw)
    assert torch.equal(y, x + raw[:, 0]) and torch.equal(log_det, torch.zeros(5, D))


def test_affine_is_scale_then_shift():
    raw, x = raw_for(Affine(), 5), torch.randn(5, D, dtype=torch.float64)
    scaled, log_det = Scale().forward_and_log_det(x, raw[:, :1])
    y, expected = Affine().forward_and_log_det(x, raw)
    torch.testing.assert_close(y, scaled + raw[:, 1])
    torch.testing.assert_close(log_det, expected)


# A map of the user's own


@dataclass(frozen=True)
class Power(Univariate):
    """``y = sign(x) |x|^p`` with ``p = raw``; its identity is not at zero, and it takes a spare parameter."""

    parameters = 2
    identity = (1.0, -3.0)
    linear = False

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        p = raw.select(-2, 0) * (raw.select(-2, 1) + 3).exp()
        return x.sign() * x.abs() ** p, p.log() + (p - 1) * x.abs().log()

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        p = raw.select(-2, 0) * (raw.select(-2, 1) + 3).exp()
        x = y.sign() * y.abs() ** (1 / p)
        return x, -(p.log() + (p - 1) * x.abs().log())


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("hidden", [(), (16,)])
def test_structures_take_any_map_and_start_at_its_identity(context_features, hidden):
    for t in (
        Elementwise(Power(), D, context_features, network=mlp(hidden)),
        Coupling(Power(), D, context_features, network=mlp(hidden)),
    ):
        t = t.double()
        x = points(t, 6)
        given = (
            t if context_features is None else t.condition(torch.randn(6, 2, dtype=torch.float64))
        )
        torch.testing.assert_close(given(x), x)
        with torch.no_grad():
            for parameter in t.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        torch.testing.assert_close(given.inv(given(x)), x)
        for point in x:
            one = (
                t if context_features is None else t.condition(torch.zeros(2, dtype=torch.float64))
            )
            _, expected = torch.linalg.slogdet(jacrev(one)(point))
            torch.testing.assert_close(one.forward_and_log_det(point)[1], expected)
        assert "Power" in repr(t)
        for of_own, of_default in zip(
            given.push_score(x, -x), Transform.push_score(given, x, -x), strict=True
        ):
            torch.testing.assert_close(of_own, of_default)


class Slope(Univariate, nn.Module):
    """``y = e^s x`` with one learnt ``s`` for all, and no raw parameter that matters."""

    parameters = 1
    linear = True

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(()))

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.s.exp(), self.s.expand_as(x)

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return y * self.s.neg().exp(), self.s.neg().expand_as(y)


def test_a_map_that_is_a_module_trains_with_its_structure():
    for t in (Elementwise(Slope(), D), Coupling(Slope(), D)):
        assert "univariate.s" in dict(t.named_parameters())
        x = torch.randn(4, D)
        t(x).sum().backward()
        assert t.univariate.s.grad is not None
        nn.init.ones_(t.univariate.s)
        torch.testing.assert_close(t.inv(t(x)), x)
