"""Stacks that recompute their activations by inversion: the same gradients, and memory that depth does not raise."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from registry import NET, C, D, context_for, perturbed, points
from torch.func import functional_call, vmap

import pyroflows as pf
from benchmarks.memory import compare
from pyroflows.transforms import (
    AffineCoupling,
    Compose,
    LowerTriangularAffine,
    Permute,
    Rescale,
    Transform,
)


def stack(reversible: bool, context_features: int | None = C) -> Compose:
    layers: list[Transform] = [
        AffineCoupling(D, context_features, **NET),
        Permute([1, 2, 0]),
        LowerTriangularAffine(D),
        AffineCoupling(D, context_features, mask="checkerboard", **NET),
        Rescale(D),
    ]
    return Compose(layers, reversible)


def twins(context_features: int | None = C) -> tuple[Compose, Compose]:
    kept = perturbed(stack(False, context_features).double())
    recomputed = stack(True, context_features).double()
    recomputed.load_state_dict(kept.state_dict())
    return kept, recomputed


@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
def test_gradients_are_those_of_plain_backpropagation(direction, device):
    results = []
    for t in twins():
        t = t.to(device)
        x = points(t, 4, 1).to(device).requires_grad_()
        c = context_for(t, 5).to(device).requires_grad_()
        y, log_det = getattr(t, direction)(x, c)
        loss = y.sin().sum() + (log_det * torch.arange(5.0, device=device)).sum()
        results.append((y, log_det, *torch.autograd.grad(loss, [x, c, *t.parameters()])))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def test_a_log_det_alone_and_frozen_parameters(device):
    kept, recomputed = (t.to(device) for t in twins(None))
    grads = []
    for t in (kept, recomputed):
        for parameter in t.layers[2].parameters():
            parameter.requires_grad_(False)
        trained = [p for p in t.parameters() if p.requires_grad]
        log_det = t.forward_and_log_det(points(t, 6).to(device))[1]
        grads.append(torch.autograd.grad(log_det.square().sum(), trained))
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right)


def test_shared_layers_gather_their_gradients(device):
    results = []
    for reversible in (False, True):
        torch.manual_seed(0)
        shared = perturbed(AffineCoupling(D, **NET).double())
        t = Compose([shared, Permute([1, 2, 0]), shared], reversible).to(device)
        y, log_det = t.forward_and_log_det(points(t, 6).to(device))
        results.append(
            torch.autograd.grad((y.sum(-1) + log_det).square().sum(), list(t.parameters()))
        )
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def test_memory_does_not_grow_with_depth():
    rows = compare([4, 64], features=8, batch=256)
    assert rows[1]["kept_mb"] > 8 * rows[0]["kept_mb"]
    assert rows[1]["recomputed_mb"] < 1.1 * rows[0]["recomputed_mb"]
    assert all(row["gradient"] < 1e-5 for row in rows)


def test_parameters_lent_by_functional_call(device):
    kept, recomputed = (t.to(device) for t in twins(None))
    x = points(kept, 5).to(device)
    lent = {n: (p.detach() + 0.1).requires_grad_() for n, p in kept.named_parameters()}
    grads = [
        torch.autograd.grad(
            functional_call(t, lent, (x,)).square().sum(), list(lent.values()), allow_unused=True
        )
        for t in (kept, recomputed)
    ]
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, torch.zeros_like(left) if right is None else right)


def test_parameters_changed_before_the_backward_pass_are_noticed(device):
    _, t = twins(None)
    loss = t.to(device).forward_and_log_det(points(t, 5).to(device))[0].sum()
    perturbed(t)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_is_differentiable_once_and_says_so(device):
    _, t = twins(None)
    x = points(t, 5).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(
        t.to(device).forward_and_log_det(x)[0].square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_function_transforms_take_the_plain_way(device):
    kept, recomputed = (t.to(device) for t in twins(None))
    x = points(kept, 5).to(device)
    torch.testing.assert_close(vmap(recomputed.inverse_and_log_det)(x), kept.inverse_and_log_det(x))
    torch.testing.assert_close(
        torch.func.jacrev(lambda x: recomputed.forward_and_log_det(x)[0])(x[0]),
        torch.func.jacrev(lambda x: kept.forward_and_log_det(x)[0])(x[0]),
    )


def test_places_itself(placement):
    t = stack(True).to(placement)
    x = torch.zeros(4, D, device=placement, requires_grad=True)
    y, log_det = t.forward_and_log_det(x, torch.zeros(C, device=placement))
    grads = torch.autograd.grad(y.sum() + log_det.sum(), [x, *t.parameters()])
    assert {g.device.type for g in grads} == {placement.type}


def test_a_flow_trains_by_it():
    x = torch.randn(64, D).exp()

    def model() -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow(), obs=x)

    losses = []
    for reversible in (False, True):
        torch.manual_seed(0)
        flow = pf.Flow(
            [AffineCoupling(D, **NET), Permute(D), AffineCoupling(D, **NET)], reversible=reversible
        )
        svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        losses.append([svi.step() for _ in range(10)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


class Slow(AffineCoupling):
    fast = "inverse"


class Moody(AffineCoupling):
    repeatable = False


@pytest.mark.parametrize(
    ("layer", "fragment"),
    [
        (Slow, "fast in both directions; got Slow (fast: scoring)"),
        (Moody, "repeat themselves; got Moody, which changes with use"),
    ],
)
def test_what_cannot_be_reversed_is_refused(layer, fragment):
    for make in (Compose, pf.Flow):
        with pytest.raises(ValueError, match="reversible=True") as caught:
            make([AffineCoupling(D), layer(D)], reversible=True)
        assert fragment in str(caught.value)
