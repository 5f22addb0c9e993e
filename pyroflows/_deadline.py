"""How much time a piece of work has, by a clock that tests can replace."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

__all__ = ["Deadline", "TimeOver", "by_own_clock", "check_time"]

_enforced: ContextVar[Deadline | None] = ContextVar("enforced", default=None)


class TimeOver(Exception):
    """The time of a piece of work is over, so that no part of it may begin."""


def check_time() -> None:
    """Raises :class:`TimeOver` if a deadline that is enforced has passed; see
    :meth:`Deadline.enforced`."""
    deadline = _enforced.get()
    if deadline is not None and deadline.passed:
        raise TimeOver


@contextlib.contextmanager
def by_own_clock() -> Iterator[None]:
    """Context manager in which :func:`check_time` reads the clock of this process and asks no
    other, for work in which processes read it at different times."""
    deadline = _enforced.get()
    if deadline is None:
        yield
        return
    own = copy.copy(deadline)
    own._agree = bool
    with own.enforced():
        yield


class Deadline:
    """A time limit that all parts of one piece of work share.

    Args:
        seconds: Seconds of wall-clock time from now on; ``None`` for no limit.
        clock: Returns a time in seconds that never goes back.
        agree: From whether the time is over by this clock to whether it is; for several processes,
            whose clocks differ, the answer of one of them. All of them must ask equally often.

    Example:
        >>> times = iter([0.0, 4.0, 9.0, 11.0])
        >>> deadline = Deadline(10.0, clock=lambda: next(times))
        >>> deadline.elapsed, deadline.passed, deadline.passed
        (4.0, False, True)
    """

    def __init__(
        self,
        seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.seconds = seconds
        self._clock, self._agree = clock, agree
        self._start = clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the work began."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds that are left; infinite without a limit."""
        return math.inf if self.seconds is None else self.seconds - self.elapsed

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self.seconds is not None and self._agree(self.elapsed >= self.seconds)

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Context manager in which :func:`check_time` raises :class:`TimeOver` after the time is
        over, so that each evaluation of a model reads the deadline without being told of it.

        Example:
            >>> with Deadline(0.0).enforced():
            ...     check_time()
            Traceback (most recent call last):
            ...
            pyroflows._deadline.TimeOver
        """
        token = _enforced.set(self)
        try:
            yield
        finally:
            _enforced.reset(token)

    def earlier(self, seconds: float) -> Deadline:
        """Returns a deadline that passes so many seconds before this one.

        Args:
            seconds: The seconds, which are left for other work.

        Example:
            >>> Deadline(10.0).earlier(2.0).seconds
            8.0
        """
        limit = None if self.seconds is None else self.seconds - seconds
        sooner = Deadline(limit, self._clock, self._agree)
        sooner._start = self._start
        return sooner

    def fraction_since(self, start: float) -> float:
        """The share of the time between a reading of :attr:`elapsed` and the limit that is over.

        Args:
            start: An earlier reading of :attr:`elapsed`; negative for work that began before, in a
                process that was killed.

        Returns:
            A number from 0 to 1; 0 without a limit.

        Example:
            >>> times = iter([0.0, 6.0])
            >>> Deadline(10.0, clock=lambda: next(times)).fraction_since(2.0)
            0.5
        """
        if self.seconds is None:
            return 0.0
        now = self.elapsed
        return 1.0 if now >= self.seconds else (now - start) / (self.seconds - start)
