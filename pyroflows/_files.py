"""Atomic file writes: a file is whole, or what was at its path stays."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from typing import Any

__all__ = ["check_path", "check_writable", "read_whole", "reason", "write_whole"]


def write_whole(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Writes a file, which takes its place only once all of it is on the disk.

    Writers of formats, which may crash on a full disk, write to memory before.

    Args:
        path: Where to write.
        content: The bytes of the file.

    Raises:
        OSError: If it cannot be written; a file that was at the path is still there.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "note.txt")
        >>> write_whole(path, b"whole")
        >>> open(path).read(), os.listdir(os.path.dirname(path))
        ('whole', ['note.txt'])
    """
    temporary = _beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a full disk may show only here
        os.replace(temporary, path)
    finally:
        # Whatever kept the file from being written may keep it from being removed.
        with contextlib.suppress(OSError):
            os.remove(temporary)


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """Reads a file.

    Args:
        path: Where it is.

    Returns:
        The bytes of the file.

    Raises:
        OSError: If there is no regular file: a device may have no end.

    Example:
        >>> read_whole(os.curdir)
        Traceback (most recent call last):
        IsADirectoryError: [Errno 21] Is a directory: '.'
    """
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise OSError(errno.EINVAL, "Not a regular file")
        with open(path, "rb") as file:
            return file.read()
    except ValueError as error:  # of a name with a null character, or one that cannot be encoded
        raise OSError(errno.EINVAL, str(error)) from None


def check_path(name: str, value: Any) -> str:
    """Returns a path as a string; ``TypeError`` if it is none, ``ValueError`` if it is empty."""
    try:
        path = os.fsdecode(value)
    except TypeError:
        raise TypeError(f"Expected {name} to be a path; got {value!r}.") from None
    if not path:
        raise ValueError(f"Expected {name} to be the name of a file; got ''.")
    return path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises ``OSError`` unless :func:`write_whole` can write to the path."""
    temporary = _beside(path)
    # To create a file is the one test that agrees with the write to come, whatever forbids it.
    with open(temporary, "wb"):
        pass
    os.remove(temporary)


def reason(error: OSError) -> str:
    """Returns why a file cannot be read or written, without its name."""
    return error.strerror or str(error)


def _beside(path: str | os.PathLike[str]) -> str:
    """Returns a new name in the folder of a path, at which a file can be."""
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except ValueError as error:  # of a name with a null character, or one that cannot be encoded
        raise OSError(errno.EINVAL, str(error)) from None
    if stat.S_ISDIR(mode) or not os.path.basename(name):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):  # a device would be replaced by the file
        raise OSError(errno.EINVAL, "Not a regular file")
    return os.path.join(os.path.dirname(name), f".{uuid.uuid4().hex}.part")
