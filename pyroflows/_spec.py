"""Plain data that say how an object was made, and objects made anew from such data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions import Transform as TorchTransform

from ._budget import within_budget

__all__ = ["Recorded", "build", "describe", "resolve"]

#: Modules, with those inside of them, whose classes and functions a file may name: the parts of
#: which guides are made.
PARTS = (
    "pyroflows.nn",
    "pyroflows.univariate",
    "pyroflows.transforms",
    "pyroflows.distributions",
    "pyroflows.flows",
    "pyroflows.guides",
    "torch.nn.modules",
    "torch.distributions",
    "pyro.nn",
    "pyro.distributions",
    "pyro.infer.autoguide",
)
#: Objects of torch and Pyro that are described by their attributes, because they keep no record of
#: their arguments.
ATTRIBUTED = (Distribution, TorchTransform, constraints.Constraint)
#: Modules of functions that a file may name, because they compute and do nothing else. Of those of
#: ``torch`` itself this is true where they are methods of tensors too.
FUNCTIONS = ("torch", "torch.nn.functional", "pyro.distributions.transforms")


class Recorded:
    """Remembers the arguments of its constructor, for :func:`describe` to tell how it was made.

    Each subclass is covered without a line of its own. A copy and a pickle keep the description in
    place of the arguments, so that they hold no callable of the user's.

    Example:
        >>> class Doubled(Recorded):
        ...     def __init__(self, features, scale=2.0):
        ...         self.scale = scale
        >>> Doubled(3)._made_by.arguments()
        {'features': 3, 'scale': 2.0}
    """

    _made_by: Call

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]


class Call:
    """The arguments that a class or a function was called with.

    Args:
        function: The class or function.
        args: The positional arguments; iterators among them are read first.
        kwargs: Those by keyword.
    """

    # No attributes of its own, because tensors among the arguments are nothing that a module holds.
    __slots__ = ("args", "function", "kwargs")

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs

    def arguments(self) -> dict[str, Any]:
        """The arguments by name, defaults among them, so that later defaults change nothing."""
        bound = inspect.signature(self.function).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        named = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(named.pop(name))
        return named

    def describe(self) -> dict[str, Any]:
        """The call as plain data."""
        name = name_of(self.function)
        if name is None:
            return _own(self.function)
        return {"call": name, "kwargs": _describe_all(self.arguments())}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Description, (self.describe(),)


class _Description:
    """What a copy or a pickle keeps of a call."""

    __slots__ = ("description",)

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description

    def describe(self) -> dict[str, Any]:
        return self.description

    def __reduce__(self) -> tuple[Any, ...]:
        return _Description, (self.description,)


def _recording(init: Any) -> Any:
    @functools.wraps(init)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_made_by" not in vars(self):
            args, kwargs = _read(args, kwargs)
            object.__setattr__(self, "_made_by", Call(type(self), args, kwargs))
        init(self, *args, **kwargs)

    return recording


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with lists in the place of iterators, which can be read once only."""

    def read(value: Any) -> Any:
        return list(value) if isinstance(value, Iterator) else value

    return tuple(map(read, args)), {key: read(value) for key, value in kwargs.items()}


def describe(value: Any) -> Any:
    """Describes a value by plain data: numbers, strings, tensors, and collections of these.

    Args:
        value: A value; an object whose class is :class:`Recorded`, a dataclass of this package, a
            distribution, transform or constraint of torch or Pyro, or one of their classes and
            functions.

    Returns:
        Plain data from which :func:`build` makes the like, without what it has learned since. Where
        an object is the user's own, so that no data stand for it, ``{"own": name}`` stands in its
        place.

    Example:
        >>> describe((1, torch.nn.SiLU))
        (1, {'name': 'torch.nn.modules.activation:SiLU'})
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, (tuple, list)):
        return type(value)(map(describe, value)) if type(value) in (tuple, list) else _own(value)
    if isinstance(value, Mapping):
        return {"dict": [(describe(key), describe(item)) for key, item in value.items()]}
    return _describe_object(value)


def _describe_object(value: Any) -> dict[str, Any]:
    if isinstance(value, type) or inspect.isroutine(value):
        name = name_of(value)
        return _own(value) if name is None else {"name": name}
    if hasattr(value, "_made_by"):
        return value._made_by.describe()
    if isinstance(value, functools.partial):
        args, kwargs = list(map(describe, value.args)), _describe_all(value.keywords)
        return {"partial": describe(value.func), "args": args, "kwargs": kwargs}
    name = name_of(type(value))
    if name is not None and dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {"call": name, "kwargs": _describe_all(fields)}
    if name is not None and isinstance(value, ATTRIBUTED):
        # A transform refers to its inverse, which is made again when it is asked for.
        state = {key: item for key, item in vars(value).items() if key != "_inv"}
        return {"object": name, "state": _describe_all(state)}
    return _own(value)


def _describe_all(named: Mapping[str, Any]) -> dict[str, Any]:
    return {key: describe(value) for key, value in named.items()}


def _own(value: Any) -> dict[str, Any]:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return {"own": kind.__qualname__}


def build(data: Any) -> Any:
    """Makes what :func:`describe` has described.

    Args:
        data: Plain data.

    Returns:
        The object, as new.

    Raises:
        ValueError: If a part of it is the user's own, or if the data name what may not be made from
            a file.

    Example:
        >>> import pyroflows as pf
        >>> build(describe(pf.transforms.Permute(3)))
        Permute(3, fast: both directions)
    """
    with within_budget():
        return _build(data)


def _build(data: Any) -> Any:
    if isinstance(data, (tuple, list)):
        return type(data)(map(_build, data))
    if not isinstance(data, Mapping):
        return data
    if "own" in data:
        raise own_error(data["own"])
    if "size" in data:
        return torch.Size(data["size"])
    if "dict" in data:
        return {_build(key): _build(item) for key, item in data["dict"]}
    if "name" in data:
        return resolve(data["name"])
    return _build_object(data)


def own_error(name: str) -> ValueError:
    """The error for a part that is the user's own, so that plain data cannot hold it."""
    return ValueError(
        f"Expected a guide made as the one described, because plain data cannot hold {name!r}, "
        "which is the user's own; got none. Pass guide=."
    )


def _build_object(data: Mapping[str, Any]) -> Any:
    if "partial" in data:
        return functools.partial(
            _build(data["partial"]), *map(_build, data["args"]), **_build_all(data["kwargs"])
        )
    if "call" in data:
        return resolve_class(data["call"], object)(**_build_all(data["kwargs"]))
    kind = resolve_class(data["object"], ATTRIBUTED)
    made = kind.__new__(kind)
    vars(made).update(_build_all(data["state"]))
    if issubclass(kind, TorchTransform):
        vars(made)["_inv"] = None
    return made


def _build_all(named: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _build(value) for key, value in named.items()}


def name_of(value: Any) -> str | None:
    """The name by which :func:`resolve` finds a class or function, or ``None``."""
    module = getattr(value, "__module__", None)
    plain = value.__name__ if module == "torch" else getattr(value, "__qualname__", "")
    name = f"{module}:{plain}"
    try:
        return name if resolve(name) is value else None
    except ValueError:
        return None


def resolve(name: str) -> Any:
    """Finds a class or function by the name that :func:`describe` gives it.

    Args:
        name: Module and qualified name, such as ``"pyroflows.flows.coupling:RealNVP"``.

    Returns:
        The class or function.

    Raises:
        ValueError: If there is none, or if a file may not name it.
    """
    module, _, path = name.partition(":")
    value = None
    if module in FUNCTIONS or _is_inside(module, PARTS):
        with contextlib.suppress(ImportError, AttributeError):
            value = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    if value is None or not _may_be_named(value, module):
        raise ValueError(f"Expected a class or function of which guides are made; got {name!r}.")
    return value


def resolve_class(name: str, kinds: type | tuple[type, ...]) -> Any:
    """Finds a class by its name, as :func:`resolve`, that is a subclass of some kinds.

    Args:
        name: Module and qualified name.
        kinds: The classes of which it is to be a subclass.

    Raises:
        ValueError: If there is none, or if a file may not name it.
    """
    value = resolve(name)
    if not isinstance(value, type) or not issubclass(value, kinds):
        raise ValueError(f"Expected another class or function in its place; got {name!r}.")
    return value


def _is_inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _may_be_named(value: Any, module: str) -> bool:
    """Whether a file may name a class or function, because calling it does nothing but compute."""
    if getattr(value, "__module__", None) != module:
        return False
    if isinstance(value, type):
        return module.startswith("pyroflows.") or issubclass(value, (nn.Module, *ATTRIBUTED))
    if value.__name__.startswith("_") or not _is_inside(module, FUNCTIONS[1:]):
        return module == "torch" and hasattr(Tensor, value.__name__)
    return True
