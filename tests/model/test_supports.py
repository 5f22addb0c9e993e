"""Values outside of a support that moves with the latents."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import AffineTransform, SigmoidTransform
from torch import Tensor

from pyroflows.model import LogDensity
from pyroflows.model.supports import zero_outside

t = torch.tensor
double = functools.partial(torch.tensor, dtype=torch.double)
BOUNDS = t([[0.3], [1.5], [0.9], [2.0], [3.0]])


class Above(dist.TorchDistribution):
    """A normal truncated below, whose formula goes on there, as those of users do."""

    arg_constraints: ClassVar = {"low": constraints.real}

    def __init__(self, low: Tensor, validate_args: bool | None = None) -> None:
        self.low = low
        super().__init__(low.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        return constraints.greater_than(self.low)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Above:
        return Above(self.low.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.low + torch.ones(torch.Size(sample_shape) + self.low.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        normal = dist.Normal(torch.zeros(()), 1.0)
        return normal.log_prob(value) - (1 - normal.cdf(self.low)).log()


def shifted(base: Any, *transforms: Any) -> Any:
    return dist.TransformedDistribution(base, list(transforms))


ZERO, ONE = torch.zeros(()), torch.ones(())
# Each of a bound, which is that of the support from below, and from above.
BELOW: dict[str, Callable[[Tensor], Any]] = {
    "Pareto": lambda x: dist.Pareto(x, 2.0 * ONE),
    "Pareto in an event": lambda x: dist.Pareto(x.unsqueeze(-1), t([2.0, 3.0])).to_event(1),
    "Pareto in a mixture": lambda x: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Pareto(torch.stack([x, x + 1], -1), 2.0 * ONE)
    ),
    "masked Pareto": lambda x: dist.Pareto(x, 2.0 * ONE).mask(t(True)),
    "shifted Exponential": lambda x: shifted(dist.Exponential(ONE), AffineTransform(x, ONE)),
    "shifted LogNormal": lambda x: shifted(dist.LogNormal(ZERO, ONE), AffineTransform(x, ONE)),
    "shifted Exponential in an event": lambda x: shifted(
        dist.Exponential(torch.ones(2)).to_event(1),
        AffineTransform(x.unsqueeze(-1), ONE, event_dim=1),
    ),
    "truncated Normal": Above,
}
ABOVE: dict[str, Callable[[Tensor], Any]] = {
    "Uniform": lambda x: dist.Uniform(ZERO, x),
    "AffineBeta": lambda x: dist.AffineBeta(ONE, ONE, ZERO, x),
    "AffineBeta with a pole": lambda x: dist.AffineBeta(2 * ONE, 2 * ONE, ZERO, x),
    "scaled logistic normal": lambda x: shifted(
        dist.Normal(ZERO, ONE), SigmoidTransform(), AffineTransform(ZERO, x)
    ),
    "Uniform in a mixture": lambda x: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Uniform(ZERO, torch.stack([x, x / 2], -1))
    ),
    "Binomial": lambda x: dist.Binomial(x.ceil() - 1, 0.5 * ONE),
}


def bounded(law: Callable[[Tensor], Any]) -> Callable[[], None]:
    def model() -> None:
        x = pyro.sample("x", dist.Exponential(1.0))
        fn = law(x)
        pyro.sample("y", fn, obs=torch.ones(fn.event_shape))

    return model


@pytest.mark.parametrize("name", [*BELOW, *ABOVE])
def test_a_density_is_zero_outside_of_a_support_that_moves(name: str) -> None:
    law = {**BELOW, **ABOVE}[name]
    density = LogDensity(bounded(law))
    inside = BOUNDS[:, 0] < 1 if name in BELOW else BOUNDS[:, 0] > 1
    alone = torch.stack([density.log_prob(z) for z in BOUNDS.log()])
    assert torch.equal(alone.isfinite(), inside)
    for mode in ("captured", "vmap", "plate", "loop"):
        log_prob, gradient, usable = in_mode(density, mode).evaluate(BOUNDS.log())
        assert usable.all()
        torch.testing.assert_close(log_prob, alone)
        assert torch.equal(gradient.any(-1), inside)
    if "mixture" not in name:
        torch.testing.assert_close(alone[inside], scores(law, BOUNDS[inside, 0]))


def in_mode(density: LogDensity, mode: str) -> LogDensity:
    """The same density, evaluated in another way."""
    other = density.bind()
    other._program = other._evaluator.make_program(other.inputs, other.batch_size, mode)
    return other


def scores(law: Callable[[Tensor], Any], bounds: Tensor) -> Tensor:
    """The log joint densities by the distributions themselves, with the Jacobian."""
    with pyro.validation_enabled(False):
        scored = [law(x).log_prob(torch.ones(law(x).event_shape)) for x in bounds]
    return torch.stack(scored) - bounds + bounds.log()


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("name", ["Pareto", "shifted Exponential", "Uniform"])
def test_a_density_is_zero_there_with_and_without_validation(name: str, validated: bool) -> None:
    with pyro.validation_enabled(validated):
        density = LogDensity(bounded({**BELOW, **ABOVE}[name]))
        log_prob = density.log_prob(t([[0.5], [1.5]]).log())
    assert log_prob.isneginf().sum() == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(density.log_prob(t([[0.5], [1.5]]).log()), log_prob)


def test_the_end_of_uniform_data_has_its_posterior() -> None:
    """The posterior of the end under a Pareto prior is a Pareto."""
    data = double([0.4, 1.7, 2.5])

    def model() -> None:
        end = pyro.sample("end", dist.Pareto(double(0.5), double(1.5)))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Uniform(double(0.0), end), obs=data)

    x = torch.linspace(math.log(0.51), math.log(1e4), 100001, dtype=torch.double).exp()
    check_posterior(
        LogDensity(model), "end", x, zero_outside(dist.Pareto(double(2.5), double(4.5)))
    )


def test_the_scale_of_pareto_data_has_its_posterior() -> None:
    """The posterior of the scale under an Exponential prior is a Gamma below the least datum."""

    def model() -> None:
        scale = pyro.sample("scale", dist.Exponential(double(1.0)))
        with pyro.plate("n", 3):
            y = double([1.4, 1.7, 2.5])
            pyro.sample("y", dist.Pareto(scale, double(2.0)), obs=y)

    x = torch.linspace(1e-3, 1.4, 10001, dtype=torch.double)
    density = LogDensity(model)
    check_posterior(density, "scale", x, dist.Gamma(double(7.0), double(1.0)))
    assert density.log_prob(density.unconstrain({"scale": x[-1] + x})).isneginf().all()


def check_posterior(density: LogDensity, name: str, x: Tensor, posterior: Any) -> None:
    """Compares the posterior of one number with a density, both normalised on a grid."""
    z = density.unconstrain({name: x})
    jacobian = density.sites[0].log_det(z[:, 0], x)
    found = (density.log_prob(z) - jacobian).exp()
    with pyro.validation_enabled(False):
        expected = posterior.log_prob(x).exp()
    found, expected = (f / torch.trapezoid(f, x) for f in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_masks_and_scales_are_minded() -> None:
    seen = t([True, False])

    def model() -> None:
        x = pyro.sample("x", dist.Exponential(1.0))
        with pyro.plate("n", 2), poutine.mask(mask=seen):
            pyro.sample("y", dist.Pareto(x, t(2.0)), obs=t([1.0, 0.1]))

    log_prob = LogDensity(model).log_prob(BOUNDS.log())
    assert torch.equal(log_prob.isfinite(), BOUNDS[:, 0] < 1)


def test_each_value_of_a_discrete_site_has_a_support_of_its_own() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Exponential(1.0))
        k = pyro.sample("k", dist.Categorical(t([0.5, 0.5])))
        pyro.sample("y", dist.Pareto(torch.where(k == 0, x, x / 4), t(2.0)), obs=t(1.0))

    density = LogDensity(model)
    log_prob = density.log_prob(t([[0.5], [2.0], [5.0]]).log())
    x = t([0.5, 2.0])
    pareto = 2 * t([0.5**2 * (1 + 1 / 16), 2.0**2 / 16])
    torch.testing.assert_close(log_prob[:2], (pareto / 2).log() - x + x.log())
    assert log_prob[2].isneginf()


def test_terms_of_sites_are_zero_outside_too() -> None:
    density = LogDensity(bounded(BELOW["Pareto"]))
    terms = density.site_terms(BOUNDS.log())
    assert torch.equal(terms["y"].isfinite(), BOUNDS[:, 0] < 1)
    assert terms["x"].isfinite().all()


def test_data_outside_of_a_support_where_the_model_starts_are_not_refused() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Exponential(0.01))
        pyro.sample("y", dist.Pareto(x, t(2.0)), obs=t(1.0))

    with pyro.validation_enabled(True):
        assert LogDensity(model).log_prob(t([0.5]).log()).isfinite()


def test_a_distribution_without_bounds_that_move_is_left_as_it_is() -> None:
    for fn in (dist.Normal(0.0, 1.0), dist.Gumbel(0.0, 1.0), dist.LogNormal(0.0, 1.0).to_event(0)):
        assert zero_outside(fn) is fn
    uniform = dist.Uniform(0.0, 1.0).expand([2]).to_event(1)
    assert type(zero_outside(uniform)) is type(uniform)
    assert type(uniform.base_dist.log_prob).__name__ == "method"


class Unsupported(dist.TorchDistribution):
    """A distribution of the user's own that says nothing of its support."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return -value.square()


def test_a_distribution_without_a_support_is_left_as_it_is() -> None:
    fn = Unsupported(validate_args=False)
    assert zero_outside(fn) is fn
