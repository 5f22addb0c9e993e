"""Files of tensors, numbers and strings, sealed by a checksum."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._checks import plain
from ._files import read_whole, reason, write_whole

__all__ = ["UnreadableError", "is_dense", "packed", "read_archive", "write_archive"]

#: Stands between the bytes of ``torch.save`` and their SHA-256.
SEAL = b"pyroflows sha256"
ZIP = b"PK\x03\x04"


class UnreadableError(Exception):
    """A file that :func:`write_archive` did not write; the message continues the file's name."""


def write_archive(state: Any, path: str) -> None:
    """Writes a state by ``torch.save``, with a checksum at the end.

    ``torch.load`` reads the file too, but does not look at the checksum.

    Args:
        state: Tensors, numbers, strings, and lists and dictionaries of them.
        path: Where to write.

    Raises:
        OSError: If the file cannot be written; a file that was at the path is still there.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "numbers.pt")
        >>> write_archive({"x": torch.ones(2)}, path)
        >>> read_archive(path)
        {'x': tensor([1., 1.])}
    """
    buffer = io.BytesIO()
    torch.save(packed(state), buffer)
    content = buffer.getvalue()
    write_whole(path, content + SEAL + hashlib.sha256(content).digest())


def read_archive(path: str) -> Any:
    """Reads a file of :func:`write_archive`, and none that differs from it in a single bit.

    Args:
        path: The file.

    Returns:
        The state; tensors of a device that is not there are on the host.

    Raises:
        UnreadableError: If there is no such file, or if it has changed since it was written.
    """
    try:
        content = _sealed_content(read_whole(path))
    except OSError as error:
        raise UnreadableError(f"cannot be read ({reason(error)})") from None
    # A file of the legacy format dictates how much memory is taken for it.
    if not content.startswith(ZIP):
        raise UnreadableError("is none")
    device = None if torch.cuda.is_available() else "cpu"
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:
        # Whoever forges a checksum makes the reader raise errors of any type.
        raise UnreadableError("is none") from error


def packed(value: Any, device: torch.device | str | None = None) -> Any:
    """Returns a copy of nested data, whose tensors take no more memory than their entries.

    Args:
        value: Tensors, numbers, strings, and lists and dictionaries of them.
        device: Where the tensors of the copy are; where they were if ``None``.
    """
    if isinstance(value, Tensor):
        to = value.device if device is None else device
        return value.detach().to(to, copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, Mapping):
        return {plain(name): packed(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(packed(item, device) for item in value)
    return plain(value)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has its entries in memory, one after the other once it is copied."""
    special = tensor.is_nested or tensor.is_quantized or tensor.is_meta
    return tensor.layout is torch.strided and not special


def _sealed_content(content: bytes) -> bytes:
    digest_size = hashlib.sha256().digest_size
    body, seal = content[: -len(SEAL) - digest_size], content[-len(SEAL) - digest_size :]
    if not seal.startswith(SEAL):
        raise UnreadableError("is none, or only a part of one")
    if seal != SEAL + hashlib.sha256(body).digest():
        raise UnreadableError("is damaged (its checksum is wrong)")
    return body
