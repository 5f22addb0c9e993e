"""Every ready-made flow moves every entry of its vectors, whatever its options are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from registry import perturbed
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.nn import convnet, mlp
from pyroflows.univariate import Affine

Make = Callable[..., pf.Flow]

COUPLINGS = ["FlowPlusPlus", "Glow", "NICE", "NSF", "RealNVP"]
MASKED = ["BPF", "IAF", "MAF", "NAF", "SOSPF", "UNAF"]
OTHERS = ["BNAF", "FFJORD", "PlanarFlow", "RadialFlow", "ResidualFlow", "SylvesterFlow"]
#: Options that keep networks small.
QUICK: dict[str, dict[str, Any]] = {
    **{name: {"network": mlp((4,))} for name in (*COUPLINGS, *OTHERS[2:])},
    **{name: {"hidden": (8,)} for name in (*MASKED, "BNAF", "ResidualFlow")},
    "FFJORD": {"solver": "rk4", "steps": 2},
    "ResidualFlow": {"hidden": (8,)},
}


def settings(name: str) -> Iterator[dict[str, Any]]:
    """Numbers of layers with masks or orders and maps between, as far as a flow takes them.

    All of them for one flow of each kind, and every value at least once for the others.
    """
    masks: list[Any] = ["random", "half", "checkerboard", "alternating"]
    choices: dict[str, list[Any]] = {"transforms": [1, 2, 3], "mixing": [None, "lu", "permute"]}
    if name in COUPLINGS:
        choices["mask"] = masks
    if name in (*MASKED, "BNAF"):
        choices["order"] = ["alternating", "natural", "random"]
    if name in ("RealNVP", "MAF", "PlanarFlow"):
        rows = list(product(*choices.values()))
    else:
        turned = [(values * 4)[i : i + 4] for i, values in enumerate(choices.values())]
        rows = list(zip(*turned, strict=True))
    for values in rows:
        yield dict(zip(choices, values, strict=True))


def unmoved(flow: pf.Flow, context: Any = None) -> list[int]:
    """The entries of the origin on which neither parameters nor contexts have any effect."""
    t = flow.eval().transform
    move = t.forward_and_log_det if t.fast in ("both", "forward") else t.inverse_and_log_det
    origin = torch.zeros(1, *t.event_shape)
    with torch.no_grad():
        fresh, _ = move(origin, context)
        perturbed(flow, 0.5)
        moved, _ = move(origin, context)
    still = (moved - fresh).abs().flatten(1).amax(0) < 1e-6
    if context is not None:
        still |= moved.flatten(1).std(0) < 1e-6
    return still.nonzero().flatten().tolist()


@pytest.mark.parametrize("features", [2, 3, 4])
@pytest.mark.parametrize("name", [*COUPLINGS, *MASKED, *OTHERS])
def test_every_entry_moves(name, features):
    preset: Make = getattr(pf, name)
    for options in settings(name):
        flow = preset(features, **QUICK[name], **options)
        assert unmoved(flow) == [], options


@pytest.mark.parametrize("features", [2, 3])
@pytest.mark.parametrize("name", [*COUPLINGS, *MASKED, *OTHERS])
def test_every_entry_follows_the_context(name, features):
    preset: Make = getattr(pf, name)
    context = torch.randn(4, 2)
    for transforms in (1, 2):
        flow = preset(features, 2, transforms=transforms, **QUICK[name])
        assert unmoved(flow, context) == [], transforms


def test_one_coupling_more_moves_what_is_left():
    masks = torch.tensor([[True, False, True, True], [True, True, False, True]])
    moved = [pf.RealNVP(4, mask=masks, transforms=2, mixing=None), pf.NICE(4, transforms=1)]
    assert [len(flow.transform.layers) for flow in moved] == [3, 3]
    assert [unmoved(flow) for flow in moved] == [[], []]
    assert len(pf.NICE(4, transforms=2).transform.layers) == 3


def test_images_of_one_coupling_move_in_all_channels():
    flow = pf.flows.CouplingFlow(Affine(), (3, 4, 4), transforms=1, network=convnet((4,)))
    assert unmoved(flow) == []


# One feature


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("name", ["NSF", *MASKED, *OTHERS])
def test_one_feature_moves(name, context_features):
    quick = {k: v for k, v in QUICK[name].items() if name != "NSF"}
    context = None if context_features is None else torch.randn(4, context_features)
    for transforms in (1, 2):
        flow = getattr(pf, name)(1, context_features, transforms=transforms, **quick)
        assert flow(context).log_prob(torch.zeros(1)).isfinite().all()
        assert unmoved(flow, context) == []


@pytest.mark.parametrize("name", ["FlowPlusPlus", "Glow", "NICE", "RealNVP"])
@pytest.mark.parametrize("context_features", [None, 2])
def test_couplings_of_one_feature_say_what_to_take(name, context_features):
    with pytest.raises(ValueError, match="for it are MAF and NSF, which take contexts too"):
        getattr(pf, name)(1, context_features)


def test_a_spline_flow_of_one_feature_is_autoregressive():
    assert pf.NSF(1, 2).transform.fast == "inverse"
    assert pf.NSF(2).transform.fast == "both"
    assert pf.NSF(1, spline="circular")().sample((5,)).shape == (5, 1)
    with pytest.raises(ValueError, match="features >= 2 for a coupling"):
        pf.NSF(1, coupling=True)
    with pytest.raises(TypeError, match="Expected coupling to be True or False; got 'yes'"):
        pf.NSF(1, coupling="yes")


# Supports whose values have another shape than the features


@pytest.mark.parametrize(
    ("support", "shape", "needed"),
    [(constraints.simplex, (3,), 2), (constraints.corr_cholesky, (4, 4), 6)],
)
def test_a_support_says_how_many_features_its_values_need(support, shape, needed):
    fits = f"Values of shape {shape} with the support {support} need features={needed}."
    value = torch.ones(50, *shape)
    wrong = pf.RealNVP(3, support=support, transforms=2)
    for refused in (lambda: wrong().log_prob(value), lambda: pf.fit_density(wrong, value)):
        with pytest.raises(ValueError, match=re.escape(fits)):
            refused()
    assert pf.RealNVP(needed, support=support)().event_shape == shape


def test_a_support_that_keeps_shapes_has_no_advice():
    with pytest.raises(ValueError, match=r"shape \(\*, 3\); got \(4,\)\.$"):
        pf.RealNVP(3, support=constraints.positive)().log_prob(torch.ones(4))
    with pytest.raises(ValueError, match=r"shape \(\*, 4\); got \(\)\.$"):
        pf.RealNVP(3, support=constraints.simplex)().log_prob(torch.tensor(1.0))
