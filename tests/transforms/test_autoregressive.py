"""Autoregressive layers: the triangular map, its inverse by two ways, and the derivatives of that inverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from families.sizes import HIDDEN
from registry import C, context_for, normal_log_prob, perturbed, points
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import pyroflows as pf
from pyroflows.transforms import Compose, Elementwise, Transform
from pyroflows.transforms.autoregressive import AffineAutoregressive, Autoregressive
from pyroflows.univariate import Affine, Shift, Univariate
from pyroflows.univariate.splines import CircularSpline, RationalQuadraticSpline

F64 = torch.float64
#: 1 and 2 depend on 0, and 3 on 1.
GRAPH = [[False] * 4, [True] + [False] * 3, [True] + [False] * 3, [False, True, False, False]]


class Sinh(Univariate):
    """A map that is not linear: :math:`y = \\sinh(e^a x) e^{-a}`, moved by a shift."""

    parameters = 2
    identity = (0.0, 0.0)
    linear = False

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        a, t = raw.select(-2, 0), raw.select(-2, 1)
        z = x * a.exp()
        return z.sinh() * a.neg().exp() + t, z.cosh().log().expand_as(z)

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        a, t = raw.select(-2, 0), raw.select(-2, 1)
        z = ((y - t) * a.exp()).asinh()
        return z * a.neg().exp(), -z.cosh().log()


class Learnt(Univariate, nn.Module):
    """An affine map with a weight of its own."""

    parameters = 2
    identity = (0.0, 0.0)
    linear = True

    def __init__(self) -> None:
        super().__init__()
        self.base, self.own = Affine(), nn.Parameter(torch.zeros(()))

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self.base.forward_and_log_det(x, raw)
        return y * self.own.exp(), log_det + self.own

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.base.inverse_and_log_det(y * self.own.neg().exp(), raw)
        return x, log_det - self.own


class Swish(nn.Module):
    """An activation with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.beta * x).sigmoid()


CASES: dict[str, Callable[[], Autoregressive]] = {
    "plain": lambda: AffineAutoregressive(4, **HIDDEN),
    "context": lambda: AffineAutoregressive(4, C, **HIDDEN),
    "random": lambda: AffineAutoregressive(4, order="random", seed=1, fast="forward", **HIDDEN),
    "residual": lambda: AffineAutoregressive(4, C, hidden=(8, 8, 8), residual=True, fast="forward"),
    "graph": lambda: AffineAutoregressive(4, C, adjacency=GRAPH, **HIDDEN),
    "linear": lambda: AffineAutoregressive(4, hidden=(), scale="exp"),
    "widths": lambda: AffineAutoregressive(4, C, hidden=(5, 9), activation=Swish),
    "shift": lambda: Autoregressive(Shift(), 4, **HIDDEN),
    "curved": lambda: Autoregressive(Sinh(), 4, C, activation=nn.Tanh, fast="forward", **HIDDEN),
    "circular": lambda: Autoregressive(CircularSpline(3), 4, C, fast="forward", **HIDDEN),
    "spline-graph": lambda: Autoregressive(
        RationalQuadraticSpline(3), 4, C, adjacency=GRAPH, **HIDDEN
    ),
    "learnt": lambda: Autoregressive(Learnt(), 4, C, **HIDDEN),
}


@pytest.fixture(params=list(CASES))
def moved(request: pytest.FixtureRequest, device: torch.device) -> Autoregressive:
    return perturbed(CASES[request.param]().to(device, F64))


def given(t: Transform, *batch: int) -> tuple[Tensor, Tensor | None]:
    device = next(t.parameters()).device
    c = context_for(t, *batch)
    return points(t, *batch).to(device), None if c is None else c.to(device)


def by_stages(t: Autoregressive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(t), "rounds", lambda self, points: 0)


def by_rounds(t: Autoregressive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterates, and fails where that does not settle."""
    monkeypatch.setattr(type(t), "rounds", lambda self, points: self.conditioner.stages + 1)

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("the iteration did not settle")

    monkeypatch.setattr(type(t), "_unfold", fail)


WAYS = {"stages": by_stages, "rounds": by_rounds}


# The map


def test_is_what_the_paper_says(device):
    """Papamakarios et al. (2017), eq. 4: a Gaussian conditional after the other."""
    t = perturbed(AffineAutoregressive(3, hidden=(), scale="exp").to(device, F64))
    (layer,) = t.conditioner.layers
    weight, bias = (layer.weight * layer.mask).unflatten(0, (2, 3)), layer.bias.unflatten(0, (2, 3))
    y = torch.randn(20, 3, dtype=F64, device=device)
    log_prob = torch.zeros(20, dtype=F64, device=device)
    for i in range(3):
        alpha, shift = ((y[:, :i] * weight[k, i, :i]).sum(-1) + bias[k, i] for k in (0, 1))
        log_prob = log_prob + dist.Normal(-shift * (-alpha).exp(), (-alpha).exp()).log_prob(y[:, i])
    torch.testing.assert_close(pf.Flow([t])().log_prob(y), log_prob)


@pytest.mark.parametrize("fast", ["inverse", "forward"])
def test_agrees_with_pyro(fast, device):
    """Pyro's layer over the same network; its scale is clipped elsewhere, so the network is kept small."""
    t = perturbed(AffineAutoregressive(4, fast=fast, scale="exp", **HIDDEN).to(device, F64), 0.1)

    def network(v: Tensor) -> tuple[Tensor, Tensor]:
        s, mean = t.conditioner(v).unbind(-2)
        return mean, s

    network.permutation = list(range(4))
    theirs = dist.transforms.AffineAutoregressive(network)
    ours = t if fast == "forward" else t.inv
    v = torch.randn(9, 4, dtype=F64, device=device)
    u = theirs(v)
    torch.testing.assert_close(ours(v), u)
    torch.testing.assert_close(ours.log_abs_det_jacobian(v, u), theirs.log_abs_det_jacobian(v, u))
    torch.testing.assert_close(ours.inv(u), theirs.inv(u))


def test_jacobian_has_the_shape_of_the_graph(moved):
    x, c = given(moved, 6)
    eye = torch.eye(4, dtype=torch.bool, device=x.device)
    graph = moved.conditioner.adjacency | eye
    fast, slow = moved.forward_and_log_det, moved.inverse_and_log_det
    if moved.fast == "inverse":
        fast, slow = slow, fast
    in_dims = (0, None if c is None else 0)
    jacobian = vmap(jacrev(lambda x, c: fast(x, c)[0]), in_dims)(x, c)
    assert torch.equal((jacobian != 0).any(0), graph)
    # The other way an entry depends on those that its parents depend on, too.
    closure = torch.linalg.matrix_power(graph.double(), 4) > 0
    assert not bool(
        (vmap(jacrev(lambda x, c: slow(x, c)[0]), in_dims)(x, c) != 0).any(0)[~closure].any()
    )


def test_the_fast_to_sample_layer_is_the_inverse_of_the_fast_to_score(device):
    scores = perturbed(AffineAutoregressive(3, C, fast="inverse", **HIDDEN).to(device, F64))
    samples = AffineAutoregressive(3, C, fast="forward", **HIDDEN).to(device, F64)
    samples.load_state_dict(scores.state_dict())
    assert (scores.fast, samples.fast) == ("inverse", "forward")
    assert "fast: scoring" in repr(scores) and "fast: sampling" in repr(samples)
    x, c = given(scores, 6)
    for left, right in zip(
        scores.inverse_and_log_det(x, c), samples.forward_and_log_det(x, c), strict=True
    ):
        assert torch.equal(left, right)


def test_orders(device):
    def order(**options: Any) -> list[int]:
        return AffineAutoregressive(5, **HIDDEN, **options).to(device).conditioner.entries.tolist()

    assert order() == order(order="natural") == [0, 1, 2, 3, 4]
    assert order(order="reversed") == [4, 3, 2, 1, 0]
    assert (
        order(order=[1, 0, 4, 2, 3])
        == order(order=torch.tensor([1, 0, 4, 2, 3]))
        == [1, 0, 4, 2, 3]
    )
    assert order(order="random") == order(order="random", seed=0) != order(order="random", seed=1)
    assert sorted(order(order="random", seed=2)) == [0, 1, 2, 3, 4]


def test_a_graph_is_a_factorisation(device):
    """Under a graph of two chains each chain is independent of the other."""
    graph = torch.zeros(4, 4, dtype=torch.bool)
    graph[1, 0] = graph[3, 2] = True
    t = perturbed(AffineAutoregressive(4, adjacency=graph, **HIDDEN).to(device, F64))
    assert t.conditioner.stages == 2
    a, b = torch.randn(2, 6, 4, dtype=F64, device=device)
    log_prob = pf.Flow([t])().log_prob
    swapped = torch.cat([a[:, :2], b[:, 2:]], -1), torch.cat([b[:, :2], a[:, 2:]], -1)
    torch.testing.assert_close(
        log_prob(a) + log_prob(b), log_prob(swapped[0]) + log_prob(swapped[1])
    )


@pytest.mark.parametrize("context_features", [None, C])
def test_one_feature_is_moved_by_the_context_alone(context_features, device):
    t = perturbed(AffineAutoregressive(1, context_features, **HIDDEN).to(device, F64))
    x, c = given(t, 6)
    y, log_det = t.forward_and_log_det(x, c)
    raw = t.conditioner(x, c)
    expected, expected_log_det = Affine().inverse_and_log_det(x, raw)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, expected_log_det[:, 0])
    if c is None:
        plain = Elementwise(Affine(), 1).to(device, F64)
        plain.raw.data = t.conditioner.layers[0].bias.data.reshape(2, 1)
        torch.testing.assert_close(plain.inv(x), y)


def test_learns_a_banana(device):
    """Of y = (a, b + a^2) with normal a and b the density is that of (a, b), whose entropy is known."""
    flow = pf.Flow([AffineAutoregressive(2, hidden=(32, 32))]).to(device)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    a, b = torch.randn(2, 4096, device=device)
    y = torch.stack([a, b + a.square()], -1)
    for _ in range(300):
        loss = -flow().log_prob(y[torch.randint(4096, (256,), device=device)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    own = -normal_log_prob(torch.stack([a, b], -1)).mean()
    # 4096 points tell a fit from the truth by p / (2 n) nats for each parameter that counts, of which some dozens do.
    assert abs(float(-flow().log_prob(y).mean().detach() - own)) < 0.03
    draws = flow().sample((4096,))
    excess = draws[:, 1] - draws[:, 0].square()
    assert abs(float(excess.mean())) < 0.15 and abs(float(excess.std() - 1)) < 0.15


# The slow direction


@pytest.mark.parametrize("batch", [(), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("way", list(WAYS))
def test_both_ways_solve_the_same_equations(way, batch, moved, monkeypatch):
    u, c = given(moved, *batch)
    plain, log_det = moved._unfold(u, c, moved.conditioner.weights(), in_place=False)
    WAYS[way](moved, monkeypatch)
    v, own_log_det = moved._solve(u, c)
    torch.testing.assert_close(v, plain)
    torch.testing.assert_close(own_log_det, log_det)
    again, fast_log_det = moved._move(v, c)
    torch.testing.assert_close(again, u)
    torch.testing.assert_close(fast_log_det, -log_det)


@pytest.mark.parametrize("way", list(WAYS))
def test_the_implicit_gradient_is_that_of_the_stages(way, moved, monkeypatch):
    u, c = given(moved, 5)
    inputs = [u.requires_grad_(), *moved.parameters(), *([] if c is None else [c.requires_grad_()])]
    weigh = points(moved, 5, seed=7).to(u.device)

    def gradients(v: Tensor, log_det: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((v * weigh).sum() + (log_det * weigh[:, 0]).sum(), inputs)

    expected = gradients(*moved._unfold(u, c, moved.conditioner.weights(), in_place=False))
    WAYS[way](moved, monkeypatch)
    for left, right in zip(gradients(*moved._solve(u, c)), expected, strict=True):
        torch.testing.assert_close(left, right)


def test_gradients_of_a_part_alone(moved):
    """Frozen parameters, an input without gradient, one of two outputs: each asks for its part only."""
    u, c = given(moved, 5)
    parameters = list(moved.parameters())
    whole = torch.autograd.grad(moved._solve(u, c)[0].sum(), parameters)
    parameters[0].requires_grad_(False)
    v, _ = moved._solve(u, c)
    for left, right in zip(torch.autograd.grad(v.sum(), parameters[1:]), whole[1:], strict=True):
        torch.testing.assert_close(left, right)
    for parameter in parameters:
        parameter.requires_grad_(False)
    assert not moved._solve(u, c)[0].requires_grad
    (of_log_det,) = torch.autograd.grad(moved._solve(u.requires_grad_(), c)[1].sum(), u)
    expected = vmap(jacrev(lambda u, c: moved._solve(u, c)[1]), (0, None if c is None else 0))(u, c)
    torch.testing.assert_close(of_log_det, expected)
    with torch.no_grad():
        assert not moved._solve(u, c)[0].requires_grad


def test_gradients_of_borrowed_parameters(moved):
    """What functional_call lends is gone when the gradient is asked for, and still right."""
    u, c = given(moved, 5)
    lent = {name: (p.detach() + 0.1).requires_grad_() for name, p in moved.named_parameters()}
    direct = moved.forward_and_log_det if moved.fast == "inverse" else moved.inverse_and_log_det

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = moved

        def forward(self, u: Tensor) -> Tensor:
            return direct(u, c)[0]

    v = functional_call(Slow(), {f"t.{name}": p for name, p in lent.items()}, (u,))
    grads = torch.autograd.grad(v.sum(), list(lent.values()))
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.copy_(lent[name])
    for left, right in zip(
        grads, torch.autograd.grad(direct(u, c)[0].sum(), list(moved.parameters())), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("way", ["stages", "as they are"])
@pytest.mark.parametrize("name", ["context", "graph", "curved", "learnt"])
def test_second_derivatives_are_those_of_finite_differences(name, way, device, monkeypatch):
    t = perturbed(CASES[name]().to(device, F64))
    if way == "stages":
        by_stages(t, monkeypatch)
    u, c = given(t, 2)
    weight = t.conditioner.layers[1].weight

    def solve(u: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            weight.copy_(w)
        v, log_det = t._solve(u, c)
        (by_u,) = torch.autograd.grad(v.sin().sum() + log_det.square().sum(), u, create_graph=True)
        (by_weight,) = torch.autograd.grad(
            v.sin().sum() + log_det.square().sum(), weight, create_graph=True
        )
        return by_u, by_weight

    analytic = torch.autograd.grad(
        sum(
            (g * (k + 1)).sum()
            for k, g in enumerate(
                solve(u.requires_grad_(), c.requires_grad_(), weight.detach().clone())
            )
        ),
        [u, c, weight],
    )
    kept, step = weight.detach().clone(), 1e-5
    for at, (tensor, gradient) in enumerate(zip((u, c, kept), analytic, strict=True)):
        direction = torch.randn(
            tensor.shape, dtype=F64, generator=torch.Generator().manual_seed(at)
        ).to(tensor.device)
        ends = []
        for sign in (-step, step):
            now = [z.detach() for z in (u, c, kept)]
            now[at] = now[at] + sign * direction
            grads = solve(now[0].requires_grad_(), now[1], now[2])
            ends.append(float(sum((g * (k + 1)).sum() for k, g in enumerate(grads)).detach()))
        assert (ends[1] - ends[0]) / (2 * step) == pytest.approx(
            float((gradient * direction).sum()), rel=1e-6, abs=1e-7
        )


def test_hessians(device):
    """Function transforms go through the stages; plain autograd twice must agree with them."""
    t = perturbed(AffineAutoregressive(3, **HIDDEN).to(device, F64))
    x = torch.randn(3, dtype=F64, device=device)
    expected = torch.autograd.functional.hessian(lambda x: t.forward_and_log_det(x)[1], x)
    torch.testing.assert_close(hessian(lambda x: t.forward_and_log_det(x)[1])(x), expected)
    direction = torch.ones_like(x)
    _, pushed = jvp(lambda x: t.forward_and_log_det(x)[0], (x,), (direction,))
    torch.testing.assert_close(pushed, jacrev(lambda x: t.forward_and_log_det(x)[0])(x) @ direction)


def test_stage_by_stage_costs_about_one_evaluation(device, monkeypatch):
    """Multiplications, as counted by torch, for a solution and for its gradient."""
    t = AffineAutoregressive(32, hidden=(64, 64)).to(device)
    by_stages(t, monkeypatch)
    u = torch.randn(16, 32, device=device).requires_grad_()

    def flops(function: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    once = flops(lambda: t._move(u, None))
    with torch.no_grad():
        assert flops(lambda: t._solve(u, None)) <= once
    both = flops(lambda: t._solve(u, None)[0].sum().backward())
    # A solution and an evaluation; then the solution of the adjoint system and the backward pass, of twice an evaluation.
    assert both <= 5 * once


def test_few_rounds_suffice(device, monkeypatch):
    t = perturbed(AffineAutoregressive(64, hidden=(64, 64)).to(device), 0.05)
    by_rounds(t, monkeypatch)
    calls = []
    evaluate = t.conditioner.evaluate
    monkeypatch.setattr(t.conditioner, "evaluate", lambda *args: calls.append(1) or evaluate(*args))
    u = torch.randn(8, 64, device=device)
    with torch.no_grad():
        v, _ = t._solve(u, None)
    assert 2 < len(calls) < 20
    torch.testing.assert_close(t._move(v, None)[0], u, rtol=1e-4, atol=1e-4)


def test_the_way_is_chosen_by_size(device):
    small = AffineAutoregressive(8, hidden=(64, 64)).to(device)
    large = AffineAutoregressive(64, hidden=(512, 512)).to(device)
    assert small.rounds(1) == 9 and small.rounds(10**4) == 0
    assert large.rounds(1) == 65 and large.rounds(512) == 0
    budgets = [large.rounds(n) for n in range(1, 600)]
    assert budgets == sorted(budgets, reverse=True)


def test_a_wrong_guess_far_off_spoils_nothing(device):
    """A wrong guess of the first entry makes the second one huge, and every later sum with it."""
    t = AffineAutoregressive(3, hidden=(), scale="exp").to(device, F64)
    layer = t.conditioner.layers[0]
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -100.0, 0.0, 0.0]))
        layer.weight[1, 0] = 10.0  # the log-scale of entry 1 is 10 v_0
        layer.weight[5, 1] = 1.0
    u = torch.zeros(2, 3, dtype=F64, device=device)
    u[:, 0], u[:, 1] = torch.tensor([-100.0, -99.0]), 1.0
    assert t.rounds(2) == 4
    v, log_det = t._solve(u.requires_grad_(), None)
    torch.testing.assert_close(t._move(v, None)[0], u)
    assert bool(v.isfinite().all()) and bool(log_det.isfinite().all())
    (grad,) = torch.autograd.grad(v[:, :2].sum() + log_det.sum(), u)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("way", list(WAYS))
def test_extreme_parameters(way, dtype, device, monkeypatch):
    """Raw parameters of N(0, 20^2): no NaN, and what comes back is what was asked for, to the precision of the largest."""
    t = AffineAutoregressive(8, hidden=(16, 16)).to(device, dtype)
    perturbed(t, 20.0)
    if way == "stages":
        by_stages(t, monkeypatch)
    u = torch.randn(50, 8, dtype=dtype, device=device).requires_grad_()
    v, log_det = t._solve(u, None)
    grads = torch.autograd.grad(v.sum() + log_det.sum(), [u, *t.parameters()])
    for tensor in (v, log_det, *grads):
        assert not bool(tensor.isnan().any())
    first = t._move(v, None)[0][:, 0]
    torch.testing.assert_close(first, u[:, 0])


def test_writes_no_nan_into_a_batch_with_a_bad_row(device):
    t = perturbed(AffineAutoregressive(4, **HIDDEN).to(device, F64))
    u = torch.randn(3, 4, dtype=F64, device=device)
    u[1, 2] = math.nan
    v, _ = t._solve(u, None)
    clean, _ = t._solve(u[[0, 2]], None)
    torch.testing.assert_close(v[[0, 2]], clean)
    assert v[1].isnan().tolist() == [False, False, True, True]


# The score


@pytest.mark.parametrize("way", [*WAYS, "as it is"])
@pytest.mark.parametrize("name", ["random", "residual", "curved", "circular"])
def test_the_score_is_pushed_without_an_inversion(name, way, device, monkeypatch):
    t = perturbed(CASES[name]().to(device, F64))
    x, c = given(t, 6)
    score = points(t, 6, seed=5).to(device)
    expected = Transform.push_score(t, x, score, c)
    if way in WAYS:
        WAYS[way](t, monkeypatch)
    monkeypatch.setattr(t, "_solve", None)
    for left, right in zip(t.push_score(x, score, c), expected, strict=True):
        torch.testing.assert_close(left, right)
    alone = t.push_score(x[0], score[0], None if c is None else c[0])
    torch.testing.assert_close(alone[2], expected[2][0])


# Where nothing may be read


def test_compiles_as_one_graph(device):
    torch.compiler.reset()
    t = perturbed(AffineAutoregressive(3, C, residual=True, **HIDDEN).to(device, F64))
    x, c = given(t, 5)
    x.requires_grad_()

    def there_and_back(x: Tensor) -> tuple[Tensor, ...]:
        y, log_det = t.forward_and_log_det(x, c)
        return y, log_det, *t.inverse_and_log_det(y, c)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(x), there_and_back(x)
    for left, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(left, right)
    for out in (0, 1):
        (grad,) = torch.autograd.grad(outputs[out].sin().sum(), x, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected[out].sin().sum(), x, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad)


def test_places_itself(placement):
    for fast in ("inverse", "forward"):
        with placement:
            t = AffineAutoregressive(4, C, fast=fast, **HIDDEN)
            x, c = torch.zeros(3, 4), torch.zeros(3, C)
        for f in (t.forward_and_log_det, t.inverse_and_log_det):
            y, log_det = f(x.requires_grad_(), c)
            (y.sum() + log_det.sum()).backward()
            assert y.device.type == placement.type and log_det.shape == (3,)
        assert t.push_score(x, torch.ones_like(x), c)[2].shape == (3, 4)


def test_what_is_fast_of_a_stack(device):
    def stack(*fast: str) -> Compose:
        return Compose([AffineAutoregressive(3, fast=f, **HIDDEN) for f in fast]).to(device)

    assert stack("inverse", "inverse").fast == "inverse" and stack("forward").fast == "forward"
    assert stack("inverse", "forward").fast == "neither"


# Mistakes


MISTAKES: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "features": (lambda m: m(0), ValueError, "features >= 1; got 0"),
    "features-float": (lambda m: m(3.0), TypeError, "features to be an integer; got 3.0"),
    "features-reversed": (
        lambda m: m(None, order="reversed"),
        TypeError,
        "features to be an integer; got None",
    ),
    "context": (lambda m: m(3, 0), ValueError, "context_features >= 1; got 0"),
    "hidden": (
        lambda m: m(3, hidden=8),
        TypeError,
        "hidden to be a sequence of integers",
    ),
    "activation": (lambda m: m(3, activation=nn.SiLU()), TypeError, "activation to make a module"),
    "order-name": (
        lambda m: m(3, order="sorted"),
        ValueError,
        "natural, reversed, random or a permutation; got 'sorted'",
    ),
    "order-twice": (
        lambda m: m(3, order=[0, 0, 1]),
        ValueError,
        "each of 0 .. 2 once; got [0, 0, 1]",
    ),
    "order-kind": (
        lambda m: m(3, order=1.5),
        TypeError,
        "order to be a sequence of integers; got 1.5",
    ),
    "order-none": (
        lambda m: m(3, order={0, 1, 2}),
        TypeError,
        "order to be a sequence of integers",
    ),
    "order-and-graph": (
        lambda m: m(4, order="random", adjacency=GRAPH),
        ValueError,
        "order or adjacency, for an order",
    ),
    "graph-cycle": (
        lambda m: m(2, adjacency=[[False, True], [True, False]]),
        ValueError,
        "without cycles; got one where 0 depends on 1, 1 depends on 0.",
    ),
    "graph-shape": (
        lambda m: m(3, adjacency=GRAPH),
        ValueError,
        "adjacency of shape (3, 3); got (4, 4)",
    ),
    "graph-kind": (
        lambda m: m(2, adjacency=[[0, 0], [1, 0]]),
        TypeError,
        "adjacency to be boolean; got torch.int64",
    ),
    "residual": (
        lambda m: m(3, hidden=(8, 4), residual=True),
        ValueError,
        "one width for a residual network",
    ),
    "fast": (
        lambda m: m(3, fast="both"),
        ValueError,
        "fast to be inverse (fast to score) or forward (fast to sample)",
    ),
    "seed": (lambda m: m(3, order="random", seed="a"), TypeError, "seed to be an integer; got 'a'"),
}


@pytest.mark.parametrize("owner", ["Autoregressive", "AffineAutoregressive"])
@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_named(name, owner):
    call, error, fragment = MISTAKES[name]

    def make(*args: Any, **options: Any) -> Any:
        return (
            AffineAutoregressive(*args, **options)
            if owner[1] == "f"
            else Autoregressive(Affine(), *args, **options)
        )

    with pytest.raises(error) as caught:
        call(make)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("univariate", ["affine", Affine, None])
def test_asks_for_a_univariate_map(univariate):
    with pytest.raises(TypeError, match="univariate to be a monotone map"):
        Autoregressive(univariate, 3)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"scale": "tanh"}, "one of softclip, exp"),
        ({"bound": 0.0}, "bound to be positive and finite"),
    ],
)
def test_options_of_the_affine_map(options, fragment):
    with pytest.raises(ValueError, match=fragment):
        AffineAutoregressive(3, **options)
