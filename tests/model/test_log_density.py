"""LogDensity against Pyro's own potential energy, densities derived by hand, autograd and quadrature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.distributions import constraints
from pyro.infer.autoguide import init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor
from torch.distributions import biject_to

import pyroflows as pf
from pyroflows.model import LogDensity

Model = Callable[..., Any]
CASES: dict[str, Callable[[], Model]] = {}


def case(make: Callable[[], Model]) -> Callable[[], Model]:
    CASES[make.__name__] = make
    return make


def data(*shape: int) -> Tensor:
    """Numbers of order one."""
    return 1.3 * torch.sin(1.7 * torch.arange(math.prod(shape)) + 1).reshape(shape)


@case
def normal() -> Model:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(1.0, 2.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=torch.tensor(0.3))

    return model


@case
def nested_plates() -> Model:
    y = data(3, 2)

    def model() -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, scale))
        with columns:
            b = pyro.sample("b", dist.Gamma(2.0, 1.0))
        with rows, columns:
            c = pyro.sample("c", dist.Normal(a, b))
            pyro.sample("y", dist.Normal(c, scale), obs=y)

    return model


@case
def sequential_plate() -> Model:
    y = data(3)

    def model() -> None:
        for i in pyro.plate("n", 3):
            x = pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(x, 1.0), obs=y[i])

    return model


@case
def improper() -> Model:
    def model() -> None:
        flat = pyro.sample("flat", dist.ImproperUniform(constraints.real, (), (2,)))
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("y", dist.Normal(flat, scale).to_event(1), obs=data(2))

    return model


@case
def simplex() -> Model:
    def model() -> None:
        with pyro.plate("n", 2):
            p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            pyro.sample("k", dist.Categorical(p), obs=torch.tensor([0, 2]))

    return model


@case
def ordered() -> Model:
    def model() -> None:
        cuts = pyro.sample("cuts", dist.ImproperUniform(constraints.ordered_vector, (), (3,)))
        pyro.sample("prior", dist.Normal(0.0, 2.0).expand([3]).to_event(1), obs=cuts)
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 4):
            below = torch.sigmoid(cuts - (slope * data(4)).unsqueeze(-1))
            edges = torch.nn.functional.pad(
                torch.nn.functional.pad(below, (1, 0)), (0, 1), value=1.0
            )
            pyro.sample("y", dist.Categorical(edges.diff(dim=-1)), obs=torch.tensor([0, 1, 3, 2]))

    return model


@case
def cholesky() -> Model:
    def model() -> None:
        scales = pyro.sample("scales", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
        root = pyro.sample("root", dist.LKJCholesky(3, 2.0))
        with pyro.plate("n", 4):
            law = dist.MultivariateNormal(torch.zeros(3), scale_tril=scales.unsqueeze(-1) * root)
            pyro.sample("y", law, obs=data(4, 3))

    return model


@case
def interval_and_half_line() -> Model:
    def model() -> None:
        u = pyro.sample("u", dist.Uniform(-1.0, 3.0))
        b = pyro.sample("b", dist.Beta(2.0, 0.5))
        h = pyro.sample("h", dist.HalfNormal(2.0))
        pyro.sample("t", dist.StudentT(3.0, u, h + b))

    return model


@case
def multivariate() -> Model:
    def model() -> None:
        covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
        x = pyro.sample("x", dist.MultivariateNormal(torch.ones(2), covariance))
        pyro.sample("y", dist.Normal(x[..., 0] * x[..., 1], 1.0), obs=torch.tensor(0.7))

    return model


@case
def masks() -> Model:
    mask = torch.tensor([True, False, True])

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(x, 1.0), obs=data(3))
            pyro.sample("w", dist.Normal(x, 2.0).mask(~mask), obs=data(3))

    return model


@case
def scales() -> Model:
    def model() -> None:
        with poutine.scale(scale=0.5):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3), poutine.scale(scale=7.0):
            pyro.sample("y", dist.Normal(x, 1.0), obs=data(3))

    return poutine.scale(model, scale=2.0)


@case
def factor() -> Model:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(x**4))

    return model


@case
def deterministic() -> Model:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        total = pyro.deterministic("total", x.sum(-1))
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(2.0))

    return model


@case
def partly_observed() -> Model:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample(
                "y", dist.Normal(mu, 1.0), obs=data(3), obs_mask=torch.tensor([True, False, True])
            )

    return model


@case
def conditioned() -> Model:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.Normal(b, 1.0))

    return poutine.condition(model, data={"b": torch.tensor(0.4)})


@case
def scoped() -> Model:
    return scope(normal(), prefix="part")


@case
def reparametrised() -> Model:
    return poutine.reparam(nested_plates(), config={"a": LocScaleReparam(0.3)})


@case
def parameters() -> Model:
    def model() -> None:
        width = pyro.param("width", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("x", dist.Normal(0.0, width))

    return model


@case
def module() -> Model:
    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PyroModule[torch.nn.Linear](2, 1)
            self.layer.bias.data.fill_(0.1)
            self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
            self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)
            self.shift = PyroSample(dist.LogNormal(0.0, 1.0))

        def forward(self) -> None:
            mean = self.layer(data(4, 2)).squeeze(-1) + self.shift
            with pyro.plate("n", 4):
                pyro.sample("y", dist.Normal(mean, self.noise), obs=data(4))

    return Regression()


@case
def flow_prior_and_likelihood() -> Model:
    prior = pf.RealNVP(2, transforms=2, support=constraints.positive, name="prior")
    likelihood = pf.RealNVP(2, context_features=2, transforms=2, name="likelihood")
    for parameter in [*prior.parameters(), *likelihood.parameters()]:
        parameter.data.copy_(0.2 * data(*parameter.shape))

    def model() -> None:
        x = pyro.sample("x", prior())
        with pyro.plate("n", 3):
            pyro.sample("y", likelihood(x), obs=data(3, 2))

    return model


@case
def time_series() -> Model:
    def model() -> None:
        level = pyro.sample("level_0", dist.Normal(0.0, 1.0))
        for t in pyro.markov(range(1, 4)):
            level = pyro.sample(f"level_{t}", dist.Normal(0.9 * level, 1.0))
            pyro.sample(f"y_{t}", dist.Poisson(level.exp()), obs=torch.tensor(float(t)))

    return model


@case
def mixture() -> Model:
    def model() -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("n", 4):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(locs[k], 1.0), obs=data(4))

    return model


every_case = pytest.mark.parametrize("name", sorted(CASES))


@pytest.fixture
def float64() -> None:
    torch.set_default_dtype(torch.float64)


@cache
def double(name: str) -> LogDensity:
    """The log density of a case in double precision, made without a warning."""
    assert torch.get_default_dtype() == torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return LogDensity(CASES[name]())


def points(density: LogDensity, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(n, density.features, generator=generator, dtype=torch.float64)
    return density.initial + noise.to(density.initial.dtype)


def in_mode(density: LogDensity, mode: str) -> LogDensity:
    """The same density, evaluated in another way."""
    other = density.bind()
    other._program = other._evaluator.make_program(other.inputs, other.batch_size, mode)
    return other


def pyros_log_density(model: Model, density: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    """The log density and its gradient by the potential energy that Pyro's HMC uses."""
    start = init_to_value(values=density.constrain(density.initial))
    potential = initialize_model(model, init_strategy=start, max_plate_nesting=2)[1]
    values, grads = [], []
    for row in z:
        row = row.clone().requires_grad_()
        parts = row.split([site.features for site in density.sites])
        unpacked = {
            site.name: site.unpack(part) for site, part in zip(density.sites, parts, strict=True)
        }
        value = -potential(unpacked)
        grads.append(torch.autograd.grad(value, row)[0])
        values.append(value.detach())
    return torch.stack(values), torch.stack(grads)


# Values and gradients


#: Each way in which dtypes can mix: networks, factorisations, scales, and data.
MIXED = ["cholesky", "masks", "mixture", "module", "partly_observed", "scales", "simplex"]
#: Those, and each way in which sites can stand to one another.
SOME = [*MIXED, "conditioned", "factor", "improper", "nested_plates", "ordered", "sequential_plate"]


@pytest.mark.parametrize("name", slow_but_for(SOME, CASES))
@pytest.mark.usefixtures("float64")
def test_agrees_with_the_potential_energy_of_pyro(name: str) -> None:
    density = double(name)
    z = points(density)
    values, grads = pyros_log_density(density.model, density, z)
    value, grad = density.value_and_grad(z)
    torch.testing.assert_close(value, values)
    torch.testing.assert_close(grad, grads)
    torch.testing.assert_close(density.log_prob(z), values)
    # A sequential plate reads its indices, which a graph cannot.
    assert density.mode == "captured"
    assert density.batched


@every_case
@pytest.mark.usefixtures("float64")
def test_captured_vmap_and_loop_are_the_same_function(name: str) -> None:
    density = double(name)
    z = points(density)
    value, grad = density.value_and_grad(z)
    for mode in ("loop", "vmap"):
        other_value, other_grad = in_mode(density, mode).value_and_grad(z)
        torch.testing.assert_close(other_value, value)
        torch.testing.assert_close(other_grad, grad)


@pytest.mark.parametrize("name", slow_but_for(MIXED, CASES))
def test_single_precision_agrees_with_double(name: str) -> None:
    single = LogDensity(CASES[name]())
    z = points(single)
    value, grad = single.value_and_grad(z)
    assert value.dtype == grad.dtype == torch.float32
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float64)
    expected_value, expected_grad = double(name).value_and_grad(z.double())
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        grad.double(), expected_grad, rtol=1e-3, atol=1e-3 * float(1 + expected_grad.abs().max())
    )


def test_double_data_under_a_single_default_keeps_the_precision_of_the_data() -> None:
    y = data(5).double() + 1e3

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1e3))
        with pyro.plate("n", 5):
            pyro.sample("y", dist.Normal(x, 1e-2), obs=y)

    density = LogDensity(model)
    assert density.initial.dtype == torch.float64
    z = y.mean().reshape(1)
    expected = (
        dist.Normal(z, 1e-2).log_prob(y).sum()
        + dist.Normal(torch.zeros_like(z), 1e3).log_prob(z).sum()
    )
    torch.testing.assert_close(density.log_prob(z), expected)


def test_double_data_with_single_priors_is_captured_too() -> None:
    y = data(50).double()

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("n", 50):
            pyro.sample("y", dist.Normal(mu, tau), obs=y)

    density = LogDensity(model)
    assert density.mode == "captured"
    z = points(density)
    value, grad = density.value_and_grad(z)
    values, grads = pyros_log_density(model, density, z)
    torch.testing.assert_close(value, values.to(value.dtype), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad, grads.to(grad.dtype), rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("law", "by_hand"),
    [
        (
            lambda: dist.Normal(1.0, 2.0),
            lambda z: -0.5 * ((z - 1) / 2) ** 2 - math.log(2 * math.sqrt(2 * math.pi)),
        ),
        (
            lambda: dist.LogNormal(0.5, 2.0),
            lambda z: -0.5 * ((z - 0.5) / 2) ** 2 - math.log(2 * math.sqrt(2 * math.pi)),
        ),
        (
            lambda: dist.HalfCauchy(5.0),
            lambda z: math.log(2 / (5 * math.pi)) - (1 + (z.exp() / 5) ** 2).log() + z,
        ),
        (lambda: dist.Exponential(3.0), lambda z: math.log(3.0) - 3 * z.exp() + z),
        (
            lambda: dist.Uniform(-1.0, 3.0),
            lambda z: -torch.nn.functional.softplus(z) - torch.nn.functional.softplus(-z),
        ),
        (
            lambda: dist.Beta(2.0, 3.0),
            lambda z: (
                math.log(12.0)
                - 2 * torch.nn.functional.softplus(-z)
                - 3 * torch.nn.functional.softplus(z)
            ),
        ),
    ],
    ids=["normal", "lognormal", "halfcauchy", "exponential", "uniform", "beta"],
)
def test_the_density_of_one_site_by_hand(
    law: Callable[[], Any], by_hand: Callable[[Tensor], Tensor]
) -> None:
    density = LogDensity(lambda: pyro.sample("x", law()))
    z = torch.linspace(-6, 6, 41)
    torch.testing.assert_close(density.log_prob(z.unsqueeze(-1)), by_hand(z))


@pytest.mark.usefixtures("float64")
def test_plates_mask_and_scale_by_hand() -> None:
    y, mask = data(4), torch.tensor([True, True, False, True])

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 4), poutine.scale(scale=3.0), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(x, 2.0), obs=y)

    z = torch.linspace(-2, 2, 5)
    log_likelihood = dist.Normal(z, 2.0).log_prob(y[mask].unsqueeze(-1)).sum(0)
    expected = dist.Normal(0.0, 1.0).log_prob(z) + 3 * log_likelihood
    torch.testing.assert_close(LogDensity(model).log_prob(z.unsqueeze(-1)), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "law",
    [
        lambda: dist.Gamma(3.0, 2.0),
        lambda: dist.InverseGamma(3.0, 2.0),
        lambda: dist.Weibull(1.0, 2.0),
        lambda: dist.Gumbel(0.0, 1.0),
        lambda: dist.Laplace(0.0, 1.0),
        lambda: dist.Kumaraswamy(2.0, 2.0),
        lambda: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()]
        ),
        lambda: dist.VonMises(0.0, 0.5),
    ],
    ids=lambda make: type(make()).__name__,
)
def test_a_proper_density_integrates_to_one_on_the_unconstrained_line(
    law: Callable[[], Any],
) -> None:
    density = LogDensity(lambda: pyro.sample("x", law()))
    z = torch.linspace(-60.0, 60.0, 200_001)
    total = torch.trapezoid(density.log_prob(z.unsqueeze(-1)).exp(), z)
    assert abs(float(total) - 1) < 1e-4


@pytest.mark.usefixtures("float64")
def test_a_simplex_integrates_to_one() -> None:
    density = LogDensity(lambda: pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]))))
    assert density.features == 2
    line = torch.linspace(-15, 15, 301)
    grid = torch.cartesian_prod(line, line)
    total = density.log_prob(grid).exp().sum() * (line[1] - line[0]) ** 2
    assert abs(float(total) - 1) < 1e-4


@pytest.mark.usefixtures("float64")
def test_the_gradient_by_finite_differences() -> None:
    density = double("cholesky")
    z, h = points(density, 1), 1e-6
    steps = h * torch.eye(density.features)
    slopes = (density.log_prob(z + steps) - density.log_prob(z - steps)) / (2 * h)
    torch.testing.assert_close(density.value_and_grad(z)[1][0], slopes, rtol=1e-5, atol=1e-6)


# Shapes


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (255,), (256,), (257,), (3, 100), (2, 0), (2, 1, 3)], ids=str
)
def test_any_batch_shape(shape: tuple[int, ...]) -> None:
    density = double("nested_plates")
    z = density.initial + 0.3 * torch.randn(*shape, density.features)
    value, grad = density.value_and_grad(z)
    assert value.shape == shape
    assert grad.shape == z.shape
    rows = z.reshape(-1, density.features)
    one_by_one = [density.log_prob(row) for row in rows[:: max(1, len(rows) // 5)]]
    if one_by_one:
        torch.testing.assert_close(
            value.reshape(-1)[:: max(1, len(rows) // 5)], torch.stack(one_by_one)
        )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_any_batch_size(batch_size: int) -> None:
    density = double("masks")
    z = points(density, 11)
    other = LogDensity(density.model, batch_size=batch_size)
    assert other.mode == "captured"
    torch.testing.assert_close(other.log_prob(z), density.log_prob(z))


def test_one_bad_point_leaves_the_others_alone() -> None:
    density = LogDensity(CASES["normal"]())
    z = torch.tensor([[0.0], [math.nan], [math.inf], [0.0]])
    value = density.log_prob(z)
    assert value[0] == value[3]
    assert bool(value[0].isfinite())
    assert bool(value[1].isnan())
    assert not bool(value[2].isfinite())


def test_what_it_returns_carries_no_graph() -> None:
    density = LogDensity(CASES["normal"]())
    z = torch.zeros(3, 1, requires_grad=True)
    value, grad = density.value_and_grad(z)
    assert not value.requires_grad
    assert not grad.requires_grad
    assert z.grad is None


@pytest.mark.parametrize(
    ("z", "kind", "said"),
    [
        (torch.zeros(3, 2), ValueError, r"Expected z of shape \(\*, 1\); got \(3, 2\)"),
        (torch.zeros(()), ValueError, r"Expected z of shape \(\*, 1\); got \(\)"),
        (torch.zeros(3, 1, dtype=torch.long), TypeError, "floating-point"),
        ([[0.0]], TypeError, "Expected z to be a tensor"),
    ],
    ids=["width", "scalar", "integers", "list"],
)
def test_wrong_points_are_refused(z: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        LogDensity(CASES["normal"]()).log_prob(z)


# Sites


@every_case
@pytest.mark.usefixtures("float64")
def test_constrain_satisfies_the_supports_and_unconstrain_is_its_inverse(name: str) -> None:
    density = double(name)
    z = points(density, 6).reshape(2, 3, density.features)
    values = density.constrain(z)
    trace = poutine.trace(
        poutine.condition(density.model, data=density.constrain(z[0, 0]))
    ).get_trace()
    assert list(values) == [site.name for site in density.sites]
    for site in density.sites:
        assert values[site.name].shape == (2, 3, *site.shape)
        support = trace.nodes[site.name]["fn"].support
        assert bool(support.check(values[site.name]).all())
        assert type(site.transform) is type(biject_to(support))
    torch.testing.assert_close(density.unconstrain(values), z)
    torch.testing.assert_close(density.unconstrain(density.constrain(z[0, 0])), z[0, 0])


@pytest.mark.usefixtures("float64")
def test_sites_know_their_plates() -> None:
    plates = {site.name: site.plates for site in double("nested_plates").sites}
    assert plates == {"scale": (), "a": ("rows", None), "b": ("columns",), "c": ("rows", "columns")}
    (site,) = double("simplex").sites
    assert (site.shape, site.unconstrained_shape, site.plates) == ((2, 3), (2, 2), ("n", None))


def test_it_starts_where_it_is_told() -> None:
    density = LogDensity(
        lambda: pyro.sample("x", dist.LogNormal(0.0, 1.0)), init_loc_fn=init_to_value(values={})
    )
    assert density.initial.shape == (1,)
    start = init_to_value(values={"x": torch.tensor(3.0)})
    density = LogDensity(lambda: pyro.sample("x", dist.LogNormal(0.0, 1.0)), init_loc_fn=start)
    torch.testing.assert_close(density.initial, torch.tensor([math.log(3.0)]))


def test_the_log_density_of_each_site() -> None:
    density = LogDensity(CASES["normal"]())
    z = torch.tensor([0.4])
    shares = density.site_log_probs(z)
    assert set(shares) == {"x", "y"}
    torch.testing.assert_close(sum(shares.values()), density.log_prob(z))


def test_arguments_reach_the_model() -> None:
    def model(y: Tensor, scale: float = 1.0, *, power: int) -> None:
        x = pyro.sample("x", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(x**power, 1.0), obs=y)

    density = LogDensity(model, (torch.tensor(2.0), 3.0), {"power": 2})
    expected = dist.Normal(0.0, 3.0).log_prob(torch.tensor(1.5)) + dist.Normal(
        1.5**2, 1.0
    ).log_prob(torch.tensor(2.0))
    torch.testing.assert_close(density.log_prob(torch.tensor([1.5])), expected)


# What it leaves alone


def test_handlers_validation_and_param_store_outside_are_untouched() -> None:
    with poutine.trace() as outer, pyro.validation_enabled(True):
        density = LogDensity(CASES["nested_plates"]())
        density.log_prob(points(density))
        density.site_log_probs(density.initial)
        assert dist.Normal(0.0, 1.0)._validate_args
    assert not outer.trace.nodes
    assert not pyro.get_param_store()


# Models that cannot be batched


def reads_a_value() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    scale = 1.0 if x.item() > 0 else 2.0
    pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(0.5))


def goes_through_numpy() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    scale = 1.0 if x.detach().numpy() > 0 else 2.0
    pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(0.5))


def fills_in_place() -> None:
    # Pyro's OrderedLogistic writes into a tensor of zeros, which vmap alone refuses.
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.OrderedLogistic(x, torch.tensor([-1.0, 1.0])), obs=torch.tensor(1))


def test_a_distribution_that_writes_in_place_is_batched() -> None:
    density = LogDensity(fills_in_place)
    assert density.mode == "captured"
    x = torch.tensor([-1.0, 0.3])
    chance = torch.sigmoid(1 - x) - torch.sigmoid(-1 - x)
    expected = dist.Normal(0.0, 1.0).log_prob(x) + chance.log()
    torch.testing.assert_close(density.log_prob(x.unsqueeze(-1)), expected)


@pytest.mark.parametrize("model", [reads_a_value, goes_through_numpy])
def test_a_model_that_cannot_be_batched_is_looped_over_with_a_warning(model: Model) -> None:
    with pytest.warns(UserWarning, match="one point at a time") as caught:
        density = LogDensity(model)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert density.mode == "loop"
    assert not density.batched
    z = torch.tensor([[-1.0], [0.3], [2.0]])
    scale = torch.tensor([2.0, 1.0, 1.0])
    x = z[:, 0]
    expected = dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x, scale).log_prob(torch.tensor(0.5))
    value, grad = density.value_and_grad(z)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[:, 0], -x + (0.5 - x) / scale**2)
    assert density.log_prob(z.reshape(3, 1, 1)).shape == (3, 1)
    assert density.log_prob(torch.zeros(0, 1)).shape == (0,)


@pytest.mark.parametrize("mode", ["captured", "vmap", "plate", "loop"])
def test_a_flat_density_has_no_gradient(mode: str) -> None:
    density = LogDensity(lambda: pyro.sample("x", dist.ImproperUniform(constraints.real, (), (2,))))
    value, grad = in_mode(density, mode).value_and_grad(torch.ones(3, 2))
    assert torch.equal(value, torch.zeros(3))
    assert torch.equal(grad, torch.zeros(3, 2))


# Models that are refused


def test_a_support_that_depends_on_another_latent_is_refused() -> None:
    def model() -> None:
        width = pyro.sample("width", dist.Gamma(2.0, 1.0))
        pyro.sample("u", dist.Uniform(0.0, width))

    with pytest.raises(ValueError, match="'u'"):
        LogDensity(model)


def test_a_support_that_depends_on_data_is_fine() -> None:
    def model(top: Tensor) -> None:
        pyro.sample("u", dist.Uniform(torch.zeros(2), top).to_event(1))

    top = torch.tensor([2.0, 5.0])
    density = LogDensity(model, (top,))
    torch.testing.assert_close(density.constrain(torch.zeros(2))["u"], top / 2)


def test_a_support_of_the_data_that_depends_on_a_latent_is_fine() -> None:
    def model() -> None:
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(0.0, top), obs=torch.tensor(3.0))

    z = torch.tensor([[0.0], [2.0]])
    below, above = LogDensity(model).log_prob(z)
    assert below == -math.inf
    torch.testing.assert_close(above, dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0)) - 2.0)


@pytest.mark.parametrize(
    ("law", "value"),
    [
        (lambda x: dist.Bernoulli(logits=x), 2.0),
        (lambda x: dist.Exponential(x.exp()), -1.0),
        (lambda x: dist.Poisson(x.exp()), 0.5),
        (lambda x: dist.Normal(x, 1.0).expand([2]).to_event(1), [0.0, 1.0]),
    ],
    ids=["bernoulli", "exponential", "poisson", "normal"],
)
def test_data_outside_of_their_support_are_refused(
    law: Callable[[Tensor], Any], value: Any
) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", law(x), obs=torch.tensor(value))

    if isinstance(value, list):
        LogDensity(model)
        return
    with pytest.raises(ValueError, match=r"site 'y'.*outside of"):
        LogDensity(model)
    with pyro.validation_enabled(False):
        LogDensity(model)


def test_nan_in_the_parameters_of_a_distribution_names_its_site() -> None:
    def model(x: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 2):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=torch.zeros(2))

    with pytest.raises(
        ValueError, match=r"^Expected a model with a finite log density .*'y' gives nan"
    ) as caught:
        LogDensity(model, (torch.tensor([1.0, math.nan]),))
    assert "\n" not in str(caught.value)


def test_an_error_of_the_model_itself_is_left_as_it_is() -> None:
    def model() -> None:
        raise ValueError("the data are too short")

    with pytest.raises(ValueError, match="the data are too short"):
        LogDensity(model)


def test_a_value_that_a_distribution_made_with_validation_is_not_validated() -> None:
    law = dist.Normal(0.0, 1.0, validate_args=True)
    density = LogDensity(lambda: pyro.sample("x", law))
    assert density.mode == "captured"
    assert bool(density.log_prob(torch.tensor([math.nan])).isnan())
    assert law._validate_args


@pytest.mark.parametrize("size", [0, -1, 2.5, "all"])
def test_a_bad_batch_size_is_refused(size: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="batch_size"):
        LogDensity(CASES["normal"](), batch_size=size)


def test_data_that_broadcast_against_their_site_are_refused():
    x, y = torch.randn(20, 1), torch.randn(20)

    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("d", 20):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    with pytest.raises(
        ValueError, match=r"site 'y' observes shape \(20,\) under a distribution of batch shape"
    ):
        pf.model.LogDensity(model)
