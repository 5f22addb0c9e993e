"""What transforms are given: every direction of every one checks it, and computes in one dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from registry import TRANSFORMS, context_for, kinds, points
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.transforms import Compose, Permute, Rescale, Reverse, Transform

HALVES = [torch.float16, torch.bfloat16]


def shape_of(t: Transform, name: str) -> torch.Size:
    """Shape of one point of a direction."""
    return t.image_shape if name in ("inverse_and_log_det", "pull_score", "inv") else t.event_shape


def ways(t: Transform, context: Tensor | None) -> dict[str, Callable[[Any], Any]]:
    """All ways to map a point, by name, with the context where there is one."""
    maps = {
        "forward_and_log_det": lambda x: t.forward_and_log_det(x, context),
        "inverse_and_log_det": lambda y: t.inverse_and_log_det(y, context),
        "push_score": lambda x: t.push_score(x, torch.zeros(t.event_shape), context),
        "pull_score": lambda y: t.pull_score(y, torch.zeros(t.image_shape), context),
    }
    fixed = t if context is None else t.condition(context)
    good = torch.zeros(t.image_shape)
    calls = {
        "call": fixed,
        "inv": fixed.inv,
        "log_abs_det_jacobian": lambda x: fixed.log_abs_det_jacobian(x, good),
    }
    return {**maps, **calls}


def refuses(call: Callable[[], Any], *fragments: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    sentence = str(caught.value)
    assert sentence.startswith("Expected ") and "\n" not in sentence
    assert any(fragment in sentence for fragment in fragments), sentence


@pytest.mark.parametrize("name", kinds(TRANSFORMS))
def test_every_direction_checks_points(name):
    t = TRANSFORMS[name]().eval()
    context = context_for(t, dtype=torch.float32)
    for way, move in ways(t, context).items():
        shape = shape_of(t, way)
        for wrong in (shape[:-1], (*shape[:-1], shape[-1] + 1), (5, *shape[:-1], shape[-1] + 2)):
            refuses(lambda x=torch.zeros(wrong), f=move: f(x), "of shape (*, ")
        for kind in (None, [0.0] * shape[-1], np.zeros(shape), 1.0):
            refuses(lambda x=kind, f=move: f(x), "to be a tensor of shape (*, ")
        for dtype in (torch.int64, torch.bool, torch.complex64):
            x = torch.zeros(shape).to(dtype)
            refuses(lambda x=x, f=move: f(x), "of a floating-point dtype")


@pytest.mark.parametrize("name", kinds(TRANSFORMS))
def test_every_direction_checks_contexts(name):
    t = TRANSFORMS[name]().eval()
    wrong: list[Any] = [torch.zeros(2)]
    if t.context_features is not None:
        good = torch.zeros(t.context_features)
        narrow, wide = good[1:], torch.zeros(5, t.context_features + 1)
        wrong = [None, narrow, wide, good.tolist(), good.numpy(), good.long(), torch.tensor(0.0)]
        unfit = torch.zeros(2, t.context_features)
        for move, shape in (
            (t.forward_and_log_det, t.event_shape),
            (t.inverse_and_log_det, t.image_shape),
        ):
            x = torch.zeros(3, *shape)
            refuses(lambda x=x, f=move: f(x, unfit), "that broadcasts against (3,)")
    for context in wrong:
        for way in ("forward_and_log_det", "inverse_and_log_det"):
            x = torch.zeros(shape_of(t, way))
            move = getattr(t, way)
            refuses(lambda x=x, c=context, f=move: f(x, c), "context")
        score = torch.zeros(t.event_shape)
        refuses(lambda c=context, s=score: t.push_score(s, s, c), "context")


def test_scores_have_the_shape_of_points():
    refuses(lambda: Rescale(3).push_score(torch.zeros(3), torch.zeros(2)), "score of shape (*, 3)")
    refuses(lambda: Rescale(3).pull_score(torch.zeros(3), None), "score to be a tensor")


def test_points_that_would_broadcast_are_refused():
    refuses(lambda: Rescale(3).forward_and_log_det(torch.zeros(5, 1)), "(*, 3); got (5, 1)")
    refuses(lambda: Permute(3).forward_and_log_det(torch.zeros(5, 7)), "(*, 3); got (5, 7)")


class Double(Transform):
    """A map of a user's own, which checks nothing."""

    def forward_and_log_det(self, x, context=None):
        """Doubles."""
        return 2 * x, torch.full_like(x, 2.0).log().sum(-1)

    def inverse_and_log_det(self, y, context=None):
        return y / 2, -torch.full_like(y, 2.0).log().sum(-1)


def test_maps_of_ones_own_are_checked_too():
    refuses(lambda: Double(3).forward_and_log_det(torch.zeros(2)), "x of shape (*, 3); got (2,)")
    refuses(lambda: Double(3).pull_score(torch.zeros(2), torch.zeros(2)), "y of shape (*, 3)")
    assert Double.forward_and_log_det.__doc__ == "Doubles."
    y, _ = Double(3).forward_and_log_det(x=torch.ones(3))
    torch.testing.assert_close(Double(3).inverse_and_log_det(y=y)[0], torch.ones(3))


# One dtype: that of the parameters


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", kinds(TRANSFORMS))
def test_results_are_in_the_dtype_of_the_parameters(name, own, device):
    t = TRANSFORMS[name]().eval().to(device, own)
    has_own = any(tensor.is_floating_point() for tensor in (*t.parameters(), *t.buffers()))
    x = points(t, 2).to(device)
    context = context_for(t, 2)
    context = None if context is None else context.to(device)
    exact = t.forward_and_log_det(x.to(own), None if context is None else context.to(own))
    for dtype in (torch.float64, torch.float32, *HALVES) if has_own else (own,):
        given = None if context is None else context.to(dtype)
        y, log_det = t.forward_and_log_det(x.to(dtype), given)
        assert y.dtype == log_det.dtype == own
        if dtype not in HALVES:
            torch.testing.assert_close((y, log_det), exact, rtol=1e-3, atol=1e-3)
        back, log_det = t.inverse_and_log_det(y.to(dtype), given)
        assert back.dtype == log_det.dtype == own
        fixed = t if given is None else t.condition(given)
        image = fixed(x.to(dtype))
        assert image.dtype == fixed.inv(image).dtype == own
        assert fixed.log_abs_det_jacobian(x.to(dtype), image).dtype == own


def test_gradients_reach_points_of_another_dtype(device):
    t = pf.transforms.AffineCoupling(3, 2).to(device)
    x = torch.randn(5, 3, dtype=torch.float64, device=device, requires_grad=True)
    context = torch.randn(2, dtype=torch.float64, device=device, requires_grad=True)
    y, _ = t.forward_and_log_det(x, context)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float64
    assert context.grad is not None and context.grad.dtype == torch.float64


def test_a_map_without_parameters_keeps_the_dtype(device):
    for dtype in (torch.float64, *HALVES):
        x = torch.zeros(2, 3, dtype=dtype, device=device)
        assert Compose([Reverse(3), Permute(3)]).to(device)(x).dtype == dtype


def test_a_fixed_context_follows_its_transform(device):
    t = Rescale(3, 2).to(device)
    fixed = t.condition(torch.ones(2, dtype=torch.float64, device=device))
    x = torch.ones(3, dtype=torch.float64, device=device)
    assert fixed(x).dtype == torch.float32
    t.double()
    assert fixed(x).dtype == torch.float64


class Shifted(Transform):
    """Reads the context itself."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward_and_log_det(self, x, context=None):
        return x + self.scale * context, x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y, context=None):
        return y - self.scale * context, y.new_zeros(y.shape[:-1])


def test_checks_are_taken_along_into_graphs(device):
    t = Shifted().to(device).requires_grad_(False)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    expected = (x + 1).float()

    def move(x: Tensor) -> Tensor:
        return t.forward_and_log_det(x, torch.ones_like(x))[0]

    compiled = torch.compile(move, backend="eager", fullgraph=True)
    for mapped in (compiled(x), torch.func.vmap(move)(x)):
        torch.testing.assert_close(mapped, expected)
    traced = torch.jit.trace(move, x)
    torch.testing.assert_close(traced(torch.cat([x, x])), torch.cat([expected, expected]))
    assert Shifted().to("meta").forward_and_log_det(
        torch.zeros(4, 3, device="meta"), torch.zeros(3, device="meta")
    )[0].shape == (4, 3)


def test_shapes_of_a_fixed_context_are_those_that_the_map_gives(device):
    t, x = Rescale(3, 2).to(device), torch.zeros(3, device=device)
    for batch in ((), (1,), (4, 1)):
        fixed = t.condition(torch.zeros(*batch, 2, device=device))
        assert fixed.forward_shape(x.shape) == fixed(x).shape == (*batch, 3)
        assert fixed.inverse_shape(x.shape) == fixed.inv(x).shape == (*batch, 3)


# Contexts that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.transforms.BlockAutoregressive(3, 2, hidden=(4,)),
        lambda: pf.transforms.ContinuousFlow(3, 2, hidden=(4,)),
        lambda: pf.transforms.ContinuousFlow(3, 2, hidden=(4,), adjoint=True),
        lambda: pf.transforms.Residual(3, 2, hidden=(4,)),
        lambda: pf.NAF(3, 2, transforms=1, units=2, hidden=(4,)).transform,
    ],
)
def test_a_context_that_is_not_finite_is_lost_alone(make, value, device):
    t = make().to(device)
    context = torch.zeros(3, 2, device=device)
    context[1, 0] = value
    y, log_det = t.forward_and_log_det(torch.ones(3, device=device), context.requires_grad_())
    expected = [True, False, True]
    assert y.isfinite().all(-1).tolist() == log_det.isfinite().tolist() == expected
    y[::2].sum().backward()
    assert context.grad is not None and bool(context.grad[::2].isfinite().all())
