"""The options of the command line: one table, beside the class whose fields they fill."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NoReturn

from .._version import __version__
from .._wording import unstopped
from .errors import UserError

__all__ = ["FLOWS", "Options", "make_parser"]

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
  --data names a JSON file that holds one object, whose keys are the arguments of the model. Lists,
  nested or not, become tensors: of floats in torch's default dtype, of whole numbers in int64 (or
  in the default dtype, if the model runs with that alone), of booleans in bool. Numbers, booleans
  and strings outside lists stay as they are, and null becomes None. With a packaged example,
  --data replaces all of its data.

exit codes:
  0 fitted and saved; 2 a mistake in the input, told in one sentence, or a file that cannot be
  written (it is then saved in the folder of temporary files); 130 stopped by Ctrl-C (during the
  fit, the best posterior so far is still printed and saved)

examples:
  pyroflows fit eight_schools
  pyroflows fit path/to/model.py:model --data data.json --time-limit 60 --out posterior.nc
  torchrun --nproc-per-node 4 -m pyroflows fit path/to/model.py:model --data data.json
"""


def _number(kind: Callable[[str], float], expected: str, least: float, most: float) -> Any:
    """Returns a converter for argparse: a number within bounds, or a sentence."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


def _integer(least: int, most: int) -> Any:
    return _number(int, f"a whole number from {least} to {most}", least, most)


_seconds = _number(float, "a positive number of seconds", math.ulp(0.0), sys.float_info.max)
_threads = _number(int, "a positive number of threads", 1, sys.maxsize)


def _file(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file, got ''")
    return text


def _option(about: str, default: Any = None, **argparse_options: Any) -> Any:
    return field(default=default, metadata={"help": about, **argparse_options})


@dataclass(frozen=True)
class Options:
    """The options of ``pyroflows fit``, each with its help."""

    model: str = _option(
        "a packaged example (see: pyroflows list), or path/to/model.py:function", MISSING
    )
    data: str | None = _option(
        "JSON file with the arguments of the model, see below",
        metavar="FILE",
        type=_file,
    )
    flow: str | None = _option(
        "family of the guide's flow (default: the fit's choice)", choices=list(FLOWS)
    )
    seed: int = _option(
        "seed of all randomness (default: 0)", 0, metavar="N", type=_integer(0, 2**32 - 1)
    )
    time_limit: float | None = _option(
        "time for the fit to aim at (default: none)", metavar="SECONDS", type=_seconds
    )
    draws: int = _option(
        "draws to summarise and save (default: 4000)", 4000, metavar="N", type=_integer(10, 10**8)
    )
    out: str | None = _option(
        "where to save the draws, the picture going beside it as FILE.png; files there are "
        "replaced (default: the model's name, in this folder)",
        metavar="FILE.nc",
    )
    device: str | None = _option(
        "device to fit on, such as cuda or cuda:1 (default: that of the data)", metavar="NAME"
    )
    threads: int = _option(
        "threads of torch (default: 1; more pay only for models with much data)",
        1,
        metavar="N",
        type=_threads,
    )
    checkpoint: str | None = _option(
        "file from which a fit that was killed goes on (default: none)",
        metavar="FILE",
        type=_file,
    )
    quiet: bool = _option(
        "print the verdict only: no progress, no table", False, action="store_true"
    )


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{unstopped(message[1:])}; see {self.prog} --help.")


def make_parser(
    fit: Callable[[Options], int], list_examples: Callable[[], int]
) -> argparse.ArgumentParser:
    """Makes the parser, whose result holds the command to call as ``run`` and what to give it."""
    parser = _Parser(
        prog="pyroflows",
        description="Fit Pyro models with normalizing flows.",
        epilog="To begin: pyroflows fit eight_schools. "
        "How to bring a model and data of your own: pyroflows fit --help.",
        allow_abbrev=False,
    )
    version = f"pyroflows {__version__}"
    parser.add_argument(
        "--version", action="version", version=version, help="print the version and exit"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    fitting = commands.add_parser(
        "fit",
        help="fit a model with a flow guide",
        description="Fit a Pyro model with a flow guide; print its posterior and whether to trust "
        "it;\nsave the draws for ArviZ (netCDF) and a picture of them (PNG).",
        epilog=DATA_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option in fields(Options):
        if option.default is MISSING:
            fitting.add_argument(option.name, **option.metadata)
        else:
            flag = f"--{option.name.replace('_', '-')}"
            fitting.add_argument(flag, default=option.default, **option.metadata)
    fitting.set_defaults(run=lambda **given: fit(Options(**given)))
    about = "list the packaged examples"
    listing = commands.add_parser("list", help=about, description=about, allow_abbrev=False)
    listing.set_defaults(run=list_examples)
    return parser
