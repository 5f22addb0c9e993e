r"""A fit on several processes: each evaluates its share of the points, and they add up their
gradients.

Every process draws the same particles from the same random state and takes its share of them, so
that the sum over the processes is what one process with all particles computes, up to rounding:

.. math:: \nabla_\phi \mathcal{L} = \frac1N \sum_{r} \sum_{i \in \text{share } r} g_i(\phi).

Outside of training all processes do the same, but for evaluations of the density: each evaluates
its share of the points, and gets the values of all. A step takes one message and an evaluation
another, by which an error of one process is raised in all of them.

Without an initialised :mod:`torch.distributed` group there is one process, and everything here
does nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import pickle
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._deadline import TimeOver, by_own_clock
from .._random import random_state, set_random_state
from .._sharing import Function, shared_by

__all__ = [
    "Part",
    "add_up",
    "agree",
    "agree_on_random_state",
    "apart",
    "initialize_from_environment",
    "is_main",
    "rank",
    "rows",
    "share",
    "sharing",
    "take_from_main",
    "time_message",
    "time_work",
    "warning_once",
    "world_size",
]

T = TypeVar("T")
#: What a message tells of: in how many processes the work was ended by which kind of error.
ENDINGS = (KeyboardInterrupt, TimeOver, BaseException)
#: Numbers of a message whose time is taken, as many as a small flow has parameters.
MESSAGE = 5000
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


class Part(NamedTuple):
    """What a process knows of a mean, which is the ratio of the sums over all processes.

    Attributes:
        total: The sum of its values, without dimensions.
        weight: How many they are.
    """

    total: Tensor
    weight: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean, for the part of one process alone."""
        return self.total / self.weight


@contextlib.contextmanager
def add_up(
    length: int, device: torch.device, dtype: torch.dtype = torch.double
) -> Iterator[Tensor]:
    """Context manager with zeros for each process to fill, which it replaces by their sums over
    all processes, by one message. An error that ends the work in one process is raised in all.

    Args:
        length: How many numbers.
        device: Where.
        dtype: Of which dtype.

    Raises:
        TimeOver: If the time is over by the clock of a process.
        KeyboardInterrupt: If a process was interrupted.

    Example:
        >>> with add_up(3, torch.device("cpu")) as values:
        ...     values[rows(3)] = 1.0
        >>> values
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    message = torch.zeros(length + len(ENDINGS), device=device, dtype=dtype)
    values, endings = message.split([length, len(ENDINGS)])
    if world_size() == 1:
        yield values
        return
    error: BaseException | None = None
    try:
        yield values
    except BaseException as caught:
        error = caught
        endings[_kind(error)] = 1
    dist.all_reduce(message)
    _raise_together(error, endings.tolist())


def _kind(error: BaseException) -> int:
    return next(i for i, kind in enumerate(ENDINGS) if isinstance(error, kind))


def _raise_together(error: BaseException | None, endings: list[float]) -> None:
    """Raises the error of this process or, if it has none, that of another one."""
    if not any(endings):
        return
    kind = ENDINGS[next(i for i, count in enumerate(endings) if count)]
    if kind is not BaseException:
        raise kind from error
    errors: list[Any] = [None] * world_size()
    dist.all_gather_object(errors, _picklable(error))
    raise error or next(filter(None, errors))


def _picklable(error: BaseException | None) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # which an error of any class may raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Context manager in which the processes share out the points of each evaluation of a density,
    so that all of them must evaluate it alike."""
    with shared_by(_evaluate_share if world_size() > 1 else None):
        yield


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Context manager in which this process evaluates points of its own."""
    with shared_by(None), by_own_clock():
        yield


def _evaluate_share(function: Function, points: Tensor, width: int) -> tuple[Tensor, ...]:
    """The values of a function at all points, of which this process evaluates its share."""
    count, mine = len(points), rows(len(points))
    owned = mine.stop - mine.start
    with add_up(count * width, points.device) as message, apart():
        table = message.view(count, width)
        # A process without points evaluates one, to know the shapes and dtypes of the values.
        parts = function(points[mine] if owned else points[:1])
        widths = [math.prod(part.shape[1:]) for part in parts]
        for part, columns in zip(parts, table.split(widths, -1), strict=True):
            columns[mine] = part[:owned].reshape(columns[mine].shape)
    split = zip(parts, table.split(widths, -1), strict=True)
    return tuple(columns.reshape(count, *part.shape[1:]).to(part) for part, columns in split)


@torch.no_grad()
def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by those of the main process, in place.

    Args:
        tensors: Tensors on one device, in the same order in every process.
    """
    if world_size() == 1:
        return
    for alike in _by_dtype(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.broadcast(flat, src=0)
        _unflatten(flat, alike)


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
    if isinstance(value, (bool, float)):
        # Without a pickle it takes a fifth of the time.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        number = torch.tensor(value, dtype=torch.double, device=device)
        dist.broadcast(number, src=0)
        return type(value)(number.item())
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def agree_on_random_state(device: torch.device) -> None:
    """Gives every process the random state of the main one, on the host and on a device."""
    if world_size() == 1:
        return
    set_random_state(agree(random_state(device)), device)


def time_message(device: torch.device) -> float:
    """Seconds that a message between the processes takes.

    Args:
        device: Where its numbers are.
    """

    def send() -> None:
        with add_up(MESSAGE, device):
            pass

    return time_work(send, times=9)


def time_work(work: Callable[[], object], times: int = 3) -> float:
    """Seconds that work takes, the median of some times.

    Args:
        work: What to do. On a GPU it must wait for its end.
        times: How often to do it.

    Example:
        >>> 0 <= time_work(lambda: None) < 1
        True
    """
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


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
