"""Mistakes in the input, each told in one sentence."""

from __future__ import annotations

import textwrap
import traceback
from pathlib import Path

__all__ = ["UserError", "describe", "line_in", "sentence"]


class UserError(Exception):
    """A mistake in the input, whose message is one sentence for the user."""


def line_in(source: str, error: BaseException) -> int | None:
    """Returns the last line of a file that the error passed through."""
    file = Path(source).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file]
    return lines[-1] if lines else None


def describe(error: BaseException) -> str:
    """Returns the type of an error and what it says."""
    text = error.msg if isinstance(error, SyntaxError) else sentence(error).rstrip(".")
    return f"{type(error).__name__} ({text})" if text else type(error).__name__


def sentence(error: BaseException | Warning | str) -> str:
    """Returns what an error says, in one line that ends with a full stop."""
    # Pyro appends the shapes of a trace, torch the values of a tensor, over many lines.
    text = textwrap.shorten(str(error).split("Trace Shapes:")[0], width=400, placeholder=" ...")
    return text if not text or text.endswith(".") else f"{text}."
