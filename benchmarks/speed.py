"""The benchmark of speed: pyroflows, eager and compiled, beside the peers and beside the bare networks.

Run `python -m benchmarks.speed`. Three steps are timed: `train`, the mean log-density of a batch and its gradient;
`score`, a reparametrised sample with its log-density and the gradient of both; `sample`, a plain sample. All contenders
of a setting run in turn in one process, and the medians of CPU time are told, also as multiples of the floor: the
conditioner networks alone, forward and, but for `sample`, backward, without masks or maps.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from benchmarks.density import versions
from benchmarks.peers import BINS, BUILDERS, FAMILIES, LAYERS, PLAIN, WIDTH, Build, Model, missing
from benchmarks.posteriors import _choose, _finite, _sentence, machine

STEPS = ("train", "score", "sample")
FEATURES, BATCHES = (8, 32, 64, 256), (64, 512, 4096)
FLOOR, COMPILED = "floor", " compiled"
#: pyroflows' ready-made flows, and their layers without the linear maps that these have between them.
OURS: dict[str, dict[str, Build]] = {"pyroflows": BUILDERS["pyroflows"], "layers alone": PLAIN}
CONTENDERS = (
    *(name + how for name in OURS for how in ("", COMPILED)),
    *(name for name in BUILDERS if name not in OURS),
)
#: CPU seconds that a contender's repetitions of a step take together; and the most that one step may take to be run.
BUDGET, LIMIT = 1.5, 5.0
REPEATS = (3, 100)

Action = Callable[[], object]


class LeftOut(Exception):
    """A step that is not timed; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Args:
        family: The family of flows.
        features: Entries of an event.
        batch: Points of a step.
        step: One of `STEPS`.
        hidden: Width of the networks' two hidden layers.
    """

    family: str
    features: int
    batch: int
    step: str
    hidden: int = WIDTH


@dataclass(frozen=True)
class Row:
    """One contender in one setting.

    Args:
        setting: The setting.
        contender: A name in `CONTENDERS`, or `FLOOR`.
        milliseconds: Median CPU time of a step, or None.
        ratio: The same as a multiple of the floor's.
        repeats: Steps that were timed.
        note: Why there is no time.
    """

    setting: Setting
    contender: str
    milliseconds: float | None = None
    ratio: float | None = None
    repeats: int = 0
    note: str = ""

    @property
    def key(self) -> tuple[Setting, str]:
        """What the row is the result of."""
        return self.setting, self.contender


# The contenders


def floor(setting: Setting) -> Action:
    """Return a run of the bare networks of a setting.

    Args:
        setting: The setting.
    """
    coupling = setting.family in ("realnvp", "nsf-coupling")
    moves = setting.features - setting.features // 2 if coupling else setting.features
    ins = setting.features - moves if coupling else setting.features
    outs = moves * (2 if setting.family in ("realnvp", "maf") else 3 * BINS - 1)
    sizes = [ins, setting.hidden, setting.hidden, outs]

    def network() -> nn.Module:
        parts: list[nn.Module] = []
        for size, after in pairwise(sizes):
            parts += [nn.Linear(size, after), nn.SiLU()]
        return nn.Sequential(*parts[:-1])

    networks = nn.ModuleList(network() for _ in range(LAYERS))
    x = torch.randn(setting.batch, ins, requires_grad=True)

    def forward() -> torch.Tensor:
        return torch.stack([net(x).mean() for net in networks]).sum()

    @torch.no_grad()
    def sample() -> object:
        return forward()

    return sample if setting.step == "sample" else lambda: _backward(networks, forward())


def action(model: Model, setting: Setting, batch: int) -> Action:
    """Return one step of a model.

    Args:
        model: The model.
        setting: The setting.
        batch: Points of the step.
    """
    x = torch.randn(batch, setting.features)

    def train() -> None:
        _backward(model.module, -model.log_prob(x).mean())

    def score() -> None:
        y, log_prob = model.rsample_and_log_prob(batch)
        _backward(model.module, log_prob.mean() + y.square().mean())

    return {"train": train, "score": score, "sample": lambda: model.sample(batch)}[setting.step]


def _backward(module: nn.Module, loss: torch.Tensor) -> None:
    for parameter in module.parameters():
        parameter.grad = None
    loss.backward()


def compiled(model: Model) -> Model:
    """Return a model of pyroflows whose distribution is compiled, for one size of batch.

    Args:
        model: The model.
    """
    distribution = model.module()

    def compiled_for_size(function: Callable[..., object]) -> Callable[..., object]:
        return torch.compile(function, fullgraph=True, dynamic=False)

    rsample_and_log_prob = compiled_for_size(lambda n: distribution.rsample_and_log_prob((n,)))
    sample = compiled_for_size(lambda n: distribution.sample((n,)))
    return replace(
        model,
        log_prob=compiled_for_size(distribution.log_prob),
        sample=sample,
        rsample_and_log_prob=rsample_and_log_prob,
    )


def prepare(setting: Setting, contender: str) -> Action:
    """Return a step of a contender, once run.

    Args:
        setting: The setting.
        contender: A name in `CONTENDERS`, or `FLOOR`.

    Raises:
        LeftOut: If a step would take more than `LIMIT` seconds, by one of a sixteenth of the batch, or is the slow
            direction of an autoregressive layer, to be compiled: the compiler writes out every entry's stage.
    """
    torch.manual_seed(0)
    compiling = contender.endswith(COMPILED)
    if compiling and setting.family in ("maf", "nsf-autoregressive") and setting.step != "train":
        raise LeftOut("not compiled, for all stages of sampling would be written out")
    if contender == FLOOR:
        step = floor(setting)
    else:
        library = contender.removesuffix(COMPILED)
        model = (BUILDERS | OURS)[library][setting.family](setting.features, setting.hidden, LAYERS)
        model.module.train(setting.step != "sample")
        small = max(1, setting.batch // 16)
        trial = action(model, setting, small)
        trial()
        seconds = _seconds(trial) * setting.batch / small
        if seconds > LIMIT:
            raise LeftOut(f"about {seconds:.0f} s a step, more than {LIMIT:g} s")
        if compiling:
            torch._dynamo.reset()
            model = compiled(model)
        step = action(model, setting, setting.batch)
    step()
    step()
    return step


# The timing


def measure(setting: Setting, contenders: Sequence[str]) -> list[Row]:
    """Time contenders in turn, the floor among them.

    Args:
        setting: The setting.
        contenders: Names in `CONTENDERS`.
    """
    steps: dict[str, Action] = {}
    notes: dict[str, str] = {}
    for contender in (FLOOR, *contenders):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                steps[contender] = prepare(setting, contender)
        except Exception as error:
            notes[contender] = str(error) if isinstance(error, LeftOut) else _sentence(error)
    times = time_in_turn(steps)
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    rows = []
    for name in (FLOOR, *contenders):
        ms = medians.get(name)
        ratio = ms / medians[FLOOR] if ms is not None and FLOOR in medians else None
        rows.append(Row(setting, name, ms, ratio, len(times.get(name, ())), notes.get(name, "")))
    return rows


def time_in_turn(steps: dict[str, Action]) -> dict[str, list[float]]:
    """Time steps in turn, each about as often as fits into `BUDGET`.

    Args:
        steps: The steps by name.

    Returns:
        CPU seconds of every repetition.
    """
    times = {name: [_seconds(step)] for name, step in steps.items()}
    least, most = REPEATS
    wanted = {
        name: min(most, max(least, math.ceil(BUDGET / max(first, 1e-6))))
        for name, (first,) in times.items()
    }
    for number in range(1, most):
        for name, step in steps.items():
            if number < wanted[name]:
                times[name].append(_seconds(step))
    return times


def _seconds(step: Action) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


# The table and the JSON


def table(rows: Sequence[Row]) -> str:
    """Format rows of one setting on a line: milliseconds, and in brackets the multiple of the floor.

    Args:
        rows: The rows of one setting.
    """
    setting = rows[0].setting
    cells = [
        f"{setting.family:18s} {setting.step:6s} {setting.features:4d} {setting.batch:5d} {setting.hidden:4d}"
    ]
    for row in rows:
        if row.milliseconds is None:
            cells.append(f"{'-':>16s}")
        else:
            cells.append(f"{row.milliseconds:9.2f} {f'({row.ratio:.1f})' if row.ratio else '':>6s}")
    notes = [f"\n    {row.contender}: {row.note}" for row in rows if row.note]
    return " ".join(cells) + "".join(notes)


def header(contenders: Sequence[str]) -> str:
    """Return the table's first line.

    Args:
        contenders: Names in `CONTENDERS`.
    """
    names = " ".join(
        f"{name:>16s}" for name in (FLOOR, *(name.replace(COMPILED, " c.") for name in contenders))
    )
    return f"{'family':18s} {'step':6s} {'D':>4s} {'batch':>5s} {'net':>4s} {names}"


def write_json(path: str | Path, rows: Sequence[Row]) -> None:
    """Write the results.

    Args:
        path: The file.
        rows: The rows.
    """
    document = {
        "machine": machine() | {"dtype": "torch.float32", **versions()},
        "settings": {
            "layers": LAYERS,
            "bins": BINS,
            "budget_seconds": BUDGET,
            "limit_seconds": LIMIT,
        },
        "rows": [
            {**asdict(row.setting), **{k: v for k, v in asdict(row).items() if k != "setting"}}
            for row in rows
        ],
    }
    Path(path).write_text(
        json.dumps(_finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


def read_json(path: str | Path) -> list[Row]:
    """Return the rows of a file that `write_json` wrote; none if there is no such file.

    Args:
        path: The file.
    """
    if not Path(path).is_file():
        return []
    fields = list(Setting.__dataclass_fields__)
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    return [Row(Setting(*(row.pop(name) for name in fields)), **row) for row in rows]


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument(
        "--families", default=",".join(FAMILIES), help="families, by commas (default: all)"
    )
    parser.add_argument("--steps", default=",".join(STEPS), help="steps, by commas (default: all)")
    parser.add_argument(
        "--features", default=",".join(map(str, FEATURES)), help="entries of an event, by commas"
    )
    parser.add_argument(
        "--batch", default=",".join(map(str, BATCHES)), help="points of a step, by commas"
    )
    parser.add_argument(
        "--hidden", default=str(WIDTH), help=f"width of both hidden layers (default: {WIDTH})"
    )
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), help="contenders, by commas (default: all)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the results, rewritten after every setting"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that FILE holds and run what is missing",
    )
    return parser


def _sizes(text: str, what: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 2:
        raise ValueError(f"Expected {what} to be integers of at least 2, by commas; got {text!r}.")
    return sizes


def settings_of(args: argparse.Namespace) -> Iterator[Setting]:
    """Yield the settings that the command's arguments ask for.

    Args:
        args: The arguments.

    Raises:
        ValueError: If one is wrong.
    """
    families = _choose(args.families, FAMILIES, "--families")
    steps = _choose(args.steps, STEPS, "--steps")
    features, sizes = _sizes(args.features, "--features"), _sizes(args.batch, "--batch")
    hidden = _sizes(args.hidden, "--hidden")
    for family in families:
        for width in hidden:
            for entries in features:
                for batch in sizes:
                    yield from (Setting(family, entries, batch, step, width) for step in steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark's command.

    Args:
        argv: The command's arguments; None takes the process's own.

    Returns:
        0, or 2 where the arguments are wrong.
    """
    args = _parser().parse_args(argv)
    try:
        settings = list(settings_of(args))
        contenders = _choose(args.contenders, CONTENDERS, "--contenders")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    rows = read_json(args.json) if args.json and args.resume else []
    done = {row.key for row in rows}
    for name in [name for name in contenders if name in BUILDERS and missing(name)]:
        print(missing(name))
        contenders.remove(name)
    print(
        f"Medians of CPU milliseconds, in brackets multiples of the floor; {args.threads} thread(s), float32."
    )
    print(header(contenders), flush=True)
    try:
        for setting in settings:
            if all((setting, name) in done for name in (FLOOR, *contenders)):
                continue
            new = measure(setting, contenders)
            rows = [row for row in rows if row.key not in {made.key for made in new}] + new
            print(table(new), flush=True)
            if args.json:
                write_json(args.json, rows)
    except KeyboardInterrupt:
        print("Interrupted; what is above was done.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
