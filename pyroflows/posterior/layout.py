"""How simulations become the points and contexts of flows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._compat import without_handlers
from .._random import forked
from ..model.simulations import Simulations, check_parameters
from ..model.simulator import Simulator, as_values

__all__ = ["Layout"]


class Layout:
    """How parameters become vectors, and data the context of a flow.

    Args:
        density: A log density with the names and supports of the parameters.
        shapes: The shape of each data site.

    Attributes:
        shape: The shape of one data set as a context: that of the single site, or a vector of all.
    """

    def __init__(self, density: Any, shapes: Mapping[str, torch.Size]) -> None:
        self.density, self.shapes = density, dict(shapes)
        sizes = [shape.numel() for shape in self.shapes.values()]
        self.shape = torch.Size([sum(sizes)])
        if len(self.shapes) == 1:
            [self.shape] = self.shapes.values()

    @classmethod
    def of(cls, simulator: Simulator, simulations: Simulations) -> Layout:
        """The layout of some simulations."""
        first = {name: value[0] for name, value in simulations.x.items()}
        with without_handlers(), forked(0):
            density = simulator.density(first)
        check_parameters(simulations, {site.name: site.shape for site in density.sites})
        return cls(density, {name: value.shape for name, value in first.items()})

    @property
    def features(self) -> int:
        """Entries of a vector of parameters."""
        return int(self.density.features)

    def vectors(self, simulations: Simulations) -> Tensor:
        """The parameters as unconstrained vectors, of shape ``(n, features)``."""
        return self.density.unconstrain(simulations.theta).to(self.density.initial)

    def join(self, x: Mapping[str, Tensor]) -> Tensor:
        """Data of shapes ``(n, *shape)`` as contexts of shape ``(n, *self.shape)``."""
        parts = [value.flatten(1) for value in (x[name].unsqueeze(-1) for name in self.shapes)]
        return torch.cat(parts, -1).reshape(-1, *self.shape).to(self.density.initial)

    def read(self, x: Any) -> dict[str, Tensor]:
        """Data as a user gives them, by name.

        Raises:
            TypeError: If they are no numbers.
            ValueError: If a site is missing, of another shape, or not finite.
        """
        named = x if isinstance(x, Mapping) else {next(iter(self.shapes)): x}
        if set(named) != set(self.shapes):
            names = ", ".join(map(repr, self.shapes))
            raise ValueError(
                f"Expected data by the names {names}; got "
                f"{', '.join(map(repr, named)) if isinstance(x, Mapping) else 'one value'}."
            )
        values = {name: as_values(name, named[name]) for name in self.shapes}
        for name, value in values.items():
            shape = tuple(self.shapes[name])
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"Expected {name} of shape {shape}, as in the simulations; got "
                    f"{tuple(value.shape)}."
                )
            if not bool(value.isfinite().all()):
                bad = int((~value.isfinite()).sum())
                raise ValueError(
                    f"Expected finite numbers in {name}; {bad} of {value.numel()} are not."
                )
        return values
