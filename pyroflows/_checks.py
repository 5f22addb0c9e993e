"""Checks of what users pass in; each raises one sentence that says what was expected and what came."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._wording import unstopped


def check_size(name: str, value: Any, least: int = 1) -> int:
    """Returns ``value`` as an ``int`` of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"Expected {name} to be an integer; got {value!r}.")
    if value < least:
        raise ValueError(f"Expected {name} >= {least}; got {value}.")
    return int(value)


def check_seed(value: Any) -> int:
    """Returns ``value`` as an ``int`` that torch's and numpy's generators take."""
    if check_size("seed", value, least=0) >= 2**32:
        raise ValueError(f"Expected seed < 2**32; got {value}.")
    return int(value)


def check_positive(name: str, value: Any) -> float:
    """Returns ``value`` as a finite ``float`` above zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Expected {name} to be a number; got {value!r}.")
    if not 0 < float(value) < float("inf"):
        raise ValueError(f"Expected {name} to be positive and finite; got {value}.")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Returns ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"Expected {name} to be True or False; got {value!r}.")
    return value


def check_function(name: str, value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` is ``None`` or can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"Expected {name} to be a function; got {value!r}.")


def check_model(value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` can be called, as a model."""
    if not callable(value):
        raise TypeError(f"Expected model to be a callable with Pyro statements; got {value!r}.")


def check_executor(executor: Any) -> Executor | None:
    """Returns an executor of processes, or ``None``.

    Args:
        executor: What a user has given.

    Raises:
        TypeError: If it is no executor.
        ValueError: If it runs threads: they would share Pyro's handlers and random states.
    """
    if executor is None:
        return None
    if not (isinstance(executor, Executor) or callable(getattr(executor, "submit", None))):
        raise TypeError(
            "Expected executor to be one of concurrent.futures, such as ProcessPoolExecutor(4); "
            f"got {executor!r}."
        )
    if isinstance(executor, ThreadPoolExecutor):
        raise ValueError(
            "Expected an executor of processes, because Pyro's handlers and parameters are shared "
            "by all threads; got a ThreadPoolExecutor."
        )
    return executor


def call_factory(name: str, factory: Callable[..., Any], like: str, **arguments: Any) -> Any:
    """Calls a callable of the user's, which takes certain positional arguments.

    Its own errors are left alone; a signature that does not fit is refused in a sentence.
    """
    try:
        inspect.signature(factory).bind(*arguments.values())
    except TypeError as error:
        takes = f"({', '.join(arguments)})"
        raise TypeError(
            f"Expected {name} to be called with {takes}, as {like}; got {factory!r} "
            f"({unstopped(error)})."
        ) from None
    except ValueError:  # written in C, without a signature
        pass
    return factory(*arguments.values())


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of some words."""
    if value not in choices:
        raise ValueError(
            f"Expected {name} to be one of {', '.join(map(repr, choices))}; got {value!r}."
        )


def check_device(name: str, value: Any) -> str:
    """Returns ``value`` as the word for a device on which torch can compute here."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        expected = f"Expected {name} to name a torch device such as cpu or cuda:0"
        raise ValueError(f"{expected}; got {value!r}.") from error
    try:
        # Tensors of the device "meta" have no numbers to give back.
        torch.zeros(1, device=device).add_(1).tolist()
    except Exception as error:  # of many types: each backend has its own
        [reason, *_] = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"Cannot compute on {name} {device}: {unstopped(reason)}.") from error
    return str(device)


def check_hidden(value: Any) -> tuple[int, ...]:
    """Returns the widths of hidden layers as a tuple."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(
            f"Expected hidden to be a sequence of integers such as (64, 64); got {value!r}."
        )
    return tuple(check_size("hidden", width) for width in value)


def check_activation(value: Any) -> nn.Module:
    """Returns the module that an activation makes."""
    made = None
    if callable(value) and not isinstance(value, nn.Module):
        try:
            made = value()
        except TypeError:
            pass
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"Expected activation to make a module when called without arguments, as torch.nn.SiLU does; got {value!r}."
        )
    return made


def check_tensor(name: str, value: Any, shape: Sequence[int]) -> Tensor:
    """Returns ``value`` if it is a floating-point tensor whose last dimensions are ``shape``."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Expected {name} to be a tensor of shape {_pattern(shape)}; got {type(value).__name__}."
        )
    if not value.is_floating_point():
        raise TypeError(f"Expected {name} of a floating-point dtype; got {value.dtype}.")
    n = len(shape)
    if value.dim() < n or tuple(value.shape[value.dim() - n :]) != tuple(shape):
        raise ValueError(f"Expected {name} of shape {_pattern(shape)}; got {tuple(value.shape)}.")
    return value


def check_shape(name: str, value: Any, least: int = 0) -> torch.Size:
    """Returns a shape of at least some dimensions; an integer stands for a vector."""
    is_sequence = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    sizes = value if is_sequence else [value]
    if len(sizes) < least:
        raise ValueError(f"Expected {name} with {least} dimension at least; got {tuple(sizes)}.")
    return torch.Size([check_size(name, size) for size in sizes])


def check_batch_shape(name: str, value: Any) -> torch.Size:
    """Returns the shape of a sample or a batch, such as ``()`` or ``(5, 3)``."""
    try:
        shape = torch.Size(value)
    except TypeError:
        raise TypeError(f"Expected {name} to be a shape such as (5,); got {value!r}.") from None
    if any(size < 0 for size in shape):
        raise ValueError(f"Expected {name} of sizes that are not negative; got {tuple(shape)}.")
    return shape


def check_context_shape(features: Any, shape: Any) -> torch.Size | None:
    """Returns the shape of one context, given in short as the entries of a vector, in full, or not at all."""
    short = None if features is None else torch.Size([check_size("context_features", features)])
    if shape is None:
        return short
    full = check_shape("context_shape", shape, least=1)
    if short is not None and short != full:
        raise ValueError(
            f"Expected context_features or context_shape, of which the former is the short form of "
            f"({features},); got context_shape={tuple(full)} beside it."
        )
    return full


def check_context(context: Any, shape: torch.Size | None, owner: str) -> Tensor | None:
    """Returns ``context`` if it is what a transform or flow with contexts of that shape takes."""
    if shape is None:
        if context is not None:
            raise ValueError(
                f"Expected no context, because {owner} was made without context_features; "
                f"got {_describe(context)}."
            )
        return None
    if context is None:
        raise ValueError(f"Expected context of shape {_pattern(shape)} for {owner}; got None.")
    return check_tensor("context", context, shape)


def broadcast_batch(
    shape: torch.Size, event_dim: int, context: Tensor | None, context_dim: int = 1
) -> torch.Size:
    """The shape of an event tensor after its batch dimensions are broadcast against the context's."""
    if context is None:
        return shape
    cut = len(shape) - event_dim
    batch = context.shape[: context.dim() - context_dim]
    return torch.broadcast_shapes(shape[:cut], batch) + shape[cut:]


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _pattern(shape: Sequence[int]) -> str:
    return "(" + ", ".join(["*", *map(str, shape)]) + ")"


def plain(value: Any) -> Any:
    """Returns a string or a number of Python in the place of one of numpy or of an enumeration."""
    if isinstance(value, np.generic):
        value = value.item()
    return str.__str__(value) if isinstance(value, str) else value


def count(number: int, noun: str) -> str:
    """Returns a number of things for a sentence."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_names(names: Sequence[str], most: int = 5) -> str:
    """Returns names for a sentence: quoted, and counted beyond some."""
    told = ", ".join(map(repr, names[:most]))
    return told if len(names) <= most else f"{told} and {len(names) - most} more"


def caller_level() -> int:
    """Returns the ``stacklevel`` at which a warning points to the first caller outside of this package."""
    package = str(Path(__file__).parent)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    return level
