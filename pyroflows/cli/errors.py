"""Mistakes in the input, each told in one sentence."""

from __future__ import annotations

import os
import textwrap
import traceback

from .._wording import unstopped

__all__ = ["UserError", "blame", "describe", "line_in", "sentence", "shown"]


class UserError(Exception):
    """A mistake in the input, whose message is one sentence for the user."""


def blame(source: str, error: BaseException) -> str | None:
    """Returns a sentence on an error of a fit, with the line of the model that raised it.

    Args:
        source: The file of the model.
        error: The error.

    Returns:
        ``None`` if it is neither an error of the model nor a sentence of the package.
    """
    line = line_in(source, error)
    if line is not None:
        return f"The model raised {describe(error)} at {source}, line {line}."
    if not isinstance(error, Exception):
        return f"The model ended the program by {describe(error)}."
    if not isinstance(error, (ValueError, TypeError)):
        return None
    told, cause = sentence(error), error.__cause__
    line = None if cause is None else line_in(source, cause)
    return told if line is None else f"{told.removesuffix('.')} ({source}, line {line})."


def line_in(source: str, error: BaseException) -> int | None:
    """Returns the last line of a file that the error passed through."""
    file = os.path.realpath(source)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == file]
    return lines[-1] if lines else None


def describe(error: BaseException) -> str:
    """Returns the type and the message of an error."""
    text = error.msg if isinstance(error, SyntaxError) else unstopped(sentence(error))
    return f"{type(error).__name__} ({text})" if text else type(error).__name__


def sentence(error: BaseException | Warning | str) -> str:
    """Returns the message of an error, in one line that ends with a full stop."""
    # Pyro appends the shapes of a trace, torch the values of a tensor, over many lines.
    text = textwrap.shorten(str(error).split("Trace Shapes:")[0], width=400, placeholder=" ...")
    return text if not text or text[-1] in ".!?" else f"{text}."


def shown(path: str | os.PathLike[str]) -> str:
    """Returns a path as it is to be printed: quoted where a terminal would not show it."""
    text = os.fspath(path)
    return text if text and text.isprintable() else repr(text)
