"""The contract of guides: flows keep their options, guides are made anew from plain data."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyroflows as pf
from pyroflows import _spec
from pyroflows.distributions import StudentTBase
from pyroflows.guides import Guide, WhitenedFlow, from_spec
from pyroflows.model import LogDensity
from pyroflows.posterior.climb import make_narrow_flow
from pyroflows.posterior.ladder import make_wide_flow

FEATURES = 3


def model() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(FEATURES), 1.0).to_event(1))


def built(flow: Callable[[int], Any] | None = None) -> tuple[pf.AutoFlow, LogDensity]:
    density = LogDensity(model)
    guide = pf.AutoFlow(density.model, flow=flow)
    density.introduce(guide)
    return guide, density


def perturbed(guide: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter))
    return guide


def base() -> Any:
    return dist.StudentT(torch.full((FEATURES,), 5.0), 0.0, 2.0).to_event(1)


PUBLIC = {name: getattr(pf, name) for name in pf.__all__}
FLOWS: dict[str, Callable[[int], Any]] = {
    name: flow
    for name, flow in PUBLIC.items()
    if name != "Glow" and isinstance(flow, type) and issubclass(flow, pf.flows.LayeredFlow)
}
OPTIONS: dict[str, Callable[[int], Any]] = {
    "reversible": lambda n: pf.RealNVP(n, reversible=True),
    "standardize": lambda n: pf.RealNVP(n, standardize=True),
    "base": lambda n: pf.RealNVP(n, base=base()),
    "learned base": lambda n: pf.NICE(n, base=StudentTBase(n)),
    "tails": lambda n: pf.RealNVP(n, tails="student"),
    "other tails": lambda n: pf.MAF(n, tails="gpd"),
    "name": lambda n: pf.RealNVP(n, name="mine"),
    "mixing": lambda n: pf.RealNVP(n, mixing="householder"),
    "mask": lambda n: pf.NICE(n, mask="half"),
    "mask by a tensor": lambda n: pf.NICE(n, mask=torch.tensor([True, False, True])),
    "network": lambda n: pf.NICE(n, network=pf.nn.mlp(activation=nn.Tanh)),
    "stack": lambda n: pf.Flow([pf.transforms.Permute(n), pf.transforms.LULinear(n).inv]),
    "iterator": lambda n: pf.Flow(pf.transforms.AffineCoupling(n) for _ in range(2)),
    "transform": lambda n: pf.transforms.Elementwise(pf.univariate.RationalQuadraticSpline(5), n),
    "nested": lambda n: pf.transforms.Compose(
        [pf.transforms.Permute(n), pf.transforms.Compose([pf.transforms.AffineCoupling(n)])]
    ),
    "of the ladder": make_narrow_flow,
    "wide, of the ladder": make_wide_flow,
}
MADE = {**FLOWS, **OPTIONS}


def test_a_made_flow_keeps_its_options() -> None:
    guide, _ = built(OPTIONS["reversible"])
    assert guide.flow.body.reversible
    guide, _ = built(OPTIONS["standardize"])
    body: Any = guide.flow.body
    assert isinstance(body.layers[-1], pf.transforms.Standardize)
    guide, _ = built(OPTIONS["base"])
    assert isinstance(guide.flow.base.base_dist, dist.StudentT)  # type: ignore[attr-defined]
    assert guide.flow.given_base is not None
    guide, _ = built(OPTIONS["learned base"])
    assert isinstance(guide.flow.learned_base, StudentTBase)
    guide, _ = built(OPTIONS["tails"])
    assert isinstance(guide.flow.learned_base, StudentTBase)
    assert WhitenedFlow(pf.RealNVP(2, name="mine"))._pyro_name == "mine"
    assert built()[0].flow.given_base is None


@pytest.mark.parametrize("name", MADE)
def test_a_whitened_flow_is_its_flow_and_an_affine_map(name: str, device: torch.device) -> None:
    flow = MADE[name](FEATURES)
    loc, root = torch.arange(3.0, device=device), 2 * torch.eye(3, device=device)
    whitened = WhitenedFlow(flow).to(device)
    whitened.whiten(loc, root)
    made = flow if isinstance(flow, pf.Flow) else pf.Flow([flow])
    x = made().sample((5,)).to(device)
    expected = made.to(device)().log_prob(x) - torch.tensor(8.0).log()
    torch.testing.assert_close(whitened().log_prob(loc + 2 * x), expected, rtol=1e-3, atol=1e-3)
    assert whitened.whitening.loc.tolist() == loc.tolist()


@pytest.mark.parametrize("name", MADE)
def test_made_anew_from_a_spec(name: str) -> None:
    """In a file of plain data, with parameters that have moved."""
    guide, density = built(MADE[name])
    perturbed(guide)
    file = io.BytesIO()
    torch.save({"spec": guide.spec(), "state": guide.state_dict()}, file)
    file.seek(0)
    data = torch.load(file, weights_only=True)
    again = from_spec(data["spec"], density)
    again.load_state_dict(data["state"])
    assert repr(again.flow) == repr(guide.flow)  # type: ignore[attr-defined]
    z = torch.randn(4, FEATURES)
    try:
        expected = guide.log_prob(z)
    except RuntimeError:  # a flow that cannot score what it has not drawn
        assert again.state_dict().keys() == guide.state_dict().keys()
        return
    torch.testing.assert_close(again.log_prob(z), expected)


def test_a_mixture_is_made_anew() -> None:
    density = LogDensity(model)
    guide = perturbed_mixture(density)
    again = from_spec(guide.spec(), density)
    again.load_state_dict(guide.state_dict())
    z = torch.randn(4, FEATURES)
    torch.testing.assert_close(again.log_prob(z), guide.log_prob(z))
    for k, space in enumerate(again.base_spaces()):
        share = guide.get_posterior().component_log_probs(z)[:, k] - guide.log_prob(z)
        assert space.log_share is not None
        torch.testing.assert_close(space.log_share(z), share)
    assert k == 1


def perturbed_mixture(density: LogDensity) -> pf.guides.AutoMixture:
    guide = pf.guides.AutoMixture(density.model, 2, flow=pf.NICE)
    density.introduce(guide)
    return perturbed(guide)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_keeps_its_description(how: str) -> None:
    flow = pf.RealNVP(2, mixing=lambda n: pf.transforms.Reverse(n))
    kept = copy.deepcopy(flow) if how == "deepcopy" else pickle.loads(pickle.dumps(flow))
    assert _spec.describe(kept) == _spec.describe(flow)


def test_a_callable_of_the_users_own_is_asked_for() -> None:
    guide, density = built(lambda n: pf.RealNVP(n, mixing=lambda n: pf.transforms.Reverse(n)))
    with pytest.raises(
        ValueError, match=r"cannot hold '.*<lambda>', which is the user's own; .* Pass guide="
    ):
        from_spec(guide.spec(), density)

    class Mine(pf.AutoFlow):
        pass

    mine = Mine(model)
    density.introduce(mine)
    with pytest.raises(ValueError, match=r"cannot hold '.*Mine'"):
        from_spec(mine.spec(), density)


def test_a_spec_before_the_first_call() -> None:
    with pytest.raises(RuntimeError, match="call guide"):
        pf.AutoFlow(model).spec()


@pytest.mark.parametrize(
    "name",
    [
        *("os:system", "torch:load", "torch:_from_blob", "torch.hub:load", "builtins:eval"),
        *("pyroflows._files:os.remove", "pyroflows.nothing:X", "pyroflows.flows:Nothing"),
        "torch.nn.functional:importlib.import_module",
    ],
)
def test_a_file_names_nothing_but_parts_of_flows(name: str) -> None:
    for data in ({"name": name}, {"call": name, "kwargs": {}}, {"object": name, "state": {}}):
        with pytest.raises(
            ValueError, match="Expected a class or function of which guides are made"
        ):
            _spec.build(data)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 2, 0.5, "x", (1, [2, "y"]), {"a": (1,), 2: None}, torch.Size([2, 3])),
        *(nn.SiLU, torch.tanh, nn.functional.relu, functools.partial(nn.LeakyReLU, 0.2).func),
        pf.RealNVP,
    ],
)
def test_plain_values_come_back(value: Any) -> None:
    assert _spec.build(_spec.describe(value)) == value


def test_distributions_and_constraints_come_back() -> None:
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.ones(2), 1.0)
    )
    normal = dist.MultivariateNormal(torch.ones(2), torch.eye(2))
    moved = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform()])
    for one in (mixture, normal, moved, base()):
        other = _spec.build(_spec.describe(one))
        value = one.sample()
        torch.testing.assert_close(other.log_prob(value), one.log_prob(value))
    interval = _spec.build(_spec.describe(dist.constraints.interval(0.0, 2.0)))
    assert interval.check(torch.tensor([1.0, 3.0])).tolist() == [True, False]


def test_partials_come_back() -> None:
    made = _spec.build(_spec.describe(functools.partial(nn.LeakyReLU, negative_slope=0.2)))
    assert made().negative_slope == 0.2


# A guide with rows and two parts, as an amortised or structured one may be.


class Blocks(Guide):
    """A global entry, and an entry for each row given it."""

    features = 4

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        draws, total = torch.zeros(n, 0), torch.zeros(n)
        for part in self.parts(rows):
            block, log_q = part.sample_and_log_prob(n, draws)
            draws, total = torch.cat([draws, block], -1), total + log_q
        return draws, total

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        return sum((part.log_prob(z) for part in self.parts(rows)), torch.zeros(len(z)))

    def parts(self, rows: Tensor | None = None) -> Any:
        rows = torch.arange(3) if rows is None else rows
        one = dist.Normal(0.0, 1.0)

        def draw_globals(n: int, before: Tensor) -> tuple[Tensor, Tensor]:
            x = one.sample((n, 1))
            return x, one.log_prob(x).sum(-1)

        def draw_rows(n: int, before: Tensor) -> tuple[Tensor, Tensor]:
            local = dist.Normal(before[:, :1].expand(-1, len(rows)), 0.5).to_event(1)
            x = local.sample()
            return x, local.log_prob(x)

        def score_rows(z: Tensor) -> Tensor:
            return dist.Normal(z[:, :1], 0.5).log_prob(z[:, 1:]).sum(-1)

        return (
            pf.guides.Part(torch.arange(1), None, draw_globals, lambda z: one.log_prob(z[:, 0])),
            pf.guides.Part(1 + rows, rows, draw_rows, score_rows),
        )


def test_a_guide_with_blocks_of_rows_fits_in() -> None:
    guide = Blocks()
    z, log_q = guide.sample_and_log_prob(5, torch.tensor([0, 2]))
    assert z.shape == (5, 3)
    torch.testing.assert_close(guide.log_prob(z), log_q)
    assert guide.parts(torch.tensor([0, 2]))[1].entries.tolist() == [1, 3]


def test_the_path_gradient_leaves_out_the_densitys_own_parameters() -> None:
    """At the exact posterior it vanishes, draw by draw."""
    guide, density = built(pf.NICE)
    guide.whiten(torch.zeros(FEATURES), torch.eye(FEATURES))
    assert guide.has_path_gradient
    z, log_q = guide.sample_with_path_gradient(7)
    torch.testing.assert_close(log_q, guide.log_prob(z.detach()))
    _, slope = density.value_and_grad(z.detach())
    loss = log_q.sum() - (slope * z).sum()
    gradients = torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True)
    assert all(g is None or float(g.abs().max()) < 1e-5 for g in gradients)
    with pytest.raises(NotImplementedError, match="AutoMixture has no path gradient"):
        perturbed_mixture(density).sample_with_path_gradient(1)
