"""Gradients on their way through the layers of a flow."""

from __future__ import annotations

import torch

import pyroflows as pf
from pyroflows._saturation import bound_gradient


def test_no_gradient_overflows_in_a_deep_stack(device) -> None:
    flow = pf.RealNVP(3, transforms=4, reversible=True).to(device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(20 * torch.randn(parameter.shape, generator=generator))
    sizes = 10 ** (16 * torch.rand(5000, 3, generator=generator))
    x = (sizes * torch.randn(5000, 3, generator=generator)).to(device).requires_grad_()
    flow().log_prob(x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in flow.parameters() if p.grad is not None)


def test_ordinary_gradients_pass_through_every_transformation(device) -> None:
    def cubes(x: torch.Tensor) -> torch.Tensor:
        return (bound_gradient(1.0 * x) ** 3).sum()

    x = torch.tensor([1.0, -2.0], device=device)
    hessian = torch.diag(6 * x)
    torch.testing.assert_close(torch.func.hessian(cubes)(x), hessian)
    torch.testing.assert_close(torch.autograd.functional.hessian(cubes, x), hessian)
    by_row = torch.func.vmap(torch.func.grad(cubes))(x.expand(3, 2))
    torch.testing.assert_close(by_row, (3 * x.square()).expand(3, 2))


def test_gradients_beyond_the_bound_stop_there(device) -> None:
    x = torch.ones(2, device=device, requires_grad=True)
    weights = torch.tensor([-1e30, torch.inf], device=device)
    (bound_gradient(1.0 * x) * weights).sum().backward()
    most = torch.finfo(x.dtype).max ** 0.25
    torch.testing.assert_close(x.grad, torch.tensor([-most, most], device=device))
