"""The command line: fits a Pyro model, says whether to trust the posterior, and saves it.

Heavy modules are imported where they are needed, so that ``--help`` and a mistyped option answer
at once.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, describe, line_in, sentence
from .options import FLOWS, Options, make_parser
from .problem import Problem, load_problem

__all__ = ["FLOWS", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments after the program's name; ``None`` takes those of the process.

    Returns:
        The exit code: 0, 2 for a mistake in the input, told in a sentence on stderr, or 130 after
        Ctrl-C.

    Example:
        >>> main(["fit", "no_such_example"])
        2
    """
    try:
        given = vars(make_parser(_fit, _list).parse_args(argv))
        run = given.pop("run")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # ArviZ 0.23 announces its version 1 to everyone who imports it.
            warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
            # The fit itself says which site is not finite.
            warnings.filterwarnings("ignore", message="Encountered (NaN|[+]?inf)")
            code: int = run(**given)
            return code
    except SystemExit as stop:  # argparse, after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except UserError as error:
        print(f"pyroflows: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyroflows: Interrupted.", file=sys.stderr)
        return 130


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
        out = _check_output(options.out or f"{problem.name}.nc", options.checkpoint)
        device = _check_device(options.device or device)
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
    except Exception as error:
        line = line_in(problem.source, error)
        if line is not None:
            where = f"{problem.source}, line {line}"
            raise UserError(f"The model raised {describe(error)} at {where}.") from error
        if isinstance(error, (ValueError, TypeError)):
            raise UserError(sentence(error)) from error
        site = _site_at_fault(problem)
        if site is not None:
            raise UserError(site) from error
        raise  # a mistake of this package: its traceback is of use


def _tell(name: str, posterior: Any, out: Path, options: Options) -> None:
    """Prints the posterior, and saves it with a picture; all of them show the same draws."""
    container = posterior.to_arviz(draws=options.draws)
    draws = {str(k): value.values[0] for k, value in container["posterior"].data_vars.items()}
    if options.quiet:
        print(posterior.verdict)
    else:
        print("\n".join(_report(name, posterior, draws)))
    if posterior.interrupted:
        print(f"Interrupted: this is the best posterior found in {posterior.seconds:.1f} s.")
    _save(container, draws, out)
    if not options.quiet:
        print(f"Saved {out} and {out.with_suffix('.png')}.")


def _report(name: str, posterior: Any, draws: Mapping[str, Any]) -> Iterator[str]:
    from ..report.arviz_bridge import summary

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


def _save(container: Any, draws: Mapping[str, Any], out: Path) -> None:
    from ..report.arviz_bridge import save
    from ..report.plots import plot_posterior

    try:
        save(container, out)
        plot_posterior(draws, out.with_suffix(".png"))
    except (OSError, ValueError) as error:
        told = f"Could not write {out} and the picture beside it"
        raise UserError(f"{told}: {sentence(error)}") from error


def _check_output(text: str, checkpoint: str | None) -> Path:
    from .._files import check_writable

    path = Path(text)
    if path.suffix != ".nc":
        raise UserError(f"Expected --out to name a file that ends in .nc; got {text!r}.")
    files = path, path.with_suffix(".png")
    for file in files:
        try:
            check_writable(file)
        except OSError as error:
            raise UserError(f"Cannot write {file}: {error.strerror}.") from error
    if checkpoint is not None and Path(checkpoint).resolve() in [file.resolve() for file in files]:
        expected = "Expected --checkpoint to name another file than --out and its picture"
        raise UserError(f"{expected}; got {checkpoint!r} for both.")
    return path


def _check_device(name: str | None) -> str | None:
    from .._checks import check_device

    try:
        return None if name is None else check_device("--device", name)
    except ValueError as error:
        raise UserError(sentence(error)) from error


def _site_at_fault(problem: Problem) -> str | None:
    """A sentence on the first site whose value its distribution cannot score."""
    from pyro import poutine

    trace = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs)
    site: Any
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        fn, value = site["fn"], site["value"]
        try:
            fn.log_prob(value)
        except Exception as error:  # of any type: the distribution may be the user's own
            return (
                f"The site {name!r} holds a value of shape {tuple(value.shape)} that its "
                f"distribution, of shape {tuple(fn.shape())}, cannot score: {sentence(error)}"
            )
    return None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"pyroflows: {sentence(message)}", file=sys.stderr)
