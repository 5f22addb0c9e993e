"""Posteriors read from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from torch.utils.data import DataLoader

from ..guides import Guide, as_guide, from_spec
from ..model.checks import check_arguments
from ..model.density import LogDensity
from ..model.minibatch import log_density_of
from .files import read_state
from .posterior import Attempt, Posterior
from .verdict import Verdict

__all__ = ["load_posterior"]


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
