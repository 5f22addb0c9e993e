"""Posteriors learned from simulations, for whatever data come."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._checks import (
    call_factory,
    caller_level,
    check_choice,
    check_flag,
    check_positive,
    check_seed,
    check_size,
    count,
)
from .._compat import without_handlers
from .._deadline import Deadline
from .._random import forked, seeded
from ..flows import Flow
from ..guides.embedded import AmortizedGuide, EmbeddedFlow
from ..model.simulations import SimulationRun, Simulations, warn_of_failures
from ..model.simulator import Simulator, as_simulator
from ..nn.embedding import DeepSet, Entries, SeriesNet
from ..train import DensityReport, fit_density
from ..train.learned_likelihood import (
    DEFAULTS,
    LEAST,
    TrainingOptions,
    check_training,
    make_flow,
)
from .judge import judge_on
from .layout import Layout
from .posterior import Posterior
from .simulated import SimulatedPosterior
from .truncation import propose_within

__all__ = ["AmortizedPosterior", "fit_amortized"]

#: How many simulations are run before the networks are tried out.
FIRST = 10
#: Entries of the output of a deep set or of a network of series.
OUTPUTS = 32
#: What may mend an amortised guide.
REMEDY = "simulate more, add rounds at this observation, or use fit_posterior"


class Design(NamedTuple):
    """How the flows of an amortised posterior are made.

    Attributes:
        flow: Makes a flow of its features and the features of its context.
        context: A module that reads data, one of ``"vector"``, ``"set"`` and ``"series"``, or
            ``None`` for whatever suits the data.
        ensemble: How many flows.
    """

    flow: Callable[[int, int], Flow]
    context: nn.Module | str | None
    ensemble: int


def fit_amortized(
    simulator: Any,
    prior: Any = None,
    simulations: int | Simulations = 10_000,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    data: Sequence[str] | None = None,
    context: nn.Module | str | None = None,
    flow: Callable[[int, int], Flow] = make_flow,
    ensemble: int = 5,
    observation: Any = None,
    rounds: int = 1,
    executor: Executor | None = None,
    path: str | PathLike[str] | None = None,
    failing: float = 0.1,
    seed: int = 0,
    time_limit: float | None = None,
    progress: bool = True,
    **training: Unpack[TrainingOptions],
) -> AmortizedPosterior:
    r"""Learns the posterior for all data at once, from simulations.

    .. math:: \max_\phi \; \frac{1}{N} \sum_{i=1}^N \log q_\phi(\theta_i \mid x_i), \qquad
        \theta_i \sim p(\theta), \quad x_i \sim p(x \mid \theta_i),

    whose maximum over all densities is :math:`p(\theta \mid x)`: neural posterior estimation. The
    flows live in the unconstrained coordinates of the parameters, so that no draw is ever outside
    of a prior's support.

    With ``observation`` and several ``rounds``, the simulations are spent where they count: from the
    second round on the prior is truncated to the region that holds all but :math:`10^{-4}` of the
    posterior so far at the observation. The result is good there, and nowhere else.

    Args:
        simulator: A Pyro model; or with ``prior`` a function of the parameters that returns data, a
            tensor, an array of numpy or a dictionary of such by name.
        prior: The distribution of a function's parameters: a Pyro distribution, or a dictionary of
            independent ones, as which the function gets the parameters then.
        simulations: How many in all, or what :func:`pyroflows.simulate` has returned.
        args: Positional arguments of a model.
        kwargs: Its keyword arguments.
        data: Names of the model's sites that are data; those with ``obs`` by default.
        context: A module that takes data of shape ``(n, *data_shape)`` to vectors ``(n, k)``; or
            ``"vector"`` for the data themselves, ``"set"`` for a deep set of exchangeable rows,
            ``"series"`` for convolutions along the first dimension. Of several sites it reads one
            vector of all entries. By default a deep set where the rows of a model's data are
            exchangeable, and else the data themselves.
        flow: Makes a flow of the numbers of entries of a vector and of its context.
        ensemble: How many flows are trained; their mixture is the posterior.
        observation: The data for which later rounds are, as for
            :meth:`AmortizedPosterior.posterior_for`.
        rounds: How many rounds share the simulations.
        executor: Runs the simulations; see :func:`pyroflows.simulate`.
        path: A file from which the simulations go on; see :func:`pyroflows.simulate`.
        failing: Largest share of simulations that may fail.
        seed: Seed of all that is random.
        time_limit: Seconds of wall-clock time for the training of each round.
        progress: Whether to show progress bars.
        training: ``validation``, ``batch_size``, ``learning_rate``, ``max_epochs`` (200 by
            default), ``patience``, ``weight_decay`` and ``average`` (0.998 by default), as for
            :func:`pyroflows.fit_density`.

    Returns:
        The posterior for whatever data come.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an option is out of its range, the model or the prior cannot be drawn from,
            too many simulations fail, they are too few, or the embedding does not give vectors.

    Reference:
        Greenberg, Nonnenmacher, Macke, "Automatic posterior transformation for likelihood-free
        inference", 2019, https://arxiv.org/abs/1905.07488

        Deistler, Goncalves, Macke, "Truncated proposals for scalable and hassle-free
        simulation-based inference", 2022, https://arxiv.org/abs/2210.04815

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> amortized = fit_amortized(
        ...     model, simulations=200, data=["y"], ensemble=1, max_epochs=2, progress=False
        ... )
        >>> posterior = amortized.posterior_for(1.0)
        >>> posterior.verdict.ok, abs(float(posterior.sample(seed=0)["mu"].mean()) - 0.5) < 0.05
        (True, True)
    """
    made = as_simulator(simulator, prior, args, kwargs, data)
    design = Design(flow, context, check_size("ensemble", ensemble))
    check_flag("progress", progress)
    if time_limit is not None:
        check_positive("time_limit", time_limit)
    check_training(training)
    options = {**DEFAULTS, **training}
    learner = Learner(made, design, options, check_seed(seed), time_limit, progress)
    if isinstance(simulations, Simulations):
        _check_given(simulations, observation, rounds)
        return learner.learn(simulations)
    shares = _share(check_size("simulations", simulations), check_size("rounds", rounds))
    if rounds > 1 and observation is None:
        raise ValueError(f"Expected an observation for {rounds} rounds; got None.")
    run = SimulationRun(made, shares[-1], seed=seed, executor=executor, path=path, failing=failing)
    learner.try_out(run.extend(min(FIRST, shares[0])), observation)
    amortized = learner.learn(run.extend(shares[0]))
    for number, total in enumerate(shares[1:], 1):
        theta = amortized.propose(observation, total - shares[number - 1], seed + number)
        at = amortized.layout.read(observation)
        amortized = learner.learn(run.extend(total, theta, at), observation)
    warn_of_failures(amortized.simulations)
    return amortized


class Learner:
    """Trains the flows of an amortised posterior.

    Args:
        simulator: The simulator.
        design: How the flows are made.
        training: Options of :func:`pyroflows.fit_density`.
        seed: Seed of the flows and their training.
        time_limit: Seconds for the training of all flows.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        simulator: Simulator,
        design: Design,
        training: dict[str, Any],
        seed: int,
        time_limit: float | None,
        progress: bool,
    ) -> None:
        self.simulator, self.design, self.training = simulator, design, training
        self.seed, self.time_limit, self.progress = seed, time_limit, progress

    def try_out(self, simulations: Simulations, observation: Any) -> None:
        """Makes everything once, so that a mistake shows before all simulations are run."""
        layout = Layout.of(self.simulator, simulations)
        with forked(self.seed):
            self._make_flow(layout, simulations)
        if observation is not None:
            layout.read(observation)

    def learn(self, simulations: Simulations, observation: Any = None) -> AmortizedPosterior:
        """Trains the flows on simulations."""
        layout = Layout.of(self.simulator, simulations)
        z, x = layout.vectors(simulations), layout.join(simulations.x)
        inside = z.isfinite().all(-1)
        z, x = z[inside], x[inside]
        if len(z) < LEAST:
            raise ValueError(
                f"Expected at least {LEAST} simulations with parameters inside of the support of "
                f"the prior, some of which are held out; got {len(z)}."
            )
        deadline, flows, reports = Deadline(self.time_limit), [], []
        for member in range(self.design.ensemble):
            with forked(self.seed + member):
                flow = self._make_flow(layout, simulations)
            flow.standardize(z, x)
            reports.append(self._train(flow, z, x, member, deadline))
            flows.append(flow.requires_grad_(False))
        seen = None if observation is None else layout.read(observation)
        return AmortizedPosterior(self.simulator, layout, flows, simulations, reports, seen)

    def _train(
        self, flow: EmbeddedFlow, z: Tensor, x: Tensor, member: int, deadline: Deadline
    ) -> DensityReport:
        """Trains one flow, in its share of the time that is left for all."""
        left = None
        if self.time_limit is not None:
            left = max(self.time_limit - deadline.elapsed, 1e-3) / (self.design.ensemble - member)
        seed, progress = self.seed + member, self.progress
        return fit_density(
            flow, z, x, seed=seed, time_limit=left, progress=progress, **self.training
        )

    def _make_flow(self, layout: Layout, simulations: Simulations) -> EmbeddedFlow:
        x = layout.join(simulations.x)
        embedding = self._make_embedding(layout)
        outputs = _count_outputs(embedding.to(x), x[:2])
        made = call_factory(
            "flow", self.design.flow, "pf.MAF is", features=layout.features, context=outputs
        )
        if not isinstance(made, Flow) or made.context_shape != (outputs,):
            raise TypeError(
                "Expected flow to make a Flow of (features, context_features); got "
                f"{type(made).__name__}."
            )
        return EmbeddedFlow(made, embedding, layout.shape).to(x)

    def _make_embedding(self, layout: Layout) -> nn.Module:
        given = self.design.context
        if isinstance(given, nn.Module):
            return copy.deepcopy(given)
        if given is not None:
            if not isinstance(given, str):
                raise TypeError(f"Expected context to be a module or a name; got {given!r}.")
            check_choice("context", given, ("vector", "set", "series"))
        if given in ("set", "series") and not layout.shape:
            raise ValueError(f"Expected data with rows for context={given!r}; got single numbers.")
        rows = layout.shape[0] if layout.shape else 1
        if given == "series":
            return SeriesNet(layout.shape, OUTPUTS)
        if given == "set" or (given is None and rows > 1 and self.simulator.is_exchangeable()):
            return DeepSet(layout.shape, OUTPUTS)
        return Entries(layout.shape)


class AmortizedPosterior:
    r"""What :func:`fit_amortized` returns: :math:`q(\theta \mid x)` for whatever data come.

    Args:
        simulator: The simulator.
        layout: How parameters become vectors, and data contexts.
        flows: The flows.
        simulations: What they were trained on.
        reports: How their training went.
        observation: The data for which the prior was truncated, if it was.

    Attributes:
        simulations: The simulations that did not fail.
        reports: A :class:`pyroflows.train.DensityReport` for each flow.
    """

    def __init__(
        self,
        simulator: Simulator,
        layout: Layout,
        flows: Sequence[EmbeddedFlow],
        simulations: Simulations,
        reports: Sequence[DensityReport],
        observation: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.simulator, self.layout, self.flows = simulator, layout, list(flows)
        self.simulations, self.reports = simulations, list(reports)
        self.observation = None if observation is None else dict(observation)

    def __repr__(self) -> str:
        given = " at one observation" if self.observation is not None else ""
        return (
            f"<Amortised posterior of {count(len(self.flows), 'flow')}{given}, from "
            f"{self.simulations!r}>"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A density holds a graph, which cannot be pickled, and is made again in no time.
        return {name: value for name, value in vars(self).items() if name != "layout"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self.layout = Layout.of(self.simulator, self.simulations)

    def posterior_for(
        self, x: Any, *, judge: bool = True, seed: int = 0, time_limit: float | None = None
    ) -> Posterior:
        """Returns the posterior given data.

        That of a Pyro model is corrected by importance weights and judged, as by
        :func:`pyroflows.judge`. That of a function is neither, which its verdict says.

        Args:
            x: The data: a tensor or array of the shape of the simulated data, or a dictionary of
                such by the names of the sites.
            judge: Whether to judge it; without, draws are not corrected.
            seed: Seed of all that is random in the checks.
            time_limit: Seconds of wall-clock time for the checks.

        Returns:
            The posterior.

        Raises:
            TypeError: If ``x`` does not consist of numbers.
            ValueError: If a site is missing, of another shape, or not finite.

        Warns:
            UserWarning: If data are outside of the range of the simulations, or not those for which
                the prior was truncated.
        """
        check_flag("judge", judge)
        deadline = Deadline(
            None if time_limit is None else check_positive("time_limit", time_limit)
        )
        values = self.layout.read(x)
        self._warn(values)
        guide = self.guide_for(values)
        with seeded(seed), without_handlers():
            if not self.simulator.has_likelihood:
                return SimulatedPosterior(guide, self.layout.density, values)
            with forked(0):
                density = self.simulator.density(values).rotated(guide.centres())
            if not judge:
                return Posterior(guide, density)
            return judge_on(guide, density, deadline, remedy=REMEDY)

    def guide_for(self, x: Any) -> AmortizedGuide:
        """Returns the guide given data, without a look at whether they are like the simulations.

        Args:
            x: The data, as for :meth:`posterior_for`.

        Returns:
            The guide, over unconstrained vectors.
        """
        values = self.layout.read(x)
        rows = {name: value.unsqueeze(0) for name, value in values.items()}
        context = self.layout.join(rows).squeeze(0)
        return AmortizedGuide(self.flows, context, self.layout.density.centres)

    def propose(self, x: Any, n: int, seed: int | None = None) -> dict[str, Tensor]:
        """Draws parameters from the prior, truncated to where the posterior given data has mass.

        Args:
            x: The data, as for :meth:`posterior_for`.
            n: How many draws.
            seed: Seed of the draws.

        Returns:
            For each parameter a tensor of shape ``(n, *shape)``.
        """
        self._warn(self.layout.read(x))
        with forked(seed):
            return propose_within(self.guide_for(x), self.layout.density, check_size("n", n))

    def _warn(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            seen = self.simulations.x[name]
            outside = (value < seen.amin(0)) | (value > seen.amax(0))
            if bool(outside.any()):
                warnings.warn(
                    f"The posterior is a guess, because {int(outside.sum())} of {value.numel()} "
                    f"numbers in {name} are outside of the range of the simulations.",
                    stacklevel=caller_level(),
                )
        given = self.observation
        if given is not None and any(not torch.equal(given[n], values[n]) for n in given):
            warnings.warn(
                "The posterior was refined at another observation, and may be wrong at this one.",
                stacklevel=caller_level(),
            )


def _count_outputs(embedding: nn.Module, x: Tensor) -> int:
    """The entries of the output of an embedding, which has to be a vector for each data set."""
    training = embedding.training
    try:
        with torch.no_grad():
            out = embedding.eval()(x)
    except Exception as error:
        raise ValueError(
            f"Expected context to take data of shape {tuple(x.shape)}; it raised "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    finally:
        embedding.train(training)
    vectors = isinstance(out, Tensor) and out.dim() == 2 and len(out) == len(x)
    if not vectors or not out.shape[1] or not bool(out.isfinite().all()):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"Expected context to give finite vectors of shape ({len(x)}, k) for data of shape "
            f"{tuple(x.shape)}; got {got}."
        )
    return int(out.shape[1])


def _share(total: int, rounds: int) -> list[int]:
    """How many simulations there are after each round."""
    if total < LEAST * rounds:
        raise ValueError(
            f"Expected at least {LEAST} simulations a round, some of which are held out; got "
            f"{total} for {count(rounds, 'round')}."
        )
    return [total * (number + 1) // rounds for number in range(rounds)]


def _check_given(simulations: Simulations, observation: Any, rounds: int) -> None:
    if rounds > 1 or observation is not None:
        raise ValueError(
            "Expected a number of simulations where rounds are simulated at an observation; got "
            f"{simulations!r}."
        )
