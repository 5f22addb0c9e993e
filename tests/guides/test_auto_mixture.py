"""A mixture of flows: the distribution, and the guide in its roles."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam

import pyroflows as pf
from pyroflows.distributions import FlowMixture
from pyroflows.guides import AutoMixture


def two_sided(y: torch.Tensor = torch.tensor(2.0)) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(x.abs(), 0.2), obs=y)


def ready(components: int = 2, **options: Any) -> AutoMixture:
    guide = AutoMixture(two_sided, components, **options)
    guide()
    for k in range(components):
        guide.whiten(k, torch.tensor([2.0 if k % 2 else -2.0]), torch.tensor([[0.2]]))
    return guide


def test_the_density_is_that_of_a_mixture() -> None:
    logits = torch.tensor([0.3, -1.0, 0.0])
    locs, scales = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    ours = FlowMixture([dist.Normal(m, s) for m, s in zip(locs, scales, strict=True)], logits)
    torchs = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(locs, scales))
    x = torch.linspace(-6, 8, 50)
    torch.testing.assert_close(ours.log_prob(x), torchs.log_prob(x))
    torch.testing.assert_close(ours.component_log_probs(x).logsumexp(-1), torchs.log_prob(x))
    draws = ours.sample((20_000,))
    assert draws.shape == (20_000,)
    # Five standard errors.
    assert abs(float(draws.mean() - torchs.mean)) < 5 * float(torchs.stddev) / 20_000**0.5
    assert ours.expand((4,)).sample((3,)).shape == (3, 4)
    assert ours.support is dist.constraints.real


@pytest.mark.parametrize(
    ("components", "logits", "said"),
    [
        ([], torch.zeros(0), "at least one component"),
        (
            [dist.Normal(0.0, 1.0), dist.Normal(torch.zeros(2), 1.0)],
            torch.zeros(2),
            "components of one shape",
        ),
        ([dist.Normal(0.0, 1.0)], torch.zeros(2), r"logits of shape \(1,\); got \(2,\)"),
    ],
)
def test_a_bad_mixture_is_one_clear_sentence(
    components: Any, logits: torch.Tensor, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        FlowMixture(components, logits)


def test_the_guide_samples_and_scores_both_sides() -> None:
    guide = ready()
    law = guide.get_posterior()
    z, log_q = law.rsample_and_log_prob((1000,))
    torch.testing.assert_close(log_q, law.log_prob(z))
    assert 400 < int((z > 0).sum()) < 600
    draws = Predictive(two_sided, guide=guide, num_samples=50)()
    assert draws["x"].shape == (50,)
    assert guide()["x"].shape == ()


def test_it_trains_by_svi_and_its_parameters_are_in_the_store() -> None:
    guide = ready()
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True)
    svi = SVI(two_sided, guide, pyro.optim.Adam({"lr": 1e-1}), elbo)
    with torch.no_grad():
        guide.logits.copy_(torch.tensor([1.0, -1.0]))
    for _ in range(60):
        svi.step()
    assert any("logits" in name for name in pyro.get_param_store())
    assert sum("flow_1" in name for name in pyro.get_param_store()) == len(
        list(guide.flow_1.parameters())
    )
    # It starts at 0.88, and the true shares are equal.
    assert float(guide.logits.softmax(0)[0].detach()) < 0.75


def test_medians_and_quantiles() -> None:
    guide = ready()
    low, high = guide.quantiles([0.1, 0.9])["x"]
    assert float(low) == pytest.approx(-2.17, abs=0.05)
    assert float(high) == pytest.approx(2.17, abs=0.05)


def test_it_is_copied_and_loaded() -> None:
    guide = ready(components=3)
    z = torch.linspace(-3, 3, 7).unsqueeze(-1)
    expected = guide.get_posterior().log_prob(z)
    torch.testing.assert_close(copy.deepcopy(guide).get_posterior().log_prob(z), expected)
    fresh = AutoMixture(two_sided, 3)
    fresh.load_state_dict(guide.state_dict())
    fresh()
    torch.testing.assert_close(fresh.get_posterior().log_prob(z), expected)


def test_neutra_is_refused_with_the_alternative() -> None:
    neutra = NeuTraReparam(ready())
    with pytest.raises(ValueError, match="flow Monte Carlo"):
        pyro.poutine.reparam(two_sided, config=lambda _: neutra)()


@pytest.mark.parametrize("components", [0, -1])
def test_it_takes_at_least_one_component(components: int) -> None:
    with pytest.raises(ValueError, match="Expected components"):
        AutoMixture(two_sided, components)


def test_whitening_before_the_first_call_is_refused() -> None:
    with pytest.raises(RuntimeError, match="met its model"):
        AutoMixture(two_sided, 2).whiten(0, torch.zeros(1), torch.eye(1))


def test_a_posterior_with_two_modes_is_found_saved_and_loaded(tmp_path: Path) -> None:
    posterior = pf.fit_posterior(two_sided, progress=False)
    assert isinstance(posterior.guide, AutoMixture)
    assert posterior.verdict.ok, posterior
    x = posterior.sample(4000, seed=1)["x"]
    assert float((x > 0).float().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 4000**0.5)
    posterior.save(tmp_path / "p.pt")
    loaded = pf.load_posterior(tmp_path / "p.pt", two_sided)
    assert loaded.verdict == posterior.verdict
    assert [rung.name for rung in loaded.rungs] == [rung.name for rung in posterior.rungs]
    assert torch.equal(loaded.sample(10, seed=3)["x"], posterior.sample(10, seed=3)["x"])
