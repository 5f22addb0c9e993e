"""The memory that the structure of a model takes, estimated before any of it is allocated."""

from __future__ import annotations

from .._machine import free_memory
from .density import LogDensity
from .double import site_sizes

__all__ = ["check_memory", "estimate_memory"]

# Bytes of a number, and arrays of rows that live at once in a product with second derivatives.
BYTES, ARRAYS = 8, 60
# Numbers for each entry: vectors and their products; bytes for the graph of its neighbours.
NUMBERS, GRAPH = 300, 1500


def estimate_memory(density: LogDensity) -> int:
    """Estimates the memory for the structure of a model and for its marginal density.

    Args:
        density: The log density.

    Returns:
        Bytes, right within a factor of about two for models of many entries.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0).expand([1000]).to_event(1))
        >>> estimate_memory(LogDensity(model)) / 1e6
        4.38
    """
    rows = max(density.features, *site_sizes(density))
    return BYTES * ARRAYS * rows + (BYTES * NUMBERS + GRAPH) * density.features


def check_memory(density: LogDensity) -> None:
    """Refuses a model for whose structure there is too little memory.

    Args:
        density: The log density.

    Raises:
        ValueError: If there is too little.
    """
    needed, free = estimate_memory(density), free_memory(density.initial.device)
    if free is not None and needed > free:
        raise ValueError(
            f"Expected about {needed / 1e9:.3g} GB of free memory for the structure of "
            f"{density.features:,} latent entries; got {free / 1e9:.3g} GB. Use a machine with "
            "more, or a guide over mini-batches of the groups."
        )
