"""Holding a transform or a flow to the laws, all at once or one by one."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..flows import Flow
from ..transforms import Transform
from . import _contract, _density, _extremes, _mathematics  # noqa: F401, they enter their laws
from ._case import Broken, Case, LeftOut, Options, parts, told
from ._law import TESTS, premises

#: What each law demands, and why, by its name; each after those that it builds on.
LAWS: dict[str, str] = {
    name: " ".join((TESTS[name].__doc__ or "").split())
    for name in sorted(TESTS, key=lambda name: len(premises(name)))
}


class LawError(ValueError):
    """A law does not hold; the message says which, and where."""


@dataclass(frozen=True)
class LawResult:
    """What came of one law.

    Args:
        name: Name of the law.
        passed: Whether it holds; also true where it was not judged.
        detail: What failed, in a sentence.
        skipped: Why it was not judged, or ``None``.
    """

    name: str
    passed: bool
    detail: str = ""
    skipped: str | None = None

    def __str__(self) -> str:
        outcome = "FAILS" if not self.passed else "holds" if self.skipped is None else "-"
        return f"{self.name:<20}{outcome:<7}{self.detail or self.skipped or ''}".rstrip()


@dataclass(frozen=True)
class Report:
    """What came of all laws for one transform or flow; as a string it is a table.

    Args:
        subject: What was judged.
        results: One result per law.
    """

    subject: str
    results: list[LawResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every law that was judged holds."""
        return all(result.passed for result in self.results)

    @property
    def failed(self) -> list[str]:
        """Names of the laws that fail."""
        return [result.name for result in self.results if not result.passed]

    def __str__(self) -> str:
        skipped = sum(result.skipped is not None for result in self.results)
        held = len(self.results) - skipped - len(self.failed)
        head = (
            f"{self.subject}: {held} laws hold, {len(self.failed)} fail, {skipped} were not judged"
        )
        return "\n".join([head, *(f"  {result}" for result in self.results)])


class Law:
    """One law about one transform or flow, to be called: it raises :class:`LawError` where the law does not hold.

    Where there is nothing to judge, or where the law is exempt, it raises :class:`unittest.SkipTest` with the reason, which
    pytest and unittest both report as a skipped test.
    """

    def __init__(self, name: str, judge: Callable[[str], None]) -> None:
        self.name = name
        self._judge = judge
        self.__doc__ = LAWS[name]

    def __call__(self) -> None:
        self._judge(self.name)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Law({self.name!r})"


def check(
    transform_or_flow: Transform | Flow,
    x: Tensor | None = None,
    context: Tensor | None = None,
    *,
    only: Iterable[str] | None = None,
    exempt: Mapping[str, str] | None = None,
    starts_at_identity: bool = False,
    compile: bool = False,
    accuracy: float = 0.0,
    raises: bool = True,
) -> Report:
    r"""Holds a transform or a flow, as it is, to every law of :data:`LAWS`.

    Everything is tried on copies in evaluation mode: neither parameters nor dtype, training flag, gradients or random
    numbers change. A law that builds on one that fails is not judged, so that the report names causes.

    Args:
        transform_or_flow: What to judge, with its present parameters.
        x: Points to judge it at, of shape ``(*, *event_shape)``: of the domain of a transform, values of a flow. Of many,
            32 are taken. By default normal points, mapped into the domain.
        context: Their contexts, of shape ``(*, *context_shape)``, for all points or for each; by default normal ones.
        only: Names of the laws to judge; all by default.
        exempt: Laws that cannot hold here, with the reason, such as ``{"compiles": "an adaptive solver reads values"}``.
        starts_at_identity: Whether the transform is to be the identity.
        compile: Whether to compile both directions, which takes seconds.
        accuracy: Relative error that the method leaves beside rounding.
        raises: Whether a law that fails is an error; otherwise it is in the report only.

    Returns:
        The report; printed, it is a table.

    Raises:
        LawError: If a law does not hold.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is none of what is described.

    Example:
        >>> import pyroflows as pf
        >>> from pyroflows.testing import check
        >>> flow = pf.RealNVP(features=2, transforms=2, network=pf.nn.mlp((8,)))
        >>> check(flow, only=["round_trip", "log_det"]).ok
        True
        >>> class Doubling(pf.transforms.Transform):
        ...     def forward_and_log_det(self, x, context=None):
        ...         return 2 * x, x.new_zeros(x.shape[:-1])
        ...     def inverse_and_log_det(self, y, context=None):
        ...         return y / 2, y.new_zeros(y.shape[:-1])
        >>> check(Doubling(1), only=["round_trip", "log_det"], raises=False).failed
        ['log_det']
    """
    names, exempt, accuracy = _check_only(only), _check_exempt(exempt), _check_accuracy(accuracy)
    options = Options(starts_at_identity, compile, accuracy, None)
    report, failed = Report(type(transform_or_flow).__name__), set[str]()
    try:
        case = _make_case(transform_or_flow, x, context, options)
    except Broken as broken:  # it cannot even be copied
        report.results.append(LawResult("copies", False, str(broken)))
    else:
        exemptions = _exemptions(transform_or_flow, exempt)
        report.results.extend(_result(case, name, exemptions, failed) for name in names)
    if raises and not report.ok:
        sentences = [
            f"{result.name}: {result.detail}" for result in report.results if not result.passed
        ]
        raise LawError(
            f"{report.subject} breaks {len(sentences)} of the laws.\n" + "\n".join(sentences)
        )
    return report


def laws(
    make_or_instance: Callable[[], Transform | Flow] | Transform | Flow,
    x: Tensor | None = None,
    context: Tensor | None = None,
    *,
    only: Iterable[str] | None = None,
    exempt: Mapping[str, str] | None = None,
    starts_at_identity: bool = False,
    compile: bool = True,
    accuracy: float = 0.0,
) -> list[Law]:
    """The laws one by one, for a suite of tests.

    Args:
        make_or_instance: A transform or flow, or a callable that makes one, which is then called by each law.
        x: Points; see :func:`check`.
        context: Their contexts.
        only: Names of the laws; all by default.
        exempt: Laws that cannot hold, with the reason; they show as skipped tests.
        starts_at_identity: Whether the transform is to be the identity.
        compile: Whether to compile both directions.
        accuracy: Relative error that the method leaves beside rounding.

    Returns:
        Laws, each a callable without arguments that raises :class:`LawError` where it does not hold; ``str`` gives its name.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a law is unknown, or exempt without a reason.

    Example:
        In a suite, ``pytest.mark.parametrize("law", laws(lambda: MyTransform(3)), ids=str)`` on a test that calls ``law()``.

        >>> import pyroflows as pf
        >>> from pyroflows.testing import laws
        >>> for law in laws(lambda: pf.transforms.Reverse(3), only=["log_det", "round_trip"]):
        ...     law()
    """
    if not callable(make_or_instance):
        raise TypeError(
            f"Expected a transform, a flow or a callable that makes one; got {type(make_or_instance).__name__}."
        )
    names, exempt, accuracy = _check_only(only), _check_exempt(exempt), _check_accuracy(accuracy)
    make = None if isinstance(make_or_instance, nn.Module) else make_or_instance
    options = Options(starts_at_identity, compile, accuracy, make)

    def judge(name: str) -> None:
        given: Any = make_or_instance if make is None else make()
        try:
            case = _make_case(given, x, context, options)
            exemptions = _exemptions(given, exempt)
            if name in exemptions:
                raise LeftOut(f"exempt: {exemptions[name]}")
            _judge(case, name)
        except LeftOut as reason:
            raise unittest.SkipTest(str(reason)) from None
        except Broken as broken:
            raise LawError(f"{type(given).__name__} breaks {name}: {broken}") from broken.__cause__

    return [Law(name, judge) for name in names]


def _result(case: Case, name: str, exemptions: Mapping[str, str], failed: set[str]) -> LawResult:
    if name in exemptions:
        return LawResult(name, True, skipped=f"exempt: {exemptions[name]}")
    cause = [need for need in premises(name) if need in failed]
    if cause:
        return LawResult(name, True, skipped=f"builds on {', '.join(cause)}")
    try:
        _judge(case, name)
    except LeftOut as reason:
        return LawResult(name, True, skipped=str(reason))
    except Broken as broken:
        failed.add(name)
        return LawResult(name, False, str(broken))
    return LawResult(name, True)


def _judge(case: Case, name: str) -> None:
    """Runs one law; what the case itself raises counts against the law."""
    case.forget()
    with _isolated():
        try:
            TESTS[name](case)
        except (Broken, LeftOut):
            raise
        except Exception as error:
            raise Broken(f"Expected no error; got {told(error)}.") from error


def _make_case(given: Any, x: Tensor | None, context: Tensor | None, options: Options) -> Case:
    if not isinstance(given, (Transform, Flow)):
        kind = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise TypeError(f"Expected a pyroflows Transform or Flow; got {kind}.")
    tensors = [*given.parameters(), *given.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("Expected parameters on a device that holds values; got some on meta.")
    with _isolated():
        return Case(given, x, context, options)


@contextmanager
def _isolated() -> Iterator[None]:
    """Random numbers of its own, no validation, which reads values back, and gradients."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), dist.validation_enabled(False), torch.enable_grad():
        torch.manual_seed(0)
        yield


def _exemptions(given: nn.Module, exempt: Mapping[str, str]) -> dict[str, str]:
    """What the caller and the classes of all parts declare."""
    declared: dict[str, str] = {}
    for part in parts(given):
        own = _check_exempt(getattr(part, "exempt_laws", None))
        declared |= {name: f"{reason} ({type(part).__name__})" for name, reason in own.items()}
    return declared | dict(exempt)


def _check_exempt(exempt: Any) -> dict[str, str]:
    if exempt is None:
        return {}
    if not isinstance(exempt, Mapping):
        raise TypeError(
            f"Expected exempt to be a dictionary from names of laws to reasons; got {exempt!r}."
        )
    for name, reason in exempt.items():
        _check_name("exempt", name)
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"Expected a reason why {name} is exempt; got {reason!r}.")
    return dict(exempt)


def _check_only(only: Any) -> list[str]:
    if only is None:
        return list(LAWS)
    if isinstance(only, str) or not isinstance(only, Iterable):
        raise TypeError(f"Expected only to be a sequence of names of laws; got {only!r}.")
    names = [_check_name("only", name) for name in only]
    return [name for name in LAWS if name in names]


def _check_name(option: str, name: Any) -> str:
    if name not in LAWS:
        raise ValueError(f"Expected names of laws in {option}, of {', '.join(LAWS)}; got {name!r}.")
    return str(name)


def _check_accuracy(accuracy: Any) -> float:
    if isinstance(accuracy, bool) or not isinstance(accuracy, Real) or not 0 <= float(accuracy) < 1:
        raise ValueError(f"Expected accuracy to be a relative error in [0, 1); got {accuracy!r}.")
    return float(accuracy)
