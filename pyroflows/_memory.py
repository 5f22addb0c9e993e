"""The memory of a map's last evaluation, which scores a fresh sample for free."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._compat import stamp, transforming


class Evaluation(NamedTuple):
    """One evaluation: the tensor that was given, the result, and its log-determinant."""

    given: Tensor
    result: weakref.ref[Tensor]
    log_det: Tensor
    tag: Any
    definition: tuple[Tensor | bool, ...]
    state: tuple[Any, ...]


class Memory:
    """One slot for the last evaluation.

    It holds what was given and only watches what came out, so that it empties itself once the
    result is gone. It answers only for the very tensor that came out, and only while no tensor
    involved has been written to since, under the same gradient mode. It holds the definition of the
    map too, so that no other tensor can come by its identity. Under compilation and function
    transforms, where tensors are stand-ins, and for tensors of inference mode, which do not count
    their writes, it keeps nothing; a copy or a pickle starts empty.
    """

    def __init__(self) -> None:
        self._last: Evaluation | None = None

    def keep(
        self,
        given: Tensor,
        result: Tensor,
        log_det: Tensor,
        define: Callable[[], Iterable[Tensor | bool]],
        tag: Any = None,
    ) -> None:
        """Remembers an evaluation; ``define`` returns the tensors and flags that define the map."""
        if transforming():
            return
        self.clear()
        definition = tuple(define())
        if given is result or any(
            _is_inference(part) for part in (given, result, log_det, *definition)
        ):
            return
        owner = weakref.ref(self)

        def forget(_: weakref.ref[Tensor]) -> None:
            memory = owner()
            if memory is not None:
                memory.clear()

        state = _state(given, result, log_det, *definition)
        self._last = Evaluation(given, weakref.ref(result, forget), log_det, tag, definition, state)

    def recall(
        self, result: Tensor, define: Callable[[], Iterable[Tensor | bool]]
    ) -> Evaluation | None:
        """The last evaluation, if ``result`` came out of it and nothing has changed since."""
        if transforming():
            return None
        last = self._last
        if last is None or last.result() is not result:
            return None
        return last if last.state == _state(last.given, result, last.log_det, *define()) else None

    def clear(self) -> None:
        """Forgets."""
        self._last = None

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()


def _state(*parts: Tensor | bool) -> tuple[Any, ...]:
    stamps = [part if isinstance(part, bool) else stamp(part) for part in parts]
    return (torch.is_grad_enabled(), *stamps)


def _is_inference(part: Tensor | bool) -> bool:
    return not isinstance(part, bool) and part.is_inference()
