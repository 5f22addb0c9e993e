"""Bases of heavy tails and of several modes: right densities, right gradients of their samples, at home in a flow."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from registry import NET, C, D
from torch import Tensor

import pyroflows as pf
from pyroflows.distributions import (
    NormalMixture,
    NormalMixtureBase,
    StudentTBase,
    mixture_base,
    student_t_base,
)

FIXED = {
    "student": lambda: student_t_base(D, df=3.0),
    "student-tensor": lambda: student_t_base(D, df=torch.tensor([1.0, 3.0, 30.0])),
    "mixture": lambda: mixture_base(torch.tensor([[-2.0, 0.0, 1.0], [2.0, 1.0, 0.0]]), 0.5),
    "mixture-logits": lambda: mixture_base(
        torch.randn(4, D, generator=torch.Generator().manual_seed(0)),
        torch.full((4, 1), 0.7),
        torch.arange(4.0),
    ),
}
LEARNED = {
    "student": lambda: StudentTBase(D),
    "mixture": lambda: NormalMixtureBase(D, components=4),
    "mixture-one": lambda: NormalMixtureBase(D, components=1, scale=1.0),
}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("context_features", [None, C])
def test_is_at_home_in_a_flow(name, context_features, device):
    flow = pf.RealNVP(D, context_features, base=FIXED[name](), transforms=2, **NET).to(device)
    c = None if context_features is None else torch.randn(5, C, device=device)
    d = flow(c)
    for shape in [(), (4,), (4, 3), (2, 0)]:
        y, log_prob = d.rsample_and_log_prob(shape)
        assert y.shape == (*shape, *d.batch_shape, D) and log_prob.shape == (*shape, *d.batch_shape)
        torch.testing.assert_close(d.log_prob(y.detach()), log_prob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        d.log_prob(y := d.sample((3,))),
        FIXED[name]().log_prob(y.cpu()).to(device),
        rtol=1e-4,
        atol=1e-4,
    )
    assert flow.double()(None if c is None else c.double()).sample().dtype == torch.float64
    assert pickle.loads(pickle.dumps(flow))(None if c is None else c.double()).sample().shape == (
        *d.batch_shape,
        D,
    )


@pytest.mark.parametrize("name", FIXED)
def test_shapes(name):
    base = FIXED[name]()
    assert base.batch_shape == () and base.event_shape == (D,) and base.has_rsample
    wide = base.expand((2, 5))
    for shape in [(), (3,), (3, 4)]:
        x = wide.rsample(shape)
        assert x.shape == (*shape, 2, 5, D) and wide.log_prob(x).shape == (*shape, 2, 5)
        torch.testing.assert_close(wide.log_prob(x), base.log_prob(x))


def test_density_of_the_mixture_by_hand():
    locs = torch.tensor([[-1.0, 0.5], [2.0, 0.0]], dtype=torch.float64)
    scales = torch.tensor([[0.5, 1.0], [1.0, 2.0]], dtype=torch.float64)
    logits = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
    base = mixture_base(locs, scales, logits)
    x = torch.tensor([0.3, -0.4], dtype=torch.float64)
    parts = [
        weight
        * math.prod(
            math.exp(-0.5 * ((x[i] - m[i]) / s[i]) ** 2) / (float(s[i]) * math.sqrt(2 * math.pi))
            for i in range(2)
        )
        for weight, m, s in zip((0.25, 0.75), locs, scales, strict=True)
    ]
    assert float(base.log_prob(x)) == pytest.approx(math.log(sum(parts)))


def test_draws_of_the_mixture_have_its_moments(device):
    locs = torch.tensor([[-1.0, 0.5], [2.0, 0.0]], device=device)
    base = mixture_base(locs, 0.5, torch.tensor([0.0, math.log(3.0)], device=device))
    x = base.sample((100_000,))
    error = 5 * 1.5 / math.sqrt(len(x))
    torch.testing.assert_close(x.mean(0), 0.25 * locs[0] + 0.75 * locs[1], rtol=0, atol=error)
    torch.testing.assert_close((x[:, 0] < 0.5).float().mean().item(), 0.25, rtol=0, atol=error)


# Gradients of samples


def quantile(level: Tensor, locs: Tensor, scales: Tensor, logits: Tensor) -> Tensor:
    """Where a mixture in one dimension has a level, by bisection."""
    low, high = torch.full_like(level, -50.0), torch.full_like(level, 50.0)
    for _ in range(80):
        middle = 0.5 * (low + high)
        below = (logits.softmax(-1) * dist.Normal(locs, scales).cdf(middle[:, None])).sum(-1)
        low, high = (
            torch.where(below < level, middle, low),
            torch.where(below < level, high, middle),
        )
    return low


def test_gradient_in_one_dimension_is_that_of_the_quantile(device):
    """A sample is the quantile of a level that stays: against finite differences of quantiles found by bisection."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.randn(3, generator=generator, dtype=torch.float64).to(device) for _ in range(3)
    ]
    parameters[1] = parameters[1].exp()
    locs, scales, logits = (p.clone().requires_grad_() for p in parameters)
    x = mixture_base(locs[:, None], scales[:, None], logits).rsample((50,))[:, 0]
    level = (
        parameters[2].softmax(-1)
        * dist.Normal(parameters[0], parameters[1]).cdf(x.detach()[:, None])
    ).sum(-1)
    weights = torch.linspace(-1, 1, 50, dtype=torch.float64, device=device)
    grads = torch.autograd.grad((weights * x).sum(), (locs, scales, logits))
    for which, grad in enumerate(grads):
        for k in range(3):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [p.clone() for p in parameters]
                moved[which][k] += step
                ends.append(quantile(level, *moved))
            expected = (weights * (ends[0] - ends[1])).sum() / 2e-5
            assert float(grad[k]) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_gradients_of_expectations(device):
    """E[x_0^2 x_1 + x_1^2] by samples against the exact one; the weights and both entries take part."""
    generator = torch.Generator().manual_seed(1)
    locs = torch.randn(3, 2, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    scales = (
        torch.rand(3, 2, generator=generator, dtype=torch.float64)
        .add(0.5)
        .to(device)
        .requires_grad_()
    )
    logits = torch.randn(3, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    squares = locs.square() + scales.square()
    exact = (logits.softmax(-1) * (squares[:, 0] * locs[:, 1] + squares[:, 1])).sum()
    x = mixture_base(locs, scales, logits).rsample((200_000,))
    values = x[:, 0].square() * x[:, 1] + x[:, 1].square()
    for p, expected in zip(
        (locs, scales, logits), torch.autograd.grad(exact, (locs, scales, logits)), strict=True
    ):
        (grad,) = torch.autograd.grad(values.mean(), p, retain_graph=True)
        # The terms are of size 5 or so: their mean has this error.
        torch.testing.assert_close(grad, expected, rtol=0, atol=5 * 5 / math.sqrt(len(x)))


@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_gradients_are_finite_for_components_far_apart_or_close(spread, device):
    locs = (spread * torch.randn(5, 4, device=device)).requires_grad_()
    scales = torch.full((5, 4), 0.1, device=device, requires_grad=True)
    logits = torch.tensor([0.0, 10.0, -10.0, 50.0, -50.0], device=device, requires_grad=True)
    x = mixture_base(locs, scales, logits).rsample((1000,))
    for grad in torch.autograd.grad(x.sum(), (locs, scales, logits)):
        assert bool(grad.isfinite().all())


# Learned bases


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_base_is_a_module_that_gives_a_distribution(name, placement):
    base = LEARNED[name]().to(placement)
    with pyro.validation_enabled(False):  # which reads values, and meta has none
        d = base()
    assert d.event_shape == base.event_shape == (D,) and d.batch_shape == () and d.has_rsample
    assert {p.device.type for p in base.parameters()} == {placement.type}
    assert d.log_prob(torch.zeros(2, D, device=placement)).shape == (2,)
    assert type(base).__name__ in repr(base)
    assert {p.dtype for p in copy.deepcopy(base).double().parameters()} == {torch.float64}


@pytest.mark.parametrize("name", LEARNED)
def test_every_parameter_of_a_learned_base_gets_a_gradient(name, device):
    base = LEARNED[name]().to(device)
    value = torch.randn(20, D, device=device)
    for total in ((base().rsample((20,)) * value).sum(), base().log_prob(value).sum()):
        for parameter_name, parameter in base.named_parameters():
            (grad,) = torch.autograd.grad(total, parameter, retain_graph=True, allow_unused=True)
            assert grad is not None and bool(grad.isfinite().all())
            assert bool(grad.any()) or (parameter_name == "logits" and name == "mixture-one")


@pytest.mark.parametrize("name", LEARNED)
def test_wild_parameters_of_a_learned_base(name, device):
    base = LEARNED[name]().to(device)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=20.0)
    value = 10 * torch.randn(20, D, device=device)
    for total in (base().rsample((20,)).sum(), base().log_prob(value).sum()):
        assert bool(total.isfinite())
        for grad in torch.autograd.grad(total, list(base.parameters()), allow_unused=True):
            assert grad is None or bool(grad.isfinite().all())


def test_learns_the_degrees_of_freedom(device):
    truth = torch.tensor([1.5, 4.0])
    value = dist.StudentT(truth).sample((10_000,)).to(device)
    base = StudentTBase(2).to(device)
    adam = torch.optim.Adam(base.parameters(), lr=0.05)
    for _ in range(200):
        adam.zero_grad()
        (-base().log_prob(value).mean()).backward()
        adam.step()
    found = base().base_dist.df.detach().cpu()
    # The standard error of the logarithm of small degrees is about 2 / sqrt(n).
    torch.testing.assert_close(found.log(), truth.log(), rtol=0, atol=5 * 2 / math.sqrt(len(value)))


@torch.no_grad()
def test_a_mixture_starts_close_to_a_standard_normal_and_by_its_seed(device):
    x = NormalMixtureBase(2, components=500).to(device)().sample((50_000,))
    # Of 500 random means the spread has an error of 3 percent.
    torch.testing.assert_close(x.mean(0), torch.zeros(2, device=device), rtol=0, atol=0.2)
    torch.testing.assert_close(x.std(0), torch.ones(2, device=device), rtol=0, atol=0.15)
    assert torch.equal(NormalMixtureBase(2).locs, NormalMixtureBase(2).locs)
    assert not torch.equal(NormalMixtureBase(2).locs, NormalMixtureBase(2, seed=1).locs)
    assert isinstance(NormalMixtureBase(2)(), NormalMixture)


# Mistakes

LOCS = torch.zeros(3, 2)
MISTAKES = [
    (lambda: student_t_base(0), ValueError, "features >= 1; got 0"),
    (lambda: student_t_base(2, df=0.0), ValueError, "df to be positive and finite; got 0.0"),
    (lambda: student_t_base(2, df="few"), TypeError, "df to be a number; got 'few'"),
    (lambda: student_t_base(2, df=torch.ones(3)), ValueError, "df of shape (2,); got (3,)"),
    (
        lambda: student_t_base(2, df=torch.tensor([1, 2])),
        TypeError,
        "df of a floating-point dtype; got torch.int64",
    ),
    (
        lambda: student_t_base(2, df=torch.tensor([1.0, -2.0])),
        ValueError,
        "df to be positive; got a tensor",
    ),
    (
        lambda: mixture_base([[0.0]]),
        TypeError,
        "locs to be a floating-point tensor of shape (components, features)",
    ),
    (
        lambda: mixture_base(torch.zeros(3)),
        ValueError,
        "locs of shape (components, features); got (3,)",
    ),
    (
        lambda: mixture_base(torch.zeros(0, 3)),
        ValueError,
        "locs of shape (components, features); got (0, 3)",
    ),
    (lambda: mixture_base(LOCS, -1.0), ValueError, "scales to be positive and finite; got -1.0"),
    (
        lambda: mixture_base(LOCS, torch.ones(3)),
        ValueError,
        "scales that broadcast against locs of (3, 2); got (3,)",
    ),
    (lambda: mixture_base(LOCS, torch.zeros(2)), ValueError, "scales to be positive; got a tensor"),
    (lambda: mixture_base(LOCS, 1.0, torch.zeros(2)), ValueError, "logits of shape (3,); got (2,)"),
    (
        lambda: mixture_base(LOCS, 1.0, [0.0] * 3),
        TypeError,
        "logits to be a floating-point tensor of shape (3,)",
    ),
    (lambda: StudentTBase(0), ValueError, "features >= 1; got 0"),
    (lambda: StudentTBase(2, df=-1.0), ValueError, "df to be positive and finite; got -1.0"),
    (lambda: NormalMixtureBase(2, 0), ValueError, "components >= 1; got 0"),
    (
        lambda: NormalMixtureBase(2, scale=2.0),
        ValueError,
        "scale <= 1, the standard deviation of the whole; got 2.0",
    ),
    (lambda: NormalMixtureBase(2, seed=-1), ValueError, "seed >= 0; got -1"),
]


@pytest.mark.parametrize(("make", "error", "fragment"), MISTAKES)
def test_mistakes_are_told_in_a_sentence(make, error, fragment):
    with pytest.raises(error) as caught:
        make()
    assert fragment in str(caught.value)
