"""Many simulations: in other processes, with a file to go on from, and with some that fail."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from os import PathLike
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from .._archive import UnreadableError, read_archive, write_archive
from .._checks import caller_level, check_executor, check_seed, check_size
from .._deadline import Deadline
from .._files import check_path, check_writable, reason
from .._schema import Range, check_form
from .._wording import unstopped
from .faults import describe_error
from .simulator import FailedCallError, Outcome, Simulator, Values, as_simulator

__all__ = [
    "Failure",
    "SimulationRun",
    "Simulations",
    "check_parameters",
    "simulate",
    "warn_of_failures",
]

FORMAT = 1
#: Simulations that a worker of an executor runs between two messages.
CHUNK = 50
#: If as many at the beginning fail, there is no use in going on.
FIRST = 10
#: Seconds between two saves.
EVERY = 10.0


class Failure(NamedTuple):
    """A simulation without a result.

    Attributes:
        number: Which call it was, from zero.
        sentence: Its parameters, and how it failed.
    """

    number: int
    sentence: str


@dataclass(frozen=True)
class Simulations:
    """Parameters with the data that were simulated from them.

    Attributes:
        theta: For each parameter a tensor of shape ``(n, *shape)``.
        x: For each data site a tensor of shape ``(n, *shape)``.
        numbers: Which calls of the simulator they come from, of shape ``(n,)``.
        failures: The calls without a result.

    Example:
        >>> Simulations({"mu": torch.zeros(3)}, {"y": torch.ones(3, 2)}, torch.arange(3))
        <3 simulations of y[2] given mu>
    """

    theta: Values
    x: Values
    numbers: Tensor
    failures: tuple[Failure, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        x, theta = ({n: v[0] for n, v in part.items()} for part in (self.x, self.theta))
        return f"<{len(self)} simulations of {_shapes(x)} given {_shapes(theta)}{failed}>"


def simulate(
    simulator: Any,
    prior: Any = None,
    count: int = 10_000,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    data: Sequence[str] | None = None,
    executor: Executor | None = None,
    path: str | PathLike[str] | None = None,
    failing: float = 0.1,
    seed: int = 0,
) -> Simulations:
    r"""Draws parameters from the prior, and data given each of them.

    .. math:: \theta_i \sim p(\theta), \qquad x_i \sim p(x \mid \theta_i).

    Each simulation has a seed of its own, so that the number of workers changes nothing, and
    neither does an interruption: with the same ``path`` and ``seed`` the simulations go on to the
    same result.

    Args:
        simulator: A Pyro model, or with ``prior`` a function of the parameters that returns data.
        prior: The distribution of a function's parameters: a Pyro distribution, or a dictionary of
            independent ones, as which the function gets the parameters then.
        count: How many simulations.
        args: Positional arguments of a model.
        kwargs: Its keyword arguments.
        data: Names of the model's sites that are data; those with ``obs`` by default.
        executor: Runs the simulations: an executor of processes of ``concurrent.futures``, or one
            with its interface. Without one they run here.
        path: A file that is written every few seconds, and from which simulations that were killed
            go on.
        failing: Largest share of simulations that may fail: raise an error, or return numbers that
            are not finite or of another shape than the first.
        seed: Seed of the simulations.

    Returns:
        The simulations that did not fail.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an option is out of its range, the model cannot be drawn from, too many
            simulations fail, or the file is one of other simulations.

    Warns:
        UserWarning: If some simulations failed, because a posterior learned from the others is that
            given that the simulator succeeds.

    Example:
        >>> import pyro.distributions as dist
        >>> simulate(lambda theta: theta.sum(), dist.Normal(torch.zeros(2), 1.0), 20)
        <20 simulations of x given theta[2]>
    """
    made = as_simulator(simulator, prior, args, kwargs, data)
    total = check_size("count", count)
    run = SimulationRun(made, total, seed=seed, executor=executor, path=path, failing=failing)
    simulations = run.extend(total)
    warn_of_failures(simulations)
    return simulations


class SimulationRun:
    """Simulations that grow, from the prior at first and then from parameters that are given.

    Args:
        simulator: The simulator.
        total: How many there are to be in the end.
        seed: Seed of the simulations.
        executor: Runs them; see :func:`simulate`.
        path: A file to go on from; see :func:`simulate`.
        failing: Largest share of simulations that may fail.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``failing`` is no share, or the file cannot be written or is none of such
            simulations.
    """

    def __init__(
        self,
        simulator: Simulator,
        total: int,
        *,
        seed: int = 0,
        executor: Executor | None = None,
        path: str | PathLike[str] | None = None,
        failing: float = 0.1,
    ) -> None:
        if isinstance(failing, bool) or not isinstance(failing, (int, float)):
            raise TypeError(f"Expected failing to be a number; got {failing!r}.")
        if not 0 <= failing < 1:
            raise ValueError(f"Expected failing to be at least 0 and less than 1; got {failing}.")
        self.simulator, self.total, self.seed = simulator, total, check_seed(seed)
        self.executor, self.failing = check_executor(executor), float(failing)
        self.file = None if path is None else SimulationFile(path, self.seed)
        self._results: list[Outcome | str] = [] if self.file is None else self.file.read()
        self._from_prior, self._at = (0, {}) if self.file is None else self.file.source
        self._failures = len(list(_failures(self._results)))
        if self._results:
            self._check_file()

    def extend(
        self, count: int, theta: Values | None = None, at: Values | None = None
    ) -> Simulations:
        """Goes on until there are as many simulations.

        Args:
            count: How many in all, those that were there before among them.
            theta: For each parameter the values of those that are new, of shape ``(m, *shape)``,
                the last of ``count``; draws from the prior if ``None``.
            at: The data for which these parameters were chosen.

        Returns:
            The first ``count`` simulations, without those that failed.

        Raises:
            ValueError: If too many fail, or the file has some for other data.
        """
        self._check_source(count, at)
        first = len(self._results)
        offset = count - (0 if theta is None else len(next(iter(theta.values()))))
        due = Deadline(EVERY)
        try:
            for results in self._run(first, count, theta, offset):
                self._take(results, at)
                self._check_failures()
                if due.passed:
                    self._write()
                    due = Deadline(EVERY)
        finally:
            if len(self._results) > first:
                self._write()
        return self._collect(count)

    def _check_source(self, count: int, at: Values | None) -> None:
        """Refuses results in the file whose parameters were chosen for other data."""
        chosen = len(self._results) > self._from_prior
        other = count > self._from_prior if at is None else not _equal(at, self._at)
        if chosen and other and self.file is not None:
            raise ValueError(
                f"Expected a file of simulations from the prior, or for this observation; from "
                f"number {self._from_prior} on those in {self.file.path!r} are for another."
            )

    def _write(self) -> None:
        if self.file is not None:
            self.file.write(self._results, self._from_prior, self._at)

    def _run(
        self, first: int, count: int, theta: Values | None, offset: int
    ) -> Iterator[list[Outcome | str]]:
        """The results of the calls from ``first`` on, chunk by chunk and in order."""
        tasks = []
        size = 1 if self.executor is None else CHUNK
        for start in range(first, count, size):
            numbers = range(start, min(start + size, count))
            given = None
            if theta is not None:
                rows = slice(numbers[0] - offset, numbers[-1] + 1 - offset)
                given = {name: value[rows] for name, value in theta.items()}
            tasks.append((self.simulator, self.seed, numbers, given))
        if self.executor is None:
            yield from (run_calls(*task) for task in tasks)
            return
        futures = []
        try:
            futures = [self.executor.submit(run_calls, *task) for task in tasks]
            for future in futures:
                yield future.result()
        except Exception as error:
            raise ValueError(
                "Expected a simulator that the executor can run, such as a function at the top of "
                f"a module; got {describe_error(error)}."
            ) from error
        finally:
            for future in futures:
                future.cancel()

    def _take(self, results: Sequence[Outcome | str], at: Values | None) -> None:
        """Keeps results, of which those of another shape than the first have failed."""
        for result in results:
            like = next((known for known in self._results if not isinstance(known, str)), None)
            odd = ""
            if not isinstance(result, str) and like is not None:
                odd = _differs(result, like, len(self._results))
            self._results.append(odd or result)
            if isinstance(self._results[-1], str):
                self._failures += 1
        if at is None:
            self._from_prior = len(self._results)
        else:
            self._at = at

    def _check_file(self) -> None:
        """Refuses a file of another simulator, by its first simulation."""
        [again] = run_calls(self.simulator, self.seed, range(1), None)
        if not _same(self._results[0], again):
            name = "" if self.file is None else repr(self.file.path)
            raise ValueError(
                f"Expected a file of this simulator; the first simulation in {name} is another."
            )

    def _check_failures(self) -> None:
        failed, done = self._failures, len(self._results)
        hopeless = failed == done and failed >= min(FIRST, self.total)
        if failed > self.failing * self.total or hopeless:
            raise ValueError(
                f"Expected at most {self.failing:.0%} of {self.total} simulations to fail; got {failed} "
                f"of the first {done}, at first {next(_failures(self._results)).sentence}."
            )

    def _collect(self, count: int) -> Simulations:
        results = self._results[:count]
        failures = tuple(_failures(results))
        numbers = [n for n, result in enumerate(results) if not isinstance(result, str)]
        outcomes = [result for result in results if not isinstance(result, str)]
        theta = _stacked([outcome.theta for outcome in outcomes])
        x = _stacked([outcome.x for outcome in outcomes])
        return Simulations(theta, x, torch.tensor(numbers), failures)


def warn_of_failures(simulations: Simulations) -> None:
    """Warns of simulations without a result."""
    failures = simulations.failures
    if failures:
        warnings.warn(
            f"{len(failures)} of {len(failures) + len(simulations)} simulations failed and are left "
            f"out, at first {failures[0].sentence}.",
            stacklevel=caller_level(),
        )


def check_parameters(simulations: Simulations, shapes: Mapping[str, torch.Size]) -> None:
    """Raises ``ValueError`` unless simulations have some parameters.

    Args:
        simulations: What a user hands in.
        shapes: The shapes of the parameters by name.
    """
    got = {name: value.shape[1:] for name, value in simulations.theta.items()}
    if any(got.get(name) != shape for name, shape in shapes.items()):
        raise ValueError(
            f"Expected simulations of this simulator, given {_listed(shapes)}; got those given "
            f"{_listed(got)}."
        )


def run_calls(
    simulator: Simulator, seed: int, numbers: range, theta: Values | None
) -> list[Outcome | str]:
    """Runs some simulations.

    Args:
        simulator: The simulator.
        seed: The seed of all simulations.
        numbers: Which calls.
        theta: Their parameters; draws from the prior if ``None``.

    Returns:
        For each call its outcome, or a sentence about its failure.
    """
    results: list[Outcome | str] = []
    for row, number in enumerate(numbers):
        given = None if theta is None else {name: value[row] for name, value in theta.items()}
        results.append(_run_call(simulator, seed, number, given))
    return results


def _run_call(simulator: Simulator, seed: int, number: int, theta: Values | None) -> Outcome | str:
    own_seed = int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1)[0])
    try:
        outcome = simulator(own_seed, theta)
    except FailedCallError as error:
        return f"call {number}{_describe(error.theta)}, which raised {error}"
    for name, value in outcome.x.items():
        bad = int((~value.isfinite()).sum())
        if bad:
            return (
                f"call {number}{_describe(outcome.theta)}, which returned {name} with {bad} of "
                f"{value.numel()} numbers not finite"
            )
    return outcome


def _describe(theta: Values) -> str:
    """The first numbers of some parameters, in words."""
    parts = []
    for name, value in list(theta.items())[:5]:
        numbers = [f"{float(v):.3g}" for v in value.flatten()[:5]]
        dots = ", ..." if value.numel() > len(numbers) else ""
        inside = f"({', '.join(numbers)}{dots})" if value.dim() else numbers[0]
        parts.append(f"{name} = {inside}")
    return f" with {', '.join(parts)}" if parts else ""


def _differs(outcome: Outcome, like: Outcome, number: int) -> str:
    """Says how data differ in shape from those of another simulation; nothing if they do not."""
    got, wanted = _shapes(outcome.x), _shapes(like.x)
    if got == wanted:
        return ""
    return (
        f"call {number}{_describe(outcome.theta)}, which returned {got} where the first call that "
        f"succeeded returned {wanted}"
    )


def _failures(results: Sequence[Outcome | str]) -> Iterator[Failure]:
    for number, result in enumerate(results):
        if isinstance(result, str):
            yield Failure(number, result)


def _stacked(values: Sequence[Values]) -> Values:
    return {name: torch.stack([each[name] for each in values]) for name in values[0]}


def _shapes(values: Values) -> str:
    """The names of some tensors, with their shapes."""
    return _listed({name: value.shape for name, value in values.items()})


def _listed(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name}{list(shape) or ''}" for name, shape in shapes.items())


def _same(a: Outcome | str, b: Outcome | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    pairs = ((a.theta, b.theta), (a.x, b.x))
    return all(
        one.keys() == other.keys()
        and all(one[n].shape == other[n].shape for n in one)
        and all(torch.allclose(one[n], other[n], rtol=1e-3) for n in one)
        for one, other in pairs
    )


def _equal(a: Values, b: Values) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Saved(TypedDict):
    """The fields of a file, each with what may stand there."""

    format: int
    seed: int
    count: Annotated[int, Range(0)]
    numbers: Tensor
    theta: dict[str, Tensor]
    x: dict[str, Tensor]
    failures: list[tuple[int, str]]
    from_prior: Annotated[int, Range(0)]
    at: dict[str, Tensor]


class SimulationFile:
    """A file of simulations, finished or under way.

    Args:
        path: Where it is; it need not exist.
        seed: The seed of the simulations.

    Attributes:
        source: Of those that were read, how many have parameters from the prior, and the data for
            which those of the others were chosen.

    Raises:
        TypeError: If ``path`` is no path.
        ValueError: If it cannot be written.
    """

    def __init__(self, path: str | PathLike[str], seed: int) -> None:
        self.path, self.seed = check_path("path", path), seed
        self.source: tuple[int, Values] = (0, {})
        try:
            check_writable(self.path)
        except OSError as error:
            raise ValueError(
                f"Expected a path that can be written; got {self.path!r} ({reason(error)})."
            ) from None

    def read(self) -> list[Outcome | str]:
        """The results in the file, in order; none if there is no file.

        Raises:
            ValueError: If it is no such file, or one of another seed.
        """
        if not os.path.exists(self.path):
            return []
        try:
            content = read_archive(self.path)
            check_form(content, Saved, "the simulations")
        except (UnreadableError, ValueError) as error:
            raise ValueError(
                f"Expected a file of simulations; {self.path!r} {unstopped(error)}."
            ) from None
        if content["format"] != FORMAT or content["seed"] != self.seed:
            raise ValueError(
                f"Expected simulations of format {FORMAT} with seed {self.seed}; {self.path!r} has "
                f"format {content['format']} and seed {content['seed']}."
            )
        self.source = content["from_prior"], content["at"]
        return _unpacked(content)

    def write(self, results: Sequence[Outcome | str], from_prior: int, at: Values) -> None:
        """Writes results; a file that was there stays if there is no room.

        Args:
            results: The results, in order.
            from_prior: How many of them have parameters from the prior.
            at: The data for which those of the others were chosen.
        """
        good = [(n, result) for n, result in enumerate(results) if not isinstance(result, str)]
        content = {
            "format": FORMAT,
            "seed": self.seed,
            "count": len(results),
            "numbers": torch.tensor([number for number, _ in good], dtype=torch.long),
            "theta": _stacked([outcome.theta for _, outcome in good]) if good else {},
            "x": _stacked([outcome.x for _, outcome in good]) if good else {},
            "failures": [list(failure) for failure in _failures(results)],
            "from_prior": from_prior,
            "at": dict(at),
        }
        try:
            write_archive(content, self.path)
        except OSError as error:
            warnings.warn(
                f"Could not write the simulations to {self.path!r}; they go on: {reason(error)}.",
                stacklevel=caller_level(),
            )


def _unpacked(content: Mapping[str, Any]) -> list[Outcome | str]:
    """The results of a file."""
    results: list[Outcome | str] = [""] * content["count"]
    for number, sentence in content["failures"]:
        results[number] = sentence
    for row, number in enumerate(content["numbers"].tolist()):
        theta, x = (
            {name: value[row] for name, value in content[key].items()} for key in ("theta", "x")
        )
        results[number] = Outcome(theta, x)
    return results
