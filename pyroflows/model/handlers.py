"""How a model is run: handlers of Pyro and of torch that stand around a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.overrides import TorchFunctionMode

from .._checks import plain
from .._compat import (
    start_in_open_plates,
    tree_leaves,
    tree_map_only,
    unvalidated,
    viewed,
    whole_plates,
)

__all__ = [
    "DetachedCopies",
    "FirstRows",
    "GivenParameters",
    "GivenRows",
    "ParameterRecorder",
    "PlainNames",
    "StartInPlates",
    "SubstituteTensors",
    "Unvalidated",
    "WholePlates",
]


# Names


class PlainNames(Messenger):
    """Makes strings of names that are of a subclass, such as those of numpy and of enumerations.

    Other libraries and files take them for another type, or cannot read them.

    Example:
        >>> import numpy, pyro, pyro.distributions as dist
        >>> with pyro.poutine.trace() as traced, PlainNames():
        ...     _ = pyro.sample(numpy.str_("x"), dist.Normal(0.0, 1.0))
        >>> list(traced.trace.nodes)
        ['x']
    """

    def _pyro_sample(self, msg: Any) -> None:
        msg["name"] = plain(msg["name"])
        frames = msg["cond_indep_stack"]
        msg["cond_indep_stack"] = tuple(frame._replace(name=plain(frame.name)) for frame in frames)

    def _pyro_param(self, msg: Any) -> None:
        msg["name"] = plain(msg["name"])


# The rows of plates


class WholePlates:
    """A model whose subsampled plates see all their rows.

    Args:
        model: The model.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with whole_plates():
            return self.model(*args, **kwargs)


class GivenRows(Messenger):
    """Gives subsampled plates their rows.

    Args:
        rows: For each plate the indices of its rows.
    """

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.rows:
            msg["value"] = self.rows[msg["name"]]


class FirstRows(Messenger):
    """Gives subsampled plates their first rows, for models that read none of the indices.

    Args:
        flip: Whether to give them the last rows instead.
    """

    def __init__(self, flip: bool = False) -> None:
        super().__init__()
        self.flip = flip

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None and msg["fn"].subsample_size is not None:
            size, part = msg["fn"].size, msg["fn"].subsample_size
            if part > size:
                raise ValueError(
                    f"Expected plate {msg['name']!r} of at least the {part} rows of a batch; got "
                    f"size {size}."
                )
            rows = torch.arange(part, device=msg["fn"].device)
            msg["value"] = size - 1 - rows if self.flip else rows


# The start


class StartInPlates(Messenger):
    """Lets a reparametrised site start with a value for each row of the plates that it is in.

    Pyro asks for the start of such a site, of ``poutine.reparam`` inside of a plate, before the
    plate has seen the site, so that all rows would share one value.
    """

    def _pyro_post_get_init_messengers(self, msg: Any) -> None:
        msg["value"] = [_InPlates(starter) for starter in msg["value"]]


class _InPlates(Messenger):
    """Starts a site as another handler does, once all open plates have seen the site."""

    def __init__(self, starter: Any) -> None:
        super().__init__()
        self.starter = starter

    def _pyro_sample(self, msg: Any) -> None:
        msg["value"] = start_in_open_plates(self.starter, msg)


class UnrolledLoops(Messenger):
    """Takes the rows of a plate that is a loop for sites of their own, which they are.

    Pyro's automatic guides refuse such plates. One of which each run sees a part stays.
    """

    def _pyro_sample(self, msg: Any) -> None:
        frames = msg["cond_indep_stack"]
        msg["cond_indep_stack"] = tuple(
            frame for frame in frames if frame.vectorized or frame.full_size != frame.size
        )


# Validation


class Unvalidated(Messenger):
    """Lifts validation from distributions that were made while it was on, such as those of a
    PyroModule."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = unvalidated(msg["fn"])


# Tensors that a run uses but does not make


class ParameterRecorder(TorchFunctionMode):
    """Records the leaves that require a gradient and that a run reaches, in order.

    These are the parameters of ``pyro.param``, those of modules, registered or not, and any other
    tensor that an optimiser could move.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_leaf:
                parameter = viewed(leaf)
                self.parameters.setdefault(id(parameter), parameter)
        return func(*args, **(kwargs or {}))


class GivenParameters(Messenger):
    """Gives statements of ``pyro.param`` their values, whatever is in the param store.

    Args:
        values: Unconstrained values by name.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            constraint = msg["kwargs"].get("constraint", constraints.real)
            msg["value"] = transform_to(constraint)(self.values[msg["name"]])


class SubstituteTensors(TorchFunctionMode):
    """Puts tensors in the place of others wherever a run uses those.

    Args:
        pairs: The tensors to replace, each with its replacement.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        # The originals are kept too, so that their identities cannot be reused.
        self.pairs = {id(original): (original, value) for original, value in pairs}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._replace, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _replace(self, tensor: Tensor) -> Tensor:
        pair = self.pairs.get(id(tensor))
        return tensor if pair is None else pair[1]


# Copies

_COPY = Tensor.__deepcopy__


class DetachedCopies(TorchFunctionMode):
    """Lets :func:`copy.deepcopy` copy tensors that carry a graph, without the graph.

    Such are the values of a trace whose priors depend on parameters of the model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _COPY and not args[0].is_leaf:
            tensor, memo = args
            args = (tensor.detach(), memo)
            return memo.setdefault(id(tensor), func(*args))
        return func(*args, **(kwargs or {}))
