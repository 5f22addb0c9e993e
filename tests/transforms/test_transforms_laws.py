"""Laws that every transform obeys."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro.distributions import ConditionalTransformedDistribution, TransformedDistribution
from registry import (
    AFFINE,
    MOVED,
    TRANSFORMS,
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
from torch.distributions import constraints
from torch.func import functional_call, jacrev, stack_module_state, vmap

from pyroflows.nn import mlp
from pyroflows.transforms import (
    AffineCoupling,
    Compose,
    Inverse,
    LowerTriangularAffine,
    Permute,
    Rescale,
    Transform,
)

DTYPES = [torch.float32, torch.float64]
BATCHES: list[tuple[int, ...]] = [(), (5,), (2, 1, 3), (0,), (4, 0)]
#: torch's functional_call leaves a module that occurs twice with the parameters it was lent.
ONCE = [name for name in TRANSFORMS if name != "compose-shared"]
WITH_CONTEXT = [name for name, make in TRANSFORMS.items() if make().context_features is not None]


@pytest.fixture(params=kinds(TRANSFORMS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(name: str) -> Callable[[], Transform]:
    return TRANSFORMS[name]


@pytest.fixture
def fresh(make: Callable[[], Transform]) -> Transform:
    return make().double()


@pytest.fixture
def moved(make: Callable[[], Transform]) -> Transform:
    return perturbed(make().double())


def given_context(t: Transform, *batch: int, dtype: torch.dtype = torch.float64) -> Transform:
    context = context_for(t, *batch, dtype=dtype)
    return t if context is None else t.condition(context)


# The mathematics


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(make, dtype):
    t = perturbed(make().to(dtype))
    x, c = points(t, 50, dtype=dtype), context_for(t, 50, dtype=dtype)
    y, log_det = t.forward_and_log_det(x, c)
    back, inverse_log_det = t.inverse_and_log_det(y, c)
    assert y.dtype == log_det.dtype == back.dtype == inverse_log_det.dtype == dtype
    torch.testing.assert_close(back, x, **tolerance(dtype))
    torch.testing.assert_close(inverse_log_det, -log_det, **tolerance(dtype))
    again, _ = t.forward_and_log_det(t.inverse_and_log_det(x, c)[0], c)
    torch.testing.assert_close(again, x, **tolerance(dtype))


def test_log_det_is_that_of_the_autograd_jacobian(moved):
    t = given_context(moved)
    for x in points(t, 2):
        sign, expected = torch.linalg.slogdet(jacrev(lambda x: t.forward_and_log_det(x)[0])(x))
        torch.testing.assert_close(t.forward_and_log_det(x)[1], expected)
        assert sign.abs() == 1
        _, expected = torch.linalg.slogdet(jacrev(lambda y: t.inverse_and_log_det(y)[0])(x))
        torch.testing.assert_close(t.inverse_and_log_det(x)[1], expected)


def test_float32_agrees_with_float64(make):
    single = perturbed(make())
    double = copy.deepcopy(single).double()
    x, c = points(single, 20), context_for(single, 20)
    for direction in ("forward_and_log_det", "inverse_and_log_det"):
        for low, high in zip(
            getattr(single, direction)(x.float(), None if c is None else c.float()),
            getattr(double, direction)(x, c),
            strict=True,
        ):
            torch.testing.assert_close(low.double(), high, **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_starts_at_the_identity(name, make, dtype):
    t = make().to(dtype)
    x, c = points(t, 20, dtype=dtype), context_for(t, 20, dtype=dtype)
    for y, log_det in (t.forward_and_log_det(x, c), t.inverse_and_log_det(x, c)):
        if name in MOVED:
            y, x = y.sort(-1).values, x.sort(-1).values
        torch.testing.assert_close(y, x, **tolerance(dtype, 4))
        torch.testing.assert_close(log_det, torch.zeros(20, dtype=dtype), **tolerance(dtype, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_holds_in_the_tails(name, make, dtype):
    """Affine maps far out, where the error may be a few roundings of the largest entry."""
    t = make().to(dtype) if name not in AFFINE else perturbed(make().to(dtype))
    sizes = torch.tensor([1e-30, 1e-10, 1e10, 1e30], dtype=dtype)
    x = sizes[:, None, None] * points(t, 4, 20, dtype=dtype)
    c = context_for(t, 4, 20, dtype=dtype)
    y, log_det = t.forward_and_log_det(x, c)
    back, inverse_log_det = t.inverse_and_log_det(y, c)
    assert bool(y.isfinite().all()) and bool(log_det.isfinite().all())
    torch.testing.assert_close(inverse_log_det, -log_det, **tolerance(dtype))
    # Beside a shift what is tiny may drown, but no more than that.
    scale = torch.maximum(x.abs(), y.abs()).amax(-1, keepdim=True)
    torch.testing.assert_close((back - x) / scale, torch.zeros_like(x), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "make", [lambda: Rescale(D), lambda: Permute(D), lambda: LowerTriangularAffine(D)]
)
def test_keeps_what_is_tiny(make, dtype):
    """Without a shift nothing drowns, however small."""
    t = perturbed(make().to(dtype))
    if isinstance(t, LowerTriangularAffine):
        nn.init.zeros_(t.loc)
    x = 1e-30 * points(t, 20, dtype=dtype)
    back = t.inverse_and_log_det(t.forward_and_log_det(x)[0])[0]
    torch.testing.assert_close(back / 1e-30, x / 1e-30, **tolerance(dtype))


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_values_and_gradients_are_finite_in_the_tails(name, moved, size):
    if name in {"affine-coupling-exp", "affine-coupling-softplus", "affine-coupling-sigmoid"}:
        pytest.skip("scales without bound overflow, as documented")
    t = given_context(moved)
    x = (size * points(t, 20)).requires_grad_()
    for f in (t.forward_and_log_det, t.inverse_and_log_det):
        y, log_det = f(x)
        assert bool(y.isfinite().all()) and bool(log_det.isfinite().all())
        for output in (y.sum(), log_det.sum()):
            if output.requires_grad:
                (grad,) = torch.autograd.grad(output, x, retain_graph=True, allow_unused=True)
                assert grad is None or bool(grad.isfinite().all())


# Shapes


def test_shapes(moved):
    for batch in BATCHES:
        x, c = points(moved, *batch), context_for(moved, *batch)
        for f in (moved.forward_and_log_det, moved.inverse_and_log_det):
            y, log_det = f(x, c)
            assert y.shape == x.shape
            assert log_det.shape == batch


@pytest.mark.parametrize("name", kinds(WITH_CONTEXT))
def test_broadcasts_context_against_batch(moved):
    x, c = points(moved, 4, 1), context_for(moved, 3)
    for f in (moved.forward_and_log_det, moved.inverse_and_log_det):
        y, log_det = f(x, c)
        expected, expected_log_det = f(x.expand(4, 3, D), c.expand(4, 3, C))
        assert y.shape == (4, 3, D) and log_det.shape == (4, 3)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(log_det, expected_log_det)
        assert f(x[0, 0], c)[0].shape == (3, D) and f(x[0, 0], c)[1].shape == (3,)
        assert f(x, c[0])[0].shape == (4, 1, D) and f(x, c[0])[1].shape == (4, 1)
        assert f(x[0, 0], c[:0])[0].shape == (0, D)
    conditioned = moved.condition(c)
    assert conditioned.forward_shape(torch.Size([4, 1, D])) == (4, 3, D)
    assert conditioned.inverse_shape(torch.Size([4, 1, D])) == (4, 3, D)


@pytest.mark.parametrize("name", kinds(WITH_CONTEXT))
def test_a_batch_of_contexts_fixed_in_a_stack(moved):
    """The batch of a fixed context is no part of the event."""
    c = context_for(moved, 4, 1)
    fixed = moved.condition(c)
    x = points(moved, 3)
    y, log_det = moved.forward_and_log_det(x, c)
    for t in (
        fixed,
        fixed.inv.inv,
        Inverse(fixed.inv),
        Compose([fixed]),
        Compose([fixed, Permute([0, 1, 2])]),
    ):
        assert t.event_shape == t.inv.event_shape == t.image_shape == t.inv.image_shape == (D,)
        torch.testing.assert_close(t(x), y)
        torch.testing.assert_close(t.inv(y), x.expand(4, 3, D))
        torch.testing.assert_close(t.inv(y[0]), fixed.inverse_and_log_det(y[0])[0])
        torch.testing.assert_close(t.log_abs_det_jacobian(x, t(x)), log_det)
        assert t.forward_shape(x.shape) == t.inv.forward_shape(x.shape) == (4, 3, D)
        d = TransformedDistribution(
            dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1), [t]
        )
        assert d.batch_shape == (4, 1) and d.event_shape == (D,)
        torch.testing.assert_close(d.log_prob(y), normal_log_prob(x) - log_det)


def test_rows_are_independent_and_memory_layout_does_not_matter(moved):
    x, c = points(moved, 3), context_for(moved, 3)
    for f in (moved.forward_and_log_det, moved.inverse_and_log_det):
        y, log_det = f(x, c)
        rows = [f(x[i], None if c is None else c[i]) for i in range(3)]
        torch.testing.assert_close(y, torch.stack([row[0] for row in rows]))
        torch.testing.assert_close(log_det, torch.stack([row[1] for row in rows]))
        strided = x.mT.contiguous().mT
        assert strided.shape == x.shape and (x.shape[-1] == 1 or not strided.is_contiguous())
        torch.testing.assert_close(f(strided, c)[0], y)
        expanded = x[:1].expand(3, *x.shape[1:])
        torch.testing.assert_close(f(expanded, c)[0], f(expanded.contiguous(), c)[0])
        every_other = x.repeat_interleave(2, 0)[::2]
        torch.testing.assert_close(f(every_other, c)[0], y)


def test_does_not_write_to_its_input(moved):
    x, c = points(moved, 6), context_for(moved, 6)
    kept = x.clone()
    for f in (moved.forward_and_log_det, moved.inverse_and_log_det):
        f(x, c)[0].detach().mul_(2.0)
        assert torch.equal(x, kept)


# Gradients


def test_gradients_reach_every_parameter(moved):
    x, c = points(moved, 7), context_for(moved, 7)
    for f in (moved.forward_and_log_det, moved.inverse_and_log_det):
        y, log_det = f(x, c)
        total = (y * points(moved, 7, seed=9)).sum() + log_det.sum()
        for parameter_name, parameter in moved.named_parameters():
            (grad,) = torch.autograd.grad(total, parameter, retain_graph=True, allow_unused=True)
            assert grad is not None, parameter_name
            assert bool(grad.isfinite().all()), parameter_name
            used = grad.tril(-1) if parameter_name.endswith("lower") else grad
            if grad.numel() > 1 or not parameter_name.endswith("lower"):
                assert bool(used.abs().sum() > 0), parameter_name


def test_gradients_are_those_of_finite_differences(moved):
    t = given_context(moved)
    x = points(t, 1).requires_grad_()  # rows are independent, by a law of their own
    torch.autograd.gradcheck(t.forward_and_log_det, (x,))
    torch.autograd.gradcheck(t.inverse_and_log_det, (x,))


def test_push_score_is_the_score_of_the_density(moved):
    x, c = points(moved, 6), context_for(moved, 6)
    y, log_det, score = moved.push_score(x, -x, c)
    expected, expected_log_det = moved.forward_and_log_det(x, c)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, expected_log_det)
    value = expected.detach().requires_grad_()
    back, inverse_log_det = moved.inverse_and_log_det(value, c)
    (of_density,) = torch.autograd.grad((normal_log_prob(back) + inverse_log_det).sum(), value)
    torch.testing.assert_close(score, of_density)
    assert not score.requires_grad


def test_push_score_agrees_with_the_default(moved):
    x, c = points(moved, 2, 3).requires_grad_(), context_for(moved, 3)
    s = points(moved, 2, 3, seed=8)
    for of_own, of_default in zip(
        moved.push_score(x, s, c), Transform.push_score(moved, x, s, c), strict=True
    ):
        torch.testing.assert_close(of_own, of_default)


def test_pull_score_is_the_push_of_the_inverse(moved):
    y, s, c = points(moved, 6), points(moved, 6, seed=4), context_for(moved, 6)
    x, log_det, score = moved.pull_score(y, s, c)
    for pushed in (moved.inv.push_score(y, s, c), Transform.pull_score(moved, y, s, c)):
        for left, right in zip(pushed, (x, log_det, score), strict=True):
            torch.testing.assert_close(left, right)
    back, _, again = moved.push_score(x.detach(), score, c)
    torch.testing.assert_close(back, y)
    torch.testing.assert_close(again, s)


def test_push_score_carries_the_gradients_of_the_map(moved):
    weights = points(moved, 6, seed=8)
    inputs = [points(moved, 6).requires_grad_(), *moved.parameters()]
    c = context_for(moved, 6)
    outputs = (moved.forward_and_log_det(inputs[0], c), moved.push_score(inputs[0], weights, c)[:2])
    totals = [(y * weights).sum() + log_det.sum() for y, log_det in outputs]
    expected, grads = (torch.autograd.grad(total, inputs, allow_unused=True) for total in totals)
    for left, right in zip(expected, grads, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("name", kinds(WITH_CONTEXT))
def test_push_score_broadcasts_context(moved):
    x, c, s = points(moved, 4, 1), context_for(moved, 3), points(moved, 4, 1, seed=8)
    expected = moved.push_score(x.expand(4, 3, D), s.expand(4, 3, D), c.expand(4, 3, C))
    for own in (moved.push_score(x, s, c), Transform.push_score(moved, x, s, c)):
        for left, right in zip(own, expected, strict=True):
            torch.testing.assert_close(left, right)


# What torch and Pyro ask for


def test_protocol(moved):
    t = given_context(moved)
    x = points(t, 5)
    y, log_det = t.forward_and_log_det(x)
    assert t.bijective
    assert t.domain.event_dim == t.codomain.event_dim == 1
    assert t.inv.domain.event_dim == t.inv.codomain.event_dim == 1
    with pytest.raises(AttributeError):
        _ = t.sign
    torch.testing.assert_close(t(x), y)
    torch.testing.assert_close(t.forward(x), y)
    torch.testing.assert_close(t.inv(y), x)
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y), log_det)
    torch.testing.assert_close(t.inv.log_abs_det_jacobian(y, x), -log_det)
    assert t.forward_shape(x.shape) == t.inverse_shape(x.shape) == y.shape
    assert t.with_cache(1) is t and t.with_cache(0) is t
    torch.testing.assert_close(torch.distributions.ComposeTransform([t, t.inv])(x), x)
    torch.testing.assert_close(dist.transforms.ComposeTransformModule([t]).inv(y), x)


def test_inverse_is_a_module_that_shares_parameters(moved):
    inverse = moved.inv
    assert isinstance(inverse, nn.Module) and isinstance(inverse, Transform)
    assert inverse.inv is moved
    assert moved.inv is inverse
    assert [id(p) for p in inverse.parameters()] == [id(p) for p in moved.parameters()]
    assert inverse.context_features == moved.context_features
    assert inverse.event_shape == moved.event_shape


def test_inverse_made_by_hand_is_its_own_twice_inverted(make):
    t = make()
    by_hand = Inverse(t)
    assert by_hand.inv is t
    assert by_hand.inv.inv.inv is t
    assert by_hand.inv.inv is t.inv


def test_hash_and_equality(make):
    t, other = make(), make()
    assert t == t and t != other and t != t.inv
    assert len({t, other, t, t.inv}) == 3
    assert hash(t) == hash(t)
    assert len(list(nn.ModuleList([t, other, t]).named_modules(remove_duplicate=True))) > 2


def test_repr_says_what_is_fast(make):
    t = make()
    assert type(t).__name__ in repr(t)
    words = {
        "both": "both directions",
        "forward": "sampling",
        "inverse": "scoring",
        "neither": "neither direction",
    }
    assert f"fast: {words[t.fast]}" in repr(t)
    swapped = {"forward": "inverse", "inverse": "forward"}.get(t.fast, t.fast)
    assert t.inv.fast == swapped and f"fast: {words[swapped]}" in repr(t.inv)


def test_in_pyros_own_distributions(moved):
    base = dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1)
    if moved.event_shape != (D,):
        base = dist.Normal(torch.zeros(moved.event_shape, dtype=torch.float64), 1.0).to_event(1)
    t = given_context(moved)
    plain = TransformedDistribution(base, [t])
    y = plain.rsample((4,))
    assert (
        plain.support.event_dim == 1
        and plain.event_shape == moved.event_shape
        and plain.batch_shape == ()
    )
    back, inverse_log_det = t.inverse_and_log_det(y)
    expected = normal_log_prob(back) + inverse_log_det
    torch.testing.assert_close(plain.log_prob(y), expected)
    torch.testing.assert_close(plain.log_prob(y.detach()), expected)
    torch.testing.assert_close(plain.expand((4,)).log_prob(y.detach()), expected)
    twice = TransformedDistribution(base, [t, t.inv])
    torch.testing.assert_close(twice.log_prob(y.detach()), normal_log_prob(y))


def test_in_pyros_conditional_distribution(moved):
    base = dist.Normal(torch.zeros(moved.event_shape, dtype=torch.float64), 1.0).to_event(1)
    conditional = ConditionalTransformedDistribution(base, [moved])
    c = context_for(moved, 4)
    d = conditional.condition(torch.zeros(4, C, dtype=torch.float64) if c is None else c)
    y = points(moved, 4)
    back, inverse_log_det = moved.inverse_and_log_det(y, c)
    torch.testing.assert_close(d.log_prob(y), normal_log_prob(back) + inverse_log_det)
    assert d.batch_shape == (() if c is None else (4,))
    assert d.rsample((2,)).shape == (2, *d.batch_shape, *moved.event_shape)
    conditional.clear_cache()
    d.clear_cache()


def test_is_trained_by_a_param_store(moved):
    """Pyro registers the module under its parameters' names; each counts once."""
    names = [n for n, _ in moved.named_parameters()]
    assert len(names) == len(set(names))
    holder = nn.ModuleList([moved, moved.inv])
    assert len(list(holder.parameters())) == len(names)


# Saving, copying, moving


def same_function(original: Transform, *others: Transform) -> None:
    x, c = points(original, 5), context_for(original, 5)
    for direction in ("forward_and_log_det", "inverse_and_log_det"):
        expected = getattr(original, direction)(x, c)
        for other in others:
            for left, right in zip(getattr(other, direction)(x, c), expected, strict=True):
                assert torch.equal(left, right)


def use(t: Transform, grad: bool = True) -> tuple[Any, ...]:
    """Calls a transform each way and returns everything that keeps its memory full."""
    with torch.set_grad_enabled(grad):
        t = given_context(t, 100)
        x = points(t, 100)
        y = t(x)
        return t, x, y, t.log_abs_det_jacobian(x, y), t.inv(y), t(x)


def test_state_dict_restores(make, moved):
    other = perturbed(make().double(), seed=5)
    use(other)
    result = other.load_state_dict(moved.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    same_function(moved, other)


def test_copies_before_and_after_use(moved):
    def duplicates() -> list[Transform]:
        return [copy.deepcopy(moved), pickle.loads(pickle.dumps(moved))]

    before = duplicates()
    kept = use(moved)
    shallow = copy.copy(moved)
    twins = [*before, *duplicates()]
    same_function(moved, shallow, *twins)
    for twin in twins:
        assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in moved.parameters())
        assert twin.inv.inv is twin
        assert twin.inv is not moved.inv
        x = points(twin, 3)
        t = given_context(twin)
        torch.testing.assert_close(t.inv(t(x)), x)
    assert [id(p) for p in shallow.parameters()] == [id(p) for p in moved.parameters()]
    del kept


def test_pickle_does_not_grow_with_use(moved):
    def size(t: Transform) -> int:
        buffer = io.BytesIO()
        torch.save(t, buffer)
        return len(pickle.dumps(t)) + buffer.tell()

    before = size(moved)
    for grad in (True, False):
        kept = use(moved, grad)
        # The names of a few more attributes at the most, nothing of the size of a batch.
        assert size(moved) <= before + 200
        del kept


def test_places_itself(make, placement):
    t = make().to(placement)
    x = points(t, 4, dtype=torch.float32).to(placement)
    c = context_for(t, 4, dtype=torch.float32)
    c = None if c is None else c.to(placement)
    check_placement(t, x, c)
    score = t.push_score(x, torch.ones_like(x), c)[2]
    assert score.device.type == x.device.type and score.dtype == x.dtype


def test_is_made_in_place(make, placement):
    with placement:
        t = make()
        x = torch.zeros(4, *t.event_shape)
        c = None if t.context_features is None else torch.zeros(4, t.context_features)
    assert {p.device.type for p in (*t.parameters(), *t.buffers())} <= {placement.type}
    check_placement(t, x, c)


def check_placement(t: Transform, x: Tensor, c: Tensor | None) -> None:
    given = t if c is None else t.condition(c)
    y = given(x)
    for tensor in (y, given.inv(y), given.log_abs_det_jacobian(x, y)):
        assert tensor.device.type == x.device.type and tensor.dtype == x.dtype
    assert y.shape == x.shape and given.log_abs_det_jacobian(x, y).shape == x.shape[:-1]
    assert t.inverse_and_log_det(x, c)[1].shape == x.shape[:-1]


def test_follows_dtype_and_default_dtype(make):
    assert all(p.dtype == torch.float64 for p in make().double().parameters())
    torch.set_default_dtype(torch.float64)
    t = make()
    assert all(p.dtype == torch.float64 for p in t.parameters())
    assert given_context(t)(points(t, 3)).dtype == torch.float64


# torch.func and torch.compile


def test_vmap_is_a_loop(moved):
    x, c = points(moved, 5), context_for(moved, 5)
    in_dims = (0, None if c is None else 0)
    for f in (moved.forward_and_log_det, moved.inverse_and_log_det):
        for mapped, expected in zip(vmap(f, in_dims)(x, c), f(x, c), strict=True):
            torch.testing.assert_close(mapped, expected)
    t = given_context(moved)
    y = t(x)
    torch.testing.assert_close(vmap(t)(x), y)
    torch.testing.assert_close(vmap(t.inv)(y), x)
    torch.testing.assert_close(vmap(t.log_abs_det_jacobian)(x, y), t.log_abs_det_jacobian(x, y))


@pytest.mark.parametrize("name", kinds(ONCE))
def test_functional_call(make, moved):
    start = make().double()
    x = points(moved, 5)
    t = given_context(start)
    expected = given_context(moved)(x)
    prefix = "transform." if t is not start else ""
    parameters = {prefix + n: p for n, p in moved.named_parameters()}
    used = t(x)
    torch.testing.assert_close(functional_call(t, parameters, (x,)), expected)
    torch.testing.assert_close(t(x), used)
    if t is start:
        inverted = functional_call(
            Inverse(t), {f"transform.{n}": p for n, p in moved.named_parameters()}, (expected,)
        )
        torch.testing.assert_close(inverted, x)


@pytest.mark.parametrize("name", kinds(ONCE))
def test_vmap_over_an_ensemble_of_parameters(make):
    members = [perturbed(make().double(), seed=s) for s in (1, 2)]
    parameters, buffers = stack_module_state(members)
    x, c = points(members[0], 4), context_for(members[0], 4)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = members[0]

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return *self.t.forward_and_log_det(x, c), *self.t.inverse_and_log_det(x, c)

    both = Both()
    state = {f"t.{n}": p for n, p in {**parameters, **buffers}.items()}
    results = (
        vmap(lambda s: functional_call(both, s, (x,)), randomness="error")(state) if state else None
    )
    for i, member in enumerate(members):
        expected = (*member.forward_and_log_det(x, c), *member.inverse_and_log_det(x, c))
        for index, tensor in enumerate(expected):
            if results is not None:
                torch.testing.assert_close(results[index][i], tensor)


#: Compose, Rescale, Permute and couplings by a stack; more by themselves in the slow runs.
COMPILED = ["lower-triangular-context", "compose-context"]
COMPILED_TOO = [
    "elementwise-affine-context",
    "inverse-coupling",
    "rescale",
    "permute",
    "additive-coupling",
    "conditioned",
    "elementwise-affine-softplus",
    "reverse",
    "lower-triangular",
    "affine-coupling-softclip",
    "affine-coupling-context",
    "compose",
]


def there_and_back(t: Transform, x: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
    y, log_det = t.forward_and_log_det(x, c)
    return y, log_det, *t.inverse_and_log_det(y, c)


@pytest.mark.parametrize("name", slow_but_for(COMPILED, [*COMPILED, *COMPILED_TOO]))
def test_compiles_as_one_graph(moved):
    torch.compiler.reset()
    x, c = points(moved, 5).requires_grad_(), context_for(moved, 5)
    compiled = torch.compile(partial(there_and_back, moved), fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(x, c), there_and_back(moved, x, c)
    for left, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(left, right)
    (grad,) = torch.autograd.grad(outputs[0].sin().sum() + outputs[1].sum(), x)
    (expected_grad,) = torch.autograd.grad(expected[0].sin().sum() + expected[1].sum(), x)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("name", slow_but_for(["compose"], ["affine-coupling-context", "compose"]))
def test_calls_compile_as_one_graph_before_and_after_use(moved):
    torch.compiler.reset()
    t = given_context(moved)
    compiled = torch.compile(
        lambda x: (t(x), t.inv(t(x)), t.log_abs_det_jacobian(x, t(x))),
        fullgraph=True,
        backend="eager",
    )
    x = points(t, 5)
    for _ in range(2):
        y, back, log_det = compiled(x)
        expected, expected_log_det = t.forward_and_log_det(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(log_det, expected_log_det)
        # Now memory is full, and must not reach into the graph.
        kept = t(x)
    perturbed(moved, seed=4)
    torch.testing.assert_close(compiled(x)[0], t.forward_and_log_det(x)[0])
    del kept


@pytest.mark.slow
def test_compiles_by_default_to_the_same_values():
    torch.compiler.reset()
    t = perturbed(
        Compose([AffineCoupling(D, network=mlp((8,))), LowerTriangularAffine(D)]).double()
    )
    x = points(t, 5)
    for left, right in zip(
        torch.compile(partial(there_and_back, t), fullgraph=True)(x, None),
        there_and_back(t, x, None),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


# Lifetimes


def test_conditioned_transforms_die_without_the_cyclic_collector(moved):
    c = (
        torch.zeros(100, C, dtype=torch.float64)
        if moved.context_features is None
        else context_for(moved, 100)
    )
    x = points(moved, 100)
    gc.disable()
    try:
        t = Compose([moved]).condition(c)
        inverse = t.inv
        y = t(x)
        loss = t.log_abs_det_jacobian(x, y).sum() + inverse(y).sum() + t(inverse(y)).sum()
        watched = [weakref.ref(o) for o in (t, inverse, x, y, loss)]
        del t, inverse, x, y, loss
        assert [w() for w in watched] == [None] * len(watched)
    finally:
        gc.enable()


# The base class by itself


class Squeezed(Transform):
    """A scalar map; events of rank 0 have a sign."""

    def __init__(self) -> None:
        super().__init__(())

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return x.sinh(), x.cosh().log()

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return y.asinh(), -0.5 * (1 + y.square()).log()


class Matrix(Transform):
    """Events of rank 2 that change their shape, fast to score only."""

    fast = "inverse"

    def __init__(self) -> None:
        super().__init__((2, 3))

    codomain = constraints.independent(constraints.real, 1)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return 2 * x.flatten(-2), torch.full(x.shape[:-2], 6.0, dtype=x.dtype).mul(
            torch.tensor(2.0).log()
        )

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return y.unflatten(-1, (2, 3)) / 2, -torch.full(y.shape[:-1], 6.0, dtype=y.dtype).mul(
            torch.tensor(2.0).log()
        )

    def forward_shape(self, shape: Any) -> torch.Size:
        return torch.Size([*shape[:-2], 6])

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size([*shape[:-1], 2, 3])


def test_a_scalar_map():
    t = Squeezed()
    x = torch.linspace(-2, 2, 7)
    assert t.sign == 1 and t.domain.event_dim == 0
    d = TransformedDistribution(dist.Normal(torch.zeros(7), 1.0), [t])
    assert d.batch_shape == (7,) and d.event_shape == ()
    assert d.log_prob(t(x)).shape == (7,)
    torch.testing.assert_close(t.inv(t(x)), x)


def test_a_map_that_changes_shape():
    t = Compose([Matrix(), Permute(6)])
    x = torch.randn(4, 2, 3)
    assert t(x).shape == (4, 6) and t.inv(t(x)).shape == (4, 2, 3)
    assert t.domain.event_dim == 2 and t.codomain.event_dim == 1
    assert t.inv.event_shape == (6,) and t.inv.inv is t
    assert t.forward_shape(x.shape) == (4, 6) and t.inverse_shape(torch.Size([4, 6])) == (4, 2, 3)
    assert t.inv.forward_shape(torch.Size([4, 6])) == (4, 2, 3)
    d = TransformedDistribution(dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), [t])
    assert d.event_shape == (6,) and d.batch_shape == ()
    assert d.log_prob(d.rsample((5,))).shape == (5,)
    score = t.push_score(x, torch.ones_like(x))[2]
    torch.testing.assert_close(score, torch.full((4, 6), 0.5))


def test_what_is_fast_follows_from_the_parts():
    assert "fast: scoring" in repr(Matrix())
    assert "fast: sampling" in repr(Matrix().inv)
    assert Compose([Matrix(), Permute(6)]).fast == "inverse"
    assert Compose([Permute(6), Matrix().inv]).fast == "forward"
    both_slow = Compose([Matrix(), Matrix().inv])
    assert "fast: neither direction" in repr(both_slow)
    assert both_slow.inv.fast == both_slow.fast


def test_a_conditioned_transform_is_fast_where_the_original_is():
    class OnlyScores(AffineCoupling):
        fast = "inverse"

    t = OnlyScores(D, C)
    assert t.condition(torch.zeros(C)).fast == "inverse"
    assert t.condition(torch.zeros(C)).inv.fast == "forward"


def test_a_base_without_mathematics_says_so():
    with pytest.raises(NotImplementedError, match="Transform does not define forward_and_log_det"):
        Transform(3)(torch.zeros(3))
    with pytest.raises(NotImplementedError, match="Transform does not define inverse_and_log_det"):
        Transform(3).inv(torch.zeros(3))
