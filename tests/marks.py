"""Which parameters of a test the fast runs leave to the slow ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but_for(fast: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Values as parameters of a test, of which the fast runs take some alone.

    A tuple stands for the values of several parameters.
    """
    kept, parameters = list(fast), []
    for value in values:
        marks = () if value in kept else (pytest.mark.slow,)
        several = value if isinstance(value, tuple) else (value,)
        parameters.append(pytest.param(*several, marks=marks))
    return parameters
