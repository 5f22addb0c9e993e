"""Masked networks: what each output sees, and evaluation stage by stage."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from registry import perturbed
from torch import Tensor, nn
from torch.func import jacrev, vmap

from pyroflows.nn import MADE
from pyroflows.nn.stages import Unfolding

F64 = torch.float64
#: A diamond with a tail: 0 and 4 stand alone, 1 and 2 depend on 0, 3 on both of them, 5 on 3 and 4.
DIAMOND = torch.zeros(6, 6, dtype=torch.bool)
for child, parents in {1: [0], 2: [0], 3: [1, 2], 5: [3, 4]}.items():
    DIAMOND[child, parents] = True

NETS: dict[str, Callable[..., MADE]] = {
    "natural": lambda **kw: MADE(6, 2, (16, 12), **kw),
    "order": lambda **kw: MADE(6, 3, (16,), order=[3, 1, 5, 0, 2, 4], **kw),
    "residual": lambda **kw: MADE(6, 2, (16, 16, 16), residual=True, **kw),
    "graph": lambda **kw: MADE(6, 2, (16, 9), adjacency=DIAMOND, **kw),
    "linear": lambda **kw: MADE(6, 2, (), **kw),
    "bottleneck": lambda **kw: MADE(6, 2, (16, 6, 16), **kw),
    "two": lambda **kw: MADE(2, 1, (4,), **kw),
}


def sensitivities(net: MADE, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Which outputs of an entry, over all its parameters, react to which inputs."""
    jacobian = vmap(jacrev(lambda point: net(point, context)))(x)
    return jacobian.abs().sum((0, 1)) > 0


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("name", list(NETS))
def test_entries_see_exactly_what_they_may(name, context_features, device):
    net = perturbed(
        NETS[name](context_features=context_features, activation=nn.Tanh).to(device, F64)
    )
    x = torch.randn(20, net.features, dtype=F64, device=device)
    context = None if context_features is None else torch.randn(2, dtype=F64, device=device)
    seen = sensitivities(net, x, context)
    # With as many units as there are sets, or more, nothing that may be seen is hidden.
    assert torch.equal(seen, net.adjacency)
    if context is not None:
        by_context = jacrev(lambda c: net(x[0], c))(context)
        assert bool((by_context != 0).all())


def test_the_graph_of_an_order(device):
    net = MADE(4, 1, (8,), order=torch.tensor([2, 0, 3, 1])).to(device)
    expected = [
        [False, False, True, False],
        [True, False, True, True],
        [False] * 4,
        [True, False, True, False],
    ]
    assert net.adjacency.tolist() == expected
    assert net.stages == 4 and net.entries.tolist() == [2, 0, 3, 1]
    assert MADE(6, 1, (8,), adjacency=DIAMOND).stages == 4
    assert MADE(6, 1, (8,), adjacency=torch.zeros(6, 6).bool()).stages == 1


def test_few_units_hide_something_but_show_nothing_forbidden(device):
    net = perturbed(MADE(20, 2, (5, 4), activation=nn.Tanh).to(device, F64))
    seen = sensitivities(net, torch.randn(20, 20, dtype=F64, device=device))
    assert not bool((seen & ~net.adjacency).any())
    assert bool(seen[-1].any())


@pytest.mark.parametrize("width", [5, 6, 7, 12, 64])
def test_sets_share_the_units_evenly(width, device):
    net = MADE(6, 1, (width, width)).to(device)
    for layer in (0, 1):
        shares = torch.tensor((0, *net.unit_ends[layer])).diff()[
            1:
        ]  # without a context stage 0 needs no unit
        assert int(shares.max() - shares.min()) <= 1 and int(shares.sum()) == width
    with_context = MADE(6, 1, (12,), context_features=1).to(device)
    assert with_context.unit_ends[0] == (2, 4, 6, 8, 10, 12)


def test_is_what_the_formula_says(device):
    net = perturbed(MADE(3, 2, (4, 5), context_features=2, activation=nn.Tanh).to(device, F64))
    x, c = torch.randn(7, 3, dtype=F64, device=device), torch.randn(7, 2, dtype=F64, device=device)
    first, second, last = ((layer.weight * layer.mask, layer.bias) for layer in net.layers)
    h = (x @ first[0].mT + c @ net.context.weight.mT + first[1]).tanh()
    h = (h @ second[0].mT + second[1]).tanh()
    expected = (h @ last[0].mT + last[1]) / math.sqrt(5)
    torch.testing.assert_close(net(x, c), expected.reshape(7, 2, 3))
    assert {layer.mask.unique().numel() for layer in net.layers} == {2}


def test_a_residual_layer_adds(device):
    net = perturbed(MADE(3, 1, (4, 4), activation=nn.Tanh, residual=True).to(device, F64))
    x = torch.randn(7, 3, dtype=F64, device=device)
    first, second, last = ((layer.weight * layer.mask, layer.bias) for layer in net.layers)
    z = x @ first[0].mT + first[1]
    z = z + z.tanh() @ second[0].mT + second[1]
    torch.testing.assert_close(net(x)[:, 0], (z.tanh() @ last[0].mT + last[1]) / 2)


def test_several_inputs_stand_for_one_entry(device):
    net = perturbed(
        MADE(4, 2, (8,), order=[1, 0, 3, 2], codes=3, activation=nn.Tanh).to(device, F64)
    )
    seen = sensitivities(net, torch.randn(9, 12, dtype=F64, device=device))
    assert torch.equal(seen, net.adjacency.repeat(1, 3))


def test_one_feature_has_nothing_to_see(device):
    alone = MADE(1, 2, (8,)).to(device)
    assert [name for name, _ in alone.named_parameters()] == ["layers.0.bias"]
    x = torch.randn(5, 1, device=device)
    alone.start_at(torch.tensor([[1.0], [2.0]], device=device))
    assert alone(x).shape == (5, 2, 1) and alone(x)[3].flatten().tolist() == [1.0, 2.0]
    given = perturbed(MADE(1, 2, (8,), context_features=3).to(device))
    c = torch.randn(5, 3, device=device)
    out = given(x, c)
    assert out.shape == (5, 2, 1) and out.unique().numel() == 10
    torch.testing.assert_close(given(x + 1, c), out)


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("name", list(NETS))
def test_starts_where_it_is_told(name, context_features, device):
    net = NETS[name](context_features=context_features).to(device)
    values = torch.randn(net.outputs, net.features, device=device)
    net.start_at(values)
    x = torch.randn(5, net.features, device=device)
    out = net(x, None if context_features is None else torch.randn(5, 2, device=device))
    torch.testing.assert_close(out, values.expand_as(out))


def test_units_of_few_inputs_start_as_strong_as_those_of_many(device):
    """The spread of what goes into a unit does not depend on how many inputs its mask leaves."""
    torch.manual_seed(0)
    net = MADE(64, 1, (63 * 64,)).to(device)
    z = torch.randn(500, 64, device=device) @ (net.layers[0].weight * net.layers[0].mask).mT
    spread = z.square().mean(0).reshape(63, 64).mean(1).sqrt()
    # Weights are uniform on +-1/sqrt(n): n of them give 1/sqrt(3), up to the error of 64 units each.
    torch.testing.assert_close(spread, torch.full_like(spread, 3**-0.5), rtol=0.3, atol=0.0)


def stage_by_stage(net: MADE, x: Tensor, context: Tensor | None, in_place: bool) -> Tensor:
    weights = net.weights()
    columns = x.mT[net.entries]
    given = None if context is None else (context @ weights.context.mT).mT
    unfolding = Unfolding(net, weights, given, columns, in_place)
    parts = []
    for low, high in net.slices:
        parts.append(unfolding.parameters())
        unfolding.reveal(columns[low:high].unsqueeze(1))
    return torch.cat(parts)[net.places].permute(2, 1, 0)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("name", list(NETS))
def test_unfolds_to_the_same_output(name, context_features, in_place, device):
    net = perturbed(NETS[name](context_features=context_features).to(device, F64))
    x = torch.randn(7, net.features, dtype=F64, device=device)
    c = None if context_features is None else torch.randn(7, 2, dtype=F64, device=device)
    with torch.no_grad():
        torch.testing.assert_close(stage_by_stage(net, x, c, in_place), net(x, c))


def test_broadcasts_context(device):
    net = perturbed(MADE(3, 2, (8,), context_features=2).to(device, F64))
    x, c = (
        torch.randn(4, 1, 3, dtype=F64, device=device),
        torch.randn(5, 2, dtype=F64, device=device),
    )
    torch.testing.assert_close(net(x, c), net(x.expand(4, 5, 3), c.expand(4, 5, 2)))


def test_loads_another_order_with_its_masks(device):
    kept = perturbed(MADE(5, 2, (16, 8), order=[4, 2, 0, 1, 3]).to(device, F64))
    other = MADE(5, 2, (16, 8)).to(device, F64)
    other.load_state_dict(kept.state_dict())
    x = torch.randn(9, 5, dtype=F64, device=device)
    assert torch.equal(other(x), kept(x)) and other.slices == kept.slices
    assert torch.equal(stage_by_stage(other, x, None, True), stage_by_stage(kept, x, None, True))
    assert "entries" not in kept.state_dict() and not any(
        "mask" in key for key in kept.state_dict()
    )


def test_is_made_without_memory_and_filled_later(device):
    kept = perturbed(MADE(5, 2, (16, 8), order=[4, 2, 0, 1, 3]).to(device))
    with torch.device("meta"):
        made = MADE(5, 2, (16, 8), order=[4, 2, 0, 1, 3])
    assert {t.device.type for t in (*made.parameters(), *made.buffers())} == {"meta"}
    made = made.to_empty(device=device)
    made.load_state_dict(kept.state_dict())
    x = torch.randn(9, 5, device=device)
    assert torch.equal(made(x), kept(x))


def test_copies(device):
    net = perturbed(MADE(4, 2, (8,)).to(device))
    x = torch.randn(3, 4, device=device)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
        twin.load_state_dict(net.state_dict())
        assert torch.equal(twin(x), net(x))


def test_places_itself(placement):
    with placement:
        net = MADE(4, 2, (8,), context_features=1)
        x, c = torch.zeros(3, 4), torch.zeros(3, 1)
    out = net(x, c)
    assert out.shape == (3, 2, 4) and out.device.type == placement.type


CYCLE = torch.zeros(4, 4, dtype=torch.bool)
for child, parent in [(0, 3), (3, 1), (1, 3), (2, 0)]:
    CYCLE[child, parent] = True

MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "features": (lambda: MADE(0, 2), ValueError, "features >= 1; got 0"),
    "features-float": (lambda: MADE(2.0, 2), TypeError, "features to be an integer; got 2.0"),
    "parameters": (lambda: MADE(3, 0), ValueError, "parameters >= 1; got 0"),
    "hidden": (lambda: MADE(3, 2, 64), TypeError, "hidden to be a sequence of integers"),
    "hidden-zero": (lambda: MADE(3, 2, (8, 0)), ValueError, "hidden >= 1; got 0"),
    "context": (lambda: MADE(3, 2, context_features=0), ValueError, "context_features >= 1; got 0"),
    "activation": (lambda: MADE(3, 2, activation="relu"), TypeError, "activation to make a module"),
    "codes": (lambda: MADE(3, 2, codes=0), ValueError, "codes >= 1; got 0"),
    "order-short": (
        lambda: MADE(3, 2, order=[0, 1]),
        ValueError,
        "order to hold each of 0 .. 2 once; got [0, 1]",
    ),
    "order-twice": (
        lambda: MADE(3, 2, order=[0, 1, 1]),
        ValueError,
        "order to hold each of 0 .. 2 once; got [0, 1, 1]",
    ),
    "order-negative": (lambda: MADE(2, 2, order=[0, -1]), ValueError, "order >= 0; got -1"),
    "order-float": (
        lambda: MADE(2, 2, order=torch.tensor([0.0, 1.0])),
        TypeError,
        "order to be an integer; got 0.0",
    ),
    "order-number": (
        lambda: MADE(2, 2, order=2),
        TypeError,
        "order to be a sequence of integers; got 2",
    ),
    "order-word": (
        lambda: MADE(2, 2, order="01"),
        TypeError,
        "order to be a sequence of integers; got '01'",
    ),
    "order-and-graph": (
        lambda: MADE(6, 2, order=range(6), adjacency=DIAMOND),
        ValueError,
        "order or adjacency, for",
    ),
    "residual": (
        lambda: MADE(3, 2, (8, 9), residual=True),
        ValueError,
        "one width for a residual network; got (8, 9)",
    ),
    "graph-shape": (
        lambda: MADE(3, 2, adjacency=DIAMOND),
        ValueError,
        "adjacency of shape (3, 3); got (6, 6)",
    ),
    "graph-numbers": (
        lambda: MADE(2, 2, adjacency=torch.eye(2)),
        TypeError,
        "adjacency to be boolean; got torch.float32",
    ),
    "graph-words": (
        lambda: MADE(2, 2, adjacency="ab"),
        TypeError,
        "adjacency to be a boolean matrix; got 'ab'",
    ),
    "graph-self": (
        lambda: MADE(2, 2, adjacency=torch.eye(2).bool()),
        ValueError,
        "got one where 0 depends on 0.",
    ),
    "graph-cycle": (
        lambda: MADE(4, 2, adjacency=CYCLE),
        ValueError,
        "one where 3 depends on 1, 1 depends on 3.",
    ),
    "graph-narrow": (
        lambda: MADE(6, 2, (8, 2), adjacency=DIAMOND),
        ValueError,
        "hidden of at least 3, one for each set that entries depend on in this adjacency; got 2",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_named(name):
    make, error, fragment = MISTAKES[name]
    with pytest.raises(error) as caught:
        make()
    assert fragment in str(caught.value)
