"""Atomic file writes: a file is whole, or what was at its path stays."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

__all__ = ["check_writable", "save_whole", "whole_file"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Gives the name of a temporary file, which replaces the path once the block has succeeded.

    Args:
        path: Where the file shall be in the end.

    Returns:
        A context manager that gives the temporary name, in the same folder and of the same suffix.

    Raises:
        OSError: If the file cannot be moved to its place.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "note.txt")
        >>> with whole_file(path) as temporary, open(temporary, "w") as file:
        ...     print(file.write("whole"), os.path.exists(path))
        5 False
        >>> open(path).read()
        'whole'
    """
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        # Whatever kept the file from being written may keep it from being removed.
        with contextlib.suppress(OSError):
            os.remove(temporary)


def save_whole(state: Any, path: str) -> None:
    """Saves by ``torch.save``, as a :func:`whole_file`.

    Raises:
        OSError: If the file cannot be written; torch's own writer raises ``RuntimeError``.
    """
    import torch  # here, because the room of reports runs without it

    with whole_file(path) as temporary:
        torch.save(state, temporary)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises ``OSError`` unless :func:`whole_file` can write to the path."""
    if os.path.isdir(path) or not os.path.basename(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    temporary = _beside(path)
    # To create a file is the one test that agrees with the write to come, whatever forbids it.
    with open(temporary, "wb"):
        pass
    os.remove(temporary)


def _beside(path: str | os.PathLike[str]) -> str:
    """Returns a name of this process's own in the same folder, of the same suffix."""
    root, suffix = os.path.splitext(os.fspath(path))
    return f"{root}.{os.getpid()}.part{suffix}"
