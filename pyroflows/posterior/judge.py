"""A verdict on any guide."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from .._checks import check_model, check_positive, check_size
from .._compat import without_handlers
from .._deadline import Deadline, TimeOver
from .._random import forked, seeded
from ..guides import Guide, as_guide
from ..model.density import LogDensity
from ..model.minibatch import log_density_of
from ..transforms.low_rank import DENSE
from .census import Census, find_start, take_census
from .judging import judge_guide
from .posterior import Posterior
from .subject import JUDGE_DRAWS, Subject

__all__ = ["judge", "judge_on"]


def judge(
    guide: Any,
    model: Callable[..., Any],
    args: Sequence[Any] | DataLoader = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    draws: int = JUDGE_DRAWS,
    seed: int | None = 0,
    time_limit: float | None = None,
) -> Posterior:
    r"""Judges a guide that was trained in any way, and makes a posterior of it.

    The weights :math:`p(z_i, \mathrm{data}) / q(z_i)` of draws of the guide are looked at, a census
    of the modes is taken to find any that the guide misses, and Hamiltonian trajectories from its
    draws must leave their moments as they are. Above 64 latents the census is taken only if the
    weights show nothing wrong. The posterior that is returned corrects its draws
    where the weights are reliable.

    Args:
        guide: A guide of pyroflows; an autoguide of Pyro whose draws can be scored, such as
            ``AutoNormal``, ``AutoMultivariateNormal`` or an ``AutoGuideList`` of such; or a guide
            written by hand that samples all continuous latent sites of the model.
        model: The Pyro model.
        args: Its positional arguments; or a ``DataLoader`` whose batches are its arguments, as in
            :func:`fit_posterior`.
        kwargs: Its keyword arguments.
        draws: How many draws of the guide to weigh.
        seed: Seed of all that is random in the checks; ``None`` takes torch's random state.
        time_limit: Seconds of wall-clock time; checks for which none is left are not made, and the
            verdict names them.

    Returns:
        The posterior; its ``verdict`` says whether to trust it, and ``verdict.findings`` has the
        result of each check.

    Raises:
        TypeError: If an argument is of the wrong type, or if the guide has no density, as
            ``AutoDelta``.
        ValueError: If the guide is one of another model, or if the model cannot be evaluated.

    Reference:
        Yao, Vehtari, Simpson, Gelman, "Yes, but did it work? Evaluating variational inference",
        2018, https://arxiv.org/abs/1802.02538

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> guide = AutoNormal(model, init_scale=0.3)
        >>> posterior = pf.judge(guide, model)
        >>> posterior.verdict.ok, posterior.verdict.failed[0].name
        (False, 'census')
    """
    check_model(model)
    check_size("draws", draws)
    deadline = Deadline(None if time_limit is None else check_positive("time_limit", time_limit))
    with seeded(seed), without_handlers():
        # However many runs of model and guide it takes to get there, the draws are the same.
        with forked(0):
            density = log_density_of(model, args, kwargs).full
            adapted = as_guide(guide, density)
            density = density.rotated(adapted.centres())
        return judge_on(adapted, density, deadline, draws=draws)


def judge_on(
    guide: Guide,
    density: LogDensity,
    deadline: Deadline,
    *,
    draws: int = JUDGE_DRAWS,
    remedy: str = Subject.remedy,
) -> Posterior:
    """Judges a guide on the density of its model, and makes a posterior of it.

    Args:
        guide: The guide.
        density: The log density, with the guide's centres of circles.
        deadline: The time limit.
        draws: How many draws of the guide to weigh.
        remedy: What may mend the guide if it is not exact, in the imperative.

    Returns:
        The posterior.
    """
    with deadline.enforced():
        take = functools.partial(_census, density)
        # Of many latents it costs more than weights do.
        census = take if guide.has_marginal or density.features > DENSE else take()
        verdict, _ = judge_guide(guide, density, census, remedy=remedy, draws=draws)
    return Posterior(guide, density, verdict, seconds=deadline.elapsed)


def _census(density: LogDensity) -> Census | None:
    try:
        return take_census(density, find_start(density))
    except TimeOver:
        return None
