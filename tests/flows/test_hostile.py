"""Densities and gradients at hostile points and parameters, for every ready-made flow."""

from __future__ import annotations

import math

import pytest
import torch
from families.presets import FLOWS
from marks import slow_but_for
from registry import context_for, kinds
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.flows import LayeredFlow

DTYPES = [torch.float32, torch.float64]


def hostile_points(count: int, features: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Points of all sizes, with zeros, denormals, infinities and single huge entries among them."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    ordinary = torch.randn(count, features, generator=generator, dtype=torch.float64)
    exponent = 68.5 * uniform(count, features) - 30
    exponent = torch.where(uniform(count, 1) < 0.5, exponent[:, :1], exponent)
    huge = ordinary.sign() * 10**exponent
    single = torch.arange(features) == (uniform(count, 1) * features).long()
    kind, some = (uniform(count, 1) * 6).long(), uniform(count, features)
    x = torch.where((kind == 1) & ~single, ordinary, huge)
    x = torch.where((kind == 2) & (some < 0.5), 0.0, x)
    x = torch.where((kind == 3) & (some < 0.5), 1e-42 * ordinary, x)
    x = torch.where((kind == 4) & (some < 0.3), ordinary.sign() * torch.finfo(dtype).max, x)
    x = torch.where((kind == 5) & (some < 0.1), ordinary.sign() * math.inf, x)
    return x.to(dtype)


def spread_parameters(flow: nn.Module, spread: float) -> None:
    """Draws all parameters from the normal distribution of this spread; none for spread 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters() if spread else []:
            draws = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(spread * draws)


def check_is_tame(name: str, dtype: torch.dtype, spread: float, count: int, seed: int) -> None:
    flow = FLOWS[name]().to(dtype)
    spread_parameters(flow, spread)
    x = hostile_points(count, flow.event_shape[0], dtype, seed)
    x = (x.clamp(-3.0, 3.0) if "circular" in name else x).requires_grad_()
    context = context_for(flow, count, dtype=dtype)
    distribution = flow() if context is None else flow(context)
    log_prob = distribution.log_prob(x)
    assert not bool(log_prob.isnan().any()) and not bool((log_prob == math.inf).any())
    named = {"points": x, **{n: p for n, p in flow.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(log_prob.sum(), list(named.values()), allow_unused=True)
    for owner, grad in zip(named, grads, strict=True):
        assert grad is None or bool(grad.isfinite().all()), owner
    draws = distribution.sample(() if context is not None else (count,))
    assert not bool(draws.isnan().any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 2.0, 20.0])
@pytest.mark.parametrize("name", kinds(FLOWS))
def test_nothing_is_nan(name: str, spread: float, dtype: torch.dtype) -> None:
    check_is_tame(name, dtype, spread, count=200, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 2.0, 20.0])
@pytest.mark.parametrize("name", list(FLOWS))
def test_nothing_is_nan_in_many_points(name: str, spread: float, dtype: torch.dtype) -> None:
    check_is_tame(name, dtype, spread, count=10_000, seed=0)


def test_ordinary_rows_keep_their_gradients_beside_a_hostile_one(device) -> None:
    flow = pf.RealNVP(3).to(device)
    x = torch.randn(5, 3, device=device)
    hostile = torch.cat([x, torch.tensor([[1e38, -1.0, math.inf]], device=device)])
    expected = torch.autograd.grad(flow().log_prob(x).sum(), list(flow.parameters()))
    given = torch.autograd.grad(flow().log_prob(hostile)[:5].sum(), list(flow.parameters()))
    torch.testing.assert_close(given, expected)
    assert flow().log_prob(hostile)[5] == -math.inf


# Depth

DEEP = {
    "RealNVP": pf.RealNVP,
    "NICE": pf.NICE,
    "Glow": pf.Glow,
    "MAF": pf.MAF,
    "IAF": pf.IAF,
    "NSF": pf.NSF,
    "NAF": pf.NAF,
    "UNAF": pf.UNAF,
    "BNAF": pf.BNAF,
    "SOSPF": pf.SOSPF,
    "BPF": pf.BPF,
    "FlowPlusPlus": pf.FlowPlusPlus,
    "PlanarFlow": pf.PlanarFlow,
    "RadialFlow": pf.RadialFlow,
    "SylvesterFlow": pf.SylvesterFlow,
    "ResidualFlow": pf.ResidualFlow,
}


@pytest.mark.parametrize(
    ("name", "transforms"),
    slow_but_for(
        [*((name, 4) for name in DEEP), ("RealNVP", 64), ("MAF", 64)],
        [(name, transforms) for name in DEEP for transforms in (4, 64)],
    ),
)
def test_a_fresh_stack_has_unit_scale(name: str, transforms: int) -> None:
    make: type[LayeredFlow] = DEEP[name]
    flow = make(4, transforms=transforms)
    x = torch.randn(200, 4)
    with torch.no_grad():
        for move in (flow.transform.forward_and_log_det, flow.transform.inverse_and_log_det):
            spread = move(x)[0].std(0)
            assert bool(((spread > 0.5) & (spread < 2)).all())


def test_the_first_steps_do_not_blow_up_a_deep_stack() -> None:
    flow = pf.RealNVP(8, transforms=32, mixing=None)
    x = torch.randn(256, 8)
    x = torch.cat([x[:, :4], x[:, :1].square() - 1 + 0.3 * x[:, 4:]], -1)
    optimiser = torch.optim.Adam(flow.parameters(), 2e-3)
    for _ in range(20):
        optimiser.zero_grad()
        loss = -flow().log_prob(x).mean()
        loss.backward()
        optimiser.step()
    assert float(flow().sample((2000,)).abs().max()) < 100


# Export


class Score(nn.Module):
    """What is exported: the log-density of a flow."""

    def __init__(self, flow: pf.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow().log_prob(x)


EXPORTED = {
    "RealNVP": lambda: pf.RealNVP(5, transforms=3),
    "Glow": lambda: pf.Glow(5, transforms=2),
    "MAF": lambda: pf.MAF(5, transforms=3),
    "NSF": lambda: pf.NSF(5, transforms=2),
    "PlanarFlow": lambda: pf.PlanarFlow(5, transforms=2),
    "whole PlanarFlow": lambda: pf.PlanarFlow(5),
}


@pytest.mark.parametrize("name", slow_but_for(["RealNVP", "MAF"], EXPORTED))
def test_exports_with_batches_of_every_size(name: str) -> None:
    score = Score(EXPORTED[name]().eval())
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(score, (torch.randn(7, 5),), dynamic_shapes=({0: batch},))
    for count in (1, 2, 4, 100):
        x = torch.randn(count, 5)
        torch.testing.assert_close(exported.module()(x), score(x), rtol=1e-4, atol=1e-4)
