"""Many pieces of work: over an executor, and from a file on which the finished ones are kept."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, as_completed
from os import PathLike
from typing import Any, TypedDict, TypeVar

from tqdm.auto import tqdm

from .._archive import UnreadableError, packed, read_archive, write_archive
from .._checks import caller_level, check_executor, check_flag
from .._deadline import Deadline
from .._files import check_path, check_writable, reason
from .._schema import Plain, check_form
from .._wording import unstopped

__all__ = ["Ledger", "Running", "check_running", "do_all"]

T = TypeVar("T")
Result = dict[str, Any]
FORMAT = 1
#: Seconds between two writes of a file.
EVERY = 5.0


class Running(TypedDict, total=False):
    """How the work of a study is run; see :func:`pyroflows.calibrate`."""

    executor: Executor | None
    checkpoint: str | PathLike[str] | None
    progress: bool


class Saved(TypedDict):
    """The fields of a file, each with what may stand there."""

    format: int
    study: str
    settings: dict[str, Plain]
    results: dict[str, dict[str, Plain]]


class Ledger:
    """The results of finished pieces of work by name, and a file that holds them.

    Args:
        path: The file, which need not exist; ``None`` for none.
        study: What the work is for.
        settings: What the results depend on, as plain data by name; a file with others is refused.

    Raises:
        TypeError: If ``path`` is no path.
        ValueError: If the file is no ledger, one of another study, or cannot be written.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "study.pt")
        >>> ledger = Ledger(path, "calibration", {"seed": 0})
        >>> ledger.enter("first", {"rank": 3})
        >>> ledger.write()
        >>> Ledger(path, "calibration", {"seed": 0}).results
        {'first': {'rank': 3}}
    """

    def __init__(
        self, path: str | PathLike[str] | None, study: str, settings: Mapping[str, Any]
    ) -> None:
        self.path = None if path is None else check_path("checkpoint", path)
        self.study, self.settings = study, dict(settings)
        self.results: dict[str, Result] = {} if self.path is None else self._read(self.path)
        self._due = Deadline(EVERY)
        self._written = True

    def enter(self, name: str, result: Result) -> None:
        """Adds a result, and writes the file if the last time was long enough ago.

        Args:
            name: The piece of work.
            result: Plain data.
        """
        self.results[name] = result
        self._written = False
        if self._due.passed:
            self.write()

    def write(self) -> None:
        """Writes the file, if there is one and it lacks a result."""
        if self.path is None or self._written:
            return
        content = {
            "format": FORMAT,
            "study": self.study,
            "settings": self.settings,
            "results": self.results,
        }
        try:
            write_archive(packed(content), self.path)
        except OSError as error:
            warnings.warn(
                f"Could not write the checkpoint {self.path!r}; the work goes on: {reason(error)}.",
                stacklevel=caller_level(),
            )
        self._written = True
        self._due = Deadline(EVERY)

    def _read(self, path: str) -> dict[str, Result]:
        if not os.path.exists(path):
            try:
                check_writable(path)
            except OSError as error:
                raise ValueError(
                    f"Expected a checkpoint that can be written; got {path!r} ({reason(error)})."
                ) from None
            return {}
        expected = f"Expected a checkpoint of this {self.study}"
        try:
            content = read_archive(path)
            check_form(content, Saved, "the checkpoint")
        except (UnreadableError, ValueError) as error:
            raise ValueError(f"{expected}; {path!r}: {unstopped(error)}.") from None
        if content["format"] != FORMAT or content["study"] != self.study:
            raise ValueError(f"{expected}; {path!r} is one of another kind.")
        for name in self.settings:
            was, now = content["settings"].get(name), self.settings[name]
            if was != now:
                raise ValueError(f"{expected}; {path!r} has {name} {was}, and this one {now}.")
        results = content["results"].items()
        # What failed is tried again: the reason may be gone.
        return {name: result for name, result in results if not result.get("error")}


def check_running(running: Mapping[str, Any]) -> Running:
    """Returns how work is to be run, with each option checked.

    Args:
        running: The options that a user has given.

    Raises:
        TypeError: If one is unknown, or of the wrong type.
        ValueError: If the executor runs threads.
    """
    names = list(Running.__annotations__)
    for name in running:
        if name not in names:
            raise TypeError(f"Expected the options {', '.join(names)}; got {name!r}.")
    return {
        "executor": check_executor(running.get("executor")),
        "checkpoint": running.get("checkpoint"),
        "progress": check_flag("progress", running.get("progress", True)),
    }


def do_all(
    work: Callable[[T], Result],
    tasks: Mapping[str, T],
    ledger: Ledger,
    running: Running,
    unit: str,
) -> Iterator[tuple[str, Result]]:
    """Does all work that is not in a ledger yet, and enters it there.

    Args:
        work: What to do; a function of a module, so that it can be pickled.
        tasks: Its argument, by the name of the piece of work.
        ledger: The finished work.
        running: How to run it.
        unit: What to call a piece of work.

    Yields:
        Names and results: the finished ones first, then the others as they come.
    """
    finished = {name: ledger.results[name] for name in tasks if name in ledger.results}
    left = {name: task for name, task in tasks.items() if name not in finished}
    with tqdm(
        total=len(tasks), disable=not running["progress"], unit=f" {unit}", leave=True
    ) as bar:
        for name, result in finished.items():
            bar.update()
            yield name, result
        try:
            for name, result in _run(work, left, running["executor"]):
                ledger.enter(name, result)
                bar.update()
                yield name, result
        finally:
            ledger.write()


def _run(
    work: Callable[[T], Result], tasks: Mapping[str, T], executor: Executor | None
) -> Iterator[tuple[str, Result]]:
    if executor is None:
        for name, task in tasks.items():
            yield name, work(task)
        return
    futures: dict[Future[Result], str] = {}
    try:
        for name, task in tasks.items():
            futures[executor.submit(work, task)] = name
        for future in as_completed(futures):
            yield futures[future], _result(future)
    finally:
        for future in futures:
            future.cancel()


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if "pickle" not in str(error):
            raise
        raise ValueError(
            "Expected a model, a fit and arguments that can be sent to the processes of the "
            f"executor, as those of a module can; got one that cannot ({unstopped(error)})."
        ) from error
