"""Fixtures that all tests share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pytest
import torch


def _seed() -> None:
    """As ``pyro.set_rng_seed(0)``, which without a GPU costs more than many a test, for it formats the whole stack."""
    if torch.cuda.is_available():
        pyro.set_rng_seed(0)
        return
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_pyro() -> Iterator[None]:
    """Every test starts from one seed and an empty param store, and leaves torch's settings as they were."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    validate = torch.distributions.Distribution._validate_args  # which torch.compile turns off
    pyro.clear_param_store()
    _seed()
    torch.set_num_threads(1)  # tensors are small: more threads cost more than they give
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.distributions.Distribution.set_default_validate_args(validate)
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def _exempt(request: pytest.FixtureRequest) -> None:
    """Leaves out the laws that cannot hold for a case, each for the reason that the registry gives."""
    if "name" in request.fixturenames and request.module.__name__.endswith("_laws"):
        from registry import EXEMPT

        law = getattr(request.function, "__name__", "")
        reason = EXEMPT.get(law, {}).get(request.getfixturevalue("name"))
        if reason is not None:
            pytest.skip(reason)


def _places(*names: str) -> list[Any]:
    """Devices as parameters of a fixture, whose tests `-m device` then selects."""
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [pytest.param(name, marks=pytest.mark.device) for name in (*present, *names)]


@pytest.fixture(params=_places())
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device that computes."""
    return torch.device(request.param)


@pytest.fixture(params=_places("meta"))
def placement(request: pytest.FixtureRequest) -> torch.device:
    """A device that computes, or torch's meta device, where a tensor made elsewhere or a host synchronisation fails."""
    return torch.device(request.param)
