"""One call from a model to its posterior."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._checks import check_device, check_positive, check_size
from .._compat import without_handlers
from .._deadline import Deadline
from .._random import seeded
from ..flows import Flow
from ..guides import AutoFlow, AutoMixture
from ..guides.auto import FlowGuide
from ..model.checks import check_arguments
from ..model.density import LogDensity
from ..model.minibatch import MiniBatchDensity, log_density_of
from ..train import processes as distributed
from ..train.checkpoint import Checkpoint
from ..train.objectives import Objective, PathELBO
from ..train.training import PARTICLES, train
from .census import Census, take_census, widened, without_end
from .gaussian import Gaussian, Gaussians
from .posterior import Posterior, Rung
from .rungs import flow_of_fit, wide_flow_of_fit
from .verdict import MISSED_LIMIT

__all__ = ["fit_posterior"]

#: Most gradient steps of a fit.
STEPS = 6000
# Most posteriors need the first few steps only. What they leave undone is better done by a fresh flow than by going on:
# a step size that has decayed once and is raised again loses a quarter of the effective draws on funnels.
SHORT, LONG, WIDE = 150, 1500, 2500
# Steps between two looks at the verdict on a guide that is trained on.
ROUNDS = (150, 1350)
MIXTURE_ROUNDS = (150, 450)
# Draws of each component from which the weights of a mixture are found.
WEIGHING_DRAWS = 2000
POLISH_TRAJECTORIES = 30
# Where so many importance draws are effective, trajectories in the base space cost less than what is left of the error.
POLISH_ESS = 0.5


def fit_posterior(
    model: Callable[..., Any],
    args: Sequence[Any] | DataLoader = (),
    kwargs: Mapping[str, Any] | None = None,
    guide: str | AutoFlow | Callable[[int], Any] = "auto",
    seed: int | None = 0,
    time_limit: float | None = None,
    progress: bool = True,
    device: str | torch.device | None = None,
    steps: int = STEPS,
    compile: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    objective: Objective | None = None,
) -> Posterior:
    r"""Finds the posterior of a model by a ladder of flow guides, and says whether to trust it.

    The model is captured as one batched log density. Newton steps in whitened units, from many starts at once, take a
    census of its modes and give a Gaussian for each; then come, until the verdict is ok: the best Gaussian; where there
    are separate modes, a mixture of flows, one for each; a flow trained in rounds; a wider and deeper one; and at last the
    best guide's draws polished by Hamiltonian trajectories in its base space. The best so far is kept, and ``rungs`` of the
    posterior tell what was tried. A flow is trained to maximise the ELBO

    .. math:: \mathcal{L}(\phi) = \mathbb{E}_{x \sim N(0, I)} [\log p(z, \mathrm{data}) - \log q_\phi(z)],
        \quad z = f_\phi(x),

    by its path gradient :math:`\mathbb{E}[(\nabla_z \log p - \nabla_z \log q)^\top \partial z / \partial \phi]`, whose
    variance vanishes at an exact guide, with Adam and a step size that decays to zero along a cosine.

    Discrete latent sites are summed out. Ctrl-C ends the training and returns the best posterior so far. Under an
    initialised ``torch.distributed`` group all processes call this alike; the particles of a step are shared out among
    them, and the result is that of one process.

    Args:
        model: A Pyro model.
        args: Its positional arguments; or a ``DataLoader`` whose batches, shuffled or of one size, are its arguments, for a
            model that scales the likelihood of a batch up to all rows, as a plate with a ``subsample_size`` does. Models
            with such plates, and loaders, are trained by stochastic gradients and judged on all data.
        kwargs: Its keyword arguments.
        guide: ``"auto"``, the ladder; a preset such as ``pyroflows.RealNVP`` or any callable from the number of features to
            a flow; or an :class:`AutoFlow` of this model, which is trained on from where it is if it has been trained.
            Such a guide is trained in rounds until the verdict is ok, and its draws are not polished.
        seed: Seed of all that is random here; the same seed gives the same posterior. The random state outside is left as
            it was. ``None`` draws from that state.
        time_limit: Seconds of wall-clock time for the fit; the step size then decays with the time.
        progress: Whether to show a progress bar.
        device: Where to run: tensors in ``args`` and ``kwargs`` and a module model are moved there.
        steps: Most gradient steps to take in all.
        compile: Whether to compile the flow's part of a step by ``torch.compile``: half a minute at first, then steps in two
            thirds of the time.
        checkpoint: A file that is written as the training goes on, and from which a fit that was killed goes on to the
            same result.
        objective: What flows are trained for, with its number of particles: any of
            :mod:`pyroflows.train.objectives`; by default ``PathELBO(num_particles=256)``. ``ForwardKL`` and
            ``MMD`` need draws of the posterior, by MCMC, say. The verdict does not depend on it.

    Returns:
        The posterior, with its verdict.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the model cannot be fitted: it has no continuous latent site, its density is not finite where it
            starts, a latent changes its shape; or if the guide belongs to another model.

    Reference:
        Agrawal, Sheldon, Domke, "Advances in black-box VI: Normalizing flows, importance weighting, and optimization",
        2020, https://arxiv.org/abs/2006.10343

        Vaitl, Winkler, Richter, Kessel, "Fast and unified path gradient estimators for normalizing flows", 2024,
        https://arxiv.org/abs/2403.15881

        Hoffman, Sountsov, Dillon, Langmore, Tran, Vasudevan, "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using
        neural transport", 2019, https://arxiv.org/abs/1903.03704

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(x[0] * x[1], 1.0), obs=torch.tensor(1.0))
        >>> posterior = fit_posterior(model, steps=100, progress=False)
        >>> posterior.sample(10)["x"].shape
        torch.Size([10, 2])
    """
    if not callable(model):
        raise TypeError(f"Expected model to be a callable with Pyro statements; got {model!r}.")
    if time_limit is not None:
        time_limit = check_positive("time_limit", time_limit)
    check_size("steps", steps, least=0)
    if objective is not None and not isinstance(objective, Objective):
        raise TypeError(
            f"Expected objective to be one of pyroflows.train.objectives; got {objective!r}."
        )
    objective = PathELBO(PARTICLES) if objective is None else objective
    deadline = Deadline(time_limit)
    args, kwargs = _on_device(device, model, args, kwargs)
    with seeded(distributed.agree(seed)), without_handlers():
        trained = log_density_of(
            model,
            args,
            kwargs,
            batch_size=distributed.share(objective.num_particles),
            device=device,
        )
        density = trained.full
        given = None if isinstance(guide, str) and guide == "auto" else _make_guide(guide, density)
        settings = {
            "deadline": deadline,
            "progress": progress,
            "compile": compile,
            "objective": objective,
            "checkpoint": None
            if checkpoint is None
            else Checkpoint(checkpoint, {"seed": seed, "steps": steps}),
        }
        ladder = _Ladder(trained, _finite_start(density), steps, settings, given)
        rungs: list[Rung] = []
        interrupted = False

        def judged(name: str, guide: FlowGuide, trajectories: int = 0) -> Posterior:
            kept = copy.deepcopy(guide) if given is None else guide
            posterior = Posterior(
                kept, density, fits=ladder.fits, trajectories=trajectories, endless=ladder.endless
            )
            rungs.append(Rung(name, deadline.elapsed, posterior.verdict))
            return posterior

        try:
            for rung in ladder.climb():
                ladder.see(judged(*rung))
                if ladder.best is not None and _settled(ladder.best, deadline):
                    break
        except KeyboardInterrupt:
            interrupted = True
            ladder.see(judged("interrupted", ladder.guide))
    best = ladder.best
    assert best is not None
    best.history = torch.stack(ladder.history).tolist() if ladder.history else []
    best.seconds, best.interrupted, best.rungs = deadline.elapsed, interrupted, rungs
    return best


def _settled(posterior: Posterior, deadline: Deadline) -> bool:
    """Whether there is nothing more to try; all processes agree on it, for each reads a clock of its own."""
    return distributed.agree(
        posterior.verdict.ok or posterior.endless is not None or deadline.passed
    )


class _Ladder:
    """What is tried in turn, from the cheapest on; each rung gives a guide to be judged."""

    def __init__(
        self,
        trained: LogDensity | MiniBatchDensity,
        start: Tensor,
        steps: int,
        settings: Mapping[str, Any],
        given: tuple[AutoFlow, bool] | None,
    ) -> None:
        self.trained, self.density, self.start, self.settings = (
            trained,
            trained.full,
            start,
            settings,
        )
        self.left = steps
        self.history: list[Tensor] = []
        self.fits: Gaussians | None = None
        self.endless: Tensor | None = None
        self.last: Posterior | None = None
        self.best: Posterior | None = None
        self.given = given
        self.guide: FlowGuide = self._made(flow_of_fit) if given is None else given[0]

    def see(self, posterior: Posterior) -> None:
        """Takes note of what came of the rung."""
        self.last, self.best = posterior, _better(self.best, posterior)

    def climb(self) -> Iterator[tuple[Any, ...]]:
        """The rungs, for as long as they are asked for: a name, a guide, and trajectories of polish if there are any."""
        census = take_census(self.density, self.start)
        self.fits = census.fits
        self.endless = without_end(self.density, census.best)
        if self.given is None:
            yield from self._climb_all(census)
        else:
            yield from self._follow(census, *self.given)

    def _polish(self, least_ess: float = POLISH_ESS) -> Iterator[tuple[str, FlowGuide, int]]:
        best = self.best
        if (
            best is not None
            and best.verdict.ess >= least_ess
            and not best.verdict.missed > MISSED_LIMIT
        ):
            yield f"polish, {POLISH_TRAJECTORIES} trajectories", best.guide, POLISH_TRAJECTORIES

    def _climb_all(self, census: Census) -> Iterator[tuple[Any, ...]]:
        auto = self.guide
        assert isinstance(auto, AutoFlow)
        auto.whiten(census.best.loc, census.best.scale_tril)
        yield "Gaussian", auto
        assert self.last is not None
        if self.last.surprises is not None and len(self.last.surprises):
            # Ascents from where the Gaussian is surprised the most find modes that are too narrow for the census to hit.
            census = widened(self.density, census, self.last.surprises)
            self.fits = census.fits
        if len(census.weights) > 1:
            yield from self._mixture(census.modes)
        yield from self._train(auto, "flow", (SHORT,))
        yield from self._train(self._made(flow_of_fit, census.best), "flow", (LONG,))
        yield from self._polish()
        yield from self._train(self._made(wide_flow_of_fit, census.best), "wide flow", (WIDE,))
        yield from self._polish(least_ess=0.0)

    def _follow(
        self, census: Census, auto: AutoFlow, fresh: bool
    ) -> Iterator[tuple[str, FlowGuide]]:
        """The rungs of a guide that the user has chosen."""
        if fresh:
            auto.whiten(census.best.loc, census.best.scale_tril)
        if not self.left:
            yield "as it is", auto
        yield from self._train(auto, "guide", (*ROUNDS, max(0, self.left - sum(ROUNDS))))

    def _train(
        self, auto: AutoFlow, name: str, rounds: Sequence[int]
    ) -> Iterator[tuple[str, FlowGuide]]:
        self.guide = auto
        taken = 0
        for steps in rounds:
            if min(steps, self.left):
                taken += self._steps(auto.flow, steps)
                yield f"{name}, {taken} steps", auto

    def _mixture(self, modes: Gaussians) -> Iterator[tuple[str, FlowGuide]]:
        """A flow for each mode, weighted by evidence."""
        count = len(modes.elbo)
        mixture = AutoMixture(self.density.continuous_model, count, flow=flow_of_fit)
        self.density.introduce(mixture)
        for k in range(count):
            mode = modes.one(k)
            mixture.whiten(k, mode.loc, mode.scale_tril)
        weigh(self.density, mixture)
        self.guide = mixture
        yield f"mixture of {count} Gaussians", mixture
        taken = 0
        for steps in MIXTURE_ROUNDS:
            if self.left:
                for flow in mixture.flows:
                    self._steps(flow, steps)
                weigh(self.density, mixture)
                taken += steps
                yield f"mixture of {count} flows, {taken} steps each", mixture

    def _made(self, flow: Callable[[int], Any], gaussian: Gaussian | None = None) -> AutoFlow:
        auto = AutoFlow(self.density.continuous_model, flow=flow)
        self.density.introduce(auto)
        if gaussian is not None:
            auto.whiten(gaussian.loc, gaussian.scale_tril)
        return auto

    def _steps(self, flow: Flow, steps: int) -> int:
        report = train(flow, self.trained, self.history, min(steps, self.left), **self.settings)
        self.left -= report.steps
        return report.steps


@torch.no_grad()
def weigh(density: LogDensity, mixture: AutoMixture, rounds: int = 200) -> None:
    r"""Sets the weights of a mixture to those that minimise the forward divergence from the posterior.

    With draws of all components and weights :math:`w = p / q` the divergence is least at the fixed point of

    .. math:: \pi_k \leftarrow \mathbb{E}_q \left[ w(z)\, \frac{\pi_k q_k(z)}{q(z)} \right] / \mathbb{E}_q [w(z)].

    Where components do not overlap, these are their shares of the evidence.

    Args:
        density: The log density.
        mixture: The mixture.
        rounds: How often to apply the update.
    """
    count = len(mixture.flows)
    law = mixture.get_posterior()
    z = torch.cat([component.sample((WEIGHING_DRAWS,)) for component in law.components])
    each = law.component_log_probs(z) - mixture.logits.log_softmax(-1)
    # The draws come from all components in equal numbers, whatever the weights.
    ratio = density.log_prob(z).nan_to_num(nan=-math.inf, posinf=-math.inf) - (
        each.logsumexp(-1) - math.log(count)
    )
    # What no component can bring back counts nothing.
    ratio = ratio.masked_fill((each == -math.inf).all(-1), torch.finfo(ratio.dtype).min)
    weights = ratio.softmax(0)
    log_pi = torch.full_like(mixture.logits, -math.log(count))
    for _ in range(rounds):
        log_pi = (weights @ (each + log_pi).softmax(-1).nan_to_num(nan=0.0)).clamp(min=1e-12).log()
    mixture.logits.copy_(log_pi.log_softmax(-1))


def _better(first: Posterior | None, second: Posterior) -> Posterior:
    """The one to keep: trusted, without a mode missed, with the more effective draws."""

    def merit(posterior: Posterior) -> tuple[bool, bool, float]:
        verdict = posterior.verdict
        return verdict.ok, not verdict.missed > MISSED_LIMIT, verdict.ess

    return second if first is None or merit(second) >= merit(first) else first


def _make_guide(guide: Any, density: LogDensity) -> tuple[AutoFlow, bool]:
    """The guide, and whether it has yet to meet its model."""
    if isinstance(guide, AutoFlow):
        auto = guide
    elif isinstance(guide, type) and issubclass(guide, AutoFlow):
        auto = guide(density.continuous_model)
    elif callable(guide) and not isinstance(guide, torch.nn.Module):
        auto = AutoFlow(density.continuous_model, flow=guide)
    else:
        got = (
            f"a made {type(guide).__name__}" if isinstance(guide, torch.nn.Module) else repr(guide)
        )
        raise TypeError(
            f"Expected guide to be 'auto', an AutoFlow, or a flow such as pyroflows.RealNVP; got {got}."
        )
    fresh = auto.prototype_trace is None
    if fresh:
        density.introduce(auto)
    nodes = list(auto.prototype_trace.iter_stochastic_nodes())
    of_guide = [(name, tuple(node["value"].shape)) for name, node in nodes]
    of_model = [(site.name, tuple(site.shape)) for site in density.sites]
    for name, node in nodes:
        if of_guide == of_model and not density.has_support(name, node["fn"].support):
            raise ValueError(
                f"Expected a guide of this model; got one in which {name!r} has support {node['fn'].support}."
            )
    if of_guide != of_model:
        raise ValueError(
            f"Expected a guide of this model, with latent sites {of_model}; got one with {of_guide}."
        )
    return auto, fresh


def _finite_start(density: LogDensity, tries: int = 256) -> Tensor:
    """The initial point, or the densest of some random ones where its density is not finite."""
    generator = torch.Generator().manual_seed(0)
    spread = 4 * torch.rand(tries, density.features, generator=generator, device="cpu") - 2
    for points in (density.initial.unsqueeze(0), spread.to(density.initial)):
        values, slopes = density.value_and_grad(points)
        usable = values.isfinite() & slopes.isfinite().all(-1)
        if bool(usable.any()):
            return points[values.masked_fill(~usable, -math.inf).argmax()]
    at_fault = [
        f"{name!r} gives {float(value):g}"
        for name, value in density.site_log_probs(density.initial).items()
        if not bool(value.isfinite())
    ]
    where = f"site {', site '.join(at_fault)}" if at_fault else "its gradient is not finite"
    raise ValueError(
        f"Expected a model with a finite log density where it starts; {where}. Look for NaN in the data, and for data "
        "outside of a support."
    )


def _on_device(
    device: str | torch.device | None, model: Any, args: Any, kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """The arguments, checked and moved; the batches of a loader are moved as they come."""
    loader = args if isinstance(args, DataLoader) else None
    args, kwargs = check_arguments(() if loader is not None else args, kwargs)
    if device is not None:
        check_device("device", device)
        if isinstance(model, torch.nn.Module):
            model.to(device)
        args = tuple(_moved(value, device) for value in args)
        kwargs = {name: _moved(value, device) for name, value in kwargs.items()}
    return (args if loader is None else loader), kwargs


def _moved(value: Any, device: str | torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
