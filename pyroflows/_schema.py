"""Plain data that are checked against a declaration before any of them is used."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from torch import Tensor

from ._archive import is_dense

__all__ = ["Numbers", "Plain", "Range", "check_form"]

#: Lists in lists, and the like, beyond which no file of this package goes.
DEEPEST = 100
#: The types that stand for themselves; a whole number stands for a real one too.
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    type(None): ((type(None),), "None"),
    bool: ((bool,), "True or False"),
    int: ((int,), "an integer"),
    float: ((float, int), "a number"),
    str: ((str,), "a string"),
}


class Plain:
    """Declares any nesting of numbers, strings, tensors, lists, tuples and dictionaries."""


class Numbers:
    """Declares dictionaries, one in another, from names to tensors and plain numbers."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Declares bounds of a number, as in ``Annotated[int, Range(0, 10)]``."""

    least: float = -math.inf
    most: float = math.inf


def check_form(data: Any, form: Any, name: str = "it") -> None:
    """Refuses data that are not of the form that a type declares.

    Args:
        data: Plain data, from a file.
        form: A type: of a number or string, ``Literal``, ``X | Y``, ``list[X]``, ``tuple[X, Y]``
            (a list stands for it), ``dict[str, X]``, ``Annotated`` with a :class:`Range`,
            :class:`Plain`, :class:`Numbers`, ``Tensor``; or a class with annotations: a list of the
            fields stands for a ``NamedTuple``, a dictionary for a ``TypedDict`` or a dataclass.
        name: What to call the data.

    Raises:
        ValueError: If they are not; it names the first part that is wrong.

    Example:
        >>> check_form({"a": [1, 2.5]}, dict[str, list[float]])
        >>> check_form({"a": [1, "x"]}, dict[str, list[int]], "sizes")
        Traceback (most recent call last):
        ValueError: sizes.a[1] is 'x', not an integer
    """
    origin, parts = get_origin(form), get_args(form)
    if form in KINDS:
        kinds, wanted = KINDS[form]
        _require(type(data) in kinds, name, data, wanted)
    elif form is Plain:
        _check_plain(data, name)
    elif form is Numbers:
        _check_numbers(data, name)
    elif form is Tensor:
        _require(isinstance(data, Tensor) and _is_whole(data), name, data, "a tensor in memory")
    elif origin is Annotated:
        check_form(data, parts[0], name)
        least, most = parts[1].least, parts[1].most
        _require(least <= data <= most, name, data, f"from {least:g} to {most:g}")
    elif origin is Literal:
        wanted = f"one of {', '.join(map(repr, parts))}"
        _require(type(data) is str and data in parts, name, data, wanted)
    elif origin in (Union, types.UnionType):
        _check_any(data, parts, name)
    else:
        _check_collection(data, form, name)


def _check_collection(data: Any, form: Any, name: str) -> None:
    origin, parts = get_origin(form) or form, get_args(form)
    if origin is dict:
        _require(isinstance(data, Mapping), name, data, "a dictionary")
        for key, value in data.items():
            check_form(key, parts[0], f"a key of {name}")
            check_form(value, parts[1], f"{name}.{key}")
    elif origin is list or parts[1:] == (Ellipsis,):
        _check_list(data, name)
        for i, value in enumerate(data):
            check_form(value, parts[0], f"{name}[{i}]")
    elif issubclass(origin, tuple):
        _check_list(data, name)
        forms = (
            _fields(form) if form is origin else {f"[{i}]": part for i, part in enumerate(parts)}
        )
        _require(len(data) == len(forms), name, data, f"a list of {len(forms)}")
        for (key, part), value in zip(forms.items(), data, strict=True):
            check_form(value, part, f"{name}{key}" if key[0] == "[" else f"{name}.{key}")
    else:
        forms = _fields(form)
        _require(isinstance(data, Mapping), name, data, "a dictionary")
        lacks, more = forms.keys() - data.keys(), data.keys() - forms.keys()
        if lacks or more:
            what, keys = ("lacks", lacks) if lacks else ("holds", more)
            raise ValueError(f"{name} {what} {', '.join(sorted(map(str, keys)))}")
        for key, part in forms.items():
            check_form(data[key], part, f"{name}.{key}")


def _check_any(data: Any, parts: tuple[Any, ...], name: str) -> None:
    errors = []
    for part in parts:
        try:
            return check_form(data, part, name)
        except ValueError as error:
            errors.append(error)
    [first, *others] = errors
    choices = len(others) > 1 or type(None) not in parts
    raise ValueError(f"{name} is of type {type(data).__name__}") if choices else first


def _check_list(data: Any, name: str) -> None:
    _require(type(data) in (list, tuple), name, data, "a list")


def _check_plain(data: Any, name: str, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError(f"{name} is nested too deeply")
    if isinstance(data, Tensor):
        return check_form(data, Tensor, name)
    for part in _parts(data, name):
        _check_plain(part, name, depth + 1)


def _parts(data: Any, name: str) -> Iterator[Any]:
    if isinstance(data, Mapping):
        for key in data:
            _require(type(key) in (str, int), f"a key of {name}", key, "a string")
        yield from data.values()
    elif isinstance(data, (list, tuple)):
        yield from data
    else:
        plain = any(type(data) in kinds for kinds, _ in KINDS.values())
        _require(plain, name, data, "a number, a string or a tensor")


def _check_numbers(data: Any, name: str, depth: int = 0) -> None:
    _require(isinstance(data, Mapping) and depth < DEEPEST, name, data, "a dictionary")
    for key, value in data.items():
        check_form(key, str, f"a key of {name}")
        if isinstance(value, Mapping):
            _check_numbers(value, f"{name}.{key}", depth + 1)
        else:
            check_form(value, Tensor | float | bool | None, f"{name}.{key}")


def _is_whole(tensor: Tensor) -> bool:
    """Whether each entry has a place of its own in memory, so that no copy is larger."""
    return is_dense(tensor) and tensor.is_contiguous()


def _fields(form: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(form, include_extras=True)
    if dataclasses.is_dataclass(form):
        return {field.name: hints[field.name] for field in dataclasses.fields(form) if field.init}
    return hints


def _require(holds: bool, name: str, data: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {_show(data)}, not {wanted}")


def _show(data: Any) -> str:
    if isinstance(data, Tensor):
        return f"a tensor of {data.dtype} and shape {tuple(data.shape)}"
    simple = data is None or isinstance(data, (bool, int, float, str))
    text = repr(data) if simple else ""
    return text if 0 < len(text) < 40 else f"of type {type(data).__name__}"
