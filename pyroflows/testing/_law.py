"""The table of laws, and how a law speaks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._case import Broken, Case, per_point

Test = Callable[[Case], None]
#: The laws, and those that each builds on, by name.
TESTS: dict[str, Test] = {}
NEEDS: dict[str, tuple[str, ...]] = {}


def law(*needs: str) -> Callable[[Test], Test]:
    """Enters a law; where one that it builds on fails, it is not judged, so that a report names the cause alone."""

    def enter(test: Test) -> Test:
        name = test.__name__
        TESTS[name], NEEDS[name] = test, needs
        return test

    return enter


def premises(name: str) -> list[str]:
    """The laws that a law builds on, and those that they build on."""
    found: list[str] = []
    for need in NEEDS[name]:
        found += [other for other in (*premises(need), need) if other not in found]
    return found


def require(holds: bool | Tensor, sentence: str) -> None:
    if not bool(holds):
        raise Broken(sentence)


def near(
    actual: Tensor, expected: Tensor, slack: Tensor, what: str, at: Tensor | None = None
) -> None:
    """Demands equality up to the room that rounding has, one number per entry of the first dimension."""
    if not len(slack):
        return
    difference = torch.where(
        actual == expected, 0.0, actual.double() - expected.double()
    )  # of infinities too
    error, slack = (
        per_point(difference, len(slack)).nan_to_num(math.inf),
        slack.double().nan_to_num(math.inf),
    )
    excess = torch.where(error.isinf(), math.inf, error - slack)
    worst = int(excess.argmax())
    if not bool(excess[worst] <= 0):
        place = "" if at is None else f", at {brief(at[worst])}"
        raise Broken(
            f"Expected {what}, up to rounding of {slack[worst]:.1e}; got a difference of {error[worst]:.2g}{place}."
        )


def brief(value: Tensor) -> str:
    numbers = [f"{number:.4g}" for number in value.detach().double().flatten()[:6].tolist()]
    return (
        numbers[0]
        if value.dim() == 0
        else "[" + ", ".join(numbers) + (", ..." if value.numel() > 6 else "") + "]"
    )


def short(dtype: torch.dtype) -> str:
    """The name of a dtype."""
    return str(dtype).removeprefix("torch.")
