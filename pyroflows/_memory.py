"""What a transform or distribution remembers of its last evaluation, so that a fresh sample is scored for free."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Evaluation(NamedTuple):
    """One evaluation: the tensor that was given, the one that came out, and what was learnt on the way."""

    given: Tensor
    result: weakref.ref[Tensor]
    log_det: Tensor
    tag: Any
    state: tuple[Any, ...]


class Memory:
    """One slot for the last evaluation.

    It holds what was given and only watches what came out, so that it empties itself once the result is gone. It
    answers only for the very tensor that came out, and only while no tensor involved has been written to since, under
    the same gradient mode. Under compilation and function transforms, where tensors are stand-ins, it keeps nothing; a copy
    or a pickle starts empty.
    """

    def __init__(self) -> None:
        self._last: Evaluation | None = None

    def keep(self, given: Tensor, result: Tensor, log_det: Tensor, definition: Iterable[Tensor], tag: Any = None) -> None:
        """Replaces what is remembered."""
        self.clear()
        if given is result or _transforming() or any(t.is_inference() for t in (given, result, log_det)):
            return
        owner = weakref.ref(self)

        def forget(dead: weakref.ref[Tensor]) -> None:
            memory = owner()
            if memory is not None and memory._last is not None and memory._last.result is dead:
                memory.clear()

        state = _state(*definition, given, result)
        self._last = Evaluation(given, weakref.ref(result, forget), log_det, tag, state)

    def recall(self, result: Tensor, definition: Iterable[Tensor]) -> Evaluation | None:
        """The last evaluation, if ``result`` came out of it and nothing has changed since."""
        last = self._last
        if last is None or last.result() is not result or _transforming():
            return None
        return last if last.state == _state(*definition, last.given, result) else None

    def clear(self) -> None:
        """Forgets."""
        self._last = None

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()


def _state(*tensors: Tensor) -> tuple[Any, ...]:
    return (torch.is_grad_enabled(), *((id(t), t._version, t.requires_grad, t.retains_grad) for t in tensors))


def _transforming() -> bool:
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
