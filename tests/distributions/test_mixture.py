"""Mixtures of logistics against their formula; what they share with polynomials is in test_polynomial."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from registry import D, normal_log_prob
from torch import Tensor

from pyroflows.transforms import Elementwise
from pyroflows.univariate.logistic import LogisticMixture


def raw_for(univariate: LogisticMixture, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(univariate.parameters, 1, generator=generator, dtype=torch.float64)


def mixture_by_hand(
    univariate: LogisticMixture, raw: Tensor
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Weights, locations and scales of the logistics, and the affine map that follows."""
    k, bound = univariate.components, univariate.bound
    flat = raw[:, 0]
    factors = torch.tensor([1 + 0.5 * math.cos(i + 1) for i in range(k)], dtype=torch.float64)
    weights = flat[:k].softmax(0)
    locs = 100 * torch.tanh(factors * flat[k : 2 * k] / 100)
    scales = torch.exp(bound * torch.tanh(factors * flat[2 * k : 3 * k] / bound))
    return (
        weights,
        locs,
        scales,
        math.exp(bound * math.tanh(float(flat[-2]) / bound)),
        float(flat[-1]),
    )


@pytest.mark.parametrize("settings", [(1, 3.0), (4, 3.0), (8, 1.0)])
def test_formula(settings, device):
    """Within reach of doubles, where the distribution function is neither 0 nor 1."""
    univariate = LogisticMixture(*settings)
    raw = raw_for(univariate)
    weights, locs, scales, scale, shift = mixture_by_hand(univariate, raw)
    x = torch.linspace(-3, 3, 25, dtype=torch.float64, device=device)[:, None]
    z = (x.cpu() - locs) / scales
    below, above = ((weights * side.sigmoid()).sum(-1, keepdim=True) for side in (z, -z))
    density = (weights * z.sigmoid() * (-z).sigmoid() / scales).sum(-1, keepdim=True)
    y, log_det = univariate.forward_and_log_det(x, raw.to(device))
    torch.testing.assert_close(y.cpu(), (below / above).log() * scale + shift, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        log_det.cpu(), (scale * density / (below * above)).log(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_are_those_of_the_widest_component(dtype, device):
    univariate = LogisticMixture(3)
    raw = raw_for(univariate).to(dtype).to(device)
    weights, locs, scales, scale, shift = mixture_by_hand(univariate, raw_for(univariate))
    widest = int(scales.argmax())
    for sign in (-1, 1):
        x = torch.tensor([[sign * 500.0]], dtype=dtype, device=device)
        expected = sign * (
            abs(sign * 500.0 - float(locs[widest])) / float(scales[widest])
            - math.log(weights[widest])
        )
        y, log_det = univariate.forward_and_log_det(x, raw)
        assert float(y) == pytest.approx(expected * scale + shift, rel=100 * torch.finfo(dtype).eps)
        assert float(log_det) == pytest.approx(
            math.log(scale / float(scales[widest])), abs=100 * torch.finfo(dtype).eps
        )


def test_a_logistic_mixture_is_learned_exactly(device):
    """The map takes a mixture to the logistic, whose density is then that of the mixture."""
    univariate = LogisticMixture(3)
    raw = raw_for(univariate)
    raw[-2:] = 0
    weights, locs, scales, *_ = mixture_by_hand(univariate, raw)
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, device=device)[:, None]
    y, log_det = univariate.forward_and_log_det(x, raw.to(device))
    logistic = torch.nn.functional.logsigmoid(y) + torch.nn.functional.logsigmoid(-y)
    z = (x.cpu() - locs) / scales
    expected = (weights * z.sigmoid() * (-z).sigmoid() / scales).sum(-1, keepdim=True).log()
    torch.testing.assert_close((logistic + log_det).cpu(), expected, rtol=1e-9, atol=1e-9)


def test_components_that_start_alike_learn_apart(device):
    """Three modes are found from the identity: the fit comes within a tenth of a nat of the truth."""
    truth = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3)),
        dist.Normal(torch.tensor([-1.5, 0.0, 1.5]), torch.tensor([0.3, 0.1, 0.2])),
    )
    y = truth.sample((1000,))[:, None].to(device)
    t = Elementwise(LogisticMixture(4), 1).to(device)
    adam = torch.optim.Adam(t.parameters(), lr=0.05)
    for _ in range(300):
        x, log_det = t.forward_and_log_det(y)
        loss = -(normal_log_prob(x) + log_det).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert float(loss.detach()) < -float(truth.log_prob(y.cpu()).mean()) + 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plateaus_between_distant_components_are_inverted(dtype, device):
    """Between sharp components the distribution function is flat to the last digit, its logit is not."""
    univariate = LogisticMixture(2)
    raw = torch.zeros(univariate.parameters, D, dtype=dtype)
    raw[2], raw[3], raw[4:6] = -20.0, 20.0, -4.0
    raw = raw.to(device)
    y = torch.linspace(-100, 100, 201, dtype=dtype, device=device)[:, None].expand(-1, D)
    x, log_det = univariate.inverse_and_log_det(y, raw)
    again, forward_log_det = univariate.forward_and_log_det(x, raw)
    # One rounding of x is worth its slope in y, up to the inverse of the smallest scale.
    slack = 16 * torch.finfo(dtype).eps * (1 + y.abs() + x.abs() * forward_log_det.exp())
    assert bool(((again - y).abs() <= slack).all())
    assert float(log_det.max()) > 50 and bool(log_det.isfinite().all())
