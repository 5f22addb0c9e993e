"""Planar, radial and Sylvester flows: against Pyro's, against autograd, by quadrature, and for parameters of any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.radial import ConditionedRadial
from registry import NET, C, D, context_for, normal_log_prob, perturbed, points
from torch import Tensor, nn
from torch.func import jacrev, vmap

import pyroflows as pf
from pyroflows.nn import mlp
from pyroflows.transforms import Transform
from pyroflows.transforms.planar import Planar, Radial, Sylvester, _above_minus_one, _radius

DTYPES = [torch.float32, torch.float64]
CLASSES: dict[str, Callable[..., Transform]] = {
    "planar": Planar,
    "radial": Radial,
    "sylvester": Sylvester,
}


def make(
    name: str, *args: Any, device: torch.device, scale: float = 1.0, seed: int = 1, **options: Any
) -> Transform:
    torch.manual_seed(seed)
    return perturbed(CLASSES[name](*args, **options).double(), scale, seed).to(device)


def set_raw(t: Transform, *parts: Tensor) -> None:
    with torch.no_grad():
        t.raw.copy_(torch.cat([part.flatten() for part in parts]))


# Against others


@pytest.mark.parametrize("seed", range(5))
def test_planar_is_pyros(seed, device):
    """Where w'u has to be moved the two ways differ, so both are given the same direction."""
    torch.manual_seed(seed)
    u, w, x = (
        torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((4,), (4,), (10, 4))
    )
    b = torch.randn((), dtype=torch.float64, device=device)
    theirs = ConditionedPlanar(params=lambda: (b, u, w))
    expected = theirs(x)
    expected_log_det = theirs.log_abs_det_jacobian(x, expected)
    moved = u + (nn.functional.softplus(w @ u) - 1 - w @ u) * w / w.square().sum()
    product = w @ moved
    raw = torch.where(product < 0, 0.999 * torch.log1p((product / 0.999).clamp(max=0)), product)
    t = Planar(4).double().to(device)
    set_raw(t, moved + (raw - product) * w / w.square().sum(), w, b)
    y, log_det = t.forward_and_log_det(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, expected_log_det)
    torch.testing.assert_close(t.inverse_and_log_det(expected)[0], x)


@pytest.mark.parametrize("seed", range(5))
def test_radial_is_pyros(seed, device):
    torch.manual_seed(seed)
    centre, x = (
        torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((4,), (10, 4))
    )
    alpha, beta = torch.randn(2, dtype=torch.float64, device=device).split(1)
    theirs = ConditionedRadial(params=lambda: (centre, alpha, beta))
    expected = theirs(x)
    expected_log_det = theirs.log_abs_det_jacobian(x, expected)
    alpha, beta = (
        nn.functional.softplus(alpha),
        nn.functional.softplus(beta) - nn.functional.softplus(alpha),
    )
    k = beta / alpha
    raw_k = torch.where(k < 0, 0.999 * torch.log1p((k / 0.999).clamp(max=0)), k)
    raw_alpha = torch.expm1(alpha - 1e-3).log() - math.log(math.expm1(0.999))
    t = Radial(4).double().to(device)
    set_raw(t, centre, raw_alpha, raw_k)
    y, log_det = t.forward_and_log_det(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        log_det, expected_log_det.squeeze(-1) if expected_log_det.dim() > 1 else expected_log_det
    )
    torch.testing.assert_close(t.inverse_and_log_det(expected)[0], x)


def test_sylvester_of_one_unit_is_planar(device):
    one = make("sylvester", 4, units=1, device=device)
    q, outer, inner, b = one._parts(None)
    t = Planar(4).double().to(device)
    w, u = (q * inner).squeeze(-1), (q * outer).squeeze(-1)
    product = w @ u
    raw = torch.where(product < 0, 0.999 * torch.log1p((product / 0.999).clamp(max=0)), product)
    set_raw(t, u + (raw - product) * w / w.square().sum(), w, b)
    x = points(t, 10).to(device)
    for left, right in zip(one.forward_and_log_det(x), t.forward_and_log_det(x), strict=True):
        torch.testing.assert_close(left, right)
    for left, right in zip(one.inverse_and_log_det(x), t.inverse_and_log_det(x), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("units", [1, 2, 4])
def test_sylvester_by_its_formula(units, device):
    t = make("sylvester", 4, units=units, device=device)
    q, outer, inner, b = (part.detach() for part in t._parts(None))
    torch.testing.assert_close(q.mT @ q, torch.eye(units, dtype=torch.float64, device=device))
    assert not bool(outer.tril(-1).any()) and not bool(inner.tril(-1).any())
    assert bool((outer.diagonal() * inner.diagonal() > -1).all())
    for x in points(t, 4).to(device):
        expected = x + q @ outer @ torch.tanh(inner @ q.mT @ x + b)
        torch.testing.assert_close(t.forward_and_log_det(x)[0], expected)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("features", [1, 2, 6])
def test_log_det_is_that_of_the_autograd_jacobian(name, features, device):
    for seed in range(4):
        t = make(name, features, device=device, scale=2.0, seed=seed)
        for x in points(t, 3).to(device):
            sign, expected = torch.linalg.slogdet(
                jacrev(lambda x, t=t: t.forward_and_log_det(x)[0])(x)
            )
            assert bool(sign == 1)
            torch.testing.assert_close(t.forward_and_log_det(x)[1], expected)
            _, expected = torch.linalg.slogdet(
                jacrev(lambda y, t=t: t.inverse_and_log_det(y)[0])(x)
            )
            torch.testing.assert_close(t.inverse_and_log_det(x)[1], expected)


# Densities


@pytest.mark.parametrize("context_features", [None, C])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_integrates_to_one_in_two_dimensions(name, context_features, device):
    t = make(name, 2, context_features, device=device, **({} if context_features is None else NET))
    c = None if context_features is None else context_for(t, 1).to(device)
    w = ((torch.arange(400, dtype=torch.float64, device=device) + 0.5) / 200 - 1) * math.asinh(
        100.0
    )
    side, length = w.sinh(), w.cosh() * math.asinh(100.0) / 200
    y, cell = torch.cartesian_prod(side, side), torch.outer(length, length).flatten()
    x, log_det = t.inverse_and_log_det(y, c)
    assert float((normal_log_prob(x) + log_det).exp() @ cell) == pytest.approx(1.0, abs=1e-3)


def test_a_stack_scores_data_that_it_never_drew(device):
    """Which Pyro's planar, radial and Sylvester cannot."""
    stack = pf.Flow([make(name, 2, device=device) for name in CLASSES]).to(device)
    d = stack()
    y = d.sample((50,))
    expected = d.log_prob(y)
    torch.testing.assert_close(d.log_prob(y.clone() + 0.0), expected)
    base = dist.Normal(torch.zeros(2, dtype=torch.float64, device=device), 1.0).to_event(1)
    theirs = dist.TransformedDistribution(base, [dist.transforms.Planar(2).double().to(device)])
    with pytest.raises(KeyError):
        theirs.log_prob(y)


def test_learns_from_data(device):
    """By the gradient through a numeric inverse."""
    torch.manual_seed(0)
    x = torch.randn(400, 2, dtype=torch.float64, device=device)
    data = torch.stack([x[:, 0], x[:, 1].sign() * 2 + 0.4 * x[:, 1]], -1)
    flow = pf.Flow([Planar(2), Radial(2), Sylvester(2), Planar(2)]).double().to(device)
    before = float(flow().log_prob(data).detach().mean())
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -flow().log_prob(data).mean()
        loss.backward()
        optimizer.step()
    assert float(-loss.detach()) > before + 0.5


# Parameters of any size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_extreme_parameters_and_points(name, dtype, device):
    for seed in range(8):
        t = make(name, 4, device=device, scale=20.0, seed=seed).to(dtype)
        for size in (1e-30, 1.0, 1e3, 1e30):
            x = (size * points(t, 20, dtype=dtype)).to(device).requires_grad_()
            outputs = (*t.forward_and_log_det(x), *t.inverse_and_log_det(x))
            grads = torch.autograd.grad(
                sum(value.mean() / max(size, 1.0) for value in outputs), [x, *t.parameters()]
            )
            for tensor in (*outputs, *grads):
                assert bool(tensor.isfinite().all())


@pytest.mark.parametrize("name", CLASSES)
def test_extreme_parameters_are_inverted(name, device):
    """The residual in y, for x itself is ill-conditioned: slopes reach 1e-3 and 1e5."""
    for seed in range(8):
        t = make(name, 4, device=device, scale=20.0, seed=seed)
        y = 10 * points(t, 50).to(device)
        x = t.inverse_and_log_det(y)[0].detach()
        again = t.forward_and_log_det(x)[0].detach()
        # What roundings of x make of y, by the Jacobian there.
        jacobian = vmap(jacrev(lambda x, t=t: t.forward_and_log_det(x)[0]))(x).detach()
        slack = torch.linalg.matrix_norm(jacobian, 2) * (x.norm(dim=-1) + y.norm(dim=-1))
        assert bool(((again - y).norm(dim=-1) <= 100 * torch.finfo(y.dtype).eps * slack).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_stay_above_minus_one(dtype, device):
    raw = torch.cat(
        [-torch.logspace(-30, 30, 200), torch.zeros(1), torch.logspace(-30, 30, 200)]
    ).to(device, dtype)
    value = _above_minus_one(raw)
    assert bool((value >= -0.999).all()) and bool((value[raw >= 0] == raw[raw >= 0]).all())
    assert bool((value[raw.argsort()].diff() >= 0).all())


@pytest.mark.parametrize("name", ["planar", "sylvester"])
def test_the_steepest_squeeze_is_inverted(name, device):
    """All along the line where the slope is 1e-3 in the middle and 1 outside."""
    t = CLASSES[name](1).double().to(device)
    with torch.no_grad():
        if name == "planar":
            set_raw(t, torch.tensor([-50.0]), torch.tensor([1.0]), torch.tensor([0.0]))
        else:
            set_raw(t, torch.ones(1), torch.tensor([-50.0]), torch.zeros(2))
    x = torch.linspace(-8, 8, 400, dtype=torch.float64, device=device).unsqueeze(-1)
    y, log_det = t.forward_and_log_det(x)
    assert float(log_det.detach().exp().min()) == pytest.approx(1e-3, rel=0.6)
    assert bool((y.squeeze(-1).diff() > 0).all())
    back, inverse_log_det = t.inverse_and_log_det(y)
    torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_radius_is_the_root_of_its_quadratic(dtype, device):
    target = (
        torch.cat([torch.zeros(1), torch.logspace(-30, 30, 121)]).to(device, dtype).unsqueeze(-1)
    )
    k = torch.tensor([-0.999, -0.5, 0.0, 1e-6, 1.0, 3.0, 1e4], dtype=dtype, device=device)
    s = _radius(target, k)
    assert bool((s >= 0).all()) and bool((s[0] == 0).all())
    slope = 1 + k / (1 + s) / (1 + s)
    eps = torch.finfo(dtype).eps
    # A few roundings of the root itself, or of the target.
    error = (s + k * s / (1 + s) - target).abs()
    assert bool((error <= 8 * eps * (s * slope + s * (1 + k.abs()) + target)).all())


def test_a_point_at_the_centre_stays_there(device):
    t = make("radial", D, device=device)
    x = t.raw[:D].detach().clone().requires_grad_()
    y, log_det = t.forward_and_log_det(x)
    torch.testing.assert_close(y, x)
    (grad,) = torch.autograd.grad(y.sum() + log_det, x)
    k = float(_above_minus_one(t.raw.detach()[-1]))
    torch.testing.assert_close(grad, torch.full_like(grad, 1 + k))
    assert float(log_det.detach()) == pytest.approx(D * math.log(1 + k))


# Derivatives and compilers


@pytest.mark.parametrize("name", CLASSES)
def test_second_derivatives_of_the_inverse(name, device):
    t = make(name, 2, device=device)
    y = points(t, 2).to(device).requires_grad_()
    assert torch.autograd.gradgradcheck(t.inverse_and_log_det, (y,))


@pytest.mark.parametrize("name", CLASSES)
def test_leaves_its_start(name, device):
    """What the identity hides, gradients find; units differ."""
    torch.manual_seed(0)
    t = CLASSES[name](4).double().to(device)
    x = points(t, 30).to(device)
    (grad,) = torch.autograd.grad((t(x) * points(t, 30, seed=7).to(device)).sum(), t.raw)
    with torch.no_grad():
        t.raw.sub_(0.1 * grad)
    (grad,) = torch.autograd.grad((t(x) * points(t, 30, seed=7).to(device)).sum(), t.raw)
    used = grad
    if name == "sylvester":
        outer, inner = grad[16:48].unflatten(0, (2, 4, 4))
        used = torch.cat(
            [grad[:16], grad[48:], *(m[torch.triu_indices(4, 4).unbind()] for m in (outer, inner))]
        )
    assert bool(used.ne(0).all()) and len(used.unique()) == len(used)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planar", "radial", "sylvester"])
def test_compiles_as_one_graph(name, device):
    torch.compiler.reset()
    t = make(name, 2, C, **NET, device=device, scale=0.3)
    x, c = points(t, 5).to(device), context_for(t, 5).to(device)

    def there_and_back(x: Tensor) -> tuple[Tensor, ...]:
        y, log_det = t.forward_and_log_det(x, c)
        return y, log_det, *t.inverse_and_log_det(y, c)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="eager")
    for left, right in zip(compiled(x), there_and_back(x), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    ("name", "fast"),
    [("planar", "sampling"), ("radial", "both directions"), ("sylvester", "sampling")],
)
def test_says_what_is_fast(name, fast, placement):
    t = CLASSES[name](D).to(placement)
    assert f"fast: {fast}" in repr(t)
    assert t.inv(torch.zeros(2, D, device=placement)).device.type == placement.type


# Mistakes

MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "units-zero": (lambda: Sylvester(D, units=0), ValueError, "units >= 1; got 0"),
    "units-float": (lambda: Sylvester(D, units=2.0), TypeError, "units to be an integer; got 2.0"),
    "units-many": (
        lambda: Sylvester(D, units=D + 1),
        ValueError,
        "units <= features, which are 3; got 4",
    ),
}
for owner, construct in CLASSES.items():
    for label, call, error, fragment in [
        ("features-zero", partial(construct, 0), ValueError, "features >= 1; got 0"),
        (
            "features-float",
            partial(construct, 3.0),
            TypeError,
            "features to be an integer; got 3.0",
        ),
        (
            "features-none",
            partial(construct, None),
            TypeError,
            "features to be an integer; got None",
        ),
        ("context-zero", partial(construct, D, 0), ValueError, "context_features >= 1; got 0"),
        (
            "context-float",
            partial(construct, D, 2.5),
            TypeError,
            "context_features to be an integer; got 2.5",
        ),
        (
            "hidden-int",
            lambda construct=construct: construct(D, C, network=mlp(64)),
            TypeError,
            "hidden to be a sequence",
        ),
        (
            "hidden-zero",
            lambda construct=construct: construct(D, C, network=mlp((8, 0))),
            ValueError,
            "hidden >= 1; got 0",
        ),
        (
            "activation",
            lambda construct=construct: construct(D, C, network=mlp(activation=nn.SiLU())),
            TypeError,
            "activation to make a module",
        ),
    ]:
        MISTAKES[f"{owner}-{label}"] = (call, error, fragment)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_sentence(name):
    call, error, fragment = MISTAKES[name]
    with pytest.raises(error) as info:
        call()
    message = str(info.value)
    assert (
        fragment in message
        and message.startswith("Expected ")
        and message.endswith(".")
        and "\n" not in message
    )
