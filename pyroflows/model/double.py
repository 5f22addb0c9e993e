"""Log densities in double precision."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from .._checks import check_size, check_tensor
from .._compat import tree_map_only
from .data import GivenData
from .density import LogDensity
from .evaluator import Evaluator
from .inputs import Inputs
from .program import Program
from .promotion import Promoting, in_double
from .sites import sample_nodes

__all__ = ["DoubleDensity", "site_sizes"]

# Points at which slices of the rows are compared with all rows, how far they lie from the start,
# how much of a value may differ, and how many nats in single precision.
COMPARED, SPREAD, SAME, ROUNDING = 8, 0.3, 1e-9, 0.01


class DoubleDensity(LogDensity):
    """A log density in double precision, as far as its model does not round.

    Its data are converted once. :meth:`log_joint` takes points in double precision, and its graph
    leads to the points only, so that what depends on no point is computed once.

    Args:
        density: A log density whose data do not come from a loader.
        batch_size: How many vectors one evaluation takes.
        single: Whether values by slices of many rows of data may be taken in single precision, if
            that changes them by no more than :attr:`rounding`.

    Attributes:
        rounding: How far values may be off, in nats.

    Raises:
        ValueError: If the data come from a loader.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     pyro.sample("y", dist.Normal(x @ weights, 1.0).to_event(1), obs=torch.zeros(3))
        >>> density = DoubleDensity(LogDensity(model, (torch.ones(3, 2),)), 8)
        >>> density.log_joint(torch.zeros(2).double()).dtype
        torch.float64
    """

    def __init__(self, density: LogDensity, batch_size: int, single: bool = False) -> None:
        density._check_not_streamed("double precision")
        self.__dict__.update(density.__dict__)
        self.single, self.rounding = single, 0.0
        for made in ("_program", "values", "parts"):
            self.__dict__.pop(made, None)
        self.batch_size = check_size("batch_size", batch_size)
        if not isinstance(density, DoubleDensity):
            self.initial = density.initial.double()
            self.inputs = tree_map_only(Tensor, in_double, density.inputs)
            self.data = GivenData(self.inputs)
            self._evaluator = self._double_of(density._evaluator)

    def _double_of(self, evaluator: Evaluator) -> Evaluator:
        """The evaluator in double precision, which is kept with the other one for its graphs."""
        if evaluator.double is None:
            evaluator.double = self._make_evaluator()
            evaluator.double.learn_from(evaluator)
        return evaluator.double

    def log_joint(self, z: Tensor) -> Tensor:
        check_tensor("z", z, (self.features,))
        points = z.reshape(-1, self.features)
        if not len(points):
            return z.sum(-1)
        return _add(self.parts, points).reshape(z.shape[:-1])

    @functools.cached_property
    def values(self) -> Program:
        """The log density as a program, which gives a tuple of one tensor of values."""
        return self._evaluator.make_differentiable(self.inputs, self.batch_size, split=True)

    @functools.cached_property
    def parts(self) -> list[tuple[float, Program]]:
        """The log density as a weighted sum of programs: itself, or slices of many rows of data."""
        whole = [(1.0, self.values)]
        slices = self._evaluator.make_slices(self.inputs, self.batch_size)
        if not slices:
            return whole
        noise = torch.randn(COMPARED, self.features, generator=torch.Generator().manual_seed(0))
        points = self.initial + SPREAD * noise.to(self.initial)
        with torch.no_grad():
            right = _add(whole, points)
            if not _agree(_add(slices, points), right):
                return whole
            if self.single:
                rounded = self._evaluator.make_slices(self.inputs, self.batch_size, single=True)
                if _agree_nearly(rounded, points, right):
                    self.rounding = ROUNDING
                    return rounded
        return slices

    @functools.cached_property
    def largest(self) -> int:
        """The entries of the largest recorded array of an evaluation, for each point."""
        graphs = itertools.chain(*self._evaluator.graphs.values())
        return max([self.features, *(graph.largest for graph in graphs)])

    @property
    def mode(self) -> str:
        return self.values.way.mode

    @functools.cached_property
    def _program(self) -> Program:  # type: ignore[override]
        with torch.no_grad():
            return self._evaluator.make_program(self.inputs, self.batch_size)

    def _trace(self, *given: Any, **options: Any) -> Any:
        with Promoting():
            return super()._trace(*given, **options)

    def _log_joint(self, z: Tensor, inputs: Inputs) -> Tensor:
        with Promoting():
            return super()._log_joint(z, inputs)

    def _log_joints(self, z: Tensor, inputs: Inputs) -> Tensor:
        with Promoting():
            return super()._log_joints(z, inputs)


def _add(parts: list[tuple[float, Program]], points: Tensor) -> Tensor:
    """The weighted sum of the values of programs."""
    total = torch.zeros(())
    for weight, program in parts:
        total = total + weight * program(points)[0]
    return total


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether values are the same but for rounding, and finite somewhere."""
    same = torch.allclose(one, other, rtol=SAME, equal_nan=True)
    return same and bool(one.isfinite().any())


def _agree_nearly(parts: list[tuple[float, Program]], points: Tensor, right: Tensor) -> bool:
    """Whether values in single precision are the right ones but for a little rounding."""
    try:
        values = _add(parts, points)
    except RuntimeError:  # single and double precision do not mix in matrix products
        return False
    return torch.allclose(values, right, rtol=0.0, atol=ROUNDING, equal_nan=True)


def site_sizes(density: LogDensity) -> list[int]:
    """How many entries each site of a model has, latent or observed."""
    nodes = sample_nodes(density.trace(density.initial))
    return [torch.as_tensor(node["value"]).numel() for _, node in nodes]
