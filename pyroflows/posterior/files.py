"""Files of posteriors: plain data that say how to make the guide, its numbers, and the verdict."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from os import PathLike, fsdecode, fspath
from typing import Any

import torch
from torch import Tensor

from .._files import check_writable, save_whole
from ..model.density import LogDensity

__all__ = [
    "FIELDS",
    "damaged",
    "describe_sites",
    "is_plain",
    "read_state",
    "reading",
    "write_state",
]

FORMAT = 4
#: The fields of a file, with their types.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "sites": list,
    "guide": dict,
    "parameters": dict,
    "arguments": (list, type(None)),
    "verdict": dict,
    "trajectories": int,
    "name": str,
    "rungs": list,
    "history": list,
    "seconds": (float, int),
    "interrupted": bool,
}


def write_state(state: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Writes the plain data of a posterior.

    Args:
        state: A value for each of :data:`FIELDS`.
        path: Where to write.

    Raises:
        TypeError: If ``path`` is no path.
        ValueError: If the file cannot be written.
    """
    name = _checked_path(path)
    try:
        check_writable(name)
        save_whole({"format": FORMAT, **state}, name)
    # Torch's own writer raises RuntimeError; a name with a null character ValueError.
    except (OSError, RuntimeError, ValueError) as error:
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
    path = _checked_path(path)
    try:
        with open(path, "rb") as file:
            content = file.read()
    # Of a name with a null character the latter.
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected the file of a saved posterior; {path!r} cannot be read ({error})."
        ) from None
    try:
        state = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        # The bytes of another kind of file make the reader raise errors of any type.
        state = None
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"Expected the file of a saved posterior; {path!r} is none.")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise ValueError(
            f"Expected a saved posterior of format {FORMAT}; {path!r} has format {state['format']}."
        )
    missing = [name for name in FIELDS if name not in state]
    if missing:
        raise ValueError(
            f"Expected the file of a saved posterior; {path!r} lacks {', '.join(missing)}."
        )
    for name, kinds in FIELDS.items():
        if not isinstance(state[name], kinds):
            raise damaged(path, f"{name} is of type {type(state[name]).__name__}")
    return state


@contextlib.contextmanager
def reading(path: str | PathLike[str], *sentences: type[Exception]) -> Iterator[None]:
    """Tells in a sentence that what is read in the block is not what was written.

    Args:
        path: The file.
        sentences: Types of errors that tell enough.

    Raises:
        ValueError: In the place of an error of any other type.
    """
    try:
        yield
    except sentences:
        raise
    except Exception as error:
        # What stands in a damaged file makes its readers raise errors of any type.
        [line, *_] = str(error).splitlines() or [""]
        raise damaged(path, f"{type(error).__name__}: {line.rstrip('.')}") from error


def damaged(path: str | PathLike[str], reason: str) -> ValueError:
    """The error for a file in which something else stands than was written."""
    return ValueError(
        f"Expected the file of a saved posterior; {str(path)!r} is damaged ({reason})."
    )


def _checked_path(path: Any) -> str:
    try:
        return fsdecode(fspath(path))
    except TypeError:
        raise TypeError(f"Expected path to be a path; got {path!r}.") from None


def describe_sites(density: LogDensity) -> list[list[Any]]:
    """The latent sites of a model as plain data: names, shapes, and the maps onto the supports."""
    return [
        [site.name, list(site.shape), "".join(repr(site.transform).split())]
        for site in density.sites
    ]


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, strings and tensors only."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str, Tensor)
