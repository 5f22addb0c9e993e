"""Pictures of ranks that should be uniform."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import BLUE, GREY, RED, make_figure, plain_name, written
from .uniformity import ecdf_band

__all__ = ["plot_ranks"]

MOST_SHOWN = 11
COLUMNS = 4
#: Corrected p-values below it are drawn in red.
FLAGGED = 0.01


def plot_ranks(
    ranks: Mapping[str, np.ndarray],
    p_values: np.ndarray,
    joint: tuple[np.ndarray, float],
    draws: int,
    title: str = "",
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draws the empirical distribution function of ranks less that of uniform ones, a panel each.

    The band holds the whole line in 95 % of the cases if the ranks are uniform. A line that leaves
    it shows a posterior that lies too high by an arch, one that lies too low by a trough, one that
    is too narrow by a rise and then a trough, and one that is too wide by a trough and then a rise.

    Args:
        ranks: Name -> ranks from 0 to ``draws``, of shape ``(n,)``.
        p_values: Their smallest p-values, of shape ``(names,)``, by which the panels are chosen.
        joint: The ranks of all parameters together, and their p-value.
        draws: The largest rank.
        title: The title of the figure.
        path: File to write the figure to, its suffix naming the format; ``None`` writes none.

    Returns:
        The matplotlib figure.

    Example:
        >>> ranks = np.random.default_rng(0).integers(100, size=50)
        >>> len(plot_ranks({"mu": ranks}, np.ones(1), (ranks, 1.0), draws=99).axes)
        2
    """
    names = list(ranks)
    shown = sorted(np.argsort(p_values, kind="stable")[:MOST_SHOWN].tolist())
    panels = [(names[i], ranks[names[i]], float(p_values[i])) for i in shown]
    panels.append(("all together (TARP)", *joint))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = make_figure(2.6 * columns + 0.4, 2.1 * rows + 0.9)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    band = ecdf_band(len(joint[0]), np.full(draws + 1, 1 / (draws + 1)))
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (name, column, p_value) in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, name, column, p_value, band)
    figure.suptitle(plain_name(title), fontsize=10)
    left_out = len(names) - len(shown)
    note = f" {left_out} more scalars with larger p-values are not shown." if left_out else ""
    figure.supxlabel(f"rank among draws, as a share.{note}", fontsize=9, color=GREY)
    figure.supylabel("share of ranks up to it, less its own", fontsize=9, color=GREY)
    return written(figure, path)


def _draw_panel(axes: Axes, name: str, ranks: np.ndarray, p_value: float, band: np.ndarray) -> None:
    count = len(band)
    at = np.arange(1, count + 1) / count
    reached = np.cumsum(np.bincount(ranks, minlength=count)) / len(ranks)
    axes.fill_between(at, band[:, 0] - at, band[:, 1] - at, color=GREY, alpha=0.2, linewidth=0)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.plot(at, reached - at, color=RED if p_value < FLAGGED else BLUE, linewidth=1.6)
    axes.set_title(f"{plain_name(name)}   p = {p_value:.2g}", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["right", "top"]].set_visible(False)
