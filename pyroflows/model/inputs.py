"""What a run of a model takes beside the values of its latent sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from .._compat import tree_leaves

__all__ = ["Inputs", "name_parameters"]


class Inputs(NamedTuple):
    """What a run of a model takes beside the values of its latent sites.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        rows: For each subsampled plate the indices of its rows; empty for all rows.
        parameters: Values of the model's own parameters, by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    rows: Mapping[str, Tensor] = {}
    parameters: Mapping[str, Tensor] = {}

    def shapes(self) -> list[torch.Size]:
        """The shapes of the tensors among the arguments."""
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        return [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> Inputs:
        """These inputs with other values of some parameters.

        Args:
            parameters: Values by name.

        Returns:
            The new inputs.

        Raises:
            TypeError: If a value is no tensor.
            ValueError: If a name is unknown, or a value has another shape.
        """
        for name, value in parameters.items():
            if name not in self.parameters:
                known = ", ".join(map(repr, self.parameters)) or "none"
                raise ValueError(f"Expected parameters of the model ({known}); got {name!r}.")
            shape = tuple(self.parameters[name].shape)
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"Expected parameter {name!r} to be a tensor of shape {shape}; got {value!r}."
                )
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"Expected parameter {name!r} of shape {shape}; got {tuple(value.shape)}."
                )
        return self._replace(parameters={**self.parameters, **parameters})


def name_parameters(model: Any, leaves: Sequence[Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Names the parameters that a model reached: as in the param store, as in the model if it is a
    module, or else by a number.

    Args:
        model: The model.
        leaves: The tensors that it reached and that require a gradient.
        inputs: What it was run on; a tensor among the arguments is data, not a parameter.

    Returns:
        The tensors by name, in order.
    """
    data = {id(leaf) for leaf in tree_leaves((inputs.args, inputs.kwargs))}
    members = model.named_parameters() if isinstance(model, torch.nn.Module) else ()
    names = {id(parameter): name for name, parameter in members}
    store = pyro.get_param_store()
    named: dict[str, Tensor] = {}
    for leaf in leaves:
        if id(leaf) not in data:
            name = store.param_name(leaf) or names.get(id(leaf)) or f"parameter {len(named)}"
            named[name] = leaf
    return named
