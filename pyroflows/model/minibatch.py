r"""Log densities of a part of the data at a time.

A mini-batch of :math:`n` of :math:`N` rows gives an unbiased estimate of the log joint density,

.. math:: f_b(z) = \log p(z) + \frac{N}{n} \sum_{i \in b} \log p(y_i \mid z), \qquad
    \sum_b \frac{n_b}{N} f_b(z) = \log p(z) + \sum_{i=1}^N \log p(y_i \mid z),

where the sum runs over mini-batches that part the data. The difference to the same mini-batch at an
anchor :math:`z_0`, where all data have been seen once, has the same mean and next to no variance,

.. math:: f_b(z) - f_b(z_0) + f(z_0),

because rows whose likelihoods differ much seldom have slopes that do.

Reference:
    Johnson, Zhang, "Accelerating stochastic gradient descent using predictive variance reduction",
    2013, https://papers.nips.cc/paper/4937

    Quiroz, Kohn, Villani, Tran, "Speeding up MCMC by efficient data subsampling", 2014,
    https://arxiv.org/abs/1404.4178
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._checks import check_tensor
from .base import Density
from .data import LoadedData
from .density import LogDensity
from .start import init_to_median

__all__ = ["LoadedDensity", "MiniBatchDensity", "SubsampledDensity", "log_density_of"]


def log_density_of(
    model: Callable[..., Any],
    args: Sequence[Any] | DataLoader = (),
    kwargs: Mapping[str, Any] | None = None,
    init_loc_fn: Callable[..., Any] = init_to_median,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> LogDensity | MiniBatchDensity:
    """The log density to train on, of all data or of a mini-batch at a time.

    Args:
        model: A Pyro model, which may have plates with a ``subsample_size``.
        args: Its positional arguments, or a ``DataLoader`` whose batches are the arguments of the
            model: a tensor, a list or tuple of tensors, or a dictionary of keyword arguments. The
            model then scales the likelihood of a batch up to all rows, as a plate of the size of
            the data with a ``subsample_size`` does.
        kwargs: Its keyword arguments.
        init_loc_fn: Where the sites start.
        batch_size: How many vectors one captured evaluation takes.
        device: Where tensors that the model makes itself, and those of a loader, are put.

    Returns:
        A :class:`LogDensity`, or a :class:`MiniBatchDensity` where the model subsamples or the data
        come from a loader; its ``full`` is the density over all data.

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
        with_anchor = batch_size + 1
        full = LogDensity(model, args, kwargs, init_loc_fn, with_anchor, device)
        return LoadedDensity(full)
    full = LogDensity(model, args, kwargs, init_loc_fn, batch_size, device)
    return SubsampledDensity(full, batch_size) if full.subsampled else full


class MiniBatchDensity(Density):
    """The log joint density with the likelihood of a fresh mini-batch, scaled up, in every
    evaluation.

    Args:
        full: The density over all data.

    Attributes:
        full: The density over all data.
    """

    def __init__(self, full: LogDensity) -> None:
        self._full = full
        self.features, self.initial, self.sites = full.features, full.initial, full.sites
        self._anchor: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def full(self) -> LogDensity:
        return self._full

    def rotated(self, centres: Mapping[str, Tensor]) -> MiniBatchDensity:
        """The density with other centres of its circles; see :meth:`LogDensity.rotated`."""
        full = self.full.rotated(centres)
        return self if full is self.full else type(self)(full)

    @property
    @abc.abstractmethod
    def mode(self) -> str:
        """How points are evaluated: ``"captured"``, ``"vmap"``, ``"plate"`` or ``"loop"``."""

    @abc.abstractmethod
    def next_batch(self) -> LogDensity:
        """The density with the likelihood of the next mini-batch, scaled up."""

    @torch.no_grad()
    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate of the log density by the next mini-batch, one for all points, and its
        gradient.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            Tensors of shape ``(*)`` and ``(*, features)``, without graph, NaN where the model
            fails.

        Raises:
            ValueError: If the last dimension is not ``features``.
        """
        check_tensor("z", z, (self.features,))
        points = z.detach().reshape(-1, self.features)
        if self._anchor is None:
            values, grads = self._evaluate(points)
        else:
            anchor, value, grad = self._anchor
            values, grads = self._evaluate(torch.cat([points, anchor.unsqueeze(0)]))
            values, grads = values[:-1] - values[-1] + value, grads[:-1] - grads[-1] + grad
        return values.reshape(z.shape[:-1]), grads.reshape(z.shape)

    def _evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients of the next mini-batch, for points of shape ``(n, features)``."""
        return self.next_batch().evaluate_inputs(points)

    def anchor(self, z: Tensor) -> None:
        """Takes mini-batches as differences to a point from now on, which should be near the middle
        of the posterior.

        Args:
            z: Point of shape ``(features,)``; where its density is not finite, nothing changes.
        """
        value, grad = self.full.value_and_grad(z)
        if bool(value.isfinite() & grad.isfinite().all()):
            self._anchor = z.detach().clone(), value, grad


class SubsampledDensity(MiniBatchDensity):
    """Mini-batches by the model's own subsampled plates: every evaluation draws their rows afresh,
    without replacement.

    Args:
        full: The density over all data of a model with subsampled plates.
        batch_size: How many vectors one captured evaluation takes.
    """

    def __init__(self, full: LogDensity, batch_size: int = 256) -> None:
        super().__init__(full)
        self._with_anchor = batch_size + 1
        device = full.initial.device
        parts = full.subsampled.items()
        first = {name: torch.arange(part, device=device) for name, (_, part) in parts}
        self._mode = full.bind(rows=first, batch_size=self._with_anchor).mode

    @property
    def mode(self) -> str:
        return self._mode

    def next_batch(self) -> LogDensity:
        device = self.initial.device
        plates = self.full.subsampled.items()
        rows = {name: torch.randperm(size, device=device)[:part] for name, (size, part) in plates}
        return self.full.bind(rows=rows, batch_size=self._with_anchor)


class LoadedDensity(MiniBatchDensity):
    """Mini-batches from a loader, epoch after epoch.

    Args:
        full: The density over all data of a loader.
    """

    def __init__(self, full: LogDensity) -> None:
        super().__init__(full)
        assert isinstance(full.data, LoadedData)
        self._data = full.data
        self._batches: Iterator[list[Tensor]] | None = None
        self._epoch: dict[str, Tensor] = {}
        self._taken = 0

    @property
    def mode(self) -> str:
        return self.full.mode

    def next_batch(self) -> LogDensity:
        inputs = self._data.inputs(self._next_batch())
        return self.full.bind(inputs.args, inputs.kwargs)

    def _next_batch(self) -> list[Tensor]:
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
        self._batches = self._data.batches(self._data.loader)
        self._taken = 0

    # The order within an epoch follows from the random state at its beginning.

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        generator = self._data.loader.generator
        return state if generator is None else {**state, "generator": generator.get_state()}

    def _set_random_state(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "generator" in state:
            self._data.loader.generator.set_state(state["generator"])

    def state_dict(self) -> dict[str, Tensor]:
        """Where in the data the mini-batches are."""
        state = {f"{name} at the start of the epoch": value for name, value in self._epoch.items()}
        if "generator" in self._epoch:
            state["generator"] = self._data.loader.generator.get_state()
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
            self._next_batch()
        self._set_random_state({**state, "cpu": now})
