"""Files from which an interrupted fit goes on."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any, TypedDict

from .._archive import UnreadableError, packed, read_archive, write_archive
from .._checks import caller_level
from .._deadline import Deadline
from .._files import check_path, check_writable, reason
from .._schema import Plain, check_form
from .._wording import unstopped
from . import processes as distributed

__all__ = ["Checkpoint"]

FORMAT = 2

Setting = bool | int | float | str | None


class Stage(TypedDict):
    """A training in a file: what it depends on, and how far it has come."""

    settings: dict[str, Setting | list[Setting]]
    state: dict[str, Plain] | None


class Saved(TypedDict):
    """The fields of a file, each with what may stand there."""

    format: int
    settings: dict[str, Setting | list[Setting]]
    stages: list[Stage]


class Checkpoint:
    """A file that holds how far a fit has come: every training in it, finished or under way.

    A fit that is run again with the same file takes the finished trainings from there and goes on
    in the one that was under way, with the parameters, the state of the optimiser and the random
    state that it had, so that the result is the one of a fit without interruption. The file holds
    numbers and names only, and is replaced at once, so that a kill leaves the one before.

    Args:
        path: The file; it need not exist.
        settings: What the fit depends on, as numbers, strings and lists of them by name; a file
            with others is refused.
        every: Seconds between two saves.

    Raises:
        TypeError: If ``path`` is no path.
        ValueError: If the file is no checkpoint, one of another fit, or cannot be written.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "fit.pt")
        >>> first = Checkpoint(path, {"seed": 0})
        >>> first.begin({"steps": 10}) is None
        True
        >>> first.save({"step": 7})
        >>> Checkpoint(path, {"seed": 0}).begin({"steps": 10})
        {'step': 7}
        >>> Checkpoint(path, {"seed": 1})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: Expected a checkpoint of this fit; the one in ... has seed 0, and this fit has
        seed 1.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        settings: Mapping[str, Any] | None = None,
        every: float = 10.0,
    ) -> None:
        self.path = check_path("checkpoint", path)
        self.settings = dict(settings or {})
        self.every = every
        self._failed = False
        # One process reads, since the others may run on machines that do not see the file.
        content: Any = distributed.agree(self._read_or_error() if distributed.is_main() else None)
        if isinstance(content, ValueError):
            raise content
        self._stages: list[dict[str, Any]] = content
        self._stage = -1
        self._due = Deadline(self.every)

    def begin(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Begins the next training.

        Args:
            settings: What the training depends on.

        Returns:
            The state to go on from, or ``None``.

        Raises:
            ValueError: If the file has a training with other settings in this place.
        """
        self._stage += 1
        settings = dict(settings)
        if self._stage < len(self._stages):
            stage = self._stages[self._stage]
            self._compare(stage["settings"], settings)
            return stage["state"]
        self._stages.append({"settings": settings, "state": None})
        return None

    def save_if_due(self, make_state: Callable[[], Mapping[str, Any]]) -> None:
        """Saves what a callable returns if the last time was long enough ago; see :meth:`save`."""
        if self._due.passed:
            self.save(make_state())

    def save(self, state: Mapping[str, Any]) -> None:
        """Saves the state of the training under way.

        Args:
            state: Tensors, numbers, strings, and lists and dictionaries of them.
        """
        del self._stages[self._stage + 1 :]
        if distributed.is_main():
            # A copy, because the training goes on with these very tensors.
            self._stages[self._stage]["state"] = packed(state, "cpu")
            self._write()
        self._due = Deadline(self.every)

    def _write(self) -> None:
        content = {"format": FORMAT, "settings": self.settings, "stages": self._stages}
        try:
            write_archive(content, self.path)
        except OSError as error:
            if not self._failed:  # once: it may be tried every few seconds for hours
                warnings.warn(
                    f"Could not write the checkpoint {self.path!r}; the fit goes on: "
                    f"{reason(error)}.",
                    stacklevel=caller_level(),
                )
            self._failed = True
        else:
            self._failed = False

    def _read_or_error(self) -> Any:
        try:
            self._refuse_unwritable()
            return self._read()
        except ValueError as error:
            return error

    def _refuse_unwritable(self) -> None:
        """Refuses a path of which nothing would be found out before the first save."""
        if not os.path.isdir(os.path.dirname(self.path) or "."):
            raise ValueError(f"Expected checkpoint in a folder that exists; got {self.path!r}.")
        try:
            check_writable(self.path)
        except OSError as error:
            raise ValueError(
                f"Expected a checkpoint that can be written; got {self.path!r} ({reason(error)})."
            ) from None

    def _read(self) -> list[dict[str, Any]]:
        if not os.path.exists(self.path):
            return []
        try:
            content = read_archive(self.path)
            check_form(content, Saved, "the checkpoint")
        except UnreadableError as error:
            raise ValueError(f"Expected a checkpoint of a fit; {self.path!r} {error}.") from None
        except ValueError as error:
            raise self._damaged(unstopped(error)) from None
        if content["format"] != FORMAT:
            raise ValueError(
                f"Expected a checkpoint of format {FORMAT}; the one in {self.path!r} has "
                f"{content['format']}."
            )
        self._compare(content["settings"], self.settings)
        return list(content["stages"])

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Context manager that refuses, in one sentence, a saved state of another training."""
        try:
            yield
        except Exception as error:  # of any type, from whatever reads the state
            [line, *_] = str(error).splitlines() or [""]
            raise self._damaged(f"{type(error).__name__}: {unstopped(line)}") from error

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"Expected a checkpoint of a fit; {self.path!r} is damaged ({why}).")

    def _compare(self, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        for name in {**saved, **here}:
            was, now = saved.get(name), here.get(name)
            if not _alike(was, now):
                raise ValueError(
                    f"Expected a checkpoint of this fit; the one in {self.path!r} has {name} "
                    f"{was}, and this fit has {name} "
                    f"{now}."
                )


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        # Another machine rounds otherwise.
        return a == b or abs(a - b) <= 1e-5 * (1 + abs(a))
    return a == b
