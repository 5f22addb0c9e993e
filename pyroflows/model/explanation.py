"""Why a model cannot be evaluated at a point."""

from __future__ import annotations

import functools

from torch import Tensor

from .density import LogDensity
from .faults import describe_error, find_place
from .program import FAILURES
from .runs import value_at

__all__ = ["explain"]


def explain(density: LogDensity, z: Tensor) -> str:
    """Says why a model cannot be evaluated at a point, and where.

    Args:
        density: The density of the model.
        z: Point of shape ``(features,)``.

    Returns:
        The error and its place, or the sites whose densities are not finite.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(1.0, 1.0))
        ...     pyro.sample("y", dist.Gamma(x, 1.0), obs=torch.tensor(1.0))
        >>> explain(LogDensity(model), torch.tensor([-1.0]))[:45]
        'ValueError (Expected parameter concentration '
    """
    start = functools.partial(value_at, density.constrain(z))
    try:
        density.run_from(start)
    except FAILURES as error:
        return f"{describe_error(error)} {find_place(error)}"
    at_fault = [
        f"site {name!r} gives {float(value):g}"
        for name, value in density.site_log_probs(z).items()
        if not bool(value.isfinite())
    ]
    return ", ".join(at_fault) or "its gradient is not finite"
