"""Posteriors read from files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._budget import at_most
from .._checks import caller_level, check_model
from .._random import forked
from .._schema import Numbers, Plain, Range
from .._spec import own_error
from .._wording import unstopped
from ..guides import Guide, as_guide, from_spec
from ..model.checks import check_arguments
from ..model.density import LogDensity
from ..model.minibatch import log_density_of
from ..model.simulator import Conditioned
from .files import damaged, describe_sites, read_state, reading
from .fingerprint import Fingerprint, take_fingerprint
from .posterior import Attempt, Posterior
from .verdict import NOT_JUDGED, Finding, Verdict

__all__ = ["load_posterior"]

#: No option of a small guide is larger.
LARGEST = 4096
#: Entries that are made for each saved one: starts, masks, and what is thrown away.
MAKING = 16


class Saved(TypedDict):
    """The fields of a file, each with what may stand there."""

    sites: list[tuple[str, list[Annotated[int, Range(0)]], str]]
    guide: dict[str, Plain]
    parameters: Numbers
    arguments: tuple[list[Plain], dict[str, Plain]] | None
    given_data: bool
    fingerprint: Fingerprint
    verdict: Verdict
    trajectories: Annotated[int, Range(0, 1000)]
    name: str
    rungs: list[Attempt]
    history: list[float]
    seconds: Annotated[float, Range(0)]
    interrupted: bool


#: In the place of a verdict on another model or other data.
OTHER_DATA = Finding(
    "data",
    NOT_JUDGED,
    None,
    None,
    "the model or its data are not those that it was fitted to.",
    grounds=True,
)


def load_posterior(
    path: str | PathLike[str],
    model: Callable[..., Any],
    args: Sequence[Any] | DataLoader | None = None,
    kwargs: Mapping[str, Any] | None = None,
    guide: Any = None,
) -> Posterior:
    """Reads a posterior that :meth:`Posterior.save` wrote.

    Args:
        path: The file.
        model: The model that was fitted.
        args: Its positional arguments, or their loader, where the file does not hold them.
        kwargs: Its keyword arguments, where the file does not hold them.
        guide: A guide made as the one that was saved, where that was made by a callable of your
            own, which no file can hold.

    Returns:
        The posterior, with the verdict that it had; with none, and a warning, if the model or its
        data are not those that the verdict was on.

    Raises:
        TypeError: If ``model`` is no callable, or ``guide`` no guide.
        ValueError: If the file is missing or no saved posterior, if the model is another one, or if
            something is needed that the file does not hold.

    Example:
        >>> import tempfile, pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pf.fit_posterior(model, steps=0, progress=False).save(f"{folder}/x.pt")
        ...     pf.load_posterior(f"{folder}/x.pt", model).verdict.ok
        True
    """
    check_model(model)
    state = read_state(path, Saved)
    density = _make_density(model, args, kwargs, state, path)
    made = _make_guide(guide, density, state, path)
    verdict = _verdict_on(density, state, path)
    with reading(path):
        _try_out(made)
        return Posterior(
            guide=made,
            density=density.rotated(made.centres()),
            verdict=verdict,
            trajectories=state["trajectories"],
            name=state["name"],
            rungs=[Attempt(name, s, Verdict.from_plain(v)) for name, s, v in state["rungs"]],
            history=state["history"],
            seconds=state["seconds"],
            interrupted=state["interrupted"],
        )


def _make_density(
    model: Callable[..., Any], args: Any, kwargs: Any, state: Mapping[str, Any], path: Any
) -> LogDensity:
    if args is None and kwargs is None:
        density = _density_of_file(model, state, path)
    else:
        if not isinstance(args, DataLoader):
            args, kwargs = check_arguments(() if args is None else args, kwargs)
        density = log_density_of(model, args, kwargs).full
    of_file, of_model = state["sites"], describe_sites(density)
    if of_file != of_model:
        raise ValueError(
            f"Expected the model of the saved posterior, with latent sites {of_file}; got one with "
            f"{of_model}."
        )
    return density


def _density_of_file(model: Callable[..., Any], state: Mapping[str, Any], path: Any) -> LogDensity:
    if state["arguments"] is None:
        raise ValueError(
            f"Expected args and kwargs of the model, because {str(path)!r} could not hold them; "
            "got neither."
        )
    args, kwargs = state["arguments"]
    if state["given_data"]:
        model = Conditioned(model)
    try:
        return log_density_of(model, *check_arguments(args, kwargs)).full
    except TypeError as error:
        raise ValueError(
            f"Expected the model of the saved posterior, which takes the arguments in "
            f"{str(path)!r}; got another ({unstopped(error)})."
        ) from error


def _make_guide(guide: Any, density: LogDensity, state: Mapping[str, Any], path: Any) -> Guide:
    if guide is None:
        own = next(_own_parts(state["guide"]), None)
        if own is not None:
            raise own_error(own)
        entries = sum(tensor.numel() for tensor in _tensors(state["parameters"]))
        _check_sizes(state["guide"], max(LARGEST, entries), path)
        with reading(path), at_most(LARGEST**2 + MAKING * entries):
            made = from_spec(state["guide"], density)
    else:
        made = as_guide(guide, density)
    of_file, of_guide = _layout(state["parameters"]), _layout(made.state_dict())
    for name in {**of_file, **of_guide}:
        was, now = of_file.get(name, "none"), of_guide.get(name, "none")
        if was != now:
            raise ValueError(
                f"Expected a guide made as the one saved in {str(path)!r}, with {name} of shape "
                f"{was}; got {now}."
            )
    with reading(path):
        made.load_state_dict(state["parameters"])
    return made


def _try_out(guide: Guide) -> None:
    """Draws and scores once, so that a guide that cannot be used is told now."""
    with forked(0), torch.no_grad():
        z, _ = guide.sample_and_log_prob(2)
        guide.log_prob(z)
    if tuple(z.shape) != (2, guide.features):
        raise ValueError(f"draws of the guide are of shape {tuple(z.shape)}")


def _verdict_on(density: LogDensity, state: Mapping[str, Any], path: Any) -> Verdict:
    """The saved verdict, if it is on this density."""
    if take_fingerprint(density).agrees(Fingerprint(*state["fingerprint"])):
        return Verdict.from_plain(state["verdict"])
    warnings.warn(
        f"The model or its data are not those that the posterior in {str(path)!r} was fitted to, "
        "so its verdict is left out; pyroflows.judge makes another.",
        stacklevel=caller_level(),
    )
    return Verdict((OTHER_DATA,))


def _check_sizes(spec: Mapping[str, Any], most: int, path: Any) -> None:
    """Refuses a description of something larger than the saved numbers, before it is made."""
    largest = max(_whole_numbers(spec), default=0)
    if largest > most:
        raise damaged(path, f"its guide has a size of {largest}")


def _own_parts(data: Any) -> Iterator[str]:
    """The names of the parts of a guide that are the user's own."""
    if isinstance(data, Mapping):
        if "own" in data:
            yield str(data["own"])
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        for item in data:
            yield from _own_parts(item)


def _tensors(state: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def _whole_numbers(data: Any) -> Iterator[int]:
    """All whole numbers in plain data, but seeds, which are no sizes."""
    if type(data) is int:
        yield data
    elif isinstance(data, Mapping):
        yield from _whole_numbers([item for key, item in data.items() if key != "seed"])
    elif isinstance(data, (list, tuple)):
        for item in data:
            yield from _whole_numbers(item)


def _layout(state: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The names of all numbers in a state, with their shapes."""
    layout: dict[str, str] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            layout |= _layout(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            kind = "" if value.is_floating_point() else f" of {value.dtype}"
            layout[f"{prefix}{name}"] = f"{tuple(value.shape)}{kind}"
        else:
            layout[f"{prefix}{name}"] = type(value).__name__
    return layout
