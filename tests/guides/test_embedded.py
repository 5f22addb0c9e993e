"""Flows with data as context, and the guide that they are at some data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.guides import AmortizedGuide, EmbeddedFlow, from_spec


def make_flow(device: torch.device, features: int = 2, entries: int = 3) -> EmbeddedFlow:
    flow = pf.MAF(features, 2 * entries, transforms=2, hidden=(8,))
    return EmbeddedFlow(flow, pf.nn.Entries((entries,)), (entries,)).to(device)


def linear_normal(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.tensor([[1.0, 0.5], [0.0, -2.0], [0.3, 0.0]])
    x = 5 + torch.tensor([1.0, 10.0, 0.1]) * torch.randn(n, 3)
    noise = torch.randn(n, 2) @ torch.tensor([[0.5, 0.2], [0.0, 0.1]])
    return (x @ weight + noise).to(device), x.to(device)


def test_a_linear_normal_posterior_needs_no_training(device: torch.device) -> None:
    z, x = linear_normal(4000, device)
    flow = make_flow(device)
    flow.standardize(z, x)
    with torch.no_grad():
        value = float(flow(x).log_prob(z).mean())
    entropy = math.log(2 * math.pi * math.e) + math.log(0.5 * 0.1)
    assert abs(value + entropy) < 0.05


def test_frozen_numbers_stay_in_training(device: torch.device) -> None:
    z, x = linear_normal(200, device)
    flow = make_flow(device)
    flow.standardize(z, x)
    before = {name: value.clone() for name, value in flow.normal.state_dict().items()}
    pf.fit_density(flow, z, x, max_epochs=2, progress=False)
    after = flow.normal.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    torch.testing.assert_close(flow.loc, x.mean(0))


def test_an_entry_that_never_varies_is_no_trouble(device: torch.device) -> None:
    z, x = linear_normal(200, device)
    x[:, 1] = 3.0
    flow = make_flow(device)
    flow.standardize(z, x)
    assert bool(flow(x).log_prob(z).isfinite().all())


def test_the_guide_is_the_mixture_at_the_data(device: torch.device) -> None:
    z, x = linear_normal(200, device)
    flows = [make_flow(device) for _ in range(2)]
    flows[0].standardize(z, x)
    guide = AmortizedGuide(flows, x[0])
    each = torch.stack([flow(x[:1]).log_prob(z[:5].unsqueeze(1))[:, 0] for flow in flows])
    torch.testing.assert_close(guide.log_prob(z[:5]), each.logsumexp(0) - math.log(2))
    drawn, log_q = guide.sample_and_log_prob(7)
    assert drawn.shape == (7, 2)
    torch.testing.assert_close(log_q, guide.log_prob(drawn))
    shares = [space.log_share(z[:5]).exp() for space in guide.base_spaces()]  # type: ignore[misc]
    torch.testing.assert_close(sum(shares), torch.ones(5, device=device))


def test_the_base_space_leads_to_the_guide(device: torch.device) -> None:
    flow = make_flow(device)
    guide = AmortizedGuide([flow], torch.zeros(3, device=device))
    [space] = guide.base_spaces()
    u = space.base.sample((5,))
    z, log_det = space.transform.forward_and_log_det(u)
    torch.testing.assert_close(guide.log_prob(z), space.base.log_prob(u) - log_det)


@pytest.mark.parametrize("embedding", [pf.nn.DeepSet((4,), 3), pf.nn.Entries((4,))])
def test_it_is_made_again_from_plain_data(embedding: nn.Module) -> None:
    flow = pf.MAF(2, 3 if isinstance(embedding, pf.nn.DeepSet) else 8, transforms=2)
    guide = AmortizedGuide([EmbeddedFlow(flow, embedding, (4,))], torch.ones(4))
    copy = from_spec(guide.spec(), None)  # type: ignore[arg-type]
    copy.load_state_dict(guide.state_dict())
    z = torch.randn(3, 2)
    torch.testing.assert_close(copy.log_prob(z), guide.log_prob(z))
