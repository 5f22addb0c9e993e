"""Simulations: the same whoever runs them, whenever they are killed, and however some fail."""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.model.simulations import SimulationRun, Simulations
from pyroflows.model.simulator import as_simulator

PRIOR = dist.Uniform(-torch.ones(2), torch.ones(2))


def noisy(theta: Tensor) -> Tensor:
    return theta + torch.randn(2) + float(np.random.randn())  # noqa: NPY002


def model(n: int = 4, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", n):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


class Shuffled:
    """An executor that runs its tasks at once, the last first, when results are asked for."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Future[Any], Any]] = []

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.tasks.append((future, lambda: function(*args)))
        if len(self.tasks) == 3:
            for each, task in reversed(self.tasks):
                each.set_result(task())
        return future


def equal(a: Simulations, b: Simulations) -> bool:
    pairs = ((a.theta, b.theta), (a.x, b.x))
    same = all(torch.equal(one[n], other[n]) for one, other in pairs for n in one)
    return same and torch.equal(a.numbers, b.numbers) and a.failures == b.failures


def test_the_executor_changes_nothing() -> None:
    alone = pf.simulate(noisy, PRIOR, 120)
    assert equal(alone, pf.simulate(noisy, PRIOR, 120, executor=Shuffled()))  # type: ignore[arg-type]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert equal(alone, pf.simulate(noisy, PRIOR, 120, executor=pool))


def test_random_states_outside_stay() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    pf.simulate(noisy, PRIOR, 10)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index] # noqa: NPY002


def test_data_are_drawn_given_the_parameters() -> None:
    simulations = pf.simulate(model, count=1000, data=["y"])
    mu, y = simulations.theta["mu"], simulations.x["y"]
    assert y.shape == (1000, 4)
    residual = y - mu.unsqueeze(-1)
    assert abs(float(mu.std()) - 1) < 0.1 and abs(float(residual.std()) - 1) < 0.05
    assert abs(float(residual.mean())) < 0.07


def test_observed_values_are_not_simulated_data() -> None:
    observed = torch.full((4,), 1e6)
    simulations = pf.simulate(model, count=20, args=(4, observed))
    assert float(simulations.x["y"].abs().max()) < 100


def test_killed_simulations_go_on_to_the_same_result(tmp_path: Path) -> None:
    calls = 0

    def killed(theta: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 70:
            raise KeyboardInterrupt
        return noisy(theta)

    path = tmp_path / "some.pt"
    with pytest.raises(KeyboardInterrupt):
        pf.simulate(killed, PRIOR, 120, path=path)
    calls = 1000
    assert equal(pf.simulate(killed, PRIOR, 120, path=path), pf.simulate(noisy, PRIOR, 120))
    assert calls == 1000 + 1 + 51  # the first again, to see that the file is of this simulator
    calls = 1000
    assert len(pf.simulate(killed, PRIOR, 60, path=path)) == 60 and calls == 1001


def test_a_file_of_other_simulations_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    pf.simulate(noisy, PRIOR, 10, path=path)
    with pytest.raises(ValueError, match=r"first simulation in .* is another"):
        pf.simulate(lambda theta: theta, PRIOR, 10, path=path)
    with pytest.raises(ValueError, match=r"with seed 1; .* seed 0"):
        pf.simulate(noisy, PRIOR, 10, path=path, seed=1)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"Expected a file of simulations; .* is none"):
        pf.simulate(noisy, PRIOR, 10, path=path)
    with pytest.raises(ValueError, match="path that can be written"):
        pf.simulate(noisy, PRIOR, 10, path=tmp_path / "no" / "where.pt")


def test_a_seed_of_numpy_makes_a_file_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    made = pf.simulate(noisy, PRIOR, 10, path=path, seed=np.int64(3))
    assert equal(pf.simulate(noisy, PRIOR, 10, path=path, seed=3), made)


def test_a_file_of_rounds_for_other_data_is_refused(tmp_path: Path) -> None:
    path, theta = tmp_path / "some.pt", {"theta": torch.zeros(5, 2)}
    simulator = as_simulator(noisy, PRIOR)
    at, other = {"x": torch.zeros(2)}, {"x": torch.ones(2)}

    def run(extra: dict[str, Tensor] | None, data: dict[str, Tensor] | None) -> Simulations:
        made = SimulationRun(simulator, 15, path=path)
        made.extend(10)
        return made.extend(15, extra, data)

    assert equal(run(theta, at), run(theta, at))
    for extra, data in ((theta, other), (None, None)):
        with pytest.raises(ValueError, match=r"from number 10 on those in .* are for another"):
            run(extra, data)
    assert len(pf.simulate(noisy, PRIOR, 10, path=path)) == 10


def test_a_function_may_change_its_arguments() -> None:
    def greedy(theta: dict[str, Tensor]) -> Tensor:
        theta["a"] += 100
        return theta.pop("a")

    prior = {"a": dist.Uniform(0.0, 1.0)}
    simulations = pf.simulate(greedy, prior, 5)
    torch.testing.assert_close(simulations.theta["a"] + 100, simulations.x["x"])


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (None, "x to be a tensor or an array of numbers; got None"),
        ("none", "x to be a tensor or an array of numbers; got 'none'"),
        ([[1.0], [1.0, 2.0]], "x to be a tensor or an array of numbers; got"),
        (torch.zeros(2) * 1j, "x to consist of real numbers; got torch.complex64"),
        (torch.zeros(0, 2), r"x to have entries; got shape \(0, 2\)"),
        ({}, "data; got an empty dictionary"),
    ],
)
def test_what_is_no_data_is_told(result: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {sentence}"):
        pf.simulate(lambda theta: result, PRIOR, 10)


def test_failures_are_named_and_left_out() -> None:
    def failing(theta: Tensor) -> Tensor:
        if theta[0] > 0.95:
            return torch.full((3,), torch.nan)
        if theta[0] < -0.95:
            return torch.zeros(2)
        return torch.zeros(3) if abs(float(theta[1])) < 0.98 else torch.zeros(()) / [][0]

    with pytest.warns(UserWarning, match=r"of 200 simulations failed .* at first call \d+ with th"):
        simulations = pf.simulate(failing, PRIOR, 200)
    told = " ".join(failure.sentence for failure in simulations.failures)
    assert len(simulations) + len(simulations.failures) == 200
    assert "returned x with 3 of 3 numbers not finite" in told
    assert "returned x[2] where the first call that succeeded returned x[3]" in told
    assert "raised IndexError (list index out of range)" in told
    assert bool((simulations.theta["theta"][:, 0].abs() <= 0.95).all())


@pytest.mark.parametrize("count", [5, 1000])
def test_too_many_failures_end_it_early(count: int) -> None:
    with pytest.raises(ValueError, match=r"at most 10% of \d+ .* call 0 with theta = 0.\d+, which"):
        pf.simulate(lambda theta: theta * torch.nan, dist.Uniform(0.0, 1.0), count)


def test_an_error_of_a_model_names_what_was_drawn() -> None:
    def broken() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, (mu - 5).sqrt()), obs=torch.tensor(0.0))

    sentence = r"call 0 with mu = \S+, which returned y with 1 of 1"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=sentence):
        pf.simulate(broken, count=20)


def test_what_the_executor_cannot_run_is_told() -> None:
    pool = ProcessPoolExecutor(1, mp_context=get_context("fork"))
    with pool, pytest.raises(ValueError, match="simulator that the executor can run"):
        pf.simulate(lambda theta: theta, PRIOR, 10, executor=pool)
    with pytest.raises(TypeError, match=r"executor to be one of concurrent.futures, .* got 3"):
        pf.simulate(noisy, PRIOR, 10, executor=3)  # type: ignore[arg-type]
    threads = ThreadPoolExecutor(1)  # which would share Pyro's handlers and the random states
    with threads, pytest.raises(ValueError, match=r"an executor of processes, .* ThreadPool"):
        pf.simulate(noisy, PRIOR, 10, executor=threads)


def factored() -> None:
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.tensor(1.0))


def improper() -> None:
    flat = dist.ImproperUniform(dist.constraints.real, (), ())
    mu = pyro.sample("mu", flat, infer={"x": 1}, obs=torch.tensor(0.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.0))


def subsampled() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 6, subsample_size=2):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"simulator": subsampled}, "plate 'rows' with 2 of 6. Leave out its subsample_size"),
        ({"simulator": model}, "obs sites, or data= with the names .* mu, y and none observed"),
        ({"simulator": model, "data": ["z"]}, r"sample sites of the model \(mu, y\); got 'z'"),
        ({"simulator": model, "data": "y"}, "data to be a sequence of names"),
        ({"simulator": model, "data": ["mu", "y"]}, "a latent site beside the data"),
        ({"simulator": factored}, "got pyro.factor 'f'"),
        ({"simulator": improper}, "proper priors"),
        ({"simulator": noisy}, "A function of parameters needs prior="),
        ({"simulator": 3}, "Expected a Pyro model, or a function with its prior; got 3"),
        ({"simulator": 3, "prior": PRIOR}, "Pyro model or a function of the parameters; got 3"),
        ({"simulator": noisy, "prior": 3}, "distribution of pyro.distributions"),
        ({"simulator": noisy, "prior": {}}, "one parameter at least"),
        ({"simulator": noisy, "prior": dist.Poisson(1.0)}, "continuous priors; got Poisson"),
        ({"simulator": noisy, "prior": PRIOR, "args": (1,)}, "beside a Pyro model only"),
    ],
)
def test_what_cannot_be_drawn_from_is_told(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        as_simulator(**arguments)


@pytest.mark.parametrize(("failing", "error"), [(1.0, ValueError), ("a", TypeError)])
def test_failing_is_a_share(failing: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="Expected failing"):
        pf.simulate(noisy, PRIOR, 10, failing=failing)


def test_exchangeable_rows_are_found() -> None:
    def regression(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    same = as_simulator(regression, args=(torch.ones(5), torch.zeros(5)))
    other = as_simulator(regression, args=(torch.arange(5.0), torch.zeros(5)))
    assert as_simulator(model, data=["y"]).is_exchangeable() and same.is_exchangeable()
    assert not other.is_exchangeable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not as_simulator(noisy, PRIOR).is_exchangeable()
