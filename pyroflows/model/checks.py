"""Models and arguments that have no log density here, each refused in one sentence."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .._compat import unvalidated, validates
from .sites import (
    LatentSite,
    Node,
    distribution_name,
    is_discrete,
    latent_nodes,
    plate_frames,
    sample_nodes,
)

__all__ = [
    "check_all_data",
    "check_arguments",
    "check_call",
    "check_data",
    "check_entries",
    "check_latents",
    "check_no_nan",
    "check_outside_of_parts",
    "check_plate_sizes",
    "check_rows",
    "check_same_shapes",
    "check_same_values",
    "check_scaled",
]


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
            f"{', '.join(given)} ({error})."
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
        raise ValueError(
            "Expected a model with a latent site; got one in which every sample site is observed."
        )
    discrete = [(name, node["fn"]) for name, node in nodes if is_discrete(node)]
    for name, fn in discrete:
        if not fn.has_enumerate_support:
            raise ValueError(
                f"Expected continuous or enumerable latent sites; got {name!r} with "
                f"{distribution_name(fn)}, which is discrete without a finite support."
            )
    if len(discrete) == len(nodes):
        names = ", ".join(repr(name) for name, _ in nodes)
        raise ValueError(
            f"Expected a model with a continuous latent site; got only discrete ones ({names}). "
            "Use pyro.infer.infer_discrete instead."
        )


def check_entries(sites: Sequence[LatentSite]) -> None:
    """Refuses a model whose latent sites are all empty."""
    if not any(site.features for site in sites):
        names = ", ".join(repr(site.name) for site in sites)
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


def _latent_shapes(trace: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(node["value"].shape) for name, node in latent_nodes(trace)}


def _told(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"of shape {shapes[name]}" if name in shapes else "absent"


# Data


def check_no_nan(trace: Any) -> None:
    """Refuses a model whose log density is NaN where it starts, and names the sites."""
    trace.compute_log_prob()
    nodes = sample_nodes(trace)
    at_fault = [repr(name) for name, node in nodes if bool(node["log_prob_sum"].isnan())]
    if at_fault:
        raise ValueError(
            "Expected a model with a finite log density where it starts; site "
            f"{', site '.join(at_fault)} gives nan. Look for NaN in the data."
        ) from None


def check_data(trace: Any, nesting: int | None = None) -> None:
    """Refuses data to which a distribution, unvalidated, would give a meaningless density.

    Args:
        trace: A trace of the model.
        nesting: The dimensions from the right that plates have, if those on their left are of
            enumerated sites.
    """
    for name, node in sample_nodes(trace):
        if node["is_observed"] and validates(node["fn"]):
            value = torch.as_tensor(node["value"])
            log_prob = torch.as_tensor(unvalidated(node["fn"]).log_prob(value))
            enumerated = 0 if nesting is None else max(0, log_prob.dim() - nesting)
            _check_shape_of_data(name, node, value, log_prob.shape[enumerated:])
            _check_support_of_data(name, node["fn"], value, log_prob)


def _check_shape_of_data(name: str, node: Node, value: Tensor, shape: torch.Size) -> None:
    fn = node["fn"]
    given = value.shape[: value.dim() - fn.event_dim]
    plates = {frame.dim for frame in node["cond_indep_stack"] if frame.vectorized}
    for k, size in enumerate(reversed(shape), start=1):
        grows = k > len(given) or given[-k] != size
        if size > 1 and -k not in plates and grows:
            raise ValueError(
                f"Expected data of the shape of their site; site {name!r} observes shape "
                f"{tuple(value.shape)} under a distribution of batch shape "
                f"{tuple(fn.batch_shape)}, which together make {tuple(shape)}."
            )


def _check_support_of_data(name: str, fn: Any, value: Tensor, log_prob: Tensor) -> None:
    try:
        inside = fn.support.check(value)
    except NotImplementedError:
        return
    if bool((~inside & log_prob.isfinite()).any()):
        raise ValueError(
            f"Expected data within the support of their site; site {name!r} with "
            f"{distribution_name(fn)} observes values outside of {fn.support}."
        )


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


def check_all_data(trace: Any) -> None:
    """Refuses a model that is given a part of the rows of a plate."""
    for frame in plate_frames(trace):
        if frame.full_size is not None and frame.full_size != frame.size:
            raise ValueError(
                f"Expected a model that sees all its data; got plate {frame.name!r} with "
                f"{frame.size} of {frame.full_size} given by subsample=. Use subsample_size=, or "
                "give the data by a DataLoader as args."
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
    # A value that is no number is refused where the fit looks for its start.
    finite = math.isfinite(first) and math.isfinite(last)
    if finite and not math.isclose(first, last, rel_tol=1e-4, abs_tol=1e-4):
        raise ValueError(
            "Expected a model that takes a batch of the loader as it is; got one whose log density "
            "depends on the indices that a subsampled plate draws. Give all data as args instead "
            "of a loader."
        )
