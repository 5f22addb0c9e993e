"""Models that cannot be fitted are refused in one sentence that names the site."""

from __future__ import annotations

import re
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from model.hostile import HOSTILE
from pyro import poutine
from pyro.distributions import constraints

from pyroflows.model.faults import describe_constraint, describe_error, explained
from pyroflows.model.minibatch import log_density_of
from pyroflows.posterior.census import find_start


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_model_is_refused_in_one_sentence_that_names_the_site(name: str) -> None:
    make, words = HOSTILE[name]
    model, args = make()
    with pytest.raises((TypeError, ValueError)) as caught:
        find_start(log_density_of(model, args).full)
    said = str(caught.value)
    assert re.fullmatch(r"Expected .*\.", said)
    assert len(said) < 500
    for word in words:
        assert word in said


def failing(error: Exception) -> Any:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        raise error

    return model


class Own(Exception):
    """An error that takes two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first}\n{second}")


class Final(Exception):
    """An error that cannot be extended."""

    def __init_subclass__(cls) -> None:
        raise TypeError("this class is final")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("first\nsecond"),
        LookupError("first\nsecond"),
        OSError(3, "first\nsecond"),
        RuntimeError("first\nsecond"),
        ValueError("first\nsecond"),
        AttributeError("first\nsecond"),
        Exception("first\nsecond"),
        Own("first", "second"),
        torch.linalg.LinAlgError("first\nsecond"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_sentence_has_the_type_of_the_error_of_the_model_which_is_its_cause(
    error: Exception,
) -> None:
    kind = type(error)
    with pytest.raises(kind) as caught:
        log_density_of(failing(error))
    assert isinstance(caught.value, ValueError)
    assert f"got {kind.__name__.lstrip('_')} (" in str(caught.value)
    assert str(caught.value).endswith("after site 'x'.")
    assert "\n" not in str(caught.value)
    cause = caught.value.__cause__
    assert cause is not None
    assert error in (cause, cause.__cause__)  # Pyro raises some anew


def test_an_error_whose_class_cannot_be_extended_is_a_value_error() -> None:
    error = Final("no more")
    with pytest.raises(ValueError, match=r"got Final \(no more\) after site 'x'") as caught:
        log_density_of(failing(error))
    assert caught.value.__cause__ is error


def test_a_type_error_of_the_model_is_told_as_one() -> None:
    with pytest.raises(TypeError, match=r"got TypeError \(no such thing\) after site 'x'"):
        log_density_of(failing(TypeError("no such thing")))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_let_through(kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        log_density_of(failing(kind()))  # type: ignore[arg-type]


def test_a_sentence_of_this_package_is_not_told_anew() -> None:
    model, args = HOSTILE["a_support_without_bijection"][0]()
    with pytest.raises(ValueError, match=r"^Expected latent sites whose support has a bijection"):
        log_density_of(model, args)


def test_without_validation_the_site_of_a_bad_parameter_is_named() -> None:
    model, args = HOSTILE["negative_scale"][0]()
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="site 'y' gives nan"):
        find_start(log_density_of(model, args).full)


def test_a_site_is_named_whose_statement_takes_many_lines() -> None:
    def model() -> None:
        scales: dict[str, float] = {}
        pyro.sample(
            "x",
            dist.Normal(
                0.0,
                scales["x"],
            ),
        )

    with pytest.raises(ValueError, match=r"got KeyError \('x'\) at site 'x'\.$"):
        log_density_of(model)


def test_a_site_without_source_is_told_by_the_one_before() -> None:
    names: dict[str, Any] = {"pyro": pyro, "dist": dist}
    lines = (
        'pyro.sample("w", dist.Normal(0.0, 1.0))',
        'pyro.sample("x", dist.Normal(0.0, {}["x"]))',
    )
    exec("def model():\n  " + "\n  ".join(lines), names)
    with pytest.raises(ValueError, match=r"got KeyError \('x'\) after site 'w'\.$"):
        log_density_of(names["model"])


def test_an_error_outside_of_the_model_is_told_too() -> None:
    with (
        pytest.raises(ValueError, match=r"got RuntimeError \(no room\) when it is evaluated"),
        explained(),
    ):
        raise RuntimeError("no room")


def test_parameters_at_fault_are_counted() -> None:
    def model() -> None:
        scale = torch.tensor([1.0, -2.0, 3.0, 0.0])
        pyro.sample("x", dist.Normal(0.0, scale).to_event(1).mask(True))

    with pytest.raises(ValueError, match=r"site 'x' has scale -2 in 2 of 4 entries, outside of"):
        log_density_of(model)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("a.\n b "), "ValueError (a. b)"),
        (KeyError("age"), "KeyError ('age')"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce fail at x.cpp:1] err == 0. no memory"), "RuntimeError (no memory)"),
        (ValueError("bad\nTrace Shapes:\n  x dist"), "ValueError (bad)"),
        (torch.linalg.LinAlgError("singular"), "LinAlgError (singular)"),
    ],
)
def test_an_error_in_one_line(error: Exception, told: str) -> None:
    assert describe_error(error) == told


class Bare(dist.TorchDistribution):
    """A distribution that says nothing of its parameters."""

    support = dist.constraints.real

    def sample(self, sample_shape: torch.Size = torch.Size()) -> torch.Tensor:
        return torch.zeros(sample_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(value)


def test_a_distribution_without_constraints_of_its_parameters_hides_no_error() -> None:
    def model() -> None:
        pyro.sample("x", Bare(validate_args=False))
        raise KeyError("age")

    with pytest.raises(KeyError, match=r"got KeyError \('age'\) after site 'x'\.$"):
        log_density_of(model)


def test_a_long_error_is_cut() -> None:
    assert len(describe_error(ValueError("word " * 1000))) < 330


def test_a_model_that_is_right_is_left_alone() -> None:
    with explained():
        trace = poutine.trace(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))).get_trace()
    assert "x" in trace


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (constraints.greater_than(0.0), "the positive numbers"),
        (constraints.independent(constraints.unit_interval, 1), "the unit interval"),
        (constraints.greater_than(2.0), "GreaterThan(lower_bound=2.0)"),
    ],
)
def test_constraints_are_told_in_words(constraint: Any, words: str) -> None:
    assert describe_constraint(constraint) == words
