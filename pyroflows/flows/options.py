"""What ready-made flows share: maps that mix entries between layers, and heavy tails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .._checks import check_size
from ..distributions.bases import StudentTBase
from ..transforms import (
    ActNorm,
    BatchNorm,
    Householder,
    LULinear,
    MatrixExponential,
    Orthogonal,
    Permute,
    Reverse,
    Transform,
)
from ..transforms.base import check_transform
from ..transforms.tails import tail_transform
from .flow import Base

__all__ = ["MIXINGS", "Mixing"]

Mixing = str | Callable[[int], Transform] | None

#: Radians by which two linear maps or more turn at the start, off the saddle point that the identity is for independent
#: entries.
SLIGHT = 0.1


def _turn(gap: int, gaps: int) -> float:
    """The angle for one of some linear maps: every second one turns back, so that together they start at the identity."""
    if gap % 2:
        return -SLIGHT
    return SLIGHT if gap + 1 < gaps else 0.0


#: What the option ``mixing`` of a ready-made flow puts between two layers, by name; made of features, the gap's number and
#: how many gaps there are. Maps with a cheaper direction are turned so that scoring takes it.
MIXINGS: dict[str, Callable[[int, int, int], Transform]] = {
    "reverse": lambda features, gap, gaps: Reverse(features),
    "permute": lambda features, gap, gaps: Permute(features, seed=gap),
    "householder": lambda features, gap, gaps: Householder(features),
    "orthogonal": lambda features, gap, gaps: Orthogonal(features),
    "lu": lambda features, gap, gaps: (
        LULinear(features, rotate=_turn(gap, gaps), seed=gap // 2).inv
    ),
    "exponential": lambda features, gap, gaps: MatrixExponential(features),
    "actnorm": lambda features, gap, gaps: ActNorm(features),
    "batchnorm": lambda features, gap, gaps: BatchNorm(features).inv,
}


def mixed(layers: Iterable[Transform], features: int, mixing: Mixing) -> list[Transform]:
    """The layers with something between each two of them that mixes entries.

    Args:
        layers: Transforms in generative order.
        features: Entries of the vector.
        mixing: A name of :data:`MIXINGS`, a callable that makes a transform of so many features, or ``None``.

    Raises:
        TypeError: If ``mixing`` is neither, or makes no transform.
        ValueError: If the name is unknown.
    """
    stack = list(layers)
    if mixing is None:
        return stack
    gaps = len(stack) - 1
    # At least one, so that a mistake shows with a single layer too.
    between = [_mixing_layer(mixing, features, gap, gaps) for gap in range(max(1, gaps))][:gaps]
    return [part for pair in zip(stack, between, strict=False) for part in pair] + stack[gaps:]


def _mixing_layer(mixing: Any, features: int, gap: int, gaps: int) -> Transform:
    if isinstance(mixing, str):
        if mixing not in MIXINGS:
            raise ValueError(f"Expected mixing to be one of {', '.join(MIXINGS)}; got {mixing!r}.")
        return MIXINGS[mixing](features, gap, gaps)
    if isinstance(mixing, Transform) or not callable(mixing):
        raise TypeError(
            f"Expected mixing to be a name or a callable features -> transform; got {mixing!r}."
        )
    return check_transform("the result of mixing", mixing(features))


def with_tails(
    tails: str | None, features: int, base: Base | None
) -> tuple[list[Transform], Base | None]:
    """The last layer and the base that give a flow heavy tails.

    Args:
        tails: ``"gpd"`` or ``"loft"`` for a last layer (see :mod:`pyroflows.transforms.tails`), ``"student"`` for a base of
            Student-t with learned degrees, or ``None``.
        features: Entries of the vector.
        base: The base that the user gave.

    Raises:
        ValueError: If ``tails`` is unknown, or needs a base while another is given.
    """
    if tails is None:
        return [], base
    if tails == "student":
        if base is not None:
            raise ValueError(
                "Expected either tails='student', which brings its base, or base; got both."
            )
        return [], StudentTBase(check_size("features", features))
    if tails in ("gpd", "loft"):
        return [tail_transform(tails, features)], base
    raise ValueError(f"Expected tails to be gpd, loft, student or None; got {tails!r}.")
