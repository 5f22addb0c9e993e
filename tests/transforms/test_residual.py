"""Residual flows: the bound on the contraction, the certified inverse, and the estimate of the log-determinant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from registry import context_for, normal_log_prob, perturbed, points, tolerance
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from pyroflows.transforms._jacobian import Feedforward, trace_rule
from pyroflows.transforms.residual import Residual, spectral_bound

DTYPES = [torch.float32, torch.float64]
ACTIVATIONS = [nn.SiLU, nn.GELU, nn.Mish, nn.Tanh, nn.ELU, nn.Softplus, nn.Softsign, nn.Sigmoid]


def contraction(t: Residual, context: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    return lambda y: t.inverse_and_log_det(y, context)[0] - y


def jacobians(t: Residual, y: Tensor) -> Tensor:
    """Jacobians of the contraction by autograd."""
    return vmap(jacrev(contraction(t)))(y).detach()


def saturated(context_features: int | None = None, **options: Any) -> Residual:
    """A block whose bound is active: at the origin it is nearly a large multiple of the identity."""
    t = perturbed(
        Residual(3, context_features, hidden=(16,), activation=nn.Tanh, **options).double(),
        0.5,
    )
    with torch.no_grad():
        q, _ = torch.linalg.qr(t.network.input.weight)
        t.network.input.weight.copy_(q)
        t.network.layers[0].weight.copy_(8.0 * q.mT)
    return t


# Weights and their norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 20.0, 1e10, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (64, 2), (40, 40), (20, 50)])
def test_the_bound_of_a_matrix_is_above_its_spectral_norm(shape, size, dtype, device):
    generator = torch.Generator().manual_seed(0)
    weight = (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)
    norm = torch.linalg.matrix_norm(weight.double(), 2)
    bound = spectral_bound(weight).double()
    assert bound.isfinite() and bound >= norm
    if size >= 1e-3 and dtype == torch.float64:
        assert bound <= norm * min(shape) ** 2**-8 * (1 + 1e-6)


def test_the_bound_of_a_matrix_at_its_worst(device):
    """All singular values are equal."""
    q, _ = torch.linalg.qr(points(Residual(64), 64, seed=1).to(device))
    assert 1 <= float(spectral_bound(q)) <= 64**2**-8 + 1e-9


def test_the_bound_of_a_matrix_is_differentiable(device):
    weight = points(Residual(4), 6)
    weight[0] *= 3
    weight = weight.to(device).requires_grad_()
    torch.autograd.gradcheck(spectral_bound, (weight,))
    torch.autograd.gradgradcheck(spectral_bound, (weight,))
    (grad,) = torch.autograd.grad(spectral_bound(weight), weight)
    u, s, v = torch.linalg.svd(weight.detach())
    assert s[0] > 1.2 * s[1]
    torch.testing.assert_close(grad, torch.outer(u[:, 0], v[0]), rtol=1e-6, atol=1e-6)
    zero = torch.zeros(4, 6, dtype=torch.float64, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(spectral_bound(zero), zero)
    assert bool(grad.isfinite().all())


# The contraction


@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_contraction_keeps_its_bound_whatever_the_weights(activation, scale, device):
    for lipschitz in (0.5, 0.97):
        t = perturbed(
            Residual(3, hidden=(8, 8), activation=activation, lipschitz=lipschitz).double(),
            scale,
        ).to(device)
        wide = 10.0 ** torch.arange(-3.0, 4.0, dtype=torch.float64)[:, None, None]
        y = (wide * points(t, 7, 200)).reshape(-1, 3).to(device)
        assert float(torch.linalg.matrix_norm(jacobians(t, y), 2).max()) <= lipschitz
        g = contraction(t)(y)
        i, j = torch.randperm(len(y), device=device), torch.arange(len(y), device=device)
        distance = (y[i] - y[j]).norm(dim=-1)
        # Beside the bound, only the rounding of the values themselves.
        assert bool(
            (
                (g[i] - g[j]).norm(dim=-1) <= lipschitz * distance + 1e-14 * (1 + y[i].norm(dim=-1))
            ).all()
        )


def test_the_bound_is_reached_and_not_exceeded(device):
    """It is no bound by far: a network that is nearly linear at the origin comes within the norm's own slack."""
    t = saturated(lipschitz=0.9).to(device)
    with torch.no_grad():
        t.network.input.bias.zero_()
    norm = float(
        torch.linalg.matrix_norm(
            jacobians(t, torch.zeros(1, 3, dtype=torch.float64, device=device)), 2
        )
    )
    assert 0.88 < norm <= 0.9


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_constants_of_the_activations(activation, device):
    h = torch.linspace(-30, 30, 600_001, dtype=torch.float64, device=device)
    t = Residual(2, activation=activation)
    _, slope = torch.func.jvp(t.network.activation, (h,), (torch.ones_like(h),))
    assert float(slope.abs().max()) <= t._constant <= 1.02 * float(slope.abs().max())


def test_a_linear_block_by_hand(device):
    """Without hidden layers the contraction is a matrix."""
    t = Residual(3, hidden=()).double()
    with torch.no_grad():
        t.network.input.weight.copy_(torch.diag(torch.tensor([2.0, 1.0, -1.0])))
        t.network.input.bias.copy_(torch.tensor([1.0, 0.0, 2.0]))
    t = t.to(device)
    y = points(t, 5).to(device)
    x, log_det = t.inverse_and_log_det(y)
    scale = torch.tensor([0.9, 0.45, -0.45], dtype=torch.float64, device=device)
    torch.testing.assert_close(
        x,
        y + scale * y + 0.45 * torch.tensor([1.0, 0.0, 2.0], device=device).double(),
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(log_det, (1 + scale).log().sum().expand(5), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(t.forward_and_log_det(x)[0], y)


@pytest.mark.parametrize("hidden", [(), (5,), (5, 6), (5, 6, 7), (4, 5, 6, 7)])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.Tanh, nn.ELU, nn.Softplus, nn.GELU])
def test_jacobians_are_those_of_autograd(hidden, activation, device):
    t = perturbed(Residual(3, 2, hidden=hidden, activation=activation).double(), 0.7).to(device)
    x, c = points(t, 4).to(device), context_for(t).to(device)
    network = Feedforward.of(t.network, c)
    torch.testing.assert_close(network(x), t.network(x, c))
    value, jacobian = network.linearise(x)
    expected = vmap(jacrev(lambda x: t.network(x, c)))(x)
    torch.testing.assert_close(value, t.network(x, c))
    torch.testing.assert_close(jacobian.matrix().expand(4, 3, 3), expected)
    v = points(t, 4, seed=5).to(device)
    torch.testing.assert_close(jacobian.push(v), (expected @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(jacobian.pull(v), (expected.mT @ v.unsqueeze(-1)).squeeze(-1))
    trace = trace_rule(network.weights)(jacobian.slopes)
    torch.testing.assert_close(trace.expand(4), expected.diagonal(dim1=-2, dim2=-1).sum(-1))


def test_slopes_hold_far_out(device):
    for activation in (nn.SiLU, nn.Tanh, nn.ELU, nn.Softplus):
        t = Residual(1, activation=activation)
        h = torch.tensor([-1e30, -40.0, 40.0, 1e30], device=device)
        _, jacobian = Feedforward(
            (torch.eye(1, device=device),) * 2, (0.0 * h[:1],) * 2, t.network.activation
        ).linearise(h[:, None])
        expected = [0.0, 0.0, 0.0, 0.0] if activation is nn.Tanh else [0.0, 0.0, 1.0, 1.0]
        torch.testing.assert_close(
            jacobian.matrix().flatten(), torch.tensor(expected, device=device), rtol=1e-6, atol=1e-6
        )


# The inverse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lipschitz", [0.5, 0.9, 0.99])
def test_round_trip_where_the_bound_is_active(lipschitz, dtype, device):
    t = saturated(lipschitz=lipschitz).to(device, dtype)
    x = (3 * points(t, 200)).to(device, dtype)
    y, log_det = t.forward_and_log_det(x)
    back, inverse_log_det = t.inverse_and_log_det(y)
    close = tolerance(dtype, 20 / (1 - lipschitz))
    torch.testing.assert_close(back, x, **close)
    torch.testing.assert_close(inverse_log_det, -log_det, **close)
    again, _ = t.forward_and_log_det(t.inverse_and_log_det(x)[0])
    torch.testing.assert_close(again, x, **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.Tanh, nn.ELU])
def test_extreme_weights_and_points_stay_finite(activation, trace, dtype, device):
    t = perturbed(
        Residual(3, 2, hidden=(16, 16), activation=activation, trace=trace).to(dtype), 20.0
    ).to(device)
    sizes = torch.tensor([1e-30, 1e-3, 1.0, 1e3, 1e20], dtype=dtype)
    x = (sizes[:, None, None] * points(t, 5, 20, dtype=dtype)).to(device).requires_grad_()
    c = context_for(t, 5, 20, dtype=dtype).to(device)
    for f in (t.forward_and_log_det, t.inverse_and_log_det):
        y, log_det = f(x, c)
        grads = torch.autograd.grad(
            (y / (1 + x.detach().abs())).sum() + log_det.sum(), [x, *t.parameters()]
        )
        for tensor in (y, log_det, *grads):
            assert bool(tensor.isfinite().all())
    y, _ = t.forward_and_log_det(x, c)
    scale = 1 + x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(
        (t.inverse_and_log_det(y, c)[0] - x) / scale, torch.zeros_like(x), **tolerance(dtype)
    )


def test_a_fixed_number_of_iterations_is_enough(device):
    """Where nothing may be read, the number of iterations comes from the bound alone, which is active here."""
    for t in (saturated(lipschitz=0.97), saturated(lipschitz=0.97, trace="hutchinson")):
        x = points(t, 6).to(device)
        t = t.to(device)
        mapped = vmap(lambda x, t=t: t.forward_and_log_det(x)[0])(x) if t.trace == "exact" else None
        if mapped is None:
            mapped = vmap(lambda x, t=t: t.forward_and_log_det(x)[0], randomness="different")(x)
        torch.testing.assert_close(t.inverse_and_log_det(mapped)[0], x, rtol=1e-13, atol=1e-13)


class Liar(nn.Module):
    """Steeper than it says."""

    lipschitz = 1e-3

    def forward(self, h: Tensor) -> Tensor:
        return (3 * h).sin()


class OfOnesOwn(nn.Module):
    lipschitz = 2.0

    def forward(self, h: Tensor) -> Tensor:
        return (2 * h).sin()


def test_an_activation_of_ones_own(device):
    t = perturbed(Residual(3, hidden=(8,), activation=OfOnesOwn).double(), 2.0).to(device)
    x = points(t, 50).to(device)
    assert float(torch.linalg.matrix_norm(jacobians(t, x), 2).max()) <= 0.9
    y, log_det = t.forward_and_log_det(x)
    torch.testing.assert_close(t.inverse_and_log_det(y)[0], x)
    torch.testing.assert_close(
        log_det, torch.linalg.slogdet(vmap(jacrev(lambda x: t.forward_and_log_det(x)[0]))(x))[1]
    )


class Named(Residual):
    pass


def test_an_inverse_that_is_not_certified_says_so(device):
    t = perturbed(Named(3, hidden=(16, 16), activation=Liar).double(), 5.0).to(device)
    with pytest.raises(
        RuntimeError, match=r"The fixed point of Named does not converge: \d+ of 40 points"
    ):
        t.forward_and_log_det(points(t, 40).to(device))
    t = Residual(3).to(device)
    nn.init.constant_(t.network.layers[-1].bias, math.nan)
    with pytest.raises(
        RuntimeError, match="The fixed point of Residual does not converge: 4 of 4 points"
    ):
        t(torch.zeros(4, 3, device=device))


def test_what_is_not_a_number_stays_so(device):
    t = perturbed(Residual(3, hidden=(8,))).to(device)
    x = torch.zeros(2, 3, device=device)
    x[0, 1] = math.nan
    y = t.forward_and_log_det(x)[0]
    assert bool(y[0].isnan().any()) and bool(y[1].isfinite().all())


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_gradients_are_those_of_the_implicit_function_theorem(trace, device):
    t = saturated(2, trace=trace).to(device)
    x, c = points(t, 5).to(device), context_for(t, 5).to(device)
    weights = points(t, 5, seed=7).to(device)
    inputs = [x.requires_grad_(), c.requires_grad_(), *t.parameters()]
    y, _ = t.forward_and_log_det(x, c)
    grads = torch.autograd.grad((y * weights).sum(), inputs)
    # dy = (I + J)^-1 (dx - dg), with the solve by hand and the rest by autograd through the closed form.
    at = y.detach()
    matrix = vmap(jacrev(lambda y, c: t.inverse_and_log_det(y, c)[0]), randomness="same")(
        at, c.detach()
    )
    adjoint = torch.linalg.solve(matrix.mT, weights.unsqueeze(-1)).squeeze(-1).detach()
    by_hand = torch.autograd.grad((contraction(t, c)(at) * -adjoint).sum(), inputs[1:])
    for left, right in zip(grads, (adjoint, *by_hand), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_second_derivatives(device):
    t = perturbed(Residual(2, hidden=(4,)).double(), 1.0).to(device)
    x = points(t, 2).to(device).requires_grad_()
    for f in (t.forward_and_log_det, t.inverse_and_log_det):
        torch.autograd.gradgradcheck(f, (x,))
    names, values = zip(*t.named_parameters(), strict=True)

    def of_parameters(*values: Tensor) -> tuple[Tensor, Tensor]:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.t = t

            def forward(self) -> tuple[Tensor, Tensor]:
                return self.t.forward_and_log_det(x.detach())

        return functional_call(
            Both(), {f"t.{n}": v for n, v in zip(names, values, strict=True)}, ()
        )

    torch.autograd.gradcheck(of_parameters, values)


def test_a_fresh_block_learns_in_all_its_units(device):
    t = Residual(2, hidden=(8, 8)).to(device)
    optimiser = torch.optim.Adam(t.parameters(), 1e-2)
    y = points(t, 100, dtype=torch.float32).to(device)
    for _ in range(2):
        x, log_det = t.inverse_and_log_det(y)
        optimiser.zero_grad()
        (-(normal_log_prob(2 * x) + log_det)).mean().backward()
        optimiser.step()
    for name, parameter in t.named_parameters():
        grad = parameter.grad.reshape(len(parameter), -1)
        assert bool(grad.abs().sum(1).bool().all()), name
        assert len(torch.unique(grad, dim=0)) == len(grad), name


# The log-determinant


def over_draws(t: Residual, y: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Estimates of the log-determinants of one point, and of the gradient of the first weights, over many draws."""
    values, grads = [], []
    for _ in range(draws):
        log_det = t.inverse_and_log_det(y)[1].mean()
        (grad,) = torch.autograd.grad(log_det, t.network.input.weight)
        values.append(log_det.detach())
        grads.append(grad.flatten())
    return torch.stack(values), torch.stack(grads)


def test_the_estimate_is_unbiased(device):
    t = saturated(trace="hutchinson", lipschitz=0.8).to(device)
    y = (0.2 * points(t, 20)).to(device)
    values, grads = over_draws(t, y, 800)
    expected, expected_grad = (stacked[0] for stacked in over_draws(t.eval(), y, 1))
    error = values.std() / math.sqrt(len(values))
    assert float((values.mean() - expected).abs()) < 4 * float(error) < 0.1 * float(expected.abs())
    # The largest of 48 standardised errors.
    errors = (grads.mean(0) - expected_grad) / (grads.std(0) / math.sqrt(len(grads)))
    assert float(errors.abs().max()) < 4.5
    assert float(grads.std(0).max()) > 0 and float(expected_grad.norm()) > 10 * float(
        grads.std(0).norm()
    ) / math.sqrt(800)


def test_the_roulette_pays_for_what_it_leaves_out(device):
    t = Residual(2, lipschitz=0.7)
    draws = [t._roulette(torch.zeros(1, device=device)) for _ in range(4000)]
    for k in range(6):
        mean = sum(weights[k] for weights in draws if len(weights) > k) / len(draws)
        assert mean == pytest.approx(1.0, abs=5 * math.sqrt(0.7**-k / 4000))
    assert all(weights[:2] == [1.0, 1.0] for weights in draws)
    assert sum(map(len, draws)) / 4000 == pytest.approx(2 + 0.7 / 0.3, rel=0.1)


def test_the_fixed_series_differs_from_the_exact_one_by_its_noise_only(device):
    """Its traces are exact where the Jacobian is a multiple of the identity, so that no noise is left."""
    t = Residual(3, hidden=(), trace="hutchinson").double()
    with torch.no_grad():
        t.network.input.weight.copy_(0.6 * torch.eye(3))
    t, y = t.to(device), points(t, 4).to(device)
    log_det = vmap(lambda y: t.inverse_and_log_det(y)[1], randomness="different")(y)
    torch.testing.assert_close(
        log_det, torch.full_like(log_det, 3 * math.log(1.6)), rtol=1e-7, atol=1e-7
    )


def test_evaluation_mode_is_exact_and_training_mode_follows_the_seed(device):
    t = perturbed(Residual(4, hidden=(8,), trace="hutchinson").double(), 1.0).to(device)
    y = points(t, 5).to(device)
    expected = torch.linalg.slogdet(vmap(jacrev(lambda y: t.eval().inverse_and_log_det(y)[0]))(y))[
        1
    ]
    torch.testing.assert_close(t.eval().inverse_and_log_det(y)[1], expected)
    torch.testing.assert_close(
        t.eval().forward_and_log_det(t.eval()(y))[1], t.eval().log_abs_det_jacobian(t(y), t(t(y)))
    )
    t.train()
    draws = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        draws.append(t.inverse_and_log_det(y)[1])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_large_vectors_are_estimated_and_small_ones_not(device):
    for features, exact in ((32, True), (33, False)):
        t = perturbed(Residual(features, hidden=(8,)).double()).to(device)
        y = points(t, 3).to(device)
        assert torch.equal(t.inverse_and_log_det(y)[1], t.inverse_and_log_det(y)[1]) == exact
        torch.testing.assert_close(t.inverse_and_log_det(t.forward_and_log_det(y)[0])[0], y)
    assert torch.equal(
        *(
            Residual(40, trace="exact")
            .to(device)
            .inverse_and_log_det(torch.ones(40, device=device))[1],
        )
        * 2
    )


@pytest.mark.parametrize("context_features", [None, 2])
@torch.no_grad()
def test_integrates_to_one(context_features, device):
    t = perturbed(Residual(2, context_features, hidden=(16, 16)).double(), 1.0).to(device)
    side = torch.linspace(-12, 12, 401, dtype=torch.float64, device=device)
    y = torch.cartesian_prod(side, side)
    c = None if context_features is None else context_for(t).to(device)
    x, log_det = t.inverse_and_log_det(y, c)
    total = (normal_log_prob(x) + log_det).exp().sum() * (side[1] - side[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=1e-6)
    assert float(log_det.abs().max()) > 0.05


# Where nothing may be read


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_compiles_as_one_graph(trace, device):
    torch.compiler.reset()
    t = perturbed(Residual(3, hidden=(4,), lipschitz=0.2, trace=trace).double(), 1.0).to(device)
    x = points(t, 4).to(device).requires_grad_()

    def both(x: Tensor) -> tuple[Tensor, ...]:
        y, log_det = t.forward_and_log_det(x)
        back, inverse_log_det = t.inverse_and_log_det(y)
        return y, back, log_det, inverse_log_det

    compiled, expected = torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x)
    for left, right in zip(compiled[: 4 if trace == "exact" else 2], expected, strict=False):
        torch.testing.assert_close(left, right)
    grads = [torch.autograd.grad(outputs[0].sin().sum(), x)[0] for outputs in (compiled, expected)]
    torch.testing.assert_close(*grads)


def test_places_its_estimate(placement):
    t = Residual(3, hidden=(8,), trace="hutchinson").to(placement)
    x = torch.zeros(4, 3, device=placement)
    for y, log_det in (t.forward_and_log_det(x), t.inverse_and_log_det(x)):
        assert y.device.type == log_det.device.type == placement.type and log_det.shape == (4,)


# Mistakes

MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "features": ({"features": 0}, ValueError, "features >= 1; got 0"),
    "features-float": ({"features": 2.0}, TypeError, "features to be an integer; got 2.0"),
    "context": ({"context_features": 0}, ValueError, "context_features >= 1; got 0"),
    "hidden": ({"hidden": 8}, TypeError, "hidden to be a sequence of integers"),
    "hidden-zero": ({"hidden": (0,)}, ValueError, "hidden >= 1; got 0"),
    "activation": ({"activation": "silu"}, TypeError, "activation to make a module"),
    "activation-unknown": (
        {"activation": nn.ReLU},
        ValueError,
        "one of SiLU, GELU, Mish, Tanh, .*; got ReLU",
    ),
    "activation-constant": (
        {"activation": type("Bad", (nn.Tanh,), {"lipschitz": -1.0})},
        ValueError,
        "to be positive",
    ),
    "lipschitz-one": ({"lipschitz": 1.0}, ValueError, r"lipschitz within \(0, 1\).*; got 1.0"),
    "lipschitz-zero": ({"lipschitz": 0}, ValueError, "lipschitz to be positive and finite; got 0"),
    "lipschitz-nan": (
        {"lipschitz": math.nan},
        ValueError,
        "lipschitz to be positive and finite; got nan",
    ),
    "lipschitz-word": ({"lipschitz": "0.9"}, TypeError, "lipschitz to be a number; got '0.9'"),
    "trace": (
        {"trace": "skilling"},
        ValueError,
        "trace to be auto, exact or hutchinson; got 'skilling'",
    ),
    "trace-none": ({"trace": None}, ValueError, "trace to be auto, exact or hutchinson; got None"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes(mistake):
    options, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        Residual(**{"features": 3, **options})


def test_says_what_it_is():
    assert "fast: scoring, lipschitz=0.9, trace='auto'" in repr(Residual(3))
