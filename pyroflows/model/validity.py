"""Points at which distributions of a model get arguments that they do not allow."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from .._compat import validates
from .sites import base_distribution, sample_nodes

__all__ = ["ArgumentChecks", "validated_sites"]

# How far the sum of probabilities may be from one; that of many of them is rounded.
SIMPLEX_TOLERANCE = 1e-3


class ArgumentChecks(Messenger):
    """Checks the arguments of distributions without raising, so that a batch can be checked.

    Many densities are finite at arguments that their distributions do not allow, where Pyro raises
    an error: a Poisson of a negative rate, a Gamma of a negative concentration.

    Args:
        names: The sites whose distributions are checked.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> with ArgumentChecks(["x"]) as checks, pyro.validation_enabled(False):
        ...     _ = pyro.sample("x", dist.Poisson(torch.tensor(-1.0)), obs=torch.tensor(0.0))
        >>> checks.nan_unless_valid(torch.tensor(0.0))
        tensor(nan)
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names
        self._valid: list[Tensor] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            # Distributions hand the same tensors to those within them.
            arguments = {id(value): (check, value) for check, value in _arguments(msg["fn"])}
            for constraint, value in arguments.values():
                self._valid.append(_check(constraint, value))

    def nan_unless_valid(self, log_prob: Tensor) -> Tensor:
        """Puts NaN in the place of a log density if an argument is not allowed."""
        if not self._valid:
            return log_prob
        return log_prob.where(functools.reduce(torch.logical_and, self._valid), torch.nan)


def validated_sites(trace: Any) -> set[str]:
    """The sample sites of a trace whose distributions check their arguments."""
    nodes = sample_nodes(trace)
    return {name for name, node in nodes if validates(base_distribution(node["fn"]))}


def _arguments(fn: Any) -> Iterator[tuple[Any, Tensor]]:
    """The arguments of a distribution and of those within it, each with its constraint."""
    try:
        allowed = fn.arg_constraints
    except NotImplementedError:
        allowed = {}
    for name, constraint in allowed.items():
        derived = name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property)
        if not derived and _is_checked(constraint):
            value = getattr(fn, name)
            if isinstance(value, Tensor):
                yield constraint, value
    for inner in vars(fn).values():
        if isinstance(inner, Distribution):
            yield from _arguments(inner)


def _is_checked(constraint: Any) -> bool:
    """Whether a constraint is on numbers; matrices that are not allowed have no factorisation."""
    if constraints.is_dependent(constraint) or constraint.event_dim > 1:
        return False
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is not constraints.real


def _check(constraint: Any, value: Tensor) -> Tensor:
    """Whether all entries of an argument are allowed, a tensor without dimensions."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    value = value.detach()
    if not value.numel():
        return torch.ones((), dtype=torch.bool, device=value.device)
    if constraint is constraints.simplex:
        sums_to_one = (value.sum(-1) - 1).abs() < SIMPLEX_TOLERANCE
        return sums_to_one.all() & (value.amin() >= 0)
    # Several times faster than to compare all entries with a bound.
    if constraint in (constraints.positive, constraints.nonnegative):
        return constraint.check(value.amin())
    if constraint is constraints.unit_interval:
        return constraint.check(value.amin()) & constraint.check(value.amax())
    return constraint.check(value).all()
