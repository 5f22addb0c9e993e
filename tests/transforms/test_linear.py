"""Linear maps: their matrices against formulas by hand, where they start, and that they get away from there."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from registry import NET, C, D, context_for, perturbed, points, tolerance
from torch import Tensor, nn
from torch.func import jacrev

from pyroflows.nn import mlp
from pyroflows.transforms import (
    Householder,
    LULinear,
    MatrixExponential,
    Orthogonal,
    Permute,
    Transform,
)
from pyroflows.transforms.orthogonal import accumulate, reflect

DTYPES = [torch.float32, torch.float64]
CLASSES: dict[str, Callable[..., Transform]] = {
    "householder": Householder,
    "orthogonal": Orthogonal,
    "lu-linear": LULinear,
    "matrix-exponential": MatrixExponential,
}
ROTATIONS = ("householder", "orthogonal")


def matrix_of(t: Transform, *context: Tensor) -> Tensor:
    """The matrix of a linear map, by autograd."""
    n = t.event_shape[0]
    return jacrev(lambda x: t.forward_and_log_det(x, *context)[0])(
        torch.zeros(n).to(next(t.parameters()))
    )


def make(name: str, *args: Any, device: torch.device, **options: Any) -> Transform:
    return perturbed(CLASSES[name](*args, **options).double(), 1.0).to(device)


# Matrices


@pytest.mark.parametrize("features", [1, 2, 5, 16])
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_are_orthogonal_with_determinant_one(name, features, device):
    matrix = matrix_of(make(name, features, device=device))
    eye = torch.eye(features, dtype=torch.float64, device=device)
    torch.testing.assert_close(matrix @ matrix.mT, eye)
    torch.testing.assert_close(torch.linalg.det(matrix), eye[0, 0])


@pytest.mark.parametrize("count", [2, 4, 6, 12])
def test_householder_is_the_product_of_its_reflections(count, device):
    t = make("householder", 5, reflections=count, device=device)
    expected = torch.eye(5, dtype=torch.float64, device=device)
    for v in t.raw.detach():
        expected = expected @ (torch.eye(5).to(v) - 2 * torch.outer(v, v) / v.square().sum())
    torch.testing.assert_close(matrix_of(t), expected)


def test_a_vector_of_zeros_reflects_nothing(device):
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    vectors = torch.zeros(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    y = reflect(vectors, x)
    assert torch.equal(y, x)
    assert bool(torch.autograd.grad(y.sum(), vectors)[0].isfinite().all())
    assert bool(accumulate(vectors)[0].isfinite().all())


def test_orthogonal_is_cayleys_map(device):
    t = make("orthogonal", 4, device=device)
    lower = t.raw.detach().tril(-1)
    skew, eye = lower - lower.mT, torch.eye(4, dtype=torch.float64, device=device)
    torch.testing.assert_close(matrix_of(t), torch.linalg.inv(eye - skew) @ (eye + skew))


def test_matrix_exponential_by_eigenvalues(device):
    t = make("matrix-exponential", 4, device=device)
    w, v = torch.linalg.eig(t.raw.detach())
    expected = (v @ torch.diag(w.exp()) @ torch.linalg.inv(v)).real
    torch.testing.assert_close(matrix_of(t), expected)
    log_det = t.forward_and_log_det(torch.zeros(4, dtype=torch.float64, device=device))[1]
    torch.testing.assert_close(log_det, w.real.sum())


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_lu_linear_is_the_product_of_its_factors(rotate, bias, device):
    t = make("lu-linear", 4, bias=bias, rotate=rotate, device=device)
    raw = t.raw.detach()
    lower, upper = raw[:4].tril(-1), raw[:4].triu(1)
    lower = lower + torch.eye(4).to(raw)
    upper = upper + torch.diag(t.signs * raw[:4].diagonal().exp())
    torch.testing.assert_close(matrix_of(t), (lower @ upper)[t.permutation])
    offset = t.forward_and_log_det(torch.zeros(4).to(raw))[0]
    torch.testing.assert_close(offset, raw[4] if bias else torch.zeros(4).to(raw))


@pytest.mark.parametrize("name", CLASSES)
def test_each_context_has_its_matrix(name, device):
    t = make(name, D, C, **NET, device=device)
    c = context_for(t, 5).to(device)
    x = points(t, 5).to(device)
    y, log_det = t.forward_and_log_det(x, c)
    offset = t.forward_and_log_det(torch.zeros_like(x), c)[0]
    for i in range(5):
        matrix = matrix_of(t, c[i])
        torch.testing.assert_close(y[i], matrix @ x[i] + offset[i])
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(matrix)[1])
    assert float((matrix_of(t, c[0]) - matrix_of(t, c[1])).abs().max().detach()) > 1e-3


# Where they start


@pytest.mark.parametrize("features", [1, 2, 3, 8])
def test_lu_linear_starts_at_a_rotation_of_its_seed(features, placement):
    t = LULinear(features, rotate=True, seed=4).double()
    matrix = matrix_of(t)
    close = {"rtol": 1e-6, "atol": 1e-6}  # it was made in single precision
    torch.testing.assert_close(
        matrix @ matrix.mT, torch.eye(features, dtype=torch.float64), **close
    )
    torch.testing.assert_close(
        torch.linalg.det(matrix), torch.ones((), dtype=torch.float64), **close
    )
    torch.manual_seed(123)
    torch.testing.assert_close(matrix_of(LULinear(features, rotate=True, seed=4).double()), matrix)
    if features > 1:
        other = matrix_of(LULinear(features, rotate=True, seed=5).double())
        assert float((other - matrix).detach().abs().max()) > 0.1
    moved = t.to(placement)
    assert (
        moved(torch.zeros(features, dtype=torch.float64, device=placement)).device.type
        == placement.type
    )


@pytest.mark.parametrize("features", [2, 3, 8])
def test_lu_linear_starts_at_a_slight_rotation_or_its_inverse(features, device):
    turned, back = (
        matrix_of(LULinear(features, rotate=angle, seed=4).to(device)).detach().double()
        for angle in (0.1, -0.1)
    )
    close = {"rtol": 1e-6, "atol": 1e-6}  # they were made in single precision
    torch.testing.assert_close(turned @ back, torch.eye(features).to(turned), **close)
    torch.testing.assert_close(turned.mT, back, **close)
    angles = torch.linalg.eigvals(turned).angle().abs()
    assert float(angles.square().sum()) == pytest.approx(2 * (features // 2) * 0.1**2, rel=1e-2)
    if features > 2:  # in a plane there are two of them
        assert not torch.equal(
            turned, matrix_of(LULinear(features, rotate=0.1, seed=5).to(device)).double()
        )


@pytest.mark.parametrize("angle", [4.0, -4, math.nan, math.inf])
def test_a_rotation_by_no_angle_is_refused(angle):
    with pytest.raises(ValueError, match="Expected rotate to be an angle between -pi and pi; got"):
        LULinear(3, rotate=angle)


@pytest.mark.parametrize("bias", [False, True])
def test_lu_linear_gives_one_point_what_it_gives_many(bias, device):
    """One product of the triangles serves many points; few points go through one triangle after the other."""
    t = make("lu-linear", 4, bias=bias, rotate=True, device=device)
    x = points(t, 7).to(device)
    together, alone = t(x), torch.stack([t(row) for row in x])
    torch.testing.assert_close(together, alone)
    weights = torch.randn_like(together)
    gradients = [torch.autograd.grad((y * weights).sum(), t.raw)[0] for y in (together, alone)]
    torch.testing.assert_close(*gradients)


def test_rotations_of_seeds_are_uniform(device):
    """The first entry of a uniform rotation in 3 dimensions is uniform between -1 and 1."""
    draws = torch.stack(
        [matrix_of(LULinear(3, rotate=True, seed=s).to(device))[0, 0].detach() for s in range(400)]
    )
    # Four standard errors of the mean of x and of x^2, of standard deviations 3^-1/2 and (4/45)^1/2.
    assert abs(float(draws.mean())) < 4 * (1 / 3 / 400) ** 0.5
    assert abs(float(draws.square().mean()) - 1 / 3) < 4 * (4 / 45 / 400) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reflections", [2, 6, 20])
def test_householder_starts_at_exactly_the_identity(dtype, reflections, device):
    t = Householder(6, reflections=reflections).to(device, dtype)
    x = torch.randn(10, 6, dtype=dtype, device=device)
    assert torch.equal(t(x), x) and torch.equal(t.inv(x), x)


@pytest.mark.parametrize("context_features", [None, C])
@pytest.mark.parametrize("name", CLASSES)
def test_learns_a_rotation(name, context_features, device):
    """Away from the start, which no gradient of zero may hold them at, and all the way."""
    t = CLASSES[name](3, context_features, **(NET if context_features else {})).double().to(device)
    target = torch.linalg.matrix_exp(
        torch.tensor([[0.0, -1.0, 0.5], [1.0, 0.0, -0.8], [-0.5, 0.8, 0.0]]).double()
    )
    x = points(t, 30).to(device)
    y = x @ target.to(device).mT
    c = (
        None
        if context_features is None
        else torch.ones(context_features, dtype=torch.float64, device=device)
    )
    optimizer = torch.optim.LBFGS(
        t.parameters(), max_iter=100, line_search_fn="strong_wolfe", tolerance_change=0.0
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (t.forward_and_log_det(x, c)[0] - y).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert float(loss().detach()) < 1e-8


def test_pairs_of_reflections_learn_different_things(device):
    t = Householder(6).double().to(device)
    x = points(t, 30).to(device)
    (grad,) = torch.autograd.grad((t(x) * points(t, 30, seed=7).to(device)).sum(), t.raw)
    assert bool(grad.abs().sum(-1).gt(0).all())
    assert torch.linalg.matrix_rank(grad[::2]) == 3


# Numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_hold_for_raw_parameters_of_any_size(name, dtype, device):
    for seed in range(5):
        t = perturbed(CLASSES[name](8).to(dtype), 20.0, seed).to(device)
        x = points(t, 50, dtype=dtype).to(device).requires_grad_()
        back, _ = t.inverse_and_log_det(t.forward_and_log_det(x)[0])
        torch.testing.assert_close(back, x, **tolerance(dtype, 1000))
        for grad in torch.autograd.grad(back.sin().sum(), [x, *t.parameters()]):
            assert bool(grad.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_compiles_as_one_graph(name, device):
    torch.compiler.reset()
    t = make(name, D, C, **NET, device=device)
    x, c = points(t, 5).to(device), context_for(t, 5).to(device)

    def there_and_back(x: Tensor) -> tuple[Tensor, ...]:
        y, log_det = t.forward_and_log_det(x, c)
        return y, log_det, *t.inverse_and_log_det(y, c)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for left, right in zip(compiled(x), there_and_back(x), strict=True):
        torch.testing.assert_close(left, right)


def test_pushing_a_score_solves_and_does_not_differentiate(device):
    """The score of a linear map needs no graph of its inverse."""
    for name in CLASSES:
        t = make(name, D, device=device)
        x, score = points(t, 4).to(device), points(t, 4, seed=5).to(device)
        with torch.no_grad():
            pushed = t.push_score(x, score)[2]
        torch.testing.assert_close(pushed @ matrix_of(t), score)


# Mistakes

MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "reflections-odd": (
        lambda: Householder(D, reflections=3),
        ValueError,
        "reflections to be even",
    ),
    "reflections-zero": (
        lambda: Householder(D, reflections=0),
        ValueError,
        "reflections >= 1; got 0",
    ),
    "reflections-float": (
        lambda: Householder(D, reflections=2.0),
        TypeError,
        "reflections to be an integer; got 2.0",
    ),
    "seed-negative": (lambda: LULinear(D, rotate=True, seed=-1), ValueError, "seed >= 0; got -1"),
    "seed-float": (lambda: LULinear(D, seed=1.5), TypeError, "seed to be an integer; got 1.5"),
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


def test_in_a_stack_with_a_permutation(device):
    t = make("lu-linear", D, rotate=True, device=device)
    both = torch.distributions.ComposeTransform([t, Permute(D).to(device)])
    x = points(t, 4).to(device)
    torch.testing.assert_close(both.inv(both(x).detach()), x)
