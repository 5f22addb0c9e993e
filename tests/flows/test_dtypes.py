"""Flows take values and contexts of any floating-point dtype, and compute in that of their parameters."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from registry import FLOWS, context_for, kinds

import pyroflows as pf
from pyroflows.distributions import FlowMixture

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
#: Rounded to 16 bits, a value leaves these supports.
STRICT = {"realnvp-simplex", "realnvp-corr-cholesky"}


def given(flow: pf.Flow, dtype: torch.dtype, device: torch.device) -> Any:
    context = context_for(flow, 4, dtype=dtype)
    return flow(None if context is None else context.to(device)).expand((4,))


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", kinds(FLOWS))
def test_everything_is_in_the_dtype_of_the_parameters(name, own, device):
    flow = FLOWS[name]().to(device, own)
    for dtype in DTYPES[: 2 if name in STRICT else 4]:
        d = given(flow, dtype, device)
        y, log_prob = d.rsample_and_log_prob()
        assert d.sample().dtype == d.rsample().dtype == y.dtype == log_prob.dtype == own
        assert {part.dtype for part in d.rsample_and_score()} == {own}
        value = y.detach().to(dtype).requires_grad_()
        log_prob = d.log_prob(value)
        log_prob.sum().backward()
        assert log_prob.dtype == own and value.grad is not None and value.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [pf.RealNVP, pf.Glow, pf.SylvesterFlow, pf.ResidualFlow])
def test_a_flow_of_16_bits_solves_in_32(make, dtype, device):
    flow = make(features=3).to(device, dtype).eval()
    y, log_prob = flow().rsample_and_log_prob((5,))
    (log_prob + flow().log_prob(y.detach())).sum().backward()
    assert y.dtype == log_prob.dtype == dtype
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in flow.parameters())
    zero = torch.zeros(2, 3, device=device)
    expected = pf.RealNVP(features=3).to(device)().log_prob(zero)
    torch.testing.assert_close(flow().log_prob(zero).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_a_fresh_glow_starts_from_data_of_another_dtype(own, device):
    flow = pf.Glow(3, transforms=2).to(device, own)
    data = 5 + 2 * torch.randn(100, 3, dtype=torch.float64, device=device)
    assert flow().log_prob(data).dtype == own
    assert flow().sample().dtype == own
    assert all(p.dtype == own for p in flow.parameters())


def test_a_fitted_flow_scores_the_data_that_it_was_fitted_to(device):
    x, context = torch.randn(2, 60, 3, dtype=torch.float64, device=device)
    flow = pf.NSF(3, 3, transforms=2).to(device)
    pf.fit_density(flow, x, context, max_epochs=1, progress=False)
    d = flow(context)
    assert d.log_prob(x).dtype == torch.float32
    torch.testing.assert_close(d.log_prob(x), flow(context.float()).log_prob(x.float()))


def test_a_base_of_another_dtype_gives_way_to_the_parameters(device):
    base = dist.Normal(torch.zeros(3, dtype=torch.float64, device=device), 1.0).to_event(1)
    d = pf.RealNVP(3, base=base, transforms=2).to(device)()
    y, log_prob = d.rsample_and_log_prob((5,))
    assert y.dtype == log_prob.dtype == d.log_prob(y.clone()).dtype == torch.float32


def test_a_float64_model_takes_a_float32_likelihood(device):
    flow = pf.RealNVP(2, 1, transforms=2).to(device)
    y = torch.randn(10, 2, dtype=torch.float64, device=device)
    x = torch.randn(10, 1, dtype=torch.float64, device=device)

    def model() -> None:
        with pyro.plate("rows", 10):
            pyro.sample("y", flow(x), obs=y)

    trace = pyro.poutine.trace(model).get_trace()
    assert bool(trace.log_prob_sum().isfinite())


# Shapes of samples


@pytest.mark.parametrize("method", ["sample", "rsample", "rsample_and_log_prob"])
@pytest.mark.parametrize("shape", [3, None, "ab", (2.5,)], ids=str)
def test_a_sample_takes_a_shape(method, shape, device):
    flow = pf.RealNVP(2, transforms=2).to(device)
    expected = r"Expected sample_shape to be a shape such as \(5,\); got "
    with pytest.raises(TypeError, match=expected):
        getattr(flow(), method)(shape)
    with pytest.raises(ValueError, match=r"sizes that are not negative; got \(-1,\)"):
        getattr(flow(), method)((-1,))


def test_other_distributions_take_shapes_too(device):
    zero = torch.zeros(2, device=device)
    mixture = FlowMixture([dist.Normal(zero, 1.0).to_event(1)] * 2, zero)
    for d in (mixture, pf.distributions.mixture_base(torch.zeros(3, 2, device=device))):
        with pytest.raises(TypeError, match="Expected sample_shape to be a shape"):
            d.sample(3)
    for d in (mixture, pf.RealNVP(2)()):
        with pytest.raises(TypeError, match="Expected batch_shape to be a shape"):
            d.expand(3)
