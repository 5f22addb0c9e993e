r"""A fit on several processes: each works on its share of the particles, and they add up their
gradients.

Every process draws the same particles from the same random state and takes its share of them, so
that the sum over the processes is what one process with all particles computes, up to rounding:

.. math:: \nabla_\phi \mathcal{L} = \frac1N \sum_{r} \sum_{i \in \text{share } r} g_i(\phi).

Without an initialised :mod:`torch.distributed` group there is one process, and everything here
does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._random import random_state, set_random_state

__all__ = [
    "agree",
    "agree_on_random_state",
    "gather",
    "initialize_from_environment",
    "is_main",
    "rank",
    "rows",
    "share",
    "sum_over_ranks",
    "take_from_main",
    "warning_once",
    "world_size",
]

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return rank() == 0


@contextlib.contextmanager
def warning_once() -> Iterator[None]:
    """Context manager in which the main process warns for all of them.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught, warning_once():
        ...     warnings.warn("the model is slow")
        >>> len(caught)
        1
    """
    if is_main():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def share(count: int) -> int:
    """The most of ``count`` things that one process gets."""
    return -(-count // world_size())


def rows(count: int) -> slice:
    """Which of ``count`` rows that all processes have are this one's; those of all make them all.

    Args:
        count: How many rows there are.

    Returns:
        A slice of at most :func:`share` rows.

    Example:
        >>> rows(7)
        slice(0, 7, None)
    """
    parts, number = world_size(), rank()
    least, more = divmod(count, parts)
    start = number * least + min(number, more)
    return slice(start, start + least + (number < more))


@torch.no_grad()
def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by their sums over the processes, in place, by one message for each dtype.

    Args:
        tensors: Tensors on one device, in the same order in every process.
    """
    _exchange(tensors, dist.all_reduce)


@torch.no_grad()
def gather(part: Tensor, count: int) -> Tensor:
    """The values of all processes, of which each has its :func:`rows`.

    Args:
        part: Tensor of shape ``(m,)``.
        count: How many there are in all.

    Returns:
        Tensor of shape ``(count,)``, the same in all processes.
    """
    if world_size() == 1:
        return part
    everyone = part.new_zeros(count)
    everyone[rows(count)] = part
    dist.all_reduce(everyone)
    return everyone


@torch.no_grad()
def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by those of the main process, in place.

    Args:
        tensors: Tensors on one device, in the same order in every process.
    """
    _exchange(tensors, functools.partial(dist.broadcast, src=0))


def agree(value: T) -> T:
    """What the main process has, in all of them; for what decides how the program goes on, such as
    a reading of the clock.

    Args:
        value: Anything that pickles.

    Returns:
        The value of the main process.
    """
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def agree_on_random_state(device: torch.device) -> None:
    """Gives every process the random state of the main one, on the host and on a device."""
    if world_size() == 1:
        return
    set_random_state(agree(random_state(device)), device)


@contextlib.contextmanager
def initialize_from_environment() -> Iterator[str | None]:
    """Joins the processes that ``torchrun`` started, by its environment variables, and leaves them
    at the end.

    Yields:
        The GPU of this process, as ``"cuda:0"``; ``None`` where there is none, and where
        ``torchrun`` started nothing.

    Raises:
        ValueError: If there are more processes on this machine than GPUs.

    Example:
        >>> with initialize_from_environment() as device:
        ...     world_size()
        1
    """
    if _initialized() or not all(name in os.environ for name in ENVIRONMENT):
        yield None
        return
    device, backend = None, "gloo"
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"Expected at most one process per GPU; got process {local} on a machine with "
                f"{gpus} of them."
            )
        torch.cuda.set_device(local)
        device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
    # Its functions hold the group that stands while they are defined, and torch.compile's
    # machinery imports them at a moment of its own: a group that they held would outlive
    # destroy_process_group, and its threads the interpreter.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group(backend)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _exchange(tensors: Iterable[Tensor], collective: Callable[[Tensor], Any]) -> None:
    """Puts tensors through a collective operation, in place, one message for each dtype."""
    if world_size() == 1:
        return
    for alike in _by_dtype(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        collective(flat)
        _unflatten(flat, alike)


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(
        tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(part.view_as(tensor))
