"""Counts how often the host waits for the device, by the line of source that makes it wait."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyroflows

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(Path(pyroflows.__file__).parent)
OPTIMISER, OPTIMISERS = "torch.optim", str(Path(torch.optim.__file__).parent)
#: Operations that read a value on the host, or whose shape depends on values.
READS = {
    "_linalg_check_errors",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_dim",
}


@contextmanager
def waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count by line of source what makes the host wait for the device.

    Args:
        device: The device. On a GPU torch tells of each wait; on a CPU, what would be one is found by its
            name, and copies from the host to the device are not seen.
    """
    found: Counter[str] = Counter()
    if device.type != "cuda":
        with Reads(found):
            yield found
        return

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "called a synchronizing" in str(message):
            found[source_line()] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)


class Reads(TorchDispatchMode):
    """Counts by line of source the operations that read a value on the host.

    Args:
        found: The counts, to which it adds.
    """

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS or (name.startswith("index") and _by_mask(args)):
            line = source_line()
            if line != OPTIMISER:  # which counts its steps on the host
                self.found[line] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Whether a tensor is indexed by a mask."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def source_line() -> str:
    """Return the line of pyroflows that is being run, or `OPTIMISER`; else the one that called torch."""
    frame = sys._getframe(2)  # that of the caller of what calls this
    outside = ""
    while frame is not None:
        file = frame.f_code.co_filename
        line = f"{file.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        if file.startswith(OPTIMISERS):
            return OPTIMISER
        if file.startswith(PACKAGE):
            return line
        if not outside and "/torch/" not in file and file != warnings.__file__:
            outside = line
        frame = frame.f_back  # type: ignore[assignment]
    return outside
