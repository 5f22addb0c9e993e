"""Tables of draws and diagnostics of chains, as ArviZ computes them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from .arviz_bridge import (
    SAMPLE_DIMS,
    check_labels,
    check_mapping,
    has_datatree,
    import_arviz,
    make_dataset,
    storable_name,
)

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["deviations", "diagnostics", "hdi", "summary"]

HDI_PROBABILITY = 0.94


def summary(
    draws: Mapping[str, Any],
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Any] | None = None,
    circular: Collection[str] = (),
) -> pandas.DataFrame:
    r"""Tabulates mean, standard deviation and 94 % interval of every scalar parameter.

    Args:
        draws: Variable name -> equally weighted draws of shape ``(draws, *shape)``.
        dims: Variable name -> names of the dimensions of ``shape``, as in ``to_inference_data``.
        coords: Dimension name -> labels, as in ``to_inference_data``.
        circular: Names of variables that are angles in radians. Their mean is the mean direction,
            their ``sd`` the circular one, :math:`\sqrt{-2 \log R}` with the length :math:`R` of the
            mean of the points on the unit circle, and their interval may run from a larger number
            to a smaller one, across :math:`\pm\pi`.

    Returns:
        A data frame with a row for each scalar, labelled as ArviZ does (``mu``, ``theta[0]``,
        ``theta[1, 2]``, ``theta[Choate]`` where ``coords`` has labels), and the columns ``mean``,
        ``sd`` (of the sample, with the divisor ``draws - 1``), ``hdi_3%`` and ``hdi_97%`` (the ends
        of the shortest interval that holds 94 % of the draws, as ArviZ computes it). All are NaN
        where the draws are.

    Raises:
        ValueError: If a variable has fewer than two draws, or if ``dims`` or ``coords`` do not fit
            the arrays.
        TypeError: If draws are not real numbers, or if ``dims`` gives a string for a sequence.

    Example:
        >>> import numpy as np
        >>> from pyroflows.report.statistics import summary
        >>> table = summary({"mu": np.arange(101.0), "theta": np.zeros((101, 2))})
        >>> list(table.index), float(table.loc["mu", "mean"])
        (['mu', 'theta[0]', 'theta[1]'], 50.0)
    """
    import pandas

    check_mapping("draws", draws)
    dims, coords = check_labels(dims, coords)
    with_chain = {name: np.asarray(values)[None] for name, values in draws.items()}
    dataset = make_dataset("posterior", with_chain, dims, coords)
    labels: list[str] = []
    rows = [np.empty((0, 4))]
    angles = {storable_name(name) for name in circular}
    for name, variable in dataset.data_vars.items():
        if variable.sizes["draw"] < 2:
            raise ValueError(
                f"Expected at least 2 draws of {name!r}; got {variable.sizes['draw']}."
            )
        labels.extend(_labels(str(name), variable))
        statistics = _circular_statistics if name in angles else _statistics
        rows.append(statistics(variable.values[0]))
    columns = ["mean", "sd", "hdi_3%", "hdi_97%"]
    return pandas.DataFrame(np.concatenate(rows), index=labels, columns=columns)


def hdi(columns: np.ndarray, probability: float = HDI_PROBABILITY) -> np.ndarray:
    """Finds the shortest interval that holds a share of the draws, column by column.

    Args:
        columns: Draws of shape ``(draws, columns)``, at least two.
        probability: The share of the draws that the interval holds.

    Returns:
        Lower and upper ends, of shape ``(columns, 2)``.

    Example:
        >>> import numpy as np
        >>> from pyroflows.report.statistics import hdi
        >>> hdi(np.arange(101.0)[:, None]).tolist()
        [[0.0, 94.0]]
    """
    arviz = import_arviz()
    if not has_datatree(arviz):
        return np.asarray(arviz.hdi(columns[None], hdi_prob=probability))
    from arviz_stats.base import array_stats

    return np.asarray(array_stats.hdi(columns, prob=probability, axis=0))


def diagnostics(
    draws: Mapping[str, Any], circular: Collection[str] = ()
) -> dict[str, dict[str, np.ndarray]]:
    """Judges Markov chains by what ArviZ computes from them, for every scalar parameter.

    Args:
        draws: Variable name -> draws of shape ``(chain, draw, *shape)``.
        circular: Names of variables that are angles, which are taken relative to their mean
            direction.

    Returns:
        For ``"rhat"`` (of split, rank-normalised chains), ``"ess_bulk"``, ``"ess_tail"`` and
        ``"mcse_mean"`` a mapping from variable name to an array of the variable's ``shape``. NaN is
        what ArviZ says of a constant.

    Raises:
        ValueError: If a variable has fewer than four draws a chain.
        TypeError: If draws are not real numbers.

    Reference:
        Rank-normalization, folding, and localization: An improved R-hat for assessing convergence
        of MCMC (Vehtari, Gelman, Simpson, Carpenter, Burkner, 2021),
        https://doi.org/10.1214/20-BA1221

    Example:
        >>> import numpy as np
        >>> from pyroflows.report.statistics import diagnostics
        >>> apart = np.random.default_rng(0).normal(size=(2, 100)) + np.array([[0.0], [5.0]])
        >>> bool(diagnostics({"mu": apart})["rhat"]["mu"] > 1.5)
        True
    """
    check_mapping("draws", draws)
    arviz = import_arviz()
    arrays = {name: np.asarray(values) for name, values in draws.items()}
    for name in circular:
        arrays[name] = deviations(arrays[name], axis=(0, 1))
    # Numbers for names, so that no variable is called as a dimension.
    numbered = {f"{i}": values for i, values in enumerate(arrays.values())}
    dataset = make_dataset("posterior", numbered, {}, {})
    if dataset.data_vars and dataset.sizes["draw"] < 4:
        raise ValueError(f"Expected at least 4 draws a chain; got {dataset.sizes['draw']}.")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = {
            "rhat": arviz.rhat(dataset),
            "ess_bulk": arviz.ess(dataset, method="bulk"),
            "ess_tail": arviz.ess(dataset, method="tail"),
            "mcse_mean": arviz.mcse(dataset, method="mean"),
        }
    return {
        kind: {name: np.asarray(values[f"{i}"]) for i, name in enumerate(draws)}
        for kind, values in found.items()
    }


def _labels(name: str, variable: xarray.DataArray) -> Iterator[str]:
    labels = [variable.coords[dim].values for dim in variable.dims[len(SAMPLE_DIMS) :]]
    for entry in product(*labels):
        yield f"{name}[{', '.join(map(str, entry))}]" if labels else name


def _statistics(draws: np.ndarray) -> np.ndarray:
    columns = _columns(draws)
    table = np.full((columns.shape[1], 4), np.nan)
    known = ~np.isnan(columns).any(0)
    if known.any():
        columns = columns[:, known]
        table[known] = np.column_stack([columns.mean(0), columns.std(0, ddof=1), hdi(columns)])
    return table


def deviations(angles: np.ndarray, axis: int | tuple[int, ...] = 0) -> np.ndarray:
    r"""Returns the deviations of angles from their mean direction, in :math:`[-\pi, \pi)`.

    Args:
        angles: Draws of angles in radians.
        axis: The dimensions of the draws.

    Example:
        >>> deviations(np.array([np.pi - 0.25, 0.25 - np.pi])).round(2)
        array([-0.25,  0.25])
    """
    wrapped: np.ndarray = _wrap(angles - _mean_direction(angles, axis=axis))
    return wrapped


def _circular_statistics(draws: np.ndarray) -> np.ndarray:
    columns = _columns(draws)
    mean = _mean_direction(columns)
    length = np.hypot(np.cos(columns).mean(0), np.sin(columns).mean(0)).clip(max=1.0)
    table = _statistics(_wrap(columns - mean))
    table[:, 0] = _wrap(mean)
    table[:, 1] = np.sqrt(-2 * np.log(length))
    table[:, 2:] = _wrap(table[:, 2:] + mean[:, None])
    return table


def _columns(draws: np.ndarray) -> np.ndarray:
    return draws.astype(np.float64).reshape(len(draws), math.prod(draws.shape[1:]))


def _mean_direction(angles: np.ndarray, axis: Any = 0) -> np.ndarray:
    direction: np.ndarray = np.arctan2(np.sin(angles).mean(axis), np.cos(angles).mean(axis))
    return direction


def _wrap(angles: np.ndarray) -> np.ndarray:
    wrapped: np.ndarray = np.mod(angles + math.pi, 2 * math.pi) - math.pi
    return wrapped
