"""Packaged example models with their data, for the command line, the tutorials and the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pyroflows.examples import data
from pyroflows.examples.models import (
    eight_schools,
    eight_schools_noncentered,
    funnel,
    linear_regression,
    logistic_regression,
)

__all__ = [
    "EXAMPLES",
    "Example",
    "eight_schools",
    "eight_schools_noncentered",
    "funnel",
    "linear_regression",
    "load_example",
    "logistic_regression",
]


@dataclass(frozen=True, eq=False)
class Example:
    """A model with the data to call it on.

    Args:
        name: name under which :func:`load_example` and the command line know it.
        model: Pyro model, called as ``model(*args, **kwargs)``.
        args: positional arguments, tensors or ``None``.
        kwargs: keyword arguments, tensors or ``None``.
        description: one sentence on what the model is.

    >>> EXAMPLES["eight_schools"].kwargs["y"].shape
    torch.Size([8])
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    description: str = ""


def _schools() -> dict[str, Any]:
    return {"sigma": torch.tensor(data.SCHOOLS_ERROR), "y": torch.tensor(data.SCHOOLS_EFFECT)}


EXAMPLES: dict[str, Example] = {
    example.name: example
    for example in (
        Example(
            "eight_schools",
            eight_schools,
            kwargs=_schools(),
            description="Coaching in eight schools (Rubin 1981), centred: a funnel, the hard one.",
        ),
        Example(
            "eight_schools_noncentered",
            eight_schools_noncentered,
            kwargs=_schools(),
            description="The same eight schools, non-centred: the funnel transformed away.",
        ),
        Example(
            "funnel",
            funnel,
            description="Neal's funnel in 10 dimensions (Neal 2003): no data, evidence exactly 1.",
        ),
        Example(
            "logistic_regression",
            logistic_regression,
            kwargs={
                "temperature": torch.tensor(data.FLIGHT_TEMPERATURE),
                "distress": torch.tensor(data.FLIGHT_DISTRESS),
            },
            description="O-ring distress by temperature on 23 shuttle flights (Dalal et al. 1989).",
        ),
        Example(
            "linear_regression",
            linear_regression,
            kwargs={
                "weight": torch.tensor(data.CAR_WEIGHT),
                "horsepower": torch.tensor(data.CAR_HORSEPOWER),
                "mpg": torch.tensor(data.CAR_MPG),
            },
            description="Fuel economy by weight and power of 32 cars (Henderson and Velleman 1981).",
        ),
    )
}


def load_example(name: str) -> Example:
    """A packaged example, its data copied in torch's default dtype.

    Args:
        name: a key of ``EXAMPLES``.

    Returns:
        The example, whose tensors are the caller's own.

    Raises:
        ValueError: there is no example of that name; the message lists those there are.

    >>> sorted(load_example("eight_schools").kwargs)
    ['sigma', 'y']
    """
    if name not in EXAMPLES:
        raise ValueError(f"There is no example {name!r}; the examples are {', '.join(EXAMPLES)}.")
    example = EXAMPLES[name]
    return replace(
        example,
        args=tuple(_own(value) for value in example.args),
        kwargs={key: _own(value) for key, value in example.kwargs.items()},
    )


def _own(value: Any) -> Any:
    return torch.tensor(value.tolist()) if isinstance(value, torch.Tensor) else value
