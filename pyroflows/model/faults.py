"""Errors that running a model raises, each told in one sentence that names the site."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import walk_tb
from types import CodeType
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import Distribution
from pyro.poutine.util import site_is_subsample
from torch.distributions import constraints

from .._compat import message_in, plate_in, trace_in
from .._wording import unstopped
from .sites import base_distribution, distribution_name, sample_nodes
from .validity import given_arguments, innermost

__all__ = [
    "check_site",
    "describe_constraint",
    "describe_error",
    "explained",
    "find_place",
    "first_sentence",
]

HERE = str(Path(__file__).parent)
LIBRARIES = ("pyro", "pyroflows", "torch")

# Longer messages are cut.
WIDTH = 300


@contextlib.contextmanager
def explained(run: Callable[[], Any] | None = None) -> Iterator[None]:
    """Context manager that tells an error of the model in one sentence.

    The sentence names the site at which the model failed. Its error is of the type that the model
    raised, so that code that catches that type still does, and is a ``ValueError`` too unless it is
    a ``TypeError``. Its ``__cause__`` is the error of the model.

    Args:
        run: Runs the model without validation and gives its trace. If given, the trace is searched
            for parameters that their distribution does not take.

    Raises:
        TypeError: If the model raises one.
        ValueError: If the model raises any other exception, of whose type this one is too.

    Example:
        >>> import pyro
        >>> def model():
        ...     pyro.sample("x", {}["prior"])
        >>> with explained():
        ...     pyro.poutine.trace(model).get_trace()
        Traceback (most recent call last):
            ...
        KeyError: Expected a model that runs; got KeyError ('prior') before its first site.
    """
    try:
        yield
    except Exception as error:
        # Pyro raises an error anew, with the shapes of the trace.
        retold = "Trace Shapes:" in _text(error) and error.__cause__ is not None
        root = error.__cause__ if retold else error
        if isinstance(root, (TypeError, ValueError)) and _raised_here(root):
            raise root from root.__cause__
        if run is not None:
            _look_for_parameters(run, error)
        raise (_diagnosed(error) or _like(error, _told(error))) from error


def _like(error: Exception, sentence: str) -> Exception:
    """An error of the same type, and a ``ValueError`` or ``TypeError``, that says a sentence."""
    kind = type(error)
    if kind in (TypeError, ValueError):
        return kind(sentence)
    bases = (kind,) if issubclass(kind, (TypeError, ValueError)) else (ValueError, kind)
    if issubclass(kind, StopIteration):  # which would end the generator that raises it
        return ValueError(sentence)
    try:
        members = {"__str__": lambda self: sentence, "__module__": kind.__module__}
        made = type(kind.__name__, bases, members)
        # The user's class may need other arguments than a sentence.
        return kind.__new__(made, sentence)
    except TypeError:  # a class that may not be extended
        return ValueError(sentence)


def describe_error(error: BaseException) -> str:
    """The type and the message of an error, in one line without a full stop."""
    text = _line(error).split(", but found invalid values")[0]
    # The allocator of torch begins with a place in its own source.
    text = re.sub(r"^\[enforce fail at [^]]*\] (err == 0\. )?", "", unstopped(text))
    name = type(error).__name__.lstrip("_")
    return f"{name} ({textwrap.shorten(text, WIDTH, placeholder=' ...')})" if text else name


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, or the name of its type."""
    return _line(error).split(". ")[0][:200] or type(error).__name__


def _line(error: BaseException) -> str:
    """The message of an error in one line, without the shapes of the trace that Pyro adds."""
    return " ".join(_text(error).split("Trace Shapes:")[0].split())


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a class of the user's, whose own text fails
        return ""


def _raised_here(error: BaseException) -> bool:
    """Whether an error is a sentence of this room's own."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_code.co_filename.startswith(HERE)


def _look_for_parameters(run: Callable[[], Any], error: Exception) -> None:
    """Names parameters at fault, which the error of a distribution shows but whose site it does
    not know."""
    try:
        trace, last = run(), None
    except Exception as again:  # the sites up to this one are known
        trace, last = trace_in(again), message_in(again)
    sites = [] if trace is None else [(name, node["fn"]) for name, node in sample_nodes(trace)]
    if last is not None and last["type"] == "sample" and not site_is_subsample(last):
        sites.append((last["name"], last["fn"]))
    for name, fn in sites:
        try:
            _check_parameters(name, fn)
        except ValueError as found:
            raise found from error


def _diagnosed(error: Exception) -> Exception | None:
    """An error that names the cause of another one, where that is known."""
    plate = plate_in(error)
    if plate is not None and plate[1] == 0:
        return ValueError(f"Expected data with rows; plate {plate[0]!r} has no rows.")
    message = message_in(error)
    if message is not None and site_is_subsample(message) and "Multiple sample" in _text(error):
        name = message["name"]
        told = f"Expected plates with names of their own, and none in itself; got {name!r} twice."
        return _like(error, told)
    if message is not None:
        name, fn = message["name"], message["fn"]
        if not isinstance(name, str):
            told = f"Expected sites whose names are strings with letters; got {name!r}."
            return TypeError(told)
        if message["type"] == "sample" and not isinstance(fn, Distribution):
            return TypeError(_not_a_distribution(name, fn))
    return None


def _told(error: Exception) -> str:
    return f"Expected a model that runs; got {describe_error(error)} {find_place(error)}."


# Distributions at fault


def check_site(name: str, fn: Any) -> None:
    """Refuses a site without a name, or whose distribution is not one of Pyro's."""
    if not name:
        raise ValueError(f"Expected sites whose names are strings with letters; got {name!r}.")
    if not isinstance(fn, Distribution):
        raise TypeError(_not_a_distribution(name, fn))
    stable = base_distribution(fn)
    if isinstance(stable, dist.StableWithLogProb) and stable.coords == "S":
        raise ValueError(
            f"Expected StableWithLogProb with coords='S0'; site {name!r} has 'S', of which Pyro's "
            "density is wrong."
        )


def _not_a_distribution(name: str, fn: Any) -> str:
    if isinstance(fn, type):
        got = f"the class {fn.__name__} without its parameters"
    elif isinstance(fn, torch.distributions.Distribution):
        got = f"{distribution_name(fn)} of torch.distributions"
    else:
        got = f"an object of type {type(fn).__name__}"
    return f"Expected distributions of Pyro; site {name!r} has {got}."


def _check_parameters(name: str, fn: Any) -> None:
    """Refuses parameters that a distribution, made without validation, does not take."""
    fn = base_distribution(fn)
    for parameter, constraint, value in given_arguments(fn):
        _check_parameter(name, fn, parameter, innermost(constraint), value)


def _check_parameter(name: str, fn: Any, parameter: str, bound: Any, given: Any) -> None:
    value = torch.as_tensor(given)
    wrong = ~bound.check(value)
    if not bool(wrong.any()):
        return
    if bool(value.isnan().any()):
        raise ValueError(
            f"Expected a model with a finite log density where it starts; site {name!r} gives nan. "
            f"Look for NaN in the data, from which {parameter} is computed."
        )
    told = f"{float(value[wrong][0]):g}" if wrong.shape == value.shape else "a value"
    count = f" in {int(wrong.sum())} of {wrong.numel()} entries" if wrong.dim() else ""
    raise ValueError(
        f"Expected parameters that {type(fn).__name__} takes; site {name!r} has {parameter} "
        f"{told}{count}, outside of {describe_constraint(bound)}."
    )


def describe_constraint(constraint: Any) -> str:
    """The numbers that a constraint allows, in words where these are shorter than its name."""
    inner = innermost(constraint)
    return NUMBERS.get(str(inner), str(inner))


# By their texts, because constraints of equal bounds are not equal.
NUMBERS = {
    str(constraints.positive): "the positive numbers",
    str(constraints.nonnegative): "the nonnegative numbers",
    str(constraints.unit_interval): "the unit interval",
    str(constraints.nonnegative_integer): "the nonnegative whole numbers",
    str(constraints.positive_integer): "the positive whole numbers",
    str(constraints.boolean): "0 and 1",
    str(constraints.simplex): "the simplex",
}


# Where a model failed


def find_place(error: Exception) -> str:
    """Where in the model an error arose, as far as it can be told."""
    plate, message = plate_in(error), message_in(error)
    if plate is not None:
        return f"at plate {plate[0]!r}"
    if message is not None:
        return f"at {_role(message)} {message['name']!r}"
    written = _site_in_source(error)
    if written is not None:
        return f"at site {written!r}"
    trace = trace_in(error)
    if trace is None:
        return "when it is evaluated"
    names = [name for name, _ in sample_nodes(trace)]
    return f"after site {names[-1]!r}" if names else "before its first site"


def _role(message: Any) -> str:
    if message["type"] == "param":
        return "parameter"
    return "plate" if site_is_subsample(message) else "site"


def _site_in_source(error: Exception) -> str | None:
    """The name in the sample statement on whose lines an error arose: the distribution is made
    before Pyro hears of the site."""
    for frame, line in reversed(list(walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__"))
        if module.split(".")[0] not in LIBRARIES:
            name = _sample_statement(frame.f_code, line)
            if name is not None:
                return name
    return None


def _sample_statement(code: CodeType, line: int) -> str | None:
    """The name of the innermost ``pyro.sample("name", ...)`` on a line of the source."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):
        return None
    # Of a whole file, as of a lambda in it, lines are counted from 0.
    within = line - max(first, 1) + 1
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    around = [node for node in calls if node.lineno <= within <= (node.end_lineno or 0)]
    names = [name for name in map(_sample_name, around) if name is not None]
    return names[-1] if names else None


def _sample_name(call: ast.Call) -> str | None:
    function = getattr(call.func, "attr", getattr(call.func, "id", None))
    name = getattr(call.args[0], "value", None) if call.args else None
    return name if function == "sample" and isinstance(name, str) else None
