"""The law kit: it passes what is right, and catches each fault by the law that it breaks."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
import unittest
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro.distributions import constraints as pyro_constraints
from registry import EXEMPT, FLOWS, NET, SMALL, TRANSFORMS, C, perturbed
from torch import Tensor, nn
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.nn import mlp
from pyroflows.testing import LAWS, LawError, LawResult, Report, check, laws
from pyroflows.transforms import AffineCoupling, Elementwise, Transform
from pyroflows.univariate import Affine, Univariate

# A zoo of faults. Each is a scaling, right but for one mistake.


class Scaling(Transform):
    """What all of the zoo would be without its fault, and passes every law."""

    def __init__(self, features: int = 3, context_features: int | None = None) -> None:
        super().__init__(features, context_features)
        self.log_scale = nn.Parameter(torch.linspace(-0.5, 0.7, features))
        if context_features is not None:
            self.network = nn.Linear(context_features, features)

    def scale(self, context: Tensor | None) -> Tensor:
        return self.log_scale if context is None else self.log_scale + self.network(context).tanh()

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        s = self.scale(context)
        y = x * s.exp()
        return y, s.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        s = self.scale(context)
        x = y * s.neg().exp()
        return x, s.neg().sum(-1).expand(x.shape[:-1])


class WrongSign(Scaling):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, -log_det

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y, context)
        return x, -log_det


class WrongInverseSign(Scaling):
    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y, context)
        return x, -log_det


class SummedOverTheBatch(Scaling):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det.sum()


class PerEntry(Scaling):
    def forward_and_log_det(self, x, context=None):
        y, _ = super().forward_and_log_det(x, context)
        return y, self.log_scale.expand_as(y)


class NotExpanded(Scaling):
    def inverse_and_log_det(self, y, context=None):
        return super().inverse_and_log_det(y, context)[0], -self.log_scale.sum()


class OnlyValues(Scaling):
    def forward_and_log_det(self, x, context=None):
        return super().forward_and_log_det(x, context)[0]


class OnlyRankTwo(Scaling):
    """Fails on a single point."""

    def forward_and_log_det(self, x, context=None):
        y = torch.einsum("bi,i->bi", x, self.log_scale.exp())
        return y, self.log_scale.sum().expand(len(y))


class Float32(Scaling):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x.float(), context)
        return y.float(), log_det


class DefaultDtype(Scaling):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det + torch.zeros(y.shape[:-1], device=y.device)


class OnTheCPU(Scaling):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y + torch.zeros(x.shape[-1], dtype=x.dtype), log_det


class ReadsBack(Scaling):
    def forward_and_log_det(self, x, context=None):
        if (x.abs() > 1e40).any():
            raise ValueError("far out")
        return super().forward_and_log_det(x, context)


class NotInvertible(Scaling):
    """The sign is lost."""

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y.abs(), log_det


class RoughInverse(Scaling):
    """As an iteration that stops too early."""

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y, context)
        return x + 1e-5, log_det


class Saturating(Transform):
    """Its inverse reaches 0.8 of the normal distribution only."""

    reach = 1.2815515655446004

    def __init__(self, features: int = 1) -> None:
        super().__init__(features)

    def forward_and_log_det(self, x, context=None):
        t = (x / self.reach).clamp(-1 + 1e-9, 1 - 1e-9)
        y = t.atanh()
        return y, -(self.reach * (1 - t.square())).log().sum(-1)

    def inverse_and_log_det(self, y, context=None):
        t = y.tanh()
        # 1 - tanh(y)^2 without cancellation
        log_slope = 2 * (math.log(2.0) - y.abs() - torch.nn.functional.softplus(-2 * y.abs()))
        return self.reach * t, (math.log(self.reach) + log_slope).sum(-1)


class Stale(Scaling):
    """Remembers its last inverse by the identity of the point alone."""

    last: Any = None

    def inverse_and_log_det(self, y, context=None):
        if self.last is None or self.last[0] is not y:
            self.last = (y, *super().inverse_and_log_det(y, context))
        return self.last[1:]

    def __getstate__(self):
        return {**super().__getstate__(), "last": None}


class KeepsItsLastBatch(Scaling):
    def forward_and_log_det(self, x, context=None):
        self.last = x.detach()
        return super().forward_and_log_det(x, context)


class LosesState(Scaling):
    def state_dict(self, *args, **kwargs):
        return {
            key: value
            for key, value in super().state_dict(*args, **kwargs).items()
            if not key.endswith("log_scale")
        }


class Unbroadcast(Scaling):
    """Joins points and context, which asks for equal batches."""

    def scale(self, context):
        return super().scale(context)

    def forward_and_log_det(self, x, context=None):
        joint = torch.cat([x, context], -1)
        return super().forward_and_log_det(joint[..., : x.shape[-1]], joint[..., x.shape[-1] :])


class ForgetsItsContext(Scaling):
    """Fixes another context than it was given."""

    def condition(self, context):
        return super().condition(torch.zeros_like(context))


class UnusedBranch(Transform):
    """A root of what is negative in the branch that is not taken."""

    def __init__(self, features: int = 3) -> None:
        super().__init__(features)

    def forward_and_log_det(self, x, context=None):
        far = x > 1
        return torch.where(far, 2 * x.sqrt() - 1, x), torch.where(
            far, -x.abs().log() / 2, 0 * x
        ).sum(-1)

    def inverse_and_log_det(self, y, context=None):
        far = y > 1
        root = torch.where(far, (y + 1) / 2, 1.0)
        return torch.where(far, root.square(), y), torch.where(far, root.log(), 0 * y).sum(-1)


class Unregistered(Scaling):
    def __init__(self, features: int = 3) -> None:
        super().__init__(features)
        self.offset = torch.ones(features)

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y + self.offset.to(y), log_det

    def inverse_and_log_det(self, y, context=None):
        return super().inverse_and_log_det(y - self.offset.to(y), context)


class ModuleInAList(Scaling):
    def __init__(self, features: int = 3) -> None:
        super().__init__(features)
        self.parts = [nn.Linear(2, 2)]


class NotIncreasing(Elementwise):
    """A spline whose third piece turns back."""

    def __init__(self, features: int = 1) -> None:
        super().__init__(Affine(), features)

    def forward_and_log_det(self, x, context=None):
        slope = torch.where((x > 1) & (x < 1.5), -1.0, 1.0).to(x)
        kinked = torch.where(x > 1.5, x - 1, torch.where(x > 1, 2 - x, x))
        return kinked, slope.abs().log().sum(-1)

    def inverse_and_log_det(self, y, context=None):
        return y, 0 * y.sum(-1)


class OutsideItsCodomain(Scaling):
    codomain = constraints.independent(constraints.positive, 1)


class WrongEventDim(Scaling):
    domain = codomain = constraints.real


class Detached(Scaling):
    """Half of the gradient of its parameter goes missing."""

    def forward_and_log_det(self, x, context=None):
        s = (self.log_scale + self.log_scale.detach()) / 2
        y = x * s.exp()
        return y, s.sum(-1).expand(y.shape[:-1])


class BatchStatistics(Scaling):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y + 1e-3 * x.reshape(-1, x.shape[-1]).sum(0), log_det


class WritesToItsInput(Scaling):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        x.detach().mul_(1.0 + 1e-6)
        return y, log_det


class Random(Scaling):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det + 1e-9 * torch.randn_like(log_det)


class Counts(Scaling):
    def __init__(self, features: int = 3) -> None:
        super().__init__(features)
        self.register_buffer("calls", torch.zeros(()))

    def forward_and_log_det(self, x, context=None):
        self.calls += 1
        return super().forward_and_log_det(x, context)


class NaiveArsinh(Transform):
    """Cancels on the left."""

    def __init__(self, features: int = 3) -> None:
        super().__init__(features)

    def forward_and_log_det(self, x, context=None):
        return (x + (1 + x.square()).sqrt()).log(), -(1 + x.square()).log().sum(-1) / 2

    def inverse_and_log_det(self, y, context=None):
        return y.sinh(), y.cosh().log().sum(-1)


class OverflowsInFloat32(Scaling):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        spare = (30 * x).cosh().log().sum(-1)
        return y, log_det + spare - spare


class Naive(Transform):
    """y = log(1 + e^(x - 1)) + x, which overflows far out."""

    def __init__(self, features: int = 3) -> None:
        super().__init__(features)

    def forward_and_log_det(self, x, context=None):
        e = x.exp()
        return x + e / (1 + e), (1 + e / (1 + e).square()).log().sum(-1)

    def inverse_and_log_det(self, y, context=None):
        x = y
        for _ in range(60):
            e = x.exp()
            x = y - e / (1 + e)
        return x, -(1 + e / (1 + e).square()).log().sum(-1)


class WildParameters(Scaling):
    """A softmax written out, which overflows in float32 for large parameters though each share is at most one."""

    def scale(self, context):
        e = (20 * self.log_scale).exp()
        return e / e.sum()


class NoVmap(Scaling):
    """A function of its own without a rule for vmap."""

    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, s):
            ctx.save_for_backward(s.exp())
            return s.exp()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y * self.Exp.apply(0 * x), log_det


class BreaksTheGraph(Scaling):
    def forward_and_log_det(self, x, context=None):
        torch._dynamo.graph_break()
        return super().forward_and_log_det(x, context)


class OverridesLogAbsDet(Scaling):
    """What torch and Pyro ask is not what the mathematics says."""

    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x[..., 0])


class HoldsItsGraph(Scaling):
    """Once used, it cannot be copied."""

    def forward_and_log_det(self, x, context=None):
        self.last, log_det = super().forward_and_log_det(x, context)
        return self.last, log_det


class Lopsided(dist.TorchDistribution):
    """A base of total mass 0.8."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self) -> None:
        super().__init__(torch.Size(), torch.Size([1]), validate_args=False)
        self.normal = dist.Normal(0.0, 1.0)

    def expand(self, batch_shape, _instance=None):
        return self

    def rsample(self, sample_shape=torch.Size()):
        return self.normal.rsample((*sample_shape, 1))

    def log_prob(self, value):
        return self.normal.log_prob(value).sum(-1) + math.log(0.8)


ZOO: dict[str, tuple[Callable[[], Any], str]] = {
    "wrong sign": (WrongSign, "log_det"),
    "wrong sign of the inverse": (WrongInverseSign, "log_det"),
    "summed over the batch": (SummedOverTheBatch, "shapes"),
    "log-det per entry": (PerEntry, "shapes"),
    "log-det not expanded": (NotExpanded, "shapes"),
    "no log-det": (OnlyValues, "shapes"),
    "no single point": (OnlyRankTwo, "shapes"),
    "float32 by hand": (Float32, "dtypes"),
    "default dtype": (DefaultDtype, "dtypes"),
    "tensor on the CPU": (OnTheCPU, "devices"),
    "reads back": (ReadsBack, "devices"),
    "not invertible": (NotInvertible, "round_trip"),
    "rough inverse": (RoughInverse, "round_trip"),
    "saturating": (Saturating, "round_trip"),
    "stale cache": (Stale, "fresh"),
    "keeps its last batch": (KeepsItsLastBatch, "copies"),
    "loses state": (LosesState, "copies"),
    "no broadcasting": (lambda: Unbroadcast(3, C), "context"),
    "forgets its context": (lambda: ForgetsItsContext(3, C), "context"),
    "NaN in the unused branch": (UnusedBranch, "gradients"),
    "unregistered tensor": (Unregistered, "registered"),
    "unregistered module": (ModuleInAList, "registered"),
    "not increasing": (NotIncreasing, "monotone"),
    "not increasing, of many entries": (lambda: NotIncreasing(3), "monotone"),
    "outside its codomain": (OutsideItsCodomain, "domains"),
    "wrong event_dim": (WrongEventDim, "shapes"),
    "detached": (Detached, "gradients"),
    "batch statistics": (BatchStatistics, "rows"),
    "writes to its input": (WritesToItsInput, "pure"),
    "random": (Random, "pure"),
    "counts": (Counts, "pure"),
    "cancels": (NaiveArsinh, "round_trip"),
    "overflows in float32": (OverflowsInFloat32, "precision"),
    "overflows": (Naive, "extreme_inputs"),
    "overflows for wild parameters": (WildParameters, "extreme_parameters"),
    "no vmap": (NoVmap, "vmap"),
    "breaks the graph": (BreaksTheGraph, "compiles"),
    "another log-det for Pyro": (OverridesLogAbsDet, "pyro"),
    "mass of 0.8": (lambda: pf.Flow([Scaling(1)], base=Lopsided()), "normalised"),
    "not the identity": (Scaling, "starts_at_identity"),
}


@pytest.mark.parametrize("name", list(ZOO))
def test_each_fault_is_caught_by_its_law(name, device):
    make, law = ZOO[name]
    asked = {"compile": law == "compiles", "starts_at_identity": law == "starts_at_identity"}
    report = check(make().to(device), raises=False, **asked)
    assert report.failed == [law], str(report)
    (sentence,) = [result.detail for result in report.results if not result.passed]
    assert sentence.startswith("Expected ") and "; " in sentence and sentence.endswith(".")
    with pytest.raises(LawError, match=f"breaks 1 of the laws.\n{law}: Expected"):
        check(make().to(device), only=[law], **asked)
    (alone,) = laws(make, only=[law], starts_at_identity=asked["starts_at_identity"])
    with pytest.raises(LawError, match=f"breaks {law}: Expected"):
        alone()


def test_every_law_is_broken_by_some_fault():
    """But one, which cannot fail where those that it builds on hold."""
    assert {law for _, law in ZOO.values()} == set(LAWS) - {"inverse_log_det"}
    (alone,) = laws(WrongInverseSign, only=["inverse_log_det"])
    with pytest.raises(LawError, match="to be minus the map's"):
        alone()


def test_mass_that_is_not_reached_is_missed_by_quadrature(device):
    (alone,) = laws(lambda: Saturating().to(device), only=["normalised"])
    with pytest.raises(LawError, match=r"integrates to 1 .* got 0\.(79|80)"):
        alone()


def test_what_cannot_be_copied_is_reported(device):
    used = HoldsItsGraph().to(device)
    used(torch.zeros(3, device=device))
    assert check(used, raises=False).failed == ["copies"]
    with pytest.raises(LawError, match="copies: Expected a deep copy; got RuntimeError"):
        check(used)


def test_a_law_that_builds_on_another_names_the_cause(device):
    report = check(WrongSign().to(device), raises=False)
    reasons = {result.name: result.skipped for result in report.results}
    assert reasons["inverse_log_det"] == "builds on log_det"
    assert reasons["copies"] is None


# What is right passes, of whatever kind it is


class Sinh(Transform):
    """A scalar map that outgrows every dtype."""

    def __init__(self) -> None:
        super().__init__(())

    def forward_and_log_det(self, x, context=None):
        return x.sinh(), x.abs() + (-2 * x.abs()).exp().log1p() - math.log(2.0)

    def inverse_and_log_det(self, y, context=None):
        return y.asinh(), -torch.hypot(y, torch.ones_like(y)).log()


class Falling(Transform):
    """A decreasing scalar map."""

    sign = -1

    def __init__(self) -> None:
        super().__init__(())

    def forward_and_log_det(self, x, context=None):
        return -x, torch.zeros_like(x)

    inverse_and_log_det = forward_and_log_det


class Flatten(Transform):
    """Matrices that become vectors."""

    codomain = constraints.independent(constraints.real, 1)

    def __init__(self) -> None:
        super().__init__((2, 3))

    def forward_and_log_det(self, x, context=None):
        return 2 * x.flatten(-2), x.new_full(x.shape[:-2], 6 * math.log(2.0))

    def inverse_and_log_det(self, y, context=None):
        return y.unflatten(-1, (2, 3)) / 2, y.new_full(y.shape[:-1], -6 * math.log(2.0))

    def forward_shape(self, shape):
        return torch.Size([*shape[:-2], 6])

    def inverse_shape(self, shape):
        return torch.Size([*shape[:-1], 2, 3])


class Power(Transform):
    """x^a of the unit interval, which knows nothing of the line."""

    domain = codomain = constraints.independent(constraints.unit_interval, 1)

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.raw = nn.Parameter(torch.linspace(-0.3, 0.8, features))

    def forward_and_log_det(self, x, context=None):
        s = self.raw.tanh()
        return x ** s.exp(), (s + s.expm1() * x.log()).sum(-1)

    def inverse_and_log_det(self, y, context=None):
        s = self.raw.tanh().neg()
        return y ** s.exp(), (s + s.expm1() * y.log()).sum(-1)


class Exp(Scaling):
    """Onto the positive numbers."""

    codomain = constraints.independent(constraints.positive, 1)

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y.exp(), log_det + y.sum(-1)

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y.log(), context)
        return x, log_det - y.log().sum(-1)


class Softmax(Transform):
    """Onto the simplex, one entry more, with torch's own log-determinant."""

    codomain = constraints.simplex

    def forward_and_log_det(self, x, context=None):
        onto = torch.distributions.StickBreakingTransform()
        y = onto(x)
        return y, onto.log_abs_det_jacobian(x, y)

    def inverse_and_log_det(self, y, context=None):
        onto = torch.distributions.StickBreakingTransform()
        x = onto.inv(y)
        return x, -onto.log_abs_det_jacobian(x, y)

    def forward_shape(self, shape):
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape):
        return torch.Size([*shape[:-1], shape[-1] - 1])


class Solver(Scaling):
    """A method of finite accuracy, which says so."""

    accuracy = 1e-6

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y * (1 + 3e-7 * (1e3 * x).sin().detach()), log_det


class Knotted(Elementwise):
    """A piece of slope 1e-9, where the point is lost and its image is not."""

    def __init__(self) -> None:
        super().__init__(Affine(), 2)

    def forward_and_log_det(self, x, context=None):
        inner = x.abs() < 0.5
        y = torch.where(inner, 1e-9 * x, x - 0.5 * (1 - 1e-9) * x.sign())
        return y, torch.where(inner, x.new_tensor(1e-9).log(), 0.0).sum(-1)

    def inverse_and_log_det(self, y, context=None):
        inner = y.abs() < 0.5e-9
        x = torch.where(inner, 1e9 * y, y + 0.5 * (1 - 1e-9) * y.sign())
        return x, torch.where(inner, -y.new_tensor(1e-9).log(), 0.0).sum(-1)


RIGHT: dict[str, Callable[[], Any]] = {
    "scaling": Scaling,
    "scaling with a context": lambda: Scaling(3, C),
    "scalar": Sinh,
    "falling": Falling,
    "inverse of a scalar": lambda: Sinh().inv,
    "matrices to vectors": Flatten,
    "vectors to matrices": lambda: Flatten().inv,
    "interval": lambda: Power(2),
    "interval of one": lambda: Power(1),
    "onto the positive": lambda: Exp(2),
    "from the positive": lambda: Exp(2).inv,
    "onto the simplex": lambda: Softmax(2),
    "a solver": Solver,
    "nearly flat": Knotted,
    "many scales": lambda: Scaling(40),
    "heavy tails": lambda: pf.Flow(
        [Scaling(1)], base=dist.StudentT(1.0, torch.zeros(1)).to_event(1)
    ),
    "heavy tails of two": lambda: pf.Flow(
        [Scaling(2)], base=dist.StudentT(2.0, torch.zeros(2)).to_event(1)
    ),
    "uniform base": lambda: pf.Flow(
        [Scaling(2)], base=dist.Uniform(-torch.ones(2), 1.0).to_event(1)
    ),
    "narrow": lambda: perturbed(pf.RealNVP(2, transforms=4, **NET), 0.7),
    "with a context of two": lambda: perturbed(pf.RealNVP(2, C, transforms=3, **NET), 0.5),
    "a batch of bases": lambda: pf.RealNVP(
        2, base=dist.Normal(torch.zeros(7, 2), 1.0).to_event(1), **SMALL
    ),
    "a batch of bases and a context": lambda: pf.RealNVP(
        2, C, base=dist.Normal(torch.zeros(7, 2), 1.0).to_event(1), **SMALL
    ),
    "float64": lambda: perturbed(pf.RealNVP(3, **SMALL).double()),
    "frozen": lambda: perturbed(pf.RealNVP(3, **SMALL)).requires_grad_(False),
    "simplex": lambda: perturbed(pf.RealNVP(2, support=constraints.simplex, **SMALL)),
    "ordered": lambda: perturbed(pf.RealNVP(2, support=pyro_constraints.ordered_vector, **SMALL)),
    "interval of two": lambda: perturbed(
        pf.RealNVP(2, support=constraints.interval(-1.0, 3.0), **SMALL)
    ),
    "dropout": lambda: AffineCoupling(3, network=mlp((8, 8), lambda: nn.Dropout(0.5))),
}


#: In these quadrature cannot tell.
TOO_NARROW = {"nearly flat"}


#: Flows, of which all laws are judged by others of these.
DEAR_RIGHT = {"narrow", "with a context of two", "interval of two", "frozen", "a batch of bases"}


@pytest.mark.parametrize("name", slow_but_for(set(RIGHT) - DEAR_RIGHT, RIGHT))
def test_what_is_right_passes(name, device):
    subject = RIGHT[name]().to(device)
    report = check(subject, raises=False)
    assert report.ok, str(report)
    judged = {result.name for result in report.results if result.skipped is None}
    assert judged >= set(LAWS) - {
        "context",
        "monotone",
        "normalised",
        "starts_at_identity",
        "compiles",
    }
    if (
        report.subject in ("RealNVP", "Flow")
        and name not in TOO_NARROW
        and subject.event_shape.numel() < 3
    ):
        assert "normalised" in judged


# What the library has passes

#: What no law can ask of these, with the reason.
OWN_EXEMPT: dict[str, dict[str, str]] = {
    "extreme_inputs": {
        **{
            name: "a scale without bound overflows on the way back, as documented"
            for name in ("realnvp-exp", "realnvp-softplus", "realnvp-sigmoid")
        },
    },
    "devices": {"realnvp-corr-cholesky": "the support needs a kernel that the meta device lacks"},
}
#: Which tests of the registry stand for which law.
STANDS_FOR = {
    "test_vmap_is_a_loop": "vmap",
    "test_places_itself": "devices",
    "test_shapes": "shapes",
    "test_round_trip": "round_trip",
    "test_log_det_is_that_of_the_autograd_jacobian": "log_det",
    "test_float32_agrees_with_float64": "precision",
    "test_values_and_gradients_are_finite_in_the_tails": "extreme_inputs",
    "test_state_dict_restores": "copies",
    "test_copies_before_and_after_use": "copies",
    "test_rows_are_independent_and_memory_layout_does_not_matter": "rows",
    "test_gradients_are_those_of_finite_differences": "gradients",
}
#: Relative errors of methods that solve to less than rounding.
ACCURACY: dict[str, float] = {}
EXTREME = ["extreme_inputs", "extreme_parameters"]


def exempt_from(name: str) -> dict[str, str]:
    reasons = {law: cases[name] for law, cases in OWN_EXEMPT.items() if name in cases}
    return reasons | {
        law: EXEMPT[test][name] for test, law in STANDS_FOR.items() if name in EXEMPT.get(test, {})
    }


def accuracy_of(name: str) -> float:
    return max([0.0, *(accuracy for part, accuracy in ACCURACY.items() if part in name)])


#: One map of each kind; the fast runs hold the others to the laws by hand.
KINDS = [
    *("elementwise-affine-softclip", "elementwise-scale-exp", "elementwise-1", "rescale-context"),
    *("standardize", "permute-random", "lower-triangular", "additive-coupling-context"),
    *("affine-coupling-random", "affine-coupling-2", "inverse-coupling-context", "compose"),
    *("conditioned-inverse", "autoregressive-graph", "householder-context", "orthogonal"),
    *("lu-linear-rotated", "matrix-exponential-context", "actnorm", "batchnorm-inverse-context"),
    *("glow-step-context", "planar", "radial-context", "sylvester-context", "residual-context"),
    *("coupling-bernstein-context", "coupling-circular-context", "gpd-tail-context", "loft"),
    *("elementwise-rational-quadratic-context", "coupling-linear-rational-context"),
]


@pytest.mark.parametrize("name", slow_but_for(KINDS, TRANSFORMS))
def test_every_transform_passes(name, device):
    subject = perturbed(TRANSFORMS[name]()).to(device)
    check(subject, exempt=exempt_from(name), accuracy=accuracy_of(name))


#: Each kind of base and support, and of how a density is computed.
KINDS_OF_FLOWS = [
    *("nice-tensor", "realnvp-positive-context", "realnvp-bounds", "realnvp-simplex"),
    *("realnvp-corr-cholesky", "realnvp-base-batch-as-event", "realnvp-base-student"),
    *("realnvp-tails-student", "realnvp-mixing-batchnorm", "flow-1-context", "flow-inverse"),
    *("maf-context", "iaf", "nsf", "splines-circular-base-uniform"),
]


@pytest.mark.parametrize("name", slow_but_for(KINDS_OF_FLOWS, FLOWS))
def test_every_flow_passes(name, device):
    subject = perturbed(FLOWS[name]()).to(device)
    calm = [law for law in LAWS if law not in EXTREME]
    check(subject, only=calm, exempt=exempt_from(name), accuracy=accuracy_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FLOWS))
def test_every_flow_passes_the_extremes(name, device):
    subject = perturbed(FLOWS[name]()).to(device)
    check(subject, only=EXTREME, exempt=exempt_from(name), accuracy=accuracy_of(name))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: pf.RealNVP(2, C, **SMALL), marks=pytest.mark.slow),
        lambda: Scaling(2),
    ],
    ids=["flow", "transform"],
)
def test_compiles(make, device):
    assert (
        check(perturbed(make()).to(device), only=["compiles"], compile=True).results[0].skipped
        is None
    )


@pytest.mark.parametrize(
    "make", [lambda: pf.RealNVP(3, C, **SMALL), lambda: Elementwise(Affine(), 2)]
)
def test_starts_at_identity(make, device):
    assert (
        check(make().to(device), only=["starts_at_identity"], starts_at_identity=True)
        .results[0]
        .skipped
        is None
    )


# It changes nothing


def everything(subject: nn.Module) -> dict[str, Any]:
    return {
        "state": {key: value.clone() for key, value in subject.state_dict().items()},
        "training": [module.training for module in subject.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in subject.parameters()],
        "flags": [p.requires_grad for p in subject.parameters()],
        "dtypes": [p.dtype for p in subject.parameters()],
        "pickle": len(pickle.dumps(subject)),
        "random": torch.get_rng_state(),
        "random of numpy": np.random.get_state()[1],  # noqa: NPY002
        "random of Python": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "validation": torch.distributions.Distribution._validate_args,
        "enabled": torch.is_grad_enabled(),
        "store": sorted(pyro.get_param_store()),
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(np.array_equal(left, right)) if isinstance(left, np.ndarray) else left == right


@pytest.mark.parametrize(
    ("make", "default"),
    [
        pytest.param(lambda: pf.RealNVP(2, C, **SMALL), torch.float32, marks=pytest.mark.slow),
        (lambda: pf.RealNVP(2, **SMALL).eval(), torch.float64),
        (Counts, torch.float32),
    ],
)
def test_changes_nothing(make, default, device):
    torch.set_default_dtype(default)
    subject = make().to(device)
    x = torch.randn(5, *subject.event_shape, device=device)
    context = None if subject.context_features is None else torch.randn(5, C, device=device)
    subject.requires_grad_(True)
    for parameter in subject.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, kept = everything(subject), x.clone()
    with torch.no_grad():
        check(subject, raises=False)
        check(subject, x, context, compile=subject.training, raises=False)
    assert same(before, everything(subject))
    assert torch.equal(x, kept)


def test_the_memory_of_what_is_judged_stays(device):
    t = AffineCoupling(3, **NET).to(device)
    x = torch.randn(4, 3, device=device)
    y = t(x)
    check(t)
    assert t.inv(y) is x


# Points and contexts of the caller


def test_takes_points_and_contexts(device):
    flow = perturbed(pf.RealNVP(2, C, support=constraints.positive, **SMALL)).to(device)
    for x, context in (
        (torch.rand(2, device=device), None),
        (torch.rand(7, 2, device=device), torch.randn(7, C, device=device)),
        (torch.rand(50, 3, 2, device=device), torch.randn(50, 3, C, device=device)),
        (torch.rand(50, 3, 2, device=device).double(), torch.randn(C, device=device)),
    ):
        some = ["context", "pyro", "round_trip"]
        assert check(flow, x, context, only=some).ok
        assert check(flow.transform, x - 0.5, context, only=some).ok


class WrongBeyond(Scaling):
    """Wrong where no point of its own lies."""

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det + (x > 100).any(-1)


def test_judges_at_the_points_given(device):
    t = WrongBeyond().to(device)
    assert check(t, only=["log_det"]).ok
    with pytest.raises(LawError, match=r"log_det: .* at \[200, 200, 200\]"):
        check(t, torch.full((3,), 200.0, device=device), only=["log_det"])


class Pinned(Scaling):
    """Of a domain without a bijection from the line."""

    domain = codomain = constraints.independent(constraints.nonnegative_integer, 1)


def test_asks_for_points_where_it_knows_none(device):
    t = Pinned().to(device)
    with pytest.raises(ValueError, match="Expected x, points of the domain of Pinned"):
        check(t)
    assert "shapes" not in check(t, torch.ones(3, device=device), raises=False).failed


# Exemptions and accuracies that classes and callers declare


class Roulette(Random):
    """A random log-determinant, by intention."""

    exempt_laws = {"pure": "its log-determinant is estimated", "precision": "likewise"}  # noqa: RUF012


@dataclasses.dataclass(frozen=True)
class RoughScale(Univariate):
    """A univariate map that is no module, and of finite accuracy."""

    parameters, linear, accuracy = 1, True, 1e-6

    def forward_and_log_det(self, x, raw):
        s = raw.select(-2, 0)
        return x * s.exp() * (1 + 3e-7 * (1e3 * x).sin().detach()), s.expand_as(x)

    def inverse_and_log_det(self, y, raw):
        s = raw.select(-2, 0).neg()
        return y * s.exp(), s.expand_as(y)


def test_a_class_says_what_cannot_hold(device):
    for subject in (Roulette(), pf.Flow([Scaling(3), Roulette()]), Roulette().inv):
        report = check(subject.to(device), only=["pure", "shapes"])
        skipped = {result.name: result.skipped for result in report.results}
        assert skipped == {
            "shapes": None,
            "pure": "exempt: its log-determinant is estimated (Roulette)",
        }
        assert "-      exempt: its log-determinant is estimated (Roulette)" in str(report)
    assert check(Random().to(device), only=["pure"], raises=False).failed == ["pure"]


def test_a_caller_says_what_cannot_hold(device):
    report = check(Random().to(device), only=["pure"], exempt={"pure": "known"})
    assert report.ok and report.results[0].skipped == "exempt: known"
    (law,) = laws(Random, only=["pure"], exempt={"pure": "known"})
    with pytest.raises(unittest.SkipTest, match="exempt: known"):
        law()


def test_accuracy_is_declared_by_a_class_or_a_caller(device):
    assert check(Elementwise(RoughScale(), 2).to(device), only=["round_trip"]).ok
    rough = Solver().to(device)
    rough.accuracy = 0.0
    assert check(rough, only=["round_trip"], raises=False).failed == ["round_trip"]
    assert check(rough, only=["round_trip"], accuracy=1e-6).ok
    for law in laws(rough, only=["round_trip"], accuracy=1e-6):
        law()


# In a suite of tests


@pytest.mark.parametrize(
    "law",
    laws(lambda: Scaling(2, C), exempt={"compiles": "slow"}, starts_at_identity=True),
    ids=str,
)
def test_laws_parametrise_a_test(law):
    if law.name == "starts_at_identity":
        with pytest.raises(LawError, match="Scaling breaks starts_at_identity: Expected"):
            law()
    elif law.name in ("compiles", "monotone"):
        with pytest.raises(unittest.SkipTest):
            law()
    else:
        law()


def test_laws_are_named_and_described():
    listed = laws(Scaling)
    assert [str(law) for law in listed] == [law.name for law in listed] == list(LAWS)
    assert [law.__doc__ for law in listed] == list(LAWS.values())
    assert repr(listed[0]) == "Law('shapes')"
    assert all(
        (sentence.endswith(".") and ", for " in sentence) or ", so that " in sentence
        for sentence in LAWS.values()
    )
    assert [str(law) for law in laws(Scaling, only=["rows", "shapes"])] == ["shapes", "rows"]


def test_a_new_instance_loads_what_was_saved():
    """Only a callable can show that a constructor makes the same again."""

    made = iter(range(100))
    (law,) = laws(lambda: pf.transforms.Permute(40, seed=next(made)), only=["copies"])
    law()  # a permutation is a buffer
    (law,) = laws(lambda: Drifting(float(next(made))), only=["copies"])
    with pytest.raises(LawError, match="a state_dict in a new instance to be the same function"):
        law()


class Drifting(Scaling):
    """A constant that is no part of its state."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y + self.shift, log_det

    def inverse_and_log_det(self, y, context=None):
        return super().inverse_and_log_det(y - self.shift, context)


def test_reads_as_a_table():
    report = Report(
        "Mine",
        [
            LawResult("a", True),
            LawResult("b", False, "Expected c; got d."),
            LawResult("e", True, "", "f"),
        ],
    )
    assert not report.ok and report.failed == ["b"]
    lines = str(report).split("\n")
    assert lines[0] == "Mine: 1 laws hold, 1 fail, 1 were not judged"
    assert [line.split() for line in lines[1:]] == [
        ["a", "holds"],
        ["b", "FAILS", "Expected", "c;", "got", "d."],
        ["e", "-", "f"],
    ]


# Mistakes of the caller

MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a class": (
        lambda: check(Scaling),
        TypeError,
        "Expected a pyroflows Transform or Flow; got the class Scaling",
    ),
    "a distribution": (lambda: check(dist.Normal(0.0, 1.0)), TypeError, "got Normal"),
    "a transform of torch": (
        lambda: check(torch.distributions.ExpTransform()),
        TypeError,
        "got ExpTransform",
    ),
    "on meta": (
        lambda: check(Scaling().to("meta")),
        ValueError,
        "device that holds values; got some on meta",
    ),
    "points of another shape": (
        lambda: check(Scaling(), torch.zeros(4, 2)),
        ValueError,
        r"x of shape \(\*, 3\)",
    ),
    "points of integers": (
        lambda: check(Scaling(), torch.zeros(3).long()),
        TypeError,
        "x of a floating-point dtype",
    ),
    "no points": (lambda: check(Scaling(), torch.zeros(0, 3)), ValueError, "at least one point"),
    "points outside": (
        lambda: check(Power(2), torch.full((2,), 2.0)),
        ValueError,
        "points of the domain",
    ),
    "unwanted context": (
        lambda: check(Scaling(), None, torch.zeros(2)),
        ValueError,
        "Expected no context",
    ),
    "context of another width": (
        lambda: check(Scaling(3, C), None, torch.zeros(5)),
        ValueError,
        r"shape \(\*, 2\)",
    ),
    "contexts of another number": (
        lambda: check(Scaling(3, C), torch.zeros(4, 3), torch.zeros(5, C)),
        ValueError,
        "for one point or for 4",
    ),
    "an unknown law": (
        lambda: check(Scaling(), only=["speed"]),
        ValueError,
        "names of laws in only, .*; got 'speed'",
    ),
    "one name": (lambda: check(Scaling(), only="rows"), TypeError, "only to be a sequence"),
    "an unknown exemption": (
        lambda: check(Scaling(), exempt={"speed": "x"}),
        ValueError,
        "names of laws in exempt",
    ),
    "no reason": (
        lambda: check(Scaling(), exempt={"rows": " "}),
        ValueError,
        "a reason why rows is exempt",
    ),
    "exemptions in a list": (
        lambda: check(Scaling(), exempt=["rows"]),
        TypeError,
        "exempt to be a dictionary",
    ),
    "negative accuracy": (
        lambda: check(Scaling(), accuracy=-1.0),
        ValueError,
        r"relative error in \[0, 1\); got -1.0",
    ),
    "accuracy in words": (lambda: check(Scaling(), accuracy="high"), ValueError, "relative error"),
    "laws of nothing": (lambda: laws(3), TypeError, "a callable that makes one; got int"),
    "laws of an unknown name": (lambda: laws(Scaling, only=["speed"]), ValueError, "got 'speed'"),
    "laws of something else": (lambda: laws(lambda: 3)[0](), TypeError, "got int"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_told(name):
    make, error, sentence = MISTAKES[name]
    with pytest.raises(error, match=sentence):
        make()
