"""Every constructor with every shape: it works, with log-determinants of one number per point, or says why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from registry import perturbed

import pyroflows as pf
from pyroflows.nn import convnet
from pyroflows.transforms import Compose, Conditioned, Inverse, Transform
from pyroflows.univariate import Affine

SHAPES: list[Any] = [3, (3,), (2, 3), (4, 8, 8), 0, -1, 2.5, "3", True, (), (2, 0)]
#: What is made of other transforms, and the base class itself.
APART = {Compose, Conditioned, Inverse, Transform}
CLASSES: dict[str, type] = {
    name: owner
    for room in (pf.transforms, pf.flows)
    for name, owner in vars(room).items()
    if inspect.isclass(owner)
    and issubclass(owner, (Transform, pf.Flow))
    and owner not in {*APART, pf.Flow}
}
#: Options that spare an optional dependency.
OPTIONS: dict[str, dict[str, Any]] = {
    "ContinuousFlow": {"solver": "gbs"},
    "FFJORD": {"solver": "gbs"},
}


def make(name: str, shape: Any, **more: Any) -> Any:
    owner, options = CLASSES[name], {**OPTIONS.get(name, {}), **more}
    first = [Affine()] if "univariate" in inspect.signature(owner).parameters else []
    return owner(*first, shape, **options)


def judge(t: Transform) -> None:
    """Holds a transform to the shape of its log-determinants, and these to autograd's Jacobian."""
    n = t.event_shape.numel()
    x = 0.5 * torch.randn(2, *t.event_shape, dtype=torch.float64)
    y, log_det = t.forward_and_log_det(x)
    assert y.shape == x.shape and log_det.shape == (2,)

    def one(point: Any) -> Any:
        return t.forward_and_log_det(point)[0]

    for point, found in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(one, point).reshape(n, n)
        torch.testing.assert_close(jacobian.slogdet().logabsdet, found, rtol=1e-6, atol=1e-6)


#: Every class with every second shape, and every shape with every second class.
HALF = [
    (name, shape)
    for i, name in enumerate(CLASSES)
    for j, shape in enumerate(SHAPES)
    if (i + j) % 2 == 0
]


@pytest.mark.parametrize(("name", "shape"), HALF, ids=str)
def test_it_works_or_says_why(name, shape):
    try:
        made = make(name, shape)
    except (TypeError, ValueError) as error:
        sentence = str(error)
        parameters = inspect.signature(CLASSES[name]).parameters
        assert sentence.startswith("Expected ") and "\n" not in sentence
        assert any(word in sentence for word in ("features", *parameters)), sentence
        return
    module = perturbed(made.double().eval(), 0.1)
    judge(module.transform if isinstance(module, pf.Flow) else module)


ANY_RANK = ["ActNorm", "BatchNorm", "Elementwise", "LOFT", "Rescale", "Reverse", "Standardize"]
COUPLINGS = ["AdditiveCoupling", "AffineCoupling", "Coupling"]


@pytest.mark.parametrize("shape", [(2, 3), (4, 8, 8)], ids=str)
@pytest.mark.parametrize("name", [*ANY_RANK, *COUPLINGS])
def test_what_is_no_map_of_vectors_takes_any_rank(name, shape):
    network = {"network": convnet((4,), dims=len(shape) - 1)} if name in COUPLINGS else {}
    judge(perturbed(make(name, shape, **network).double().eval(), 0.1))


MAKES: dict[str, Callable[..., Any]] = {
    "Elementwise": lambda **options: pf.transforms.Elementwise(Affine(), 3, **options),
    "AffineCoupling": lambda **options: pf.transforms.AffineCoupling(3, **options),
    "LULinear": lambda **options: pf.transforms.LULinear(3, **options),
    "AffineAutoregressive": lambda **options: pf.transforms.AffineAutoregressive(3, **options),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(MAKES))
def test_a_context_of_any_shape_works_or_says_why(name, shape):
    sentence, t = "", None
    try:
        t = MAKES[name](context_shape=shape)
    except (TypeError, ValueError) as error:
        sentence = str(error)
    if t is None:
        assert sentence.startswith("Expected context_shape")
        return
    context = torch.randn(2, *t.context_shape, dtype=torch.float64)
    t = perturbed(t.double(), 0.1)
    x = torch.randn(2, 3, dtype=torch.float64)
    assert t.forward_and_log_det(x, context)[1].shape == (2,)
    judge(t.condition(context[0]))
