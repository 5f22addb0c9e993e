"""Pictures of a posterior, on figures of their own: pyplot's global state is not touched."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .._files import check_path, reason, write_whole
from .arviz_bridge import check_mapping
from .statistics import hdi

__all__ = [
    "hardest_pair",
    "make_figure",
    "plain_name",
    "plot_marginals",
    "plot_pair",
    "plot_posterior",
    "written",
]

MOST_MARGINALS = 12
MOST_PAIRED = 1000  # parameters compared in pairs: a matrix of this size squared is held in memory
NOTICEABLE = 0.1  # the least dependence that is called not Gaussian; its noise is 1 / sqrt(draws)
BLUE, RED, GREY = "#2c6fad", "#b5342b", "#555555"


def plot_posterior(draws: Mapping[str, Any], path: str | PathLike[str] | None = None) -> Figure:
    """Draws the marginals of the scalar parameters, and the pair of them that is hardest to fit.

    At most twelve marginals are drawn, some of every variable; a sentence below says of how many.
    The pair is that of :func:`hardest_pair`.

    Args:
        draws: Variable name -> array of shape ``(draws, *shape)``, such as ``posterior.sample()``.
        path: File to write the figure to, its suffix naming the format; ``None`` writes none.

    Returns:
        The matplotlib figure.

    Raises:
        TypeError: If ``draws`` is no mapping.
        ValueError: If there is nothing finite that varies.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> draws = {"mu": rng.normal(size=200), "theta": rng.normal(size=(200, 3))}
        >>> len(plot_posterior(draws).axes)
        5
    """
    names, values = _scalars(draws)
    shown = _choose(names)
    pair = hardest_pair(values)
    columns = 1 if len(shown) == 1 else 2 if len(shown) <= 4 else 3 if len(shown) <= 9 else 4
    rows = -(-len(shown) // columns)
    height = max(4.6, 1.75 * rows + 0.9)
    if pair is None:
        figure = make_figure(4.5 * columns, 0.75 * height)
        _marginals(figure, names, values, shown, columns)
        return written(figure, path)
    figure = make_figure(2.3 * columns + 5.2, height)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[2.3 * columns, 5.2])[0]
    _marginals(left, names, values, shown, columns)
    _pair(right, names, values, pair)
    return written(figure, path)


def plot_marginals(draws: Mapping[str, Any], path: str | PathLike[str] | None = None) -> Figure:
    """Draws a histogram of each scalar parameter, with its mean and its 94 % interval.

    The interval is the shortest that holds 94 % of the draws.

    Args:
        draws: Variable name -> array of shape ``(draws, *shape)``, such as ``posterior.sample()``.
        path: File to write the figure to, its suffix naming the format; ``None`` writes none.

    Returns:
        The matplotlib figure, of twelve marginals at most.

    Raises:
        TypeError: If ``draws`` is no mapping.
        ValueError: If there is nothing finite that varies.

    Example:
        >>> len(plot_marginals({"mu": np.random.default_rng(0).normal(size=200)}).axes)
        1
    """
    names, values = _scalars(draws)
    shown = _choose(names)
    columns = min(4, len(shown))
    figure = make_figure(2.6 * columns + 0.4, 1.9 * -(-len(shown) // columns) + 0.9)
    _marginals(figure, names, values, shown, columns)
    return written(figure, path)


def plot_pair(
    draws: Mapping[str, Any],
    x: str | None = None,
    y: str | None = None,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draws two scalar parameters against each other, by default the two that are hardest to fit.

    A positive parameter whose draws span more than a factor of ten has a logarithmic axis.

    Args:
        draws: Variable name -> array of shape ``(draws, *shape)``, such as ``posterior.sample()``.
        x: Parameter on the horizontal axis, such as ``"theta[0]"``; without ``x`` and ``y`` the
            pair is that of :func:`hardest_pair`.
        y: Parameter on the vertical axis.
        path: File to write the figure to, its suffix naming the format; ``None`` writes none.

    Returns:
        The matplotlib figure.

    Raises:
        TypeError: If ``draws`` is no mapping.
        ValueError: If only one name is given or it is unknown, or if there is no pair to draw.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> draws = {"mu": rng.normal(size=200), "tau": rng.uniform(size=200)}
        >>> plot_pair(draws, "mu", "tau").axes[0].get_xlabel()
        'mu'
    """
    names, values = _scalars(draws)
    if (x is None) != (y is None):
        raise ValueError("Expected both x and y, or neither; got one of them.")
    if x is None or y is None:
        pair = hardest_pair(values)
        if pair is None:
            raise ValueError("Expected draws of at least two scalar parameters; got those of one.")
    else:
        pair = (_index(names, x), _index(names, y))
    figure = make_figure(5.6, 5.0)
    _pair(figure, names, values, pair, chosen=x is None)
    return written(figure, path)


def hardest_pair(values: np.ndarray) -> tuple[int, int] | None:
    r"""Chooses the two columns whose dependence a Gaussian explains least.

    With :math:`z_i` the normal scores of column :math:`i` (the normal quantiles of its ranks) and
    :math:`h(z) = (z^2 - 1) / \sqrt 2`, a Gaussian copula of correlation :math:`\rho` has
    :math:`E[h(z_i) z_j] = 0` and :math:`E[h(z_i) h(z_j)] = \rho^2`. The pair is the one of the
    largest

    .. math::
        E[h(z_i) z_j]^2 + E[z_i h(z_j)]^2 + (E[h(z_i) h(z_j)] - \rho^2)^2,

    the first terms of the Hermite series of the copula that are not Gaussian: a funnel shows in the
    first two, whatever its scale. Where no pair has a root of it above 0.1, the pair of the largest
    :math:`|\rho|` is taken. Columns beyond the thousandth are not looked at.

    Args:
        values: Draws of the scalar parameters, shape ``(draws, parameters)``, none of them
            constant.

    Returns:
        Two column indices, the column with the varying spread first; ``None`` for fewer than two
        columns.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> v, plain = rng.normal(size=(2, 1000))
        >>> hardest_pair(np.stack([plain, v, rng.normal(size=1000) * np.exp(v)], axis=1))
        (2, 1)
    """
    values = values[:, :MOST_PAIRED]
    draws, parameters = values.shape
    if parameters < 2:
        return None
    from scipy.special import ndtri  # here, because its import adds a filter of warnings

    ranks = np.argsort(np.argsort(values, axis=0, kind="stable"), axis=0)
    scores = ndtri((ranks + 0.5) / draws)
    z = scores / np.sqrt(np.mean(scores**2, axis=0))  # so that a column's own correlation is 1
    h = (z**2 - 1) / 2**0.5
    rho, skew, kurtosis = z.T @ z / draws, h.T @ z / draws, h.T @ h / draws
    excess = skew**2 + skew.T**2 + (kurtosis - rho**2) ** 2
    # One quantity under two names (mirror images in a correlation matrix) is no pair.
    other = (np.abs(rho) < 0.99999) & ~np.eye(parameters, dtype=bool)
    if not other.any():
        return None
    if excess[other].max() < NOTICEABLE**2:
        excess = np.abs(rho)
    best = int(np.where(other, excess, -1.0).argmax())
    i, j = divmod(best, parameters)
    return (i, j) if abs(skew[i, j]) >= abs(skew[j, i]) else (j, i)


def _scalars(draws: Mapping[str, Any]) -> tuple[list[str], np.ndarray]:
    """Returns names and draws (in columns) of the scalar parameters that are finite and vary."""
    check_mapping("draws", draws)
    names: list[str] = []
    columns: list[np.ndarray] = []
    for variable, value in draws.items():
        array = _array(variable, value)
        flat = array.reshape(len(array), -1).T
        for index, column in zip(np.ndindex(array.shape[1:]), flat, strict=True):
            if np.isfinite(column).all() and column.min() < column.max():
                entry = f"[{', '.join(map(str, index))}]" if index else ""
                names.append(f"{variable}{entry}")
                columns.append(column)
    if not columns:
        raise ValueError(
            "There is nothing to draw: no scalar parameter has draws that are finite and vary."
        )
    return names, np.stack(columns, axis=1)


def _array(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype.kind not in "biuf" or array.ndim == 0 or not len(array):
        raise ValueError(
            f"Expected draws of {name!r} to be numbers of shape (draws, *shape); got "
            f"{array.dtype} of shape {array.shape}."
        )
    return array.astype(np.float64)


def _choose(names: list[str]) -> list[int]:
    """Chooses the first entries of every variable, so that a long vector leaves room for others."""
    seen: dict[str, int] = {}
    place = []
    for name in names:
        site = name.partition("[")[0]
        place.append(seen.get(site, 0))
        seen[site] = place[-1] + 1
    return sorted(sorted(range(len(names)), key=lambda i: (place[i], i))[:MOST_MARGINALS])


def _index(names: list[str], name: str) -> int:
    if name not in names:
        raise ValueError(
            f"There is no parameter {name!r} to draw; there are {', '.join(names[:30])}."
        )
    return names.index(name)


def make_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def written(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    if path is not None:
        name = check_path("path", path)
        suffix = os.path.splitext(name)[1].lstrip(".").lower() or "png"
        known = figure.canvas.get_supported_filetypes()
        if suffix not in known:
            raise ValueError(
                f"Expected path to end in one of {', '.join(sorted(known))}; got {name!r}."
            )
        content = io.BytesIO()
        figure.savefig(content, dpi=150, format=suffix)
        try:
            write_whole(name, content.getvalue())
        except OSError as error:
            raise ValueError(f"Cannot write {name!r}: {reason(error)}.") from error
    return figure


def _marginals(
    figure: FigureBase, names: list[str], values: np.ndarray, shown: list[int], columns: int
) -> None:
    grid = figure.subplots(-(-len(shown) // columns), columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    for axes, i in zip(grid.flat, shown, strict=False):
        _marginal(axes, names[i], values[:, i])
    figure.suptitle("Marginals, with mean and 94 % HDI", fontsize=12)
    if len(shown) < len(names):
        figure.supxlabel(
            f"{len(shown)} of {len(names)} scalar parameters are shown.", fontsize=9, color=GREY
        )


def _marginal(axes: Axes, name: str, column: np.ndarray) -> None:
    # Heavy tails would squeeze the bulk of the histogram into one bar.
    low, high = _range(column)
    inside = column[(column >= low) & (column <= high)]
    axes.hist(inside, bins=40, range=(low, high), histtype="stepfilled", color=BLUE, alpha=0.45)
    [[left, right]] = hdi(column[:, None])
    foot = -0.04 * axes.get_ylim()[1]
    axes.plot([left, right], [foot, foot], color=RED, linewidth=2.5, solid_capstyle="butt")
    axes.plot([column.mean()], [foot], "o", color=RED, markersize=4.5)
    axes.set_ylim(2 * foot, None)
    axes.set_title(plain_name(name), fontsize=10)
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.spines[["left", "right", "top"]].set_visible(False)


def _pair(
    figure: FigureBase,
    names: list[str],
    values: np.ndarray,
    pair: tuple[int, int],
    chosen: bool = True,
) -> None:
    axes = figure.subplots()
    x, y = values[:, pair[0]], values[:, pair[1]]
    alpha = min(0.6, 40 / len(x) ** 0.6)
    axes.plot(x, y, ".", color=BLUE, alpha=alpha, markersize=4, markeredgewidth=0)
    for name, column, axis, scale, limits in (
        (names[pair[0]], x, axes.xaxis, axes.set_xscale, axes.set_xlim),
        (names[pair[1]], y, axes.yaxis, axes.set_yscale, axes.set_ylim),
    ):
        logarithmic = column.min() > 0 and np.quantile(column, 0.99) > 10 * np.quantile(
            column, 0.01
        )
        axis.set_label_text(plain_name(name) + (" (log scale)" if logarithmic else ""), fontsize=11)
        if logarithmic:
            scale("log")
            limits(*np.exp(_range(np.log(column))))
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        else:
            limits(*_range(column))
    axes.tick_params(labelsize=9)
    axes.spines[["right", "top"]].set_visible(False)
    if chosen:
        figure.suptitle("Hardest pair", fontsize=12)


def _range(column: np.ndarray) -> tuple[float, float]:
    """Where the draws are, but for the last 0.2 % on either side, with a margin."""
    low, high = np.quantile(column, [0.002, 0.998])
    margin = 0.05 * (high - low) or 0.5 * float(column.max() - column.min())
    return max(float(low) - margin, float(column.min())), min(
        float(high) + margin, float(column.max())
    )


def plain_name(name: str) -> str:
    """The name as it is: a dollar would start a formula."""
    return name.replace("$", r"\$")
