"""Laws that every flow obeys."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro.distributions import constraints
from registry import (
    BASES,
    FLOWS,
    NET,
    SMALL,
    SUPPORTS,
    C,
    D,
    context_for,
    kinds,
    normal_log_prob,
    perturbed,
    points,
    tolerance,
)
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.func import functional_call, jacrev, vmap

import pyroflows as pf
from pyroflows.transforms import (
    AffineCoupling,
    Compose,
    Elementwise,
    LowerTriangularAffine,
    LULinear,
    Reverse,
)
from pyroflows.univariate import Affine

DTYPES = [torch.float32, torch.float64]
WITH_CONTEXT = [name for name, make in FLOWS.items() if make().context_features is not None]
#: The base or the support of these needs kernels that the meta device lacks.
NEEDS_KERNELS = {"realnvp-base-student", "realnvp-corr-cholesky", "realnvp-tails-student"}
#: Parts of torch that cannot take an empty batch: their own sums and solves fail.
NOT_EMPTY = {
    "realnvp-real-vector",
    *(f"realnvp-base-{n}" for n in ("multivariate", "low-rank", "transformed")),
}


#: Ready-made flows of layers that have their own laws.
STACKS = {
    *(
        "bpf",
        "ffjord",
        "residual-flow",
        "flow-plus-plus",
        "planar-flow",
        "radial-flow-context",
        "sospf",
    ),
    *("sylvester-flow", "unaf", "flow-gpd-tail", "realnvp-ordered", "realnvp", "nice-tensor"),
    *("realnvp-real-vector", "realnvp-mixing-actnorm", "realnvp-mixing-batchnorm"),
}


@pytest.fixture(params=kinds(FLOWS, STACKS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(name: str) -> Callable[[], pf.Flow]:
    return FLOWS[name]


@pytest.fixture
def moved(make: Callable[[], pf.Flow]) -> pf.Flow:
    return perturbed(make().double())


def onto(flow: pf.Flow) -> torch.distributions.Transform:
    return biject_to(constraints.real if flow.support is None else flow.support)


def density_by_hand(flow: pf.Flow, value: Tensor, c: Tensor | None) -> Tensor:
    """The change of variables written out, with log-determinants from autograd."""
    g, transform = onto(flow), flow.transform
    base = flow.base if flow.base.event_shape else flow.base.to_event(1)
    results = []
    for i, y in enumerate(value):
        z = g.inv(y)
        given = None if c is None else c[i]
        x, _ = transform.inverse_and_log_det(z, given)
        _, log_det = torch.linalg.slogdet(
            jacrev(lambda x, given=given: transform.forward_and_log_det(x, given)[0])(x)
        )
        log_det_onto = g.log_abs_det_jacobian(z, y).sum()
        results.append(base.log_prob(x) - log_det - log_det_onto)
    return torch.stack(results)


def given(
    flow: pf.Flow, *batch: int, dtype: torch.dtype = torch.float64
) -> pf.distributions.FlowDistribution:
    return flow(context_for(flow, *batch, dtype=dtype))


# The mathematics


def test_density_is_that_of_the_change_of_variables(moved):
    c = context_for(moved, 6)
    d = moved(c)
    y = d.sample(() if c is not None else (6,))
    torch.testing.assert_close(d.log_prob(y), density_by_hand(moved, y, c))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_flow_is_its_base(name, make, dtype):
    flow = make().to(dtype)
    if name == "flow":
        pytest.skip("permutes, by intention")
    d = given(flow, 5, dtype=dtype)
    y = d.sample(() if flow.context_features else (5,))
    g = onto(flow)
    x = g.inv(y)
    base = flow.base if flow.base.event_shape else flow.base.to_event(1)
    log_det = g.log_abs_det_jacobian(x, y)
    expected = base.log_prob(x) - (log_det.sum(-1) if g.codomain.event_dim == 0 else log_det)
    # Rotations that undo one another keep the rounding of their making, which was in single precision.
    rotated = any(isinstance(module, LULinear) for module in flow.modules())
    torch.testing.assert_close(
        d.log_prob(y), expected, **tolerance(torch.float32 if rotated else dtype, 1000)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_and_scores_agree(make, dtype):
    flow = perturbed(make().to(dtype))
    d = given(flow, 4, dtype=dtype)
    y, log_prob = d.rsample_and_log_prob((3,))
    assert y.dtype == log_prob.dtype == dtype
    assert y.shape == (3, *d.batch_shape, *d.event_shape)
    assert log_prob.shape == (3, *d.batch_shape)
    # Inverting what was drawn loses a few digits more than a round trip, for the support squeezes values.
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(d.log_prob(y.clone()), log_prob, **close)
    again = d.rsample((3,))
    torch.testing.assert_close(d.log_prob(again), d.log_prob(again.clone()), **close)
    assert bool(d.support.check(y).all())
    assert torch.distributions.constraints.is_dependent(d.support) is False


def test_shapes_and_broadcasting(name, moved):
    # Without a context, no batch but the empty tuple.
    for batch in [(), *([] if moved.context_features is None else [(5,), (2, 1, 3), (0,)])]:
        c = context_for(moved, *batch)
        d = moved(c)
        assert isinstance(d, pf.distributions.FlowDistribution) and isinstance(
            d, dist.TransformedDistribution
        )
        assert d.has_rsample
        assert d.batch_shape == (() if c is None else batch)
        assert d.event_shape == onto(moved).forward_shape(moved.event_shape)
        assert d.support.event_dim == len(d.event_shape)
        assert len(d.event_shape) >= 1
        for sample_shape in [(), (4,), *([] if name in NOT_EMPTY else [(2, 0)])]:
            shape = (*sample_shape, *d.batch_shape, *d.event_shape)
            for y in (
                d.sample(sample_shape),
                d.rsample(sample_shape),
                d.rsample_and_log_prob(sample_shape)[0],
            ):
                assert y.shape == shape
            assert d.log_prob(y).shape == (*sample_shape, *d.batch_shape)


@pytest.mark.parametrize("name", kinds(WITH_CONTEXT))
def test_value_and_context_broadcast(moved):
    c = context_for(moved, 3)
    one = moved(c[0])
    y = one.sample((4, 1))
    log_prob = moved(c).log_prob(y)
    assert log_prob.shape == (4, 3)
    rows = torch.stack([moved(c[i]).log_prob(y[:, 0]) for i in range(3)], -1)
    torch.testing.assert_close(log_prob, rows)


def test_expands(moved):
    d = given(moved, 3)
    batch = (2, 3)
    wide = d.expand(batch)
    assert isinstance(wide, pf.distributions.FlowDistribution) and wide.batch_shape == batch
    y = wide.sample()
    assert y.shape == (*batch, *d.event_shape)
    torch.testing.assert_close(wide.log_prob(y), d.log_prob(y.clone()))
    y, log_prob = wide.rsample_and_log_prob((5,))
    assert y.shape == (5, *batch, *d.event_shape) and log_prob.shape == (5, *batch)
    assert len(torch.unique(y.reshape(30, -1), dim=0)) == 30
    one = y[0, 0, 0]
    assert wide.log_prob(one).shape == batch
    torch.testing.assert_close(wide.log_prob(one), wide.log_prob(one.expand(y.shape[1:]).clone()))
    assert wide.expand((4, *batch)).batch_shape == (4, *batch)
    event = wide.to_event(1)
    assert event.batch_shape == (2,) and event.log_prob(wide.sample()).shape == (2,)


def test_gradients_reach_every_parameter(moved):
    d = given(moved, 7)
    y, log_prob = d.rsample_and_log_prob(() if moved.context_features else (7,))
    weights = torch.randn(y.shape, dtype=y.dtype)
    value = y.detach()
    for total in ((y * weights).sum() + log_prob.sum(), d.log_prob(value).sum()):
        for parameter_name, parameter in moved.named_parameters():
            (grad,) = torch.autograd.grad(total, parameter, retain_graph=True, allow_unused=True)
            assert grad is not None, parameter_name
            assert bool(grad.isfinite().all()) and bool(
                (grad.tril(-1) if parameter_name.endswith("lower") else grad).any()
            )


@pytest.mark.parametrize("name", kinds(WITH_CONTEXT))
def test_gradients_reach_the_context(moved):
    c = context_for(moved, 4).requires_grad_()
    d = moved(c)
    y = d.rsample()
    for total in (y.sum(), d.log_prob(y.detach()).sum()):
        (slope,) = torch.autograd.grad(total, c, retain_graph=True)
        assert bool(slope.isfinite().all()) and bool(slope.any())


def test_score_has_the_same_gradient_by_sampling_and_by_inverting(moved):
    """The total derivative of log q(y(params), params) is one, whichever way it was computed."""
    shape = () if moved.context_features else (7,)
    d = given(moved, 7)
    torch.manual_seed(3)
    y = d.rsample(shape)
    remembered = torch.autograd.grad(
        d.log_prob(y).sum(), list(moved.parameters()), allow_unused=True
    )
    torch.manual_seed(3)
    inverted = torch.autograd.grad(
        d.log_prob(d.rsample(shape).clone()).sum(), list(moved.parameters()), allow_unused=True
    )
    for left, right in zip(remembered, inverted, strict=True):
        left, right = (torch.zeros(()) if grad is None else grad for grad in (left, right))
        torch.testing.assert_close(
            *torch.broadcast_tensors(left.double(), right.double()), rtol=1e-6, atol=1e-6
        )


def test_path_gradient_is_that_of_sticking_the_landing(moved):
    """The path term of Pyro's score parts is the gradient through the sample alone, with the density held fixed."""
    if moved.support is not None:
        pytest.skip("only where the score is carried along")
    frozen = copy.deepcopy(moved)
    d, fixed = moved(context_for(moved, 7), path_gradient=True), given(frozen, 7)
    y = d.rsample(() if moved.context_features else (7,))
    parts = d.score_parts(y)
    torch.testing.assert_close(parts.entropy_term, d.log_prob(y))
    grads = torch.autograd.grad(
        parts.entropy_term.sum(), list(moved.parameters()), retain_graph=True, allow_unused=True
    )
    expected = torch.autograd.grad(
        fixed.log_prob(y).sum(), list(moved.parameters()), allow_unused=True
    )
    for left, right in zip(grads, expected, strict=True):
        left, right = (torch.zeros(()) if grad is None else grad for grad in (left, right))
        torch.testing.assert_close(
            *torch.broadcast_tensors(left.double(), right.double()), rtol=1e-6, atol=1e-6
        )


def test_gradient_with_respect_to_the_value(moved):
    d = given(moved, 4)
    y = d.sample(() if moved.context_features else (4,))
    value = y.clone().requires_grad_()
    (grad,) = torch.autograd.grad(d.log_prob(value).sum(), value)
    assert bool(grad.isfinite().all()) and bool(grad.any())


# Quadrature


def sinh_grid(width: float, n: int) -> tuple[Tensor, Tensor]:
    """Midpoints of the line, crowded at its centre, and the length that each stands for."""
    w = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1) * math.asinh(width)
    return w.sinh(), w.cosh() * 2 * math.asinh(width) / n


#: Maps onto each support written out by hand, with their log-determinants.
Onto = tuple[constraints.Constraint | None, Callable[[Tensor], tuple[Tensor, Tensor]]]
ONTO: dict[str, Onto] = {
    "none": (None, lambda z: (z, z.new_zeros(len(z)))),
    "positive": (constraints.positive, lambda z: (z.exp(), z.sum(-1))),
    "unit-interval": (
        constraints.unit_interval,
        lambda z: (z.sigmoid(), log_slope_of_sigmoid(z).sum(-1)),
    ),
    "interval": (
        constraints.interval(-2.0, 1.0),
        lambda z: (3 * z.sigmoid() - 2, (math.log(3.0) + log_slope_of_sigmoid(z)).sum(-1)),
    ),
    "simplex": (constraints.simplex, lambda z: softmax_onto_simplex(z)),
}
ORDERED: Onto = (
    constraints.ordered_vector,
    lambda z: (torch.stack([z[:, 0], z[:, 0] + z[:, 1].exp()], -1), z[:, 1]),
)


def log_slope_of_sigmoid(z: Tensor) -> Tensor:
    return nn.functional.logsigmoid(z) + nn.functional.logsigmoid(-z)


def softmax_onto_simplex(z: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.cat([z, torch.zeros_like(z[:, :1])], -1).softmax(-1)
    return p, p.log().sum(-1)


BASES_1D: dict[str, Callable[[], dist.TorchDistribution | None]] = {
    "standard": lambda: None,
    "laplace": lambda: dist.Laplace(torch.tensor([1.0]), 1.0).to_event(1),
    "logistic": lambda: dist.Logistic(torch.zeros(1), 1.0),
    "student": lambda: dist.StudentT(torch.tensor([3.0]), 0.5, 2.0).to_event(1),
}


@pytest.mark.parametrize("context_features", [None, C])
@pytest.mark.parametrize(
    ("base", "support"),
    [
        (base, support)
        for base in BASES_1D
        for support in ONTO
        if base != "student" or support in ("none", "positive")
    ],
)
@torch.no_grad()
def test_integrates_to_one_in_one_dimension(base, support, context_features):
    constraint, g = ONTO[support]
    layers = [
        Elementwise(Affine(), 1, context_features),
        LowerTriangularAffine(1, context_features),
        Elementwise(Affine("softplus"), 1).inv,
    ]
    flow = perturbed(pf.Flow(layers, base=BASES_1D[base](), support=constraint), 0.5).double()
    d = flow(None if context_features is None else torch.tensor([1.0, -1.0], dtype=torch.float64))
    z, length = sinh_grid({"none": 1e4, "positive": 700.0}.get(support, 36.0), 4000)
    y, log_det = g(z.unsqueeze(-1))
    total = (d.log_prob(y) + log_det).exp() @ length
    assert float(total) == pytest.approx(1.0, abs=1e-5 if base == "standard" else 1e-4)


FLOWS_2D: dict[str, Callable[..., pf.Flow]] = {
    "nice": lambda **kw: pf.NICE(2, transforms=3, **NET, **kw),
    "realnvp": lambda **kw: pf.RealNVP(2, transforms=3, **NET, **kw),
    "realnvp-context": lambda **kw: pf.RealNVP(2, C, transforms=3, **NET, **kw),
    # Far out its scales overflow, of which a matrix would make the difference of two infinities.
    "realnvp-softplus": lambda **kw: pf.RealNVP(
        2, transforms=3, scale="softplus", mixing=None, **NET, **kw
    ),
    "stack": lambda **kw: pf.Flow(
        [
            AffineCoupling(2, **NET),
            Reverse(2),
            Compose([AffineCoupling(2, **NET), LowerTriangularAffine(2)]).inv,
            LowerTriangularAffine(2),
        ],
        **kw,
    ),
}
BASES_2D: dict[str, Callable[[], dist.TorchDistribution]] = {
    "laplace": lambda: dist.Laplace(torch.zeros(2), 1.0).to_event(1),
    "multivariate": lambda: dist.MultivariateNormal(
        torch.tensor([1.0, -1.0]), scale_tril=torch.tensor([[1.0, 0.0], [0.8, 0.5]])
    ),
}


def grid_2d() -> tuple[Tensor, Tensor]:
    side, length = sinh_grid(100.0, 260)
    return torch.cartesian_prod(side, side), torch.outer(length, length).flatten()


@pytest.mark.parametrize(
    ("flow", "base", "support"),
    [
        *[(flow, None, "none") for flow in FLOWS_2D],
        *[("realnvp", None, support) for support in ("positive", "simplex", "ordered")],
        ("nice", None, "unit-interval"),
        *[("realnvp", base, "none") for base in BASES_2D],
        ("realnvp-context", "multivariate", "simplex"),
    ],
)
@torch.no_grad()
def test_integrates_to_one_in_two_dimensions(flow, base, support):
    constraint, g = {**ONTO, "ordered": ORDERED}[support]
    made = FLOWS_2D[flow](
        base=None if base is None else BASES_2D[base](), support=constraint
    ).double()
    d = perturbed(made, 0.4)(
        None if made.context_features is None else torch.tensor([0.5, -1.0], dtype=torch.float64)
    )
    z, cell = grid_2d()
    if support in ("unit-interval", "simplex", "ordered"):
        inside = z.abs().amax(-1) < 33  # beyond, float64 cannot tell the value from the border
        z, cell = z[inside], cell[inside]
    y, log_det = g(z)
    total = (d.log_prob(y) + log_det).exp() @ cell
    assert float(total) == pytest.approx(1.0, abs=1e-3)


@torch.no_grad()
def test_draws_follow_the_density():
    """Moments of draws against moments by quadrature."""
    d = perturbed(pf.RealNVP(2, transforms=3, **NET), 0.6).double()()
    z, cell = grid_2d()
    weight = d.log_prob(z).exp() * cell
    mean = (weight[:, None] * z).sum(0)
    square = (weight[:, None, None] * z[:, :, None] * z[:, None, :]).sum(0)
    y = d.sample((100_000,))
    error = 5 / math.sqrt(len(y))
    assert float((y.mean(0) - mean).abs().max()) < error * float(y.std(0).max())
    assert float((y.mT @ y / len(y) - square).abs().max()) < 3 * error * float(square.max())


# Bases and supports


@pytest.mark.parametrize("base", list(BASES))
def test_takes_any_base(base):
    expected = BASES[base]()
    expected = expected if expected.event_shape else expected.to_event(1)
    flow = pf.RealNVP(D, base=BASES[base](), **SMALL)
    x = points(flow, 6, dtype=torch.float32)
    torch.testing.assert_close(flow().log_prob(x), expected.log_prob(x))
    torch.testing.assert_close(
        flow.double()().log_prob(x.double()), expected.log_prob(x).double(), rtol=1e-5, atol=1e-5
    )
    assert flow().sample((3,)).dtype == torch.float64


def test_a_base_with_a_batch_gives_its_batch():
    flow = pf.RealNVP(D, base=dist.Normal(torch.zeros(7, D), 1.0).to_event(1), **SMALL)
    d = flow()
    assert d.batch_shape == (7,) and d.event_shape == (D,)
    assert d.log_prob(d.sample((2,))).shape == (2, 7)


def test_the_base_is_copied_not_borrowed():
    base = dist.Normal(torch.zeros(D), 1.0).to_event(1)
    flow = pf.RealNVP(D, base=base, **SMALL).double()
    assert base.mean.dtype == torch.float32 and flow().sample().dtype == torch.float64


@pytest.mark.parametrize("support", list(SUPPORTS))
def test_support_is_right(support):
    constraint = SUPPORTS[support]
    d = perturbed(pf.RealNVP(D, support=constraint, **SMALL))()
    y = d.sample((50,))
    assert bool(constraint.check(y).all())
    assert bool(d.support.check(y).all()) and d.support.check(y).shape == (50,)
    unconstrained = biject_to(d.support).inv(y)
    torch.testing.assert_close(biject_to(d.support)(unconstrained), y, rtol=1e-3, atol=1e-3)
    d = pf.RealNVP(D, support=constraint, **SMALL)()
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.full((*d.event_shape,), torch.nan))


def test_support_and_base_move_with_the_flow():
    flow = pf.RealNVP(
        D,
        base=BASES["transformed"](),
        support=constraints.interval(torch.zeros(D), torch.ones(D)),
        **SMALL,
    )
    flow.to("meta")
    with pyro.validation_enabled(False):
        d = flow()
        assert d.rsample((2,)).device.type == "meta"
        assert d.log_prob(torch.zeros(D, device="meta")).device.type == "meta"
    flow = pf.RealNVP(D, support=SUPPORTS["bounds"], **SMALL).double()
    assert flow().sample().dtype == torch.float64
    assert SUPPORTS["bounds"].lower_bound.dtype == torch.float32


def test_all_of_a_stack_shows_in_the_repr(make):
    flow = make()
    assert type(flow).__name__ in repr(flow)
    assert all(type(layer).__name__ in repr(flow) for layer in flow.transform.layers)
    words = {
        "both": "both directions",
        "forward": "sampling",
        "inverse": "scoring",
        "neither": "neither direction",
    }
    assert f"fast: {words[flow.transform.fast]}" in repr(flow)


# Saving, copying, moving


def same_density(original: pf.Flow, *others: pf.Flow) -> None:
    """Every one of the others scores the same values alike and draws alike from the same seed."""
    c = context_for(original, 3)
    y = original(c).sample(() if c is not None else (3,))

    def scores_and_draws(flow: pf.Flow) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return flow(c).log_prob(y.clone()), flow(c).sample((2,))

    expected = scores_and_draws(original)
    for other in others:
        for left, right in zip(scores_and_draws(other), expected, strict=True):
            assert torch.equal(left, right)


def test_state_dict_restores(make, moved):
    other = perturbed(make().double(), seed=7)
    given(other, 3).rsample()
    result = other.load_state_dict(moved.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    same_density(moved, other)


def test_copies_before_and_after_use(moved):
    def duplicates() -> list[pf.Flow]:
        buffer = io.BytesIO()
        torch.save(moved, buffer)
        buffer.seek(0)
        return [
            copy.deepcopy(moved),
            pickle.loads(pickle.dumps(moved)),
            torch.load(buffer, weights_only=False),
        ]

    size = len(pickle.dumps(moved))
    before = duplicates()
    d = given(moved, 50)
    y = d.rsample((20,))
    moved.transform(points(moved, 50)) if moved.context_features is None else None
    assert len(pickle.dumps(moved)) <= size + 200
    twins = [*before, *duplicates()]
    for twin in twins:
        assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in moved.parameters())
    same_density(moved, *twins)
    del y


def test_distributions_copy_and_pickle_without_their_memory(moved):
    with torch.no_grad():
        d = given(moved, 2)
        before = len(pickle.dumps(d))
        y = d.sample((100,))
        assert y.nbytes > 200
        assert len(pickle.dumps(d)) <= before + 200
        expected = d.log_prob(y.clone())
        for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
            assert torch.equal(twin.log_prob(y), expected)


def test_places_itself(name, make, placement):
    if name in NEEDS_KERNELS and placement.type == "meta":
        pytest.skip("the base draws by a kernel that meta lacks")
    flow = make().to(placement)
    c = context_for(flow, 4, dtype=torch.float32)
    check_placement(flow, None if c is None else c.to(placement), placement)


def test_is_made_in_place(name, make, placement):
    if name in NEEDS_KERNELS and placement.type == "meta":
        pytest.skip("the base draws by a kernel that meta lacks")
    # Bases, supports and masks are made where the user makes them.
    if ("base" in name or name in ("realnvp-bounds", "realnvp-masks")) and placement.type != "cpu":
        pytest.skip("placed by its user")
    with placement:
        flow = make()
        c = None if flow.context_features is None else torch.zeros(4, flow.context_features)
    assert {tensor.device.type for tensor in (*flow.parameters(), *flow.buffers())} <= {
        placement.type
    }
    check_placement(flow, c, placement)


def check_placement(flow: pf.Flow, c: Tensor | None, placement: torch.device) -> None:
    with pyro.validation_enabled(False):
        d = flow(c)
        y = d.rsample((2,))
        log_prob = d.log_prob(y.clone())
        assert y.device.type == log_prob.device.type == placement.type
        assert log_prob.shape == (2, *d.batch_shape)


@pytest.mark.parametrize(
    "name", ["realnvp-positive-context", "realnvp-base-transformed", "maf-context", "nsf", "glow"]
)
def test_every_way_of_drawing_keeps_the_device(make, placement):
    flow = make().to(placement)
    c = context_for(flow, 4, dtype=torch.float32)
    with pyro.validation_enabled(False):
        d = flow(None if c is None else c.to(placement))
        y = d.sample((2,))
        for tensor in (y, d.log_prob(y), *d.rsample_and_log_prob((2,))):
            assert tensor.device.type == placement.type


def test_follows_the_default_dtype(make):
    torch.set_default_dtype(torch.float64)
    flow = make()
    assert {p.dtype for p in flow.parameters()} == {torch.float64}
    assert pf.RealNVP(D, **SMALL)().sample().dtype == torch.float64


# torch.func and torch.compile


def test_vmap_over_values(moved):
    d = given(moved)
    y = d.sample((5,))
    with pyro.validation_enabled(False):
        d = given(moved)
        torch.testing.assert_close(vmap(d.log_prob)(y), d.log_prob(y))


@pytest.mark.parametrize("name", kinds(WITH_CONTEXT))
def test_vmap_over_contexts(moved):
    c = context_for(moved, 5)
    y = moved(c).sample()
    with pyro.validation_enabled(False):
        torch.testing.assert_close(
            vmap(lambda c, y: moved(c).log_prob(y))(c, y), moved(c).log_prob(y)
        )


def test_functional_call(make, moved):
    flow = make().double()
    c = context_for(flow, 3)
    y = moved(c).sample(() if c is not None else (3,))

    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self) -> Tensor:
            return self.flow(c).log_prob(y)

    score = Score()
    parameters = {f"flow.{n}": p for n, p in moved.named_parameters()}
    torch.testing.assert_close(functional_call(score, parameters, ()), moved(c).log_prob(y))


@pytest.mark.parametrize("name", slow_but_for(["realnvp-context"], ["nice", "realnvp-context"]))
def test_compiles_as_one_graph(moved):
    torch.compiler.reset()
    x, c = points(moved, 5), context_for(moved, 5)
    transform = moved.transform

    def both(x: Tensor) -> tuple[Tensor, ...]:
        y, log_det = transform.forward_and_log_det(x, c)
        return y, log_det, *transform.inverse_and_log_det(y, c)

    for left, right in zip(
        torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    "support", slow_but_for([constraints.positive], [None, constraints.positive])
)
def test_scoring_and_drawing_compile(support):
    torch.compiler.reset()
    flow = perturbed(pf.RealNVP(D, C, support=support, **SMALL).double())
    c = context_for(flow, 5)
    y = flow(c).sample()
    with pyro.validation_enabled(False):
        compiled = torch.compile(lambda y, c: flow(c).log_prob(y), backend="eager")
        torch.testing.assert_close(compiled(y, c), flow(c).log_prob(y))
        torch.testing.assert_close(compiled(y, c), flow(c).log_prob(y))


# Lifetimes


def test_distributions_die_without_the_cyclic_collector(moved):
    gc.disable()
    try:
        d = given(moved, 10)
        y = d.rsample((3,))
        loss = d.log_prob(y).sum() + d.log_prob(y.clone()).sum()
        loss.backward()
        wide = d.expand((10,))
        watched = [weakref.ref(o) for o in (d, wide, y, loss)]
        if moved.context_features is not None:
            watched.append(weakref.ref(d.transform))
        del d, y, loss, wide
        assert [w() for w in watched] == [None] * len(watched)
    finally:
        gc.enable()


def test_standard_normal_flow_by_hand():
    """One number that no code of the package computes."""
    flow = pf.Flow([Elementwise(Affine("exp"), 2)], support=constraints.positive)
    with torch.no_grad():
        flow.transform.layers[0].raw.copy_(torch.tensor([[math.log(2.0), 0.0], [1.0, -1.0]]))
    y = torch.tensor([[1.0, 2.0]])
    expected = (
        dist.LogNormal(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 1.0])).log_prob(y).sum(-1)
    )
    torch.testing.assert_close(flow().log_prob(y), expected)
    x = torch.randn(4, 2)
    torch.testing.assert_close(pf.Flow([Reverse(2)])().log_prob(x), normal_log_prob(x))


@pytest.mark.parametrize(
    "support",
    [
        constraints.positive,
        constraints.greater_than(2.0),
        constraints.interval(-1.0, 3.0),
        constraints.simplex,
    ],
    ids=str,
)
def test_the_support_of_a_flow_is_the_one_asked_for(support):
    # torch's own, the codomain of biject_to(support), is the whole space for some of these.
    d = pf.RealNVP(3, support=support)()
    assert bool(d.support.check(d.sample((50,))).all())
    assert not bool(d.support.check(torch.full(d.event_shape, -5.0)))
    latent = torch.distributions.biject_to(d.support)(torch.randn(20, 3))
    assert bool(d.support.check(latent).all())
