"""Objectives in the training of a guide and in a fit, on posteriors that are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from torch import Tensor

import pyroflows as pf
from pyroflows.examples import load_example
from pyroflows.train import train
from pyroflows.train.objectives import (
    FAB,
    MMD,
    ChiSquareBound,
    ForwardKL,
    ImportanceWeightedBound,
    Objective,
    PathELBO,
    RenyiBound,
)

Y = torch.tensor([1.0, -0.5])
# The posterior of z ~ N(0, 1), y ~ N(z, 1/2), by hand.
MEAN, SD = 0.8 * Y, math.sqrt(0.2)
LOG_EVIDENCE = float(dist.Normal(0.0 * Y, math.sqrt(1.25)).log_prob(Y).sum())


def model(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)


def draws() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"z": MEAN + SD * torch.randn(4000, 2, generator=generator)}


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "elbo": lambda: PathELBO(128),
    "elbo, total gradient": lambda: PathELBO(128, path=False),
    "importance": lambda: ImportanceWeightedBound(128),
    "renyi": lambda: RenyiBound(0.5, 128),
    "chi-square": lambda: ChiSquareBound(num_particles=128),
    "fab": lambda: FAB(128, alpha=1.0),
    "forward": lambda: ForwardKL(draws(), 1000),
    "mmd": lambda: MMD(draws(), 1.0, 1000),
}


@pytest.mark.parametrize("name", slow_but_for(["importance", "forward"], OBJECTIVES))
def test_a_gaussian_guide_finds_the_posterior(name: str) -> None:
    """From one standard deviation off in the mean, and more than twice as wide."""
    flow = pf.Flow([pf.transforms.LowerTriangularAffine(2)])
    density = pf.model.LogDensity(model, (Y,))
    history: list[Tensor] = []
    objective = OBJECTIVES[name]()
    train(flow, density, history, 400, whitening_step_size=5e-2, objective=objective)
    last: Any = flow.transform.layers[-1]
    loc, root = last.loc_and_scale_tril()
    # Objectives with noise at the optimum, or on 4000 draws, end within a few hundredths of a width.
    torch.testing.assert_close(loc, MEAN, rtol=0, atol=0.1 * SD)
    torch.testing.assert_close(root @ root.mT, 0.2 * torch.eye(2), rtol=0, atol=0.1 * 0.2)
    if name in ("elbo", "importance", "renyi"):
        assert float(history[-1]) == pytest.approx(LOG_EVIDENCE, abs=1e-3)


@pytest.mark.parametrize("make", [PathELBO, ImportanceWeightedBound])
def test_the_total_gradient_has_the_mean_of_the_path_gradient(make: Any) -> None:
    """Off the posterior; the noise of each is its own."""
    density, found = pf.model.LogDensity(model, (Y,)), []
    for path in (True, False):
        torch.manual_seed(0)
        flow = pf.RealNVP(2, transforms=2, network=pf.nn.mlp((8,)), mixing=None)
        runs = []
        for seed in range(20):
            flow.zero_grad()
            torch.manual_seed(seed)
            make(2000, path=path).backward(flow(), density)
            grads = [p.grad.flatten() for p in flow.parameters() if p.grad is not None]
            runs.append(torch.cat(grads))
        found.append(torch.stack(runs))
    difference = found[0].mean(0) - found[1].mean(0)
    error = ((found[0].var(0) + found[1].var(0)) / 20).sqrt()
    assert bool((difference.abs() <= 6 * error + 1e-5).all())


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize("make", [PathELBO, ImportanceWeightedBound, ChiSquareBound])
def test_the_gradient_that_is_added_is_that_of_the_loss(make: Any, path: bool) -> None:
    density = pf.model.LogDensity(model, (Y,))
    torch.manual_seed(0)
    flow = pf.RealNVP(2, transforms=2, network=pf.nn.mlp((8,)))
    objective = make(num_particles=16, path=path)
    torch.manual_seed(1)
    loss = objective.density_loss(flow(), density)
    parameters = list(flow.parameters())
    expected = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    torch.manual_seed(1)
    value = objective.backward(flow(), density).mean
    torch.testing.assert_close(value, loss.detach())
    for p, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["importance", "fab"])
def test_a_fit_for_an_objective(name: str) -> None:
    objective = OBJECTIVES[name]()
    options: dict[str, Any] = {"guide": pf.RealNVP, "steps": 15, "progress": False}
    posterior = pf.fit_posterior(model, (Y,), objective=objective, **options)
    assert posterior.verdict.ok and len(posterior.history) == 15
    assert posterior.log_evidence == pytest.approx(LOG_EVIDENCE, abs=0.02)
    again = pf.fit_posterior(model, (Y,), objective=objective, **options)
    assert again.history == posterior.history  # an objective keeps nothing from one fit to the next


def test_what_is_no_objective() -> None:
    with pytest.raises(TypeError, match=r"one of pyroflows.train.objectives; got 'elbo'"):
        pf.fit_posterior(model, (Y,), objective="elbo", progress=False)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"), [("elbo", 0.66), ("renyi", 0.5), ("chi-square", 0.5), ("importance", 0.1)]
)
def test_centred_eight_schools(name: str, least: float) -> None:
    """Effective share of the draws.

    The importance-weighted bound asks for a rough guide only, which the verdict may refuse.
    """
    example = load_example("eight_schools")
    objective = OBJECTIVES[name]()
    objective.num_particles = 256
    posterior = pf.fit_posterior(
        example.model,
        example.args,
        example.kwargs,
        objective=objective,
        steps=1650,
        progress=False,
    )
    assert posterior.verdict.ok or name == "importance"
    assert posterior.verdict.ess >= least
