"""Points at which distributions of a model get arguments that they do not allow."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from .._compat import validates
from .._vmap import vmap
from .sites import base_distribution, sample_nodes

__all__ = ["ArgumentChecks", "given_arguments", "innermost", "validated_sites"]

# How far the sum of probabilities may be from one; that of many of them is rounded.
SIMPLEX_TOLERANCE = 1e-3


class ArgumentChecks(Messenger):
    """Checks the arguments of distributions without raising, so that a batch can be checked.

    Many densities are finite at arguments that their distributions do not allow, where Pyro raises
    an error: a Poisson of a negative rate, a Gamma of a negative concentration.

    Args:
        names: The sites whose distributions are checked.
        rows: Which dimension of batch shapes, counted from the right, is that of the points, if
            there are many.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> with ArgumentChecks(["x"]) as checks, pyro.validation_enabled(False):
        ...     _ = pyro.sample("x", dist.Poisson(torch.tensor(-1.0)), obs=torch.tensor(0.0))
        >>> checks.nan_unless_valid(torch.tensor(0.0))
        tensor(nan)
    """

    def __init__(self, names: Collection[str], rows: int | None = None) -> None:
        super().__init__()
        self.names, self.rows = names, rows
        self._valid: list[Tensor] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            # Distributions hand the same tensors to those within them.
            arguments = {id(argument.value): argument for argument in _arguments(msg["fn"])}
            self._valid.extend(argument.check(self.rows) for argument in arguments.values())

    def nan_unless_valid(self, log_prob: Tensor) -> Tensor:
        """Puts NaN in the place of log densities where an argument is not allowed."""
        if not self._valid:
            return log_prob
        valid = functools.reduce(torch.logical_and, self._valid)
        return log_prob.where(valid.to(log_prob.device), torch.nan)


def validated_sites(trace: Any) -> set[str]:
    """The sample sites of a trace whose distributions check their arguments."""
    nodes = sample_nodes(trace)
    return {name for name, node in nodes if validates(base_distribution(node["fn"]))}


def given_arguments(fn: Any) -> Iterator[tuple[str, Any, Any]]:
    """The arguments that a distribution was given, not those that it derives from them.

    Args:
        fn: The distribution.

    Returns:
        For each one its name, its constraint and its value.
    """
    try:
        allowed = fn.arg_constraints
    except NotImplementedError:
        return
    for name, constraint in allowed.items():
        lazy = isinstance(getattr(type(fn), name, None), lazy_property)
        if not constraints.is_dependent(constraint) and (not lazy or name in vars(fn)):
            yield name, constraint, getattr(fn, name)


def innermost(constraint: Any) -> Any:
    """The constraint on entries or events that ``independent`` reads as one on larger events."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


class _Argument(NamedTuple):
    """An argument of a distribution or of one within it.

    Attributes:
        constraint: Its constraint.
        value: Its value.
        inner: How many dimensions the value has on the right of the batch shape of the whole.
    """

    constraint: Any
    value: Tensor
    inner: int

    def check(self, rows: int | None) -> Tensor:
        """Whether all entries are allowed, or all in each row of a dimension of the batch."""
        check = functools.partial(_check, self.constraint)
        dim = self.value.dim() - self.inner - (rows or 0)
        # An argument without that dimension is shared by all rows.
        if rows is None or dim < 0 or self.value.shape[dim] == 1:
            return check(self.value)
        return vmap(check, in_dims=dim)(self.value)


def _arguments(fn: Any, inner: int = 0) -> Iterator[_Argument]:
    """The arguments of a distribution and of those within it."""
    for _, constraint, value in given_arguments(fn):
        if _is_checked(constraint) and isinstance(value, Tensor):
            yield _Argument(constraint, value, inner + constraint.event_dim)
    for part in vars(fn).values():
        if isinstance(part, Distribution):
            # To an event belong dimensions that are of the batch within it.
            more = max(0, len(part.batch_shape) - len(fn.batch_shape))
            yield from _arguments(part, inner + more)


def _is_checked(constraint: Any) -> bool:
    """Whether a constraint is on numbers; matrices that are not allowed have no factorisation."""
    return constraint.event_dim <= 1 and innermost(constraint) is not constraints.real


def _check(constraint: Any, value: Tensor) -> Tensor:
    """Whether all entries of an argument are allowed, a tensor without dimensions."""
    constraint, value = innermost(constraint), value.detach()
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
