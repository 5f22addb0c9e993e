"""By which a density is known again: its data, and what it says at a few points."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._random import forked
from ..model.density import LogDensity
from .files import is_plain

__all__ = ["Fingerprint", "take_fingerprint"]

POINTS = 4
#: Up to this share of it, a log density may be rounded otherwise on another machine.
ROUNDING = 1e-4


class Fingerprint(NamedTuple):
    """What tells the data of a model, and the model, from others.

    Attributes:
        digest: SHA-256 of the arguments of the model; ``None`` where it has arguments that are
            neither numbers, strings nor tensors, or reads them from a loader.
        log_density: The log joint at a few points, which data that the model holds itself change
            too.
    """

    digest: str | None
    log_density: list[float]

    def agrees(self, other: Fingerprint) -> bool:
        """Whether two fingerprints are of one model and data, as far as they tell."""
        known = self.digest is not None and other.digest is not None
        pairs = zip(self.log_density, other.log_density, strict=False)
        alike = all(_alike(a, b) for a, b in pairs)
        return alike and (not known or self.digest == other.digest)


def take_fingerprint(density: LogDensity) -> Fingerprint:
    """Takes the fingerprint of a density.

    Args:
        density: The log density of a model, over all of its data.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> one, two = (LogDensity(model, (torch.tensor(y),)) for y in (1.0, 2.0))
        >>> take_fingerprint(one).agrees(take_fingerprint(two))
        False
    """
    with forked(0), torch.no_grad():
        points = torch.randn(POINTS, density.features).to(density.initial)
        log_density = [float(value) for value in density.log_prob(points)]
    return Fingerprint(None if density.streamed else _digest(density), log_density)


def _digest(density: LogDensity) -> str | None:
    arguments = _arguments(density)
    if not is_plain(arguments):
        return None
    sha = hashlib.sha256()
    for part in _parts(arguments):
        sha.update(part)
    return sha.hexdigest()


def _arguments(density: LogDensity) -> dict[str, Any]:
    """The arguments by name, however they were given."""
    model = density.unwrapped_model
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        bound = inspect.signature(function).bind(*density.args, **density.kwargs)
        bound.apply_defaults()
    except (TypeError, ValueError):  # a callable that hides its signature
        return {"args": list(density.args), "kwargs": density.kwargs}
    return dict(bound.arguments)


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    """The bytes of nested data, with what tells them from data of another nesting."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        yield f"{{{len(value)} ".encode()
        for key in sorted(value):
            yield f"{key!r} ".encode()
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)} ".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield f"{value!r} ".encode()


def _alike(a: float, b: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return repr(a) == repr(b)
    return abs(a - b) <= ROUNDING * (1 + abs(a))
