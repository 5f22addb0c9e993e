"""Normalizing flows for Pyro: priors, likelihoods, latents and guides that are right, and know when
they are not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .face import *  # noqa: F403
    from .face import __all__ as __all__


def __getattr__(name: str) -> Any:
    # Torch and Pyro are imported with the first public name, so that the command line answers at
    # once, and Ctrl-C meets a program that can tell of it.
    if name == "__all__" or not name.startswith("_"):
        face = importlib.import_module(".face", __name__)
        if hasattr(face, name):
            return getattr(face, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module(".face", __name__).__all__})
