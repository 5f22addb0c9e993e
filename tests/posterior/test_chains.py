"""Markov chains on top of a guide: exact whatever the guide misses, and read by ArviZ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from torch import Tensor

import pyroflows as pf
from pyroflows.guides import Guide
from pyroflows.model import LogDensity
from pyroflows.posterior import Posterior
from pyroflows.posterior import chains as mcmc
from pyroflows.posterior.chains import Chains, flow_mc, neutra
from pyroflows.report import statistics
from pyroflows.sampling.hamiltonian import evaluate, latent_target
from pyroflows.sampling.spaces import plain_space

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

Model = Callable[..., Any]
METHODS: dict[str, Callable[..., Chains]] = {"neutra": neutra, "flow_mc": flow_mc}
SHAPE, SCALE = 3.0, 0.7


def skewed() -> None:
    """A gamma and a log-normal variable, whose moments are known."""
    pyro.sample("rate", dist.Gamma(torch.tensor(SHAPE), 1.0))
    pyro.sample("size", dist.LogNormal(torch.tensor(0.0), SCALE))


MOMENTS = {
    "rate": (SHAPE, SHAPE),
    "size": (math.exp(SCALE**2 / 2), math.expm1(SCALE**2) * math.exp(SCALE**2)),
}


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(torch.tensor(0.0), 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(4), (v / 2).exp()).to_event(1))


class Funnel(pf.transforms.Transform):
    """The map from a standard normal to the funnel."""

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        v = 3 * x[..., :1]
        return torch.cat([v, x[..., 1:] * (v / 2).exp()], -1), math.log(3.0) + 2 * v.squeeze(-1)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        v = y[..., :1]
        return torch.cat([v / 3, y[..., 1:] * (-v / 2).exp()], -1), -math.log(3.0) - 2 * v.squeeze(
            -1
        )


def nothing(features: int) -> pf.transforms.Transform:
    return pf.transforms.LowerTriangularAffine(features)


def posterior_of(
    model: Model,
    flow: Callable[[int], Any] = nothing,
    args: tuple[Any, ...] = (),
    loc: float = 0.0,
    scale: float = 1.0,
) -> Posterior:
    """A posterior whose guide has not been trained."""
    density = LogDensity(model, args)
    guide = pf.AutoFlow(density.continuous_model, flow=flow)
    density.introduce(guide)
    guide.whiten(torch.full((density.features,), loc), scale * torch.eye(density.features))
    return Posterior(guide, density)


@cache
def rough() -> Posterior:
    """A Gaussian guide that is off by a third of a standard deviation or more."""
    return posterior_of(skewed, loc=0.5, scale=0.9)


class MixtureGuide(torch.nn.Module, Guide):
    """A guide with two modes that can be drawn and scored, and nothing else."""

    features = 2

    def __init__(self, distance: float, share: float = 0.5) -> None:
        super().__init__()
        weights = dist.Categorical(torch.tensor([1 - share, share]))
        locs = torch.tensor([[-distance, 0.0], [distance, 0.0]])
        self.modes = dist.MixtureSameFamily(weights, dist.Normal(locs, 1.2).to_event(1))

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = self.modes.sample((n,))
        return z, self.modes.log_prob(z)

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.modes.log_prob(z)

    def get_posterior(self) -> Any:
        return self

    def rsample_and_log_prob(self, shape: tuple[int]) -> tuple[Tensor, Tensor]:
        return self.sample_and_log_prob(*shape)


def two_modes() -> None:
    wide = dist.Normal(torch.zeros(2), 10.0).to_event(1)
    x = pyro.sample("x", wide)
    modes = dist.Normal(torch.tensor([[-8.0, 0.0], [8.0, 1.0]]), 1.0).to_event(1)
    log_density = (modes.log_prob(x.unsqueeze(-2)) + torch.tensor([0.2, 0.8]).log()).logsumexp(-1)
    pyro.factor("modes", log_density - wide.log_prob(x))


def assert_moments(chains: Chains, site: str, mean: float, variance: float) -> None:
    """First and second moment within 4.5 standard errors, which come from the effective sample sizes."""
    x = chains.draws[site].double().numpy()
    for values, expected in ((x, mean), (np.square(x - mean), variance)):
        error = float(statistics.diagnostics({"f": values})["mcse_mean"]["f"])
        assert error < 0.2 * math.sqrt(variance) * max(1, math.sqrt(variance)), (
            "the chains say nothing"
        )
        assert abs(values.mean() - expected) < 4.5 * error


@pytest.mark.parametrize("method", slow_but_for(["flow_mc"], METHODS))
def test_exact_whatever_the_guide(method: str) -> None:
    assert rough().propose(4000, seed=0).ess < 0.9
    chains = METHODS[method](rough(), progress=False)
    for site, (mean, variance) in MOMENTS.items():
        assert_moments(chains, site, mean, variance)
        assert chains.rhat[site] < 1.03
        assert chains.ess[site] > 500
    assert chains.divergences < 0.005 * chains.log_density.numel()
    assert chains.acceptance == pytest.approx(0.8, abs=0.06)


@pytest.mark.slow
def test_nuts_is_exact() -> None:
    chains = neutra(rough(), kernel="nuts", draws=150, chains=2, warmup=50, progress=False)
    assert chains.unconstrained.shape == (2, 150, 2)
    for site, (mean, variance) in MOMENTS.items():
        assert_moments(chains, site, mean, variance)
    assert chains.jump_acceptance is None
    assert 0.5 < chains.acceptance <= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_flow_beats_none_on_a_funnel(method: str) -> None:
    exact = METHODS[method](posterior_of(funnel, Funnel), progress=False, draws=100, chains=16)
    plain = METHODS[method](posterior_of(funnel), progress=False, draws=100, chains=16)
    assert_moments(exact, "v", 0.0, 9.0)
    assert exact.rhat["v"] < 1.05 < plain.rhat["v"]
    assert exact.ess["v"] > 10 * plain.ess["v"]
    assert exact.divergences == 0


@pytest.mark.slow
def test_jumps_between_modes() -> None:
    """The guide gives each mode a half, and the weights 2 to 8; local moves never cross."""
    posterior = Posterior(MixtureGuide(distance=7.5), LogDensity(two_modes))  # type: ignore[arg-type]
    chains = flow_mc(posterior, draws=150, progress=False)
    x = chains.draws["x"]
    right = (x[..., 0] > 0).double().numpy()
    error = float(statistics.diagnostics({"f": right})["mcse_mean"]["f"])
    assert error < 0.02
    assert abs(right.mean() - 0.8) < 4.5 * error
    for sign, loc in ((-1, (-8.0, 0.0)), (1, (8.0, 1.0))):
        of_mode = x[x[..., 0] * sign > 0]
        # Draws of one mode are as good as independent, each fifth at the least.
        assert float((of_mode.mean(0) - torch.tensor(loc)).abs().max()) < 4.5 * math.sqrt(
            5 / len(of_mode)
        )
    still = flow_mc(posterior, jumps=0, draws=50, progress=False)
    assert still.jump_acceptance is None
    assert bool((still.draws["x"][..., 0].sign().diff(dim=1) == 0).all())


def test_jump_leaves_the_posterior_as_it_is() -> None:
    """From 40000 exact draws, by proposals from a guide that is shifted, with both spaces."""
    posterior = rough()
    z = posterior.density.unconstrain(
        {
            "rate": dist.Gamma(SHAPE, 1.0).sample((40_000,)),
            "size": dist.LogNormal(0.0, SCALE).sample((40_000,)),
        }
    )
    guide: Any = posterior.guide
    draws = guide.sample_and_log_prob(4000)[0].detach()
    spaces = [*guide.base_spaces(), plain_space(guide, draws)]
    for space in spaces:
        with torch.no_grad():
            x, _ = space.transform.inverse_and_log_det(z)
        target = latent_target(posterior.density, space.transform)
        point, acceptance = mcmc._Jump(target, space, 2)(evaluate(target, x))
        assert 0.3 < acceptance < 0.95
        with torch.no_grad():
            moved, _ = space.transform.forward_and_log_det(point.position)
        assert float((moved != z).any(-1).double().mean()) > 0.3
        torch.testing.assert_close(point.log_density, target(point.position)[0])
        for after, before in ((moved, z), (moved.square(), z.square())):
            change = (after - before).double()
            assert float((change.mean(0).abs() / change.std(0)).max()) < 4.5 / math.sqrt(len(z))


def cliff() -> None:
    x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.factor("cliff", torch.where(x > -0.5, torch.zeros_like(x), torch.full_like(x, math.nan)))


@pytest.mark.parametrize("method", slow_but_for(["flow_mc"], METHODS))
def test_never_enters_nan(method: str) -> None:
    with pyro.validation_enabled(False):
        density = LogDensity(cliff)
        guide = pf.AutoFlow(cliff, flow=nothing)
        density.introduce(guide)
        guide.whiten(torch.zeros(1), torch.ones(1, 1))
        chains = METHODS[method](Posterior(guide, density), progress=False, draws=60, chains=16)
    assert bool((chains.unconstrained > -0.5).all())
    assert bool(chains.log_density.isfinite().all())
    normal = dist.Normal(torch.tensor(0.0), 1.0)
    hazard = float(normal.log_prob(torch.tensor(-0.5)).exp() / normal.cdf(torch.tensor(0.5)))
    assert_moments(chains, "x", hazard, 1 - 0.5 * hazard - hazard**2)


def nowhere() -> None:
    x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.factor("far", torch.where(x.abs() < 1, torch.zeros_like(x), torch.full_like(x, -math.inf)))


@pytest.mark.parametrize("method", METHODS)
def test_guide_that_misses_the_support(method: str) -> None:
    density = LogDensity(nowhere)
    guide = pf.AutoFlow(nowhere, flow=nothing)
    density.introduce(guide)
    posterior = Posterior(guide, density)
    guide.whiten(torch.full((1,), 1e3), torch.ones(1, 1))
    with pytest.raises(ValueError, match="Expected a guide whose draws have a finite log density"):
        METHODS[method](posterior, progress=False)


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.deterministic("double", 2 * mu)
    with pyro.plate("school", 3):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@cache
def schools_chains() -> Chains:
    posterior = posterior_of(schools, args=(torch.tensor([0.5, -0.3, 1.5]),))
    return neutra(posterior, draws=40, chains=6, warmup=30, progress=False)


def test_draws_by_chain() -> None:
    chains = schools_chains()
    assert chains.unconstrained.shape == (6, 40, 4)
    assert {name: tuple(value.shape) for name, value in chains.draws.items()} == {
        "mu": (6, 40),
        "theta": (6, 40, 3),
        "double": (6, 40),
    }
    torch.testing.assert_close(chains.draws["mu"], chains.unconstrained[..., 0])
    torch.testing.assert_close(chains.draws["double"], 2 * chains.draws["mu"])
    torch.testing.assert_close(chains.draws["theta"], chains.unconstrained[..., 1:])
    torch.testing.assert_close(chains.log_density, chains.density.log_prob(chains.unconstrained))
    assert repr(chains) == "<Chains of mu, theta[3]: 40 draws in each of 6 chains>"


def test_diagnostics_are_those_of_arviz() -> None:
    chains = schools_chains()
    data = chains.to_arviz()
    for kind, found, method in ((az.rhat, chains.rhat, "rank"), (az.ess, chains.ess, "bulk")):
        expected = kind(
            data["posterior"].to_dataset() if hasattr(data, "to_dataset") else data, method=method
        )
        for site in ("mu", "theta", "double"):
            np.testing.assert_allclose(found[site], np.asarray(expected[site]), rtol=1e-12)


def test_to_arviz() -> None:
    chains = schools_chains()
    data = chains.to_arviz()
    shapes = {
        ("posterior", "theta"): (6, 40, 3),
        ("posterior", "double"): (6, 40),
        ("log_likelihood", "y"): (6, 40, 3),
        ("posterior_predictive", "y"): (6, 40, 3),
        ("sample_stats", "lp"): (6, 40),
        ("prior", "theta"): (1, 40, 3),
        ("observed_data", "y"): (3,),
    }
    assert {key: data[key[0]][key[1]].shape for key in shapes} == shapes
    assert data["posterior"]["theta"].dims == ("chain", "draw", "school")
    theta, y = chains.draws["theta"], torch.tensor([0.5, -0.3, 1.5])
    expected = dist.Normal(theta, 1.0).log_prob(y).numpy()
    np.testing.assert_allclose(data["log_likelihood"]["y"].values, expected, rtol=1e-5)
    assert data.attrs["divergences"] == 0
    assert data.attrs["step_size"] == chains.step_size


def test_summary() -> None:
    chains = schools_chains()
    table = chains.summary()
    assert list(table.index) == ["mu", "theta[0]", "theta[1]", "theta[2]", "double"]
    assert list(table.columns) == [
        "mean",
        "sd",
        "hdi_3%",
        "hdi_97%",
        "mcse_mean",
        "ess_bulk",
        "ess_tail",
        "rhat",
    ]
    assert table.loc["theta[1]", "mean"] == pytest.approx(
        float(chains.draws["theta"][..., 1].mean()), abs=1e-6
    )
    assert table.loc["theta[1]", "rhat"] == chains.rhat["theta"][1]
    assert table.loc["theta[1]", "ess_bulk"] == chains.ess["theta"][1]


def test_diagnostics_of_few_draws() -> None:
    with pytest.raises(ValueError, match="Expected at least 4 draws a chain; got 3"):
        statistics.diagnostics({"x": np.zeros((2, 3))})


def test_diagnostics_see_chains_apart() -> None:
    draws = np.random.default_rng(0).normal(size=(4, 100, 2))
    draws[0, :, 1] += 5
    found = statistics.diagnostics({"x": draws, "chain": np.ones((4, 100))})
    assert found["rhat"]["x"][0] < 1.05 < 1.5 < found["rhat"]["x"][1]
    assert math.isnan(found["rhat"]["chain"])


@pytest.mark.parametrize("method", [*METHODS, "nuts"])
def test_seed(method: str) -> None:
    samplers: dict[str, Callable[..., Chains]] = {**METHODS, "nuts": partial(neutra, kernel="nuts")}

    def run(seed: int | None) -> Tensor:
        return samplers[method](
            rough(), draws=3, chains=2, warmup=3, seed=seed, progress=False
        ).unconstrained

    rough()
    before = torch.random.get_rng_state()
    first = run(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    torch.manual_seed(1)
    assert torch.equal(run(None), first)


def test_float64() -> None:
    torch.set_default_dtype(torch.float64)
    chains = flow_mc(posterior_of(skewed), draws=5, chains=2, warmup=5, progress=False)
    assert chains.unconstrained.dtype == chains.log_density.dtype == torch.float64


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    neutra(rough(), draws=4, chains=2, warmup=4)
    assert "Sampling" in capsys.readouterr().err
    neutra(rough(), draws=4, chains=2, warmup=4, progress=False)
    assert capsys.readouterr().err == ""


MISUSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"posterior": "guide"},
        TypeError,
        "Expected posterior to be a Posterior, as fit_posterior returns it; got str",
    ),
    ({"draws": 0}, ValueError, "Expected draws >= 1; got 0"),
    ({"chains": 0}, ValueError, "Expected chains >= 1; got 0"),
    ({"warmup": -1}, ValueError, "Expected warmup >= 0; got -1"),
    ({"draws": 2.5}, TypeError, "Expected draws to be an integer"),
    ({"seed": -1}, ValueError, "Expected seed >= 0"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "error", "message"), MISUSE, ids=[message for *_, message in MISUSE]
)
def test_misuse(method: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        METHODS[method](**{"posterior": rough(), "progress": False, **change})


def test_misuse_of_one() -> None:
    with pytest.raises(ValueError, match="Expected kernel to be one of 'hmc', 'nuts'; got 'gibbs'"):
        neutra(rough(), kernel="gibbs")
    with pytest.raises(ValueError, match="Expected jumps >= 0; got -1"):
        flow_mc(rough(), jumps=-1)
    mixture = Posterior(MixtureGuide(distance=7.5), LogDensity(two_modes))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError,
        match=r"Expected a posterior whose guide has one base space, .*; got MixtureGuide, which has 0",
    ):
        neutra(mixture)
