"""The verdict on guides that were trained elsewhere, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.infer.autoguide.initialization import init_to_value

import pyroflows as pf

Guide = Any


def pair(scale: float = 1.0) -> None:
    """Two sites that are normal on the unconstrained scale."""
    pyro.sample("a", dist.Normal(torch.zeros(2), scale).to_event(1))
    pyro.sample("b", dist.LogNormal(0.0, scale))


def trained(guide: Guide, steps: int = 400) -> Guide:
    torch.manual_seed(0)
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True)
    optimiser = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(pair, guide, optimiser, elbo)
    for _ in range(steps):
        svi.step()
    return guide


EXACT: dict[str, Any] = {
    "init_loc_fn": init_to_value(values={"a": torch.zeros(2), "b": torch.tensor(1.0)}),
    "init_scale": 1.0,
}


def guide_list() -> Guide:
    guide = AutoGuideList(pair)
    guide.append(AutoNormal(poutine.block(pair, expose=["a"]), **EXACT))
    guide.append(AutoDiagonalNormal(poutine.block(pair, expose=["b"]), **EXACT))
    return guide


def by_hand(scale: float = 1.0) -> None:
    pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("b", dist.LogNormal(0.0, 1.0))


GUIDES: dict[str, Callable[[], Guide]] = {
    "AutoFlow": lambda: pf.AutoFlow(pair, **EXACT),
    "AutoMixture": lambda: pf.guides.AutoMixture(pair, 2, **EXACT),
    "AutoNormal": lambda: AutoNormal(pair, **EXACT),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(pair, **EXACT),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(pair, **EXACT),
    "AutoLowRankMultivariateNormal": lambda: trained(
        AutoLowRankMultivariateNormal(pair, rank=1, **EXACT)
    ),
    "AutoIAFNormal": lambda: trained(AutoIAFNormal(pair, hidden_dim=[8])),
    "AutoNormalizingFlow": lambda: AutoNormalizingFlow(pair, pf.transforms.LowerTriangularAffine),
    "AutoGuideList": guide_list,
    "by hand": lambda: by_hand,
}


@cache
def made(name: str) -> Guide:
    return GUIDES[name]()


#: One of the library, one of Pyro, one of a flow, and a list.
KINDS = ["AutoMixture", "AutoMultivariateNormal", "AutoNormalizingFlow", "AutoGuideList"]


@pytest.mark.parametrize("name", slow_but_for(KINDS, GUIDES))
def test_a_right_guide_is_trusted(name: str) -> None:
    posterior = pf.judge(made(name), pair, (1.0,))
    assert posterior.verdict.ok, posterior
    assert posterior.verdict.draws == 10_000
    assert abs(posterior.log_evidence) < 4 * posterior.verdict.log_evidence_error + 1e-3
    statuses = {finding.name: finding.status for finding in posterior.verdict.findings}
    assert statuses.pop("polish") == "not judged"
    assert set(statuses.values()) == {"held"}
    draws = posterior.sample(4000, seed=0)
    assert draws["a"].shape == (4000, 2)
    assert float(draws["a"].mean(0).abs().max()) < 5 / math.sqrt(4000)
    assert abs(math.log(float(draws["b"].log().std()))) < 6 / math.sqrt(8000)


#: One of the library, one of Pyro, a list, and a function; the check sees their densities alone.
SOME = ["AutoFlow", "AutoNormal", "AutoGuideList", "by hand"]


@pytest.mark.parametrize("name", slow_but_for(["AutoFlow", "AutoGuideList"], SOME))
def test_a_guide_of_a_wrong_scale_is_not_trusted(name: str) -> None:
    verdict = pf.judge(made(name), pair, (4.0,)).verdict
    assert not verdict.ok
    assert verdict.khat > 0.7
    assert verdict.failed[0].sentence == verdict.reason


def two_modes() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    near = dist.Normal(torch.tensor([-5.0, 0.0]), 1.0).log_prob(x).sum() + math.log(0.8)
    far = dist.Normal(torch.tensor([5.0, 3.0]), 1.0).log_prob(x).sum() + math.log(0.2)
    pyro.factor(
        "modes", torch.logaddexp(near, far) - dist.Normal(torch.zeros(2), 10.0).log_prob(x).sum()
    )


def list_on_one_mode() -> Guide:
    guide = AutoGuideList(two_modes)
    guide.append(AutoNormal(poutine.block(two_modes, hide=["modes"]), **ON_ONE_MODE))
    return guide


def by_hand_on_one_mode() -> None:
    pyro.sample("x", dist.Normal(torch.tensor([-5.0, 0.0]), 1.0).to_event(1))


ON_ONE_MODE: dict[str, Any] = {
    "init_loc_fn": init_to_value(values={"x": torch.tensor([-5.0, 0.0])}),
    "init_scale": 1.0,
}
ONE_MODE: dict[str, Callable[[], Guide]] = {
    "AutoFlow": lambda: pf.AutoFlow(two_modes, **ON_ONE_MODE),
    "AutoNormal": lambda: AutoNormal(two_modes, **ON_ONE_MODE),
    "AutoGuideList": list_on_one_mode,
    "by hand": lambda: by_hand_on_one_mode,
}


@pytest.mark.parametrize("name", slow_but_for(["AutoNormal"], SOME))
def test_a_guide_that_has_lost_a_mode_is_not_trusted(name: str) -> None:
    verdict = pf.judge(ONE_MODE[name](), two_modes).verdict
    # Importance sampling sees nothing of it.
    assert verdict.ess > 0.9
    assert not verdict.ok
    assert verdict.failed[0].name == "census"
    assert verdict.missed == pytest.approx(0.2 / 0.8, rel=0.1)
    assert "20%" in verdict.reason


def test_it_judges_where_the_model_is(device: torch.device) -> None:
    def located(zero: torch.Tensor) -> None:
        pyro.sample("x", dist.Normal(zero, 1.0).to_event(1))

    zero = torch.zeros(2, device=device)
    start = init_to_value(values={"x": zero})
    posterior = pf.judge(AutoNormal(located, init_loc_fn=start, init_scale=1.0), located, (zero,))
    assert posterior.verdict.ok, posterior
    assert posterior.sample(10)["x"].device.type == device.type


def test_a_guide_without_a_density_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="AutoDelta"):
        pf.judge(AutoDelta(pair), pair)


def test_the_same_seed_gives_the_same_verdict_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    first, second = (pf.judge(made("AutoNormal"), pair, (1.5,), draws=500) for _ in range(2))
    assert first.verdict == second.verdict
    assert torch.equal(torch.get_rng_state(), state)


def test_without_time_nothing_is_judged() -> None:
    posterior = pf.judge(made("AutoNormal"), pair, time_limit=1e-6)
    assert {finding.status for finding in posterior.verdict.findings} == {"not judged"}
    assert str(posterior.verdict) == (
        "Do not trust this posterior: it has not been judged, because the time limit was reached."
    )
    assert posterior.sample(3)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"draws": 0}, ValueError, "Expected draws >= 1"),
        ({"time_limit": -1.0}, ValueError, "Expected time_limit to be positive"),
        ({"seed": -1}, ValueError, "Expected seed >= 0"),
        ({"model": 3}, TypeError, "Expected model to be a callable"),
    ],
)
def test_a_bad_argument_is_refused(
    options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        pf.judge(**{"guide": made("AutoNormal"), "model": pair, **options})


@pytest.mark.parametrize(
    "name", slow_but_for(["AutoGuideList"], ["AutoFlow", "AutoMultivariateNormal", "AutoGuideList"])
)
def test_a_judged_posterior_is_saved_and_loaded(name: str, tmp_path: Any) -> None:
    posterior = pf.judge(made(name), pair, draws=1000)
    posterior.save(tmp_path / "p.pt")
    for guide in (None, GUIDES[name]()):
        loaded = pf.load_posterior(tmp_path / "p.pt", pair, guide=guide)
        assert loaded.verdict == posterior.verdict
        torch.testing.assert_close(loaded.sample(10, seed=0), posterior.sample(10, seed=0))


def _misjudged(y: Any = None) -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(0.0, 1.0))


def _without_sites(y: Any = None) -> None:
    pass


def _with_fewer_arguments() -> None:
    _misjudged()


def _now_and_then(y: Any = None) -> None:
    pyro.sample("b", dist.Normal(0.0, 1.0))
    if float(torch.rand(())) < 0.5:
        pyro.sample("a", dist.Normal(0.0, 1.0))


def _twice() -> Any:
    guide = AutoGuideList(_misjudged)
    for name in "abb":
        guide.append(AutoNormal(poutine.block(_misjudged, expose=[name])))
    return guide


@pytest.mark.parametrize(
    ("guide", "match"),
    [
        (_without_sites, "Expected a guide with a pyro.sample statement for each"),
        (print, "Expected a guide with a pyro.sample statement for each"),
        (_with_fewer_arguments, "Expected args and kwargs that the guide takes"),
        (_now_and_then, "Expected a guide"),
        (pf.RealNVP(2), r"Expected a guide such as AutoFlow.model, RealNVP.; got a made RealNVP"),
        (_twice(), "Expected a guide with each site once; got 'b' more than once"),
    ],
    ids=["none", "print", "arguments", "random", "flow", "twice"],
)
def test_what_is_no_guide_of_the_model_is_told(guide: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        pf.judge(guide, _misjudged, (1.0,))


def many() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(70), 1.0).to_event(1))


@pytest.mark.parametrize(("scale", "taken"), [(0.3, False), (1.0, True)])
def test_of_many_latents_the_weights_say_whether_a_census_is_of_use(
    scale: float, taken: bool
) -> None:
    start = init_to_value(values={"x": torch.zeros(70)})
    guide = AutoDiagonalNormal(many, init_loc_fn=start, init_scale=scale)
    verdict = pf.judge(guide, many, draws=1000).verdict
    assert verdict.ok == taken
    assert (verdict.finding("census").status == "held") == taken
    assert verdict.finding("weights").status == ("held" if taken else "failed")
