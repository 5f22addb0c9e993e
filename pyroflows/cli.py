"""The command line: fits a Pyro model with a flow guide, says whether to trust the posterior, saves it.

Heavy modules are imported where they are needed, so that ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import math
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["FLOWS", "main"]

# Name on the command line -> name in the package.
FLOWS = {
    "realnvp": "RealNVP",
    "nice": "NICE",
    "iaf": "IAF",
    "maf": "MAF",
    "nsf": "NSF",
    "glow": "Glow",
    "planar": "PlanarFlow",
    "radial": "RadialFlow",
    "sylvester": "SylvesterFlow",
    "naf": "NAF",
    "unaf": "UNAF",
    "bnaf": "BNAF",
    "sospf": "SOSPF",
    "bpf": "BPF",
    "residual": "ResidualFlow",
    "ffjord": "FFJORD",
    "flowpp": "FlowPlusPlus",
}

DATA_HELP = """\
data:
  --data names a JSON file that holds one object, whose keys are the arguments of the model. Lists, nested
  or not, become tensors: of floats in torch's default dtype, of whole numbers in int64, of booleans in
  bool. Numbers, booleans and strings outside lists stay as they are, and null becomes None. With a packaged
  example, --data replaces all of its data.

exit codes:
  0 fitted and saved; 2 a mistake in the input, told in one sentence; 130 stopped by Ctrl-C (during the
  fit, the best posterior so far is still printed and saved)

examples:
  pyroflows fit eight_schools
  pyroflows fit path/to/model.py:model --data data.json --time-limit 60 --out posterior.nc
  torchrun --nproc-per-node 4 -m pyroflows fit path/to/model.py:model --data data.json
"""


class UserError(Exception):
    """A mistake in the input, whose message is one sentence for the user."""


@dataclass(frozen=True)
class Problem:
    """What to fit: a model, the arguments to call it with, and the file in which it is written."""

    name: str
    model: Callable[..., Any]
    source: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; ``None`` takes those of the process.

    Returns:
        The exit code: 0, 2 for a mistake in the input, told in a sentence on stderr, or 130 after Ctrl-C.

    >>> main(["fit", "no_such_example"])
    2
    """
    try:
        options = _parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # ArviZ 0.23 announces its version 1 to everyone who imports it.
            warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
            # The fit itself says which site is not finite.
            warnings.filterwarnings("ignore", message="Encountered (NaN|[+]?inf)")
            code: int = options.run(options)
            return code
    except SystemExit as stop:  # argparse, after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except UserError as error:
        print(f"pyroflows: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyroflows: Interrupted.", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:].rstrip('.')}; see {self.prog} --help.")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        import pyroflows

        print(f"pyroflows {pyroflows.__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pyroflows",
        description="Fit Pyro models with normalizing flows.",
        epilog="To begin: pyroflows fit eight_schools. How to bring a model and data of your own: pyroflows fit --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    fit = commands.add_parser(
        "fit",
        help="fit a model with a flow guide",
        description="Fit a Pyro model with a flow guide; print its posterior and whether to trust it;\n"
        "save the draws for ArviZ (netCDF) and a picture of them (PNG).",
        epilog=DATA_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fit.set_defaults(run=_fit)
    add = fit.add_argument
    add("model", help="a packaged example (see: pyroflows list), or path/to/model.py:function")
    add("--data", metavar="FILE", help="JSON file with the arguments of the model, see below")
    add(
        "--flow", choices=list(FLOWS), help="family of the guide's flow (default: the fit's choice)"
    )
    add("--seed", type=_seed, default=0, metavar="N", help="seed of all randomness (default: 0)")
    add(
        "--time-limit",
        type=_seconds,
        metavar="SECONDS",
        help="time for the fit to aim at (default: none)",
    )
    add(
        "--draws",
        type=_draws,
        default=4000,
        metavar="N",
        help="draws to summarise and save (default: 4000)",
    )
    add(
        "--out",
        metavar="FILE.nc",
        help="where to save the draws, the picture going beside it as FILE.png; files there are replaced "
        "(default: the model's name, in this folder)",
    )
    add(
        "--device",
        metavar="NAME",
        help="device to fit on, such as cuda or cuda:1 (default: that of the data)",
    )
    add(
        "--threads",
        type=_threads,
        default=1,
        metavar="N",
        help="threads of torch (default: 1; more pay only for models with much data)",
    )
    add(
        "--checkpoint",
        metavar="FILE",
        help="file from which a fit that was killed goes on (default: none)",
    )
    add("--quiet", action="store_true", help="print the verdict only: no progress, no table")
    about = "list the packaged examples"
    listing = commands.add_parser("list", help=about, description=about, allow_abbrev=False)
    listing.set_defaults(run=_list)
    return parser


def _seed(text: str) -> int:
    return _integer(text, 0, 2**32 - 1)


def _draws(text: str) -> int:
    return _integer(text, 10, 10**8)


def _integer(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {most}, got {text!r}"
        )
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number of threads, got {text!r}")
    return int(text)


def _list(options: argparse.Namespace) -> int:
    from pyroflows.examples import EXAMPLES

    width = max(map(len, EXAMPLES))
    for name, example in EXAMPLES.items():
        print(f"{name:{width}}  {example.description}")
    return 0


def _fit(options: argparse.Namespace) -> int:
    from pyroflows.train import processes as distributed

    with distributed.initialize_from_environment() as device:
        if device is not None and options.device is None:
            options.device = device
        return _fit_here(options, distributed.is_main())


def _fit_here(options: argparse.Namespace, tells: bool) -> int:
    """Fits in this process, which tells and saves if it is the main one of those that ``torchrun`` started."""
    import torch

    # All that can be wrong with the input is looked at before the fit, which takes minutes.
    problem = _own_model(options) if ":" in options.model else _example(options)
    out = _output(options.out or f"{problem.name}.nc")
    _check_checkpoint(options.checkpoint, out)
    _check_device(options.device)
    torch.set_num_threads(options.threads)
    posterior = _posterior(problem, options)
    if not tells:
        return 0
    if options.quiet:
        print(posterior.verdict)
    else:
        _report(problem.name, posterior, options.draws)
    if posterior.interrupted:
        print(f"Interrupted: this is the best posterior found in {posterior.seconds:.1f} s.")
    _save(posterior, out, options.draws)
    if not options.quiet:
        print(f"Saved {out} and {out.with_suffix('.png')}.")
    return 130 if posterior.interrupted else 0


def _posterior(problem: Problem, options: argparse.Namespace) -> Any:
    import pyroflows

    try:
        return pyroflows.fit_posterior(
            problem.model,
            args=problem.args,
            kwargs=problem.kwargs,
            guide=getattr(pyroflows, FLOWS[options.flow]) if options.flow else "auto",
            seed=options.seed,
            time_limit=options.time_limit,
            progress=not options.quiet,
            device=options.device,
            checkpoint=options.checkpoint,
        )
    except Exception as error:
        line = _line_in(problem.source, error)
        if line is not None:
            where = f"{problem.source}, line {line}"
            raise UserError(f"The model raised {_described(error)} at {where}.") from error
        if isinstance(error, (ValueError, TypeError)):
            raise UserError(_sentence(error)) from error
        site = _site_at_fault(problem)
        if site is not None:
            raise UserError(site) from error
        raise  # a mistake of this package: its traceback is of use


def _site_at_fault(problem: Problem) -> str | None:
    """A sentence on the first site that cannot be scored: the log densities are computed outside the model."""
    from pyro import poutine

    trace = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs)
    site: Any
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            try:
                site["fn"].log_prob(site["value"])
            except Exception as error:  # of any type: the distribution may be the user's own
                shapes = tuple(site["value"].shape), tuple(site["fn"].shape())
                return (
                    f"The site {name!r} holds a value of shape {shapes[0]} that its distribution, of shape {shapes[1]}, "
                    f"cannot score: {_sentence(error)}"
                )
    return None


def _report(name: str, posterior: Any, draws: int) -> None:
    table = posterior.summary(draws)
    verdict = posterior.verdict
    print(f"Posterior of {name}:\n")
    print(_formatted(table))
    print()
    print(verdict)
    print()
    for label, value in (
        ("ELBO", f"{verdict.elbo:.2f}"),
        (
            "log evidence",
            f"{verdict.log_evidence:.3f}, Monte Carlo error {verdict.log_evidence_error:.1g}",
        ),
        ("k-hat", f"{verdict.khat:.2f}"),
        ("importance ESS", f"{verdict.ess:.1%} of {verdict.draws} draws"),
        ("found by", posterior.rungs[-1].name if posterior.rungs else "-"),
        ("seconds", f"{posterior.seconds:.1f}"),
    ):
        print(f"{label:<16}{value}")


def _formatted(table: Any) -> str:
    """The table with as many decimals in each row as its standard deviation deserves."""
    cells = [["", *map(str, table.columns)]]
    for name, row in table.iterrows():
        sd = float(row["sd"])
        decimals = min(max(2 - math.floor(math.log10(sd)), 0), 12) if 0 < sd < math.inf else 3
        cells.append([str(name), *(f"{value:.{decimals}f}" for value in row)])
    first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        aligned = (number.rjust(width) for number, width in zip(numbers, others, strict=True))
        lines.append("  ".join([name.ljust(first), *aligned]))
    return "\n".join(lines)


def _save(posterior: Any, out: Path, draws: int) -> None:
    import torch

    from pyroflows.report.arviz_bridge import save
    from pyroflows.report.plots import plot_posterior

    container = posterior.to_arviz(draws=draws)
    try:
        save(container, out)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same command draws the same picture
            plot_posterior(posterior, path=out.with_suffix(".png"), draws=draws)
    except (OSError, ValueError) as error:
        raise UserError(
            f"Could not write {out} and the picture beside it: {_sentence(error)}"
        ) from error


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".nc":
        raise UserError(f"Expected --out to name a file that ends in .nc; got {text!r}.")
    for file in (path, path.with_suffix(".png")):
        existed = os.path.exists(file)  # Path.exists raises for a name that is too long
        try:
            # Opening is the one test that agrees with the write to come, whatever forbids it.
            with open(file, "ab"):
                pass
            if not existed:
                file.unlink()
        except OSError as error:
            raise UserError(f"Cannot write {file}: {error.strerror}.") from error
    return path


def _check_checkpoint(name: str | None, out: Path) -> None:
    if name is not None and Path(name).resolve() in (
        out.resolve(),
        out.with_suffix(".png").resolve(),
    ):
        raise UserError(
            f"Expected --checkpoint to name another file than --out and its picture; got {name!r} for both."
        )


def _check_device(name: str | None) -> None:
    if name is None:
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        expected = "Expected --device to name a torch device such as cpu or cuda:0"
        raise UserError(f"{expected}; got {name!r}.") from error
    if device.type == "meta":
        raise UserError("Cannot compute on --device meta, for its tensors hold no numbers.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"Cannot compute on --device {name}, for this torch sees no CUDA device.")
    try:
        torch.zeros(1, device=device).add_(1)
    except Exception as error:  # of many types: each backend has its own
        raise UserError(f"Cannot compute on --device {name}: {_sentence(error)}") from error


def _example(options: argparse.Namespace) -> Problem:
    from pyroflows.examples import EXAMPLES, load_example

    if options.model not in EXAMPLES:
        raise UserError(
            f"There is no example {options.model!r}; the examples are {', '.join(EXAMPLES)}, and a model of "
            "your own is written path/to/model.py:function."
        )
    example = load_example(options.model)
    source = inspect.getfile(example.model)
    if options.data is None:
        return Problem(example.name, example.model, source, example.args, example.kwargs)
    return _with_data(example.name, example.model, source, options.data)


def _own_model(options: argparse.Namespace) -> Problem:
    file, _, name = options.model.rpartition(":")
    path = Path(file)
    if not os.path.isfile(path):
        raise UserError(f"There is no model file {file}.")
    spec = importlib.util.spec_from_file_location(f"_pyroflows_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"Expected a model file that ends in .py; got {file}.")
    module = importlib.util.module_from_spec(spec)
    # As under `python model.py`: a model may import its neighbours, and dataclasses look their module up.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(str(path), error)
        where = file if line is None else f"{file}, line {line}"
        raise UserError(f"Could not import the model: {_described(error)} at {where}.") from error
    if not hasattr(module, name):
        functions = inspect.getmembers(module, inspect.isfunction)
        own = [key for key, function in functions if function.__module__ == spec.name]
        known = f"; its functions are {', '.join(own)}" if own else ", nor any function"
        raise UserError(f"There is no {name!r} in {file}{known}.")
    model = getattr(module, name)
    if isinstance(model, type) or not callable(model):
        what = "a class" if isinstance(model, type) else f"of type {type(model).__name__}"
        expected = f"Expected {name!r} in {file} to be a function or a PyroModule instance"
        raise UserError(f"{expected}; it is {what}.")
    return _with_data(name, model, str(path), options.data)


def _with_data(name: str, model: Callable[..., Any], source: str, file: str | None) -> Problem:
    data = {} if file is None else _read_data(file)
    parameters = _parameters(model)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    known = [p.name for p in named]
    missing = [p.name for p in named if p.default is p.empty and p.name not in data]
    if missing and file is None:
        raise UserError(
            f"The model {name!r} needs {_listed(missing)}; give a JSON file with --data."
        )
    if missing:
        raise UserError(f"{file} lacks {_listed(missing)}, which the model {name!r} needs.")
    unknown = [key for key in data if key not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        takes = f"takes {_listed(known)}" if known else "takes no arguments"
        raise UserError(f"{file} holds {_listed(unknown)}, but the model {name!r} {takes}.")
    args = tuple(data.pop(p.name, p.default) for p in named if p.kind is p.POSITIONAL_ONLY)
    return Problem(name, model, source, args, data)


def _parameters(model: Callable[..., Any]) -> list[inspect.Parameter]:
    # The __call__ of a module takes anything; what its forward takes is what counts.
    function = getattr(model, "forward", model)
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # compiled callables have no signature
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def _read_data(file: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"Cannot read --data {file}: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{file} is not JSON: {error.msg} at {where}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {_sentence(error)}") from error
    if not isinstance(data, Mapping):
        expected = f"Expected {file} to hold a JSON object, its keys the model's arguments"
        raise UserError(f"{expected}; got {_kind(data)}.")
    return {key: _argument(file, key, value) for key, value in data.items()}


def _argument(file: str, key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        raise UserError(
            f"Expected {key!r} in {file} to be a number, a list or null; got an object."
        )
    if not isinstance(value, list):
        return value
    import numpy as np
    import torch

    try:
        array = np.array(value)
    except ValueError as error:
        raise UserError(
            f"{key!r} in {file} is ragged: its inner lists must all be of one length."
        ) from error
    dtype = {"b": torch.bool, "i": torch.int64, "f": torch.get_default_dtype()}.get(
        array.dtype.kind
    )
    if dtype is None:
        expected = (
            "nothing but numbers (NaN for one that is missing, whole ones below 2**63) or booleans"
        )
        raise UserError(f"Expected {key!r} in {file} to hold {expected}.")
    return torch.tensor(array, dtype=dtype)


def _show_warning(
    message: Warning | str,
    category: Any,
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    print(f"pyroflows: {_sentence(message)}", file=sys.stderr)


def _line_in(source: str, error: BaseException) -> int | None:
    """The last line of this file that the error passed through."""
    file = Path(source).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file]
    return lines[-1] if lines else None


def _described(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else _sentence(error).rstrip(".")
    return f"{type(error).__name__} ({text})" if text else type(error).__name__


def _sentence(error: BaseException | str) -> str:
    # Pyro appends the shapes of a trace, torch the values of a tensor, over many lines.
    text = textwrap.shorten(str(error).split("Trace Shapes:")[0], width=400, placeholder=" ...")
    return text if not text or text.endswith(".") else f"{text}."


def _listed(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
