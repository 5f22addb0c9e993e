"""What the machine has to offer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["free_memory"]

MEMINFO, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """The memory of a device that is free, in bytes.

    Args:
        device: The device.

    Returns:
        The bytes; those of the whole machine where it does not tell how many are free, and ``None``
        where it tells nothing.

    Example:
        >>> free_memory(torch.device("meta")) is None
        True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    known = [limit for limit in (_machine_memory(), _group_memory()) if limit is not None]
    return min(known, default=None)


def _machine_memory() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
        (available,) = (line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(available.split()[1])
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _group_memory() -> int | None:
    """What a container leaves free."""
    try:
        most = int((GROUP / "memory.max").read_text())
        return max(0, most - int((GROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # none, or "max"
        return None
