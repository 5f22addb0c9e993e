"""Guides of Pyro as guides of this library: their density is that of Pyro's own trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import Planar, affine_autoregressive
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.guides import Guide, as_guide, from_spec
from pyroflows.model import LogDensity
from pyroflows.sampling import polish

Model = Callable[..., Any]
SITES = ["rate", "shares", "theta"]


def model(y: Tensor) -> None:
    """A positive number, a point of the simplex, and a vector in a plate."""
    rate = pyro.sample("rate", dist.Gamma(y.new_tensor(2.0), 1.0))
    shares = pyro.sample("shares", dist.Dirichlet(y.new_ones(3)))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(shares[0] * y.new_ones(()), 1.0))
        pyro.sample("y", dist.Normal(theta * rate, 0.5), obs=y)


def data(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([0.3, -0.2, 1.0], dtype=dtype, device=device)


def parts_of(*kinds: tuple[Any, list[str]]) -> Callable[[Model], Any]:
    """A list of guides of some sites each."""

    def make(model: Model) -> Any:
        guide = autoguide.AutoGuideList(model)
        for kind, names in kinds:
            guide.append(kind(poutine.block(model, expose=names)))
        return guide

    return make


def function(y: Tensor) -> None:
    """Sites in an order of its own, one given another, with parameters in the store."""
    new = functools.partial(torch.tensor, dtype=y.dtype, device=y.device)
    loc = pyro.param("loc", new([0.1, -0.4, 0.9]))
    scale = pyro.param("scale", new(0.4), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(loc, scale))
    pyro.sample("shares", dist.Dirichlet(torch.exp(theta).add(1.0)))
    pyro.sample("rate", dist.LogNormal(theta.mean(), pyro.param("width", new(0.3))))


def branching(y: Tensor) -> None:
    """A guide that no batch can run."""
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(y, 1.0))
    width = 0.5 if float(theta.sum()) > 0 else 1.5
    pyro.sample("rate", dist.LogNormal(theta.new_zeros(()), width))
    pyro.sample("shares", dist.Dirichlet(theta.new_ones(3)))


class Amortised(PyroModule):
    """A module whose network reads the data."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = PyroModule[nn.Linear](1, 2).double()
        self.width = PyroParam(torch.tensor(0.3).double(), constraints.positive)

    def forward(self, y: Tensor) -> None:
        loc, log_scale = self.network(y.unsqueeze(-1)).unbind(-1)
        pyro.sample("shares", dist.Dirichlet(y.new_ones(3) + self.width))
        pyro.sample("rate", dist.LogNormal(y.mean(), self.width))
        with pyro.plate("rows", len(y)):
            pyro.sample("theta", dist.Normal(loc, log_scale.exp()))


def iaf(model: Model) -> Any:
    return autoguide.AutoNormalizingFlow(model, lambda n: affine_autoregressive(n, hidden_dims=[8]))


def ours(model: Model) -> Any:
    def stack(n: int) -> Any:
        layers = [pf.transforms.AffineCoupling(n), pf.transforms.Reverse(n)]
        return pf.transforms.Compose(layers).double()

    return autoguide.AutoNormalizingFlow(model, stack)


NORMALS: dict[str, Callable[[Model], Any]] = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": functools.partial(
        autoguide.AutoLowRankMultivariateNormal, rank=2
    ),
}
AUTO: dict[str, Callable[[Model], Any]] = {
    **NORMALS,
    "AutoNormalizingFlow": iaf,
    "AutoNormalizingFlow of ours": ours,
    "AutoFlow": functools.partial(pf.AutoFlow, flow=functools.partial(pf.NICE, transforms=2)),
    "list": parts_of(
        (autoguide.AutoMultivariateNormal, ["theta"]), (autoguide.AutoNormal, ["rate", "shares"])
    ),
    "list with a flow": parts_of((autoguide.AutoNormal, ["theta"]), (iaf, ["rate", "shares"])),
}
MESSENGERS: dict[str, Callable[[Model], Any]] = {
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
    "AutoHierarchicalNormalMessenger": autoguide.AutoHierarchicalNormalMessenger,
}
WRITTEN: dict[str, Callable[[Model], Any]] = {
    "function": lambda model: function,
    "branching": lambda model: branching,
    "module": Amortised,
    "list with a function": parts_of(
        (autoguide.AutoNormal, ["rate"]),
        (lambda model: poutine.block(function, expose=["theta", "shares", "loc", "scale"]), []),
    ),
}
KINDS = {**AUTO, **MESSENGERS, **WRITTEN}
#: Pyro inverts its autoregressive transform in the default dtype only.
DTYPES = {"AutoNormalizingFlow": torch.float32, "list with a flow": torch.float32}


@functools.cache
def density_of(dtype: torch.dtype, device: str) -> LogDensity:
    return LogDensity(model, (data(device, dtype),))


def made(name: str, device: torch.device | str = "cpu", steps: int = 6) -> tuple[Any, LogDensity]:
    """A guide after some steps of SVI."""
    y = data(device, DTYPES.get(name, torch.float64))
    guide = KINDS[name](model)
    if isinstance(guide, nn.Module):
        guide.to(device)
    density = density_of(y.dtype, str(y.device))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02 if steps > 6 else 0.06}), Trace_ELBO())
    for _ in range(steps if name != "branching" else 0):
        svi.step(y)
    return guide, density


def near(z: Tensor) -> dict[str, float]:
    tolerance = 1e-7 if z.dtype == torch.float64 else 1e-4
    return {"rtol": tolerance, "atol": tolerance}


def log_jacobian(density: LogDensity, z: Tensor) -> Tensor:
    """Of the map to the sites, by autograd; the simplex without its last entry."""

    def flat(z: Tensor) -> Tensor:
        values = density.constrain(z)
        values["shares"] = values["shares"][..., :-1]
        return torch.cat([value.reshape(-1) for value in values.values()])

    return torch.autograd.functional.jacobian(flat, z).slogdet()[1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", KINDS)
def test_the_density_is_that_of_pyros_trace(name: str, device: torch.device) -> None:
    guide, density = made(name, device)
    adapted = as_guide(guide, density)
    assert adapted.features == density.features
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(*density.args)
        z = density.unconstrain({site: trace.nodes[site]["value"].detach() for site in SITES})
        expected = trace.log_prob_sum().detach() + log_jacobian(density, z)
        found = adapted.log_prob(z.unsqueeze(0)).detach()
        torch.testing.assert_close(found, expected.unsqueeze(0), **near(z))


@pytest.mark.parametrize("name", KINDS)
def test_draws_come_with_their_density(name: str, device: torch.device) -> None:
    guide, density = made(name, device)
    adapted = as_guide(guide, density)
    with torch.no_grad():
        z, log_q = adapted.sample_and_log_prob(20)
        assert z.shape == (20, density.features) and log_q.shape == (20,)
        assert z.dtype == log_q.dtype == density.initial.dtype
        assert z.device.type == log_q.device.type == device.type
        torch.testing.assert_close(adapted.log_prob(z.clone()), log_q, **near(z))
        assert len(z.unique(dim=0)) == 20
    again = as_guide(guide, density)
    torch.testing.assert_close(again.log_prob(z), log_q, **near(z))


@pytest.mark.parametrize(
    "name",
    slow_but_for(["function"], [name for name in KINDS if name != "branching"]),
)
def test_the_draws_are_those_of_the_guide(name: str) -> None:
    guide, density = made(name, steps=30)
    with torch.no_grad():
        z, _ = as_guide(guide, density).sample_and_log_prob(2000)
        traces = [poutine.trace(guide).get_trace(*density.args) for _ in range(400)]
    values = {site: torch.stack([t.nodes[site]["value"] for t in traces]) for site in SITES}
    other = density.unconstrain(values).detach()
    error = (z.var(0) / len(z) + other.var(0) / len(other)).sqrt()
    assert float(((z.mean(0) - other.mean(0)) / error).abs().max()) < 4.5
    assert float((z.std(0) / other.std(0)).log().abs().max()) < 0.25


@pytest.mark.parametrize("name", NORMALS)
def test_normals_in_closed_form(name: str, device: torch.device) -> None:
    guide, density = made(name, device)
    adapted = as_guide(guide, density)
    quantiles = guide.quantiles([0.5, 0.8413447460685429])
    middle, upper = (
        density.unconstrain({site: quantiles[site][k].detach() for site in SITES}) for k in (0, 1)
    )
    (space,) = adapted.base_spaces()
    x = torch.randn(7, density.features, dtype=torch.float64, device=device)
    with torch.no_grad():
        z, log_det = space.transform.forward_and_log_det(x)
        back, log_det_back = space.transform.inverse_and_log_det(z)
        root = space.transform.forward_and_log_det(torch.eye(density.features).to(x))[0] - middle
        exact = dist.MultivariateNormal(middle, root.T @ root)
        torch.testing.assert_close(adapted.log_prob(z), exact.log_prob(z))
        torch.testing.assert_close(adapted.log_prob(z), space.base.log_prob(x) - log_det)
    torch.testing.assert_close(root.square().sum(0).sqrt(), upper - middle, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_det_back, -log_det)


@pytest.mark.parametrize("name", KINDS)
def test_the_base_space_gives_the_density(name: str) -> None:
    guide, density = made(name)
    adapted = as_guide(guide, density)
    spaces = adapted.base_spaces()
    has_none = name in {*MESSENGERS, *WRITTEN}
    assert len(spaces) == (0 if has_none else 1)
    with torch.no_grad():
        for space in spaces:
            x = space.base.sample((9,))
            z, log_det = space.transform.forward_and_log_det(x)
            expected = space.base.log_prob(x) - log_det
            torch.testing.assert_close(adapted.log_prob(z), expected, **near(z))
            back, log_det_back = space.transform.inverse_and_log_det(z)
            torch.testing.assert_close(back, x, **near(z))
            torch.testing.assert_close(log_det_back, -log_det, **near(z))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["list", "function"])
def test_draws_are_polished(name: str) -> None:
    """From an untrained guide to the posterior, which further trajectories leave as it is."""
    guide, density = made(name, steps=0)
    adapted = as_guide(guide, density)
    with torch.no_grad():
        z, _ = adapted.sample_and_log_prob(1000)
    moved = polish(density, adapted, z, 60)
    other = polish(density, as_guide(*made("AutoMultivariateNormal", steps=300)), moved, 20)
    # Two means of a thousand draws each differ by .045 standard deviations or so.
    assert float(((moved.mean(0) - other.mean(0)) / other.std(0)).abs().max()) < 0.18


def test_later_training_is_seen() -> None:
    guide, density = made("AutoMultivariateNormal", steps=1)
    adapted, z = as_guide(guide, density), torch.zeros(1, density.features, dtype=torch.float64)
    before = adapted.log_prob(z)
    with torch.no_grad():
        guide.loc.add_(1.0)
    assert not torch.equal(adapted.log_prob(z), before)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "branching"])
def test_gradients_reach_the_parameters(name: str) -> None:
    guide, density = made(name)
    adapted = as_guide(guide, density)
    z = torch.zeros(2, density.features).to(density.initial)
    total = adapted.log_prob(z).sum()
    found = [value.unconstrained() for value in pyro.get_param_store().values()]
    gradients = torch.autograd.grad(total, found, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in gradients)


#: Pyro itself restores no parameters of modules that are not its own; AutoFlow see test_auto_flow.
NOT_RESTORED = [
    *("AutoNormalizingFlow", "AutoNormalizingFlow of ours", "list with a flow", "module"),
    *("AutoFlow", "branching"),
]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in NOT_RESTORED])
def test_restored_from_the_param_store(name: str) -> None:
    guide, density = made(name)
    z = torch.zeros(2, density.features).to(density.initial)
    expected = as_guide(guide, density).log_prob(z)
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    fresh = as_guide(KINDS[name](model), density)
    torch.testing.assert_close(fresh.log_prob(z), expected)


@pytest.mark.parametrize("name", KINDS)
def test_state_dict(name: str) -> None:
    guide, density = made(name)
    z = torch.zeros(2, density.features).to(density.initial)
    adapted = as_guide(guide, density)
    expected = adapted.log_prob(z).detach()
    state = {key: value for key, value in adapted.state_dict().items()}
    state = torch.utils._pytree.tree_map(lambda t: t.clone() if torch.is_tensor(t) else t, state)
    pyro.clear_param_store()
    fresh = as_guide(KINDS[name](model), density)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.log_prob(z).detach(), expected)


OWN = [
    "AutoNormalizingFlow",
    "AutoNormalizingFlow of ours",
    "list with a flow",
    *MESSENGERS,
    *WRITTEN,
]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in OWN])
def test_made_anew_from_a_spec(name: str) -> None:
    guide, density = made(name)
    adapted, z = as_guide(guide, density), torch.zeros(2, density.features, dtype=torch.float64)
    again = from_spec(adapted.spec(), density)
    again.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(again.log_prob(z), adapted.log_prob(z))


@pytest.mark.parametrize("name", OWN)
def test_a_guide_of_the_users_own_is_asked_for(name: str) -> None:
    guide, density = made(name, steps=1)
    with pytest.raises(ValueError, match=r"because .* cannot hold '.*', which is the user's own"):
        from_spec(as_guide(guide, density).spec(), density)


def test_an_iaf_of_pyro_is_made_anew() -> None:
    def line() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    density = LogDensity(line)
    guide = as_guide(autoguide.AutoIAFNormal(line, hidden_dim=[7], num_transforms=2), density)
    again = from_spec(guide.spec(), density)
    again.load_state_dict(guide.state_dict())
    z = torch.randn(4, 3)
    torch.testing.assert_close(again.log_prob(z), guide.log_prob(z))


def test_a_laplace_approximation_is_a_normal() -> None:
    guide, density = autoguide.AutoLaplaceApproximation(model), LogDensity(model, (data(),))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step(data())
    normal = guide.laplace_approximation(data())
    z = torch.zeros(2, density.features).to(density.initial)
    expected = normal.get_posterior().log_prob(z)
    torch.testing.assert_close(as_guide(normal, density).log_prob(z), expected)


def test_a_guide_of_the_library_stays_as_it_is() -> None:
    density = LogDensity(model, (data(),))
    for guide in (pf.AutoFlow(density.model), pf.guides.AutoMixture(density.model, 2)):
        assert as_guide(guide, density) is guide
        assert guide.features == density.features


def test_nothing_is_put_into_a_trace() -> None:
    guide, density = made("function", steps=0)
    with poutine.trace() as handler:
        as_guide(guide, density).sample_and_log_prob(3)
    assert not handler.trace.nodes


def test_random_numbers_are_left_alone() -> None:
    guide, density = made("module")
    state = torch.get_rng_state()
    as_guide(guide, density)
    after = torch.get_rng_state()
    as_guide(guide, density).sample_and_log_prob(3)
    assert torch.equal(after, state) and not torch.equal(torch.get_rng_state(), state)


# Refusals


def theta(y: Tensor, name: str = "theta", **options: Any) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample(name, dist.Normal(y, 1.0), **options)


def without(y: Tensor) -> None:
    theta(y)
    pyro.sample("rate", dist.LogNormal(y.mean(), 1.0))


def extra(y: Tensor) -> None:
    branching(y)
    pyro.sample("more", dist.Normal(y.mean(), 1.0))


def auxiliary(y: Tensor) -> None:
    branching(y)
    pyro.sample("helper", dist.Normal(y.mean(), 1.0), infer={"is_auxiliary": True})


def other_shape(y: Tensor) -> None:
    pyro.sample("theta", dist.Normal(y.mean(), 1.0))


def other_support(y: Tensor) -> None:
    pyro.sample("rate", dist.Normal(y.mean(), 1.0))


def point(y: Tensor) -> None:
    pyro.sample("rate", dist.Delta(y.mean().exp()))


def planar(model: Model) -> Any:
    return autoguide.AutoNormalizingFlow(model, lambda n: Planar(n).double())


REFUSED: dict[str, tuple[Callable[[Model], Any], type[Exception], str]] = {
    "AutoDelta": (
        autoguide.AutoDelta,
        TypeError,
        "got AutoDelta, which puts all mass on one point",
    ),
    "AutoDelta in a list": (
        parts_of((autoguide.AutoDelta, ["rate"]), (autoguide.AutoNormal, ["theta", "shares"])),
        TypeError,
        "got AutoDelta, which puts all mass on one point",
    ),
    "AutoLaplaceApproximation": (
        autoguide.AutoLaplaceApproximation,
        TypeError,
        r"pass guide.laplace_approximation\(\*args\)",
    ),
    "AutoStructured": (autoguide.AutoStructured, TypeError, "use AutoMultivariateNormal"),
    "AutoGaussian": (autoguide.AutoGaussian, TypeError, "use AutoMultivariateNormal"),
    "planar": (planar, ValueError, "whose transform has no inverse here"),
    "class": (lambda model: autoguide.AutoNormal, TypeError, r"such as AutoNormal\(model\)"),
    "number": (lambda model: 3, TypeError, "which takes the arguments of the model; got int"),
    "missing": (lambda model: without, ValueError, "got one without 'shares'"),
    "extra": (lambda model: extra, ValueError, "got one with 'more' too"),
    "auxiliary": (lambda model: auxiliary, ValueError, "without auxiliary sites; got 'helper'"),
    "shape": (lambda model: other_shape, ValueError, r"'theta' of shape \(3,\), .*; got \(\)"),
    "support": (
        lambda model: other_support,
        ValueError,
        "'rate' on the support that it has in the model; got Real",
    ),
    "point": (lambda model: point, TypeError, "got site 'rate' with a Delta"),
    "another model": (
        lambda model: autoguide.AutoNormal(lambda y: theta(y, "other")),
        ValueError,
        "got one with 'other' too",
    ),
    "AutoFlow of another model": (
        lambda model: pf.AutoFlow(lambda y: theta(y, "other")),
        ValueError,
        "got one with 'other' too",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as raised:
        as_guide(make(model), density_of(torch.float64, "cpu"))
    assert "\n" not in str(raised.value)


def test_discrete_sites_are_left_out() -> None:
    def mixture() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(x + k, 1.0), obs=torch.tensor(1.0))

    density = LogDensity(mixture)
    of_x = poutine.block(mixture, expose=["x"])
    assert as_guide(autoguide.AutoNormal(of_x), density).features == 1
    guide = autoguide.AutoGuideList(mixture)
    guide.append(autoguide.AutoNormal(of_x))
    guide.append(autoguide.AutoDiscreteParallel(poutine.block(mixture, expose=["k"])))
    with pytest.raises(TypeError, match="leave it out, because they are summed out"):
        as_guide(guide, density)


def test_a_guide_is_asked_by_its_methods_alone() -> None:
    class Fixed(Guide):
        features = 6

    guide = Fixed()
    assert as_guide(guide, LogDensity(model, (data(),))) is guide
    assert not guide.base_spaces() and not guide.has_path_gradient and not guide.state_dict()
    (part,) = guide.parts()
    assert part.entries.tolist() == [0, 1, 2, 3, 4, 5] and part.rows is None
    for call in (lambda: guide.log_prob(torch.zeros(1, 6)), lambda: guide.sample_and_log_prob(1)):
        with pytest.raises(NotImplementedError, match="Fixed does not define"):
            call()
