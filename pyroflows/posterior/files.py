"""Files of posteriors: plain data that say how to make the guide, its numbers, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fsdecode, fspath
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._files import save_whole
from ..guides import Guide, as_guide, from_spec
from ..model.density import LogDensity, check_arguments
from ..model.minibatch import log_density_of
from .posterior import Attempt, Posterior
from .verdict import Verdict

__all__ = ["load_posterior", "save_posterior"]

FORMAT = 4
FIELDS = (
    "sites",
    "guide",
    "parameters",
    "arguments",
    "verdict",
    "trajectories",
    "name",
    "rungs",
    "history",
    "seconds",
    "interrupted",
)


def save_posterior(posterior: Posterior, path: str | PathLike[str]) -> None:
    """Writes a posterior to a file; see :meth:`Posterior.save`.

    Args:
        posterior: The posterior.
        path: Where to write.

    Raises:
        TypeError: If ``path`` is no path.
        ValueError: If the file cannot be written, or if the density of the model is not known.
    """
    density = posterior.density
    arguments = None if density.streamed else [list(density.args), density.kwargs]
    state = {
        "format": FORMAT,
        "sites": [[site.name, list(site.shape)] for site in density.sites],
        "guide": posterior.guide.spec(),
        "parameters": posterior.guide.state_dict(),
        "arguments": arguments if _is_plain(arguments) else None,
        "verdict": posterior.verdict.to_plain(),
        "trajectories": posterior.trajectories,
        "name": posterior.name,
        "rungs": [[name, seconds, v.to_plain()] for name, seconds, v in posterior.rungs],
        "history": list(posterior.history),
        "seconds": posterior.seconds,
        "interrupted": posterior.interrupted,
    }
    name = fsdecode(fspath(path))
    try:
        save_whole(state, name)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        raise ValueError(f"Expected a path that can be written; got {name!r} ({error}).") from None


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
    state = _read(path)
    density = _make_density(model, args, kwargs, state, path)
    return Posterior(
        guide=_make_guide(guide, density, state, path),
        density=density,
        verdict=Verdict.from_plain(state["verdict"]),
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
        if state["arguments"] is None:
            raise ValueError(
                f"Expected args and kwargs of the model, because {str(path)!r} could not hold "
                "them; got neither."
            )
        args, kwargs = state["arguments"]
    if not isinstance(args, DataLoader):
        args, kwargs = check_arguments(() if args is None else args, kwargs)
    density = log_density_of(model, args, kwargs).full
    of_file = [(name, tuple(shape)) for name, shape in state["sites"]]
    of_model = [(site.name, tuple(site.shape)) for site in density.sites]
    if of_file != of_model:
        raise ValueError(
            f"Expected the model of the saved posterior, with latent sites {of_file}; got one with "
            f"{of_model}."
        )
    return density


def _make_guide(guide: Any, density: LogDensity, state: Mapping[str, Any], path: Any) -> Guide:
    made = from_spec(state["guide"], density) if guide is None else as_guide(guide, density)
    try:
        made.load_state_dict(state["parameters"])
    except RuntimeError as error:
        raise ValueError(
            f"Expected a guide made as the one saved in {str(path)!r}; "
            f"{' '.join(str(error).split())}"
        ) from None
    return made


def _read(path: str | PathLike[str]) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True)
    except OSError as error:
        raise ValueError(
            f"Expected the file of a saved posterior; {str(path)!r} cannot be read ({error})."
        ) from None
    except Exception:
        # The bytes of another kind of file make the reader raise errors of any type.
        state = None
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"Expected the file of a saved posterior; {str(path)!r} is none.")
    if state["format"] != FORMAT:
        raise ValueError(
            f"Expected a saved posterior of format {FORMAT}; {str(path)!r} has format "
            f"{state['format']}."
        )
    missing = [name for name in FIELDS if name not in state]
    if missing:
        raise ValueError(
            f"Expected the file of a saved posterior; {str(path)!r} lacks {', '.join(missing)}."
        )
    return state


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, strings and tensors only."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str, Tensor)
