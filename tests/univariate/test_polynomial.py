"""Monotone polynomials against their formulas, and what numeric univariates owe: tails, roundings, wild numbers."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError
from functools import partial

import pytest
import torch
from registry import D, normal_log_prob
from torch import Tensor
from torch.func import jacrev, vmap

from pyroflows.transforms import Elementwise
from pyroflows.univariate.logistic import LogisticMixture
from pyroflows.univariate.polynomial import Bernstein, SumOfSquares

DTYPES = [torch.float32, torch.float64]
CASES = {
    "sum-of-squares": SumOfSquares(),
    "sum-of-squares-small": SumOfSquares(1, 1, bound=2.0),
    "sum-of-squares-large": SumOfSquares(5, 8),
    "bernstein": Bernstein(),
    "bernstein-line": Bernstein(1),
    "bernstein-large": Bernstein(40, bound=10.0),
    "mixture": LogisticMixture(),
    "mixture-one": LogisticMixture(1),
    "mixture-bound": LogisticMixture(3, bound=1.0),
}
POLYNOMIALS = {name: u for name, u in CASES.items() if not name.startswith("mixture")}
SIZES = (1e-30, 1e-3, 1.0, 5.0, 1e3, 1e10, 1e30)
Map = SumOfSquares | Bernstein | LogisticMixture


@pytest.fixture(params=list(CASES))
def univariate(request: pytest.FixtureRequest) -> Map:
    return CASES[request.param]


@pytest.fixture(params=list(POLYNOMIALS))
def polynomial(request: pytest.FixtureRequest) -> SumOfSquares | Bernstein:
    return POLYNOMIALS[request.param]


def raw_for(
    univariate: Map, *batch: int, spread: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    raw = spread * torch.randn(
        *batch, univariate.parameters, D, generator=generator, dtype=torch.float64
    )
    return raw.to(dtype)


# What every one of them owes


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_identity_to_the_last_digit(univariate, dtype, device):
    raw = torch.tensor(univariate.identity, dtype=dtype, device=device)[:, None].expand(-1, D)
    assert raw.shape == (univariate.parameters, D)
    for size in SIZES:
        x = size * torch.randn(50, D, dtype=dtype, device=device)
        for f in (univariate.forward_and_log_det, univariate.inverse_and_log_det):
            y, log_det = f(x, raw)
            torch.testing.assert_close(y, x, rtol=2 * torch.finfo(dtype).eps, atol=0)
            torch.testing.assert_close(
                log_det, torch.zeros_like(x), rtol=0, atol=torch.finfo(dtype).eps
            )


def test_log_derivative_is_that_of_autograd(univariate, device):
    raw = raw_for(univariate, 20).to(device)
    x = 3 * torch.randn(20, D, dtype=torch.float64, device=device)
    for f in (univariate.forward_and_log_det, univariate.inverse_and_log_det):
        slope = vmap(jacrev(lambda x, raw, f=f: f(x, raw)[0]))(x, raw).diagonal(dim1=-2, dim2=-1)
        assert bool((slope > 0).all())
        torch.testing.assert_close(f(x, raw)[1], slope.log(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("spread", "dtype"), [(0.3, torch.float64), (20.0, torch.float32), (20.0, torch.float64)]
)
def test_wild_parameters_and_inputs(univariate, dtype, spread, device):
    raw = raw_for(univariate, 40, spread=spread, dtype=dtype).to(device).requires_grad_()
    eps = torch.finfo(dtype).eps
    for size in SIZES:
        x = (size * torch.randn(40, D, dtype=dtype, device=device)).requires_grad_()
        for f in (univariate.forward_and_log_det, univariate.inverse_and_log_det):
            outputs = f(x, raw)
            for output in outputs:
                assert bool(output.isfinite().all())
                for grad in torch.autograd.grad(
                    output.sum(), (x, raw), retain_graph=True, allow_unused=True
                ):
                    assert grad is None or bool(grad.isfinite().all())
        # The inverse is judged by its residual: where the map is flat, x itself is anyone's guess.
        y, log_det = outputs
        again, forward_log_det = univariate.forward_and_log_det(y, raw)
        slack = x.abs() + raw.detach().abs().amax() + y.abs()
        assert bool(((again - x).abs() <= 300 * eps * slack).all())
        torch.testing.assert_close(forward_log_det, -log_det, rtol=300 * eps, atol=300 * eps)


def test_rises_everywhere(univariate, device):
    raw = raw_for(univariate, 8, spread=3.0).to(device)
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64, device=device)[:, None, None].expand(
        -1, 8, D
    )
    y, log_det = univariate.forward_and_log_det(x, raw)
    steps = y.diff(dim=0)
    # Where it is flat, rounding of values of this size may fall.
    assert bool((steps > -100 * torch.finfo(x.dtype).eps * y.abs().amax()).all())
    # Between two points it rises by the integral of its derivative, here by Simpson's rule on coarse cells.
    slope = log_det.exp()
    cells = (slope[:-2:2] + 4 * slope[1:-1:2] + slope[2::2]) * 0.015 / 3
    risen = y[2::2] - y[:-2:2]
    assert float(((cells - risen).abs() / (risen.abs() + 1)).quantile(0.99)) < 1e-4


def test_one_table_serves_any_batch(univariate, device):
    table = raw_for(univariate).to(device)
    for batch in [(), (4,), (2, 1, 3), (0,)]:
        x = torch.randn(*batch, D, dtype=torch.float64, device=device)
        for f in (univariate.forward_and_log_det, univariate.inverse_and_log_det):
            y, log_det = f(x, table)
            assert y.shape == log_det.shape == (*batch, D)
            expected = f(x, table.expand(*batch, *table.shape))
            torch.testing.assert_close(y, expected[0])
            torch.testing.assert_close(log_det, expected[1])
    for f in (univariate.forward_and_log_det, univariate.inverse_and_log_det):
        y, log_det = f(
            torch.zeros(D, dtype=torch.float64, device=device), raw_for(univariate, 5).to(device)
        )
        assert y.shape == log_det.shape == (5, D)


def test_places_itself(univariate, placement):
    raw = raw_for(univariate, 4, dtype=torch.float32).to(placement)
    x = torch.zeros(4, D, device=placement)
    for f in (univariate.forward_and_log_det, univariate.inverse_and_log_det):
        for output in f(x, raw):
            assert (
                output.device.type == placement.type
                and output.shape == x.shape
                and output.dtype == x.dtype
            )


@pytest.mark.parametrize("inverted", [False, True])
@torch.no_grad()
def test_density_integrates_to_one(univariate, inverted, device):
    """As a map from base to data and, inverted, from data to base."""
    raw = raw_for(univariate, spread=0.15)[:, :1].to(device)
    # Points crowded at the centre, where the map bends, that reach out to the ends of all tails.
    reach, n = math.asinh(1e4), 20_000
    w = (torch.arange(n, dtype=torch.float64, device=device) + 0.5) * (2 / n) - 1
    y, length = (w * reach).sinh()[:, None], (w * reach).cosh() * reach * (2 / n)
    f = univariate.forward_and_log_det if inverted else univariate.inverse_and_log_det
    x, log_det = f(y, raw)
    density = (normal_log_prob(x) + log_det.squeeze(-1)).exp()
    assert float(density @ length) == pytest.approx(1.0, abs=1e-5)


def test_compiles_as_one_graph(univariate, device):
    torch.compiler.reset()
    raw, x = (
        raw_for(univariate, 5).to(device),
        torch.randn(5, D, dtype=torch.float64, device=device),
    )
    compiled = torch.compile(univariate.forward_and_log_det, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, raw), univariate.forward_and_log_det(x, raw))


@pytest.mark.slow
def test_an_inverse_compiles_as_one_graph(device):
    torch.compiler.reset()
    univariate = SumOfSquares(1, 1)
    raw, y = (
        raw_for(univariate, 5).to(device),
        torch.randn(5, D, dtype=torch.float64, device=device),
    )
    compiled = torch.compile(univariate.inverse_and_log_det, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(y, raw), univariate.inverse_and_log_det(y, raw))


def test_values_and_keeps_its_settings(univariate):
    assert univariate == copy.deepcopy(univariate) == pickle.loads(pickle.dumps(univariate))
    assert hash(univariate) == hash(copy.deepcopy(univariate))
    assert repr(univariate).startswith(type(univariate).__name__)
    with pytest.raises(FrozenInstanceError):
        univariate.bound = 3.0


def test_says_whether_its_derivative_is_the_same_everywhere(univariate, device):
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, device=device)[:, None].expand(7, D)
    log_det = univariate.forward_and_log_det(x, raw_for(univariate).to(device))[1]
    assert univariate.linear == torch.allclose(log_det, log_det[:1].expand(7, D))


# The formulas


def coefficients_by_hand(univariate: SumOfSquares, raw: Tensor) -> list[list[float]]:
    """Those of the polynomials of one entry, in powers of 2 x / B."""
    k, n = univariate.polynomials, univariate.degree + 1
    rows = []
    for i in range(k):
        rows.append([(1.0 if j == 0 else 0.0) for j in range(n)])
        for j in range(n):
            rows[i][j] += (1 + 0.5 * math.cos(i * n + j + 1)) * float(raw[i * n + j])
    return rows


def slope_by_hand(univariate: SumOfSquares, raw: Tensor, x: float) -> float:
    squares = [
        sum(c * (2 * x / univariate.bound) ** j for j, c in enumerate(row)) ** 2
        for row in coefficients_by_hand(univariate, raw)
    ]
    return 2.0**-10 + (1 - 2.0**-10) * sum(squares) / len(squares)


@pytest.mark.parametrize("settings", [(3, 4, 5.0), (1, 1, 0.5), (2, 7, 2.0)])
def test_sum_of_squares_by_hand(settings, device):
    univariate = SumOfSquares(*settings)
    raw = raw_for(univariate)[:, :1]
    for x in (-0.9 * univariate.bound, -0.2, 1e-3, 0.3, univariate.bound):
        given = torch.tensor([x], dtype=torch.float64, device=device)
        y, log_det = univariate.forward_and_log_det(given, raw.to(device))
        assert float(log_det) == pytest.approx(
            math.log(slope_by_hand(univariate, raw[:, 0], x)), abs=1e-12
        )
        # The integral by Simpson's rule.
        grid = [x * i / 2000 for i in range(2001)]
        slopes = [slope_by_hand(univariate, raw[:, 0], s) for s in grid]
        total = (
            (slopes[0] + slopes[-1] + 4 * sum(slopes[1:-1:2]) + 2 * sum(slopes[2:-1:2])) * x / 6000
        )
        assert float(y) == pytest.approx(total + float(raw[-1, 0]), rel=1e-9)


@pytest.mark.parametrize("settings", [(16, 4.0), (1, 1.0), (5, 2.0)])
def test_bernstein_by_hand(settings, device):
    univariate = Bernstein(*settings)
    n, bound = settings
    raw = raw_for(univariate)[:, 0]
    steps = [2 * bound / n * math.exp(5 * math.tanh(float(a) / 5)) for a in raw[:n]]
    theta = [sum(steps[:j]) - 0.5 * sum(steps) for j in range(n + 1)]
    for x in (-bound, -0.3 * bound, 1e-3, 0.7 * bound, bound):
        u = (x + bound) / (2 * bound)
        expected = sum(
            theta[j] * math.comb(n, j) * u**j * (1 - u) ** (n - j) for j in range(n + 1)
        ) + float(raw[n])
        slope = sum(
            n * steps[j] * math.comb(n - 1, j) * u**j * (1 - u) ** (n - 1 - j) for j in range(n)
        ) / (2 * bound)
        given = torch.tensor([x], dtype=torch.float64, device=device)
        y, log_det = univariate.forward_and_log_det(given, raw[:, None].to(device))
        assert float(y) == pytest.approx(expected, rel=1e-12)
        assert float(log_det) == pytest.approx(math.log(slope), abs=1e-12)


def test_goes_on_as_a_line_beyond_the_bound(polynomial, device):
    raw, b = raw_for(polynomial).to(device), polynomial.bound
    at = torch.tensor([-b, -b - 1, -3 * b, b, b + 1, 3 * b], dtype=torch.float64, device=device)[
        :, None
    ].expand(-1, D)
    y, log_det = polynomial.forward_and_log_det(at, raw)
    edge, edge_slope = y[[0, 0, 0, 3, 3, 3]], log_det[[0, 0, 0, 3, 3, 3]]
    torch.testing.assert_close(log_det, edge_slope)
    torch.testing.assert_close(y, edge + edge_slope.exp() * (at - at[[0, 0, 0, 3, 3, 3]]))
    inside, _ = polynomial.forward_and_log_det(at * (1 - 1e-9), raw)
    torch.testing.assert_close(inside[[0, 3]], y[[0, 3]], rtol=1e-6, atol=1e-6)


def test_a_sum_of_squares_never_gets_flatter_than_its_floor(device):
    univariate = SumOfSquares(1, 1, bound=1.0)
    # The one polynomial, 1 + g a u, has its zero within the interval.
    raw = torch.tensor([[0.0], [-1.0], [0.0]], dtype=torch.float64, device=device)
    zero = 0.5 / (1 + 0.5 * math.cos(2))
    log_det = univariate.forward_and_log_det(
        torch.tensor([zero], dtype=torch.float64, device=device), raw
    )[1]
    assert float(log_det) == pytest.approx(-10 * math.log(2), abs=1e-9)


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.SGD, lr=1e-2), partial(torch.optim.Adam, lr=1e-2)]
)
def test_polynomials_that_start_alike_learn_apart(optimizer, device):
    """Were they to stay multiples of one another, several squares would be no more than one."""
    univariate = SumOfSquares(3, 4)
    t = Elementwise(univariate, 1).double().to(device)
    steps = optimizer(t.parameters())
    y = torch.cat([torch.randn(200, 1) - 2, 0.5 * torch.randn(200, 1) + 1]).double().to(device)
    for _ in range(100):
        x, log_det = t.forward_and_log_det(y)
        steps.zero_grad()
        (-(normal_log_prob(x) + log_det).mean()).backward()
        steps.step()
    rows = torch.tensor(coefficients_by_hand(univariate, t.raw.detach()[:, 0]), dtype=torch.float64)
    singular = torch.linalg.svdvals(rows)
    assert float(singular[1] / singular[0]) > 1e-2


# Mistakes

MISTAKES = [
    (lambda: SumOfSquares(0), ValueError, "polynomials >= 1; got 0"),
    (lambda: SumOfSquares(2.0), TypeError, "polynomials to be an integer; got 2.0"),
    (lambda: SumOfSquares(2, 0), ValueError, "degree >= 1; got 0"),
    (lambda: SumOfSquares(2, True), TypeError, "degree to be an integer; got True"),
    (lambda: SumOfSquares(bound=0.0), ValueError, "bound to be positive and finite; got 0.0"),
    (lambda: SumOfSquares(bound="wide"), TypeError, "bound to be a number; got 'wide'"),
    (lambda: Bernstein(0), ValueError, "degree >= 1; got 0"),
    (lambda: Bernstein(2.5), TypeError, "degree to be an integer; got 2.5"),
    (lambda: Bernstein(bound=-1.0), ValueError, "bound to be positive and finite; got -1.0"),
    (lambda: Bernstein(bound=math.inf), ValueError, "bound to be positive and finite; got inf"),
    (lambda: LogisticMixture(0), ValueError, "components >= 1; got 0"),
    (lambda: LogisticMixture("many"), TypeError, "components to be an integer; got 'many'"),
    (lambda: LogisticMixture(bound=0), ValueError, "bound to be positive and finite; got 0"),
]


@pytest.mark.parametrize(
    ("make", "error", "fragment"), MISTAKES, ids=[fragment for *_, fragment in MISTAKES]
)
def test_mistakes_are_told_in_a_sentence(make, error, fragment):
    with pytest.raises(error) as caught:
        make()
    assert fragment in str(caught.value)
