"""Factories of networks, and what any module becomes that a transform is told to use."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.nn import MLP, ConvNet, Network, ResNet, Startable, convnet, mlp, resnet
from pyroflows.nn.network import make_network
from pyroflows.transforms import AffineCoupling, Elementwise, LULinear
from pyroflows.univariate import Affine


class Joined(nn.Module):
    """A network of the user's own, which joins its input and its context."""

    def __init__(self, inputs: int, outputs: int, context: int | None) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs + (context or 0), outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.linear(x if context is None else torch.cat([x, context], -1))


VECTORS: dict[str, Network] = {
    "mlp": mlp((8,)),
    "mlp-linear": mlp(()),
    "resnet": resnet(width=8),
    "own": lambda inputs, outputs, context: Joined(inputs, outputs, context),
}


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("name", list(VECTORS))
def test_starts_where_it_should_and_learns(name, context, device):
    start = torch.tensor([1.0, -2.0, 0.5])
    net = make_network(VECTORS[name], 4, start, context).to(device)
    assert isinstance(net, Startable)
    x = torch.randn(6, 5, 4, device=device)
    c = [] if context is None else [torch.randn(5, context, device=device)]
    torch.testing.assert_close(net(x, *c), start.to(device).expand(6, 5, 3))
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    target = torch.randn(6, 5, 3, device=device)
    losses = []
    for _ in range(30):
        loss = (net(x, *c) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("context", [None, 1])
@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_keep_positions_and_take_any_batch(context, dims, placement):
    positions = (6, 5)[:dims]
    net = make_network(convnet((4,), dims=dims), 2, torch.ones(3), context, positions)
    net.to(placement)
    x = torch.randn(4, 1, 2, *positions, device=placement)
    c = [] if context is None else [torch.randn(7, 1, *positions, device=placement)]
    assert net(x, *c).shape == (4, 7 if c else 1, 3, *positions)
    assert net(x[:0], *c).shape == (0, 7 if c else 1, 3, *positions)


def test_a_context_is_broadcast_as_in_a_loop(device):
    net = convnet((4,))(2, 3, 1).double().to(device)
    x = torch.randn(4, 1, 2, 5, 5, dtype=torch.float64, device=device)
    c = torch.randn(7, 1, 5, 5, dtype=torch.float64, device=device)
    together = net(x, c)
    for i in range(4):
        for j in range(7):
            torch.testing.assert_close(together[i, j], net(x[i, 0], c[j]))


def test_a_linear_layer_of_ones_own_is_a_network(device):
    own: Network = lambda inputs, outputs, context: nn.Linear(inputs, outputs)  # noqa: E731
    makes: list[Callable[[], Any]] = [
        lambda: AffineCoupling(3, network=own),
        lambda: Elementwise(Affine(), 3, 2, network=own).condition(torch.ones(2)),
        lambda: LULinear(3, 2, network=own).condition(torch.ones(2)),
        lambda: Elementwise(Affine(), (2, 3), context_shape=(2, 3), network=_pointwise).condition(
            torch.ones(2, 3)
        ),
    ]
    for make in makes:
        t = make().to(device)
        x = torch.randn(5, *t.event_shape, device=device)
        torch.testing.assert_close(t(x), x)
        (-pf.Flow([t])().log_prob(x).mean()).backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in t.parameters())


def _pointwise(inputs: int, outputs: int, context: int | None) -> nn.Module:
    return nn.Conv1d(inputs, outputs, 1)


def test_a_trial_changes_no_module():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            assert not self.training and not torch.is_grad_enabled()
            return super().forward(x)

    state = torch.get_rng_state()
    torch.manual_seed(0)
    nn.Linear(2, 3)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    net = make_network(lambda i, o, c: Counting(i, o), 2, torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), after)
    assert Counting.calls == 1 and net.training
    torch.set_rng_state(state)


@pytest.mark.parametrize("factory", [mlp((8,)), resnet(width=8), convnet((8,))])
def test_a_factory_is_plain_data(factory):
    again = pickle.loads(pickle.dumps(factory))
    assert again.func is factory.func and again.keywords == factory.keywords
    assert factory.func in (MLP, ResNet, ConvNet)


Mistake = tuple[Callable[[], Any], type[Exception], str]
MISTAKES: dict[str, Mistake] = {
    "number": (
        lambda: AffineCoupling(3, network=64),
        TypeError,
        "network to make a module of (inputs, outputs, context), as mlp() does; got 64.",
    ),
    "module": (lambda: AffineCoupling(3, network=nn.Linear(1, 4)), TypeError, "as mlp() does"),
    "class": (lambda: AffineCoupling(3, network=nn.Linear), TypeError, "as mlp() does"),
    "no module": (lambda: AffineCoupling(3, network=lambda i, o, c: 3), TypeError, "got <function"),
    "no context": (
        lambda: AffineCoupling(3, 2, network=lambda i, o, c: nn.Linear(i, o)),
        TypeError,
        "x of shape (*, 1) and a context of shape (*, 2) and gives shape (*, 4); got Linear, which",
    ),
    "width": (
        lambda: AffineCoupling(3, network=lambda i, o, c: nn.Linear(i, 1)),
        ValueError,
        "gives shape (*, 4); got Linear, which gives (2, 1) for two points.",
    ),
    "resnet-width": (lambda: resnet(width=0), ValueError, "width >= 1; got 0"),
    "resnet-blocks": (lambda: resnet(blocks=0), ValueError, "blocks >= 1; got 0"),
    "resnet-activation": (lambda: resnet(activation="relu"), TypeError, "activation to make"),
    "mlp-hidden": (lambda: mlp(64), TypeError, "hidden to be a sequence"),
    "mlp-activation": (lambda: mlp(activation=nn.SiLU()), TypeError, "activation to make"),
    "convnet-hidden": (lambda: convnet(()), ValueError, "hidden with one layer at least"),
    "convnet-kernel": (lambda: convnet(kernel=2), ValueError, "kernel to be odd; got 2"),
    "convnet-dims": (lambda: convnet(dims=3), ValueError, "dims to be 1 for series or 2"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_one_sentence(name):
    make, error, fragment = MISTAKES[name]
    with pytest.raises(error) as caught:
        make()
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "network",
    [lambda inputs: nn.Linear(inputs, 1), lambda: nn.Linear(1, 1), mlp],
    ids=["one", "none", "mlp"],
)
def test_a_factory_takes_three_sizes(network: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected network to be called with .inputs, outputs, c"):
        pf.RealNVP(3, network=network)


def test_errors_inside_of_a_factory_are_left_alone() -> None:
    def network(inputs: int, outputs: int, context: int | None) -> nn.Module:
        raise KeyError(inputs)

    with pytest.raises(KeyError, match="1"):
        pf.RealNVP(3, network=network)


@pytest.mark.parametrize(
    ("shape", "network", "advice"),
    [
        ((4, 8, 8), mlp(), r"An event with positions takes convnet\(\)\."),
        ((4, 8), mlp(), r"An event with positions takes convnet\(dims=1\)\."),
        ((4,), convnet(), r"A vector takes mlp\(\) or resnet\(\)\."),
    ],
)
def test_a_network_for_other_events_is_told(shape: Any, network: Any, advice: str) -> None:
    with pytest.raises(TypeError, match=advice):
        AffineCoupling(shape, network=network)


def test_no_factory_is_told_without_a_context_too() -> None:
    with pytest.raises(TypeError, match="Expected network to make a module"):
        pf.PlanarFlow(3, network=nn.Linear(1, 1))
