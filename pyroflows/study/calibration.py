"""What a calibration has found: ranks, p-values, a table, pictures."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import count as counted
from .._wording import unstopped
from ..posterior.subject import scalar_names
from ..report import arviz_bridge as arviz
from ..report.uniformity import (
    asymmetry_p_value,
    central_coverage,
    coverage_p_value,
    holm,
    uniformity_p_value,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["LEVEL", "Calibration"]

#: Below this corrected p-value a method is not calibrated.
LEVEL = 0.01
#: Levels of central intervals whose coverage is tabulated.
INTERVALS = (0.5, 0.9)
# Smaller p-values are told by this bound.
SMALLEST_TOLD = 1e-6


@dataclass(frozen=True, eq=False)
class Calibration:
    """The ranks of parameters among draws of the posteriors of the data that they made.

    Attributes:
        ranks: For each site the ranks, of shape ``(fits, *site_shape)``, from 0 to ``draws``; -1
            for entries that a mask switches off.
        parameters: For each site the parameters that made the data, of the same shape.
        posterior_draws: For each site one draw of each posterior, of the same shape; over data
            sets these are draws of the prior if the fit is calibrated.
        tarp_ranks: The rank of their distance from a reference point among the distances of the
            draws, of shape ``(fits,)``.
        draws: How many draws of each posterior.
        fit: What was checked.
        failures: For each data set whose fit failed the reason.
        seconds: Wall-clock time of each fit, of shape ``(fits,)``.
        trusted: For each fit whether its verdict trusts it; ``None`` where it has none.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> ranks = {"x": rng.integers(200, size=100)}
        >>> x = {"x": rng.normal(size=100)}
        >>> calibration = Calibration(ranks, x, x, ranks["x"], 199)
        >>> calibration.ok
        True
        >>> list(calibration.summary().columns)
        ['sbc', 'vsbc', 'coverage', 'mean_rank', 'inside_50%', 'inside_90%']
    """

    ranks: Mapping[str, np.ndarray]
    parameters: Mapping[str, np.ndarray]
    posterior_draws: Mapping[str, np.ndarray]
    tarp_ranks: np.ndarray
    draws: int
    fit: str = ""
    failures: Mapping[int, str] = field(default_factory=dict)
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    trusted: Sequence[bool | None] = ()

    def __repr__(self) -> str:
        return f"<Calibration of {self.fit or 'a fit'}. {self.sentence}>"

    def __str__(self) -> str:
        lines = [self.sentence, "", self.summary().round(4).to_string(), ""]
        lines.append(f"All parameters together: tarp {_tell_p(self.tarp)}.")
        lines.append(
            "sbc, vsbc and coverage are p-values, corrected for the number of parameters; a rank "
            "is relative to its largest value; inside_50% is the share of parameters inside of the "
            "central interval."
        )
        verdicts = [trusted for trusted in self.trusted if trusted is not None]
        if verdicts:
            lines.append(f"The verdict trusts {sum(verdicts)} of {len(verdicts)} posteriors.")
        if self.failures:
            first = min(self.failures)
            lines.append(
                f"Left out, because their fit failed: data sets "
                f"{', '.join(map(str, self.failures))}. The first: "
                f"{unstopped(self.failures[first])}."
            )
        return "\n".join(lines)

    @property
    def sentence(self) -> str:
        """The result in a sentence."""
        return f"{'No fault seen' if self.ok else 'Not calibrated'}: {self.reason}"

    @property
    def fits(self) -> int:
        """How many data sets were fitted."""
        return len(self.tarp_ranks)

    @functools.cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The ranks of each scalar that is not masked and not the same in all data sets."""
        found: dict[str, np.ndarray] = {}
        for site, ranks in self.ranks.items():
            rows = ranks.reshape(self.fits, -1).T
            values = np.asarray(self.parameters[site]).reshape(self.fits, -1).T
            names = scalar_names(site, ranks.shape[1:])
            for name, column, made in zip(names, rows, values, strict=True):
                if column.min() >= 0 and (self.fits == 1 or np.ptp(made) != 0):
                    found[name] = column
        return found

    @functools.cached_property
    def p_values(self) -> dict[str, np.ndarray]:
        """For each of the statistics ``"sbc"``, ``"vsbc"`` and ``"coverage"`` the p-value of each
        scalar, in the order of :attr:`columns`, corrected for their number by Holm's procedure."""
        count = self.draws + 1
        even = np.full(count, 1 / count)
        columns = list(self.columns.values())
        return {
            "sbc": holm([uniformity_p_value(ranks, even) for ranks in columns]),
            "vsbc": holm([asymmetry_p_value(ranks, count) for ranks in columns]),
            "coverage": holm([coverage_p_value(ranks, count) for ranks in columns]),
        }

    @functools.cached_property
    def tarp(self) -> float:
        """The p-value for all parameters together."""
        count = self.draws + 1
        return uniformity_p_value(self.tarp_ranks, np.full(count, 1 / count))

    @property
    def p_value(self) -> float:
        """The smallest p-value, corrected for the number of parameters and of statistics."""
        smallest = [values.min(initial=1.0) for values in self.p_values.values()]
        return float(min(1.0, (len(smallest) + 1) * min(*smallest, self.tarp)))

    @property
    def ok(self) -> bool:
        """Whether no fault is seen: whether :attr:`p_value` is at least 0.01."""
        return self.p_value >= LEVEL

    @property
    def reason(self) -> str:
        """What is wrong, by the statistic that says most; or the smallest p-value."""
        if self.ok:
            return (
                f"the smallest p-value of {counted(self.fits, 'data set')}, corrected for the number "
                f"of p-values, is {self.p_value:.2g}."
            )
        kind, name = self._worst
        told = f"({kind} {_tell_p(self._p_of(kind, name))})"
        if kind == "tarp":
            return f"the posterior of all parameters together is wrong {told}."
        # In units of the largest rank, from the middle.
        offsets = self.columns[name] / self.draws - 0.5
        if kind == "coverage":
            narrow = np.abs(offsets).mean() > np.abs(np.linspace(-0.5, 0.5, self.draws + 1)).mean()
            return f"the posterior of {name} is too {'narrow' if narrow else 'wide'} {told}."
        if kind == "vsbc":
            return f"the posterior of {name} lies too {_side(offsets)} {told}."
        return f"the ranks of {name} are not uniform {told}."

    @property
    def _worst(self) -> tuple[str, str]:
        """The statistic, and its scalar, of the smallest p-value; one that tells of a certain fault
        comes before one that tells of any."""
        limit = LEVEL / (len(self.p_values) + 1)
        for kinds in (("coverage", "vsbc"), ("sbc",)):
            values, kind = min((self.p_values[kind].min(initial=1.0), kind) for kind in kinds)
            if values < limit:
                return kind, list(self.columns)[int(self.p_values[kind].argmin())]
        return "tarp", ""

    def _p_of(self, kind: str, name: str) -> float:
        if kind == "tarp":
            return self.tarp
        return float(self.p_values[kind][list(self.columns).index(name)])

    def summary(self) -> pandas.DataFrame:
        """Tabulates the p-values of each scalar.

        Returns:
            A data frame, one row a scalar. ``sbc``, ``vsbc`` and ``coverage`` are p-values,
            corrected for the number of scalars; ``mean_rank`` is relative to the largest rank, above
            one half where the draws lie too low; ``inside_50%`` and ``inside_90%`` are the shares
            of parameters inside of the central interval.
        """
        import pandas

        count = self.draws + 1
        columns: dict[str, Any] = dict(self.p_values)
        ranks = list(self.columns.values())
        columns["mean_rank"] = [column.mean() / self.draws for column in ranks]
        for level in INTERVALS:
            inside = [central_coverage(column, count, level)[0] for column in ranks]
            columns[f"inside_{level:.0%}"] = inside
        return pandas.DataFrame(columns, index=list(self.columns))

    def to_arviz(self) -> Any:
        """Returns the ranks in ArviZ's container.

        The group ``"prior_sbc"`` is for ``plot_ecdf_pit`` of ArviZ 1.x; its "draws" are the data
        sets. A rank becomes a number in the unit interval, a random one of those that it stands
        for, so that the numbers are uniform and without ties if the fit is calibrated. With ArviZ
        0.x, ``az.plot_ecdf(values.ravel(), cdf=lambda x: x, difference=True)`` draws them. The
        group ``"averaged_posterior"`` is for ``plot_rank``: its first chain are the parameters that made
        the data, and its second one draw of each posterior, which have the same distribution.

        Returns:
            An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x).
        """
        rng = np.random.default_rng(0)
        numbers: dict[str, np.ndarray] = {}
        for name, ranks in self.ranks.items():
            inside = (ranks + rng.uniform(size=ranks.shape)) / (self.draws + 1)
            numbers[name] = np.where(ranks >= 0, inside, np.nan)[None]
        notes = {
            "inference_library": "pyroflows",
            "calibration": self.sentence,
            "p_value": self.p_value,
            "tarp": self.tarp,
        }
        averaged = {
            name: np.stack([self.parameters[name], self.posterior_draws[name]])
            for name in self.ranks
        }
        groups = {"prior_sbc": numbers, "averaged_posterior": averaged}
        return arviz.to_inference_data(groups, attrs=notes)

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draws how far the ranks of each scalar are from uniform, with the band in which all of
        them stay in 95 % of calibrations, and the coverage for all parameters together.

        At most eleven scalars are drawn, those of the smallest p-values.

        Args:
            path: File to write the figure to, its suffix naming the format; ``None`` writes none.

        Returns:
            The matplotlib figure.
        """
        from ..report.calibration_plots import plot_ranks

        smallest = np.min(list(self.p_values.values()), axis=0)
        return plot_ranks(
            self.columns, smallest, (self.tarp_ranks, self.tarp), self.draws, self.sentence, path
        )


def _side(offsets: np.ndarray) -> str:
    return "low" if offsets.mean() > 0 else "high"


def _tell_p(p_value: float) -> str:
    return f"p = {p_value:.2g}" if p_value >= SMALLEST_TOLD else f"p < {SMALLEST_TOLD:g}"
