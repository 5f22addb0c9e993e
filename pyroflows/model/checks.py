"""Models and arguments that have no log density here, each refused in one sentence."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .._checks import list_names
from .._compat import unvalidated, validates
from .._wording import unstopped
from .faults import check_site, describe_constraint, describe_error
from .missing import TAKE_NAN
from .shapes import check_mask, check_shape
from .sites import (
    LatentSite,
    base_distribution,
    distribution_name,
    is_discrete,
    latent_nodes,
    plate_frames,
    sample_nodes,
    unmasked_entries,
)
from .supports import zero_outside

__all__ = [
    "check_all_rows",
    "check_arguments",
    "check_call",
    "check_data",
    "check_entries",
    "check_latents",
    "check_outside_of_parts",
    "check_plate_sizes",
    "check_rows",
    "check_same_masks",
    "check_same_shapes",
    "check_same_values",
    "check_scaled",
    "check_sizes",
]


# More latent entries than this are a mistake, and the memory for them would end the process.
MOST_ENTRIES = 10**7


def check_arguments(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a model as a tuple and a dictionary.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments, or ``None``.

    Returns:
        Both.

    Raises:
        TypeError: If they are not a list or tuple, and a mapping from names.
    """
    if not isinstance(args, (list, tuple)):
        raise TypeError(
            "Expected args to be a sequence of arguments such as (x, y); got "
            f"{type(args).__name__}."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"Expected kwargs to be a mapping of names to arguments; got {type(kwargs).__name__}."
        )
    for name in kwargs or {}:
        if not isinstance(name, str):
            raise TypeError(f"Expected kwargs to have names as keys; got {name!r}.")
    return tuple(args), dict(kwargs or {})


def check_call(name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Refuses arguments that do not fit the signature of a model or guide.

    Args:
        name: What to call the function.
        function: The model or guide.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        TypeError: If they do not fit.
    """
    called = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # written in C, or a callable that hides its signature
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [f"{len(args)} in args", *(f"{key!r} in kwargs" for key in kwargs)]
        raise TypeError(
            f"Expected args and kwargs that {name} takes, with the signature {signature}; got "
            f"{', '.join(given)} ({unstopped(error)})."
        ) from None


def check_rows(plate: str, rows: Any, size: int) -> None:
    """Refuses what are no rows of a plate.

    Args:
        plate: Name of the plate.
        rows: Indices of its rows.
        size: How many rows it has.

    Raises:
        TypeError: If they are no tensor of whole numbers.
        ValueError: If they have more dimensions than one, or if there is no such row.
    """
    whole = isinstance(rows, Tensor) and rows.dtype in (torch.int64, torch.int32)
    if not whole:
        got = rows.dtype if isinstance(rows, Tensor) else repr(rows)
        raise TypeError(f"Expected rows of plate {plate!r} to be a tensor of indices; got {got}.")
    if rows.dim() != 1 or not len(rows):
        raise ValueError(
            f"Expected rows of plate {plate!r} of shape (rows,); got {tuple(rows.shape)}."
        )
    # On an accelerator the host would wait in each step.
    if rows.device.type == "cpu" and not bool(((rows >= 0) & (rows < size)).all()):
        raise ValueError(
            f"Expected rows of plate {plate!r} from 0 to {size - 1}; got {rows.min()} to "
            f"{rows.max()}."
        )


# Latent sites


def check_latents(trace: Any) -> None:
    """Refuses a model without continuous latent sites, or with discrete ones that have no end."""
    nodes = list(latent_nodes(trace))
    if not nodes:
        raise ValueError(f"Expected a model with a latent site; got {_without_latents(trace)}.")
    discrete = [(name, node["fn"]) for name, node in nodes if is_discrete(node)]
    for name, fn in discrete:
        if not fn.has_enumerate_support:
            raise ValueError(
                f"Expected continuous or enumerable latent sites; got {name!r} with "
                f"{distribution_name(fn)}, which is discrete without a finite support."
            )
    if len(discrete) == len(nodes):
        raise ValueError(
            "Expected a model with a continuous latent site; got only discrete ones "
            f"({list_names([name for name, _ in nodes])}). "
            "Use pyro.infer.infer_discrete instead."
        )


def _without_latents(trace: Any) -> str:
    observed = [name for name, _ in sample_nodes(trace)]
    if observed:
        return f"one in which every sample site is observed ({list_names(observed)})"
    returned = trace.nodes["_RETURN"]["value"]
    if inspect.isgenerator(returned) or inspect.iscoroutine(returned):
        return "a generator or coroutine, whose statements a call does not run"
    return "one without sample sites"


def check_sizes(name: str, fn: Any) -> None:
    """Refuses a latent site with more entries than any guide can have.

    Args:
        name: Name of the site.
        fn: Its distribution.

    Raises:
        ValueError: If there are more than ``MOST_ENTRIES``.
    """
    shape = fn.shape()
    if shape.numel() > MOST_ENTRIES:
        raise ValueError(
            f"Expected latent sites of at most {MOST_ENTRIES} entries; got {name!r} of shape "
            f"{tuple(shape)}."
        )


def check_entries(sites: Sequence[LatentSite]) -> None:
    """Refuses a model whose latent sites are all empty or masked."""
    if any(site.features for site in sites):
        return
    masked = [site.name for site in sites if site.shape.numel()]
    if masked:
        raise ValueError(
            "Expected a model with a latent site that no mask switches off; got only masked ones "
            f"({list_names(masked)})."
        )
    names = list_names([site.name for site in sites])
    raise ValueError(
        f"Expected a model with a latent site that has entries; got only empty ones ({names})."
    )


def check_same_shapes(first: Any, second: Any) -> None:
    """Refuses a model whose latent sites differ between two of its traces."""
    was, now = (_latent_shapes(trace) for trace in (first, second))
    for name in {**was, **now}:
        if was.get(name) != now.get(name):
            raise ValueError(
                "Expected latent sites of one shape in every run of the model; "
                f"{name!r} was {_told(was, name)} in one run and {_told(now, name)} in the next."
            )


def check_same_masks(sites: Sequence[LatentSite], trace: Any) -> None:
    """Refuses inputs of a model by which entries are needed that a mask has switched off before."""
    for site in sites:
        now = unmasked_entries(trace.nodes[site.name]).to(site.active.device)
        if bool((now & ~site.active).any()):
            raise ValueError(
                f"Expected inputs with the same masks; latent site {site.name!r} has entries that "
                "a mask switched off before and does not now. Make another LogDensity of them."
            )


def _latent_shapes(trace: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(node["value"].shape) for name, node in latent_nodes(trace)}


def _told(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"of shape {shapes[name]}" if name in shapes else "absent"


# Data


def check_data(trace: Any, nesting: int | None = None) -> None:
    """Refuses data to which a distribution would give a meaningless density or none.

    Args:
        trace: A trace of the model.
        nesting: The dimensions from the right that plates have, if those on their left are of
            enumerated sites.
    """
    for name, node in sample_nodes(trace):
        check_site(name, node["fn"])
        if node["is_observed"]:
            value = node["value"]
            _check_kind_of_data(name, value)
            check_shape(name, node, nesting)
            if isinstance(base_distribution(node["fn"]), TAKE_NAN):
                value = torch.as_tensor(value).nan_to_num(nan=0.0)
            _check_support_of_data(name, node["fn"], value)
        check_mask(name, node, nesting)


def _check_kind_of_data(name: str, value: Any) -> None:
    if not isinstance(value, (Tensor, Number)):
        got = f"an object of type {type(value).__name__}"
    elif torch.as_tensor(value).is_complex():
        got = "complex numbers"
    elif isinstance(value, Tensor) and value.is_meta:
        got = "a tensor without numbers, of the device meta"
    else:
        return
    raise TypeError(
        "Expected observed values to be tensors of numbers, as torch.as_tensor makes; site "
        f"{name!r} observes {got}."
    )


def _check_support_of_data(name: str, fn: Any, value: Any) -> None:
    scored = zero_outside(unvalidated(fn))
    inside = _is_inside(fn, torch.as_tensor(value))
    try:
        log_prob = torch.as_tensor(scored.log_prob(value))
    except Exception as error:  # of any type: the distribution may be the user's own
        if bool(inside.all()):
            raise ValueError(
                f"Expected data that their distribution can score; site {name!r} with "
                f"{distribution_name(fn)} raises {describe_error(error)}."
            ) from error
        log_prob = torch.zeros(())
    if bool((~inside & log_prob.isfinite()).any()):
        raise ValueError(
            f"Expected data within the support of their site; site {name!r} with "
            f"{distribution_name(fn)} observes values outside of "
            f"{describe_constraint(fn.support)}."
        )


def _is_inside(fn: Any, value: Tensor) -> Tensor:
    """Which values are in the support of a distribution, as far as it is known and validated.

    Bounds that may move are left to the density, which is zero outside of them.
    """
    everywhere = torch.ones((), dtype=torch.bool, device=value.device)
    checked = validates(fn) and value.numel() and zero_outside(fn) is fn
    try:
        return fn.support.check(value) if checked else everywhere
    except NotImplementedError:
        return everywhere


# Plates of which a run sees a part


def check_outside_of_parts(trace: Any, subsampled: Mapping[str, tuple[int, int]]) -> None:
    """Refuses continuous latent sites in plates of which each run sees a part."""
    for name, node in latent_nodes(trace):
        if is_discrete(node):
            continue
        for frame in node["cond_indep_stack"]:
            if frame.name in subsampled:
                size, part = subsampled[frame.name]
                raise ValueError(
                    f"Expected latent sites outside of subsampled plates; got {name!r} in plate "
                    f"{frame.name!r}, of which each run sees {part} of {size}. Leave out its "
                    "subsample_size, or sum the site out by hand."
                )


def check_all_rows(trace: Any, expected: str, remedy: str) -> None:
    """Refuses a model of which a run has a part of the rows of a plate.

    Args:
        trace: The run.
        expected: What the model is to do with all its rows, such as "draws all its rows".
        remedy: The end of the sentence, and what to do.
    """
    for frame in plate_frames(trace):
        if frame.full_size is not None and frame.full_size != frame.size:
            raise ValueError(
                f"Expected a model that {expected}; got plate {frame.name!r} with {frame.size} of "
                f"{frame.full_size}{remedy}"
            )


# Batches of a loader


def check_plate_sizes(trace: Any, batch: int, rows: int) -> None:
    """Refuses a plate of the size of a batch that is not scaled up to all rows of the data."""
    for name, node in trace.nodes.items():
        plate = node.get("fn")
        if site_is_subsample(node) and plate.subsample_size == batch < plate.size != rows:
            raise ValueError(
                f"Expected plate {name!r} of the size of the data, which are {rows} rows; got "
                f"size {plate.size}."
            )


def check_scaled(trace: Any, observed: Sequence[str], batch: int, rows: int) -> None:
    """Refuses a likelihood of a batch that is not scaled up to all rows of the data."""
    scales = [torch.as_tensor(trace.nodes[name]["scale"]) for name in observed]
    if scales and batch != rows and all(float(scale.max()) == 1 for scale in scales):
        names = ", ".join(map(repr, observed))
        raise ValueError(
            f"Expected a model that scales the likelihood of a batch of {batch} up to all {rows} "
            f"rows; got {names} with scale 1. Put it into pyro.plate(name, {rows}, "
            "subsample_size=len(batch))."
        )


def check_same_values(density_of_rows: Callable[[bool], Tensor]) -> None:
    """Refuses a model that takes its rows by the indices of a plate, unknown to a loader.

    Args:
        density_of_rows: The log density of a batch when plates are given their first rows, or
            their last.
    """
    first, last = (float(density_of_rows(flip)) for flip in (False, True))
    # A value that is not finite is refused where the fit looks for its start.
    finite = math.isfinite(first) and math.isfinite(last)
    if finite and not math.isclose(first, last, rel_tol=1e-4, abs_tol=1e-4):
        raise ValueError(
            "Expected a model that takes a batch of the loader as it is; got one whose log density "
            "depends on the indices that a subsampled plate draws. Give all data as args instead "
            "of a loader."
        )
