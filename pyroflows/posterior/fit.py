"""One call from a model to its posterior."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.utils.data import DataLoader

from .._checks import (
    caller_level,
    check_device,
    check_flag,
    check_model,
    check_positive,
    check_size,
)
from .._compat import record_operations, without_handlers
from .._deadline import Deadline
from .._random import forked, seeded
from ..flows import Flow
from ..guides import AutoFlow, AutoStructuredFlow
from ..model.checks import check_arguments
from ..model.density import LogDensity
from ..model.minibatch import log_density_of
from ..model.notices import warn_of_oversights
from ..train import processes
from ..train.checkpoint import Checkpoint
from ..train.learning import choose_parameters, learn_parameters
from ..train.objectives import Objective, PathELBO
from ..train.training import PARTICLES
from ..transforms import Transform
from ..univariate import Univariate
from .climb import Climb, climb_ladder
from .ladder import LADDER, make_own_rung, make_own_structured_rung
from .posterior import Posterior

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["TrainOptions", "fit_posterior"]

#: Most gradient steps of a fit.
STEPS = 6000
#: Several processes pay where an evaluation takes so many times as long as a message.
PAYS = 4.0
#: Most steps in which parameters of the model are learned.
LEARNING_STEPS = 2000


class TrainOptions(TypedDict, total=False):
    """Options of the training of each flow; see :func:`fit_posterior`."""

    progress: bool
    compile: bool
    checkpoint: str | PathLike[str] | None
    objective: Objective | None
    learn: bool | Sequence[str]


def fit_posterior(
    model: Callable[..., Any],
    args: Sequence[Any] | DataLoader = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    guide: str | AutoFlow | AutoStructuredFlow | Callable[[int], Any] = "auto",
    seed: int | None = 0,
    time_limit: float | None = None,
    device: str | torch.device | None = None,
    steps: int = STEPS,
    **training: Unpack[TrainOptions],
) -> Posterior:
    r"""Finds the posterior of a model by a ladder of flow guides, and says whether to trust it.

    The model is captured as one batched log density. If it has globals and locals, or many rows of
    data, the first guide follows its structure: an :class:`AutoStructuredFlow`. Otherwise, or if
    that is not trusted, Newton steps in whitened units, from many starts at once, take a census of
    the modes and give a Gaussian for each. Then come, until the verdict is ok: the best Gaussian;
    where there are separate modes, a mixture of flows, one for each; a flow, trained for few steps
    and for many; where either is cut short, fresh flows that are fitted to Hamiltonian chains from
    its draws; a wider and deeper one; and the best guide's draws polished by Hamiltonian
    trajectories in its base space. The best attempt is kept, and all
    are listed in ``rungs`` of the posterior. Above 64 latents the ascents of the census are of
    limited memory, and the whole curvature is taken at a few of their ends; above 256 roots of
    covariances are of low rank, no step costs more than linearly in the number of latents, and the
    ladder has no more than the Gaussian, the flows and the polish. A flow is trained to maximise
    the ELBO

    .. math:: \mathcal{L}(\phi)
        = \mathbb{E}_{x \sim N(0, I)} [\log p(z, \mathrm{data}) - \log q_\phi(z)],
        \quad z = f_\phi(x),

    by its path gradient
    :math:`\mathbb{E}[(\nabla_z \log p - \nabla_z \log q)^\top \partial z / \partial \phi]`, whose
    variance vanishes at an exact guide, with Adam and a step size that
    decays to zero along a cosine.

    Discrete latent sites are summed out. Parameters of the model, of ``pyro.param`` and of modules,
    are held at their present values, and a warning names them unless they require no gradient; or
    they are learned, by ``learn``, before the posterior is found at what was learned.
    Another warning says that nothing is observed. Ctrl-C ends the training and returns the best
    posterior so far. Under an initialised ``torch.distributed`` group all processes call this
    alike; the points of every evaluation of the density, in training and outside of it, are shared
    out among them, and the result is that of one process. A warning says where an evaluation takes
    too little time for that to pay.

    Args:
        model: A Pyro model.
        args: Its positional arguments; or a ``DataLoader`` whose batches, shuffled or of one size,
            are its arguments, for a model that scales the likelihood of a batch up to all rows, as
            a plate with a ``subsample_size`` does. Models with such plates, and loaders, are
            trained by stochastic gradients and judged on all data.
        kwargs: Its keyword arguments.
        guide: ``"auto"``, the ladder; a flow such as ``pyroflows.RealNVP`` or any callable from
            the number of features to a flow; or an :class:`AutoFlow` of this model, which is
            trained in place, from where it is if it has been trained. Such a guide is trained in
            rounds until the verdict is ok, and its draws are not polished. Under a time limit it
            is judged before the first round too.
        seed: Seed of all that is random here; the same seed gives the same posterior. The random
            state outside is left as it was. ``None`` draws from that state.
        time_limit: Seconds of wall-clock time for the fit; the step size then decays with the time.
            The first limited fit of a process takes a few seconds more, which do not count, in
            which torch and ArviZ load parts of theirs.
        device: Where to run: tensors in ``args`` and ``kwargs`` and a module model are moved there.
        steps: Most gradient steps to take in all.
        training: Options of the training of each flow:

            - ``progress`` (True): Whether to show a progress bar.
            - ``compile`` (False): Whether to compile the flow's part of a step by
              ``torch.compile``: half a minute at first, then steps in two thirds of the time.
            - ``checkpoint`` (None): A file that is written as the training goes on, and from which
              a fit that was killed goes on to the same result.
            - ``objective`` (``PathELBO(num_particles=256)``): What flows are trained for: any of
              :mod:`pyroflows.train.objectives`. ``ForwardKL`` and ``MMD`` need draws of the
              posterior. The verdict does not depend on it.
            - ``learn`` (False): Which parameters of the model to learn by maximum marginal
              likelihood, together with a flow, as SVI would: ``True`` for all, or names of
              parameters or of modules. They change in place, and are in ``learned`` of the
              posterior.

    Returns:
        The posterior, with its verdict.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the model cannot be fitted: it has no continuous latent site, its density is
            not finite where it starts, a latent changes its shape, data broadcast their site; if
            the model raises an error, whose sentence names the site and whose ``__cause__`` is
            that error; or if the guide belongs to another model.

    Reference:
        Agrawal, Sheldon, Domke, "Advances in black-box VI: Normalizing flows, importance weighting,
        and optimization", 2020, https://arxiv.org/abs/2006.10343

        Vaitl, Winkler, Richter, Kessel, "Fast and unified path gradient estimators for normalizing
        flows", 2024, https://arxiv.org/abs/2403.15881

        Hoffman, Sountsov, Dillon, Langmore, Tran, Vasudevan, "NeuTra-lizing bad geometry in
        Hamiltonian Monte Carlo using neural transport", 2019, https://arxiv.org/abs/1903.03704

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(x[0] * x[1], 1.0), obs=torch.tensor(1.0))
        >>> posterior = fit_posterior(model, steps=100, progress=False)
        >>> posterior.sample(10)["x"].shape
        torch.Size([10, 2])
    """
    check_model(model)
    check_size("steps", steps, least=0)
    if time_limit is not None:
        check_positive("time_limit", time_limit)
        _load_libraries()
    deadline = Deadline(time_limit, agree=processes.agree)
    args, kwargs = _move_arguments(device, model, args, kwargs)
    settings = _train_settings(training, {"seed": seed, "steps": steps})
    with processes.warning_once(), seeded(processes.agree(seed)), without_handlers():
        particles = processes.share(settings["objective"].num_particles)

        def capture() -> Any:
            # However many runs of the model it takes, the draws of the fit are the same.
            with forked(0):
                return log_density_of(model, args, kwargs, batch_size=particles, device=device)

        density = capture()
        learned = choose_parameters(density.full, settings.pop("learn"))
        if learned:
            _learn(density, learned, min(steps, LEARNING_STEPS), deadline, settings["progress"])
            density = capture()
        warn_of_oversights(density.full, learned)
        _warn_of_cheap_evaluations(density.full)
        if isinstance(guide, str) and guide == "auto":
            climb = Climb(density, steps, deadline, **settings)
            return climb_ladder(climb, LADDER).with_learned(learned)
        own, fresh = _make_guide(guide, density.full)
        density = density.rotated(own.centres())
        climb = Climb(density, steps, deadline, own, **settings)
        if isinstance(own, AutoStructuredFlow):
            rung = make_own_structured_rung(own)
        else:
            rung = make_own_rung(own, fresh, steps, limited=time_limit is not None)
        return climb_ladder(climb, [rung]).with_learned(learned)


def _learn(
    density: Any, parameters: Mapping[str, Tensor], steps: int, deadline: Deadline, progress: bool
) -> None:
    """Learns parameters of the model, with a flow over its latents that is then forgotten."""
    full = density.full
    guide = AutoFlow(full.continuous_model, init_loc_fn=full.init_loc_fn)
    full.introduce(guide)
    learn_parameters(
        guide.flow,
        density,
        parameters,
        steps,
        deadline=deadline.earlier((deadline.left or 0) / 2),
        progress=progress,
    )


def _warn_of_cheap_evaluations(density: LogDensity) -> None:
    """Says so where several processes lose more time by messages than they save."""
    if processes.world_size() == 1:
        return
    points = density.initial.expand(density.batch_size, -1)
    message = processes.time_message(points.device)
    with torch.no_grad():
        evaluation = processes.time_work(lambda: density.evaluate_inputs(points)[0].tolist())
    least = PAYS * message
    if evaluation < least:
        warnings.warn(
            f"One process may be as fast as these {processes.world_size()}: each evaluates "
            f"{len(points)} points in {1e3 * evaluation:.2g} ms, and a message between them takes "
            f"{1e3 * message:.2g} ms, so that they pay from {1e3 * least:.2g} ms on.",
            stacklevel=caller_level(),
        )


def _load_libraries() -> None:
    """Has torch load what it loads when it is first traced, which may take as long as a fit."""
    record_operations(torch.neg)(torch.zeros(1))


def _train_settings(training: Mapping[str, Any], fit: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the options of the training, and fills in the others; a checkpoint knows its fit."""
    names = list(TrainOptions.__annotations__)
    for name in training:
        if name not in names:
            raise TypeError(f"Expected the options {', '.join(names)} of a fit; got {name!r}.")
    settings = {"progress": True, "compile": False, "learn": False, **training}
    check_flag("progress", settings["progress"])
    check_flag("compile", settings["compile"])
    if settings.get("objective") is None:
        settings["objective"] = PathELBO(PARTICLES)
    if not isinstance(settings["objective"], Objective):
        got = repr(settings["objective"])
        raise TypeError(f"Expected objective to be one of pyroflows.train.objectives; got {got}.")
    if settings.get("checkpoint") is not None:
        settings["checkpoint"] = Checkpoint(settings["checkpoint"], fit)
    return settings


def _make_guide(guide: Any, density: LogDensity) -> tuple[AutoFlow | AutoStructuredFlow, bool]:
    """Makes the guide that the user has chosen, and tells whether it has yet to be trained."""
    made: AutoFlow | AutoStructuredFlow
    if isinstance(guide, (AutoFlow, AutoStructuredFlow)):
        made = guide
    elif isinstance(guide, type) and issubclass(guide, AutoStructuredFlow):
        made = guide.of(density)
    elif isinstance(guide, type) and issubclass(guide, AutoFlow):
        made = guide(density.continuous_model, init_loc_fn=density.init_loc_fn)
    elif _is_kind(guide, (Univariate,)):
        name = guide.__name__ if isinstance(guide, type) else type(guide).__name__
        raise TypeError(
            f"Expected guide to be a flow; got the univariate map {name}, of which "
            "pyroflows.transforms.Elementwise makes one."
        )
    elif callable(guide) and not _is_kind(guide, (torch.nn.Module, AutoGuide)):
        made = AutoFlow(density.continuous_model, guide, density.init_loc_fn)
    else:
        kind = type(guide).__name__
        got = f"a made {kind}" if isinstance(guide, torch.nn.Module) else repr(guide)
        raise TypeError(
            "Expected guide to be 'auto', an AutoFlow, an AutoStructuredFlow, or a flow such as "
            f"pyroflows.RealNVP; got {got}. Other guides are judged by pyroflows.judge."
        )
    fresh = made.prototype_trace is None
    if fresh:
        density.introduce(made)
    _check_sites(made, density)
    return made, fresh


def _is_kind(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value is an instance of one of some classes, or such a class but no flow."""
    if isinstance(value, type):
        return issubclass(value, kinds) and not issubclass(value, (Flow, Transform))
    return isinstance(value, kinds)


def _check_sites(guide: AutoFlow | AutoStructuredFlow, density: LogDensity) -> None:
    """Refuses a guide whose latent sites are not those of a model, in name, shape or support."""
    nodes = list(guide.prototype_trace.iter_stochastic_nodes())
    of_guide = [(name, tuple(node["value"].shape)) for name, node in nodes]
    of_model = [(site.name, tuple(site.shape)) for site in density.sites]
    if of_guide != of_model:
        raise ValueError(
            f"Expected a guide of this model, with latent sites {of_model}; got one with "
            f"{of_guide}."
        )
    for name, node in nodes:
        support = node["fn"].support
        if not density.has_support(name, support):
            raise ValueError(
                f"Expected a guide of this model; got one in which {name!r} has support {support}."
            )


def _move_arguments(
    device: str | torch.device | None, model: Any, args: Any, kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Moves the arguments to a device; batches of a loader are moved when they are read."""
    loader = args if isinstance(args, DataLoader) else None
    args, kwargs = check_arguments(() if loader is not None else args, kwargs)
    if device is not None:
        check_device("device", device)
        if isinstance(model, torch.nn.Module):
            model.to(device)
        args = tuple(_move(value, device) for value in args)
        kwargs = {name: _move(value, device) for name, value in kwargs.items()}
    return (args if loader is None else loader), kwargs


def _move(value: Any, device: str | torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
