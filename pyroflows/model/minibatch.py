r"""Log densities of a part of the data at a time.

A mini-batch of :math:`n` of :math:`N` rows gives an unbiased estimate of the log joint density,

.. math:: f_b(z) = \log p(z) + \frac{N}{n} \sum_{i \in b} \log p(y_i \mid z), \qquad
    \sum_b \frac{n_b}{N} f_b(z) = \log p(z) + \sum_{i=1}^N \log p(y_i \mid z),

where the sum runs over mini-batches that part the data. The difference to the same mini-batch at an anchor
:math:`z_0`, where all data have been seen once, has the same mean and next to no variance,

.. math:: f_b(z) - f_b(z_0) + f(z_0),

for rows whose likelihoods differ much seldom have slopes that do.

Reference:
    Johnson, Zhang, "Accelerating stochastic gradient descent using predictive variance reduction", 2013,
    https://papers.nips.cc/paper/4937-accelerating-stochastic-gradient-descent-using-predictive-variance-reduction

    Quiroz, Kohn, Villani, Tran, "Speeding up MCMC by efficient data subsampling", 2014, https://arxiv.org/abs/1404.4178
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .density import Evaluator, LatentSite, LogDensity, Run
from .start import init_to_median

__all__ = ["LoadedDensity", "MiniBatchDensity", "SubsampledDensity", "log_density_of"]

# Data of a loader up to this size are kept, for to load them takes longer than to evaluate their density.
KEPT_BYTES = 2**28


def log_density_of(
    model: Callable[..., Any],
    args: Sequence[Any] | DataLoader = (),
    kwargs: Mapping[str, Any] | None = None,
    init_loc_fn: Callable[..., Any] = init_to_median,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> LogDensity | MiniBatchDensity:
    """The log density to train on, of all data or of a mini-batch at a time; its ``full`` is that of all data.

    Args:
        model: A Pyro model, which may have plates with a ``subsample_size``.
        args: Its positional arguments, or a ``DataLoader`` whose batches are the arguments of the model: a tensor, a list or
            tuple of tensors, or a dictionary of keyword arguments. The model then scales the likelihood of a batch up to
            all rows, as a plate of the size of the data with a ``subsample_size`` does.
        kwargs: Its keyword arguments.
        init_loc_fn: Where the sites start.
        batch_size: How many vectors one captured evaluation takes.
        device: Where tensors that the model makes itself, and those of a loader, are put.

    Returns:
        A :class:`LogDensity`, or a :class:`MiniBatchDensity` where the model subsamples or the data come from a loader.

    Raises:
        ValueError: If the model cannot be fitted; see :class:`LogDensity`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> data = torch.randn(100)
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 100, subsample_size=10) as rows:
        ...         pyro.sample("y", dist.Normal(x, 1.0), obs=data[rows])
        >>> density = log_density_of(model)
        >>> type(density).__name__, type(density.full).__name__
        ('SubsampledDensity', 'LogDensity')
    """
    if isinstance(args, DataLoader):
        return LoadedDensity(_StreamedDensity(model, args, kwargs, init_loc_fn, batch_size, device))
    full = LogDensity(model, args, kwargs, init_loc_fn, batch_size, device)
    return SubsampledDensity(full, batch_size) if full.subsampled else full


class MiniBatchDensity(abc.ABC):
    """The log joint density with the likelihood of a fresh mini-batch, scaled up, in every evaluation.

    Args:
        full: The density over all data.

    Attributes:
        full: The density over all data.
    """

    def __init__(self, full: LogDensity) -> None:
        self.full = full
        self._anchor: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def features(self) -> int:
        """Entries of a point."""
        return self.full.features

    @property
    def sites(self) -> list[LatentSite]:
        """The latent sites, in order."""
        return self.full.sites

    @property
    def initial(self) -> Tensor:
        """The start, of shape ``(features,)``."""
        return self.full.initial

    @property
    @abc.abstractmethod
    def mode(self) -> str:
        """How points are evaluated: ``"captured"``, ``"vmap"`` or ``"loop"``."""

    @abc.abstractmethod
    def _evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients of the next mini-batch, for points of shape ``(n, features)``."""

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate of the log density by the next mini-batch, one for all points, and its gradient.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            Tensors of shape ``(*)`` and ``(*, features)``, without graph.
        """
        points = z.detach().reshape(-1, self.features)
        if self._anchor is None:
            values, grads = self._evaluate(points)
        else:
            anchor, value, grad = self._anchor
            values, grads = self._evaluate(torch.cat([points, anchor.unsqueeze(0)]))
            values, grads = values[:-1] - values[-1] + value, grads[:-1] - grads[-1] + grad
        return values.reshape(z.shape[:-1]), grads.reshape(z.shape)

    def anchor(self, z: Tensor) -> None:
        """Takes mini-batches as differences to a point from now on, which should be near the middle of the posterior.

        Args:
            z: Point of shape ``(features,)``; where its density is not finite, nothing changes.
        """
        value, grad = self.full.value_and_grad(z)
        if bool(value.isfinite() & grad.isfinite().all()):
            self._anchor = z.detach().clone(), value, grad

    def log_prob(self, z: Tensor) -> Tensor:
        """The estimate of the log density at points of shape ``(*, features)``, of shape ``(*)``."""
        return self.value_and_grad(z)[0]


class SubsampledDensity(MiniBatchDensity):
    """Mini-batches by the model's own subsampled plates: every evaluation draws their rows afresh, without replacement.

    Args:
        full: The density over all data of a model with subsampled plates.
        batch_size: How many vectors one captured evaluation takes.
    """

    def __init__(self, full: LogDensity, batch_size: int = 256) -> None:
        super().__init__(full)
        first = [
            torch.arange(part, device=full.initial.device) for _, part in full.subsampled.values()
        ]
        self._evaluator = Evaluator(
            self._single, full.initial, batch_size + 1, first
        )  # with the anchor

    @property
    def mode(self) -> str:
        return self._evaluator.mode

    def _single(self, z: Tensor, *rows: Tensor) -> Tensor:
        given = dict(zip(self.full.subsampled, rows, strict=True))
        return self.full._single(
            z, Run(_GivenRows(given)(self.full.model_of_batch), self.full.args, self.full.kwargs)
        )

    def _evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        device = points.device
        rows = [
            torch.randperm(size, device=device)[:part]
            for size, part in self.full.subsampled.values()
        ]
        return self._evaluator(points, *rows)


class LoadedDensity(MiniBatchDensity):
    """Mini-batches from a loader, epoch after epoch.

    Args:
        full: The density that streams all data of the loader.
    """

    full: _StreamedDensity

    def __init__(self, full: _StreamedDensity) -> None:
        super().__init__(full)
        self._batches: Iterator[list[Tensor]] | None = None
        self._epoch: dict[str, Tensor] = {}
        self._taken = 0

    @property
    def mode(self) -> str:
        return self.full.mode

    def _evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.full.evaluate_batch(points, self._next())

    def _next(self) -> list[Tensor]:
        for _ in range(2):
            if self._batches is None:
                self._begin_epoch()
            assert self._batches is not None
            batch = next(self._batches, None)
            if batch is not None:
                self._taken += 1
                return batch
            self._batches = None
        raise ValueError(
            "Expected a loader that can be gone through again and again; got one that has run dry."
        )

    def _begin_epoch(self) -> None:
        self._epoch = self._random_state()
        self._batches = self.full.batches(self.full.loader)
        self._taken = 0

    # The order within an epoch follows from the random state at its beginning.

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        generator = self.full.loader.generator
        return state if generator is None else {**state, "generator": generator.get_state()}

    def _set_random_state(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "generator" in state:
            self.full.loader.generator.set_state(state["generator"])

    def state_dict(self) -> dict[str, Tensor]:
        """Where in the data the mini-batches are."""
        state = {f"{name} at the start of the epoch": value for name, value in self._epoch.items()}
        if "generator" in self._epoch:
            state["generator"] = self.full.loader.generator.get_state()
        return {**state, "batches taken": torch.tensor(self._taken)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to where the mini-batches were."""
        suffix = " at the start of the epoch"
        epoch = {
            name.removesuffix(suffix): value
            for name, value in state.items()
            if name.endswith(suffix)
        }
        if not epoch:
            return
        now = torch.get_rng_state()
        self._set_random_state(epoch)
        self._begin_epoch()
        for _ in range(int(state["batches taken"])):
            self._next()
        self._set_random_state({**state, "cpu": now})


class _StreamedDensity(LogDensity):
    """The density over all data of a loader, gone through in every evaluation, unless they are few enough to keep."""

    streamed = True

    def __init__(
        self,
        model: Callable[..., Any],
        loader: DataLoader,
        kwargs: Mapping[str, Any] | None,
        init_loc_fn: Callable[..., Any],
        batch_size: int,
        device: str | torch.device | None,
    ) -> None:
        self.loader, self.device = loader, device
        self._in_order = _in_order(loader)
        self._names: list[str] | None = None
        self._kept: list[list[Tensor]] | None = None
        self._given = dict(kwargs or {})
        self._look_through()
        self._refuse_given_twice()
        run = self._run(model, self._first)
        super().__init__(_FirstRows()(model), run.args, run.kwargs, init_loc_fn, batch_size, device)
        self._refuse_own_rows(model)
        self._refuse_unscaled()

    def batches(self, loader: DataLoader) -> Iterator[list[Tensor]]:
        """The batches of a loader as lists of tensors."""
        for batch in loader:
            yield [tensor.to(self.device) for tensor in self._tensors(batch)]

    def _look_through(self) -> None:
        """Counts the rows, and keeps them if they are few."""
        kept, self.rows, size = [], 0, 0
        for batch in self._all_batches():
            if not self.rows:
                self._first = batch
            self.rows += _rows(batch)
            size += sum(tensor.nbytes for tensor in batch)
            if size <= KEPT_BYTES:
                kept.append(batch)
            else:
                kept.clear()
        if not self.rows:
            raise ValueError("Expected a loader with at least one batch; got an empty one.")
        self._kept = kept if size <= KEPT_BYTES else None

    def _all_batches(self) -> Iterator[list[Tensor]]:
        if self._kept is not None:
            yield from self._kept
            return
        with torch.random.fork_rng(
            devices=[]
        ):  # even a loader without workers draws a seed for them
            batches = iter(self.batches(self._in_order))
            first = next(batches, None)
        if first is not None:
            yield first
            yield from batches

    def evaluate_batch(self, points: Tensor, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The log density with the likelihood of one batch, scaled up, and its gradient."""
        return self._evaluator(points, *batch)

    def _evaluate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = rows.new_zeros(len(rows)), torch.zeros_like(rows)
        seen = 0
        for batch in self._all_batches():
            seen += _rows(batch)
            weight = _rows(batch) / self.rows
            of_batch = self.evaluate_batch(rows, batch)
            value += weight * of_batch[0]
            grad += weight * of_batch[1]
        if seen != self.rows:
            raise ValueError(
                f"Expected a loader of the same {self.rows} rows every time; got {seen} this time."
            )
        return value, grad

    def _make_evaluator(self) -> Evaluator:
        model = self.model

        def single(z: Tensor, *batch: Tensor) -> Tensor:
            return self._single(z, self._run(model, batch))

        return Evaluator(single, self.initial, self.batch_size + 1, self._first)  # with the anchor

    def _run(self, model: Callable[..., Any], batch: Sequence[Tensor]) -> Run:
        if self._names is None:
            return Run(model, tuple(batch), self._given)
        return Run(model, (), {**self._given, **dict(zip(self._names, batch, strict=True))})

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
                "Expected a loader whose batches are tensors with the rows first, or lists, tuples or dictionaries of them; "
                f"got a batch that is {_kind(batch)}."
            )
        return list(tensors)

    def _find_subsampled(self, trace: Any) -> dict[str, tuple[int, int]]:
        super()._find_subsampled(trace)
        return {}

    def _refuse_part_of_the_data(self, trace: Any) -> None:
        """Nothing: a batch is a part."""

    def _refuse_own_rows(self, model: Callable[..., Any]) -> None:
        """Refuses a model that takes its rows by the indices of a plate, of which a loader knows nothing."""
        values = []
        for rows in (_FirstRows(), _FirstRows(flip=True)):
            values.append(float(self._single(self.initial, self._run(rows(model), self._first))))
        # What is no number is refused where the fit looks for its start.
        if all(map(math.isfinite, values)) and not math.isclose(
            *values, rel_tol=1e-4, abs_tol=1e-4
        ):
            raise ValueError(
                "Expected a model that takes a batch of the loader as it is; got one whose log density depends on the "
                "indices that a subsampled plate draws. Give all data as args instead of a loader."
            )

    def _refuse_given_twice(self) -> None:
        twice = [name for name in self._names or () if name in self._given]
        if twice:
            raise ValueError(
                f"Expected each argument from the loader or from kwargs; got {', '.join(map(repr, twice))} from both."
            )

    def _refuse_unscaled(self) -> None:
        rows = _rows(self._first)
        trace = self._trace(self.constrain(self.initial))
        for name, site in trace.nodes.items():
            plate = site.get("fn")
            if site_is_subsample(site) and plate.subsample_size == rows < plate.size != self.rows:
                raise ValueError(
                    f"Expected plate {name!r} of the size of the data, which are {self.rows} rows; got size {plate.size}."
                )
        if rows == self.rows:
            return
        latent = {*self.discrete, *(site.name for site in self.sites)}
        observed = {
            name: float(torch.as_tensor(site["scale"]).max())
            for name, site in trace.nodes.items()
            if site.get("is_observed") and name not in latent
        }
        if observed and all(scale == 1 for scale in observed.values()):
            names = ", ".join(repr(name) for name in observed)
            raise ValueError(
                f"Expected a model that scales the likelihood of a batch of {rows} up to all {self.rows} rows; got {names} "
                f"with scale 1. Put it into pyro.plate(name, {self.rows}, subsample_size=len(batch))."
            )


class _GivenRows(Messenger):
    """Gives subsampled plates their rows."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.rows:
            msg["value"] = self.rows[msg["name"]]


class _FirstRows(Messenger):
    """Gives subsampled plates their first rows, for models that read none of the indices."""

    def __init__(self, flip: bool = False) -> None:
        super().__init__()
        self.flip = flip

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None and msg["fn"].subsample_size is not None:
            size, part = msg["fn"].size, msg["fn"].subsample_size
            if part > size:
                raise ValueError(
                    f"Expected plate {msg['name']!r} of at least the {part} rows of a batch; got size {size}."
                )
            rows = torch.arange(part, device=msg["fn"].device)
            msg["value"] = msg["fn"].size - 1 - rows if self.flip else rows


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
        return f"a {type(batch).__name__} of {', '.join(type(item).__name__ for item in batch) or 'nothing'}"
    return f"of type {type(batch).__name__}"
