"""The parts of `python -m benchmarks.gpu`: what is measured of ready-made flows on a device."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import pyroflows as pf
from benchmarks.memory import PeakBytes
from benchmarks.peers import BUILDERS, LAYERS, WIDTH, missing
from benchmarks.waits import waits

_PUBLIC = {name: getattr(pf, name) for name in pf.__all__}
READY_MADE: dict[str, Callable[..., pf.Flow]] = {
    name: value
    for name, value in _PUBLIC.items()
    if isinstance(value, type) and issubclass(value, pf.Flow) and value is not pf.Flow
}
PEERS = ("zuko", "normflows")
#: Ready-made flow -> the same family of the peers; with as many layers as they have here.
FAMILIES = {"RealNVP": "realnvp", "MAF": "maf", "NSF": "nsf-coupling"}
#: Least and most repetitions of a step that is timed.
REPEATS = (3, 50)
#: Gradient steps of the two fits whose waits are compared.
FIT_STEPS = (10, 40)

Action = Callable[[], Any]
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Args:
        features: Entries of an event.
        batches: Points of a step, from small to large.
        budget: Seconds that the repetitions of a step take.
        seconds: What all parts may take.
        tests: Most tests to run, or None.
        paths: Where the tests are.
    """

    features: int
    batches: tuple[int, ...]
    budget: float
    seconds: float
    tests: int | None
    paths: tuple[str, ...]


FULL = Sizes(32, (512, 65_536), 0.5, 460.0, None, ("tests",))
SMALL = Sizes(3, (16,), 0.01, 300.0, 12, ("tests/flows/test_flow_laws.py",))


@dataclass(frozen=True)
class Row:
    """One number.

    Args:
        part: A name in `PARTS`, or `sources` for a line that waits.
        subject: A flow, a fit, a test, or a line of source.
        quantity: What is measured.
        value: The number, or None where there is none.
        note: Why there is none.
    """

    part: str
    subject: str
    quantity: str
    value: float | None = None
    note: str = ""


Send = Callable[[Row], None]


@dataclass(frozen=True)
class Task:
    """What a part is asked to do.

    Args:
        device: Where.
        sizes: How much.
        flows: Names in `READY_MADE`.
        seconds: What this part may take.
    """

    device: torch.device
    sizes: Sizes
    flows: tuple[str, ...]
    seconds: float

    def points(self, batch: int) -> Tensor:
        """Return that many points, the same ones for every flow."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, self.sizes.features, generator=generator).to(self.device)

    def flow(self, name: str) -> pf.Flow:
        """Return a ready-made flow a little away from its start, where it is the identity."""
        torch.manual_seed(0)
        layers = {"transforms": LAYERS} if name in FAMILIES else {}
        flow = READY_MADE[name](self.sizes.features, **layers)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return flow.to(self.device).train()


def attempt(send: Send, row: Row, measure: Callable[..., float], *args: Any) -> None:
    """Send a row with its value, or with a sentence on why there is none.

    Args:
        send: Takes the row.
        row: The row without its value.
        measure: Returns the value.
        args: Its arguments.
    """
    try:
        value = float(measure(*args))
        known = math.isfinite(value)
        row = replace(row, value=value) if known else replace(row, note=f"the value is {value}")
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        row = replace(row, note=f"{type(error).__name__}: {lines[0][:200]}")
    send(row)
    if row.note:
        free_memory()


def free_memory() -> None:
    """Give back what a failure or an earlier flow has left behind."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def training_step(module: nn.Module, log_prob: Loss, x: Tensor) -> Action:
    """Return one step of maximum likelihood by Adam, once run, which returns its loss.

    Args:
        module: What holds the parameters.
        log_prob: Scores points.
        x: The points.
    """
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-4)

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = -log_prob(x).mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    step()
    return step


def step_of(task: Task, name: str, batch: int) -> Action:
    """Return a training step of a ready-made flow."""
    flow = task.flow(name)
    return training_step(flow, lambda x: flow().log_prob(x), task.points(batch))


def each_size(task: Task) -> Iterator[tuple[str, int]]:
    """Yield all flows for each size of batch, the small one first."""
    for batch in task.sizes.batches:
        for name in task.flows:
            yield name, batch


# The parts


def run_steps(task: Task, send: Send) -> None:
    """Time training steps of ready-made flows and of their peers."""
    peers = [library for library in PEERS if not missing(library)]
    for name, batch in each_size(task):
        attempt(send, Row("steps", name, str(batch)), time_of_step, task, name, batch)
        for library in peers if name in FAMILIES else ():
            row = Row("steps", name, f"{library} {batch}")
            attempt(send, row, time_of_peer, task, library, name, batch)


def time_of_step(task: Task, name: str, batch: int) -> float:
    """Return the milliseconds of a ready-made flow's training step."""
    return milliseconds(task, step_of(task, name, batch))


def time_of_peer(task: Task, library: str, name: str, batch: int) -> float:
    """Return the milliseconds of a training step of another library's flow of the same family."""
    return milliseconds(task, peer_step(task, library, name, batch))


def peer_step(task: Task, library: str, name: str, batch: int) -> Action:
    """Return a training step of another library's flow."""
    torch.manual_seed(0)
    model = BUILDERS[library][FAMILIES[name]](task.sizes.features, WIDTH, LAYERS)
    model.module.to(task.device)
    return training_step(model.module, model.log_prob, task.points(batch))


def milliseconds(task: Task, step: Action) -> float:
    """Return the median milliseconds of a step, as the device's clock has them where it has one."""
    least, most = REPEATS
    times = [_seconds(task.device, step)]
    wanted = min(most, max(least, round(task.sizes.budget / max(times[0], 1e-6))))
    times += [_seconds(task.device, step) for _ in range(wanted)]
    return 1000 * statistics.median(times[1:])


def _seconds(device: torch.device, step: Action) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def run_waits(task: Task, send: Send) -> None:
    """Count how often the host waits for the device."""
    for name in task.flows:
        for quantity in ACTIONS:
            attempt(send, Row("waits", name, quantity), waits_of_flow, task, name, quantity, send)
    attempt(send, Row("waits", "fit_posterior", "step"), waits_of_fit, task, send)


def waits_of_flow(task: Task, name: str, quantity: str, send: Send) -> float:
    """Count the waits of one thing that a flow does, and send a row for each line that waits."""
    action = ACTIONS[quantity](task, name, task.sizes.batches[0])
    action()  # what is done once is not what each time costs
    with waits(task.device) as found:
        action()
    for line, times in found.items():
        send(Row("sources", line, f"{name} {quantity}", times))
    return found.total()


def forward_of(task: Task, name: str, batch: int) -> Action:
    """Return a flow's map from the base to the event."""
    transform, x = task.flow(name).transform, task.points(batch)
    return lambda: transform.forward_and_log_det(x)


def inverse_of(task: Task, name: str, batch: int) -> Action:
    """Return a flow's map from the event to the base."""
    transform, x = task.flow(name).transform, task.points(batch)
    return lambda: transform.inverse_and_log_det(x)


def sample_of(task: Task, name: str, batch: int) -> Action:
    """Return a drawing of points."""
    flow = task.flow(name)
    return lambda: flow().sample((batch,))


ACTIONS = {"forward": forward_of, "inverse": inverse_of, "sample": sample_of, "train": step_of}


def waits_of_fit(task: Task, send: Send) -> float:
    """Count the waits of a step of `fit_posterior`: those of a longer fit less those of a shorter."""
    counts = []
    for steps in FIT_STEPS:
        pyro.clear_param_store()
        with waits(task.device) as found:
            pf.fit_posterior(
                regression,
                (task.points(100),),
                guide=pf.RealNVP,
                steps=steps,
                progress=False,
            )
        counts.append(found)
    short, long = counts
    more = FIT_STEPS[1] - FIT_STEPS[0]
    for line in long:
        if long[line] > short[line]:
            send(Row("sources", line, "fit_posterior step", (long[line] - short[line]) / more))
    return (long.total() - short.total()) / more


def regression(x: Tensor) -> None:
    """The first column of x, regressed on the others."""
    zeros = x.new_zeros(x.shape[1] - 1)
    weights = pyro.sample("weights", dist.Normal(zeros, 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(zeros[0], 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x[:, 1:] @ weights, scale), obs=x[:, 0])


def run_kernels(task: Task, send: Send) -> None:
    """Measure which share of a training step's time kernels run."""
    for name, batch in each_size(task):
        attempt(send, Row("kernels", name, str(batch)), kernel_share, task, name, batch)


def kernel_share(task: Task, name: str, batch: int) -> float:
    """Return the share of a step in kernels; on a CPU, of torch's operations in a profile."""
    step = step_of(task, name, batch)
    on_device = task.device.type == "cuda"
    seconds = milliseconds(task, step) / 1000
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities) as profiler:
        profiled = _seconds(task.device, step)
    events = profiler.key_averages()
    if on_device:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        busy = sum(
            event.self_device_time_total for event in kernels if not event.is_user_annotation
        )
        return busy / 1e6 / seconds
    busy = sum(event.self_cpu_time_total for event in events if event.key.startswith("aten::"))
    return busy / 1e6 / profiled


def run_memory(task: Task, send: Send) -> None:
    """Measure the peak memory of a training step."""
    for name, batch in each_size(task):
        attempt(send, Row("memory", name, str(batch)), peak_megabytes, task, name, batch)


def peak_megabytes(task: Task, name: str, batch: int) -> float:
    """Return the most megabytes alive at once within a step, less those alive before it."""
    step = step_of(task, name, batch)
    if task.device.type != "cuda":
        with PeakBytes() as meter:
            step()
        return meter.peak / 1e6
    free_memory()
    torch.cuda.synchronize(task.device)
    before = torch.cuda.memory_allocated(task.device)
    torch.cuda.reset_peak_memory_stats(task.device)
    step()
    torch.cuda.synchronize(task.device)
    return (torch.cuda.max_memory_allocated(task.device) - before) / 1e6


def run_bf16(task: Task, send: Send) -> None:
    """Compare bfloat16 autocast with float32."""
    batch = task.sizes.batches[-1]
    for name in task.flows:
        attempt(send, Row("bf16", name, "loss"), loss_difference, task, name, batch)
        attempt(send, Row("bf16", name, "ms"), time_of_autocast, task, name, batch)


@torch.no_grad()
def loss_difference(task: Task, name: str, batch: int) -> float:
    """Return the mean negative log-density under autocast less that in float32, in nats."""
    flow, x = task.flow(name), task.points(batch)
    flow().log_prob(x)  # a layer that starts at its first data has started
    expected = -flow().log_prob(x).mean()
    with torch.autocast(task.device.type, torch.bfloat16):
        loss = -flow().log_prob(x).mean()
    return float(loss - expected)


def time_of_autocast(task: Task, name: str, batch: int) -> float:
    """Return the median milliseconds of a training step whose forward pass is under autocast."""
    flow = task.flow(name)

    def log_prob(x: Tensor) -> Tensor:
        with torch.autocast(task.device.type, torch.bfloat16):
            return flow().log_prob(x)

    return milliseconds(task, training_step(flow, log_prob, task.points(batch)))


def run_tests(task: Task, send: Send) -> None:
    """Run the tests marked `device`."""
    # Measuring needs no pytest.
    from benchmarks.device_tests import run

    run(task, send)


PARTS: dict[str, tuple[Callable[[Task, Send], None], float]] = {
    "steps": (run_steps, 100.0),
    "waits": (run_waits, 60.0),
    "kernels": (run_kernels, 50.0),
    "memory": (run_memory, 35.0),
    "bf16": (run_bf16, 45.0),
    "tests": (run_tests, float("inf")),
}
"""Name -> the part, and the seconds that it may take."""
