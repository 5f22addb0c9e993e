"""Nearly normal locals by a regression of their mean and precision on the globals."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflows.guides import AutoStructuredFlow
from pyroflows.guides.marginal_mode import find_marginal_mode

SHARES = torch.tensor([0.3, 0.5, 0.7, 0.25, 0.8, 0.55])


def logit(y: Tensor, trials: float) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        pyro.sample("y", dist.Binomial(trials, logits=effect), obs=y)


def started(trials: float) -> AutoStructuredFlow:
    torch.manual_seed(0)
    guide = AutoStructuredFlow(logit)
    guide((SHARES * trials).round(), trials)
    guide.start_at(find_marginal_mode(guide.marginal))
    return guide


def test_regressed_locals_are_those_of_newton_steps() -> None:
    guide = started(2000.0)
    regressed = guide.regress_locals()
    assert regressed is not None
    g = guide.flow().sample((20,)).double().detach()
    given, right = regressed.condition(g), guide.marginal.condition(g, guide.near(g))
    width = right.normal.draw_centred(torch.ones_like(right.mean)).abs()
    assert ((given.mean - right.mean) / width).abs().amax() < 0.5
    error = guide.log_marginal(g) - guide.marginal.log_prob(g)
    assert error.std() < 0.02


def test_draws_by_regressed_locals_are_weighted_by_the_joint_density() -> None:
    guide = started(2000.0)
    assert guide.regress_locals() is not None
    density = guide.marginal.density
    z, log_weights = guide.sample_and_weigh(density, 200)
    right = density.log_joint(z.double()) - guide.log_prob(z)
    torch.testing.assert_close(log_weights, right.double(), atol=2e-3, rtol=0)


def test_locals_that_are_not_nearly_normal_are_not_regressed() -> None:
    guide = started(4.0)
    assert guide.regress_locals() is None
    assert guide.regressed_locals is None


def test_far_from_the_mode_steps_are_taken() -> None:
    guide = started(2000.0)
    regressed = guide.regress_locals()
    assert regressed is not None
    far = guide.centre + 20 * guide.root.sum(-1)
    found = regressed.log_prob(far.unsqueeze(0))
    right = guide.marginal.log_prob(far.unsqueeze(0))
    torch.testing.assert_close(found, right, atol=0.1, rtol=0)


def test_the_regression_is_part_of_the_state() -> None:
    guide = started(2000.0)
    assert guide.regress_locals() is not None
    other = started(2000.0)
    other.load_state_dict(guide.state_dict())
    z = guide.sample(5)
    torch.testing.assert_close(other.log_prob(z), guide.log_prob(z))
    assert other.regressed_locals is not None
