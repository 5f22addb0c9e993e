"""Tail layers: the tails that they promise, their formulas, and soundness from 1e-30 to 1e30."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from registry import D, normal_log_prob, perturbed
from torch import Tensor
from torch.func import jacrev, vmap

import pyroflows as pf
from pyroflows.transforms import Elementwise, LowerTriangularAffine, Transform
from pyroflows.transforms.tails import LOFT, tail_transform
from pyroflows.univariate import GPDTail

DTYPES = [torch.float32, torch.float64]
SIZES = (1e-30, 1e-3, 1.0, 5.0, 1e3, 1e10, 1e30)


def parameters_by_hand(tail: GPDTail, raw: Tensor) -> tuple[float, float, float, float]:
    """Location, scale, and the weights of the lower and the upper tail."""
    quartile = NormalDist().inv_cdf(0.75)
    scale = quartile * tail.start / (2**tail.start - 1)
    mu, a, b, c = (float(value) for value in raw)
    clip = [math.exp(tail.bound * math.tanh(value / tail.bound)) for value in (a, b, c)]
    return mu, scale * clip[0], tail.start * clip[1], tail.start * clip[2]


def raw_for(*batch: int, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return (spread * torch.randn(*batch, 4, D, generator=generator, dtype=torch.float64)).to(dtype)


# Generalised Pareto tails


@pytest.mark.parametrize("start", [0.01, 0.1, 1.0])
def test_formula(start, device):
    tail = GPDTail(start=start)
    raw = raw_for()[:, :1]
    mu, sigma, lower, upper = parameters_by_hand(tail, raw[:, 0])
    for z in (-5.0, -1.0, -0.3, -1e-6, 0.0, 1e-6, 0.2, 1.0, 4.0):
        weight = lower if z < 0 else upper
        expected = mu + math.copysign(
            sigma / weight * (math.erfc(abs(z) / math.sqrt(2)) ** -weight - 1), z
        )
        y, _ = tail.forward_and_log_det(
            torch.tensor([z], dtype=torch.float64, device=device), raw.to(device)
        )
        assert float(y) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("start", [1e-9, 0.1, 1.0])
def test_log_derivative_is_that_of_autograd(start, device):
    tail, raw = GPDTail(start=start), raw_for(20).to(device)
    x = torch.cat(
        [2 * torch.randn(18, D, dtype=torch.float64), torch.zeros(1, D), torch.full((1, D), -1e-12)]
    ).to(device)
    for f in (tail.forward_and_log_det, tail.inverse_and_log_det):
        slope = vmap(jacrev(lambda x, raw, f=f: f(x, raw)[0]))(x, raw).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(f(x, raw)[1], slope.log(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", [1e-9, 0.1])
def test_derivatives_in_the_parameters_are_those_of_finite_differences(start, device):
    tail = GPDTail(start=start)
    x = torch.tensor(
        [-2.0, -0.4, 1.5], dtype=torch.float64, device=device
    ).requires_grad_()  # off the centre's kink
    raw = raw_for(spread=0.1).to(device).requires_grad_()
    for f in (tail.forward_and_log_det, tail.inverse_and_log_det):
        torch.autograd.gradcheck(f, (x, raw))
        torch.autograd.gradgradcheck(f, (x, raw))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weight_the_tails_are_exponential(dtype, device):
    """The limit of vanishing weight is the negative log of erfc, values and derivatives alike."""
    z = torch.linspace(-6, 6, 41, dtype=dtype, device=device)[:, None]
    log_erfc = torch.log(2 * torch.special.ndtr(-z.double().abs()))
    limit = -z.sign() * log_erfc * NormalDist().inv_cdf(0.75) / math.log(2)
    for start in (1e-6, 1e-20, 1e-35):
        raw = torch.zeros(4, 1, dtype=dtype, device=device, requires_grad=True)
        y, log_det = GPDTail(start).forward_and_log_det(z, raw)
        torch.testing.assert_close(y.double(), limit, rtol=1e-4, atol=1e-6)
        back, inverse_log_det = GPDTail(start).inverse_and_log_det(y, raw)
        torch.testing.assert_close(back, z, rtol=1e-4, atol=1e-6)
        for output in (y, log_det, back, inverse_log_det):
            (grad,) = torch.autograd.grad(output.sum(), raw, retain_graph=True)
            assert bool(grad.isfinite().all())


@pytest.mark.parametrize("start", [0.1, 0.5, 1.0])
def test_starts_with_the_quartiles_of_the_base(start, device):
    quartile = NormalDist().inv_cdf(0.75)
    z = torch.tensor([-quartile, 0.0, quartile], dtype=torch.float64, device=device)[:, None]
    y, _ = GPDTail(start).forward_and_log_det(
        z, torch.zeros(4, 1, dtype=torch.float64, device=device)
    )
    torch.testing.assert_close(y, z)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("start", [0.1, 1.0])
def test_wild_parameters_and_inputs(start, spread, dtype, device):
    tail, raw = GPDTail(start), raw_for(40, spread=spread, dtype=dtype).to(device).requires_grad_()
    eps = torch.finfo(dtype).eps
    for size in SIZES:
        x = (size * torch.randn(40, D, dtype=dtype, device=device)).requires_grad_()
        for f, back in (
            (tail.forward_and_log_det, tail.inverse_and_log_det),
            (tail.inverse_and_log_det, tail.forward_and_log_det),
        ):
            y, log_det = f(x, raw)
            for output in (y, log_det):
                assert bool(output.isfinite().all())
                for grad in torch.autograd.grad(output.sum(), (x, raw), retain_graph=True):
                    assert bool(grad.isfinite().all())
            again, _ = back(y, raw)
            # Beside the location what is tiny drowns, and a rounding of y is worth as much of x as the slope says.
            slack = (x.abs() + (y.abs() + raw[:, 0].abs()) * log_det.neg().exp()).detach() + raw[
                :, 0
            ].abs().detach()
            # The value is an exponential of up to 70, whose rounding counts so many times.
            assert bool(((again - x).abs() <= 1000 * eps * slack).all())


@pytest.mark.parametrize("start", [0.1, 1.0])
def test_the_two_regimes_meet(start, device):
    """Where erfc^-lambda passes e^70, values and slopes go on without a jump, and up to there they are exact."""
    raw = torch.zeros(4, 1, dtype=torch.float64, device=device)
    tail = GPDTail(start)
    _, sigma, weight, _ = parameters_by_hand(tail, raw[:, 0])
    edge = torch.tensor([[sigma / weight * math.exp(70)]], dtype=torch.float64, device=device)
    z, _ = tail.inverse_and_log_det(edge, raw)
    y, log_det = tail.forward_and_log_det(
        z * torch.tensor([[1 - 1e-9], [1 + 1e-9]], dtype=torch.float64, device=device), raw
    )
    torch.testing.assert_close(y[0], y[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(log_det[0], log_det[1], rtol=1e-6, atol=0)
    beyond, _ = tail.forward_and_log_det(z * 1.5, raw)
    back, _ = tail.inverse_and_log_det(beyond, raw)
    torch.testing.assert_close(back, z * 1.5, rtol=1e-10, atol=0)


@torch.no_grad()
def test_survival_function_has_the_promised_index(device):
    """log P(Y > y) falls by 1 / lambda for each unit of log y, on either side by its own lambda."""
    tail = GPDTail(0.5)
    raw = torch.tensor([0.3, -0.2, 0.8, -1.0], dtype=torch.float64, device=device)[:, None]
    *_, lower, upper = parameters_by_hand(tail, raw[:, 0])
    for sign, weight in ((-1.0, lower), (1.0, upper)):
        y = sign * torch.tensor([[1e8], [1e9], [1e10]], dtype=torch.float64, device=device)
        x, log_det = tail.inverse_and_log_det(y, raw)
        log_survival = torch.special.log_ndtr(-x.abs())
        slope = (log_survival.diff(dim=0) / math.log(10)).flatten()
        torch.testing.assert_close(slope, torch.full_like(slope, -1 / weight), rtol=1e-3, atol=0)
        log_density = normal_log_prob(x) + log_det.squeeze(-1)
        slope = log_density.diff(dim=0) / math.log(10)
        torch.testing.assert_close(
            slope, torch.full_like(slope, -1 / weight - 1), rtol=1e-3, atol=0
        )


@torch.no_grad()
def test_hill_estimate_of_draws_is_lambda(device):
    tail = GPDTail(0.5)
    raw = torch.zeros(4, 1, device=device)
    z = torch.randn(400_000, 1, device=device)
    y = tail.forward_and_log_det(z, raw)[0].flatten()
    _, sigma, weight, _ = parameters_by_hand(tail, raw[:, 0])
    k = 40_000
    for side in (y, -y):
        # From its own origin the tail is exactly Pareto.
        largest = (side + sigma / weight).topk(k + 1).values.log()
        hill = float((largest[:k] - largest[k]).mean())
        assert hill == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(k))


@pytest.mark.parametrize("start", [0.1, 1.0])
@torch.no_grad()
def test_density_integrates_to_one(start, device):
    tail = GPDTail(start)
    raw = torch.tensor([0.5, 0.3, -0.5, 0.2], dtype=torch.float64, device=device)[:, None]
    reach, n = 60.0, 40_000
    w = (torch.arange(n, dtype=torch.float64, device=device) + 0.5) * (2 / n) - 1
    y, length = (w * reach).sinh()[:, None], (w * reach).cosh() * reach * (2 / n)
    x, log_det = tail.inverse_and_log_det(y + 0.5, raw)
    total = (normal_log_prob(x) + log_det.squeeze(-1)).exp() @ length
    assert float(total) == pytest.approx(1.0, abs=1e-6)


@torch.no_grad()
def test_density_is_continuous_at_the_centre(device):
    """One scale for both sides, so that the slope has no jump where the sides of different weight meet."""
    raw = torch.tensor([0.5, 0.3, -2.0, 2.0], dtype=torch.float64, device=device)[:, None]
    at = torch.tensor([[0.5 - 1e-9], [0.5], [0.5 + 1e-9]], dtype=torch.float64, device=device)
    _, log_det = GPDTail().inverse_and_log_det(at, raw)
    torch.testing.assert_close(log_det, log_det[1:2].expand(3, 1), rtol=0, atol=1e-7)


@pytest.mark.slow
def test_learns_the_weights_of_its_tails(device):
    """Draws with a heavy upper and a light lower tail, fitted by maximum likelihood."""
    truth = torch.tensor([0.2, 0.1, -0.5, 1.5], device=device)[:, None]
    *_, lower, upper = parameters_by_hand(GPDTail(), truth[:, 0])
    y = GPDTail().forward_and_log_det(torch.randn(10_000, 1, device=device), truth)[0]
    t = Elementwise(GPDTail(), 1).to(device)
    adam = torch.optim.Adam(t.parameters(), lr=0.05)
    for _ in range(200):
        x, log_det = t.inverse_and_log_det(y)
        adam.zero_grad()
        (-(normal_log_prob(x) + log_det).mean()).backward()
        adam.step()
    *_, found_lower, found_upper = parameters_by_hand(t.univariate, t.raw.detach()[:, 0])
    # That of a generalised Pareto tail of n / 2 points has the standard error (1 + lambda) / sqrt(n / 2).
    error = 4 / math.sqrt(len(y) / 2)
    assert found_lower == pytest.approx(lower, abs=error * (1 + lower))
    assert found_upper == pytest.approx(upper, abs=error * (1 + upper))


# Soft log


def test_loft_formula(device):
    t = LOFT(4, bound=2.0)
    x = torch.tensor([-1e6, -2.0, 0.5, 7.0], dtype=torch.float64, device=device)
    y, log_det = t.forward_and_log_det(x)
    expected = [-(math.log(1e6 - 1) + 2), -2.0, 0.5, math.log(6) + 2]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64, device=device))
    assert float(log_det) == pytest.approx(-math.log(1e6 - 1) - math.log(6))
    torch.testing.assert_close(t.inverse_and_log_det(y)[0], x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [0.5, 100.0])
def test_loft_is_the_identity_within_its_bound(bound, dtype, device):
    t = LOFT(1, bound=bound)
    inside = (
        torch.tensor([-1.0, -1e-30, 0.0, 1e-20, 0.7, 1.0], dtype=dtype, device=device)[:, None]
        * bound
    )
    for f in (t.forward_and_log_det, t.inverse_and_log_det):
        y, log_det = f(inside)
        assert torch.equal(y, inside) and torch.equal(log_det, torch.zeros_like(log_det))
    torch.testing.assert_close(
        vmap(jacrev(t))(inside).flatten(), torch.ones(6, dtype=dtype, device=device)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [0.5, 100.0])
def test_loft_is_sound_from_tiny_to_huge(bound, dtype, device):
    t = LOFT(D, bound=bound)
    eps = torch.finfo(dtype).eps
    for size in (*SIZES, 1e31):
        x = (size * torch.randn(40, D, dtype=dtype, device=device)).requires_grad_()
        for f, back in (
            (t.forward_and_log_det, t.inverse_and_log_det),
            (t.inverse_and_log_det, t.forward_and_log_det),
        ):
            y, log_det = f(x)
            assert bool(y.isfinite().all()) and bool(log_det.isfinite().all())
            for output in (y, log_det):
                (grad,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
                assert bool(grad.isfinite().all())
            # A rounding of y is worth so much of x as the slope of the inverse says; of the sum of 3 no more than that.
            again, _ = back(y)
            assert bool(
                (
                    (again - x).abs()
                    <= 8 * eps * (x.abs() + (y.abs() + 1) * torch.exp(-t_slope(f, x)))
                ).all()
            )


def t_slope(f, x: Tensor) -> Tensor:
    """The log-slope of each entry."""
    y = f(x)[0]
    (slope,) = torch.autograd.grad(y.sum(), x)
    return slope.log()


def test_loft_regimes_meet(device):
    t = LOFT(1, bound=2.0)
    edge = math.exp(70) + 2
    x = torch.tensor([[edge * (1 - 1e-9)], [edge * (1 + 1e-9)]], dtype=torch.float64, device=device)
    y, log_det = t.forward_and_log_det(x)
    torch.testing.assert_close(y[0], y[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(log_det[0], log_det[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(t.inverse_and_log_det(y)[0], x, rtol=1e-12, atol=0)


def test_loft_says_its_bound():
    assert repr(LOFT(3)) == "LOFT(3, fast: both directions, bound=100.0)"


# As the last layer of a flow


@pytest.mark.parametrize("tails", ["gpd", "loft"])
@pytest.mark.parametrize("context_features", [None, 2])
def test_is_the_last_layer_of_a_flow(tails, context_features, device):
    layers = [
        LowerTriangularAffine(D, context_features),
        tail_transform(tails, D),
    ]
    flow = perturbed(pf.Flow(layers)).double().to(device)
    c = None if context_features is None else torch.ones(5, 2, dtype=torch.float64, device=device)
    d = flow(c)
    y, log_prob = d.rsample_and_log_prob((4,))
    torch.testing.assert_close(d.log_prob(y.detach()), log_prob)
    log_prob.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in flow.parameters())


def test_places_itself(placement):
    raw, x = raw_for(4, dtype=torch.float32).to(placement), torch.ones(4, D, device=placement)
    loft = LOFT(D).to(placement)
    for output in (
        *GPDTail().forward_and_log_det(x, raw),
        *GPDTail().inverse_and_log_det(x, raw),
        *loft.forward_and_log_det(x),
        *loft.inverse_and_log_det(x),
    ):
        assert output.device.type == placement.type and output.dtype == torch.float32


def test_compiles_as_one_graph(device):
    torch.compiler.reset()
    raw, x = raw_for(5).to(device), torch.randn(5, D, dtype=torch.float64, device=device)
    loft = LOFT(D, bound=0.5)
    both = torch.compile(
        lambda x, raw: (*GPDTail().inverse_and_log_det(x, raw), *loft(x)),
        fullgraph=True,
        backend="eager",
    )
    expected = (*GPDTail().inverse_and_log_det(x, raw), *loft(x))
    for left, right in zip(both(x, raw), expected, strict=True):
        torch.testing.assert_close(left, right)


def test_what_the_names_stand_for():
    gpd: Transform = tail_transform("gpd", D)
    assert isinstance(gpd, Elementwise) and gpd.univariate == GPDTail()
    assert isinstance(tail_transform("loft", D), LOFT)


MISTAKES = [
    (lambda: GPDTail(0.0), ValueError, "start to be positive and finite; got 0.0"),
    (lambda: GPDTail("heavy"), TypeError, "start to be a number; got 'heavy'"),
    (lambda: GPDTail(bound=-1), ValueError, "bound to be positive and finite; got -1"),
    (lambda: LOFT(0), ValueError, "features >= 1; got 0"),
    (lambda: LOFT(2, bound=0), ValueError, "bound to be positive and finite; got 0"),
    (lambda: LOFT(2, bound=None), TypeError, "bound to be a number; got None"),
    (lambda: tail_transform("cauchy", 3), ValueError, "tails to be gpd or loft; got 'cauchy'"),
    (lambda: tail_transform("gpd", 0), ValueError, "features >= 1; got 0"),
]


@pytest.mark.parametrize(
    ("make", "error", "fragment"), MISTAKES, ids=[fragment for *_, fragment in MISTAKES]
)
def test_mistakes_are_told_in_a_sentence(make, error, fragment):
    with pytest.raises(error) as caught:
        make()
    assert fragment in str(caught.value)
