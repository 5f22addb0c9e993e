"""The data of a model: given as its arguments, or by a loader, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from . import checks
from .handlers import FirstRows
from .inputs import Inputs

__all__ = ["GivenData", "LoadedData", "as_data"]

# Data of a loader are cached up to this many bytes: loading is slower than evaluating.
KEPT_BYTES = 2**28
# What to do where a model has a part of its rows.
GIVEN_A_PART = (
    " given by subsample=. Use subsample_size=, or give the data by a DataLoader as args."
)


class Bindable(Protocol):
    """A density that can be evaluated on other data, as :class:`pyroflows.model.LogDensity` is."""

    unwrapped_model: Callable[..., Any]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bindable:
        """The density on these arguments of the model."""

    def evaluate_inputs(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients for points ``(n, features)`` on the present arguments."""

    def log_joint_of(self, model: Callable[..., Any]) -> Tensor:
        """The log joint density of another wrapping of the model, where the density starts."""


def as_data(
    args: Sequence[Any] | DataLoader,
    kwargs: Mapping[str, Any] | None,
    device: str | torch.device | None,
) -> GivenData | LoadedData:
    """The data of a model.

    Args:
        args: Positional arguments, or a loader whose batches are the arguments.
        kwargs: Keyword arguments.
        device: Where batches of a loader are put.

    Returns:
        The data.

    Raises:
        TypeError: If these are no arguments, or a batch does not consist of tensors.
        ValueError: If a loader is empty, or gives an argument that is given by ``kwargs`` too.
    """
    if isinstance(args, DataLoader):
        return LoadedData(args, checks.check_arguments((), kwargs)[1], device)
    return GivenData(Inputs(*checks.check_arguments(args, kwargs)))


class GivenData:
    """Data that a model takes as its arguments, all at once.

    Args:
        first: The arguments.
    """

    #: Whether the data come batch by batch.
    streamed = False

    def __init__(self, first: Inputs) -> None:
        self.first = first

    def wrap(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model as it is run on these data."""
        return model

    def find_subsampled(self, trace: Any) -> dict[str, tuple[int, int]]:
        """For each plate that draws its rows, how many it has, and how many a run sees."""
        subsampled = subsampled_plates(trace)
        checks.check_outside_of_parts(trace, subsampled)
        return subsampled

    def evaluate(self, density: Bindable, points: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients of a density at these data, for points ``(n, features)``."""
        return density.evaluate_inputs(points)

    def check(self, density: Bindable, trace: Any) -> None:
        """Refuses a model of which these are not all data."""
        checks.check_all_rows(trace, "sees all its data", GIVEN_A_PART)


class LoadedData:
    """Data of a loader, gone through in every evaluation unless they are few enough to keep.

    Args:
        loader: The loader; its batches are tensors with the rows first, or sequences or
            dictionaries of them.
        kwargs: Keyword arguments of the model that do not come from the loader.
        device: Where batches are put.

    Attributes:
        rows: How many rows the data have.
        first: The first batch as inputs of the model.

    Raises:
        TypeError: If a batch does not consist of tensors.
        ValueError: If there is none, or it gives an argument that is given by ``kwargs`` too.
    """

    streamed = True

    def __init__(
        self, loader: DataLoader, kwargs: Mapping[str, Any], device: str | torch.device | None
    ) -> None:
        self.loader, self.given, self.device = loader, dict(kwargs), device
        self._in_order = _in_order(loader)
        self._names: list[str] = []
        self._kept: list[list[Tensor]] | None = None
        self.rows, first = self._look_through()
        self._batch_rows = _rows(first)
        self._check_given_once()
        self.first = self.inputs(first)

    def wrap(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model as it is run on a batch, whose rows are those of its plates."""
        return FirstRows()(model)

    def find_subsampled(self, trace: Any) -> dict[str, tuple[int, int]]:
        """None: the loader draws the rows."""
        checks.check_outside_of_parts(trace, subsampled_plates(trace))
        return {}

    def evaluate(self, density: Bindable, points: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients of a density at all data, for points ``(n, features)``."""
        value, grad = points.new_zeros(len(points)), torch.zeros_like(points)
        seen = 0
        for batch in self.batches_in_order():
            seen += _rows(batch)
            weight = _rows(batch) / self.rows
            inputs = self.inputs(batch)
            of_batch = density.bind(inputs.args, inputs.kwargs).evaluate_inputs(points)
            value += weight * of_batch[0]
            grad += weight * of_batch[1]
        if seen != self.rows:
            raise ValueError(
                f"Expected a loader of the same {self.rows} rows every time; got {seen} this time."
            )
        return value, grad

    def check(self, density: Bindable, trace: Any) -> None:
        """Refuses a model that does not take a batch as a part of these data."""
        checks.check_same_values(
            lambda flip: density.log_joint_of(FirstRows(flip)(density.unwrapped_model))
        )
        nodes = trace.nodes.items()
        observed = [name for name, node in nodes if node.get("is_observed")]
        checks.check_plate_sizes(trace, self._batch_rows, self.rows)
        checks.check_scaled(trace, observed, self._batch_rows, self.rows)

    def inputs(self, batch: Sequence[Tensor]) -> Inputs:
        """A batch as arguments of the model."""
        if not self._names:
            return Inputs(tuple(batch), self.given)
        return Inputs((), {**self.given, **dict(zip(self._names, batch, strict=True))})

    def batches(self, loader: DataLoader) -> Iterator[list[Tensor]]:
        """The batches of a loader as lists of tensors."""
        for batch in loader:
            yield [tensor.to(self.device) for tensor in self._tensors(batch)]

    def batches_in_order(self) -> Iterator[list[Tensor]]:
        """All batches, in the order of the data, drawing no random numbers."""
        if self._kept is not None:
            yield from self._kept
            return
        # Even a loader without workers draws a seed for them.
        with torch.random.fork_rng(devices=[]):
            batches = iter(self.batches(self._in_order))
            first = next(batches, None)
        if first is not None:
            yield first
            yield from batches

    def _look_through(self) -> tuple[int, list[Tensor]]:
        """Counts the rows, and keeps them if they are few."""
        kept: list[list[Tensor]] = []
        first: list[Tensor] = []
        rows = size = 0
        for batch in self.batches_in_order():
            first = first or batch
            rows += _rows(batch)
            size += sum(tensor.nbytes for tensor in batch)
            if size <= KEPT_BYTES:
                kept.append(batch)
            else:
                kept.clear()
        if not rows:
            raise ValueError("Expected a loader with at least one batch; got an empty one.")
        self._kept = kept if size <= KEPT_BYTES else None
        return rows, first

    def _tensors(self, batch: Any) -> list[Tensor]:
        if isinstance(batch, Mapping):
            self._names = list(batch)
            batch = list(batch.values())
        tensors = [batch] if isinstance(batch, Tensor) else batch
        rows_first = isinstance(tensors, (list, tuple)) and all(
            isinstance(t, Tensor) and t.dim() for t in tensors
        )
        if not (rows_first and tensors):
            raise TypeError(
                "Expected a loader whose batches are tensors with the rows first, or lists, tuples "
                f"or dictionaries of them; got a batch that is {_kind(batch)}."
            )
        return list(tensors)

    def _check_given_once(self) -> None:
        twice = [name for name in self._names if name in self.given]
        if twice:
            raise ValueError(
                "Expected each argument from the loader or from kwargs; got "
                f"{', '.join(map(repr, twice))} from both."
            )


def subsampled_plates(trace: Any) -> dict[str, tuple[int, int]]:
    """For each plate of which a run sees a part that it draws, its rows and those of the part."""
    subsampled = {}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and site_is_subsample(node):
            size, part = node["fn"].size, node["fn"].subsample_size
            if part is not None and 0 < part < size:
                subsampled[name] = (int(size), int(part))
    return subsampled


def _in_order(loader: DataLoader) -> DataLoader:
    """A loader of every row of the data once, in order, that draws nothing."""
    if isinstance(loader.dataset, IterableDataset):
        return loader
    own_order = loader.batch_size is None and loader.batch_sampler is not None
    return DataLoader(
        loader.dataset,
        batch_size=256 if own_order else loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        generator=torch.Generator(),
    )


def _rows(batch: Sequence[Tensor]) -> int:
    return len(batch[0])


def _kind(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return "a tensor without dimensions"
    if isinstance(batch, (list, tuple)):
        if batch and all(isinstance(item, Tensor) for item in batch):
            return f"a {type(batch).__name__} of tensors without dimensions"
        names = ", ".join(type(item).__name__ for item in batch)
        return f"a {type(batch).__name__} of {names or 'nothing'}"
    return f"of type {type(batch).__name__}"
