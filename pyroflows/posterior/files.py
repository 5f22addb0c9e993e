"""Files of posteriors: plain data that say how to make the guide, its numbers, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fsdecode, fspath
from typing import Any

import torch
from torch import Tensor

from .._files import save_whole

__all__ = ["FIELDS", "is_plain", "read_state", "write_state"]

FORMAT = 4
FIELDS = (
    "sites",
    "guide",
    "parameters",
    "arguments",
    "verdict",
    "trajectories",
    "name",
    "rungs",
    "history",
    "seconds",
    "interrupted",
)


def write_state(state: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Writes the plain data of a posterior.

    Args:
        state: A value for each of :data:`FIELDS`.
        path: Where to write.

    Raises:
        TypeError: If ``path`` is no path.
        ValueError: If the file cannot be written.
    """
    name = fsdecode(fspath(path))
    try:
        save_whole({"format": FORMAT, **state}, name)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        raise ValueError(f"Expected a path that can be written; got {name!r} ({error}).") from None


def read_state(path: str | PathLike[str]) -> dict[str, Any]:
    """Reads the plain data of a posterior.

    Args:
        path: The file.

    Returns:
        A value for each of :data:`FIELDS`.

    Raises:
        ValueError: If the file is missing, or is none that :func:`write_state` has written.
    """
    try:
        state = torch.load(path, weights_only=True)
    except OSError as error:
        raise ValueError(
            f"Expected the file of a saved posterior; {str(path)!r} cannot be read ({error})."
        ) from None
    except Exception:
        # The bytes of another kind of file make the reader raise errors of any type.
        state = None
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"Expected the file of a saved posterior; {str(path)!r} is none.")
    if state["format"] != FORMAT:
        raise ValueError(
            f"Expected a saved posterior of format {FORMAT}; {str(path)!r} has format "
            f"{state['format']}."
        )
    missing = [name for name in FIELDS if name not in state]
    if missing:
        raise ValueError(
            f"Expected the file of a saved posterior; {str(path)!r} lacks {', '.join(missing)}."
        )
    return state


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, strings and tensors only."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str, Tensor)
