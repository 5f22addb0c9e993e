"""The bridge to ArviZ: plain numpy arrays in, ArviZ's containers and smoothed weights out.

One code for ArviZ 0.23 (``InferenceData``) and ArviZ 1.x (``DataTree``). It imports neither torch
nor another room, so that it can be tested where torch is not installed.

Datasets are built here and not by ``arviz.from_dict``, whose versions differ in the names that they
give to dimensions, and which fills variables of unequal length with NaN, turns a scalar observation
into a vector (0.23) and notes the time, so that two runs with one seed differ.
"""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._files import check_path, reason, write_whole
from .pareto import smooth_tail

if TYPE_CHECKING:
    import xarray

__all__ = [
    "Loo",
    "check_labels",
    "check_mapping",
    "import_arviz",
    "load",
    "loo",
    "psis",
    "save",
    "to_inference_data",
]

SAMPLE_DIMS = ("chain", "draw")
# The engine that ArviZ 0.23 depends on and that ArviZ 1.x offers as an extra.
ENGINE = "h5netcdf"
# No shorter tail is fitted: its first quartile must differ from its minimum.
SHORTEST_TAIL = 6
# Over so small a range of log weights smoothing changes nothing, and what varies may be rounding: a
# float32 log density of 1e4 is known to 1e-3, which leaves ties that no Pareto distribution fits.
FLAT_TAIL = 1e-2
# The shape from which on a generalised Pareto distribution has no mean.
NO_MEAN = 1.0


class Loo(NamedTuple):
    """Leave-one-out cross-validation, observation by observation.

    Attributes:
        elpd: Log predictive density of each observation given the others, of shape
            ``(observations,)``.
        khat: Shape of the tail of its importance weights, of shape ``(observations,)``.
        p_loo: Effective number of parameters.
    """

    elpd: np.ndarray
    khat: np.ndarray
    p_loo: float


def to_inference_data(
    groups: Mapping[str, Mapping[str, Any]],
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Puts arrays into ArviZ's container.

    On ArviZ 0.x that is an ``InferenceData``, on ArviZ 1.x an ``xarray.DataTree``.

    Args:
        groups: Group name -> variable name -> array, such as ``{"posterior": {"theta": draws}}``.
            Arrays are ``(chain, draw, *shape)``; in groups with "data" in their name
            (``observed_data``, ``constant_data``) they are ``*shape``. Empty groups are left out.
        dims: Variable name -> names of the dimensions of ``shape``, from the left, the same in all
            groups. Dimension ``i`` without a name, or named None, becomes ``<variable>_dim_<i>``.
            In groups that begin with "log_" (``log_likelihood``), which have lost the dimensions of
            the event, surplus names are ignored.
        coords: Dimension name -> labels, one for each entry. Dimensions without labels are numbered
            from 0.
        attrs: What to note on the whole. None is left out, booleans become 0 or 1, and what netCDF
            cannot hold becomes its ``str``, so that the result can always be saved.

    A "/" in a name (``pyro.poutine.scope`` writes them) becomes ".", because netCDF keeps "/" for
    groups.

    Returns:
        The container, with one dataset for each group.

    Raises:
        ValueError: If an array lacks the dimensions chain and draw, if ``dims`` or ``coords`` do
            not fit the arrays, or if two names of one group are the same.
        TypeError: If draws are not real numbers, if data are neither real numbers nor strings, or
            if ``dims`` gives a string for a sequence.

    Reference:
        ArviZ: a unified library for exploratory analysis of Bayesian models in Python (Kumar,
        Carroll, Hartikainen, Martin, 2019), https://doi.org/10.21105/joss.01143

    Example:
        >>> import numpy as np
        >>> from pyroflows.report.arviz_bridge import to_inference_data
        >>> draws = {"mu": np.zeros((1, 100)), "theta": np.zeros((1, 100, 2))}
        >>> data = to_inference_data(
        ...     {"posterior": draws},
        ...     dims={"theta": ["school"]},
        ...     coords={"school": ["Choate", "Deerfield"]},
        ... )
        >>> data["posterior"]["theta"].dims
        ('chain', 'draw', 'school')
    """
    check_mapping("groups", groups, to="groups of arrays")
    for group, arrays in groups.items():
        check_mapping(f"the group {group!r}", arrays)
    dims, coords = check_labels(dims, coords)
    check_mapping("attrs", {} if attrs is None else attrs, to="notes")
    datasets = {
        group: make_dataset(group, arrays, dims, coords)
        for group, arrays in groups.items()
        if arrays
    }
    notes = {
        str(key): _storable(value) for key, value in (attrs or {}).items() if value is not None
    }
    arviz = import_arviz()
    if not has_datatree(arviz):
        return arviz.InferenceData(attrs=notes, **datasets)
    from xarray import DataTree

    tree = DataTree.from_dict(datasets)
    tree.attrs.update(notes)
    return tree


def psis(log_weights: Any) -> tuple[np.ndarray, float]:
    r"""Smooths the largest importance weights by Pareto-smoothed importance sampling.

    The ``M`` largest of ``N`` weights :math:`w_i = p(x_i) / q(x_i)` (``M`` is :math:`3 \sqrt N`, at
    most ``N / 5``) are replaced by quantiles of the generalised Pareto distribution fitted to them,
    whose shape is k-hat. Weights with k-hat below 0.7 give reliable estimates. These cases are
    settled apart:

    - The ``M`` largest weights (all weights, where there are too few for a tail) are equal up to a
      factor of 1.01: the weights are bounded as far as the draws can tell, as those of an exact
      guide are. k-hat is ``-inf``.
    - Fewer than 30 draws, or fewer draws of non-zero weight than the fit needs: the draws do not
      show that the weights are reliable. k-hat is ``inf``.
    - k-hat is 1 or more: the fitted distribution has no mean. So it comes out where most of the
      tail lies on a plateau, as with a guide that is all but exact; its quantiles in place of the
      weights would then bias every estimate.
    - There is no fit. k-hat is ``inf``.

    In these cases the weights are normalised but not smoothed.

    Args:
        log_weights: Log weights of any shape, ``(draws,)`` or ``(chain, draw)``, in any
            normalisation. ``-inf`` is a draw of weight zero.

    Returns:
        The smoothed log weights in float64, of the same shape, whose ``logsumexp`` is 0, and k-hat.

    Raises:
        ValueError: If there are no log weights, if one is NaN or ``inf``, or if all are ``-inf``.

    Reference:
        Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao, Gabry, 2024),
        https://jmlr.org/papers/v25/19-556.html

    Example:
        >>> import numpy as np
        >>> from pyroflows.report.arviz_bridge import psis
        >>> log_weights, khat = psis(np.random.default_rng(0).normal(size=4000))
        >>> bool(khat < 0.7), round(float(np.exp(log_weights).sum()), 6)
        (True, 1.0)
        >>> psis(np.zeros(4000))[1]
        -inf
    """
    try:
        given = np.asarray(log_weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        kind = type(log_weights).__name__
        raise TypeError(f"Expected log_weights to be real numbers; got {kind}.") from error
    weights = _normalise(_checked_log_weights(given.ravel()))
    ordered = np.sort(weights)
    length = _tail_length(len(weights))
    fits = length >= SHORTEST_TAIL
    tail = ordered[-length:] if fits else ordered
    khat = math.inf
    if len(weights) > 1 and tail[-1] - tail[0] <= FLAT_TAIL:
        khat = -math.inf
    # The tail that is fitted may be longer by one, and the threshold lies one below it.
    elif fits and ordered[-length - 2] - ordered[-1] > math.log(np.finfo(np.float64).tiny):
        smoothed, shape = smooth_tail(weights)
        if math.isfinite(shape):
            khat = shape
            if shape < NO_MEAN:
                weights = _normalise(smoothed)
    return weights.reshape(given.shape), khat


def loo(log_likelihood: Mapping[str, Any]) -> Loo:
    r"""Cross-validates by leaving out one observation at a time.

    Each is left out by Pareto-smoothed importance weights.

    Args:
        log_likelihood: Variable name -> log likelihood of each observation, of shape
            ``(chain, draw, *shape)``. The entries of all variables count as observations.

    Returns:
        The cross-validation. Where k-hat is 1 or more the weights are not smoothed, as ``psis``
        says.

    Raises:
        ValueError: If there is no observation, or a log likelihood is NaN or ``inf``, or ``-inf``
            for all draws.

    Reference:
        Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC (Vehtari,
        Gelman, Gabry, 2017), https://arxiv.org/abs/1507.04544

    Example:
        >>> import numpy as np
        >>> from pyroflows.report.arviz_bridge import loo
        >>> result = loo({"y": np.random.default_rng(0).normal(size=(1, 1000, 8))})
        >>> result.elpd.shape, bool((result.khat < 0.7).all())
        ((8,), True)
    """
    check_mapping("log_likelihood", log_likelihood)
    arrays = [
        _checked_array("log_likelihood", name, values).astype(np.float64)
        for name, values in log_likelihood.items()
    ]
    columns = [
        array.reshape(math.prod(array.shape[:2]), math.prod(array.shape[2:])) for array in arrays
    ]
    observations = [column for matrix in columns for column in matrix.T]
    if not observations:
        raise ValueError("Expected log_likelihood of at least one observation; got none.")
    # An observation is left out by dividing its likelihood away.
    left_out = [psis(-column) for column in observations]
    elpd = [
        np.logaddexp.reduce(weights + column)
        for (weights, _), column in zip(left_out, observations, strict=True)
    ]
    lppd = [np.logaddexp.reduce(column) - math.log(len(column)) for column in observations]
    return Loo(
        np.array(elpd), np.array([khat for _, khat in left_out]), float(np.sum(lppd) - np.sum(elpd))
    )


def save(data: Any, path: str | os.PathLike[str]) -> None:
    """Writes what ``to_inference_data`` returned to a netCDF file, which either ArviZ can read.

    A file that is already there is replaced, but only when all has been written.

    Args:
        data: An ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (ArviZ 1.x).
        path: Where to write.

    Raises:
        TypeError: If ``data`` is neither of the two.
        ValueError: If the file cannot be written.

    Example:
        >>> import os, tempfile
        >>> import numpy as np
        >>> from pyroflows.report.arviz_bridge import load, save, to_inference_data
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "posterior.nc")
        ...     save(to_inference_data({"posterior": {"mu": np.zeros((1, 100))}}), path)
        ...     load(path)["posterior"]["mu"].shape
        (1, 100)
    """
    if not (hasattr(data, "to_netcdf") and hasattr(data, "groups")):
        raise TypeError(f"Expected an InferenceData or a DataTree; got {type(data).__name__}.")
    target = check_path("path", path)
    try:
        write_whole(target, _netcdf(data))
    except OSError as error:
        raise ValueError(f"Cannot write {target!r}: {reason(error)}.") from error


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a netCDF file of ArviZ's groups into memory, whichever ArviZ wrote it, and closes it.

    Args:
        path: The file.

    Returns:
        An ``InferenceData`` on ArviZ 0.x, an ``xarray.DataTree`` on ArviZ 1.x.

    Raises:
        ValueError: If there is no such file, or if it is not netCDF.

    Example:
        See ``save``.
    """
    source = check_path("path", path)
    arviz = import_arviz()
    try:
        if not has_datatree(arviz):
            with arviz.rc_context({"data.load": "eager"}):
                return arviz.from_netcdf(source, engine=ENGINE)
        from xarray import open_datatree

        with open_datatree(source, engine=ENGINE) as tree:
            return tree.load()
    except OSError as error:
        raise ValueError(f"Cannot read {source!r} as netCDF: {reason(error)}.") from error
    except Exception as error:  # of any type, from whatever reads a damaged file
        raise ValueError(f"Cannot read {source!r} as netCDF: {error!r}.") from error


def check_mapping(name: str, value: Any, to: str = "arrays") -> None:
    """Raises ``TypeError`` unless ``value`` maps names to something."""
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected {name} to map names to {to}; got {type(value).__name__}.")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"Expected {name} to have names as keys; got {key!r}.")


def check_labels(
    dims: Mapping[str, Any] | None, coords: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns names of dimensions and their labels, both empty where none are given."""
    dims = {} if dims is None else dims
    coords = {} if coords is None else coords
    check_mapping("dims", dims, to="dimensions")
    check_mapping("coords", coords, to="labels")
    return dims, coords


def _netcdf(data: Any) -> memoryview:
    """The bytes of a netCDF file, made in memory, because HDF5 crashes where a disk is full."""
    import h5netcdf
    from xarray import Dataset
    from xarray.backends import H5NetCDFStore

    buffer = io.BytesIO()
    with h5netcdf.File(buffer, "w") as file:
        Dataset(attrs=data.attrs).dump_to_store(H5NetCDFStore(file))
        for name, dataset in _groups(data):
            compressed = [key for key, v in dataset.variables.items() if v.dtype.kind in "biuf"]
            dataset.dump_to_store(
                H5NetCDFStore(file, group=name, mode="a"),
                encoding={key: {"zlib": True} for key in compressed},
            )
    return buffer.getbuffer()


def _groups(data: Any) -> Iterator[tuple[str, xarray.Dataset]]:
    if hasattr(data, "subtree"):
        for node in data.subtree:
            if node.path != "/":
                yield node.path, node.to_dataset(inherit=False)
    else:
        yield from data.items()


def import_arviz() -> Any:
    """Imports ArviZ, quietly."""
    # At its first import ArviZ 0.23 announces its successor, by a warning once a day, and logs
    # which parts of the successor are not installed.
    log = logging.getLogger("arviz.preview")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        log.addFilter(_refuse)
        try:
            import arviz
        finally:
            log.removeFilter(_refuse)
    return arviz


def _refuse(record: logging.LogRecord) -> bool:
    return False


def has_datatree(arviz: Any) -> bool:
    """Tells whether this is ArviZ 1.x, whose containers are an ``xarray.DataTree``."""
    return int(arviz.__version__.split(".")[0]) >= 1


def make_dataset(
    group: str,
    arrays: Mapping[str, Any],
    dims: Mapping[str, Sequence[str | None]],
    coords: Mapping[str, Any],
) -> xarray.Dataset:
    """Puts one group of arrays into a dataset; see ``to_inference_data``."""
    from xarray import Dataset

    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    sizes: dict[str, int] = {}
    for name, values in arrays.items():
        array = _checked_array(group, name, values)
        names = _dimensions(group, name, array.shape, dims.get(name, ()))
        key = storable_name(name)
        if key in variables:
            raise ValueError(f"Expected different names in {group!r}; got {key!r} twice.")
        for dim, size in zip(names, array.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                expected = (
                    f"Expected {dim!r} to be as long for {name!r} as for the others in {group!r}"
                )
                raise ValueError(f"{expected}, {sizes[dim]}; got {size}.")
        variables[key] = (names, array)
    for name in sizes.keys() & variables.keys():
        raise ValueError(f"Expected no dimension named as a variable of {group!r}; got {name!r}.")
    return Dataset(variables, coords=_coordinates(sizes, coords))


def _checked_array(group: str, name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:  # of lists whose inner lists differ in length
        raise ValueError(
            f"Expected {name!r} in {group!r} to be an array; got {type(values).__name__}."
        ) from error
    if array.dtype.kind not in ("biufU" if _is_data(group) else "biuf"):
        raise TypeError(
            f"Expected real numbers for {name!r} in {group!r}; got dtype {array.dtype}."
        )
    return array


def _is_data(group: str) -> bool:
    return "data" in group


def _dimensions(
    group: str, name: str, shape: tuple[int, ...], given: Sequence[str | None]
) -> tuple[str, ...]:
    if isinstance(given, str):
        raise TypeError(
            f"Expected dims to hold a sequence of names for {name!r}; got the string {given!r}."
        )
    sample_dims = () if _is_data(group) else SAMPLE_DIMS
    if len(shape) < len(sample_dims):
        raise ValueError(f"Expected {name!r} in {group!r} of shape (chain, draw, *); got {shape}.")
    rank = len(shape) - len(sample_dims)
    names = list(given)[:rank] if group.startswith("log_") else list(given)
    if len(names) > rank:
        raise ValueError(
            f"Expected dims to hold at most {rank} names for {name!r} in {group!r}; got {names}."
        )
    names += [None] * (rank - len(names))
    named = [f"{name}_dim_{i}" if dim is None else dim for i, dim in enumerate(names)]
    result = (*sample_dims, *map(storable_name, named))
    if len(set(result)) < len(result):
        raise ValueError(f"Expected different names for the dimensions of {name!r}; got {result}.")
    return result


def _coordinates(sizes: Mapping[str, int], coords: Mapping[str, Any]) -> dict[str, np.ndarray]:
    given = {storable_name(dim): np.asarray(labels) for dim, labels in coords.items()}
    for dim, size in sizes.items():
        if dim in given and given[dim].shape != (size,):
            raise ValueError(f"Expected {size} labels for {dim!r}; got shape {given[dim].shape}.")
    return {dim: given.get(dim, np.arange(size)) for dim, size in sizes.items()}


def storable_name(name: str) -> str:
    """Replaces "/" in a name, because netCDF keeps it for groups."""
    return name.replace("/", ".")


def _storable(value: Any) -> Any:
    """Turns a note into what netCDF holds: a number, a string, or a list of either."""
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        return str(value)
    if array.dtype.kind == "b":
        array = array.astype(np.int64)
    if array.ndim > 1 or array.dtype.kind not in "iufU":
        return str(value)
    return array.tolist()


def _checked_log_weights(log_weights: np.ndarray) -> np.ndarray:
    bad = log_weights[np.isnan(log_weights) | (log_weights == np.inf)]
    if bad.size:
        got = f"{bad[0]} ({bad.size} of {log_weights.size})"
        raise ValueError(f"Expected log_weights to be finite numbers or -inf; got {got}.")
    if not np.isfinite(log_weights).any():
        raise ValueError(
            f"Expected log_weights with a draw of non-zero weight; got none in {log_weights.size}."
        )
    return log_weights


def _normalise(log_weights: np.ndarray) -> np.ndarray:
    largest = log_weights.max()
    normalised: np.ndarray = log_weights - (largest + math.log(np.exp(log_weights - largest).sum()))
    return normalised


def _tail_length(draws: int) -> int:
    return math.floor(min(draws / 5, 3 * math.sqrt(draws)))
