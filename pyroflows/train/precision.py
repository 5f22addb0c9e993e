"""Networks in bfloat16, and all else in the precision of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..transforms import Transform

__all__ = ["MixedPrecision"]

# The methods by which transforms evaluate an ordinary and a masked network.
METHODS = ("forward", "evaluate")


class MixedPrecision:
    """Evaluates the networks of a flow in bfloat16, within ``with`` blocks.

    Their inputs, parameters and outputs stay in the flow's own dtype, and so do the maps whose
    parameters they give, with their log-determinants and scores. Gradients need no
    scaling, because bfloat16 has the range of float32.

    Args:
        module: A flow or transform; until :meth:`remove` its networks ask for the precision.

    Example:
        >>> import pyroflows as pf
        >>> flow = pf.RealNVP(features=2)
        >>> precision = MixedPrecision(flow)
        >>> with precision:
        ...     flow().log_prob(torch.zeros(2)).dtype
        torch.float32
        >>> precision.remove()
    """

    def __init__(self, module: nn.Module) -> None:
        self.active = False
        self._networks = list(_networks(module))
        for network in self._networks:
            for name in METHODS:
                method = getattr(network, name, None)
                if callable(method):
                    setattr(network, name, self._lowered(method))

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *error: Any) -> None:
        self.active = False

    def remove(self) -> None:
        """Leaves the networks as they were."""
        for network in self._networks:
            for name in METHODS:
                vars(network).pop(name, None)

    def _lowered(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            notes = any(isinstance(value, list) for value in args)
            if not self.active or not given or notes:  # notes are taken in the flow's precision
                return method(*args, **kwargs)
            like = given[0]
            with torch.autocast(like.device.type, torch.bfloat16):
                result = method(*args, **kwargs)
            return tree_map(lambda value: value.to(like.dtype), result)

        return run


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules within transforms that are no transforms themselves."""
    for child in module.children():
        inside = isinstance(module, Transform) and not isinstance(child, Transform)
        if inside and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _networks(child)
