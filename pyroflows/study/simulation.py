"""Parameters from the prior of a model, and data that they make."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .._checks import check_model, list_names
from .._compat import message_in, without_handlers
from .._random import seeded
from ..model.checks import check_all_rows, check_arguments, check_call
from ..model.faults import explained
from ..model.handlers import PlainNames
from ..model.sites import (
    base_distribution,
    distribution_name,
    is_discrete,
    is_factor,
    sample_nodes,
    unmasked_entries,
)

__all__ = ["GivenData", "Simulation", "Simulator", "holding"]

Values = dict[str, Tensor]


@contextlib.contextmanager
def holding(state: Any) -> Iterator[None]:
    """Context manager with a param store of its own, which begins with copies of parameters.

    Args:
        state: What ``get_state()`` of a param store returned; it stays as it is.
    """
    copies = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in state["params"].items()
    }
    own = {"params": copies, "constraints": dict(state["constraints"])}
    with pyro.get_param_store().scope(own):  # type: ignore[arg-type]
        yield


class Simulation(NamedTuple):
    """A draw of parameters and data.

    Attributes:
        parameters: For each continuous latent site, and each of ``pyro.deterministic``, its value.
        data: For each observed site the value that was drawn in the place of its data.
    """

    parameters: Values
    data: Values


class GivenData:
    """A model with other data at its observed sites; a process pool can pickle it if it can pickle
    the model.

    Args:
        model: The model.
        data: For each observed site its data.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     return pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        >>> GivenData(model, {"y": torch.tensor(2.0)})(torch.tensor(5.0))
        tensor(2.)
    """

    def __init__(self, model: Callable[..., Any], data: Mapping[str, Tensor]) -> None:
        self.model, self.data = model, dict(data)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return poutine.condition(self.model, data=self.data)(*args, **kwargs)


class Simulator:
    """Draws the parameters of a model from their prior, and data in the place of the observed ones.

    Arguments of the model stay as they are. Where one of them is observed, its values are replaced
    at the site; where the model uses it elsewhere too, as a series that predicts its next value,
    it is a covariate there.

    Args:
        model: A Pyro model with observed sites.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If nothing is observed, a site cannot be drawn, as one with an improper prior,
            a term of ``pyro.factor`` would have to be drawn, or a plate sees only some of its rows.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> drawn = Simulator(model, (torch.tensor(1.0),)).draw(seed=3)
        >>> list(drawn.parameters), list(drawn.data)
        (['x'], ['y'])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_model(model)
        self.model = model
        self.args, self.kwargs = check_arguments(args, kwargs)
        check_call("the model", model, self.args, self.kwargs)
        store = pyro.get_param_store()
        with holding(store.get_state()), seeded(0):
            trace = self._trace()
            #: The parameters of the model, of ``pyro.param``, at which it is held.
            self.state: Any = store.get_state()
        #: The names of the continuous latent sites.
        self.latent = [name for name, node in _latent_nodes(trace) if not is_discrete(node)]
        #: For each latent site which entries no mask switches off.
        self.active = {name: unmasked_entries(node) for name, node in _latent_nodes(trace)}
        _refuse_unobserved(trace)
        _refuse_factors(trace)
        check_all_rows(trace, "sees all its rows", ". Leave out its subsample_size.")

    def draw(self, seed: int | None) -> Simulation:
        """Draws parameters, and data given them.

        Args:
            seed: Seed of the draw.

        Returns:
            The draw, detached and on the device of the model.
        """
        with holding(self.state), seeded(seed):
            trace = self._trace()
        data = {name: node["value"] for name, node in _data_nodes(trace)}
        return Simulation(_parameters(trace), data)

    def given(self, data: Mapping[str, Tensor]) -> GivenData:
        """Returns the model with other data.

        Args:
            data: For each observed site its data, as ``draw(seed).data``.
        """
        return GivenData(self.model, data)

    @torch.no_grad()
    def _trace(self) -> Any:
        free = poutine.uncondition(self.model)
        with without_handlers(), PlainNames():
            try:
                return poutine.trace(free).get_trace(*self.args, **self.kwargs)
            except NotImplementedError as error:
                raise _cannot_be_drawn(error) from error
            except Exception:
                with explained():
                    raise


def _was_observed(node: Mapping[str, Any]) -> bool:
    return bool(node["infer"].get("was_observed"))


def _is_point(node: Mapping[str, Any]) -> bool:
    return type(base_distribution(node["fn"])).__name__ == "Delta"


def _data_nodes(trace: Any) -> list[tuple[str, Any]]:
    """The sites that are observed when the model is run as it is."""
    nodes = [(name, node) for name, node in sample_nodes(trace) if _was_observed(node)]
    return [(name, node) for name, node in nodes if not (is_factor(node["fn"]) or _is_point(node))]


def _latent_nodes(trace: Any) -> list[tuple[str, Any]]:
    return [(name, node) for name, node in sample_nodes(trace) if not _was_observed(node)]


def _parameters(trace: Any) -> Values:
    continuous = [(name, node) for name, node in _latent_nodes(trace) if not is_discrete(node)]
    values = {name: node["value"] for name, node in continuous}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and node["infer"].get("_deterministic"):
            values[name] = node["value"]
    return values


def _refuse_unobserved(trace: Any) -> None:
    if _data_nodes(trace):
        return
    names = [name for name, node in sample_nodes(trace) if not is_factor(node["fn"])]
    raise ValueError(
        "Expected a model with observed sites, whose data are replaced by simulated ones; got one "
        f"that observes nothing ({list_names(names)}). Give it data of the right shape."
    )


def _refuse_factors(trace: Any) -> None:
    names = [name for name, node in sample_nodes(trace) if is_factor(node["fn"])]
    if names:
        raise ValueError(
            "Expected a model of which parameters and data can be drawn; got one with the "
            f"pyro.factor {list_names(names)}, a density without draws."
        )


def _cannot_be_drawn(error: NotImplementedError) -> ValueError:
    # Handlers raise an error anew, from the one of the site.
    root = error
    while isinstance(root.__cause__, NotImplementedError):
        root = root.__cause__
    message = message_in(root)
    if message is None or message["type"] != "sample":
        return ValueError(f"Expected a model that can be drawn from; got {error!r}.")
    kind = "data" if message["infer"].get("was_observed") else "a prior"
    return ValueError(
        f"Expected {kind} to draw from at site {message['name']!r}; got "
        f"{distribution_name(message['fn'])}, which has no draws."
    )
