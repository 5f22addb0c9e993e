"""A likelihood learned from simulations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from numbers import Real
from os import PathLike
from typing import Any, TypedDict

import pyro
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._checks import (
    call_factory,
    check_flag,
    check_positive,
    check_seed,
    check_size,
    check_tensor,
)
from .._random import forked
from ..distributions import FlowDistribution
from ..flows import NSF, Flow
from ..guides.embedded import EmbeddedFlow
from ..model.simulations import (
    FIRST,
    SimulationRun,
    Simulations,
    check_parameters,
    warn_of_failures,
)
from ..model.simulator import FunctionSimulator
from .likelihood import DensityReport, check_options, fit_density
from .loop import LoopOptions
from .points import check_fraction

__all__ = [
    "LearnedLikelihood",
    "TrainingOptions",
    "check_training",
    "fit_likelihood",
    "make_flow",
]

#: Simulations of which at least a few can be held out.
LEAST = 20
#: Options of the training that suit networks of many simulations.
DEFAULTS: dict[str, Any] = {"max_epochs": 200, "average": 0.998}


class TrainingOptions(TypedDict, total=False):
    """Options of the training, by keyword; see :func:`pyroflows.fit_density`."""

    validation: float
    batch_size: int
    learning_rate: float
    max_epochs: int
    patience: int
    weight_decay: float
    average: float | None


def check_training(options: Mapping[str, Any]) -> None:
    """Raises an error unless all options are those of the training, and in their ranges.

    That is before the simulations, which may take long.
    """
    for name in options:
        if name not in TrainingOptions.__annotations__:
            known = ", ".join(TrainingOptions.__annotations__)
            raise TypeError(f"Expected options of the training ({known}); got {name!r}.")
    check_options(options)
    LoopOptions(average=options.get("average"))
    validation = options.get("validation", 0.1)
    if isinstance(validation, bool) or not isinstance(validation, Real):
        raise TypeError(f"Expected validation to be a number; got {validation!r}.")
    check_fraction(float(validation))


def make_flow(features: int, context_features: int) -> Flow:
    """Makes a neural spline flow of autoregressive layers, which score fast.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context.
    """
    return NSF(features, context_features, transforms=3, coupling=False, bins=16, hidden=(64, 64))


def fit_likelihood(
    simulator: Callable[..., Any],
    prior: Any,
    simulations: int | Simulations = 10_000,
    *,
    flow: Callable[[int, int], Flow] = make_flow,
    executor: Executor | None = None,
    path: str | PathLike[str] | None = None,
    failing: float = 0.1,
    seed: int = 0,
    time_limit: float | None = None,
    progress: bool = True,
    **training: Unpack[TrainingOptions],
) -> LearnedLikelihood:
    r"""Learns the likelihood of one observation from simulations.

    .. math:: \max_\phi \; \frac{1}{N} \sum_{i=1}^N \log q_\phi(x_i \mid \theta_i), \qquad
        \theta_i \sim p(\theta), \quad x_i \sim p(x \mid \theta_i):

    neural likelihood estimation. One network serves any number of independent observations, as
    :math:`\prod_k q(x_k \mid \theta)`, and any prior whose mass lies where that of the simulations
    does.

    Args:
        simulator: A function of the parameters that returns one observation; see
            :func:`pyroflows.simulate`.
        prior: The distribution of the parameters: a Pyro distribution, or a dictionary of
            independent ones.
        simulations: How many, or what :func:`pyroflows.simulate` has returned.
        flow: Makes a flow of the numbers of entries of an observation and of the parameters.
        executor: Runs the simulations; see :func:`pyroflows.simulate`.
        path: A file from which the simulations go on; see :func:`pyroflows.simulate`.
        failing: Largest share of simulations that may fail.
        seed: Seed of all that is random.
        time_limit: Seconds of wall-clock time for the training.
        progress: Whether to show a progress bar.
        training: ``validation``, ``batch_size``, ``learning_rate``, ``max_epochs`` (200 by
            default), ``patience``, ``weight_decay`` and ``average`` (0.998 by default), as for
            :func:`pyroflows.fit_density`.

    Returns:
        The likelihood, with a Pyro model for :func:`pyroflows.fit_posterior`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an option is out of its range, too many simulations fail, they are too few,
            or data are whole numbers, which have no density.

    Reference:
        Papamakarios, Sterratt, Murray, "Sequential neural likelihood: Fast likelihood-free
        inference with autoregressive flows", 2019, https://arxiv.org/abs/1805.07226

    Example:
        >>> import pyro.distributions as dist, pyroflows as pf
        >>> def simulator(mu):
        ...     return mu + torch.randn(())
        >>> likelihood = fit_likelihood(
        ...     simulator, dist.Normal(0.0, 1.0), 500, max_epochs=2, progress=False
        ... )
        >>> x = torch.tensor([0.5, 1.0, 1.5])
        >>> posterior = pf.fit_posterior(likelihood.model, (x,), progress=False)
        >>> abs(float(posterior.sample(1000, seed=0)["theta"].mean()) - 0.75) < 0.1
        True
    """
    check_training(training)
    check_seed(seed)
    check_flag("progress", progress)
    if time_limit is not None:
        check_positive("time_limit", time_limit)
    made = FunctionSimulator(simulator, prior)
    if not isinstance(simulations, Simulations):
        total = check_size("simulations", simulations, least=LEAST)
        run = SimulationRun(made, total, seed=seed, executor=executor, path=path, failing=failing)
        with forked(seed):
            _make_flow(flow, made, run.extend(FIRST))  # so that a mistake shows early
        simulations = run.extend(total)
        warn_of_failures(simulations)
    if len(simulations) < LEAST:
        raise ValueError(f"Expected at least {LEAST} simulations; got {len(simulations)}.")
    _check_continuous(simulations.x)
    with forked(seed):
        embedded, x, theta = _make_flow(flow, made, simulations)
    embedded.standardize(x, theta)
    report = fit_density(
        embedded,
        x,
        theta,
        seed=seed,
        time_limit=time_limit,
        progress=progress,
        **{**DEFAULTS, **training},
    )
    shapes = {name: value.shape[1:] for name, value in simulations.x.items()}
    return LearnedLikelihood(made, embedded.requires_grad_(False), shapes, report)


def _make_flow(
    make: Callable[[int, int], Flow], simulator: FunctionSimulator, simulations: Simulations
) -> tuple[EmbeddedFlow, Tensor, Tensor]:
    """Makes the flow, with the data and the parameters as rows."""
    priors = simulator.prior.distributions
    check_parameters(simulations, {name: prior.event_shape for name, prior in priors.items()})
    x = _joined(simulations.x)
    theta = _joined({name: simulations.theta[name] for name in priors})
    made = call_factory("flow", make, "pf.MAF is", features=x.shape[1], context=theta.shape[1])
    if not isinstance(made, Flow) or made.context_shape != theta.shape[1:]:
        raise TypeError(
            "Expected flow to make a Flow of (features, context_features); got "
            f"{type(made).__name__}."
        )
    return EmbeddedFlow(made, nn.Identity(), theta.shape[1:]).to(x), x, theta


class LearnedLikelihood(nn.Module):
    r"""What :func:`fit_likelihood` returns: :math:`q(x \mid \theta)`, a distribution when called.

    Args:
        simulator: The function with its prior.
        flow: The flow.
        shapes: For each name the shape of one observation.
        report: How the training went.

    Attributes:
        report: The :class:`pyroflows.train.DensityReport`.
    """

    def __init__(
        self,
        simulator: FunctionSimulator,
        flow: EmbeddedFlow,
        shapes: Mapping[str, torch.Size],
        report: DensityReport,
    ) -> None:
        super().__init__()
        self.simulator, self.flow, self.report = simulator, flow, report
        self.shapes = dict(shapes)

    def forward(self, theta: Mapping[str, Tensor]) -> FlowDistribution:
        """Returns the distribution of an observation, as a vector of all its entries.

        Args:
            theta: For each parameter a tensor of shape ``(*, *shape)``.

        Returns:
            A distribution of batch shape ``(*)`` and event shape ``(entries,)``.
        """
        priors = self.simulator.prior.distributions
        if not isinstance(theta, Mapping) or set(theta) != set(priors):
            got = ", ".join(map(str, theta)) if isinstance(theta, Mapping) else type(theta).__name__
            raise ValueError(f"Expected theta by the names {', '.join(priors)}; got {got}.")
        parts = []
        for name, prior in priors.items():
            value = check_tensor(name, theta[name], prior.event_shape)
            parts.append(value.flatten(-prior.event_dim) if prior.event_dim else value[..., None])
        return self.flow(torch.cat(parts, -1))

    def model(self, x: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A Pyro model of independent observations, with the prior and this likelihood.

        Args:
            x: Observations of shape ``(n, *shape)``, or a dictionary of such by name.

        Returns:
            The parameters.

        Raises:
            ValueError: If the observations are of another shape.
        """
        rows = self._read(x)
        theta = self.simulator.prior()
        with pyro.plate("observations", len(rows)):
            pyro.sample("x", self(theta), obs=rows)
        return theta

    def _read(self, x: Any) -> Tensor:
        named = x if isinstance(x, Mapping) else {next(iter(self.shapes)): x}
        if set(named) != set(self.shapes):
            names = ", ".join(map(repr, self.shapes))
            raise ValueError(f"Expected observations by the names {names}; got {list(named)}.")
        for name, shape in self.shapes.items():
            value = check_tensor(name, named[name], shape)
            if value.dim() != 1 + len(shape) or not len(value):
                sizes = ", ".join(["n", *map(str, shape)])
                raise ValueError(
                    f"Expected {name} of shape ({sizes}); got {tuple(named[name].shape)}."
                )
        return _joined({name: named[name] for name in self.shapes})


def _joined(values: Mapping[str, Tensor]) -> Tensor:
    """Tensors of shapes ``(n, *shape)`` as rows of all their entries."""
    return torch.cat([value.unsqueeze(-1).flatten(1) for value in values.values()], -1)


def _check_continuous(x: Mapping[str, Tensor]) -> None:
    for name, value in x.items():
        columns: Sequence[Tensor] = value.reshape(len(value), -1).unbind(1)
        if any(bool((column == column.round()).all()) for column in columns):
            raise ValueError(
                f"Expected data with a density; got whole numbers only in an entry of {name}. Add "
                "uniform noise to counts, or use fit_amortized."
            )
