"""Guides that are built in their first call, when the model tells their sizes."""

from __future__ import annotations

import copy
from typing import Any

from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ..model.handlers import DetachedCopies

__all__ = ["BuiltLate"]


class BuiltLate(AutoGuide):
    """Saving and copying of an autoguide whose modules are made in its first call."""

    _waiting_state: dict[str, Tensor] | None = None

    def load_waiting_state(self) -> None:
        """Loads the state that was given before there were modules to take it."""
        if self._waiting_state is not None:
            self.load_state_dict(self._waiting_state)
            self._waiting_state = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.prototype_trace is None:
            # The flow is made in the first call, when the model tells its size; the state waits
            # until then.
            named = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
            self._waiting_state = {k: v.detach().clone() for k, v in named.items()}
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + k: v for k, v in (self._waiting_state or {}).items()})

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own forgets the model and the master of the original, not only of the copy.
        model, master = self._model, self.master
        try:
            return dict(super().__getstate__())
        finally:
            object.__setattr__(self, "_model", model)
            object.__setattr__(self, "master", master)

    def __deepcopy__(self, memo: dict[int, Any]) -> BuiltLate:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        # The trace of the model in it carries a graph where priors depend on parameters.
        with DetachedCopies():
            new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        object.__setattr__(new, "_model", self._model)
        return new
