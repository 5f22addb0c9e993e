"""What the command line fits: a model from a file or an example, with data from a JSON file."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from .._files import read_whole, reason
from .errors import UserError, describe, line_in, sentence, shown

#: Combinations of one size that are tried as real numbers.
MOST_TRIED = 8

__all__ = ["Problem", "load_problem"]


@dataclass(frozen=True)
class Problem:
    """A model, the arguments to call it with, and the file in which it is written."""

    name: str
    model: Callable[..., Any]
    source: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


# The model and its data


def load_problem(model: str, data: str | None) -> Problem:
    """Loads the model that the command line names, with its data.

    Args:
        model: The name of a packaged example, or ``path/to/model.py:function``.
        data: A JSON file with the arguments of the model, or ``None`` for those of the example.

    Returns:
        What to fit.

    Raises:
        UserError: If there is no such model, or if it cannot take the data.
    """
    from ..examples import EXAMPLES, load_example

    if ":" in model:
        file, _, name = model.rpartition(":")
        return _with_data(name, _find(_import(file), file, name), file, data)
    if model not in EXAMPLES:
        raise UserError(
            f"There is no example {model!r}; the examples are {', '.join(EXAMPLES)}, and a model "
            "of your own is written path/to/model.py:function."
        )
    example = load_example(model)
    source = inspect.getfile(example.model)
    if data is not None:
        return _with_data(model, example.model, source, data)
    return Problem(model, example.model, source, example.args, example.kwargs)


def _import(file: str) -> ModuleType:
    path = Path(file)
    if "\0" in file or not os.path.isfile(path):  # Path.is_file raises for too long a name
        raise UserError(f"There is no model file {shown(file)}.")
    spec = importlib.util.spec_from_file_location(f"_pyroflows_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"Expected a model file that ends in .py; got {file}.")
    module = importlib.util.module_from_spec(spec)
    # As under `python model.py`: a model may import its neighbours, and dataclasses need a module.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a model may raise anything
        line = error.lineno if isinstance(error, SyntaxError) else line_in(file, error)
        where = file if line is None else f"{file}, line {line}"
        raise UserError(f"Could not import the model: {describe(error)} at {where}.") from error
    return module


def _find(module: ModuleType, file: str, name: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        functions = inspect.getmembers(module, inspect.isfunction)
        own = [key for key, function in functions if function.__module__ == module.__name__]
        known = f"; its functions are {', '.join(own)}" if own else ", nor any function"
        raise UserError(f"There is no {name!r} in {file}{known}.")
    model: Any = getattr(module, name)
    if isinstance(model, type) or not callable(model):
        kind = "a class" if isinstance(model, type) else f"of type {type(model).__name__}"
        expected = f"Expected {name!r} in {file} to be a function or a PyroModule instance"
        raise UserError(f"{expected}; it is {kind}.")
    return model  # type: ignore[no-any-return]


def _with_data(name: str, model: Callable[..., Any], source: str, file: str | None) -> Problem:
    data = {} if file is None else _read_data(file)
    parameters = _parameters(model)
    _check_keys(name, parameters, data, file)
    by_place = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]

    def problem(data: Mapping[str, Any]) -> Problem:
        given = dict(data)
        args = tuple(given.pop(p.name, p.default) for p in by_place)
        return Problem(name, model, source, args, given)

    return _with_reals(problem, data)


def _with_reals(problem: Callable[[Mapping[str, Any]], Problem], data: dict[str, Any]) -> Problem:
    """Makes whole numbers real where the model takes real ones alone, and no more than needed.

    A JSON file does not tell whether ``[1, 2]`` are counts or measurements, and torch takes whole
    numbers neither in products with real ones nor as all parameters of distributions.
    """
    given = problem(data)
    whole = [key for key, value in data.items() if _is_whole(value)]
    if not whole or _runs(given):
        return given
    for count in range(1, len(whole) + 1):
        for keys in itertools.islice(itertools.combinations(whole, count), MOST_TRIED):
            reals = {key: data[key] * 1.0 for key in keys}
            changed = problem({**data, **reals})
            if _runs(changed):
                return changed
    return given  # the fit tells what fails


def _is_whole(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.dtype is torch.int64


def _runs(problem: Problem) -> bool:
    """Whether the model can be run and scored."""
    import pyro

    from .._random import seeded

    trace = pyro.poutine.trace(problem.model)
    with seeded(0), pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trace.get_trace(*problem.args, **problem.kwargs).compute_log_prob()
        except KeyboardInterrupt:
            raise
        except BaseException:  # a model may raise anything
            return False
    return True


def _parameters(model: Callable[..., Any]) -> list[inspect.Parameter]:
    # The __call__ of a module takes anything; what its forward takes is what counts.
    function = getattr(model, "forward", model)
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # compiled callables have no signature
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def _check_keys(
    name: str, parameters: list[inspect.Parameter], data: Mapping[str, Any], file: str | None
) -> None:
    """Tells all missing or unknown keys at once, where ``Signature.bind`` would tell the first."""
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in data]
    if missing and file is None:
        needs = f"The model {name!r} needs {_listed(missing)}"
        raise UserError(f"{needs}; give a JSON file with --data.")
    if missing:
        raise UserError(f"{file} lacks {_listed(missing)}, which the model {name!r} needs.")
    known = [p.name for p in named]
    unknown = [key for key in data if key not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        takes = f"takes {_listed(known)}" if known else "takes no arguments"
        raise UserError(f"{file} holds {_listed(unknown)}, but the model {name!r} {takes}.")


def _read_data(file: str) -> dict[str, Any]:
    try:
        text = read_whole(Path(file)).decode("utf-8-sig")
        data = json.loads(text, object_pairs_hook=partial(_object, file))
    except OSError as error:
        raise UserError(f"Cannot read --data {shown(file)}: {reason(error)}.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{file} is not JSON: {error.msg} at {where}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {sentence(error)}") from error
    if not isinstance(data, dict):
        kinds = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
        expected = f"Expected {file} to hold a JSON object, its keys the model's arguments"
        raise UserError(f"{expected}; got {kinds.get(type(data), 'a number')}.")
    return {key: _argument(file, key, value) for key, value in data.items()}


def _object(file: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which the parser would keep the last value of each key."""
    keys = [key for key, _ in pairs]
    twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if twice:
        raise UserError(f"Expected each key in {file} once; got {_listed(twice)} more than once.")
    return dict(pairs)


def _argument(file: str, key: str, value: Any) -> Any:
    expected = f"Expected {key!r} in {file} to"
    if isinstance(value, dict):
        raise UserError(f"{expected} be a number, a list or null; got an object.")
    if not isinstance(value, list):
        return value
    import numpy as np
    import torch

    try:
        array = np.array(value)
    except ValueError as error:
        same = "its inner lists must all be of one length"
        raise UserError(f"{key!r} in {file} is ragged: {same}.") from error
    dtypes = {"b": torch.bool, "i": torch.int64, "f": torch.get_default_dtype()}
    if array.dtype.kind not in dtypes:
        numbers = "numbers (NaN for one that is missing, whole ones below 2**63) or booleans"
        raise UserError(f"{expected} hold nothing but {numbers}.")
    return torch.tensor(array, dtype=dtypes[array.dtype.kind])


def _listed(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
