"""Fits and verdicts of models with globals and locals."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.guides import AutoStructuredFlow
from pyroflows.posterior import climb
from pyroflows.posterior.structured import make_structured

GROUPS, ROWS = 40, 4


def grouped(groups: int = GROUPS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    effects = 1 + 0.7 * torch.randn(groups, 1, generator=generator)
    return effects + torch.randn(groups, ROWS, generator=generator)


def hierarchy(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("groups", y.shape[0], dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, scale))
        with pyro.plate("rows", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def by_quadrature(y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Means and sds of the mean and the log scale, and the log evidence, on a grid."""
    mean, log_scale = torch.meshgrid(
        torch.linspace(-0.5, 2.5, 400), torch.linspace(-2.5, 1.0, 400), indexing="ij"
    )
    mean, log_scale, y = mean.double(), log_scale.double(), y.double()
    scale = log_scale.exp()
    averages, n = y.mean(-1), y.shape[-1]
    inside = dist.Normal(averages.unsqueeze(-1), 1.0).log_prob(y).sum()
    # A group's rows are normal about their average, whose precision is n.
    constant = 0.5 * len(y) * torch.log(torch.tensor(2 * torch.pi / n)).double()
    between = dist.Normal(mean.unsqueeze(-1), (scale.square() + 1 / n).sqrt().unsqueeze(-1))
    log_p = (
        dist.Normal(0.0, 2.0).log_prob(mean)
        + dist.HalfNormal(2.0).log_prob(scale)
        + log_scale
        + between.log_prob(averages).sum(-1)
        + inside
        + constant
    )
    cell = (3.0 / 399) * (3.5 / 399)
    log_evidence = float(log_p.logsumexp((0, 1))) + float(torch.log(torch.tensor(cell)))
    weights = log_p.flatten().softmax(0)
    values = torch.stack([mean.flatten(), log_scale.flatten()], -1)
    means = weights @ values
    return means, (weights @ (values - means).square()).sqrt(), log_evidence


def test_a_hierarchy_is_fitted_by_its_structure(device: torch.device) -> None:
    y = grouped()
    posterior = pf.fit_posterior(hierarchy, (y.to(device),), progress=False)
    assert posterior.name.startswith("structured")
    assert posterior.verdict.ok
    means, sds, log_evidence = by_quadrature(y)
    assert posterior.log_evidence == pytest.approx(log_evidence, abs=0.02)
    n = 4000
    draws = posterior.sample(n, seed=1)
    found = torch.stack([draws["mean"].flatten(), draws["scale"].log().flatten()], -1).cpu()
    # Four standard errors of a mean and of a standard deviation of so many draws.
    assert bool(((found.mean(0) - means).abs() < 4 * sds / n**0.5).all())
    assert bool(((found.std(0) / sds).log().abs() < 4 / (2 * n) ** 0.5 * 1.5).all())
    blocks = {finding.block for finding in posterior.verdict.findings}
    assert blocks == {None, "globals"}


@pytest.mark.slow
def test_a_guide_of_the_users_choice_is_fitted_and_judged() -> None:
    y = (grouped(),)
    posterior = pf.fit_posterior(hierarchy, y, guide=AutoStructuredFlow, progress=False)
    assert posterior.verdict.ok
    assert len(posterior.rungs) == 1
    guide = posterior.guide
    assert pf.judge(guide, hierarchy, y).verdict.ok
    with torch.no_grad():
        guide.flow.whitening.loc.add_(0.3)  # a standard deviation and a half
    wrong = pf.judge(guide, hierarchy, y).verdict
    assert not wrong.ok


def factor(y: Tensor) -> None:
    """A loading whose sign the data do not tell."""
    loading = pyro.sample("loading", dist.Normal(0.0, 3.0))
    with pyro.plate("people", len(y)):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loading * ability, 0.5), obs=y)


@pytest.mark.slow
def test_a_second_mode_of_the_globals_is_found() -> None:
    y = 2 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    posterior = pf.fit_posterior(factor, (y,), guide=AutoStructuredFlow, progress=False)
    finding = posterior.verdict.finding("census", "globals")
    assert finding is not None
    assert finding.status == "failed"
    assert "loading" in posterior.verdict.reason


def improper(y: Tensor) -> None:
    """A flat prior of a log scale, whose posterior is flat, and low, where all groups are one."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    log_scale = pyro.sample("log_scale", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, log_scale.exp()))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def improper_but_informed(y: Tensor) -> None:
    """The same of the noise of rows, of which the data say enough."""
    log_scale = pyro.sample("log_scale", dist.ImproperUniform(dist.constraints.real, (), ()))
    mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("groups", y.shape[0], dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        with pyro.plate("rows", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(effect, log_scale.exp()), obs=y)


def test_a_plateau_of_globals_is_improper() -> None:
    y = 2 * torch.randn(12, generator=torch.Generator().manual_seed(0))
    posterior = pf.fit_posterior(improper, (y,), progress=False)
    assert not posterior.verdict.ok
    assert "cannot be normalised" in posterior.verdict.reason
    assert "log_scale" in posterior.verdict.reason
    assert pf.fit_posterior(improper_but_informed, (grouped(),), progress=False).verdict.ok


def unrelated(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def small(y: Tensor) -> None:
    hierarchy(y[:3])


class FakeClimb:
    """A fit that has just begun."""

    def __init__(self, model: Any, *args: Any) -> None:
        self.density = pf.model.LogDensity(model, args)
        self.settings = {"objective": pf.train.objectives.PathELBO(256)}


@pytest.mark.parametrize("model", [unrelated, small])
def test_models_without_use_for_it_are_left_to_the_other_rungs(model: Any) -> None:
    y = grouped() if model is small else grouped()[:, 0]
    assert make_structured(FakeClimb(model, y)) is None  # type: ignore[arg-type]


def wide(x: Tensor) -> None:
    """Many latents, all of which touch each other."""
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=torch.zeros(len(x)))


def test_too_many_latents_without_a_structure_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(climb, "MOST_DENSE", 20)
    x = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="Expected at most 20 latent entries, or a model of a few"):
        pf.fit_posterior(wide, (x,), progress=False)
