"""What is remembered is never stale, and saves an inversion where it may."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import ConditionalTransformedDistribution, TransformedDistribution
from pyro.infer import SVI, Trace_ELBO
from registry import C, D, perturbed
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import pyroflows as pf
from pyroflows._memory import Memory
from pyroflows.nn import mlp
from pyroflows.transforms import (
    AffineCoupling,
    Compose,
    Elementwise,
    LowerTriangularAffine,
    Permute,
    Transform,
)
from pyroflows.univariate import Affine

NET = {"network": mlp((8,))}
PRESET = {"network": mlp((8,))}


def stack() -> Transform:
    return perturbed(Compose([AffineCoupling(D, **NET), Permute(D), LowerTriangularAffine(D)]))


def fresh_copy(module: nn.Module) -> nn.Module:
    """A copy, which remembers nothing."""
    return copy.deepcopy(module)


class Counted:
    """Counts the passes through a transform, of any instance, by direction."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        for direction in ("forward_and_log_det", "inverse_and_log_det"):
            original = getattr(Compose, direction)

            def counted(*args, original=original, direction=direction, **kwargs):
                self.calls[direction] += 1
                return original(*args, **kwargs)

            monkeypatch.setattr(Compose, direction, counted)

    @property
    def forward(self) -> int:
        return self.calls["forward_and_log_det"]

    @property
    def inverse(self) -> int:
        return self.calls["inverse_and_log_det"]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


class Kind:
    """A distribution over vectors, its module, and how to make it again with nothing in memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module = perturbed(self._module())
        self.context = torch.randn(5, C) if "context" in name else None

    def _module(self) -> nn.Module:
        if self.name == "flow":
            return pf.RealNVP(D, transforms=2, **PRESET)
        if self.name == "flow-positive":
            return pf.RealNVP(D, transforms=2, support=dist.constraints.positive, **PRESET)
        if self.name == "flow-context":
            return pf.RealNVP(D, C, transforms=2, **PRESET)
        if self.name == "plain":
            return stack()
        return Compose([AffineCoupling(D, C, **NET), LowerTriangularAffine(D, C, **NET)])

    def make(self, module: nn.Module | None = None) -> TransformedDistribution:
        module = self.module if module is None else module
        if isinstance(module, pf.Flow):
            return module(self.context)
        base = dist.Normal(torch.zeros(D), 1.0).to_event(1)
        if self.context is None:
            return TransformedDistribution(base, [module])
        return ConditionalTransformedDistribution(base, [module]).condition(self.context)

    def truth(self, value: Tensor) -> Tensor:
        """The density by a copy that remembers nothing, of a tensor never seen."""
        return self.make(fresh_copy(self.module)).log_prob(value.detach().clone())


@pytest.fixture(params=["flow", "flow-positive", "flow-context", "plain", "plain-context"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


def step(module: nn.Module, size: float = 0.1) -> None:
    """An optimiser step, in place as optimisers do."""
    optimiser = torch.optim.SGD(module.parameters(), lr=size)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    optimiser.zero_grad()


# Never stale


@pytest.mark.parametrize("no_grad", [False, True])
def test_scores_a_tensor_anew_after_an_optimiser_step(kind, no_grad):
    d = kind.make()
    with torch.set_grad_enabled(not no_grad):
        values = [d.sample((5,)), d.rsample((5,)), d.sample((5,)).clone()]
        for y in values:
            before = d.log_prob(y)
            torch.testing.assert_close(before, kind.truth(y), rtol=1e-4, atol=1e-4)
            step(kind.module)
            after = d.log_prob(y)
            torch.testing.assert_close(after, kind.truth(y), rtol=1e-4, atol=1e-4)
            assert float((after - before).detach().abs().min()) > 1e-4


def test_two_backward_passes_through_one_fixed_batch(kind):
    d = kind.make()
    data = d.sample((5,))
    grads = []
    for _ in range(3):
        kind.module.zero_grad()
        d.log_prob(data).sum().backward()
        grads.append([p.grad.clone() for p in kind.module.parameters() if p.grad is not None])
    assert grads[0]
    for left, middle, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, middle)
        torch.testing.assert_close(left, right)


def test_trains_on_a_fixed_batch(kind):
    data = kind.make().sample((64,)) * 1.5 + 0.1
    optimiser = torch.optim.Adam(kind.module.parameters(), lr=0.01)
    d, losses = kind.make(), []
    for _ in range(20):
        loss = -d.log_prob(data).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.testing.assert_close(d.log_prob(data), kind.truth(data), rtol=1e-4, atol=1e-4)


def test_two_scores_of_one_sample_and_one_backward(kind):
    d = kind.make()
    y = d.rsample((5,))
    first, second = d.log_prob(y), d.log_prob(y)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    (first.sum() + second.sum()).backward()


def test_two_backward_passes_through_one_evaluation():
    """What is remembered holds a graph, which can be walked back only once."""
    t = stack()
    x = torch.randn(5, D, requires_grad=True)
    y = t(x)
    for passes in (1, 2):
        t.log_abs_det_jacobian(x, y).sum().backward()
        once = torch.autograd.grad(t.forward_and_log_det(x)[1].sum(), x)[0]
        torch.testing.assert_close(x.grad, passes * once)


def test_a_score_lets_go_of_its_graph(kind):
    d = kind.make()
    y = d.rsample((5,))
    d.log_prob(y)
    module = d if isinstance(d, pf.distributions.FlowDistribution) else d.transforms[0]
    module = module.parts[0] if hasattr(module, "parts") else module
    assert module._memory._last is None


def test_a_sample_without_grad_is_scored_with_its_gradient_path(kind):
    d = kind.make()
    with torch.no_grad():
        y = d.sample((5,))
        d.log_prob(y)
    for value in (y, d.sample((5,))):
        log_prob = d.log_prob(value)
        assert log_prob.requires_grad
        parameters = list(kind.module.parameters())
        grads = torch.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
        copied = fresh_copy(kind.module)
        expected = torch.autograd.grad(
            kind.make(copied).log_prob(value.clone()).sum(),
            list(copied.parameters()),
            allow_unused=True,
        )
        for left, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def test_a_score_under_no_grad_does_not_serve_with_grad(kind):
    d = kind.make()
    y = d.rsample((5,)).detach()
    with torch.no_grad():
        assert not d.log_prob(y).requires_grad
    assert d.log_prob(y).requires_grad


def test_a_sample_with_grad_is_scored_without_under_no_grad(kind):
    d = kind.make()
    y = d.rsample((5,))
    with torch.no_grad():
        log_prob = d.log_prob(y)
    assert not log_prob.requires_grad
    torch.testing.assert_close(log_prob, kind.truth(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("no_grad", [False, True])
def test_a_sample_edited_in_place_is_scored_as_it_is(kind, no_grad):
    d = kind.make()
    with torch.set_grad_enabled(not no_grad):
        for draw in (d.rsample, d.sample):
            y = draw((5,))
            y.mul_(1.1)
            torch.testing.assert_close(d.log_prob(y), kind.truth(y), rtol=1e-4, atol=1e-4)
            y[0] = 0.5
            torch.testing.assert_close(d.log_prob(y), kind.truth(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("no_grad", [False, True])
def test_load_state_dict_between_drawing_and_scoring(kind, no_grad):
    other = perturbed(copy.deepcopy(kind.module), seed=5).state_dict()
    d = kind.make()
    with torch.set_grad_enabled(not no_grad):
        y = d.rsample((5,))
        kind.module.load_state_dict(other)
        torch.testing.assert_close(d.log_prob(y), kind.truth(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("no_grad", [False, True])
def test_load_state_dict_that_assigns(kind, no_grad):
    other = perturbed(copy.deepcopy(kind.module), seed=5).state_dict()
    d = kind.make()
    with torch.set_grad_enabled(not no_grad):
        y = d.rsample((5,))
        kind.module.load_state_dict(other, assign=True)
        torch.testing.assert_close(d.log_prob(y), kind.truth(y), rtol=1e-4, atol=1e-4)


def test_a_move_between_drawing_and_scoring(kind):
    d = kind.make()
    with torch.no_grad():
        y = d.rsample((5,))
        kind.module.double()
        if kind.context is not None:
            kind.context = kind.context.double()
        try:
            # Torch may refuse to mix dtypes, but no answer may come from before.
            log_prob = d.log_prob(y)
        except RuntimeError:
            return
        assert log_prob.dtype == torch.float64


@pytest.mark.parametrize("name", ["flow-context", "plain-context"])
@pytest.mark.parametrize("no_grad", [False, True])
def test_a_context_edited_in_place(name, no_grad):
    kind = Kind(name)
    with torch.set_grad_enabled(not no_grad):
        d = kind.make()
        y = d.rsample((5,))
        kind.context.add_(1.0)
        torch.testing.assert_close(d.log_prob(y), kind.truth(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("no_grad", [False, True])
def test_a_context_edited_in_place_deep_in_a_stack(no_grad):
    c = torch.zeros(C)
    t = Compose([perturbed(AffineCoupling(D, C, **NET)).condition(c).inv, Permute(D)])
    with torch.set_grad_enabled(not no_grad):
        x = torch.randn(5, D)
        y = t(x)
        c.add_(1.0)
        torch.testing.assert_close(t.inv(y), t.inverse_and_log_det(y)[0])
        y = t(x)
        c.add_(1.0)
        torch.testing.assert_close(t.log_abs_det_jacobian(x, y), t.forward_and_log_det(x)[1])


@pytest.mark.parametrize("no_grad", [False, True])
def test_functional_call_with_other_parameters(kind, no_grad):
    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kind.module

        def forward(self, y: Tensor) -> Tensor:
            return d.log_prob(y)

    d = kind.make()
    score = Score()
    other = perturbed(copy.deepcopy(kind.module), seed=5)
    with torch.set_grad_enabled(not no_grad):
        y = d.rsample((5,))
        elsewhere = functional_call(
            score, {f"inner.{n}": p for n, p in other.named_parameters()}, (y,)
        )
        torch.testing.assert_close(
            elsewhere, kind.make(other).log_prob(y.detach().clone()), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(d.log_prob(y), kind.truth(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("no_grad", [False, True])
def test_functional_calls_with_parameters_that_come_and_go(no_grad):
    """A new tensor may live where a dead one lived; it is another tensor all the same."""
    t = Elementwise(Affine("exp"), D)
    x = torch.randn(5, D)

    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = t

        def forward(self, y: Tensor) -> Tensor:
            return self.inner.inv(y)

    with torch.set_grad_enabled(not no_grad):
        for trial in range(20):
            y = functional_call(t, {"raw": torch.full((2, D), 0.1 * trial)}, (x,))
            back = functional_call(
                Score(), {"inner.raw": torch.full((2, D), -0.1 * trial - 0.1)}, (y,)
            )
            s = -0.1 * trial - 0.1
            torch.testing.assert_close(back, (y - s) * torch.tensor(-s).exp())


def test_retained_gradients_of_a_sample(kind):
    d = kind.make()
    y = d.rsample((5,))
    y.retain_grad()
    (2 * y.sum() + d.log_prob(y).sum()).backward()
    other = fresh_copy(kind.module)
    value = y.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        (2 * value.sum() + kind.make(other).log_prob(value).sum()), value
    )
    torch.testing.assert_close(y.grad, expected, rtol=1e-3, atol=1e-3)


def test_the_gradient_of_a_fixed_value(kind):
    d = kind.make()
    value = d.rsample((5,)).detach().requires_grad_()
    (first,) = torch.autograd.grad(d.log_prob(value).sum(), value)
    (second,) = torch.autograd.grad(d.log_prob(value).sum(), value)
    torch.testing.assert_close(first, second)
    y = d.sample((5,)).requires_grad_()
    (third,) = torch.autograd.grad(d.log_prob(y).sum(), y)
    assert bool(third.any())


def test_a_sample_that_is_made_to_require_gradients(kind):
    d = kind.make()
    for parameter in kind.module.parameters():
        parameter.requires_grad_(False)
    y = d.rsample((5,))
    assert not y.requires_grad
    y.requires_grad_()
    (slope,) = torch.autograd.grad(d.log_prob(y).sum(), y)
    assert bool(slope.any())


def test_parameters_that_are_unfrozen_in_between(kind):
    d = kind.make()
    for parameter in kind.module.parameters():
        parameter.requires_grad_(False)
    y = d.rsample((5,))
    for parameter in kind.module.parameters():
        parameter.requires_grad_(True)
    assert d.log_prob(y).requires_grad


def test_noise_edited_in_place():
    t = stack()
    with torch.no_grad():
        x = torch.randn(5, D)
        y = t(x)
        x.add_(1.0)
        back = t.inv(y)
        torch.testing.assert_close(back, x - 1.0, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(t.log_abs_det_jacobian(x, y), t.forward_and_log_det(x)[1])


def test_a_log_det_edited_in_place():
    """What is handed out belongs to the user."""
    t = perturbed(AffineCoupling(D, **NET))
    with torch.no_grad():
        x = torch.randn(5, D)
        y = t(x)
        log_det = t.log_abs_det_jacobian(x, y)
        kept = log_det.clone()
        log_det += 100.0
        torch.testing.assert_close(t.log_abs_det_jacobian(x, y), kept)
        torch.testing.assert_close(t.inv.log_abs_det_jacobian(y, x), -kept)


def test_training_and_evaluation_are_two_functions():
    t = perturbed(
        AffineCoupling(D, network=mlp((8, 8), lambda: nn.Sequential(nn.SiLU(), nn.Dropout(0.9))))
    )
    with torch.no_grad():
        x = torch.randn(50, D)
        t.train()
        y = t(x)
        t.eval()
        torch.testing.assert_close(t.log_abs_det_jacobian(x, y), t.forward_and_log_det(x)[1])
        y = t(x)
        torch.testing.assert_close(t.inv(y), x, rtol=1e-4, atol=1e-4)
        flow = pf.Flow([t])
        flow.train()
        d = flow()
        y = d.sample((50,))
        flow.eval()
        torch.testing.assert_close(d.log_prob(y), d.log_prob(y.clone()))


def test_one_transform_in_two_places():
    t = stack()
    base = dist.Normal(torch.zeros(D), 1.0).to_event(1)
    twice = TransformedDistribution(base, [t, t])
    y = twice.rsample((4,))
    torch.testing.assert_close(
        twice.log_prob(y),
        TransformedDistribution(base, [fresh_copy(t), fresh_copy(t)]).log_prob(y.detach()),
        rtol=1e-4,
        atol=1e-4,
    )
    back = TransformedDistribution(base, [t, t.inv])
    torch.testing.assert_close(back.log_prob(y), base.log_prob(y), rtol=1e-4, atol=1e-4)


def test_two_flows_that_share_a_transform():
    t = stack()
    one, other = pf.Flow([t]), pf.Flow([t, Permute([2, 1, 0])])
    y = one().rsample((4,))
    torch.testing.assert_close(
        other().log_prob(y), pf.Flow([t, Permute([2, 1, 0])])().log_prob(y.detach())
    )


def test_the_inverse_shares_one_memory():
    t = stack()
    x = torch.randn(5, D)
    inverse = t.inv
    with torch.no_grad():
        y = inverse(x)
        assert t(y) is x
        step(t)
        assert t(y) is not x
        torch.testing.assert_close(t(y), t.forward_and_log_det(y)[0])


def test_inference_mode_is_left_alone(kind):
    with torch.inference_mode():
        d = kind.make()
        y = d.rsample((5,))
        before = d.log_prob(y)
        y.mul_(1.1)
        assert not torch.equal(d.log_prob(y), before)
    torch.testing.assert_close(kind.make().log_prob(y.clone()), kind.truth(y), rtol=1e-4, atol=1e-4)


def test_what_inference_mode_made_serves_outside():
    with torch.inference_mode():
        flow = perturbed(pf.RealNVP(D, C, transforms=2, **PRESET))
        c = torch.randn(5, C)
    with torch.no_grad():
        d = flow(c)
        y = d.sample((3,))
        torch.testing.assert_close(d.log_prob(y), d.log_prob(y.clone()))
        t = flow.transform.condition(c)
        torch.testing.assert_close(t.inv(t(y)), y, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_of_functorch(kind):
    d = kind.make()
    with pyro.validation_enabled(False):
        d = kind.make()
        y = d.sample(() if kind.context is not None else (5,))
        slopes = vmap(
            grad(lambda v: d.expand(()).log_prob(v) if kind.context is None else v.sum())
        )(y)
        assert slopes.shape == y.shape
        module = kind.module.transform if isinstance(kind.module, pf.Flow) else kind.module
        if module.context_features is None:
            kept = []
            before = module._memory._last
            vmap(lambda x: kept.append(module(x)) or module.log_abs_det_jacobian(x, module(x)))(y)
            assert module._memory._last is before
            torch.testing.assert_close(module.inv(module(y)), y, rtol=1e-4, atol=1e-4)


def test_svi_on_one_fixed_batch():
    """A flow as likelihood: each step scores the same tensor with new parameters."""
    flow = perturbed(pf.RealNVP(D, transforms=2, **PRESET))
    data = torch.randn(20, D) + 1

    def model() -> None:
        with pyro.plate("data", 20):
            pyro.sample("x", flow(), obs=data)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = []
    for _ in range(5):
        expected = -float(fresh_copy(flow)().log_prob(data.clone()).sum().detach())
        losses.append(svi.step())
        assert losses[-1] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("no_grad", [False, True])
def test_parameters_set_through_their_data(kind, no_grad):
    """As torch.nn.utils.vector_to_parameters sets them, which no version counts."""
    d = kind.make()
    with torch.set_grad_enabled(not no_grad):
        y = d.rsample((5,))
        d.log_prob(y.clone())
        vector = nn.utils.parameters_to_vector(kind.module.parameters()).detach()
        nn.utils.vector_to_parameters(vector + 0.1, kind.module.parameters())
        torch.testing.assert_close(d.log_prob(y), kind.truth(y), rtol=1e-4, atol=1e-4)


# Worth its while


def test_a_sample_just_drawn_is_scored_without_inverting(kind, passes):
    d = kind.make()
    y = d.rsample((5,))
    log_prob = d.log_prob(y)
    assert (passes.forward, passes.inverse) == (1, 0)
    assert log_prob.requires_grad
    with torch.no_grad():
        y = d.sample((5,))
        for _ in range(3):
            d.log_prob(y)
    assert passes.inverse == 0
    if "flow" in kind.name:
        assert passes.forward == 2


def test_drawing_and_scoring_is_one_pass(passes):
    pf.RealNVP(D, **PRESET)().rsample_and_log_prob((5,))
    assert (passes.forward, passes.inverse) == (1, 0)


def test_scoring_data_is_one_pass(kind, passes):
    kind.make().log_prob(torch.rand(5, D) + 0.1)
    assert passes.inverse == 1
    assert passes.forward == 0 or "plain" in kind.name


def test_plain_torch_scores_data_in_one_pass(passes):
    d = Kind("plain").make()
    d.log_prob(torch.randn(5, D))
    assert (passes.forward, passes.inverse) == (0, 1)


def test_a_transform_called_and_asked_is_one_pass(passes):
    t = stack()
    x = torch.randn(5, D)
    y = t(x)
    t.log_abs_det_jacobian(x, y)
    assert (passes.forward, passes.inverse) == (1, 0)
    y = t(x)
    back = t.inv(y)
    assert back is x
    t.inv.log_abs_det_jacobian(y, x)
    assert (passes.forward, passes.inverse) == (2, 0)


def test_an_svi_step_with_a_flow_guide_does_not_invert(passes):
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))

    flow = pf.RealNVP(D, transforms=2, **PRESET)

    def guide() -> None:
        pyro.sample("z", flow())

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    assert (passes.forward, passes.inverse) == (3, 0)


def test_two_distributions_of_one_flow_do_not_disturb_each_other(passes):
    flow = perturbed(pf.RealNVP(D, **PRESET))
    one, other = flow(), flow()
    x, y = one.rsample((5,)), other.rsample((5,))
    torch.testing.assert_close(
        one.log_prob(x), flow().log_prob(x.detach().clone()), rtol=1e-4, atol=1e-4
    )
    other.log_prob(y)
    assert passes.inverse == 1  # the one that was asked for


# The memory by itself


def test_memory_answers_for_the_very_tensor_only():
    memory, given, result = Memory(), torch.zeros(3), torch.ones(3)
    memory.keep(given, result, torch.zeros(()), tuple, tag="told")
    assert memory.recall(result, tuple).tag == "told"
    assert memory.recall(result.clone(), tuple) is None
    assert memory.recall(given, tuple) is None
    memory.clear()
    assert memory.recall(result, tuple) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda given, result, log_det, parameter: given.add_(1),
        lambda given, result, log_det, parameter: result.add_(1),
        lambda given, result, log_det, parameter: log_det.add_(1),
        lambda given, result, log_det, parameter: parameter.add_(1),
        lambda given, result, log_det, parameter: parameter.requires_grad_(),
        lambda given, result, log_det, parameter: result.requires_grad_(),
        lambda given, result, log_det, parameter: torch.set_grad_enabled(False),
    ],
)
def test_memory_forgets_what_has_changed(change: Callable[..., None]):
    tensors = torch.zeros(3), torch.ones(3), torch.zeros(()), torch.ones(2)
    memory = Memory()
    memory.keep(*tensors[:3], lambda: (True, tensors[3]))
    assert memory.recall(tensors[1], lambda: (True, tensors[3])) is not None
    assert memory.recall(tensors[1], lambda: (False, tensors[3])) is None
    try:
        change(*tensors)
        assert memory.recall(tensors[1], lambda: (True, tensors[3])) is None
    finally:
        torch.set_grad_enabled(True)


def test_memory_empties_itself_with_the_result():
    memory, given = Memory(), torch.zeros(3)
    watched = weakref.ref(given)
    gc.disable()
    try:
        result = torch.ones(3)
        memory.keep(given, result, torch.zeros(()), tuple)
        del result, given
        assert watched() is None and memory._last is None
        memory_watched = weakref.ref(memory)
        result = torch.ones(3)
        memory.keep(torch.zeros(3), result, torch.zeros(()), tuple)
        del memory
        assert memory_watched() is None
        del result
    finally:
        gc.enable()


def test_the_death_of_an_earlier_result_spares_a_later_one():
    memory = Memory()
    first, second = torch.ones(3), torch.ones(3)
    memory.keep(torch.zeros(3), first, torch.zeros(()), tuple)
    memory.keep(torch.zeros(3), second, torch.zeros(()), tuple)
    del first
    assert memory.recall(second, tuple) is not None


def test_memory_keeps_nothing_of_an_identity_or_of_inference_mode():
    memory, x = Memory(), torch.zeros(3)
    memory.keep(x, x, torch.zeros(()), tuple)
    assert memory.recall(x, tuple) is None
    with torch.inference_mode():
        y = torch.zeros(3)
    for parts in ((y, x), (x, y)):
        memory.keep(*parts, torch.zeros(()), tuple)
        assert memory.recall(parts[1], tuple) is None
    z = torch.ones(3)
    memory.keep(x, z, torch.zeros(()), lambda: (y,))
    assert memory.recall(z, lambda: (y,)) is None
    memory.keep(x, z, torch.zeros(()), lambda: (x,))
    assert memory.recall(z, lambda: (y,)) is None


def test_copies_of_a_memory_are_empty():
    memory, y = Memory(), torch.ones(3)
    memory.keep(torch.zeros(3), y, torch.zeros(()), tuple)
    for twin in (copy.deepcopy(memory), copy.copy(memory), pickle.loads(pickle.dumps(memory))):
        assert twin._last is None
    assert memory.recall(y, tuple) is not None


def test_activations_of_a_step_do_not_outlive_it(kind):
    """After the step nothing but the module is left, though no collector ran."""
    gc.disable()
    try:
        d = kind.make()
        y = d.rsample((5,))
        (d.log_prob(y).sum() + d.log_prob(y.detach()).sum()).backward()
        watched = [weakref.ref(y), weakref.ref(d)]
        del y, d
        assert [w() for w in watched] == [None, None]
        module = kind.module.transform if isinstance(kind.module, pf.Flow) else kind.module
        assert module._memory._last is None
    finally:
        gc.enable()
