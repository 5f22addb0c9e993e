"""Simulators: what draws parameters and data, a Pyro model or a function with a prior."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from .._random import seeded
from .checks import check_all_rows, check_arguments, check_call
from .density import LogDensity
from .faults import describe_error, explained
from .sites import is_discrete, is_factor, is_improper, sample_nodes, site_plates

__all__ = [
    "Conditioned",
    "FailedCallError",
    "FunctionSimulator",
    "ModelSimulator",
    "Outcome",
    "Simulator",
    "as_simulator",
]

Values = dict[str, Tensor]
#: The names of the parameter and of the data where a function has one of each.
PARAMETER, DATA = "theta", "x"
#: Draws by which rows are found to be exchangeable.
CHECKED = 3


class Outcome(NamedTuple):
    """One simulation.

    Attributes:
        theta: The parameters by name.
        x: The data by name.
    """

    theta: Values
    x: Values


class FailedCallError(Exception):
    """A simulation that raised an error, which the message describes.

    Args:
        theta: The parameters, as far as they were drawn.
        error: The error.
    """

    def __init__(self, theta: Values, error: Exception) -> None:
        super().__init__(describe_error(error))
        self.theta = theta


class Simulator(abc.ABC):
    """Draws parameters from a prior, and data given the parameters.

    It can be pickled if the function or model that it wraps can, so that it reaches other
    processes.

    Attributes:
        has_likelihood: Whether the density of data given parameters can be evaluated.
    """

    has_likelihood: bool

    def __call__(self, seed: int, theta: Mapping[str, Tensor] | None = None) -> Outcome:
        """Runs one simulation, which depends on nothing but its arguments.

        Args:
            seed: Seed of all that is random in it.
            theta: Parameters by name; draws from the prior if ``None``.

        Returns:
            The parameters and the data.
        """
        with seeded(seed), torch.no_grad(), poutine.block():
            return self._run(theta)

    @abc.abstractmethod
    def _run(self, theta: Mapping[str, Tensor] | None) -> Outcome:
        """Draws parameters, if they are not given, and data."""

    def is_exchangeable(self) -> bool:
        """Whether the rows of the data are exchangeable, as far as can be told."""
        return False

    @abc.abstractmethod
    def density(self, x: Mapping[str, Tensor]) -> LogDensity:
        """A log density of the parameters, with their map to the reals.

        It is the joint density with data ``x`` if the likelihood is known, else that of the prior.

        Args:
            x: Data by name.
        """


class ModelSimulator(Simulator):
    """Draws from a Pyro model.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        data: Names of the sample sites that are data; those with ``obs`` by default.

    Raises:
        TypeError: If the model cannot be called with the arguments, or ``data`` is no sequence.
        ValueError: If the model has no such site, or cannot be drawn from.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> simulator = ModelSimulator(model, data=["y"])
        >>> theta, x = simulator(seed=0)
        >>> sorted(theta), sorted(x), simulator.density(x).features
        (['mu'], ['y'], 1)
    """

    has_likelihood = True

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        data: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.args, self.kwargs = check_arguments(args, kwargs)
        check_call("the model", model, self.args, self.kwargs)
        self.names = self._find_data(data)

    def _find_data(self, data: Sequence[str] | None) -> list[str]:
        with seeded(0), torch.no_grad(), poutine.block(), explained():
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        sites = dict(sample_nodes(trace))
        check_all_rows(trace, "draws all its rows", ". Leave out its subsample_size.")
        for name, node in sites.items():
            _check_drawable(name, node)
        names = data if data is not None else [n for n, s in sites.items() if s["is_observed"]]
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"Expected data to be a sequence of names of sites; got {data!r}.")
        for name in names:
            if name not in sites:
                raise ValueError(
                    f"Expected data to name sample sites of the model ({', '.join(sites)}); got "
                    f"{name!r}."
                )
        if not names:
            raise ValueError(
                "Expected a model with obs sites, or data= with the names of the sites that are "
                f"data; got one with {', '.join(sites) or 'no sites'} and none observed."
            )
        if len(set(names)) == len(sites):
            raise ValueError(f"Expected a latent site beside the data; got {', '.join(sites)}.")
        return list(names)

    def _run(self, theta: Mapping[str, Tensor] | None) -> Outcome:
        model = poutine.uncondition(self.model)
        if theta is not None:
            model = poutine.condition(model, data=dict(theta))
        tracer = poutine.trace(model)
        try:
            sites = dict(sample_nodes(tracer.get_trace(*self.args, **self.kwargs)))
            x = {name: as_values(name, sites[name]["value"]) for name in self.names}
        except Exception as error:
            raise FailedCallError(self._latent(tracer.trace), error) from error
        return Outcome(self._latent(tracer.trace), x)

    def _latent(self, trace: Any) -> Values:
        """The values of the continuous latent sites in a trace, which may have been cut short."""
        return {
            name: node["value"]
            for name, node in sample_nodes(trace)
            if name not in self.names and node["value"] is not None and not is_discrete(node)
        }

    def is_exchangeable(self) -> bool:
        """Whether the density of some draws does not change with the order of their rows.

        They are rows of a plate, which is the first dimension of the only data site.
        """
        if len(self.names) > 1:
            return False
        [name] = self.names
        return all(self._is_symmetric(name, seed) for seed in range(CHECKED))

    def _is_symmetric(self, name: str, seed: int) -> bool:
        theta, x = self(seed)
        rows = x[name]
        if rows.dim() == 0 or len(rows) < 2:
            return False
        turned = [self._log_joint({**theta, name: value}) for value in (rows, rows.flip(0))]
        in_plate, (first, second) = turned[0][1], [value for value, _ in turned]
        return in_plate and torch.allclose(first, second, rtol=1e-4)

    def _log_joint(self, values: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
        """The log joint density, and whether the data have a plate as their first dimension."""
        given = poutine.trace(poutine.condition(self.model, data=dict(values)))
        with seeded(0), torch.no_grad(), poutine.block():
            trace = given.get_trace(*self.args, **self.kwargs)
        plates = site_plates(dict(sample_nodes(trace))[self.names[0]])
        return torch.as_tensor(trace.log_prob_sum()), plates[0] is not None

    def density(self, x: Mapping[str, Tensor]) -> LogDensity:
        if set(x) != set(self.names):
            raise ValueError(
                f"Expected data of the sites {', '.join(self.names)}; got those of {', '.join(x)}."
            )
        return LogDensity(Conditioned(self.model), (dict(x), *self.args), self.kwargs)


class Conditioned:
    """A model whose first argument holds the values of its data sites.

    Args:
        model: The model.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def __call__(self, data: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Runs the model with the values in the place of its own data."""
        return poutine.condition(self.model, data=dict(data))(*args, **kwargs)


class FunctionSimulator(Simulator):
    """Draws parameters from a prior and hands them to a function.

    Args:
        function: Takes the parameters, a tensor if there is one prior and a dictionary of tensors
            if there are several, and returns the data: a tensor, whatever numpy makes an array of,
            or a dictionary of such.
        prior: A Pyro distribution, or a dictionary of independent ones.

    Raises:
        TypeError: If ``function`` is no callable, or ``prior`` is no distribution.
        ValueError: If ``prior`` cannot be drawn from.

    Example:
        >>> import pyro.distributions as dist
        >>> simulator = FunctionSimulator(lambda theta: theta**2, dist.Uniform(-1.0, 1.0))
        >>> theta, x = simulator(seed=0)
        >>> bool(x["x"] == theta["theta"] ** 2)
        True
    """

    has_likelihood = False

    def __init__(self, function: Callable[..., Any], prior: Any) -> None:
        if not callable(function):
            raise TypeError(
                f"Expected simulator to be a Pyro model or a function of the parameters; got "
                f"{function!r}."
            )
        self.function = function
        self.prior = Prior(prior)
        self._single = not isinstance(prior, Mapping)

    def _run(self, theta: Mapping[str, Tensor] | None) -> Outcome:
        given = self.prior() if theta is None else dict(theta)
        try:
            # A function may change its arguments in place.
            own = {name: value.clone() for name, value in given.items()}
            result = self.function(own[PARAMETER] if self._single else own)
            named = result if isinstance(result, Mapping) else {DATA: result}
            x = {str(name): as_values(str(name), value) for name, value in named.items()}
            if not x:
                raise ValueError("Expected data; got an empty dictionary.")
        except Exception as error:
            raise FailedCallError(given, error) from error
        return Outcome(given, x)

    def density(self, x: Mapping[str, Tensor]) -> LogDensity:
        return LogDensity(self.prior)


class Prior:
    """A Pyro model of independent parameters.

    Args:
        prior: A Pyro distribution, or a dictionary of them.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is none, or one is discrete or improper.
    """

    def __init__(self, prior: Any) -> None:
        named = dict(prior) if isinstance(prior, Mapping) else {PARAMETER: prior}
        if not named:
            raise ValueError("Expected prior with one parameter at least; got an empty dictionary.")
        for name, each in named.items():
            if not isinstance(each, TorchDistributionMixin) or not isinstance(name, str):
                raise TypeError(
                    "Expected prior to be a distribution of pyro.distributions, or a dictionary "
                    f"of them by name; got {each!r}."
                )
            if each.support.is_discrete:
                raise ValueError(f"Expected continuous priors; got {type(each).__name__}.")
            if is_improper(each):
                raise ValueError("Expected priors that can be drawn from; got ImproperUniform.")
        self.distributions = {n: d.to_event(len(d.batch_shape)) for n, d in named.items()}

    def __call__(self) -> Values:
        """Draws the parameters."""
        return {name: pyro.sample(name, each) for name, each in self.distributions.items()}


def as_simulator(
    simulator: Any,
    prior: Any = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    data: Sequence[str] | None = None,
) -> Simulator:
    """Makes a simulator of a Pyro model, or of a function with a prior.

    Args:
        simulator: A Pyro model, or with ``prior`` a function of the parameters.
        prior: The distribution of the parameters of a function.
        args: Positional arguments of a model.
        kwargs: Its keyword arguments.
        data: Names of its sites that are data.

    Returns:
        The simulator.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the model or the prior cannot be drawn from.
    """
    if isinstance(simulator, Simulator):
        return simulator
    if prior is not None:
        if args or kwargs or data is not None:
            raise ValueError(
                "Expected args, kwargs and data beside a Pyro model only, because a function takes "
                "the parameters alone; got them with prior."
            )
        return FunctionSimulator(simulator, prior)
    if not callable(simulator):
        raise TypeError(f"Expected a Pyro model, or a function with its prior; got {simulator!r}.")
    try:
        return ModelSimulator(simulator, args, kwargs, data)
    except TypeError as error:
        if args or kwargs or data is not None:
            raise
        raise TypeError(f"{error} A function of parameters needs prior=.") from error


def as_values(name: str, value: Any) -> Tensor:
    """Returns data of a name as a floating-point tensor without a graph."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError):  # what is no number, or rows of several lengths
        raise TypeError(
            f"Expected {name} to be a tensor or an array of numbers; got {value!r:.60}."
        ) from None
    if tensor.is_complex():
        raise TypeError(f"Expected {name} to consist of real numbers; got {tensor.dtype}.")
    if not tensor.numel():
        raise ValueError(f"Expected {name} to have entries; got shape {tuple(tensor.shape)}.")
    return tensor.to(torch.get_default_dtype()).clone()


def _check_drawable(name: str, node: dict[str, Any]) -> None:
    if is_factor(node["fn"]):
        raise ValueError(
            f"Expected a model whose density is that of its draws; got pyro.factor {name!r}, which "
            "draws leave out."
        )
    if is_improper(node["fn"]):
        raise ValueError(
            f"Expected a model with proper priors, which can be drawn from; got {name!r} with "
            "ImproperUniform."
        )
