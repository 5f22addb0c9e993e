"""Files of posteriors: plain data that say how to make the guide, its numbers, and the verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from .._archive import UnreadableError, is_dense, read_archive, write_archive
from .._files import check_path, reason
from .._schema import check_form
from .._wording import unstopped
from ..model.density import LogDensity

__all__ = ["damaged", "describe_sites", "is_plain", "read_state", "reading", "write_state"]

FORMAT = 5


def write_state(state: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Writes the plain data of a posterior.

    Args:
        state: A value for each field.
        path: Where to write.

    Raises:
        TypeError: If ``path`` is no path.
        ValueError: If the file cannot be written.
    """
    name = check_path("path", path)
    try:
        write_archive({"format": FORMAT, **state}, name)
    except OSError as error:
        told = f"Expected a path that can be written; got {name!r} ({reason(error)})."
        raise ValueError(told) from None


def read_state(path: str | PathLike[str], form: Any) -> dict[str, Any]:
    """Reads the plain data of a posterior.

    Args:
        path: The file.
        form: What to expect of the fields; see :func:`pyroflows._schema.check_form`.

    Returns:
        A value for each field.

    Raises:
        ValueError: If the file is missing, or is none that :func:`write_state` has written.
    """
    name = check_path("path", path)
    try:
        state = read_archive(name)
    except UnreadableError as error:
        told = f"Expected the file of a saved posterior; {name!r} {error}."
        raise ValueError(told) from None
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"Expected the file of a saved posterior; {name!r} is none.")
    written = state.pop("format")
    if type(written) is int and written != FORMAT:
        raise ValueError(
            f"Expected a saved posterior of format {FORMAT}; {name!r} has format {written}."
        )
    try:
        check_form(written, int, "its format")
        check_form(state, form, "the posterior")
    except ValueError as error:
        raise damaged(name, unstopped(error)) from None
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
        raise damaged(path, f"{type(error).__name__}: {unstopped(line)}") from error


def damaged(path: str | PathLike[str], reason: str) -> ValueError:
    """The error for a file in which something else stands than was written."""
    return ValueError(
        f"Expected the file of a saved posterior; {str(path)!r} is damaged ({reason})."
    )


def describe_sites(density: LogDensity) -> list[list[Any]]:
    """The latent sites of a model as plain data: names, shapes, and the maps onto the supports."""
    return [
        [site.name, list(site.shape), "".join(repr(site.transform).split())]
        for site in density.sites
    ]


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, strings and dense tensors only."""
    if type(value) is Tensor:
        return is_dense(value)
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str)
