"""Densities that are zero outside of a support which may move with the latents."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution, constraints

from .._compat import unvalidated
from .sites import WRAPPERS, base_distribution
from .validity import innermost

__all__ = ["WithinSupport", "zero_outside"]


class WithinSupport(Messenger):
    """Gives the distributions of a model density zero outside of their supports.

    Many log densities are formulas that go on outside: those of a Pareto below its scale, of a
    shifted Exponential below its shift, of most truncated distributions. Pyro's validation raises
    an error there, which a batch of points cannot.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> with WithinSupport():
        ...     trace = pyro.poutine.trace(pyro.sample).get_trace(
        ...         "y", dist.Pareto(torch.tensor([1.0, 3.0]), 1.0), obs=torch.tensor(2.0)
        ...     )
        >>> with pyro.validation_enabled(False):
        ...     trace.compute_log_prob()
        >>> trace.nodes["y"]["log_prob"]
        tensor([-1.3863,    -inf])
    """

    def _pyro_post_sample(self, msg: Any) -> None:
        # After all plates, which make distributions anew.
        if not site_is_subsample(msg):
            msg["fn"] = zero_outside(msg["fn"])


def zero_outside(fn: Any) -> Any:
    """The distribution with density zero outside of its support, and so those within it.

    Args:
        fn: A distribution.

    Returns:
        A distribution of the same class; the same one if its support has no bounds that may move.
    """
    parts = _parts(fn)
    bounded = {name: zero_outside(part) for name, part in parts.items()}
    has_bounds = _has_bounds(fn)
    if not has_bounds and all(bounded[name] is part for name, part in parts.items()):
        return fn
    copied = copy.copy(fn)
    vars(copied).update(bounded)
    if has_bounds:
        copied = unvalidated(copied)  # which raises an error outside
        # Of one object, because a class of its own would be unknown to all that ask for the class.
        copied.log_prob = _ZeroOutside(copied)
    return copied


class _ZeroOutside:
    """The log density of a distribution, ``-inf`` outside of the support."""

    def __init__(self, fn: Any) -> None:
        self.fn, self.log_prob = fn, fn.log_prob

    def __call__(self, value: Any) -> Tensor:
        log_prob: Tensor = self.log_prob(value)
        inside = _is_inside(self.fn, torch.as_tensor(value, device=log_prob.device))
        return log_prob.where(inside, -torch.inf)


def _parts(fn: Any) -> dict[str, Any]:
    """The distributions within one, by whose supports its density is not zero by itself."""
    if isinstance(fn, TransformedDistribution) and not _is_composed(fn):
        return {}
    return {name: part for name, part in vars(fn).items() if isinstance(part, Distribution)}


def _has_bounds(fn: Any) -> bool:
    """Whether the support of a distribution itself has bounds that may move."""
    if isinstance(fn, WRAPPERS):
        return False
    if _is_composed(fn):
        return any(innermost(part) is not constraints.real for part in _images(fn))
    try:
        bounds = vars(innermost(_support(fn))).values()
    except (AttributeError, NotImplementedError):  # a user's own distribution, without a support
        return False
    return any(isinstance(bound, Tensor) for bound in bounds)


def _is_inside(fn: Any, value: Tensor) -> Tensor:
    """Which events are in the support of a distribution, a tensor of the shape of its batches."""
    if not _is_composed(fn):
        return _check(_support(fn), value, fn)
    *images, base = _images(fn)
    inside = torch.ones((), dtype=torch.bool, device=value.device)
    for transform, image in zip(reversed(fn.transforms), images, strict=True):
        inside = inside & _check(image, value, fn)
        value = transform.inv(value)
    return inside & _check(base, value, fn.base_dist)


def _check(constraint: Any, value: Tensor, fn: Any) -> Tensor:
    inside: Tensor = constraint.check(value)
    extra = len(fn.event_shape) - constraint.event_dim
    return inside.flatten(-extra).all(-1) if extra else inside


def _is_composed(fn: Any) -> bool:
    """Whether a distribution is one of transforms of which torch knows the last image only."""
    own = getattr(type(fn), "support", None)
    return isinstance(fn, TransformedDistribution) and own is TransformedDistribution.support


def _images(fn: Any) -> list[Any]:
    """The images of the transforms of a distribution, the last first, and of its base."""
    images = [transform.codomain for transform in reversed(fn.transforms)]
    return [*images, _support(fn.base_dist)]


def _support(fn: Any) -> Any:
    """The support of a distribution, or the line for a mixture, whose components have their own."""
    # For torch, a mixture lives where all of its components do.
    mixture = isinstance(base_distribution(fn), torch.distributions.MixtureSameFamily)
    return constraints.real if mixture else fn.support
