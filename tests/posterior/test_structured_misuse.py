"""Structured guides of models for which they are not made."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows._deadline import Deadline, TimeOver
from pyroflows.guides import AutoStructuredFlow, structured
from pyroflows.guides.leaves import Leaves
from pyroflows.guides.marginal_mode import find_marginal_mode
from pyroflows.model import LogDensity
from pyroflows.posterior import structured as rung
from pyroflows.posterior.climb import Climb
from pyroflows.posterior.local_modes import missed_locals

GROUPS = 9


def of_groups(likelihood: Callable[[Tensor], dist.Distribution]) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("groups", len(y)):
            effect = pyro.sample("effect", dist.Normal(mean, scale))
            pyro.sample("y", likelihood(effect), obs=y)

    return model


def started(model: Callable[[Tensor], None], y: Tensor) -> AutoStructuredFlow:
    """A guide at the marginal mode."""
    guide = AutoStructuredFlow.of(LogDensity(model, (y,)))
    guide.start_at(find_marginal_mode(guide.marginal))
    return guide


@torch.no_grad()
def missed(guide: AutoStructuredFlow) -> float:
    g, log_q = guide.flow().rsample_and_log_prob((200,))
    log_weights = guide.log_marginal(g) - log_q
    log_evidence = float(log_weights.logsumexp(0)) - torch.tensor(200.0).log().item()
    return missed_locals(guide, g, log_evidence)


@pytest.mark.parametrize("observe", [torch.abs, torch.square], ids=["kink", "smooth"])
def test_locals_that_may_change_their_sign_together_are_missed(
    observe: Callable[[Tensor], Tensor],
) -> None:
    y = 2 + 0.3 * torch.randn(GROUPS, generator=torch.Generator().manual_seed(0))
    guide = started(of_groups(lambda effect: dist.Normal(observe(effect), 0.3)), y)
    torch.manual_seed(0)
    assert missed(guide) > 0.5


def test_each_local_with_two_modes_is_missed() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("groups", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(effect.square(), 0.3), obs=y)

    guide = started(model, torch.full((GROUPS,), 2.0))
    torch.manual_seed(0)
    # Another mode of the same mass a group.
    assert missed(guide) == pytest.approx(GROUPS, rel=0.1)


def test_locals_with_one_mode_are_not_missed() -> None:
    for likelihood in (lambda x: dist.Normal(x, 1.0), lambda x: dist.Poisson(x.exp())):
        guide = started(of_groups(likelihood), torch.arange(float(GROUPS)))
        torch.manual_seed(0)
        assert missed(guide) == 0.0


def test_integrals_that_do_not_settle_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = started(of_groups(lambda x: dist.Poisson(x.exp())), torch.arange(float(GROUPS)))
    leaves = Leaves(guide.marginal, 5)
    monkeypatch.setattr(structured, "integrate_leaves", lambda *args: leaves)
    leaves.error = 0.0, 0.3
    assert guide.integrate_leaves() is None
    assert guide.leaves is None and not guide.weighs_globals_alone
    leaves.error = 0.0, 0.01
    assert guide.integrate_leaves() is leaves
    assert guide.weighs_globals_alone


def test_a_density_with_jumps_is_not_taken_for_one_that_does_not_fall_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    y = torch.arange(float(GROUPS))
    climb = Climb(LogDensity(of_groups(lambda x: dist.Normal(x, 1.0)), (y,)), 100, Deadline())
    guide = AutoStructuredFlow.of(climb.density)
    mode = find_marginal_mode(guide.marginal)
    narrow = mode._replace(root=1e-8 * mode.root, found=False)
    monkeypatch.setattr(rung, "find_marginal_mode", lambda *args, **kwargs: narrow)
    with pytest.raises(ValueError, match="density has a mode"):
        rung.start_structured(climb, guide)


def test_a_model_without_globals_is_told() -> None:
    def model() -> None:
        site = pyro.sample("x", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
        pyro.factor("all", -site.sum(-1).square())

    with pytest.raises(ValueError, match="Expected a model with globals"):
        AutoStructuredFlow(model)()


def test_a_guide_that_there_was_no_time_to_start_is_judged_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_late(*args: object, **kwargs: object) -> None:
        raise TimeOver

    monkeypatch.setattr(rung, "find_marginal_mode", run_late)
    model, y = of_groups(lambda x: dist.Normal(x, 1.0)), torch.arange(float(GROUPS))
    posterior = pf.fit_posterior(
        model, (y,), guide=AutoStructuredFlow, time_limit=0.5, progress=False
    )
    assert posterior.name == "structured"
