"""Ready-made flows under autocast: networks compute in 16 bits, maps in their own precision."""

from __future__ import annotations

import pytest
import torch

import pyroflows as pf

READY_MADE = [
    name
    for name in pf.__all__
    if isinstance(getattr(pf, name), type)
    and issubclass(getattr(pf, name), pf.Flow)
    and name != "Flow"
]


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("name", READY_MADE)
def test_densities_under_autocast(
    name: str, context_features: int | None, device: torch.device
) -> None:
    flow = getattr(pf, name)(4, context_features).to(device)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(64, 4, device=device)
    given = () if context_features is None else (torch.randn(64, 2, device=device),)
    with torch.no_grad():
        exact = flow(*given).log_prob(x)
    with torch.autocast(device.type, torch.bfloat16):
        rounded = flow(*given).log_prob(x)
    rounded.mean().backward()
    assert rounded.dtype == torch.float32
    # Numbers of 16 bits have 8 for the digits: errors of some thousandths a layer, which average out.
    assert float((rounded - exact).detach().mean().abs()) < 0.05
    assert all(p.grad.isfinite().all() for p in flow.parameters() if p.grad is not None)
