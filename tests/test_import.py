"""Importing the package changes nothing in the process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

WATCH = """
import json, logging, os, random, signal, sys, threading, warnings
import numpy, pyro, torch
from torch.distributions.distribution import Distribution

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "validation of torch": Distribution._validate_args,
        "settings of Pyro": {key: repr(value) for key, value in pyro.settings.get().items()},
        "param store": sorted(pyro.get_param_store()),
        "effect handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "random state of torch": hash(torch.get_rng_state().numpy().tobytes()),
        "random state of numpy": hash(numpy.random.get_state()[1].tobytes()),
        "random state of Python": hash(random.getstate()),
        "threads of torch": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "threads of Python": threading.active_count(),
        "gradients": [torch.is_grad_enabled(), torch.is_anomaly_enabled()],
        "warnings filters": [repr(entry) for entry in warnings.filters],
        "showwarning": repr(warnings.showwarning),
        "logging": [logging.getLogger().level, len(logging.getLogger().handlers)],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "print options": repr(torch.get_printoptions()) if hasattr(torch, "get_printoptions") else "",
        "signals": repr(signal.getsignal(signal.SIGINT)),
        "environment": sorted(os.environ.items()),
        "working directory": os.getcwd(),
        "path": sys.path[:],
        "bijections": len(torch.distributions.biject_to._registry),
        "streams": [repr(sys.stdout), repr(sys.excepthook)],
    }

before = state()
import pyroflows
from pyroflows import *
after = state()
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
heavy = [name for name in ("arviz", "matplotlib", "pandas", "IPython", "h5py", "xarray") if name in sys.modules]
print(json.dumps({"changed": changed, "heavy": heavy, "watched": sorted(before)}))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What a fresh process sees of the import, with warnings as errors."""
    command = [sys.executable, "-W", "error::DeprecationWarning:pyroflows", "-c", WATCH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pyroflows" not in done.stderr
    return json.loads(done.stdout)


WATCHED = [
    "default dtype",
    "default device",
    "validation of torch",
    "settings of Pyro",
    "param store",
    "effect handlers",
    "random state of torch",
    "random state of numpy",
    "random state of Python",
    "threads of torch",
    "threads of Python",
    "gradients",
    "warnings filters",
    "showwarning",
    "logging",
    "deterministic",
    "matmul precision",
    "print options",
    "signals",
    "environment",
    "working directory",
    "path",
    "bijections",
    "streams",
]


@pytest.mark.parametrize("what", WATCHED)
def test_import_leaves_alone(seen: dict[str, Any], what: str) -> None:
    assert what in seen["watched"]
    assert what not in seen["changed"], seen["changed"][what]


def test_everything_is_watched_by_a_test(seen: dict[str, Any]) -> None:
    assert seen["watched"] == sorted(WATCHED)


def test_import_waits_with_the_heavy_libraries(seen: dict[str, Any]) -> None:
    assert seen["heavy"] == []


def test_every_public_name_is_there() -> None:
    import pyroflows as pf

    assert set(pf.__all__) <= set(dir(pf))
    with pytest.raises(AttributeError, match="module 'pyroflows' has no attribute 'nothing'"):
        pf.nothing  # noqa: B018
    assert sorted(pf.__all__) == sorted(set(pf.__all__))
    for name in pf.__all__:
        assert getattr(pf, name) is not None
