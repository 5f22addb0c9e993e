"""Words of others within sentences of ours."""

from __future__ import annotations

__all__ = ["unstopped"]


def unstopped(text: object) -> str:
    """Returns a message of others without the stop at its end, to stand within a sentence.

    Args:
        text: The message, or the error that has it.

    Example:
        >>> f"Cannot compute: {unstopped('Cannot copy out of meta tensor; no data!')}."
        'Cannot compute: Cannot copy out of meta tensor; no data.'
    """
    return str(text).rstrip(" .!")
