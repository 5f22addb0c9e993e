"""Pictures of methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .plots import BLUE, GREY, RED, make_figure, plain_name, written

__all__ = ["plot_methods"]

TITLES = {
    "mean_error": "error of a mean (sd)",
    "log_sd_error": "error of an sd (log ratio)",
    "quantile_error": "error of a quantile (sd)",
    "elbo": "ELBO below the best (nats)",
    "seconds": "CPU seconds",
}
#: An error below it is small beside the width of the posterior.
SMALL = 0.1
#: The least value that a logarithmic axis shows.
FLOOR = 1e-3


def plot_methods(
    names: Sequence[str],
    columns: Mapping[str, np.ndarray],
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draws a panel for each number, with a row for each method and a point for each of its fits.

    Args:
        names: The method of each fit; fits of one name share a row.
        columns: For some of ``mean_error``, ``log_sd_error``, ``quantile_error``, ``elbo`` and
            ``seconds`` the value of each fit, NaN where there is none.
        path: File to write the figure to, its suffix naming the format; ``None`` writes none.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: If there is no finite number.

    Example:
        >>> figure = plot_methods(["a", "b"], {"mean_error": np.array([0.1, 0.2])})
        >>> figure.axes[0].get_title()
        'error of a mean (sd)'
    """
    shown = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    if not shown:
        raise ValueError("There is nothing to draw: no fit has a finite number.")
    rows = list(dict.fromkeys(names))
    figure = make_figure(2.4 * len(shown) + 2.4, 0.35 * len(rows) + 1.2)
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    heights = np.array([rows.index(name) for name in names])
    for axes, (name, values) in zip(panels, shown.items(), strict=True):
        _draw_panel(axes, name, values, heights)
    panels[0].set_yticks(range(len(rows)), [plain_name(row) for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    return written(figure, path)


def _draw_panel(axes: Axes, name: str, values: np.ndarray, heights: np.ndarray) -> None:
    if name == "elbo":
        values = np.nanmax(values[np.isfinite(values)]) - values
    at = np.clip(values, FLOOR, None)
    axes.plot(at, heights, "o", color=BLUE, alpha=0.6, markersize=6, markeredgewidth=0)
    for height in np.unique(heights):
        row = at[(heights == height) & np.isfinite(at)]
        if len(row):
            axes.plot([np.median(row)], [height], "|", color=RED, markersize=14)
    if name.endswith("_error"):
        axes.axvline(SMALL, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(TITLES[name], fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["right", "top"]].set_visible(False)
