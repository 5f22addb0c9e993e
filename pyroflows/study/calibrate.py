"""Calibration of a method: whether its posteriors are right on average over data sets."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from .._checks import check_seed, check_size, list_names
from .._compat import without_handlers
from .._deadline import Deadline
from .._random import seeded
from ..model.faults import describe_error
from ..posterior import fit_posterior
from ..report.uniformity import rank_among
from .calibration import Calibration
from .fits import Fit, WrongDrawsError, array_of, as_fit, draw, name_of_fit, run_fit
from .simulation import GivenData, Simulator, holding
from .work import Ledger, Running, check_running, do_all

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["calibrate"]

# Streams of random numbers, each with its seeds.
DATA, REFERENCES, FITS, TIES = range(4)
# Simulations among which the reference of a data set is sought.
MOST_REFERENCES = 200
# So that a central interval of 80 % can be told.
LEAST_DRAWS = 9
# Standard deviations of a normal distribution between its quartiles.
NORMAL_IQR = 1.349


class Task(NamedTuple):
    """A data set to fit, and what to compare its posterior with.

    Attributes:
        model: The model with the data.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        state: Parameters of the model in Pyro's param store.
        fit: What fits it.
        shapes: The shape of each site of parameters.
        active: Which entries of the sites no mask switches off.
        point: The parameters that made the data, one after the other.
        reference: The parameters from which distances are measured.
        scale: The unit of distance along each parameter.
        draws: How many draws of the posterior to take.
        seed: Seed of the fit and of the draws.
    """

    model: GivenData
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    fit: Fit
    shapes: dict[str, tuple[int, ...]]
    active: np.ndarray
    point: np.ndarray
    reference: np.ndarray
    scale: np.ndarray
    draws: int
    seed: int

    @property
    def fingerprint(self) -> str:
        """A hash of the parameters and the data."""
        parts = [self.point, *(array_of(value) for value in self.model.data.values())]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def calibrate(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    fit: Any = fit_posterior,
    data_sets: int = 200,
    draws: int = 199,
    sites: Sequence[str] | None = None,
    seed: int = 0,
    failing: float = 0.1,
    **running: Unpack[Running],
) -> Calibration:
    r"""Checks a way to fit a model on data sets that the model makes.

    For each data set the parameters are drawn from the prior and the data given them,

    .. math:: \theta^* \sim p(\theta), \quad y \sim p(y \mid \theta^*), \quad
        \theta_1, \dots, \theta_L \sim q(\theta \mid y),

    and the fit gives :math:`q`. If :math:`q` is the posterior, :math:`\theta^*` is one more draw of
    it, so that the rank of each of its entries is uniform on :math:`0, \dots, L`. Four statistics
    look for what is wrong, each with a p-value that is exact for independent draws:

    - ``sbc``: whether the ranks are uniform (simulation-based calibration);
    - ``vsbc``: whether they are as often low as high, which a posterior that is shifted is not,
      while one that is only too narrow is;
    - ``coverage``: whether central intervals of all levels hold :math:`\theta^*` as often as they
      should, which those of a posterior that is too narrow do not;
    - ``tarp``: whether balls of all levels about a reference point do so, for all parameters
      together (tests of accuracy with random points). The reference is the parameters of that one
      of further simulations whose data are nearest, so that it depends on the data: even the prior,
      whose every rank is uniform, is found out if it is returned for a posterior.

    Args:
        model: A Pyro model. Its observed sites get simulated data; what else is in its arguments,
            such as covariates, stays. Its own parameters, of ``pyro.param`` and modules, are held.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        fit: What is checked: :func:`fit_posterior`; ``functools.partial`` of it; any callable from
            a model, a tuple and a dictionary of its arguments, and ``seed=`` if it has that
            parameter, to a posterior, to draws by site of shape ``(at least draws, *site_shape)``,
            which are thinned and should be independent then, to an MCMC run, or to a trained guide;
            the class of an autoguide of Pyro, such as ``AutoNormal``, which is trained by ``SVI``
            for 2000 steps (see :class:`pyroflows.study.SVIFit` for others); or an amortised
            posterior, with ``posterior_for(x)``, for which nothing is trained, and whose draws are
            taken as they are, not corrected.
        data_sets: How many data sets.
        draws: How many draws :math:`L` of each posterior.
        sites: The names of the continuous latent or deterministic sites to look at; all latent ones
            by default.
        seed: The same seed gives the same data sets and fits, in any number of processes, and the
            first of them are the same for any number of data sets.
        failing: The largest share of data sets whose fit may raise an error. They are left out,
            and listed in the result.
        running: How it is run:

            - ``executor`` (None): An executor of ``concurrent.futures`` that runs fits in other
              processes, to which the model and the fit are sent by pickle.
            - ``checkpoint`` (None): A file of the finished fits, from which a call goes on if the
              one before was ended, or had fewer data sets. Fits that failed are tried again.
            - ``progress`` (True): Whether to show a progress bar.

    Returns:
        The ranks, their p-values, a table, and pictures.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the model observes nothing, if its parameters or data cannot be drawn, as
            with an improper prior, if the fit returns neither a posterior nor draws nor a guide, if
            draws lack a site or have another shape, or if more fits fail than may.

    Reference:
        Talts, Betancourt, Simpson, Vehtari, Gelman, "Validating Bayesian inference algorithms with
        simulation-based calibration", 2018, https://arxiv.org/abs/1804.06788

        Yao, Vehtari, Simpson, Gelman, "Yes, but did it work? Evaluating variational inference",
        2018, https://arxiv.org/abs/1802.02538

        Lemos, Coogan, Hezaveh, Perreault-Levasseur, "Sampling-based accuracy testing of posterior
        estimators for general inference", 2023, https://arxiv.org/abs/2302.03026

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> def half_as_wide(model, args, kwargs):
        ...     y = model.data["y"]
        ...     return {"x": y / 2 + 0.5**0.5 / 2 * torch.randn(199)}
        >>> calibration = pf.calibrate(
        ...     model, (torch.tensor(0.0),), fit=half_as_wide, progress=False)
        >>> calibration.ok, calibration.reason
        (False, 'the posterior of x is too narrow (coverage p < 1e-06).')
    """
    method, share = as_fit(fit), _check_share(failing)
    check_size("data_sets", data_sets)
    check_size("draws", draws, least=LEAST_DRAWS)
    check_seed(seed)
    options = check_running(running)
    simulator = Simulator(model, args, kwargs)
    shapes = _shapes(simulator, sites)
    settings = {"fit": name_of_fit(fit), "draws": draws, "seed": seed, "sites": list(shapes)}
    ledger = Ledger(options.get("checkpoint"), "calibration", settings)
    tasks = _make_tasks(simulator, method, shapes, data_sets, draws, seed)
    _refuse_other_data(ledger, tasks)
    records: dict[str, Record] = {}
    for name, record in do_all(_fit_one, tasks, ledger, options, unit="fits"):
        records[name] = cast(Record, record)
        _refuse_failures(records, data_sets, share)
    points = {name: task.point for name, task in tasks.items()}
    return _collect(records, points, shapes, draws, name_of_fit(fit))


# What is fitted


def _check_share(failing: Any) -> float:
    if isinstance(failing, bool) or not isinstance(failing, Real):
        raise TypeError(f"Expected failing to be a share of the data sets; got {failing!r}.")
    if not 0 <= float(failing) < 1:
        raise ValueError(f"Expected failing from 0 to below 1; got {failing}.")
    return float(failing)


def _shapes(simulator: Simulator, sites: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the sites to look at, by name."""
    known = simulator.draw(0).parameters
    if isinstance(sites, str) or not (sites is None or isinstance(sites, Sequence)):
        raise TypeError(f"Expected sites to be a sequence of names; got {sites!r}.")
    for name in sites or ():
        if name not in known:
            raise ValueError(f"Expected sites to be among {list_names(list(known))}; got {name!r}.")
    chosen = simulator.latent if sites is None else list(sites)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"Expected one continuous site or more, each once; got {chosen}.")
    return {name: tuple(known[name].shape) for name in chosen}


def _make_tasks(
    simulator: Simulator,
    fit: Fit,
    shapes: Mapping[str, tuple[int, ...]],
    data_sets: int,
    draws: int,
    seed: int,
) -> dict[str, Task]:
    drawn = [simulator.draw(_seed(seed, DATA, i)) for i in range(data_sets)]
    # As many for any number of data sets, so that these have the same references.
    further = [simulator.draw(_seed(seed, REFERENCES, i)) for i in range(MOST_REFERENCES)]
    points = [_flat(simulation.parameters, shapes) for simulation in drawn]
    references = np.stack([_flat(simulation.parameters, shapes) for simulation in further])
    scale, active = _spread(references), _active(simulator, shapes)
    kinds = {name: tuple(torch.as_tensor(v).shape) for name, v in drawn[0].data.items()}
    data = np.stack([_flat(simulation.data, kinds) for simulation in further])
    unit = _spread(data)
    nearest = [_nearest(_flat(simulation.data, kinds), data, unit) for simulation in drawn]
    return {
        str(i): Task(
            model=simulator.given(simulation.data),
            args=simulator.args,
            kwargs=simulator.kwargs,
            state=simulator.state,
            fit=fit,
            shapes=dict(shapes),
            active=active,
            point=points[i],
            reference=references[nearest[i]],
            scale=scale,
            draws=draws,
            seed=_seed(seed, FITS, i),
        )
        for i, simulation in enumerate(drawn)
    }


def _seed(seed: int, stream: int, i: int) -> int:
    return int(np.random.SeedSequence([seed, stream, i]).generate_state(1)[0])


def _flat(values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """The entries of some sites, one after the other."""
    tensors = {name: torch.as_tensor(values[name]) for name in shapes}
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"Expected sites of one shape in every draw of the model; {name!r} was of "
                f"shape {shape} in one and {tuple(tensors[name].shape)} in another."
            )
    flat = [tensor.reshape(-1).double() for tensor in tensors.values()]
    return torch.cat([entries.cpu() for entries in flat]).numpy()


def _active(simulator: Simulator, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """Which entries are to be ranked; all of those of deterministic sites."""
    every = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    return _flat({**every, **simulator.active}, shapes).astype(bool)


def _spread(rows: np.ndarray) -> np.ndarray:
    """The standard deviation of each column, by its quartiles; 1 where these are equal."""
    upper, lower = np.nanquantile(rows, [0.75, 0.25], axis=0)
    spread = (upper - lower) / NORMAL_IQR
    return np.where(np.isfinite(spread) & (spread > 0), spread, 1.0)


def _nearest(data: np.ndarray, others: np.ndarray, unit: np.ndarray) -> int:
    """Which of other data are nearest."""
    with np.errstate(invalid="ignore", over="ignore"):
        distances = np.square((others - data) / unit).sum(-1)
    return int(np.nan_to_num(distances, nan=np.inf).argmin())


def _refuse_other_data(ledger: Ledger, tasks: Mapping[str, Task]) -> None:
    """Refuses results of other data, as another model or other arguments make."""
    for name, task in tasks.items():
        if name in ledger.results and ledger.results[name].get("data") != task.fingerprint:
            raise ValueError(
                f"Expected a checkpoint of this model and its arguments; {ledger.path!r} is one of "
                f"other simulated data (data set {name})."
            )


# One data set


class Record(TypedDict):
    """What is kept of a data set; all but the first two only if it could be fitted."""

    data: str
    error: str | None
    ranks: Tensor
    tarp: int
    one: Tensor
    seconds: float
    trusted: bool | None


def _fit_one(task: Task) -> dict[str, Any]:
    """Fits a data set, and ranks its point among draws of the posterior."""
    clock = Deadline()
    with holding(task.state), seeded(task.seed), without_handlers():
        try:
            _refuse_infinite(task.model.data)
            fitted = run_fit(task.fit, task.model, task.args, task.kwargs, task.seed)
            drawn = draw(fitted, task.args, task.kwargs, task.draws, task.seed)
            seconds = clock.elapsed
            draws = _columns(drawn, task)
        except WrongDrawsError:
            raise
        except Exception as error:
            return {"data": task.fingerprint, "error": describe_error(error)}
    findings = getattr(getattr(fitted, "verdict", None), "findings", ())
    ranks, tarp = _rank(task, draws)
    return {
        "data": task.fingerprint,
        "error": None,
        "ranks": torch.as_tensor(ranks),
        "tarp": tarp,
        "one": torch.as_tensor(draws[-1]),
        "seconds": seconds,
        "trusted": bool(fitted.verdict.ok) if findings else None,
    }


def _refuse_infinite(data: Mapping[str, Tensor]) -> None:
    for name, value in data.items():
        if not bool(torch.as_tensor(value).isfinite().all()):
            raise ValueError(f"simulated data of site {name!r} are not finite")


def _columns(drawn: Mapping[str, np.ndarray], task: Task) -> np.ndarray:
    """Draws as a matrix."""
    for name, shape in task.shapes.items():
        if name not in drawn:
            raise WrongDrawsError(
                f"Expected draws of {list_names(list(task.shapes))}; the fit returned those of "
                f"{list_names(list(drawn)) or 'nothing'}."
            )
        if drawn[name].shape != (task.draws, *shape):
            raise WrongDrawsError(
                f"Expected draws of {name!r} of shape {(task.draws, *shape)}; the fit returned "
                f"{drawn[name].shape}."
            )
    parts = [drawn[name].reshape(task.draws, -1).astype(np.float64) for name in task.shapes]
    columns = np.concatenate(parts, -1)
    if np.isnan(columns[:, task.active]).any():
        raise ValueError("some draws of the posterior are NaN")
    return columns


def _rank(task: Task, draws: np.ndarray) -> tuple[np.ndarray, int]:
    """The ranks of the entries of a point among draws, and that of its distance from a reference;
    -1 for entries that a mask switches off."""
    rng = np.random.default_rng([task.seed, TIES])
    ranks = rank_among(task.point, draws, rng)
    with np.errstate(invalid="ignore", over="ignore"):
        steps = (np.vstack([task.point, draws]) - task.reference) / task.scale
        distances = np.linalg.norm(steps[:, task.active], axis=-1)
    return np.where(task.active, ranks, -1), int(rank_among(distances[0], distances[1:], rng))


# All of them


def _refuse_failures(records: Mapping[str, Record], data_sets: int, share: float) -> None:
    failed = {int(name): r["error"] for name, r in records.items() if r["error"] is not None}
    if len(failed) > share * data_sets:
        first = min(failed)
        raise ValueError(
            f"Expected at most {share:.0%} of {data_sets} fits to fail; {len(failed)} of "
            f"{len(records)} did, the first that of data set {first}: {failed[first]}."
        )


def _collect(
    records: Mapping[str, Record],
    points: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    draws: int,
    fit: str,
) -> Calibration:
    names = sorted(records, key=int)
    fitted = {name: records[name] for name in names if records[name]["error"] is None}
    ranks = np.stack([record["ranks"].numpy() for record in fitted.values()])
    ones = np.stack([record["one"].numpy() for record in fitted.values()])
    return Calibration(
        ranks=_by_site(ranks, shapes),
        parameters=_by_site(np.stack([points[name] for name in fitted]), shapes),
        posterior_draws=_by_site(ones, shapes),
        tarp_ranks=np.array([record["tarp"] for record in fitted.values()]),
        draws=draws,
        fit=fit,
        failures={int(name): str(records[name]["error"]) for name in names if name not in fitted},
        seconds=np.array([record["seconds"] for record in fitted.values()]),
        trusted=[record["trusted"] for record in fitted.values()],
    )


def _by_site(rows: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(rows, ends[:-1], axis=-1)
    return {
        name: part.reshape(len(rows), *shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
