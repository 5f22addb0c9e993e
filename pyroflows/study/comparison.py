"""What an experiment has found: errors, bounds, seconds, a table and a picture."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .._checks import list_names
from ..model.density import LogDensity
from ..report.accuracy import Errors, Moments, errors, moments
from .fits import array_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Experiment", "read_reference"]

LABELS = ("method", "objective", "seed")
ERRORS = ("mean_error", "log_sd_error", "quantile_error")
NUMBERS = ("elbo", "khat", "ess", "log_evidence", "log_evidence_error", "seconds")
LEGEND = (
    "mean_error: the largest error of a mean, in standard deviations of the reference; "
    "log_sd_error: of a standard deviation, as a log ratio; quantile_error: of a quantile (5, 25, "
    "50, 75, 95 %); ess: of importance weights, of NUTS the smallest in the bulk, as a share of the "
    "draws; seconds: of the CPU, for the fit."
)
Label = tuple[str, str, int]


class Experiment:
    """The fits of an experiment.

    Args:
        cells: Method, objective and seed of each fit, with its result.
        reference: Moments of the reference, if there is one.
    """

    def __init__(
        self,
        cells: Sequence[tuple[Label, Mapping[str, Any]]],
        reference: Mapping[str, Moments] | None = None,
    ) -> None:
        self.cells, self.reference = list(cells), reference

    def __repr__(self) -> str:
        failed = sum(bool(result["error"]) for _, result in self.cells)
        told = f", {failed} of them failed" if failed else ""
        return f"<Experiment of {len(self.cells)} fits{told}>"

    def __str__(self) -> str:
        table = self.summary().to_string(float_format="{:.3g}".format, na_rep="-")
        failures = [
            f"Failed: {' | '.join(map(str, label))}: {result['error']}."
            for label, result in self.cells
            if result["error"]
        ]
        return "\n".join([table, "", LEGEND, *failures])

    @functools.cached_property
    def table(self) -> pandas.DataFrame:
        """A row for each fit: ``method``, ``objective``, ``seed``; ``mean_error``,
        ``log_sd_error`` and ``quantile_error``, the largest over all scalars, where there is a
        reference; ``elbo``, ``khat``, ``ess``, ``log_evidence`` and ``log_evidence_error``;
        ``seconds``; ``ok``, its own verdict; ``error``, why it failed. NaN where a method has no
        such number."""
        import pandas

        rows = [self._row(label, result) for label, result in self.cells]
        return pandas.DataFrame(rows)

    def _row(self, label: Label, result: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = dict(zip(LABELS, label, strict=True))
        if self.reference is not None:
            row |= dict(zip(ERRORS, self._errors(result), strict=True))
        row |= {name: result.get(name, math.nan) for name in NUMBERS}
        return {**row, "ok": result.get("ok"), "error": result["error"]}

    def _errors(self, result: Mapping[str, Any]) -> Errors:
        if result["error"] or self.reference is None:
            return Errors(math.nan, math.nan, math.nan)
        found = {name: Moments(*map(array_of, parts)) for name, parts in result["moments"].items()}
        return errors(found, self.reference)

    def summary(self) -> pandas.DataFrame:
        """Tabulates the medians over the seeds whose fit did not fail.

        Returns:
            A data frame with a row for each method and objective, in their order.
        """
        columns = [name for name in (*ERRORS, *NUMBERS) if name in self.table]
        groups = self.table.groupby(list(LABELS[:2]), sort=False)
        medians = groups[columns].median()
        medians["failed"] = groups["error"].agg(lambda reasons: sum(map(bool, reasons)))
        return medians

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draws the errors, the ELBO and the seconds of each method, a point for each seed.

        Args:
            path: File to write the figure to, its suffix naming the format; ``None`` writes none.

        Returns:
            The matplotlib figure.

        Raises:
            ValueError: If all fits failed.
        """
        from ..report.comparison_plots import plot_methods

        rows = self.table.to_dict("records")
        names = [" | ".join(filter(None, [row["method"], row["objective"]])) for row in rows]
        columns = {
            name: np.array([row[name] for row in rows], dtype=np.float64)
            for name in (*ERRORS, "elbo", "seconds")
            if name in self.table
        }
        return plot_methods(names, columns, path)


def read_reference(reference: Any, density: LogDensity) -> dict[str, Moments]:
    """Reads the moments of a reference, whatever it comes in.

    Args:
        reference: Draws by site; chains with ``draws`` by site or ``get_samples()``; or ArviZ's
            container.
        density: The log density of the model.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a site of the model is missing, has another shape, or has no two draws.
    """
    arrays = _arrays(reference)
    found = {}
    for site in density.sites:
        values = arrays.get(site.name)
        if values is None:
            raise ValueError(
                f"Expected a reference with draws of all sites of the model; {site.name!r} is not "
                f"among {list_names(list(arrays))}."
            )
        shape = tuple(site.shape)
        if values.ndim != len(shape) + 1 or values.shape[1:] != shape or len(values) < 2:
            sizes = ", ".join(["n", *map(str, shape)])
            raise ValueError(
                f"Expected two reference draws or more of {site.name!r}, of shape ({sizes}); got "
                f"{values.shape}."
            )
        known = values[:, site.active.cpu().numpy()] if shape else values
        if not np.isfinite(known).all():
            raise ValueError(f"Expected finite reference draws of {site.name!r}; got some others.")
        found[site.name] = moments(values)
    return found


def _arrays(reference: Any) -> dict[str, np.ndarray]:
    """Draws by site, without the dimension of chains."""
    if hasattr(reference, "get_samples"):
        reference = reference.get_samples()
    if isinstance(reference, Mapping) and "posterior" not in reference:
        return {
            str(name): array_of(value)
            for name, value in reference.items()
            if isinstance(value, (Tensor, np.ndarray, list))
        }
    draws = getattr(reference, "draws", None)
    if isinstance(draws, Mapping):
        return {name: _without_chains(array_of(value)) for name, value in draws.items()}
    try:
        group = reference["posterior"]
        return {str(name): _without_chains(group[name].values) for name in group.data_vars}
    except (TypeError, KeyError, AttributeError):
        raise TypeError(
            "Expected reference to be draws by site, chains, or ArviZ's container of them; got "
            f"{type(reference).__name__}."
        ) from None


def _without_chains(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *values.shape[2:])
