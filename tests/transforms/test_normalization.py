"""Layers that start from data: when they do, when they do not, and that densities stay exact meanwhile."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from registry import NET, C, D, context_for, normal_log_prob, perturbed, points
from torch import Tensor, nn
from torch.func import jacrev, vmap

import pyroflows as pf
from pyroflows.nn import mlp
from pyroflows.transforms import AffineCoupling, Compose, Transform
from pyroflows.transforms.glow import GlowStep
from pyroflows.transforms.linear import LULinear
from pyroflows.transforms.normalization import ActNorm, BatchNorm


def data(n: int, device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Points whose entries differ in mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return (torch.tensor([-3.0, 0.0, 50.0]) + torch.tensor([0.01, 1.0, 20.0]) * normal).to(
        device, dtype
    )


def state(t: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in t.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


# ActNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context_features", [None, C])
@pytest.mark.parametrize("shape", [(40, D), (5, 4, 2, D)])
def test_actnorm_standardises_the_first_batch_that_is_scored(
    shape, context_features, dtype, device
):
    t = ActNorm(D, context_features, **({} if context_features is None else NET)).to(device, dtype)
    y = data(40, device, dtype).reshape(shape)
    c = context_for(t, *shape[:-1], dtype=dtype)
    x, log_det = t.inverse_and_log_det(y, None if c is None else c.to(device))
    flat, eps = x.detach().reshape(-1, D), torch.finfo(dtype).eps
    # The mean of the first entry is 300 times its spread, so 300 roundings are lost.
    torch.testing.assert_close(flat.mean(0), torch.zeros(D).to(flat), rtol=0, atol=2000 * eps)
    torch.testing.assert_close(
        flat.std(0, correction=0), torch.ones(D).to(flat), rtol=0, atol=2000 * eps
    )
    expected = -y.reshape(-1, D).std(0, correction=0).log().sum()
    torch.testing.assert_close(
        log_det.detach(), expected.expand(shape[:-1]), rtol=2000 * eps, atol=2000 * eps
    )


def test_actnorm_starts_once(device):
    t = ActNorm(D).double().to(device)
    t.inverse_and_log_det(data(40, device))
    assert bool(t.initialized)
    before = state(t)
    t.inverse_and_log_det(5 * data(40, device) + 1)
    assert same(before, state(t))


NEVER: dict[str, Callable[[Transform, Tensor], Any]] = {
    "evaluation": lambda t, y: t.eval().inverse_and_log_det(y),
    "sampling": lambda t, y: t.forward_and_log_det(y),
    "sampling-by-call": lambda t, y: t(y),
    "log-det": lambda t, y: t.log_abs_det_jacobian(y, y),
    "score": lambda t, y: t.push_score(y, y),
    "no-point": lambda t, y: t.inverse_and_log_det(y[:0]),
    "one-point": lambda t, y: t.inverse_and_log_det(y[0]),
    "batch-of-one": lambda t, y: t.inverse_and_log_det(y[:1]),
    "vmap": lambda t, y: vmap(t.inverse_and_log_det)(y),
    "vmap-of-batches": lambda t, y: vmap(t.inverse_and_log_det)(y.unflatten(0, (2, -1))),
    "jacrev": lambda t, y: jacrev(lambda y: t.inverse_and_log_det(y)[0])(y),
}


@pytest.mark.parametrize("case", NEVER)
def test_actnorm_does_not_start(case, device):
    t = ActNorm(D).double().to(device)
    y = data(4, device)
    before = state(t)
    NEVER[case](t, y)
    assert same(before, state(t)) and not bool(t.initialized)
    t.train().inverse_and_log_det(y)
    assert bool(t.initialized)


def test_actnorm_does_not_start_in_a_compiled_graph(device):
    torch.compiler.reset()
    t = ActNorm(D).double().to(device)
    y = data(4, device)
    x, log_det = torch.compile(t.inverse_and_log_det, fullgraph=True, backend="aot_eager")(y)
    assert not bool(t.initialized) and torch.equal(x, y) and not bool(log_det.any())


def test_actnorm_waits_for_no_device(placement):
    """Once it has started it reads no value from the device, and on the meta device it never starts."""
    t = ActNorm(D).to(placement)
    y = torch.zeros(4, D, device=placement)
    for _ in range(2):
        x, log_det = t.inverse_and_log_det(y)
        assert x.device.type == log_det.device.type == placement.type
    started = ActNorm(D)
    started.inverse_and_log_det(data(4, torch.device("cpu"), torch.float32))
    assert started.to("meta").inverse_and_log_det(torch.zeros(4, D, device="meta"))[0].is_meta


def test_actnorm_leaves_what_training_has_moved(device):
    """Trained by its samples, it must not be thrown back by the first score."""
    for context_features in (None, C):
        t = perturbed(ActNorm(D, context_features).double()).to(device)
        before, c = state(t), context_for(t, 40)
        t.inverse_and_log_det(data(40, device), None if c is None else c.to(device))
        after = state(t)
        assert bool(after.pop("initialized")) and same(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_actnorm_of_awkward_data(dtype, device):
    """Constant entries, tiny and huge ones, and values that are no numbers leave no infinity."""
    y = data(40, device, dtype)
    y = torch.cat(
        [
            y,
            torch.full_like(y[:, :1], 0.1),
            torch.zeros_like(y[:, :1]),
            1e12 * y[:, 1:2],
            1e-12 * y[:, 1:2],
        ],
        -1,
    )
    t = ActNorm(7).to(device, dtype)
    x, log_det = t.inverse_and_log_det(y)
    assert bool(x.isfinite().all()) and bool(log_det.isfinite().all())
    log_scale = t.raw.detach()[0]
    assert float(log_scale[3]) == float(log_scale[4]) == 0.0
    spread = x.detach()[:, [0, 1, 2, 5, 6]].std(0, correction=0)
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        x.detach()[:, 3:5].abs().amax(0), torch.zeros(2).to(x), rtol=0, atol=1e-7
    )
    lost = ActNorm(2).to(device, dtype)
    lost.inverse_and_log_det(
        torch.tensor([[0.0, float("nan")], [1.0, 2.0]], device=device, dtype=dtype)
    )
    assert bool(lost.raw.isfinite().all()) and float(lost.raw.detach()[1, 0]) == 0.5


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "assign"])
def test_that_actnorm_has_started_is_saved(way, device):
    t = ActNorm(D).double().to(device)
    t.inverse_and_log_det(data(40, device))
    if way == "deepcopy":
        other = copy.deepcopy(t)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(t))
    else:
        other = ActNorm(D).double().to(device)
        other.load_state_dict(t.state_dict(), assign=way == "assign")
    other.inverse_and_log_det(3 * data(40, device))
    assert same(state(t), state(other))


def test_an_actnorm_that_has_not_started_is_saved_so(device):
    fresh, used = ActNorm(D).double().to(device), ActNorm(D).double().to(device)
    used.inverse_and_log_det(data(40, device))
    used.load_state_dict(fresh.state_dict())
    x, _ = used.inverse_and_log_det(data(40, device, seed=1))
    torch.testing.assert_close(x.detach().mean(0), torch.zeros(D).to(x), rtol=0, atol=1e-10)
    assert same(ActNorm(D).state_dict(), fresh.float().cpu().state_dict())


def test_actnorm_carries_gradients_from_the_first_batch_on(device):
    t = ActNorm(D).double().to(device)
    y = data(40, device).requires_grad_()
    x, log_det = t.inverse_and_log_det(y)
    (normal_log_prob(x) + log_det).sum().backward()
    # At the maximum of the likelihood of a diagonal normal, which is where it starts.
    torch.testing.assert_close(t.raw.grad, torch.zeros_like(t.raw), rtol=0, atol=1e-8)
    assert bool(y.grad.isfinite().all())


# BatchNorm


def test_batchnorm_weighs_batches(device):
    """The first sets the statistics, the k-th counts by 1 / k, until that is less than the momentum."""
    t = BatchNorm(D, momentum=0.3).double().to(device)
    mean, var = torch.full((2, D), float("nan"), dtype=torch.float64, device=device)
    for k in range(1, 6):
        x = data(10, device, seed=k)
        t.forward_and_log_det(x)
        weight = max(1 / k, 0.3)
        mean = x.mean(0) if k == 1 else (1 - weight) * mean + weight * x.mean(0)
        var = x.var(0) if k == 1 else (1 - weight) * var + weight * x.var(0)
        torch.testing.assert_close(t.running_mean, mean)
        torch.testing.assert_close(t.running_var, var)
        assert int(t.batches) == k


def test_batchnorm_in_evaluation_is_torchs(device):
    t = perturbed(BatchNorm(D, epsilon=1e-3).double()).to(device)
    theirs = nn.BatchNorm1d(D, eps=1e-3).double().to(device).eval()
    t.forward_and_log_det(data(40, device))
    with torch.no_grad():
        theirs.weight.copy_(t.raw[0].exp())
        theirs.bias.copy_(t.raw[1])
        theirs.running_mean.copy_(t.running_mean)
        theirs.running_var.copy_(t.running_var)
    x = data(10, device, seed=1)
    torch.testing.assert_close(t.eval().forward_and_log_det(x)[0], theirs(x))


@pytest.mark.parametrize("context_features", [None, C])
def test_batchnorm_is_exact_in_training_mode(context_features, device):
    """The statistics are updated first and then constants: the round trip and the log-determinant are those of one map."""
    t = perturbed(
        BatchNorm(D, context_features, **({} if context_features is None else NET)).double()
    ).to(device)
    c = context_for(t, 40)
    c = None if c is None else c.to(device)
    for seed in range(3):
        x = data(40, device, seed=seed)
        y, log_det = t.forward_and_log_det(x, c)
        back, inverse_log_det = t.inverse_and_log_det(y, c)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(inverse_log_det, -log_det)
        given = None if c is None else c[0]
        jacobian = jacrev(lambda x, given=given: t.forward_and_log_det(x, given)[0])(x[0])
        torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1])


FROZEN: dict[str, Callable[[BatchNorm, Tensor], Any]] = {
    "evaluation": lambda t, x: t.eval().forward_and_log_det(x),
    "inverse": lambda t, x: t.inverse_and_log_det(x),
    "sampling-from-its-inverse": lambda t, x: t.inv(x),
    "score-through-its-inverse": lambda t, x: t.inv.push_score(x, x),
    "no-point": lambda t, x: t.forward_and_log_det(x[:0]),
    "one-point": lambda t, x: t.forward_and_log_det(x[0]),
    "overflow": lambda t, x: t.forward_and_log_det(
        1e300 * torch.tensor([[1.0], [-1.0]]).to(x).expand(2, D)
    ),
    "not-a-number": lambda t, x: t.forward_and_log_det(torch.full_like(x, float("nan"))),
    "vmap": lambda t, x: vmap(t.forward_and_log_det)(x),
    "vmap-of-batches": lambda t, x: vmap(t.forward_and_log_det)(x.unflatten(0, (2, -1))),
    "jacrev": lambda t, x: jacrev(lambda x: t.forward_and_log_det(x)[0])(x),
}


@pytest.mark.parametrize("case", FROZEN)
def test_statistics_stay(case, device):
    t = BatchNorm(D).double().to(device)
    t.forward_and_log_det(data(40, device))
    before = state(t)
    FROZEN[case](t, data(4, device, seed=1))
    after = state(t)
    assert torch.equal(after["running_mean"], before["running_mean"])
    assert torch.equal(after["running_var"], before["running_var"])


def test_statistics_move_in_a_compiled_graph(device):
    torch.compiler.reset()
    t = BatchNorm(D).double().to(device)
    other = copy.deepcopy(t)
    compiled = torch.compile(t.forward_and_log_det, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = data(10, device, seed=seed)
        for left, right in zip(compiled(x), other.forward_and_log_det(x), strict=True):
            torch.testing.assert_close(left, right)
    assert int(t.batches) == 2
    torch.testing.assert_close(t.running_var, other.running_var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("context_features", [None, C])
def test_batchnorm_pushes_scores_as_by_autograd(training, inverted, context_features, device):
    norm = perturbed(
        BatchNorm(D, context_features, **({} if context_features is None else NET)).double()
    ).to(device)
    norm.forward_and_log_det(
        data(40, device), None if context_features is None else torch.zeros(C).double().to(device)
    )
    t = norm.inv if inverted else norm
    x, s = points(norm, 5).to(device), points(norm, 5, seed=4).to(device)
    c = context_for(norm, 5)
    c = None if c is None else c.to(device)
    own = t.train(training).push_score(x, s, c)
    expected = Transform.push_score(t.eval(), x, s, c)
    for left, right in zip(own, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_two_steps_forward_and_one_backward(device):
    """Statistics that move on leave earlier graphs as they were."""
    t = BatchNorm(D).double().to(device)
    x = data(10, device).requires_grad_()
    first = t.forward_and_log_det(x)
    scale = (first[0][1] - first[0][0]) / (x[1] - x[0])
    t.forward_and_log_det(data(10, device, seed=1))
    (grad,) = torch.autograd.grad(first[0].sum() + first[1].sum(), x)
    torch.testing.assert_close(grad, scale.detach().expand(grad.shape))


def test_batchnorm_without_data_is_the_identity(device):
    t = BatchNorm(D).to(device)
    x = torch.randn(1, D, device=device)
    assert torch.equal(t(x), x) and torch.equal(t.inv(x), x)


def test_batchnorm_normalises_data_of_a_density_flow(device):
    flow = pf.Flow([LULinear(D), BatchNorm(D).inv]).double().to(device)
    y = data(200, device)
    mean, spread = y.mean(0), (y.var(0) + 1e-5).sqrt()
    torch.testing.assert_close(
        flow().log_prob(y), torch.distributions.Normal(mean, spread).log_prob(y).sum(-1)
    )
    flow.eval()
    drawn = flow().sample((4000,))
    # Four standard errors of a mean and of a standard deviation.
    torch.testing.assert_close(
        (drawn.mean(0) - mean) / spread, torch.zeros(D).to(y), rtol=0, atol=4 / 4000**0.5
    )
    torch.testing.assert_close(
        drawn.std(0) / spread, torch.ones(D).to(y), rtol=0, atol=4 / 8000**0.5
    )


# GlowStep


def test_data_pass_the_step_of_glow_in_order(device):
    step = GlowStep(D, C, rotate=True, **NET).double().to(device)
    assert [type(layer) for layer in step.layers] == [AffineCoupling, LULinear, ActNorm]
    assert isinstance(step, Compose) and step.fast == "both" and step.context_features == C
    y, c = data(50, device), context_for(step, 50).to(device)
    step.inverse_and_log_det(y, c)
    x, _ = step.layers[2].inverse_and_log_det(y)
    torch.testing.assert_close(x.detach().std(0, correction=0), torch.ones(D).to(y))


def test_a_stack_of_steps_starts_standardised(device):
    """From the first batch on, each normalisation sees what those before it leave."""
    flow = pf.Flow([GlowStep(D, rotate=True, seed=k, **NET) for k in range(3)]).double().to(device)
    y = data(200, device)
    flow().log_prob(y)
    x = flow.transform.inverse_and_log_det(y)[0].detach()
    torch.testing.assert_close(x.square().mean(), torch.ones(()).to(x))
    assert all(bool(step.layers[2].initialized) for step in flow.transform.layers)


def test_a_reversible_stack_of_steps(device):
    """It starts from data as any other, and not from what its backward pass inverts."""
    torch.manual_seed(0)
    plain = pf.Flow([GlowStep(D, **NET) for _ in range(2)]).double().to(device)
    saving = pf.Flow(
        [copy.deepcopy(step) for step in plain.transform.layers], reversible=True
    ).double()
    y = data(50, device)
    x, _ = saving().rsample_and_log_prob((50,))
    x.sum().backward()
    assert not any(bool(step.layers[2].initialized) for step in saving.transform.layers)
    saving.zero_grad()
    for flow in (plain, saving):
        flow().log_prob(y).sum().backward()
    for left, right in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(left, right)
        torch.testing.assert_close(left.grad, right.grad)
    with pytest.raises(ValueError, match="BatchNorm, which changes with use"):
        Compose([BatchNorm(D)], reversible=True)


# Mistakes

CLASSES: dict[str, Callable[..., Any]] = {
    "ActNorm": ActNorm,
    "BatchNorm": BatchNorm,
    "GlowStep": GlowStep,
}
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "momentum-zero": (
        lambda: BatchNorm(D, momentum=0.0),
        ValueError,
        "momentum to be positive and finite; got 0.0",
    ),
    "momentum-large": (lambda: BatchNorm(D, momentum=1.5), ValueError, "momentum <= 1; got 1.5"),
    "momentum-word": (
        lambda: BatchNorm(D, momentum="0.1"),
        TypeError,
        "momentum to be a number; got '0.1'",
    ),
    "epsilon-zero": (
        lambda: BatchNorm(D, epsilon=0.0),
        ValueError,
        "epsilon to be positive and finite; got 0.0",
    ),
    "epsilon-nan": (
        lambda: BatchNorm(D, epsilon=float("nan")),
        ValueError,
        "epsilon to be positive and finite; got nan",
    ),
    "epsilon-none": (
        lambda: BatchNorm(D, epsilon=None),
        TypeError,
        "epsilon to be a number; got None",
    ),
    "glow-one": (lambda: GlowStep(1), ValueError, "For one feature use Elementwise instead."),
    "glow-mask": (
        lambda: GlowStep(D, mask="quarter"),
        ValueError,
        "half, checkerboard, alternating, random or a tensor",
    ),
    "glow-scale": (
        lambda: GlowStep(D, scale="tanh"),
        ValueError,
        "one of softclip, exp, softplus, sigmoid",
    ),
    "glow-bound": (
        lambda: GlowStep(D, bound=0),
        ValueError,
        "bound to be positive and finite; got 0",
    ),
    "glow-seed": (lambda: GlowStep(D, seed=-1), ValueError, "seed >= 0; got -1"),
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
