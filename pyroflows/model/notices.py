"""Warnings about models that can be fitted but may not be what their author meant."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from .._checks import caller_level, list_names
from .density import LogDensity

__all__ = ["warn_of_oversights"]


def warn_of_oversights(density: LogDensity, learned: Collection[str] = ()) -> None:
    """Warns of a model without data, and of parameters that a fit does not learn.

    Data are observed sites with entries, and ``pyro.factor``. Parameters are those of
    ``pyro.param`` and of modules that the model uses; one that requires no gradient, such as those
    of a module after ``requires_grad_(False)``, is meant to be held and not told.

    Args:
        density: The log density of the model.
        learned: Names of parameters that the fit has learned.

    Example:
        >>> import pyro, pyro.distributions as dist, warnings
        >>> density = LogDensity(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn_of_oversights(density)
        >>> print(caught[0].message)
        No site of the model is observed, and it has no pyro.factor, so that its posterior is its
        prior; pass the data to obs= of a sample statement.
    """
    if not density.observed:
        warnings.warn(
            "No site of the model is observed, and it has no pyro.factor, so that its posterior is "
            "its prior; pass the data to obs= of a sample statement.",
            stacklevel=caller_level(),
        )
    held = [name for name in density.parameters if name not in learned]
    if held:
        warnings.warn(
            "The model has parameters that are held at their present values, because only latent "
            f"sites are fitted: {list_names(held)}. To learn them, pass learn=True, or the names of "
            "some, to fit_posterior.",
            stacklevel=caller_level(),
        )
