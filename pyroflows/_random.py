"""Random states: draws from a seed of their own, and states to go back to."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from ._checks import check_seed

__all__ = ["forked", "random_state", "seeded", "set_random_state"]


@contextlib.contextmanager
def forked(seed: int | None) -> Iterator[None]:
    """Draws within from a seed, and leaves torch's random state as it was; with ``None`` does nothing."""
    if seed is None:
        yield
        return
    seed = check_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """As :func:`forked`, for numpy's and Python's random states too, from which a model may draw."""
    if seed is None:
        yield
        return
    seed = check_seed(seed)
    state = get_rng_state()
    with torch.random.fork_rng():
        _set_seed(seed)
        try:
            yield
        finally:
            set_rng_state(state)


def _set_seed(seed: int) -> None:
    """Seeds all that Pyro's ``set_rng_seed`` does, without a trace of the stack for devices that no
    one uses: it costs more than a short simulation, and is kept for ever."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The random state of torch, on the host and on a device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Sets what :func:`random_state` returns."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
