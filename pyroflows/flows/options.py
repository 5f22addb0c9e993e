"""The options that all ready-made flows share, and how they are spelt out in a signature."""

# Without `from __future__ import annotations`, because signatures are read when classes are made.

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypedDict, get_args

import torch
from torch import Tensor
from torch.distributions import constraints

from .._checks import call_factory, check_size
from ..distributions.bases import StudentTBase
from ..transforms import (
    ActNorm,
    BatchNorm,
    Coupling,
    Householder,
    Inverse,
    LULinear,
    MatrixExponential,
    Orthogonal,
    Permute,
    Reverse,
    Transform,
)
from ..transforms.base import check_transform
from ..transforms.permute import inverse_permutation
from ..transforms.tails import tail_transform
from .flow import Base

__all__ = ["MIXINGS", "FlowOptions", "Mixing"]

Mixing = str | Callable[[int], Transform] | None


class FlowOptions(TypedDict, total=False):
    """Options that all ready-made flows share, given by keyword.

    Attributes:
        mixing: Maps between two layers that mix entries: a name of :data:`MIXINGS`, a callable that
            makes a transform of so many features, or ``None``, with which a flow is that of its
            paper. The default ``"auto"`` is ``"lu"`` for RealNVP, MAF and NSF (but nothing for
            angles), which mostly fits data better, and nothing for the others. Each ``"lu"`` learns
            ``features ** 2`` numbers.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of
            :mod:`pyroflows.transforms.tails`; ``"student"``, a base of Student-t distributions with
            learned degrees; or ``None``, the default.
        base: Base distribution, or a module that makes one; the standard normal by default. See
            :class:`pyroflows.Flow`.
        support: Constraint that values satisfy; the whole space by default. Features are counted
            before values are mapped onto it: a simplex of 3 entries takes 2 of them, the Cholesky
            factor of a correlation matrix of 3 rows takes 3.
        name: Name in the param store; that of the class by default.
        reversible: Whether training recomputes activations by inversion instead of keeping them, so
            that memory does not grow with depth. Every layer must be fast in both directions.
        standardize: Whether a last layer takes over the means and scales of the data that
            :func:`pyroflows.fit_density` is given.

    Example:
        >>> import pyroflows as pf
        >>> options: FlowOptions = {"mixing": "householder", "tails": "gpd"}
        >>> pf.NICE(3, **options)().event_shape
        torch.Size([3])
    """

    mixing: Mixing
    tails: str | None
    base: Base | None
    support: constraints.Constraint | None
    name: str | None
    reversible: bool
    standardize: bool


# Signatures


def spell_out_options(flow: type) -> inspect.Signature:
    """Returns the signature of a flow with each of its options as a parameter.

    The options are the keys of the typed dictionary in ``**options: Unpack[...]``, or all options
    of the base class where there is no such annotation. Defaults are those of the base class; an
    option that it lacks is ``None``.

    Args:
        flow: A class whose base class has been spelt out.
    """
    own = list(inspect.signature(flow.__init__).parameters.values())[1:]  # type: ignore[misc]
    if not own or own[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return inspect.Signature(own)
    inherited = {
        name: parameter
        for name, parameter in inspect.signature(flow.__mro__[1]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    named = {parameter.name: parameter for parameter in own[:-1]}
    annotated = get_args(own[-1].annotation)
    options = annotated[0].__annotations__ if annotated else inherited
    # Those that all flows share come last.
    for name in sorted(options, key=FlowOptions.__annotations__.__contains__):
        lacking = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        named.setdefault(name, inherited.get(name, lacking))
    return inspect.Signature(list(named.values()))


def check_options(flow: type, options: Mapping[str, Any]) -> None:
    """Raises ``TypeError`` if a flow does not take an option of that name.

    Args:
        flow: The class.
        options: What it was given by keyword.
    """
    parameters = inspect.signature(flow).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"{close[0]} or another" if close else "one"
            raise TypeError(
                f"Expected {hint} of the options of {flow.__name__}, which are {', '.join(known)}; "
                f"got {name!r}."
            )


# Maps between layers

#: Radians by which two linear maps or more turn at the start, off the saddle point that the
#: identity is for independent entries.
SLIGHT = 0.1


def _repeat(make: Callable[[int], Transform]) -> Callable[[int, int], list[Transform]]:
    """Makes all maps in the same way."""

    def repeat(features: int, count: int) -> list[Transform]:
        made = [
            call_factory("mixing", make, "Householder is", features=features) for _ in range(count)
        ]
        return [check_transform("the result of mixing", each) for each in made]

    return repeat


def _permute(features: int, count: int) -> list[Transform]:
    return [Permute(features, seed=number) for number in range(count)]


def _turn(features: int, count: int) -> list[Transform]:
    """Makes linear maps that turn to and fro, so that together they start at the identity."""
    angles = [-SLIGHT if number % 2 else SLIGHT for number in range(count)]
    if count % 2:
        angles[-1] = 0.0
    return [
        LULinear(features, rotate=angle, seed=number // 2).inv
        for number, angle in enumerate(angles)
    ]


#: What the option ``mixing`` puts between layers, by name: made of the number of features and how
#: many maps there are. Maps with a cheaper direction are turned so that scoring takes it.
MIXINGS: dict[str, Callable[[int, int], list[Transform]]] = {
    "reverse": _repeat(Reverse),
    "permute": _permute,
    "householder": _repeat(Householder),
    "orthogonal": _repeat(Orthogonal),
    "lu": _turn,
    "exponential": _repeat(MatrixExponential),
    "actnorm": _repeat(ActNorm),
    "batchnorm": _repeat(lambda features: BatchNorm(features).inv),
}


def mix_layers(layers: list[Transform], mixing: Mixing) -> list[Transform]:
    """Puts a map that mixes entries between each two layers.

    Args:
        layers: Transforms in generative order.
        mixing: A name of :data:`MIXINGS`, a callable that makes a transform of so many features, or
            ``None``.

    Raises:
        TypeError: If ``mixing`` is neither, or makes no transform.
        ValueError: If the name is unknown.
    """
    if mixing is None:
        return layers
    gaps = len(layers) - 1
    # At least one, so that a mistake shows with a single layer too.
    maps = _find_mixing(mixing)(event_size(layers), max(1, gaps))
    mixed = [part for pair in zip(layers, maps, strict=False) for part in pair]
    return mixed[: 2 * gaps] + layers[gaps:]


def never_moved(layers: Iterable[Transform], masks: Iterable[Tensor]) -> Tensor:
    """Finds the entries that couplings and what is between them leave as they are.

    Args:
        layers: Transforms in generative order.
        masks: The masks of the couplings among them, boolean tensors of shape ``(features,)``;
            ``True`` marks the entries that stay.

    Returns:
        Boolean tensor of shape ``(features,)``, which marks entries by their places at the end.
    """
    left = iter(masks)
    still = torch.ones((), dtype=torch.bool, device="cpu")
    for layer in layers:
        inverted = isinstance(layer, Inverse)
        map_ = layer.transform if inverted else layer
        if isinstance(map_, Coupling):
            still = still & next(left)
        elif isinstance(map_, Permute):
            entries = inverse_permutation(map_.made_of) if inverted else map_.made_of
            still = still[entries]
        else:  # it has parameters for every entry
            still = torch.zeros_like(still)
    return still


def _find_mixing(mixing: Any) -> Callable[[int, int], list[Transform]]:
    if isinstance(mixing, str):
        if mixing not in MIXINGS:
            raise ValueError(f"Expected mixing to be one of {', '.join(MIXINGS)}; got {mixing!r}.")
        return MIXINGS[mixing]
    if isinstance(mixing, Transform) or not callable(mixing):
        raise TypeError(
            f"Expected mixing to be a name or a callable features -> transform; got {mixing!r}."
        )
    return _repeat(mixing)


def event_size(layers: list[Transform]) -> Any:
    """Returns the features of vectors, or the shape of other events, as transforms take them."""
    shape = layers[0].event_shape
    return shape[0] if len(shape) == 1 else tuple(shape)


# Depth

#: Layers of a flow whose scales and shifts may be as large as they are for one layer alone.
SHALLOW = 8


def depth_share(transforms: int) -> float:
    r"""The share :math:`\min(1, 8 / K)` of what one layer may do that each of :math:`K` may.

    What layers do multiplies up: a step of training that moves each by a little moves a deep flow
    far, and far out its values grow exponentially with depth.
    """
    return min(1.0, SHALLOW / transforms)


# Tails


def tail_layers(tails: str | None, features: Any) -> list[Transform]:
    """Makes the last layer that gives a flow its tails.

    Args:
        tails: The option; see :class:`FlowOptions`.
        features: Entries of a vector, or the shape of an event.

    Raises:
        ValueError: If ``tails`` is unknown.
    """
    if tails is None or tails == "student":
        return []
    if tails in ("gpd", "loft"):
        return [tail_transform(tails, features)]
    raise ValueError(f"Expected tails to be gpd, loft, student or None; got {tails!r}.")


def tail_base(tails: str | None, features: Any, base: Base | None) -> Base | None:
    """Makes the base that gives a flow its tails, or returns the one that was given.

    Args:
        tails: The option; see :class:`FlowOptions`.
        features: Entries of a vector.
        base: The base that the user gave.

    Raises:
        ValueError: If both bring a base.
    """
    if tails != "student":
        return base
    if base is not None:
        raise ValueError(
            "Expected either tails='student', which brings its base, or base; got both."
        )
    return StudentTBase(check_size("features", features))
