"""Where a guide starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.infer.autoguide import init_to_median as _pyro_init_to_median
from pyro.infer.autoguide import init_to_sample, init_to_uniform, init_to_value
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from .._random import forked
from .program import FAILURES
from .sites import latent_nodes

__all__ = ["OTHER_STARTS", "init_to_median"]


def init_to_median(site: dict[str, Any] | None = None, num_samples: int = 15) -> Any:
    """Starts each site at its prior median, and an improper one at the image of zero.

    Args:
        site: A sample site of Pyro; without it the function returns itself, with its options set.
        num_samples: Draws from the prior for the median.

    Returns:
        The value at which the site starts.

    Example:
        >>> import pyro.distributions as dist
        >>> flat = dist.ImproperUniform(dist.constraints.positive, (), (2,))
        >>> init_to_median({"fn": flat, "name": "x"})
        tensor([1., 1.])
    """
    if site is None:
        return lambda given: init_to_median(given, num_samples)
    try:
        return _pyro_init_to_median(site, num_samples=num_samples)
    except NotImplementedError:
        fn = site["fn"]
        onto = check_support(site["name"], fn.support)
        zeros: Tensor = torch.zeros(onto.inverse_shape(fn.batch_shape + fn.event_shape))
        return onto(zeros)


def check_support(name: str, support: constraints.Constraint) -> Transform:
    """Returns the bijection onto the support of a latent site.

    Raises:
        ValueError: If there is none.
    """
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ValueError(
            "Expected latent sites whose support has a bijection from real vectors; got "
            f"{name!r} on {support}, for which biject_to knows none. Build it from sites that have "
            "one, a covariance for instance from LKJCholesky and scales."
        ) from None


def start_elsewhere(run_from: Callable[..., Any]) -> Callable[..., Any] | None:
    """Looks for a start at which a model does not fail: at draws from the prior, and around the
    image of zero, far and near.

    Args:
        run_from: Gives a trace of the model from an initialisation function.

    Returns:
        The initialisation function that starts there; ``None`` if there is none.
    """
    for number, init_loc_fn in enumerate(OTHER_STARTS):
        with contextlib.suppress(*FAILURES), forked(number):
            nodes = latent_nodes(run_from(init_loc_fn))
            values = {name: node["value"].detach() for name, node in nodes}
            return cast("Callable[..., Any]", init_to_value(values=values))
    return None


def _or_zero(init: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """A start by an initialisation function of Pyro; an improper site's is the image of zero."""

    def start(site: dict[str, Any]) -> Any:
        try:
            return init(site)
        except NotImplementedError:
            return init_to_median(site)

    return start


OTHER_STARTS = 4 * (
    _or_zero(init_to_sample),
    *(_or_zero(init_to_uniform(radius=radius)) for radius in (2.0, 1.0, 0.5, 0.1)),
)
