"""What processes tell each other, by two small ones that are forked from this."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed

import pyroflows as pf
from pyroflows._deadline import Deadline, TimeOver, check_time
from pyroflows._sharing import in_shares
from pyroflows.model import LogDensity
from pyroflows.posterior.fit import _warn_of_cheap_evaluations
from pyroflows.sampling import hmc
from pyroflows.train import processes
from pyroflows.train.objectives import FAB, PathELBO, RenyiBound
from pyroflows.train.training import train

CPU = torch.device("cpu")


def together(work: Callable[[], Any], folder: Path) -> list[Any]:
    """What work returns, or raises, in each of two processes."""
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_work, args=(work, rank, folder)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _work(work: Callable[[], Any], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        result = work()
    except BaseException as error:
        result = error
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def count_messages(work: Callable[[], object]) -> int:
    """How many collective operations work takes."""
    names = ("all_reduce", "broadcast", "broadcast_object_list", "all_gather_object")
    counted = [
        mock.patch.object(torch.distributed, name, wraps=getattr(torch.distributed, name))
        for name in names
    ]
    mocks = [patch.start() for patch in counted]
    work()
    for patch in counted:
        patch.stop()
    return sum(found.call_count for found in mocks)


def normal() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@functools.cache
def density() -> LogDensity:
    """Made before the processes are, which then need not capture it."""
    return LogDensity(normal)


def gaussian() -> pf.Flow:
    return pf.Flow([pf.transforms.LowerTriangularAffine(2)])


class UnpicklableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def fail(errors: list[BaseException | None]) -> None:
    with processes.add_up(2, CPU):
        error = errors[processes.rank()]
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([None, ValueError("odd")], [ValueError("odd")] * 2),
        ([ValueError("one"), KeyError("two")], [ValueError("one"), KeyError("two")]),
        ([TimeOver(), None], [TimeOver()] * 2),
        ([KeyboardInterrupt(), TimeOver()], [KeyboardInterrupt()] * 2),
        (
            [UnpicklableError("a", "b"), None],
            [UnpicklableError("a", "b"), RuntimeError("UnpicklableError: ab")],
        ),
    ],
)
def test_an_error_in_one_process_is_raised_in_all(
    errors: list[Any], expected: list[Any], tmp_path: Path
) -> None:
    def told() -> str:
        try:
            fail(errors)
        except BaseException as error:
            return repr(error)
        return "none"

    assert together(told, tmp_path) == [repr(error) for error in expected]


def shared_values() -> tuple[Any, ...]:
    seen: list[int] = []

    def function(points: torch.Tensor) -> tuple[torch.Tensor, ...]:
        check_time()
        seen.append(len(points))
        return points.sum(-1), points.double().square().unsqueeze(-1), -points[..., :1]

    deadline = Deadline(10.0, clock=lambda: 0.0, agree=processes.agree)
    points = torch.arange(10.0).reshape(5, 2)
    with processes.sharing(), deadline.enforced():
        values = in_shares(function, points, width=4)
        one = in_shares(function, points[:1], width=4)
        with processes.apart():
            own = in_shares(function, points[processes.rank() :], width=4)
    return values, one, own[0], seen


def test_points_are_shared_out_and_their_values_are_those_of_one_process(tmp_path: Path) -> None:
    alone = shared_values()
    first, second = together(shared_values, tmp_path)
    assert alone[3] == [5, 1, 5]
    # A process without points evaluates one in vain.
    assert (first[3], second[3]) == ([3, 1, 5], [2, 1, 4])
    for result in (first, second):
        torch.testing.assert_close(result[:2], alone[:2], rtol=0, atol=0)
    assert torch.equal(second[2], alone[2][1:])


def test_the_time_is_over_for_all_when_it_is_for_one(tmp_path: Path) -> None:
    def evaluate() -> str:
        late = 11.0 if processes.rank() == 1 else 0.0
        readings = iter([0.0])
        deadline = Deadline(10.0, lambda: next(readings, late), processes.agree)
        try:
            with processes.sharing(), deadline.enforced():
                density().log_prob(torch.zeros(4, 2))
        except TimeOver:
            return "over"
        return "not over"

    density()
    assert together(evaluate, tmp_path) == ["over"] * 2


@pytest.mark.parametrize(
    ("objective", "messages"), [(PathELBO(8), 1), (RenyiBound(0.5, 8), 2)], ids=["ELBO", "Renyi"]
)
def test_a_step_takes_one_message(objective: Any, messages: int, tmp_path: Path) -> None:
    """Bounds by other means of the weights take one more, for the weights of all particles."""

    def count(steps: int) -> int:
        options = {"objective": objective, "deadline": Deadline(1e6)}
        flow = gaussian()
        return count_messages(lambda: train(flow, density(), [], steps, **options))

    def counts() -> list[int]:
        return [count(steps) for steps in (1, 11)]

    density()
    for few, many in together(counts, tmp_path):
        assert many - few == 10 * messages


def test_a_step_that_fails_in_one_process_fails_in_all(tmp_path: Path) -> None:
    def step() -> None:
        evaluate = LogDensity.value_and_grad

        def broken(self: Any, z: torch.Tensor) -> Any:
            if processes.rank() == 1:
                raise RuntimeError("no memory")
            return evaluate(self, z)

        with mock.patch.object(LogDensity, "value_and_grad", broken):
            train(gaussian(), density(), [], 5, objective=PathELBO(8))

    density()
    first, second = together(step, tmp_path)
    assert repr(first) == repr(second) == "RuntimeError('no memory')"


def test_objectives_that_share_no_particles_share_their_evaluations(tmp_path: Path) -> None:
    def points() -> int:
        seen: list[int] = []
        kind = type(density().data)
        evaluate = kind.evaluate

        def watched(self: Any, density: Any, points: torch.Tensor) -> Any:
            seen.append(len(points))
            return evaluate(self, density, points)

        with mock.patch.object(kind, "evaluate", watched):
            train(gaussian(), density(), [], 1, objective=FAB(64))
        return sum(seen)

    alone = points()
    first, second = together(points, tmp_path)
    assert first + second < 1.2 * alone


def test_chains_share_out_their_moves(tmp_path: Path) -> None:
    def move() -> tuple[torch.Tensor, int]:
        seen: list[int] = []

        def target(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(len(x))
            return -0.5 * x.square().sum(-1), -x

        torch.manual_seed(0)
        with processes.sharing():
            result = hmc(target, torch.ones(8, 2), trajectories=2)
        return result.position, sum(seen)

    alone, points = move()
    for position, share in together(move, tmp_path):
        assert torch.equal(position, alone)
        assert share == points / 2


@pytest.mark.parametrize("seconds", [1e-4, 1e-2])
def test_a_warning_says_where_processes_do_not_pay(seconds: float, tmp_path: Path) -> None:
    def warned() -> str:
        fixed = mock.patch.multiple(
            processes,
            time_message=lambda device: 1e-3,
            time_work=lambda work, times=3: (work(), seconds)[1],
        )
        with fixed, pytest.MonkeyPatch.context() as patch:
            told: list[str] = []
            patch.setattr("warnings.warn", lambda text, **_: told.append(text))
            _warn_of_cheap_evaluations(density())
        return " ".join(told)

    expected = (
        "One process may be as fast as these 2: each evaluates 256 points in 0.1 ms, and a message "
        "between them takes 1 ms, so that they pay from 4 ms on."
    )
    assert together(warned, tmp_path) == [expected if seconds < 4e-3 else ""] * 2


def test_times_are_taken(tmp_path: Path) -> None:
    found = together(functools.partial(processes.time_message, CPU), tmp_path)
    assert all(0 < seconds < 60 for seconds in found)
