"""Mistakes in options and calls: each is one clear sentence, of the right kind of error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from registry import C, D
from torch import nn

import pyroflows as pf
from pyroflows.nn import MLP, mlp
from pyroflows.transforms import (
    AdditiveCoupling,
    AffineCoupling,
    Compose,
    Conditioned,
    Coupling,
    Elementwise,
    Inverse,
    LowerTriangularAffine,
    Permute,
    Rescale,
    Reverse,
    Transform,
    coupling_masks,
)
from pyroflows.univariate import Affine, Scale

Mistake = tuple[Callable[[], Any], type[Exception], str]

#: Everything that takes ``features`` and networks, by a constructor of keyword arguments.
COUPLINGS: dict[str, Callable[..., Any]] = {
    "AdditiveCoupling": AdditiveCoupling,
    "AffineCoupling": AffineCoupling,
    "Coupling": lambda *args, **kw: Coupling(Affine(), *args, **kw),
    "NICE": pf.NICE,
    "RealNVP": pf.RealNVP,
}
CONDITIONAL: dict[str, Callable[..., Any]] = {
    **COUPLINGS,
    "Elementwise": lambda *args, **kw: Elementwise(Affine(), *args, **kw),
    "Rescale": Rescale,
    "LowerTriangularAffine": LowerTriangularAffine,
}
ALL: dict[str, Callable[..., Any]] = {
    **CONDITIONAL,
    "Reverse": Reverse,
    "Permute": Permute,
    "Transform": Transform,
}
SCALED: dict[str, Callable[..., Any]] = {
    "Affine": Affine,
    "Scale": Scale,
    "AffineCoupling": lambda **kw: AffineCoupling(D, **kw),
    "Rescale": lambda **kw: Rescale(D, **kw),
    "RealNVP": lambda **kw: pf.RealNVP(D, **kw),
}
FLOWS: dict[str, Callable[..., pf.Flow]] = {
    "Flow": lambda **kw: pf.Flow([Reverse(D)], **kw),
    "NICE": lambda **kw: pf.NICE(D, **kw),
    "RealNVP": lambda **kw: pf.RealNVP(D, **kw),
}

MISTAKES: dict[str, Mistake] = {}


def mistake(name: str, make: Callable[[], Any], error: type[Exception], fragment: str) -> None:
    assert name not in MISTAKES
    MISTAKES[name] = (make, error, fragment)


for owner, make in ALL.items():
    mistake(f"{owner}-features-zero", lambda m=make: m(0), ValueError, "features >= 1; got 0")
    mistake(f"{owner}-features-negative", lambda m=make: m(-3), ValueError, "features >= 1; got -3")
    mistake(
        f"{owner}-features-float",
        lambda m=make: m(3.0),
        TypeError,
        "features to be an integer; got 3.0",
    )
    mistake(
        f"{owner}-features-bool",
        lambda m=make: m(True),
        TypeError,
        "features to be an integer; got True",
    )
    mistake(
        f"{owner}-features-none",
        lambda m=make: m(None),
        TypeError,
        "features to be an integer; got None",
    )

for owner, make in COUPLINGS.items():
    mistake(
        f"{owner}-one-feature",
        lambda m=make: m(1),
        ValueError,
        "For one feature use Elementwise instead.",
    )
    for label, mask, error, fragment in [
        (
            "unknown",
            "quarter",
            ValueError,
            "half, checkerboard, alternating, random or a tensor; got 'quarter'",
        ),
        ("all", [True] * D, ValueError, "an entry to transform; got one that is True everywhere"),
        (
            "none",
            torch.zeros(D).bool(),
            ValueError,
            "an entry to condition on; got one that is False everywhere",
        ),
        ("width", [True, False], ValueError, f"mask of shape ({D},) or ("),
        ("rank", torch.ones(D, 1, 1).bool(), ValueError, f"mask of shape ({D},) or ("),
        ("integer", torch.tensor([0, 1, 1]), TypeError, "mask to be boolean; got torch.int64"),
        ("float", [0.0, 1.0, 0.5], TypeError, "mask to be boolean; got torch.float32"),
        ("nothing", None, TypeError, "mask to be a name or a boolean tensor; got None"),
        ("words", ["a", "b", "c"], TypeError, "mask to be a name or a boolean tensor"),
        ("ragged", [[True], [True, False]], TypeError, "mask to be a name or a boolean tensor"),
    ]:
        mistake(f"{owner}-mask-{label}", lambda m=make, v=mask: m(D, mask=v), error, fragment)

for owner, make in CONDITIONAL.items():
    for value, error, fragment in [
        (0, ValueError, "context_features >= 1; got 0"),
        (-1, ValueError, "context_features >= 1; got -1"),
        (2.5, TypeError, "context_features to be an integer; got 2.5"),
        ("2", TypeError, "context_features to be an integer; got '2'"),
    ]:
        mistake(
            f"{owner}-context-{value}",
            lambda m=make, v=value: m(D, context_features=v),
            error,
            fragment,
        )
    for label, hidden, error, fragment in [
        (
            "int",
            64,
            TypeError,
            "hidden to be a sequence of integers such as (64, 64); got 64",
        ),
        (
            "word",
            "64",
            TypeError,
            "hidden to be a sequence of integers such as (64, 64); got '64'",
        ),
        ("none", None, TypeError, "hidden to be a sequence"),
        ("zero", (8, 0), ValueError, "hidden >= 1; got 0"),
        ("float", (8.0,), TypeError, "hidden to be an integer; got 8.0"),
    ]:
        mistake(
            f"{owner}-hidden-{label}",
            lambda m=make, v=hidden: m(D, C, network=mlp(v)),
            error,
            fragment,
        )
    for label, activation in [
        ("word", "relu"),
        ("made", nn.SiLU()),
        ("function", torch.tanh),
        ("none", None),
        ("other", dict),
    ]:
        mistake(
            f"{owner}-activation-{label}",
            lambda m=make, v=activation: m(D, C, network=mlp(activation=v)),
            TypeError,
            "activation to make a module when called without arguments, as torch.nn.SiLU does",
        )

for owner, make in SCALED.items():
    mistake(
        f"{owner}-scale-unknown",
        lambda m=make: m(scale="tanh"),
        ValueError,
        "one of softclip, exp, softplus, sigmoid",
    )
    mistake(
        f"{owner}-scale-none",
        lambda m=make: m(scale=None),
        ValueError,
        "scale to be one of softclip",
    )
    mistake(
        f"{owner}-scale-list",
        lambda m=make: m(scale=["exp"]),
        ValueError,
        "scale to be one of softclip",
    )
    for value in (0, -1.0, float("inf"), float("nan")):
        mistake(
            f"{owner}-bound-{value}",
            lambda m=make, v=value: m(bound=v),
            ValueError,
            "bound to be positive and finite",
        )
    for value in ("2", None, True):
        mistake(
            f"{owner}-bound-{value}",
            lambda m=make, v=value: m(bound=v),
            TypeError,
            "bound to be a number; got",
        )

for owner in ("NICE", "RealNVP"):
    make = COUPLINGS[owner]
    mistake(
        f"{owner}-transforms-zero",
        lambda m=make: m(D, transforms=0),
        ValueError,
        "transforms >= 1; got 0",
    )
    mistake(
        f"{owner}-transforms-float",
        lambda m=make: m(D, transforms=2.0),
        TypeError,
        "transforms to be an integer; got 2.0",
    )
    mistake(
        f"{owner}-transforms-list",
        lambda m=make: m(D, transforms=[Reverse(D)]),
        TypeError,
        "transforms to be an integer",
    )
    mistake(
        f"{owner}-masks-too-few",
        lambda m=make: m(D, transforms=4, mask=torch.eye(D).bool()),
        ValueError,
        "mask of shape (3,) or (4, 3); got (3, 3)",
    )
    mistake(
        f"{owner}-masks-one-all",
        lambda m=make: m(
            D, transforms=2, mask=torch.tensor([[True, False, True], [True, True, True]])
        ),
        ValueError,
        "an entry to transform",
    )

for owner, make in FLOWS.items():
    for label, base, error, fragment in [
        (
            "word",
            "normal",
            TypeError,
            "base to be a distribution, or a module that makes one without arguments; got 'normal'",
        ),
        (
            "class",
            dist.Normal,
            TypeError,
            "base to be a distribution, or a module that makes one without arguments; got",
        ),
        (
            "module",
            nn.Linear(1, 1),
            TypeError,
            "base to be a distribution, or a module that makes one without arguments; got",
        ),
        (
            "width",
            dist.Normal(torch.zeros(D + 1), 1.0).to_event(1),
            ValueError,
            "base of shape (*, 3); got (4,)",
        ),
        ("scalar", dist.Normal(0.0, 1.0), ValueError, "base of shape (*, 3); got ()"),
        (
            "matrix",
            dist.Normal(torch.zeros(2, D), 1.0).to_event(2),
            ValueError,
            "base of shape (*, 3); got (2, 3)",
        ),
        (
            "discrete",
            dist.Bernoulli(torch.full((D,), 0.5)).to_event(1),
            ValueError,
            "has_rsample); got Independent",
        ),
        (
            "mixture",
            dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2, D), 1.0).to_event(1)
            ),
            ValueError,
            "has_rsample); got MixtureSameFamily",
        ),
        (
            "computed",
            dist.Normal(torch.zeros(D, requires_grad=True).exp(), 1.0).to_event(1),
            ValueError,
            "base without tensors that require gradients",
        ),
        (
            "learnt",
            dist.Normal(nn.Parameter(torch.zeros(D)), 1.0).to_event(1),
            ValueError,
            "base without tensors that require gradients",
        ),
        ("flow", pf.RealNVP(D)(), ValueError, "base without tensors that require gradients"),
    ]:
        mistake(f"{owner}-base-{label}", lambda m=make, v=base: m(base=v), error, fragment)
    for label, support, error, fragment in [
        ("word", "positive", TypeError, "support to be a constraint; got 'positive'"),
        ("class", type(constraints.positive), TypeError, "support to be a constraint; got"),
        ("integers", constraints.nonnegative_integer, ValueError, "biject_to knows none for"),
        ("boolean", constraints.boolean, ValueError, "biject_to knows none for"),
        ("dependent", constraints.dependent, ValueError, "biject_to knows none for"),
        ("matrix", constraints.lower_cholesky, ValueError, "bijection from real vectors"),
        (
            "bounds",
            constraints.greater_than(torch.zeros(D + 1)),
            ValueError,
            "features that fit the support",
        ),
    ]:
        mistake(f"{owner}-support-{label}", lambda m=make, v=support: m(support=v), error, fragment)
    mistake(
        f"{owner}-name-number", lambda m=make: m(name=3), TypeError, "name to be a string; got 3"
    )
    mistake(
        f"{owner}-name-empty",
        lambda m=make: m(name=""),
        ValueError,
        "name to have at least one character",
    )

mistake(
    "RealNVP-support-corr-cholesky",
    lambda: pf.RealNVP(4, support=constraints.corr_cholesky),
    ValueError,
    "features that fit the support",
)

for label, univariate in [
    ("word", "affine"),
    ("class", Affine),
    ("none", None),
    ("transform", Reverse(D)),
]:
    for owner, structure in [("Elementwise", Elementwise), ("Coupling", Coupling)]:
        mistake(
            f"{owner}-univariate-{label}",
            lambda s=structure, u=univariate: s(u, D),
            TypeError,
            "univariate to be a monotone map such as Affine()",
        )

for label, permutation, error, fragment in [
    ("repeated", [0, 0, 1], ValueError, "each of 0 .. 2 once; got [0, 0, 1]"),
    ("too-large", [1, 2, 3], ValueError, "each of 0 .. 2 once; got [1, 2, 3]"),
    ("negative", [0, -1], ValueError, "permutation >= 0; got -1"),
    ("floats", [0.2, 1.7], TypeError, "permutation to be an integer; got 0.2"),
    ("float-tensor", torch.tensor([1.0, 0.0]), TypeError, "permutation to be an integer; got 1.0"),
    ("matrix", torch.tensor([[1, 0]]), TypeError, "permutation to be an integer; got [1, 0]"),
    ("booleans", [True, False], TypeError, "permutation to be an integer; got True"),
    ("word", "10", TypeError, "permutation to be a sequence of integers or their number; got '10'"),
    ("empty", [], ValueError, "features >= 1; got 0"),
]:
    mistake(f"Permute-{label}", lambda v=permutation: Permute(v), error, fragment)
mistake("Permute-seed", lambda: Permute(3, seed="a"), TypeError, "seed to be an integer; got 'a'")
mistake(
    "coupling_masks-seed",
    lambda: coupling_masks("random", 3, 2, seed=0.5),
    TypeError,
    "seed to be an integer; got 0.5",
)
mistake(
    "coupling_masks-transforms",
    lambda: coupling_masks("half", 3, 0),
    ValueError,
    "transforms >= 1; got 0",
)
mistake(
    "coupling_masks-features",
    lambda: coupling_masks("half", 1, 2),
    ValueError,
    "features >= 2 for a coupling",
)

for owner, stack in {"Compose": Compose, "Flow": pf.Flow}.items():
    for label, layers, error, fragment in [
        ("none", [], ValueError, "at least one transform in transforms; got none"),
        ("number", 3, TypeError, "transforms to be a sequence of transforms; got int"),
        ("missing", None, TypeError, "transforms to be a sequence of transforms; got NoneType"),
        (
            "module",
            [nn.Linear(3, 3)],
            TypeError,
            "transforms of type pyroflows.transforms.Transform; got Linear",
        ),
        ("torch", [Reverse(D), dist.transforms.ExpTransform()], TypeError, "got ExpTransform"),
        ("class", [Reverse], TypeError, "got the class Reverse"),
        ("univariate", [Affine()], TypeError, "got Affine"),
        (
            "shapes",
            [Reverse(D), Reverse(D + 1)],
            ValueError,
            "transform 1 of event shape (3,), as the one before it gives",
        ),
        (
            "contexts",
            [Rescale(D, 2), Rescale(D, 3)],
            ValueError,
            "one shape of context in all transforms; got (2,), (3,)",
        ),
    ]:
        mistake(f"{owner}-transforms-{label}", lambda s=stack, v=layers: s(v), error, fragment)

mistake(
    "Inverse-of-a-module",
    lambda: Inverse(nn.Linear(3, 3)),
    TypeError,
    "transform of type pyroflows.transforms.Transform",
)
mistake(
    "Conditioned-of-a-module",
    lambda: Conditioned(nn.Linear(3, 3), torch.zeros(2)),
    TypeError,
    "transform of type",
)
mistake(
    "Conditioned-without-context",
    lambda: Conditioned(Rescale(D, C), None),
    ValueError,
    "context of shape (*, 2)",
)
mistake(
    "Conditioned-of-no-context",
    lambda: Conditioned(Rescale(D), torch.zeros(C)),
    ValueError,
    "Expected no context",
)
mistake("Transform-word", lambda: Transform("33"), TypeError, "features to be an integer; got '33'")
mistake("Transform-empty-side", lambda: Transform((3, 0)), ValueError, "features >= 1; got 0")

standard = dist.Normal(torch.zeros(D), 1.0).to_event(1)
mistake(
    "FlowDistribution-transform",
    lambda: pf.distributions.FlowDistribution(standard, dist.transforms.ExpTransform()),
    TypeError,
    "transform of type pyroflows.transforms.Transform; got ExpTransform",
)
mistake(
    "FlowDistribution-unconditioned",
    lambda: pf.distributions.FlowDistribution(standard, Rescale(D, C)),
    ValueError,
    "context of shape (*, 2) for Rescale (give it by condition(context)); got None",
)
mistake(
    "FlowDistribution-support",
    lambda: pf.distributions.FlowDistribution(standard, Reverse(D), support="positive"),
    TypeError,
    "support to be a constraint",
)

mistake("MLP-of-nothing", lambda: MLP(0, 2), ValueError, "inputs >= 1; got 0")
mistake("MLP-out", lambda: MLP(2, 0), ValueError, "outputs >= 1; got 0")
mistake("MLP-in", lambda: MLP(-1, 2), ValueError, "inputs >= 1; got -1")
mistake("MLP-in-float", lambda: MLP(1.5, 2), TypeError, "inputs to be an integer; got 1.5")
mistake("MLP-context", lambda: MLP(2, 2, context=0), ValueError, "context >= 1; got 0")


def set_to(loc: Any, scale_tril: Any) -> Callable[[], None]:
    return lambda: LowerTriangularAffine(2).set(loc, scale_tril)


for label, loc, tril, error, fragment in [
    ("loc-width", torch.zeros(3), torch.eye(2), ValueError, "loc of shape (*, 2); got (3,)"),
    ("loc-scalar", torch.tensor(0.0), torch.eye(2), ValueError, "loc of shape (*, 2); got ()"),
    ("loc-batch", torch.zeros(4, 2), torch.eye(2), ValueError, "loc of shape (2,); got (4, 2)"),
    ("loc-list", [0.0, 0.0], torch.eye(2), TypeError, "loc to be a tensor"),
    (
        "tril-width",
        torch.zeros(2),
        torch.eye(3),
        ValueError,
        "scale_tril of shape (*, 2, 2); got (3, 3)",
    ),
    (
        "tril-batch",
        torch.zeros(2),
        torch.eye(2)[None],
        ValueError,
        "scale_tril of shape (2, 2); got (1, 2, 2)",
    ),
    (
        "tril-integer",
        torch.zeros(2),
        torch.eye(2).long(),
        TypeError,
        "scale_tril of a floating-point dtype",
    ),
    (
        "tril-negative",
        torch.zeros(2),
        -torch.eye(2),
        ValueError,
        "scale_tril with a positive diagonal; got [-1.0, -1.0]",
    ),
    (
        "tril-nan",
        torch.zeros(2),
        torch.full((2, 2), torch.nan),
        ValueError,
        "scale_tril with a positive diagonal",
    ),
    (
        "tril-upper",
        torch.zeros(2),
        torch.ones(2, 2),
        ValueError,
        "scale_tril to be lower-triangular",
    ),
]:
    mistake(f"set-{label}", set_to(loc, tril), error, fragment)
mistake(
    "set-with-context",
    lambda: LowerTriangularAffine(2, C).set(torch.zeros(2), torch.eye(2)),
    ValueError,
    "LowerTriangularAffine without context",
)

# Calls

PLAIN: dict[str, Callable[[], Transform]] = {
    "AffineCoupling": lambda: AffineCoupling(D),
    "Elementwise": lambda: Elementwise(Affine(), D),
    "Permute": lambda: Permute(D),
    "LowerTriangularAffine": lambda: LowerTriangularAffine(D),
    "Inverse": lambda: AffineCoupling(D).inv,
    "Compose": lambda: Compose([Reverse(D), Rescale(D)]),
    "Conditioned": lambda: AffineCoupling(D, C).condition(torch.zeros(C)),
}
WRONG_POINTS: dict[str, tuple[Any, type[Exception], str]] = {
    "wide": (torch.zeros(5, D + 1), ValueError, "of shape (*, 3); got (5, 4)"),
    "narrow": (torch.zeros(D - 1), ValueError, "of shape (*, 3); got (2,)"),
    "scalar": (torch.tensor(0.0), ValueError, "of shape (*, 3); got ()"),
    "integer": (torch.zeros(5, D).long(), TypeError, "of a floating-point dtype; got torch.int64"),
    "boolean": (torch.zeros(5, D).bool(), TypeError, "of a floating-point dtype; got torch.bool"),
    "complex": (
        torch.zeros(5, D, dtype=torch.complex64),
        TypeError,
        "of a floating-point dtype; got torch.complex64",
    ),
    "list": ([0.0] * D, TypeError, "to be a tensor of shape (*, 3); got list"),
    "none": (None, TypeError, "to be a tensor of shape (*, 3); got NoneType"),
}
for label, (value, error, fragment) in WRONG_POINTS.items():
    for owner, made in PLAIN.items():
        mistake(f"{owner}-call-{label}", lambda m=made, v=value: m()(v), error, fragment)
        mistake(f"{owner}-inverse-{label}", lambda m=made, v=value: m().inv(v), error, fragment)
    for owner, made in {
        "flow": lambda: pf.RealNVP(D)(),
        "flow-positive": lambda: pf.RealNVP(D, support=constraints.positive)(),
        "flow-context": lambda: pf.RealNVP(D, C)(torch.zeros(C)),
        "flow-simplex": lambda: pf.RealNVP(D - 1, support=constraints.simplex)(),
        "unvalidated": lambda: pf.distributions.FlowDistribution(
            standard, Reverse(D), validate_args=False
        ),
    }.items():
        mistake(
            f"{owner}-log_prob-{label}", lambda m=made, v=value: m().log_prob(v), error, fragment
        )

WRONG_CONTEXTS: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (None, ValueError, "context of shape (*, 2) for"),
    "wide": (torch.zeros(5, 3), ValueError, "context of shape (*, 2); got (5, 3)"),
    "scalar": (torch.tensor(0.0), ValueError, "context of shape (*, 2); got ()"),
    "integer": (
        torch.zeros(2).long(),
        TypeError,
        "context of a floating-point dtype; got torch.int64",
    ),
    "complex": (
        torch.zeros(2, dtype=torch.complex64),
        TypeError,
        "context of a floating-point dtype; got torch.complex64",
    ),
    "list": ([0.0, 0.0], TypeError, "context to be a tensor of shape (*, 2); got list"),
}
for label, (value, error, fragment) in WRONG_CONTEXTS.items():
    mistake(f"flow-context-{label}", lambda v=value: pf.RealNVP(D, C)(v), error, fragment)
    for owner, made in {
        "AffineCoupling": lambda: AffineCoupling(D, C),
        "Inverse": lambda: AffineCoupling(D, C).inv,
        "Compose": lambda: Compose([Reverse(D), Rescale(D, C)]),
    }.items():
        mistake(
            f"{owner}-condition-{label}", lambda m=made, v=value: m().condition(v), error, fragment
        )
mistake(
    "flow-context-missing",
    lambda: pf.NICE(D, C)(),
    ValueError,
    "context of shape (*, 2) for NICE; got None",
)
mistake(
    "flow-context-unwanted",
    lambda: pf.NICE(D)(torch.zeros(2)),
    ValueError,
    "Expected no context, because NICE was made without context_features; got a tensor of shape (2,).",
)
mistake(
    "call-without-context",
    lambda: AffineCoupling(D, C)(torch.zeros(D)),
    ValueError,
    "context of shape (*, 2) for AffineCoupling (give it by condition(context)); got None",
)
mistake(
    "inverse-call-without-context",
    lambda: AffineCoupling(D, C).inv(torch.zeros(D)),
    ValueError,
    "condition(context)",
)
mistake(
    "with_cache", lambda: Reverse(D).with_cache(2), ValueError, "cache_size to be 0 or 1; got 2"
)


# Options of every family: whoever takes one refuses the same values of it.

#: Options that are true or false.
SWITCHES = {"standardize", "residual", "reversible", "rotate", "bias", "adjoint", "coupling"}
NOT_SIZES: list[tuple[Any, type[Exception], str]] = [
    (0, ValueError, "got 0"),
    (-2, ValueError, "got -2"),
    (2.5, TypeError, "got 2.5"),
]
NOT_POSITIVE: list[tuple[Any, type[Exception], str]] = [
    (0, ValueError, "positive and finite; got 0"),
    (-1.0, ValueError, "positive and finite; got -1.0"),
    (float("nan"), ValueError, "positive and finite; got nan"),
    ("1", TypeError, "to be a number; got '1'"),
]
OPTIONS: dict[str, list[tuple[Any, type[Exception], str]]] = {
    "order": [
        ("shuffled", ValueError, "or a permutation; got 'shuffled'"),
        ([0, 1], ValueError, "order to hold each of 0 .. 2 once; got [0, 1]"),
        ([0, 1, 1], ValueError, "order to hold each of 0 .. 2 once; got [0, 1, 1]"),
        (3, TypeError, "order to be a sequence of integers; got 3"),
    ],
    "adjacency": [
        (torch.ones(D, D).tril(-1), TypeError, "adjacency to be boolean; got torch.float32"),
        (torch.ones(D, D + 1).bool(), ValueError, "adjacency of shape (3, 3); got (3, 4)"),
        ([[False, True, False], [False, False, True], [True, False, False]], ValueError, "cycle"),
        (torch.eye(D).bool(), ValueError, "cycle"),
        ("tree", TypeError, "adjacency to be a boolean matrix; got 'tree'"),
    ],
    "fast": [("both", ValueError, "fast to be"), (None, ValueError, "fast to be")],
    "mixing": [
        ("stir", ValueError, "mixing to be one of reverse, permute, householder"),
        (3, TypeError, "mixing to be a name or a callable features -> transform; got 3"),
        (Reverse(D), TypeError, "mixing to be a name or a callable"),
        (lambda features: None, TypeError, "the result of mixing"),
    ],
    "tails": [
        ("fat", ValueError, "tails to be gpd, loft, student or None; got 'fat'"),
        (3, ValueError, "tails to be"),
    ],
    "bins": [*NOT_SIZES, (1, ValueError, "bins >= 2; got 1")],
    "spline": [
        (
            "cubic",
            ValueError,
            "spline to be one of 'rational-quadratic', 'linear-rational', 'circular'; got 'cubic'",
        )
    ],
    "degree": NOT_SIZES,
    "polynomials": NOT_SIZES,
    "components": NOT_SIZES,
    "units": NOT_SIZES,
    "layers": NOT_SIZES,
    "nodes": NOT_SIZES,
    "reflections": [*NOT_SIZES, (3, ValueError, "even")],
    "steps": NOT_SIZES,
    "lipschitz": [
        *NOT_POSITIVE[:2],
        (1.0, ValueError, "lipschitz within (0, 1), because only then"),
    ],
    "trace": [("guess", ValueError, "trace to be"), (None, ValueError, "trace to be")],
    "solver": [("cramer", ValueError, "solver to be"), (None, ValueError, "solver to be")],
    "rtol": NOT_POSITIVE,
    "atol": NOT_POSITIVE,
    "momentum": [*NOT_POSITIVE, (2.0, ValueError, "momentum <= 1; got 2.0")],
    "epsilon": NOT_POSITIVE,
    "start": NOT_POSITIVE,
    "min_size": NOT_POSITIVE,
    "min_slope": NOT_POSITIVE,
}
UNIVARIATES = {
    getattr(pf.transforms, name)
    for name in pf.transforms.__all__
    if inspect.isclass(getattr(pf.transforms, name))
    and hasattr(getattr(pf.transforms, name), "linear")
} - {pf.univariate.Univariate}
PUBLIC = sorted(
    {
        owner
        for owner in (
            *(getattr(pf, n) for n in pf.__all__),
            *(getattr(pf.flows, n) for n in pf.flows.__all__),
            *(getattr(pf.transforms, n) for n in pf.transforms.__all__),
        )
        if inspect.isclass(owner)
        and (owner in UNIVARIATES or issubclass(owner, (Transform, pf.Flow)))
        and owner is not pf.flows.LayeredFlow
    },
    key=lambda owner: owner.__name__,
)


def made(owner: type, **options: Any) -> Any:
    """An instance of a class that takes so many features, if it takes them."""
    required = {"univariate": Affine(), "features": D}
    return owner(
        **{
            name: required[name] for name in inspect.signature(owner).parameters if name in required
        },
        **options,
    )


for owner in PUBLIC:
    for option, values in OPTIONS.items():
        if option not in inspect.signature(owner).parameters:
            continue
        for number, (value, error, fragment) in enumerate(values):
            # A tolerance is asked of solvers that adapt, steps of those that do not.
            also: dict[str, Any] = {"solver": "rk4"} if option == "steps" else {}
            if owner is pf.NSF and option == "order":
                also = {"coupling": False}
            key = f"{owner.__name__}-{option}-{number}"
            mistake(
                key,
                lambda o=owner, k=option, v=value, a=also: made(o, **{k: v}, **a),
                error,
                fragment,
            )

READY_MADE = sorted(
    owner.__name__
    for owner in PUBLIC
    if issubclass(owner, pf.flows.LayeredFlow)
    and next(iter(inspect.signature(owner).parameters)) == "features"
)
for name in READY_MADE:
    preset = getattr(pf.flows, name)
    parameters = inspect.signature(preset).parameters
    networks = {
        "network": (TypeError, "Expected network to make a module"),
        "hidden": (TypeError, "hidden to be a sequence"),
    }
    for option, (error, fragment) in networks.items():
        if option in parameters:
            options = {"coupling": False} if (name, option) == ("NSF", "hidden") else {}
            mistake(
                f"{name}-{option}-number",
                lambda p=preset, o={option: 8, **options}: p(D, C, **o),
                error,
                fragment,
            )
    mistake(
        f"{name}-unknown",
        lambda p=preset: p(D, hidden_features=(8,)),
        TypeError,
        f"of the options of {name}, which are ",
    )
    for label, options, error, fragment in [
        ("features-zero", {"features": 0}, ValueError, "features >= 1; got 0"),
        ("features-float", {"features": 3.0}, TypeError, "features to be an integer; got 3.0"),
        (
            "context-zero",
            {"features": D, "context_features": 0},
            ValueError,
            "context_features >= 1; got 0",
        ),
        ("transforms-zero", {"features": D, "transforms": 0}, ValueError, "transforms >= 1; got 0"),
        (
            "transforms-float",
            {"features": D, "transforms": 2.0},
            TypeError,
            "transforms to be an integer; got 2.0",
        ),
        ("base-word", {"features": D, "base": "normal"}, TypeError, "base to be a distribution"),
        (
            "support-word",
            {"features": D, "support": "positive"},
            TypeError,
            "support to be a constraint",
        ),
        (
            "name-empty",
            {"features": D, "name": ""},
            ValueError,
            "name to have at least one character",
        ),
        (
            "student-and-base",
            {
                "features": D,
                "tails": "student",
                "base": dist.Normal(torch.zeros(D), 1.0).to_event(1),
            },
            ValueError,
            "got both",
        ),
    ]:
        mistake(f"ready-made-{name}-{label}", lambda p=preset, o=options: p(**o), error, fragment)

for kwargs in ({"mixing": "lu"}, {"tails": "gpd"}):
    mistake(
        f"NSF-circular-{kwargs}",
        lambda k=kwargs: pf.NSF(D, spline="circular", **k),
        ValueError,
        "for angles",
    )


def answer(make: Callable[[], Any]) -> tuple[type[BaseException] | None, str]:
    """The error that a mistake raises, and what it says."""
    try:
        make()
    except Exception as error:
        return type(error), str(error)
    return None, ""


def owner_of(name: str) -> str:
    return name.removeprefix("ready-made-").partition("-")[0]


@pytest.mark.parametrize("owner", sorted({owner_of(name) for name in MISTAKES}))
def test_a_mistake_is_one_clear_sentence(owner):
    """All mistakes of a class in one test, of which those that are told badly are shown."""
    told_badly = {}
    for name, (make, expected, fragment) in MISTAKES.items():
        if owner_of(name) == owner:
            error, message = answer(make)
            sentence = message.startswith("Expected ") and message.endswith(".")
            short = "\n" not in message and len(message) < 300
            if not (error is expected and fragment in message and sentence and short):
                told_badly[name] = error, message
    assert not told_badly


def test_the_table_names_every_option():
    """An option that is added to a constructor needs its rows here."""
    known = {
        *(
            "features",
            "context_features",
            "mask",
            "activation",
            "context_shape",
            "hidden",
            "network",
            "per_channel",
            "positions",
            "scale",
            "bound",
            "transforms",
            "last",
        ),
        *(
            "base",
            "support",
            "name",
            "univariate",
            "permutation",
            "seed",
            "transform",
            "context",
            "event_shape",
        ),
        *("path_gradient", "auxiliary", "validate_args", "args", "kwargs", *OPTIONS, *SWITCHES),
    }
    for owner in PUBLIC:
        unknown = set(inspect.signature(owner).parameters) - known
        assert not unknown, f"{owner.__name__}: {unknown}"


# What looks like a mistake and is none


def test_sizes_may_be_numpy_integers():
    numpy = pytest.importorskip("numpy")
    three = numpy.int64(3)
    flow = pf.RealNVP(
        three, numpy.int32(2), transforms=numpy.int64(2), network=mlp([numpy.int64(4)])
    )
    assert flow(torch.zeros(2)).sample().shape == (3,)
    assert Permute(numpy.array([1, 0]).tolist())(torch.tensor([1.0, 2.0])).tolist() == [2.0, 1.0]


def test_masks_may_be_lists_tensors_and_arrays():
    numpy = pytest.importorskip("numpy")
    given = [True, False, True]
    for mask in (given, tuple(given), torch.tensor(given), numpy.array(given)):
        t = AffineCoupling(D, mask=mask)
        assert t.order.tolist() == [0, 2, 1]


def test_an_activation_may_be_any_maker_of_modules():
    for activation in (
        nn.Tanh,
        lambda: nn.LeakyReLU(0.2),
        lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()),
    ):
        t = AffineCoupling(
            D,
            network=mlp((8, 8), activation),
        )
        assert t(torch.zeros(2, D)).shape == (2, D)


def test_an_error_inside_an_activation_is_the_users_to_see():
    def broken() -> nn.Module:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        AffineCoupling(D, network=mlp(activation=broken))


def test_one_transform_and_any_iterable_make_a_flow():
    for transforms in (
        Reverse(D),
        [Reverse(D)],
        (Reverse(D),),
        iter([Reverse(D)]),
        nn.ModuleList([Reverse(D)]),
    ):
        assert pf.Flow(transforms)().sample().shape == (D,)


def test_flows_are_named_by_their_class_or_their_user():
    assert pf.RealNVP(D)._pyro_name == "RealNVP"
    assert pf.NICE(D, name="prior")._pyro_name == "prior"


# Masks by their names


def test_named_masks():
    def masks(*args: Any, **kw: Any) -> list[list[int]]:
        return [m.int().tolist() for m in coupling_masks(*args, **kw)]

    assert masks("half", 5, 3) == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert masks("checkerboard", 4, 2) == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert masks("alternating", 4, 5) == [
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 1, 1],
        [0, 1, 0, 1],
        [1, 1, 0, 0],
    ]
    assert masks([True, False], 2, 3) == [[1, 0], [0, 1], [1, 0]]
    assert masks(torch.eye(3).bool(), 3, 3) == torch.eye(3).int().tolist()


@pytest.mark.parametrize("features", [2, 3, 4, 7, 10])
@pytest.mark.parametrize("mask", ["half", "checkerboard", "alternating", "random"])
def test_named_masks_split_evenly_and_move_every_entry(mask, features):
    chosen = coupling_masks(mask, features, 6)
    assert len(chosen) == 6
    for m in chosen:
        assert m.dtype == torch.bool and m.shape == (features,)
        assert abs(2 * int(m.sum()) - features) <= 1
    assert bool(torch.stack(chosen).any(0).all()) and bool((~torch.stack(chosen)).any(0).all())


@pytest.mark.parametrize("features", [2, 3, 4, 10])
def test_no_random_mask_repeats_the_one_before(features):
    masks = coupling_masks("random", features, 12)
    assert not any(torch.equal(left, right) for left, right in pairwise(masks))


def test_random_masks_depend_on_their_seed_alone():
    def masks(seed: int) -> torch.Tensor:
        return torch.stack(coupling_masks("random", 10, 6, seed=seed))

    first = masks(0)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert torch.equal(masks(0), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(masks(1), first)
    assert torch.equal(first[0], ~first[1]) and not torch.equal(first[0], first[2])
    assert torch.equal(Permute(10, seed=3).permutation, Permute(10, seed=3).permutation)
    assert not torch.equal(Permute(10, seed=3).permutation, Permute(10, seed=4).permutation)


def test_construction_draws_for_weights_only_from_the_seed():
    torch.manual_seed(0)
    one = pf.RealNVP(D).state_dict()
    torch.manual_seed(0)
    other = pf.RealNVP(D).state_dict()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_lower_triangular_affine_is_set_to_any_gaussian():
    t = LowerTriangularAffine(3)
    tril = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-1.0, 0.3, 1e-4]])
    loc = torch.tensor([1.0, -2.0, 3.0])
    t.set(loc, tril)
    flow = pf.Flow([t])
    x = torch.randn(5, 3) @ tril.mT + loc
    expected = dist.MultivariateNormal(loc, scale_tril=tril).log_prob(x)
    torch.testing.assert_close(flow().log_prob(x), expected, rtol=1e-3, atol=1e-2)
    back_loc, back_tril = t.loc_and_scale_tril()
    torch.testing.assert_close(back_loc, loc)
    torch.testing.assert_close(back_tril, tril)
    assert not back_tril.requires_grad
    with pytest.raises(ValueError, match="LowerTriangularAffine without context"):
        LowerTriangularAffine(3, C).loc_and_scale_tril()
