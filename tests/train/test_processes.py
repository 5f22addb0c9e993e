"""A fit on two processes against the same fit on one."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows._deadline import Deadline
from pyroflows.model.minibatch import log_density_of
from pyroflows.posterior import fit
from pyroflows.train import fit_density
from pyroflows.train import processes as distributed
from pyroflows.train.checkpoint import Checkpoint
from pyroflows.train.objectives import FAB, Objective, PathELBO, RenyiBound
from pyroflows.train.training import train

DATA = torch.linspace(-1, 1, 12, dtype=torch.float64)


def model() -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", 12, subsample_size=5) as rows:
        pyro.sample("y", dist.Normal(loc[0] * loc[1], 1.0), obs=DATA[rows])


def trained(folder: Path, objective: Objective) -> tuple[Tensor, Tensor]:
    """Parameters and ELBOs; ranks begin with different parameters and random states, of which the first rank's count."""
    torch.set_num_threads(1)
    torch.manual_seed(distributed.rank())
    density = log_density_of(model, batch_size=distributed.share(65))
    torch.manual_seed(distributed.rank())
    couplings = pf.RealNVP(2, transforms=2, network=pf.nn.mlp((8,))).transform.layers
    flow = pf.Flow([*couplings, pf.transforms.LowerTriangularAffine(2)]).double()
    history: list[Tensor] = []
    # An odd number, of which one rank gets more.
    train(
        flow,
        density,
        history,
        25,
        objective=objective,
        checkpoint=Checkpoint(folder / f"{type(objective).__name__}.pt", every=0),
        progress=True,
    )
    if distributed.world_size() > 1:
        seconds = distributed.agree(distributed.rank() + 7.0)
        assert seconds == 7.0
    return torch.cat([p.detach().flatten() for p in flow.parameters()]), torch.stack(history)


def fitted(folder: Path) -> tuple[Tensor, Tensor]:
    """A density: parameters, and log-likelihoods of each epoch; ranks begin as in :func:`trained`."""
    torch.manual_seed(distributed.rank())
    flow = pf.RealNVP(2, transforms=2, network=pf.nn.mlp((8,))).double()
    x = torch.randn(141, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    report = fit_density(
        flow,
        2.0 + x @ torch.tensor([[1.0, 0.5], [0.0, 0.5]], dtype=torch.float64),
        batch_size=33,
        max_epochs=5,
        average=0.9,
        checkpoint=folder / "density.pt",
        progress=False,
    )
    likelihoods = torch.tensor([report.train, report.validation])
    return torch.cat([p.detach().flatten() for p in flow.parameters()]), likelihoods


def timed(limit: float) -> list[Any]:
    """How far a fit got by clocks of which the main one moves by a second at each reading, the
    other one not at all, and the warnings of this process."""
    now = [0.0]

    def clock() -> float:
        now[0] += distributed.rank() == 0
        return now[0]

    timed = functools.partial(Deadline, clock=clock)
    with mock.patch.object(fit, "Deadline", timed), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = pf.fit_posterior(unobserved, steps=60, time_limit=limit, progress=False)
    torch.manual_seed(0)
    z = posterior.guide.sample_and_log_prob(3)[0].detach()
    told = ["No site" in str(warning.message) for warning in caught]
    judged = [finding.status for finding in posterior.verdict.findings]
    ended = [*(attempt.name for attempt in posterior.rungs), *judged, len(posterior.history)]
    return [ended, z, sum(told), len(told)]


def unobserved() -> None:
    """A funnel, which no Gaussian fits."""
    width = pyro.sample("width", dist.Normal(0.0, 2.0))
    pyro.sample("x", dist.Normal(torch.zeros(()), width.exp()))


def everything(folder: Path) -> tuple[Tensor, ...]:
    """The same for each objective that shares its particles out, for one that does not, and a density."""
    objectives = (PathELBO(65), RenyiBound(0.5, 65), PathELBO(65, path=False), FAB(65))
    results = [trained(folder, objectives[0])]
    for objective in objectives[1:]:
        (folder / f"{type(objective).__name__}.pt").unlink(missing_ok=True)
        results.append(trained(folder, objective))
    return tuple(tensor for result in (*results, fitted(folder)) for tensor in result)


def main(folder: Path) -> None:
    with distributed.initialize_from_environment() as device:
        assert device is None or device == f"cuda:{distributed.rank()}"
        ends = [timed(limit) for limit in (40.0, 700.0)]
        torch.save(ends, folder / f"ends{distributed.rank()}.pt")
        torch.save(
            everything(folder), folder / f"rank{distributed.rank()}of{distributed.world_size()}.pt"
        )
    assert distributed.world_size() == 1
    # Threads of the group that outlive it can bring the interpreter down as it ends.
    assert not [name for name in thread_names() if "gloo" in name]


def thread_names() -> list[str]:
    """The threads of this process, native ones included, where the system tells."""
    return [(task / "comm").read_text() for task in Path("/proc/self/task").glob("*")]


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = everything(tmp_path / "alone")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            __file__,
            str(tmp_path),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("Fitting:   0%") == 4  # one process shows its progress
    first, second = (torch.load(tmp_path / f"ends{rank}.pt") for rank in range(2))
    # Wherever the time of the main process ends, both end at the same place.
    assert [end[0] for end in first] == [end[0] for end in second]
    torch.testing.assert_close([end[1] for end in first], [end[1] for end in second])
    assert first[0][0] != first[1][0]
    # One process warns.
    assert all(end[2] == 1 for end in first)
    assert all(end[3] == 0 for end in second)
    for rank in range(2):
        together = torch.load(tmp_path / f"rank{rank}of2.pt")
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    # A file of two processes is one from which a single one goes on: here, from its end.
    resumed = trained(tmp_path, FAB(65))
    torch.testing.assert_close(resumed, alone[6:8], rtol=1e-5, atol=1e-9)
    density = fitted(tmp_path)
    torch.testing.assert_close(density, alone[8:], rtol=1e-5, atol=1e-9)


def test_without_a_group_there_is_one_process() -> None:
    with distributed.initialize_from_environment() as device:
        assert device is None
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    rows = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(rows[distributed.rows(3)], rows)
    assert distributed.share(7) == 7
    before = rows.clone()
    distributed.take_from_main([rows])
    assert torch.equal(rows, before)
    assert distributed.agree("x") == "x"
    with pytest.warns(UserWarning, match="told"), distributed.warning_once():
        warnings.warn("told", stacklevel=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
