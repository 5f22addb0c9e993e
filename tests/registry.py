"""Every transform and every flow by a name, and what the laws need to try them out.

A new transform or preset joins by one line here, and all laws hold it to account.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from families import (
    autoregressive,
    continuous,
    linear,
    monotone,
    planar,
    polynomial,
    presets,
    residual,
    splines,
    tails,
)
from families.sizes import NET, C, D
from pyro.distributions import constraints
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.nn import mlp
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
    Standardize,
    Transform,
)
from pyroflows.univariate import Affine, Scale, Shift, Univariate

Module = TypeVar("Module", bound=nn.Module)

FAMILIES = (
    autoregressive,
    continuous,
    linear,
    monotone,
    planar,
    polynomial,
    presets,
    residual,
    splines,
    tails,
)
SCALES = ("softclip", "exp", "softplus", "sigmoid")
MASKS: dict[str, Any] = {
    "half": "half",
    "checkerboard": "checkerboard",
    "alternating": "alternating",
    "random": "random",
    "list": [False, True, False],
    "tensor": torch.tensor([True, True, False]),
}
UNIVARIATES: dict[str, Univariate] = {
    "shift": Shift(),
    **{f"affine-{scale}": Affine(scale) for scale in SCALES},
    **{f"scale-{scale}": Scale(scale) for scale in SCALES},
    "affine-bound": Affine(bound=0.5),
}

#: Transforms that do not start at the identity, by intention.
MOVED = {
    "permute",
    "permute-random",
    "reverse",
    "reverse-1",
    "inverse-permute",
    "compose",
    "compose-inverse",
}
#: Transforms that stay affine whatever their parameters are.
AFFINE = {
    "standardize",
    "permute",
    "permute-random",
    "reverse",
    "inverse-permute",
    "lower-triangular",
    "lower-triangular-context",
    "inverse-lower-triangular",
    "elementwise-affine-context",
    "rescale-context",
    *(f"elementwise-{name}" for name in UNIVARIATES),
}

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    **{f"elementwise-{n}": (lambda u=u: Elementwise(u, D)) for n, u in UNIVARIATES.items()},
    "elementwise-1": lambda: Elementwise(Affine(), 1),
    "elementwise-affine-context": lambda: Elementwise(Affine(), D, C, **NET),
    "rescale": lambda: Rescale(D),
    "standardize": lambda: Standardize(D),
    "rescale-context": lambda: Rescale(D, C, **NET),
    "permute": lambda: Permute([1, 2, 0]),
    "permute-random": lambda: Permute(5, seed=3),
    "reverse": lambda: Reverse(D),
    "reverse-1": lambda: Reverse(1),
    "lower-triangular": lambda: LowerTriangularAffine(D),
    "lower-triangular-1": lambda: LowerTriangularAffine(1),
    "lower-triangular-context": lambda: LowerTriangularAffine(D, C, **NET),
    "additive-coupling": lambda: AdditiveCoupling(D, **NET),
    "additive-coupling-context": lambda: AdditiveCoupling(D, C, **NET),
    "coupling-scale": lambda: Coupling(Scale(), D, **NET),
    **{f"affine-coupling-{s}": (lambda s=s: AffineCoupling(D, scale=s, **NET)) for s in SCALES},
    **{
        f"affine-coupling-{n}": (lambda m=m: AffineCoupling(D, mask=m, **NET))
        for n, m in MASKS.items()
    },
    "affine-coupling-2": lambda: AffineCoupling(2, network=mlp(()), bound=1.0),
    "affine-coupling-context": lambda: AffineCoupling(D, C, network=mlp((8, 8), nn.Tanh)),
    "affine-coupling-context-linear": lambda: AffineCoupling(D, C, network=mlp(())),
    "inverse-permute": lambda: Permute([1, 2, 0]).inv,
    "inverse-lower-triangular": lambda: LowerTriangularAffine(D).inv,
    "inverse-coupling": lambda: AffineCoupling(D, **NET).inv,
    "inverse-coupling-context": lambda: Inverse(AffineCoupling(D, C, **NET)),
    "compose": lambda: Compose([AffineCoupling(D, **NET), Reverse(D), LowerTriangularAffine(D)]),
    "compose-context": lambda: Compose(
        [Rescale(D), AffineCoupling(D, C, **NET), AdditiveCoupling(D, C, **NET)]
    ),
    "compose-inverse": lambda: Compose(
        [Compose([AffineCoupling(D, **NET), Permute([1, 2, 0])]).inv, LowerTriangularAffine(D).inv]
    ),
    "compose-shared": lambda: Compose([t := LowerTriangularAffine(D), AffineCoupling(D, **NET), t]),
    "compose-conditioned": lambda: Compose(
        [AffineCoupling(D, C, **NET).condition(torch.ones(C)), Rescale(D)]
    ),
    "conditioned": lambda: AffineCoupling(D, C, **NET).condition(torch.tensor([0.5, -1.0])),
    "conditioned-lower-triangular": lambda: Conditioned(
        LowerTriangularAffine(D, C, **NET), torch.ones(C)
    ),
    "conditioned-inverse": lambda: AffineCoupling(D, C, **NET).inv.condition(
        torch.ones(1).expand(C)
    ),
}

SUPPORTS: dict[str, constraints.Constraint] = {
    "real": constraints.real,
    "real-vector": constraints.real_vector,
    "positive": constraints.positive,
    "unit-interval": constraints.unit_interval,
    "interval": constraints.interval(-1.0, 2.0),
    "less-than": constraints.less_than(3.0),
    "bounds": constraints.greater_than(torch.tensor([-1.0, 0.0, 1.0])),
    "simplex": constraints.simplex,
    "ordered": constraints.ordered_vector,
    "corr-cholesky": constraints.corr_cholesky,
}
BASES: dict[str, Callable[[], Any]] = {
    "normal": lambda: dist.Normal(torch.zeros(D), 2.0).to_event(1),
    "batch-as-event": lambda: dist.Normal(torch.zeros(D), 1.0),
    "laplace": lambda: dist.Laplace(torch.zeros(D), torch.ones(D)).to_event(1),
    "student": lambda: dist.StudentT(5.0 * torch.ones(D)).to_event(1),
    "multivariate": lambda: dist.MultivariateNormal(
        torch.ones(D), scale_tril=torch.tensor(0.5) * torch.eye(D)
    ),
    "low-rank": lambda: dist.LowRankMultivariateNormal(
        torch.zeros(D), torch.ones(D, 1), torch.ones(D)
    ),
    "transformed": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(D), 1.0).to_event(1),
        [dist.transforms.AffineTransform(torch.ones(D), 2.0 * torch.ones(D), event_dim=1)],
    ),
}
SMALL: dict[str, Any] = {"transforms": 2, **NET}

FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "nice": lambda: pf.NICE(D, **SMALL),
    "nice-context": lambda: pf.NICE(D, C, **SMALL),
    "realnvp": lambda: pf.RealNVP(D, **SMALL),
    "realnvp-context": lambda: pf.RealNVP(D, C, transforms=2, network=mlp((8, 8), nn.ReLU)),
    "realnvp-positive-context": lambda: pf.RealNVP(D, C, support=constraints.positive, **SMALL),
    **{f"realnvp-{s}": (lambda s=s: pf.RealNVP(D, scale=s, **SMALL)) for s in SCALES},
    **{f"nice-{n}": (lambda m=m: pf.NICE(D, mask=m, **SMALL)) for n, m in MASKS.items()},
    "realnvp-masks": lambda: pf.RealNVP(D, mask=torch.eye(D).bool(), transforms=3, **NET),
    **{
        f"realnvp-{n}": (lambda s=s: pf.RealNVP(D, support=s, **SMALL)) for n, s in SUPPORTS.items()
    },
    **{
        f"realnvp-base-{n}": (lambda b=b: pf.RealNVP(D, base=b(), **SMALL))
        for n, b in BASES.items()
    },
    "flow": lambda: pf.Flow([AffineCoupling(D, **NET), Permute(D), LowerTriangularAffine(D)]),
    "flow-inverse": lambda: pf.Flow(LowerTriangularAffine(D).inv),
    "flow-1": lambda: pf.Flow([Elementwise(Affine(), 1)]),
    "flow-1-context": lambda: pf.Flow(
        [Elementwise(Affine(), 1, C, **NET)], support=constraints.positive
    ),
}

#: Cases that differ from another by an option alone: the kit of laws alone holds these to account.
VARIANTS = {
    "elementwise-shift",
    *(f"elementwise-affine-{option}" for option in ("exp", "sigmoid", "softplus", "bound")),
    *(f"elementwise-scale-{scale}" for scale in ("softclip", "sigmoid", "softplus")),
    "rescale",
    "reverse",
    "reverse-1",
    "lower-triangular",
    "additive-coupling",
    "coupling-scale",
    *(f"affine-coupling-{scale}" for scale in SCALES),
    *(f"affine-coupling-{mask}" for mask in MASKS if mask != "random"),
    "affine-coupling-context-linear",
    "inverse-permute",
    "inverse-lower-triangular",
    "inverse-coupling",
    "compose",
    "compose-conditioned",
    "conditioned-lower-triangular",
    "nice",
    *(f"nice-{mask}" for mask in MASKS if mask != "tensor"),
    *(f"realnvp-{scale}" for scale in SCALES),
    *(f"realnvp-{n}" for n in ("real", "positive", "unit-interval", "interval", "less-than")),
    *(f"realnvp-base-{base}" for base in ("normal", "laplace", "low-rank")),
    "flow-1",
}

#: Laws that cannot hold for a case, by the name of their test, with the reason.
EXEMPT: dict[str, dict[str, str]] = {}

for family in FAMILIES:
    TRANSFORMS |= family.TRANSFORMS
    TRANSFORMS |= {
        f"elementwise-{n}": (lambda u=u: Elementwise(u, D)) for n, u in family.UNIVARIATES.items()
    }
    FLOWS |= family.FLOWS
    MOVED |= family.MOVED
    AFFINE |= family.AFFINE
    VARIANTS |= family.VARIANTS
    for law, cases in family.EXEMPT.items():
        EXEMPT.setdefault(law, {}).update(cases)


def kinds(names: Iterable[str], but: Collection[str] = ()) -> list[str]:
    """Names without the variants, which the kit of laws judges in the slow runs."""
    return [name for name in names if name not in VARIANTS and name not in but]


def perturbed(module: Module, scale: float = 0.3, seed: int = 1) -> Module:
    """The module with noise on all its parameters, away from the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter))
    return module


def points(module: Any, *batch: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    """Standard normal points of the module's event shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, *module.event_shape, generator=generator, dtype=torch.float64).to(
        dtype
    )


def context_for(
    module: Any, *batch: int, dtype: torch.dtype = torch.float64, seed: int = 3
) -> Tensor | None:
    """A context that the module takes; ``None`` where it takes none."""
    if module.context_features is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        *batch, module.context_features, generator=generator, dtype=torch.float64
    ).to(dtype)


def tolerance(dtype: torch.dtype, factor: float = 200.0) -> dict[str, float]:
    """Relative and absolute error that this many roundings may leave."""
    eps = torch.finfo(dtype).eps
    return {"rtol": factor * eps, "atol": factor * eps}


def normal_log_prob(x: Tensor) -> Tensor:
    """Log-density of the standard normal over vectors."""
    return (-0.5 * x.square() - 0.5 * math.log(2 * math.pi)).sum(-1)
