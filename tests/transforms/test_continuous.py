"""Continuous flows: the solution of the differential equation, its log-determinant, and what steers the solvers."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pyro
import pytest
import torch
from marks import slow_but_for
from registry import context_for, normal_log_prob, perturbed, points
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from pyroflows.transforms.continuous import ContinuousFlow

TIGHT: dict[str, dict[str, Any]] = {
    "dopri5": {"solver": "dopri5", "rtol": 1e-9, "atol": 1e-9},
    "dopri8": {"solver": "dopri8", "rtol": 1e-11, "atol": 1e-11},
    "bosh3": {"solver": "bosh3", "rtol": 1e-8, "atol": 1e-8},
    "adaptive_heun": {"solver": "adaptive_heun", "rtol": 1e-5, "atol": 1e-5},
    "rk4": {"solver": "rk4", "steps": 64},
    "gbs": {"solver": "gbs"},
}
ADAPTIVE = [name for name in TIGHT if name not in ("rk4", "gbs")]
SMALL: dict[str, Any] = {"hidden": (8, 8)}


def linear_flow(device: torch.device, **options: Any) -> tuple[ContinuousFlow, Tensor]:
    """A velocity that is linear in the point, in time and in the context, and the matrix of its equation."""
    t = perturbed(ContinuousFlow(3, 2, hidden=(), **options).double(), 0.5).to(device)
    c = context_for(t).to(device)
    with torch.no_grad():
        matrix = torch.zeros(5, 5, dtype=torch.float64, device=device)  # of (z, t, 1)
        matrix[:3, :4] = t.network.input.weight
        matrix[:3, 4] = t.network.input.bias + t.network.context(c)
        matrix[3, 4] = 1.0
    return t, matrix


# The differential equation


@pytest.mark.parametrize("solver", list(TIGHT))
def test_a_linear_equation_is_solved_by_the_matrix_exponential(solver, device):
    t, matrix = linear_flow(device, **TIGHT[solver])
    x, c = points(t, 6).to(device), context_for(t).to(device)
    y, log_det = t.forward_and_log_det(x, c)
    start = torch.cat([x, torch.zeros_like(x[:, :1]), torch.ones_like(x[:, :1])], -1)
    expected = (start @ torch.linalg.matrix_exp(matrix).mT)[:, :3]
    # A few tens of tolerances, for errors add up.
    atol = 30 * TIGHT[solver].get("rtol", 1e-10)
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)
    torch.testing.assert_close(log_det, matrix[:3, :3].trace().expand(6), rtol=0, atol=atol)
    back, inverse_log_det = t.inverse_and_log_det(y, c)
    torch.testing.assert_close(back, x, rtol=0, atol=atol)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=atol)


def test_time_enters_the_network(device):
    """A velocity of time alone is integrated: the path ends after the integral of tanh."""
    t = ContinuousFlow(1, hidden=(1,), solver="gbs").double()
    with torch.no_grad():
        t.network.input.weight.copy_(torch.tensor([[0.0, 2.0]]))
        t.network.input.bias.fill_(-0.5)
        t.network.layers[0].weight.fill_(1.0)
    x = torch.zeros(1, dtype=torch.float64, device=device)
    y, log_det = t.to(device).forward_and_log_det(x)
    expected = 0.5 * (math.log(math.cosh(1.5)) - math.log(math.cosh(0.5)))
    torch.testing.assert_close(y, torch.full_like(y, expected), rtol=1e-10, atol=0)
    assert not bool(log_det.any())


@pytest.mark.parametrize(("solver", "order"), [("rk4", 4), ("gbs", 10)])
def test_the_order_of_the_fixed_steps(solver, order, device):
    errors = []
    for steps in (1, 2) if solver == "gbs" else (4, 8):
        t, matrix = linear_flow(device, solver=solver, steps=steps)
        with torch.no_grad():
            t.network.input.weight.mul_(2.0)
            matrix[:3, :4] *= 2.0
        x = points(t, 4).to(device)
        start = torch.cat([x, torch.zeros_like(x[:, :1]), torch.ones_like(x[:, :1])], -1)
        expected = (start @ torch.linalg.matrix_exp(matrix).mT)[:, :3]
        y = t.forward_and_log_det(x, context_for(t).to(device))[0].detach()
        errors.append(float((y - expected).abs().max()))
    assert order - 1 < math.log2(errors[0] / errors[1]) < order + 2


@pytest.mark.parametrize(
    ("hidden", "solver"),
    [
        ((), "dopri5"),
        ((5, 6, 7), "dopri5"),
        ((5,), "dopri8"),
        ((5, 6), "rk4"),
    ],
)
def test_the_log_det_is_that_of_autograd(hidden, solver, device):
    t = perturbed(ContinuousFlow(3, 2, hidden=hidden, **TIGHT[solver]).double(), 0.5).to(device)
    x, c = points(t, 3).to(device), context_for(t, 3).to(device)
    y, log_det = t.forward_and_log_det(x, c)
    for i in range(3):
        point = x[i].clone().requires_grad_()
        jacobian = torch.autograd.functional.jacobian(
            lambda x, i=i: t.forward_and_log_det(x, c[i])[0], point
        )
        torch.testing.assert_close(
            log_det[i], torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=1e-6
        )
    back, inverse_log_det = t.inverse_and_log_det(y, c)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_each_point_of_a_batch_is_held_to_the_tolerance(solver, device):
    """One rough path among many still ones, which a mean over the batch would hide."""
    options = {"solver": solver, "rtol": 1e-4, "atol": 1e-4, **SMALL}
    t = perturbed(ContinuousFlow(3, 2, **options).double(), 0.3).to(device)
    fine = ContinuousFlow(3, 2, solver="gbs", steps=40, **SMALL).double().to(device)
    fine.load_state_dict(t.state_dict())
    x, c = points(t, 400).to(device), torch.zeros(400, 2, dtype=torch.float64, device=device)
    with torch.no_grad():
        c[7] = torch.tensor([300.0, -500.0])
        t.network.layers[-1].bias.zero_(), fine.network.layers[-1].bias.zero_()
        errors = [
            a - b
            for a, b in zip(
                t.forward_and_log_det(x, c), fine.forward_and_log_det(x, c), strict=True
            )
        ]
    assert max(float(error.abs().max()) for error in errors) < 20 * 1e-4


@pytest.mark.parametrize("context_features", [None, 2])
@torch.no_grad()
def test_integrates_to_one(context_features, device):
    t = perturbed(
        ContinuousFlow(2, context_features, hidden=(16, 16), solver="rk4", steps=20).double(),
        0.5,
    ).to(device)
    side = torch.linspace(-12, 12, 161, dtype=torch.float64, device=device)
    y = torch.cartesian_prod(side, side)
    c = None if context_features is None else context_for(t).to(device)
    x, log_det = t.inverse_and_log_det(y, c)
    total = (normal_log_prob(x) + log_det).exp().sum() * (side[1] - side[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=1e-4)
    assert float(log_det.abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["rk4", "gbs"])
def test_extreme_weights_and_points_stay_finite(solver, dtype, device):
    t = perturbed(ContinuousFlow(3, 2, solver=solver, **SMALL).to(dtype), 20.0).to(device)
    sizes = torch.tensor([1e-30, 1e-3, 1.0, 1e3, 1e30], dtype=dtype)
    x = (sizes[:, None, None] * points(t, 5, 20, dtype=dtype)).to(device)
    c = context_for(t, 5, 20, dtype=dtype).to(device)
    for f in (t.forward_and_log_det, t.inverse_and_log_det):
        for tensor in f(x, c):
            assert bool(tensor.isfinite().all())


def test_a_fresh_flow_learns_in_all_its_units(device):
    t = ContinuousFlow(2, solver="rk4", steps=2, **SMALL).to(device)
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


# The trace


def test_the_estimate_is_unbiased_and_so_is_its_gradient(device):
    t = perturbed(
        ContinuousFlow(4, trace="hutchinson", solver="rk4", steps=4, **SMALL).double(), 1.0
    ).to(device)
    y = points(t, 1).to(device)

    def with_gradient(y: Tensor) -> tuple[Tensor, Tensor]:
        log_det = t.inverse_and_log_det(y)[1]
        return log_det.detach(), torch.autograd.grad(log_det.mean(), t.network.input.weight)[0]

    # One point many times over: each has its own noise.
    draws = 4000
    values, grad = with_gradient(y.expand(draws, 4))
    grads = torch.stack([with_gradient(y.expand(40, 4))[1] for _ in range(100)])
    t.eval()
    expected, expected_grad = with_gradient(y)
    error = float(values.std()) / math.sqrt(draws)
    assert 0 < abs(float(values.mean() - expected)) < 4 * error < 0.2 * float(expected.abs())
    # The largest of 40 standardised errors; the spread of 40 is that of 4000 times ten.
    assert float(((grad - expected_grad) / (grads.std(0) / 10)).abs().max()) < 4.5


def test_the_noise_is_fixed_over_a_solve(device):
    """Otherwise no solver of high order would converge to anything."""
    t = perturbed(
        ContinuousFlow(4, trace="hutchinson", solver="rk4", steps=8, **SMALL).double(), 0.5
    ).to(device)
    finer = copy.deepcopy(t)
    finer.steps = 16
    x = points(t, 5).to(device)
    results = []
    for each in (t, finer, copy.deepcopy(t).eval()):
        pyro.set_rng_seed(3)
        results.append(each.forward_and_log_det(x)[1].detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert float((results[0] - results[2]).abs().max()) > 0.01


def test_training_mode_follows_the_seed_and_evaluation_mode_is_exact(device):
    t = perturbed(ContinuousFlow(4, trace="hutchinson", solver="rk4", **SMALL).double(), 0.5).to(
        device
    )
    exact = ContinuousFlow(4, trace="exact", solver="rk4", **SMALL).double().to(device)
    exact.load_state_dict(t.state_dict())
    x = points(t, 5).to(device)
    torch.testing.assert_close(t.eval().forward_and_log_det(x), exact.forward_and_log_det(x))
    t.train()
    draws = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        draws.append(t.forward_and_log_det(x)[1])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_what_is_exact_by_itself(device):
    for features, hidden, exact in [
        (60, (8, 8), True),
        (32, (8, 8, 8), True),
        (33, (8, 8, 8), False),
    ]:
        t = perturbed(ContinuousFlow(features, hidden=hidden, solver="rk4", steps=1)).to(device)
        x = torch.ones(features, device=device)
        assert torch.equal(t.forward_and_log_det(x)[1], t.forward_and_log_det(x)[1]) == exact


# What regularises


def test_the_energy_of_a_straight_path(device):
    t = ContinuousFlow(2, hidden=(), solver="rk4").double()
    with torch.no_grad():
        t.network.input.bias.copy_(torch.tensor([3.0, -4.0]))
    kinetic, jacobian = t.to(device).path_energy(points(t, 3, 2).to(device))
    torch.testing.assert_close(
        kinetic, torch.full((3, 2), 25.0, dtype=torch.float64, device=device)
    )
    assert jacobian.shape == (3, 2) and not bool(jacobian.any())


def test_the_energies_by_quadrature(device):
    t, matrix = linear_flow(device, solver="gbs")
    y, c = points(t, 1).to(device), context_for(t).to(device)
    kinetic, jacobian = t.path_energy(y.expand(4000, 3), c)
    norm = matrix[:3, :3].square().sum()
    torch.testing.assert_close(
        jacobian.mean(), norm, rtol=0, atol=4 * float(jacobian.detach().std()) / 4000**0.5
    )
    nodes = ((torch.arange(400) + 0.5) / 400).tolist()
    end = torch.cat([y[0], torch.ones_like(y[0, :2])])
    path = torch.stack([torch.linalg.matrix_exp((s - 1) * matrix) @ end for s in nodes])
    expected = (path @ matrix[:3].mT).square().sum(-1).mean()
    torch.testing.assert_close(kinetic, expected.expand(4000), rtol=1e-4, atol=0)


def test_the_energies_can_be_trained(device):
    t = perturbed(ContinuousFlow(3, 2, **SMALL).double(), 0.5).to(device)
    kinetic, jacobian = t.path_energy(points(t, 6).to(device), context_for(t, 6).to(device))
    assert bool((kinetic > 0).all()) and bool((jacobian > 0).all())
    for parameter in t.parameters():
        (grad,) = torch.autograd.grad(kinetic.sum() + jacobian.sum(), parameter, retain_graph=True)
        assert bool(grad.isfinite().all()) and bool(grad.any())


# The solvers


@pytest.mark.parametrize(("solver", "trace"), [("dopri5", "hutchinson"), ("bosh3", "exact")])
def test_the_adjoint_gives_the_gradients_of_plain_backpropagation(solver, trace, device):
    plain = perturbed(
        ContinuousFlow(3, 2, solver=solver, rtol=1e-8, atol=1e-8, trace=trace, **SMALL).double(),
        0.5,
    ).to(device)
    adjoint = (
        ContinuousFlow(
            3, 2, solver=solver, rtol=1e-8, atol=1e-8, trace=trace, adjoint=True, **SMALL
        )
        .double()
        .to(device)
    )
    adjoint.load_state_dict(plain.state_dict())
    weights = points(plain, 5, seed=9).to(device)
    results = []
    for t in (plain, adjoint):
        pyro.set_rng_seed(1)
        x, c = (
            points(t, 5).to(device).requires_grad_(),
            context_for(t, 5).to(device).requires_grad_(),
        )
        y, log_det = t.inverse_and_log_det(x, 2 * c)
        total = (y * weights).sum() + log_det.sum()
        results.append(
            (y.detach(), log_det.detach(), *torch.autograd.grad(total, [x, c, *t.parameters()]))
        )
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-6, atol=2e-6)


def test_the_adjoint_carries_scores(device):
    t = perturbed(ContinuousFlow(3, adjoint=True, rtol=1e-8, atol=1e-8, **SMALL).double(), 0.5).to(
        device
    )
    x = points(t, 5).to(device)
    by_steps = ContinuousFlow(3, solver="gbs", steps=8, **SMALL).double().to(device)
    by_steps.load_state_dict(t.state_dict())
    y, _, score = t.push_score(x, -x)
    value = y.detach().requires_grad_()
    jacobian = vmap(jacrev(lambda y: by_steps.inverse_and_log_det(y)[0]))(value).detach()
    (slope,) = torch.autograd.grad(by_steps.inverse_and_log_det(value)[1].sum(), value)
    expected = (jacobian.mT @ -x.unsqueeze(-1)).squeeze(-1) + slope
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-6)


def test_an_adaptive_solver_takes_equal_steps_under_function_transforms(device):
    t = perturbed(ContinuousFlow(2, context_features=2, **SMALL).double(), 0.5).to(device)
    x, c = points(t, 5).to(device), torch.randn(5, 2, dtype=torch.float64, device=device)

    def score(x, c):
        return t.inverse_and_log_det(x, c)[1]

    torch.testing.assert_close(vmap(score)(x, c), score(x, c), rtol=1e-4, atol=1e-4)
    value = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(score(value, c).sum(), value)
    torch.testing.assert_close(vmap(grad(score))(x, c), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_solver_in_both_dtypes(dtype, device):
    t = perturbed(ContinuousFlow(3, 2).to(dtype), 0.5).to(device)
    x, c = points(t, 4, 1, dtype=dtype).to(device), context_for(t, 6, dtype=dtype).to(device)
    y, log_det = t.forward_and_log_det(x, c)
    assert y.dtype == log_det.dtype == dtype and y.shape == (4, 6, 3) and log_det.shape == (4, 6)
    back, _ = t.inverse_and_log_det(y, c)
    torch.testing.assert_close(back, x.expand(4, 6, 3), rtol=1e-3, atol=1e-3)
    for shape in ((0, 3), (2, 0, 3), (3,)):
        y, log_det = t.forward_and_log_det(torch.ones(shape, dtype=dtype, device=device), c[0])
        assert y.shape == shape and log_det.shape == shape[:-1]


def test_tolerances_below_rounding_are_those_of_rounding(device):
    t = perturbed(ContinuousFlow(3, rtol=1e-12, atol=1e-12, **SMALL), 0.3).to(device)
    x = points(t, 5, dtype=torch.float32).to(device)
    torch.testing.assert_close(
        t.inverse_and_log_det(t.forward_and_log_det(x)[0])[0], x, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("adjoint", [False, True])
def test_a_solver_that_comes_to_no_end_is_followed_by_equal_steps(adjoint, device, monkeypatch):
    t = perturbed(ContinuousFlow(3, adjoint=adjoint, **SMALL), 0.3).to(device)
    x = points(t, 5).to(device)
    expected = t.forward_and_log_det(x)
    monkeypatch.setattr("pyroflows.transforms.continuous._MOST_STEPS", 1)
    with pytest.warns(UserWarning, match="The solver dopri5 of ContinuousFlow gives up"):
        found = t.forward_and_log_det(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adjoint", [False, True])
def test_parameters_that_are_no_numbers_leave_no_numbers(adjoint, device):
    t = ContinuousFlow(3, adjoint=adjoint, **SMALL).to(device)
    nn.init.constant_(t.network.layers[-1].bias, math.nan)
    with pytest.warns(UserWarning, match="gives up"):
        y, _ = t.forward_and_log_det(torch.zeros(2, 3, device=device))
    assert bool(y.isnan().all())


def test_an_absent_dependency_is_told_with_its_install_line(monkeypatch, device):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(
        ImportError,
        match=r'needs torchdiffeq; install it with pip install "pyroflows\[continuous\]"',
    ):
        ContinuousFlow(3)
    t = perturbed(ContinuousFlow(3, solver="rk4")).to(device)
    assert t(torch.zeros(3, device=device)).shape == (3,)


@pytest.mark.parametrize("solver", slow_but_for(["rk4"], ["rk4", "gbs"]))
def test_equal_steps_compile_as_one_graph(solver, device):
    torch.compiler.reset()
    t = perturbed(ContinuousFlow(3, solver=solver, steps=1, hidden=(8,)).double()).to(device)
    x = points(t, 4).to(device).requires_grad_()
    compiled = torch.compile(
        t.forward_and_log_det, fullgraph=True, backend="aot_eager" if solver == "rk4" else "eager"
    )(x)
    for left, right in zip(compiled, t.forward_and_log_det(x), strict=True):
        torch.testing.assert_close(left, right)
    (grad,) = torch.autograd.grad(compiled[1].sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(t.forward_and_log_det(x)[1].sum(), x)[0])


def test_places_its_estimate(placement):
    t = ContinuousFlow(3, trace="hutchinson", solver="rk4", steps=1, **SMALL).to(placement)
    x = torch.zeros(4, 3, device=placement)
    for tensor in (*t.forward_and_log_det(x), *t.inverse_and_log_det(x), *t.path_energy(x)):
        assert tensor.device.type == placement.type and tensor.shape[0] == 4


# Mistakes

MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "features": ({"features": 0}, ValueError, "features >= 1; got 0"),
    "features-float": ({"features": 2.0}, TypeError, "features to be an integer; got 2.0"),
    "context": ({"context_features": 0}, ValueError, "context_features >= 1; got 0"),
    "hidden": ({"hidden": 8}, TypeError, "hidden to be a sequence of integers"),
    "activation": ({"activation": "tanh"}, TypeError, "activation to make a module"),
    "trace": ({"trace": "hutch"}, ValueError, "trace to be auto, exact or hutchinson; got 'hutch'"),
    "solver": (
        {"solver": "euler"},
        ValueError,
        "solver to be one of dopri5, .*, rk4, gbs; got 'euler'",
    ),
    "solver-none": ({"solver": None}, ValueError, "solver to be one of dopri5, .*; got None"),
    "rtol": ({"rtol": 0.0}, ValueError, "rtol to be positive and finite; got 0.0"),
    "rtol-word": ({"rtol": "1e-5"}, TypeError, "rtol to be a number; got '1e-5'"),
    "atol": ({"atol": -1.0}, ValueError, "atol to be positive and finite; got -1.0"),
    "steps-adaptive": (
        {"steps": 10},
        ValueError,
        r"steps for a solver of equal steps \(rk4, gbs\) only; got solver='dopri5'",
    ),
    "steps-zero": ({"solver": "rk4", "steps": 0}, ValueError, "steps >= 1; got 0"),
    "steps-float": ({"solver": "rk4", "steps": 2.5}, TypeError, "steps to be an integer; got 2.5"),
    "adjoint-fixed": (
        {"solver": "rk4", "adjoint": True},
        ValueError,
        "adjoint=True with an adaptive solver .* got 'rk4'",
    ),
    "adjoint-word": ({"adjoint": "yes"}, TypeError, "adjoint to be True or False; got 'yes'"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes(mistake):
    options, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        ContinuousFlow(**{"features": 3, **options})


def test_says_what_it_is():
    assert "fast: neither direction, trace='auto', solver='dopri5', rtol=1e-05" in repr(
        ContinuousFlow(3)
    )
    assert "solver='rk4', steps=16" in repr(ContinuousFlow(3, solver="rk4"))
