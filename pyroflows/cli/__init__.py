"""The command line: fits a Pyro model, says whether to trust the posterior, and saves it.

Heavy modules are imported where they are needed, so that ``--help`` and a mistyped option answer
at once.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .._files import check_writable, reason
from .errors import UserError, blame, describe, sentence, shown
from .options import FLOWS, Options, make_parser
from .problem import Problem, load_problem

__all__ = ["FLOWS", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments after the program's name; ``None`` takes those of the process.

    Returns:
        The exit code: 0, 2 for a mistake in the input or an output that cannot be written, told in
        a sentence on stderr, or 130 after Ctrl-C.

    Example:
        >>> main(["fit", "no_such_example"])
        2
    """
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"pyroflows: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Python flushes it once more
        return 0
    except OSError as error:
        print(f"pyroflows: Cannot write the output: {reason(error)}.", file=sys.stderr)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 2
    except KeyboardInterrupt:
        print("pyroflows: Interrupted.", file=sys.stderr)
        return 130


def _run(argv: Sequence[str] | None) -> int:
    try:
        given = vars(make_parser(_fit, _list).parse_args(argv))
    except SystemExit as stop:  # argparse, after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    run = given.pop("run")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        # ArviZ 0.23 announces its version 1 to everyone who imports it.
        warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
        # The fit itself says which site is not finite.
        warnings.filterwarnings("ignore", message="Encountered (NaN|[+]?inf)")
        try:
            code: int = run(**given)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as stop:
            raise UserError(f"The model ended the program by {describe(stop)}.") from stop
    return code


def _list() -> int:
    from ..examples import EXAMPLES

    width = max(map(len, EXAMPLES))
    for name, example in EXAMPLES.items():
        print(f"{name:{width}}  {example.description}")
    return 0


def _fit(options: Options) -> int:
    from ..train import processes

    # Under torchrun every process fits; the main one tells and saves.
    with processes.initialize_from_environment() as device:
        import torch

        # Everything that can be wrong with the input is looked at before the fit takes minutes.
        problem = load_problem(options.model, options.data)
        out = _check_output(options, f"{problem.name}.nc")
        device = _check_device(device if options.device is None else options.device)
        torch.set_num_threads(options.threads)
        posterior = _posterior(problem, options, device)
        if processes.is_main():
            _tell(problem.name, posterior, out, options)
        return 130 if posterior.interrupted and processes.is_main() else 0


def _posterior(problem: Problem, options: Options, device: str | None) -> Any:
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
            device=device,
            checkpoint=options.checkpoint,
        )
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a model may raise anything
        told = blame(problem.source, error)
        if told is None:
            raise  # a mistake of this package: its traceback is of use
        raise UserError(told) from error


def _tell(name: str, posterior: Any, out: Path, options: Options) -> None:
    """Saves the posterior with a picture, and prints it; all of them show the same draws."""
    container = _container(posterior, out, options.draws)
    draws = {str(k): value.values[0] for k, value in container["posterior"].data_vars.items()}
    failures = list(_save(container, draws, out))
    if options.quiet:
        print(posterior.verdict)
    else:
        print("\n".join(_report(name, posterior, draws)))
    if posterior.interrupted:
        print(f"Interrupted: this is the best posterior found in {posterior.seconds:.1f} s.")
    if failures:
        raise UserError(" ".join(failures))
    if not options.quiet:
        print(f"Saved {shown(out)} and {shown(out.with_suffix('.png'))}.")


def _container(posterior: Any, out: Path, draws: int) -> Any:
    try:
        return posterior.to_arviz(draws=draws)
    except Exception as error:  # of any type: the model makes predictions here
        kept = out.with_suffix(".pt")
        posterior.save(kept)
        told = f"Could not put the posterior into ArviZ's form: {describe(error)}"
        raise UserError(
            f"{told}. It is saved as {shown(kept)} for pyroflows.load_posterior."
        ) from error


def _report(name: str, posterior: Any, draws: Mapping[str, Any]) -> Iterator[str]:
    from ..report.statistics import summary

    verdict = posterior.verdict
    yield f"Posterior of {name}:\n"
    yield _format(summary(draws, circular=posterior.density.centres))
    yield f"\n{verdict}\n"
    yield from _findings(verdict)
    error = f"Monte Carlo error {verdict.log_evidence_error:.1g}"
    figures = {
        "ELBO": f"{verdict.elbo:.2f}",
        "log evidence": f"{verdict.log_evidence:.3f}, {error}",
        "k-hat": f"{verdict.khat:.2f}",
        "importance ESS": f"{verdict.ess:.1%} of {verdict.draws} draws",
        "found by": posterior.name or "-",
        "seconds": f"{posterior.seconds:.1f}",
    }
    for label, value in figures.items():
        yield f"{label:<16}{value}"


def _findings(verdict: Any) -> Iterator[str]:
    """A line for each check of the verdict: held or failed by what, or why it was not judged."""
    for finding in verdict.findings:
        name = finding.name if finding.block is None else f"{finding.name} of {finding.block}"
        judged = finding.status != "not judged" and finding.value is not None
        told = f"{finding.value:.3g} (limit {finding.limit:g})" if judged else finding.sentence
        yield f"{name:<15} {finding.status}: {told}"


def _format(table: Any) -> str:
    """The table, with as many decimals in each row as its standard deviation deserves."""

    def rounded(row: Any) -> Any:
        sd = float(row["sd"])
        decimals = min(max(2 - math.floor(math.log10(sd)), 0), 12) if 0 < sd < math.inf else 3
        return row.map(f"{{:.{decimals}f}}".format)

    return str(table.apply(rounded, axis=1).to_string())


def _save(container: Any, draws: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Writes both files, and says of each that cannot be written where it is instead."""
    from ..report.arviz_bridge import save
    from ..report.plots import plot_posterior

    writers: dict[Path, Callable[[Path], Any]] = {
        out: partial(save, container),
        out.with_suffix(".png"): partial(plot_posterior, draws),
    }
    for path, write in writers.items():
        try:
            write(path)
        except ValueError as error:
            lost = isinstance(error.__cause__, OSError)
            yield f"{sentence(error)} {_save_elsewhere(write, path.name) if lost else ''}".rstrip()


def _save_elsewhere(write: Callable[[Path], Any], name: str) -> str:
    """Writes a file to the folder of temporary files, so that no fit is lost to a full disk."""
    folder = Path(tempfile.gettempdir())
    try:
        path = Path(tempfile.mkdtemp(prefix="pyroflows-")) / name
        write(path)
    except (OSError, ValueError):
        return f"It could not be written to {folder} either."
    return f"It is saved as {shown(path)} instead."


def _check_output(options: Options, default: str) -> Path:
    text = default if options.out is None else options.out
    path = Path(text)
    if path.suffix != ".nc":
        raise UserError(f"Expected --out to name a file that ends in .nc; got {text!r}.")
    files = path, path.with_suffix(".png")
    for file in files:
        _check_writable(file)
    checkpoint = options.checkpoint
    if checkpoint is not None:
        _check_writable(checkpoint, "--checkpoint ")
    try:
        same = checkpoint is not None and Path(checkpoint).resolve() in [f.resolve() for f in files]
    except ValueError:  # of a name with a null character, which the fit refuses
        same = False
    if same:
        expected = "Expected --checkpoint to name another file than --out and its picture"
        raise UserError(f"{expected}; got {checkpoint!r} for both.")
    return path


def _check_writable(file: str | Path, option: str = "") -> None:
    try:
        check_writable(file)
    except OSError as error:
        raise UserError(f"Cannot write {option}{shown(file)}: {reason(error)}.") from error


def _check_device(name: str | None) -> str | None:
    from .._checks import check_device

    try:
        return None if name is None else check_device("--device", name)
    except ValueError as error:
        raise UserError(sentence(error)) from error


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"pyroflows: {sentence(message)}", file=sys.stderr)
