"""What Pyro asks of its own transforms, asked of the families that both packages have, in Pyro's own classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from families.sizes import HIDDEN
from marks import slow_but_for
from pyro.distributions import ConditionalTransformedDistribution, TransformedDistribution
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.distributions.transforms import (
    AffineTransform,
    ComposeTransformModule,
    LeakyReLUTransform,
)
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from registry import NET, C, context_for, perturbed, points
from torch import Tensor

from pyroflows.transforms import (
    AffineAutoregressive,
    AffineCoupling,
    Autoregressive,
    BatchNorm,
    BlockAutoregressive,
    Coupling,
    Elementwise,
    Householder,
    LowerTriangularAffine,
    MatrixExponential,
    Permute,
    Planar,
    Radial,
    Reverse,
    Sylvester,
    Transform,
)
from pyroflows.univariate import (
    LinearRationalSpline,
    MonotoneNetwork,
    RationalQuadraticSpline,
    SumOfSquares,
)

Make = Callable[[int, int | None], Transform]

#: Pyro's name of a family, and the layer for so many features and entries of context.
FAMILIES: dict[str, Make] = {
    "affine_autoregressive": lambda n, c: AffineAutoregressive(n, c, **HIDDEN),
    "affine_autoregressive-forward": lambda n, c: AffineAutoregressive(
        n, c, order="reversed", fast="forward", **HIDDEN
    ),
    "affine_coupling": lambda n, c: AffineCoupling(n, c, **NET),
    "batchnorm": lambda n, c: BatchNorm(n, c, **NET),
    "batchnorm-inverse": lambda n, c: BatchNorm(n, c, **NET).inv,
    "block_autoregressive": lambda n, c: BlockAutoregressive(n, c, hidden=(4,)),
    "block_autoregressive-forward": lambda n, c: BlockAutoregressive(
        n, c, hidden=(4,), order="reversed", fast="forward"
    ),
    "householder": lambda n, c: Householder(n, c, reflections=2, **NET),
    "lower_cholesky_affine": lambda n, c: LowerTriangularAffine(n, c, **NET),
    "matrix_exponential": lambda n, c: MatrixExponential(n, c, **NET),
    "neural_autoregressive": lambda n, c: Autoregressive(MonotoneNetwork(4, 1), n, c, **HIDDEN),
    "planar": lambda n, c: Planar(n, c, **NET),
    "polynomial": lambda n, c: Autoregressive(SumOfSquares(2, 2), n, c, **HIDDEN),
    "radial": lambda n, c: Radial(n, c, **NET),
    "spline-linear": lambda n, c: Elementwise(LinearRationalSpline(4), n, c, **NET),
    "spline-quadratic": lambda n, c: Elementwise(RationalQuadraticSpline(4), n, c, **NET),
    "spline_autoregressive": lambda n, c: Autoregressive(
        RationalQuadraticSpline(4), n, c, **HIDDEN
    ),
    "spline_coupling": lambda n, c: Coupling(RationalQuadraticSpline(4), n, c, **NET),
    "sylvester": lambda n, c: Sylvester(n, c, **NET),
}
#: Maps with nothing to learn and no context to heed.
FIXED: dict[str, Make] = {
    "permute": lambda n, c: Permute(n, seed=1),
    "reverse": lambda n, c: Reverse(n),
}
#: Which entries may tell how an entry moves: those before it, in this order.
TRIANGULAR = {
    "affine_autoregressive": 1,
    "affine_autoregressive-forward": -1,
    "block_autoregressive": 1,
    "block_autoregressive-forward": -1,
    "lower_cholesky_affine": 1,
    "neural_autoregressive": 1,
    "polynomial": 1,
    "spline_autoregressive": 1,
}
CASES = [(name, context) for name in FAMILIES for context in (None, C)] + [
    (name, None) for name in FIXED
]
every_case = pytest.mark.parametrize(("name", "context"), CASES)
#: Every family once, by turns with a context and without.
half_of_the_cases = pytest.mark.parametrize(
    ("name", "context"),
    [(name, C if i % 2 else None) for i, name in enumerate([*FAMILIES, *FIXED][::-1])],
)
every_family = pytest.mark.parametrize("name", list(FAMILIES))

#: Step of central differences that balances truncation and rounding in double precision.
STEP = torch.finfo(torch.float64).eps ** (1 / 3)


def make(name: str, features: int, context: int | None, device: torch.device) -> Transform:
    """A layer of a family, as it is built, in double precision."""
    return {**FAMILIES, **FIXED}[name](features, context).double().to(device)


def moved(name: str, features: int, context: int | None, device: torch.device) -> Transform:
    """A layer away from the identity, with the statistics of some data where it takes statistics."""
    t = make(name, features, context, device)
    if name.startswith("batchnorm"):
        data = 2 + 3 * points(t, 50).to(device)
        (t.inverse_and_log_det if name.endswith("inverse") else t.forward_and_log_det)(
            data, given(t, 50)
        )
    return perturbed(t).eval()


def given(t: Transform, *batch: int) -> Tensor | None:
    """A context for the layer, on its device."""
    context = context_for(t, *batch)
    return None if context is None else context.to(next(t.parameters()).device)


def conditioned(t: Transform, *batch: int) -> Transform:
    context = given(t, *batch)
    return t if context is None else t.condition(context)


def base(*shape: int, device: torch.device) -> dist.TorchDistribution:
    """Independent normals of different scales, so that even a rotation changes the density."""
    scale = torch.linspace(0.5, 2.0, shape[-1], dtype=torch.float64, device=device)
    return dist.Normal(torch.zeros(shape, dtype=torch.float64, device=device), scale)


def differences(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of a map at one point by central differences."""
    steps = STEP * torch.eye(len(x), dtype=x.dtype, device=x.device)
    return ((f(x + steps) - f(x - steps)) / (2 * STEP)).mT.detach()


# The mathematics


@half_of_the_cases
def test_jacobian_by_finite_differences(
    name: str, context: int | None, device: torch.device
) -> None:
    """The log-determinant, the product with the Jacobian of the inverse, and the zeros of an autoregressive layer."""
    for features in (2, 5):
        t = conditioned(moved(name, features, context, device))
        x = points(t).to(device)
        y = t(x)
        there, back = differences(t, x), differences(t.inv, y.detach())
        torch.testing.assert_close(
            t.log_abs_det_jacobian(x, y), torch.linalg.slogdet(there)[1], rtol=0, atol=1e-7
        )
        torch.testing.assert_close(
            t.inv.log_abs_det_jacobian(y, x), torch.linalg.slogdet(back)[1], rtol=0, atol=1e-7
        )
        torch.testing.assert_close(back @ there, torch.eye(features).to(x), rtol=0, atol=1e-6)
        for jacobian in (there, back) if name in TRIANGULAR else ():
            ordered = jacobian if TRIANGULAR[name] > 0 else jacobian.flip(0, 1)
            # A numeric inverse stops when all entries of a batch have settled, which may cost the last bit.
            assert float(ordered.triu(1).abs().max()) < 1e-14 / STEP
            assert bool((ordered.diagonal() > 0).all())
            assert bool((ordered.tril(-1).abs().sum(-1)[1:] > 1e-4).all())


@half_of_the_cases
def test_inverse_undoes_forward(name: str, context: int | None, device: torch.device) -> None:
    for features in (2, 5):
        t = conditioned(moved(name, features, context, device), 10)
        x = points(t, 10).to(device)
        for f in (t, t.inv):
            y = f(x)
            back = f.inv(y.clone())  # a copy, so that nothing is remembered
            torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
            log_det = f.log_abs_det_jacobian(x, y)
            torch.testing.assert_close(f.log_abs_det_jacobian(back, y), log_det, rtol=0, atol=1e-9)
            torch.testing.assert_close(
                f.inv.log_abs_det_jacobian(y.clone(), back), -log_det, rtol=0, atol=1e-9
            )


# Shapes


@every_case
def test_shapes_in_a_distribution(name: str, context: int | None, device: torch.device) -> None:
    """One log-determinant per vector, whether the base takes the last dimension for its event or not."""
    features = 2
    batch = () if context is None else (2, 1, 3)
    t = moved(name, features, context, device)
    for layer in (conditioned(t), conditioned(t, *batch), conditioned(t, *batch).inv):
        plain = base(*batch, features, device=device)
        for d in (
            TransformedDistribution(plain, [layer]),
            TransformedDistribution(plain.to_event(1), layer),
        ):
            assert d.batch_shape == batch and d.event_shape == (features,)
            y = d.sample((6,))
            assert y.shape == (6, *batch, features)
            assert d.log_prob(y).shape == (6, *batch)
            assert d.support.event_dim == 1 and bool(d.support.check(y).all())
        x = layer.inv(y.clone())
        assert layer.log_abs_det_jacobian(x, y.clone()).shape == (6, *batch)
        assert layer.domain.event_dim == layer.codomain.event_dim == 1
        shape = torch.Size((*batch, features))
        assert layer.forward_shape(shape) == layer.inverse_shape(shape) == shape
        event = shape[-1:]
        assert layer.forward_shape(event) == layer(x.new_zeros(event)).shape
        assert layer.inverse_shape(event) == layer.inv(x.new_zeros(event)).shape


# Conditional transforms


@every_family
def test_conditional_distribution(name: str, device: torch.device) -> None:
    """A batch of contexts is as many distributions, of the density that a change of variables gives."""
    features, batch = 3, (4, 2)
    t = moved(name, features, C, device)
    contexts = given(t, *batch)
    assert contexts is not None
    plain = base(features, device=device).to_event(1)
    d = ConditionalTransformedDistribution(plain, [t]).condition(contexts)
    assert d.batch_shape == batch and d.event_shape == (features,)
    y = d.rsample((5,))
    assert y.shape == (5, *batch, features)
    x, log_det = t.inverse_and_log_det(y.detach(), contexts)
    expected = plain.log_prob(x) + log_det
    torch.testing.assert_close(d.log_prob(y), expected)
    torch.testing.assert_close(d.log_prob(y.detach()), expected)
    for i, j in ((0, 1), (3, 0)):
        one = ConditionalTransformedDistribution(plain, [t]).condition(contexts[i, j])
        torch.testing.assert_close(one.log_prob(y.detach()[:, i, j]), expected[:, i, j])
    # The density heeds the context, and its gradients reach all that reads it.
    assert float((expected - expected.roll(1, -1)).detach().abs().mean()) > 1e-3
    gradients = torch.autograd.grad(d.log_prob(y.detach()).square().mean(), list(t.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients) and any(
        bool(g.any()) for g in gradients
    )


@every_family
def test_inverse_of_a_conditional_transform(name: str, device: torch.device) -> None:
    for features in (2, 3):
        t = moved(name, features, C, device)
        for batch in ((), (7,), (6, 5)):
            noise, context = points(t, *batch).to(device), given(t, *batch)
            assert context is not None and t.inv.inv is t
            torch.testing.assert_close(
                t.inv.condition(context)(noise), t.condition(context).inv(noise)
            )
            torch.testing.assert_close(
                t.inv.condition(context).inv(noise), t.condition(context)(noise)
            )


STACKS: list[tuple[str, ...]] = [
    ("affine_autoregressive", "spline_coupling", "planar"),
    ("neural_autoregressive", "matrix_exponential", "block_autoregressive"),
    ("batchnorm-inverse", "sylvester", "spline-quadratic"),
    ("radial", "polynomial", "householder"),
]


@pytest.mark.parametrize("names", STACKS, ids="/".join)
@pytest.mark.parametrize("cache_size", slow_but_for([1], [0, 1]))
def test_stack_of_conditional_transforms(
    names: tuple[str, ...], cache_size: int, device: torch.device
) -> None:
    """In Pyro's own stack, beside its own transforms and some of ours without a context."""
    features = 3
    ours = [
        perturbed(moved(name, features, C, device), seed=seed) for seed, name in enumerate(names)
    ]
    free = moved("spline-linear", features, None, device)
    parts = [
        AffineTransform(1.0, 2.0),
        ours[0],
        free,
        ours[1].inv,
        LeakyReLUTransform(),
        Permute(features, seed=1),
        ours[2],
    ]
    stack = ConditionalComposeTransformModule(parts, cache_size=cache_size)
    assert set(stack.parameters()) == {p for t in (*ours, free) for p in t.parameters()}
    plain = base(features, device=device).to_event(1)
    for batch in ((), (7,), (6, 5)):
        context = given(ours[0], *batch)
        assert context is not None
        d = ConditionalTransformedDistribution(plain.expand(batch), [stack]).condition(context)
        (layer,) = d.transforms
        assert isinstance(layer, ComposeTransformModule)
        y = d.rsample()
        assert y.shape == (*batch, features) and d.log_prob(y).shape == batch
        x = plain.rsample(batch)
        expected, log_det = x, torch.zeros(batch).to(x)
        for t in parts:
            t = t.condition(context) if hasattr(t, "condition") else t
            before, expected = expected, t(expected)
            change = t.log_abs_det_jacobian(before, expected)
            log_det = log_det + (change.sum(-1) if t.domain.event_dim == 0 else change)
        image = stack.condition(context)(x)
        torch.testing.assert_close(image, expected)
        torch.testing.assert_close(
            stack.condition(context).inv(expected.detach()), x, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            stack.inv.condition(context)(image.detach()), x, rtol=1e-6, atol=1e-6
        )
        density = plain.log_prob(x) - log_det
        torch.testing.assert_close(d.log_prob(expected.detach()), density, rtol=1e-6, atol=1e-6)


# Modules, the param store, inference


@half_of_the_cases
def test_maximum_likelihood_in_both_directions(
    name: str, context: int | None, device: torch.device
) -> None:
    """A few steps of an optimiser raise the likelihood of points that no layer drew."""
    features = 3
    x = torch.rand(20, features, dtype=torch.float64, device=device)
    for inverted in (False, True):
        t = moved(name, features, context, device)
        layer = conditioned(t.inv if inverted else t, 20)
        assert {*layer.parameters()} == {*t.parameters()}
        d = TransformedDistribution(base(features, device=device), [layer])
        losses = descend(t, lambda d=d: -d.log_prob(x).mean())
        assert all(map(math.isfinite, losses))
        assert name in FIXED or losses[-1] < losses[0] - 1e-4


def descend(t: Transform, loss: Callable[[], Tensor]) -> list[float]:
    parameters = list(t.parameters())
    optimiser = torch.optim.Adam(parameters, lr=0.003) if parameters else None
    losses = []
    for _ in range(4):
        value = loss()
        losses.append(float(value.detach()))
        if optimiser is not None:
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    return losses


TARGET = ([1.0, -1.0], [[1.4, 0.0], [0.8, 0.3]])


def target(device: torch.device) -> dist.MultivariateNormal:
    """A correlated normal density, away from the origin."""
    loc, scale = (torch.tensor(numbers, dtype=torch.float64, device=device) for numbers in TARGET)
    return dist.MultivariateNormal(loc, scale_tril=scale)


def train(model: Any, guide: Any, steps: int, elbo: Any = None) -> list[float]:
    svi = SVI(model, guide, Adam({"lr": 0.05}), elbo or Trace_ELBO())
    return [svi.step() for _ in range(steps)]


def assert_positive(values: Tensor) -> None:
    """The mean is above zero by more than the sampling error."""
    assert float(values.mean()) > 4 * float(values.std()) / len(values) ** 0.5


def assert_below_zero(values: Tensor) -> None:
    """The mean is below zero, but for the sampling error."""
    assert float(values.mean()) < 4 * float(values.std()) / len(values) ** 0.5


@pytest.mark.slow
@half_of_the_cases
def test_layer_learns_data_that_it_never_drew(
    name: str, context: int | None, device: torch.device
) -> None:
    """As part of a model, the layer gets closer to the density of the data, by the store of Pyro, and never above it."""
    truth, features = target(device), 2
    t = make(name, features, context, device)
    shift = torch.tensor([[1.0, 0.0], [-1.0, 2.0]], dtype=torch.float64, device=device)
    contexts = None if context is None else torch.randn(2000, C, dtype=torch.float64, device=device)
    data = truth.sample((2000,)) + (0.0 if contexts is None else contexts @ shift)

    def layer(rows: slice) -> TransformedDistribution:
        fixed = t if contexts is None else t.condition(contexts[rows])
        return TransformedDistribution(base(features, device=device).to_event(1), [fixed])

    def model() -> None:
        pyro.module("layer", t)
        with pyro.plate("data", 200):
            pyro.sample("x", layer(slice(200)), obs=data[:200])

    def excess() -> Tensor:
        t.eval()
        rest = slice(200, None)
        ideal = truth.log_prob(data[rest] - (0.0 if contexts is None else contexts[rest] @ shift))
        with torch.no_grad():
            found = layer(rest).log_prob(data[rest]) - ideal
        t.train()
        return found

    before = excess()
    losses = train(model, lambda: None, 20)
    after = excess()
    assert all(map(math.isfinite, losses))
    assert_below_zero(after)
    if name in FIXED:
        assert torch.equal(after, before)
    else:
        assert_positive(after - before)
    stored = {n for n, _ in pyro.get_param_store().named_parameters()}
    assert stored == {f"layer$$${n}" for n, _ in t.named_parameters()}


@pytest.mark.slow
@every_family
def test_layer_learns_a_posterior(name: str, device: torch.device) -> None:
    """As part of a guide: the bound of a normalised density rises, and not above zero."""
    features = 2
    elbo: Any = (Trace_ELBO, TraceMeanField_ELBO)[list(FAMILIES).index(name) % 2]
    t = make(name, features, None, device)

    def model() -> None:
        pyro.sample("z", target(device))

    def guide() -> None:
        pyro.module("layer", t)
        pyro.sample("z", TransformedDistribution(base(features, device=device).to_event(1), [t]))

    def bounds() -> Tensor:
        t.eval()
        with torch.no_grad():
            q = TransformedDistribution(base(features, device=device).to_event(1), [t])
            z = q.sample((2000,))
            found = target(device).log_prob(z) - q.log_prob(z.clone())
        t.train()
        return found

    before = bounds()
    losses = train(model, guide, 14, elbo(num_particles=8, vectorize_particles=True))
    after = bounds()
    assert all(map(math.isfinite, losses))
    assert_below_zero(after)
    assert_positive(after - before)


def jitted_loss_and_loss(name: str, role: str, device: torch.device) -> tuple[float, float]:
    """After some steps of training by a jitted loss: what the trace says, and what is so."""
    features = 2
    t = make(name, features, None, device)
    data = target(device).sample((20,))

    def layer() -> TransformedDistribution:
        pyro.module("layer", t)
        return TransformedDistribution(base(features, device=device).to_event(1), [t])

    def model() -> None:
        if role == "model":
            with pyro.plate("data", 20):
                pyro.sample("x", layer(), obs=data)
        else:
            pyro.sample("z", target(device))

    def guide() -> None:
        if role == "guide":
            pyro.sample("z", layer())

    jitted = JitTrace_ELBO(ignore_jit_warnings=True)
    train(model, guide, 10, jitted)
    pyro.set_rng_seed(1)
    compiled = float(jitted.loss_and_surrogate_loss(model, guide)[0])
    pyro.set_rng_seed(1)
    return compiled, Trace_ELBO().loss(model, guide)


#: Layers whose direction in use is made of formulas, or unfolds them stage by stage.
FORMULAS = [
    ("affine_autoregressive", "guide"),
    ("affine_autoregressive-forward", "model"),
    ("batchnorm-inverse", "model"),
    ("block_autoregressive", "model"),
    ("matrix_exponential", "guide"),
    ("planar", "guide"),
    ("radial", "model"),
    ("spline_autoregressive", "guide"),
    ("spline_coupling", "guide"),
    ("spline_coupling", "model"),
]
#: Layers whose direction in use searches for a root.
SEARCHES = [
    ("block_autoregressive", "guide"),
    ("planar", "model"),
    ("polynomial", "guide"),
    ("sylvester", "model"),
]


@pytest.mark.parametrize(("name", "role"), FORMULAS)
def test_jitted_loss_follows_the_parameters(name: str, role: str, device: torch.device) -> None:
    """What is traced at the start, near the identity, holds where training leads."""
    compiled, expected = jitted_loss_and_loss(name, role, device)
    # In a trace, constants of Pyro's distributions are of the default precision.
    torch.testing.assert_close(compiled, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "role"), slow_but_for([("planar", "model")], SEARCHES))
def test_a_traced_search_takes_a_fixed_number_of_steps(
    name: str, role: str, device: torch.device
) -> None:
    """Not those few that were enough at the identity, where it was traced."""
    compiled, expected = jitted_loss_and_loss(name, role, device)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "context"), [case for case in CASES if case[0] in FAMILIES])
def test_param_store_restores_a_layer(name: str, context: int | None, device: torch.device) -> None:
    """The store brings a new layer to where the old one was; a layer of another name stays as it is."""
    t = moved(name, 2, context, device)
    pyro.module("layer", t)
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    again, other = make(name, 2, context, device), make(name, 2, context, device)
    pyro.module("layer", again, update_module_params=True)
    pyro.module("other", other, update_module_params=True)
    for (n, p), q, r in zip(
        t.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q), n
        assert torch.equal(pyro.param(f"layer$$${n}"), p)
        assert pyro.param(f"other$$${n}") is r
