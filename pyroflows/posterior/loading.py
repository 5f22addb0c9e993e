"""Posteriors read from files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from .._checks import check_size
from ..guides import Guide, as_guide, from_spec
from ..model.checks import check_arguments
from ..model.density import LogDensity
from ..model.minibatch import log_density_of
from .files import damaged, describe_sites, read_state, reading
from .posterior import Attempt, Posterior
from .verdict import Verdict

__all__ = ["load_posterior"]

#: No option of a small guide is larger.
LARGEST = 4096


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
        The posterior, with the verdict that it had.

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
    if not callable(model):
        raise TypeError(f"Expected model to be a callable with Pyro statements; got {model!r}.")
    state = read_state(path)
    density = _make_density(model, args, kwargs, state, path)
    made = _make_guide(guide, density, state, path)
    with reading(path):
        return Posterior(
            guide=made,
            density=density.rotated(made.centres()),
            verdict=Verdict.from_plain(state["verdict"]),
            trajectories=check_size("trajectories", state["trajectories"], least=0),
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
        if state["arguments"] is None:
            raise ValueError(
                f"Expected args and kwargs of the model, because {str(path)!r} could not hold "
                "them; got neither."
            )
        with reading(path):
            args, kwargs = state["arguments"]
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


def _make_guide(guide: Any, density: LogDensity, state: Mapping[str, Any], path: Any) -> Guide:
    if guide is None:
        _check_numbers(state, path)
        with reading(path, ValueError):
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


def _check_numbers(state: Mapping[str, Any], path: Any) -> None:
    """Refuses a description of something larger than the saved numbers, before it is made."""
    shapes = _layout(state["parameters"]).values()
    entries = [math.prod(shape) for shape in shapes if not isinstance(shape, str)]
    most = max(LARGEST, sum(entries))
    largest = max(_whole_numbers(state["guide"]), default=0)
    if largest > most:
        raise damaged(path, f"its guide has a size of {largest}")


def _whole_numbers(data: Any) -> Iterator[int]:
    """All whole numbers in plain data, but seeds, which are no sizes."""
    if type(data) is int:
        yield data
    elif isinstance(data, Mapping):
        yield from _whole_numbers([item for key, item in data.items() if key != "seed"])
    elif isinstance(data, (list, tuple)):
        for item in data:
            yield from _whole_numbers(item)


def _layout(state: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[int, ...] | str]:
    """The names of all numbers in a state, with their shapes."""
    layout: dict[str, tuple[int, ...] | str] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            layout |= _layout(value, f"{prefix}{name}.")
        else:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            layout[f"{prefix}{name}"] = shape
    return layout
