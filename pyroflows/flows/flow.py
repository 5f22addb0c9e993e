"""The flow module."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import constraints

from .._checks import check_context, check_flag
from .._compat import (
    WeakIdKeyDictionary,
    active_traces,
    apply_to_module,
    full_name,
    module_name,
    stored_parameters,
)
from .._spec import Recorded
from ..distributions.flow import FlowDistribution, StandardNormal, bijection_onto
from ..transforms import Compose, Standardize, Transform

__all__ = ["Flow"]

#: A base: a distribution, or a module that returns one when called.
Base = torch.distributions.Distribution | nn.Module

# Parameters that some flow of this process has put into a param store; all others there were
# loaded.
_OWN_PARAMETERS: Any = WeakIdKeyDictionary()


class Flow(Recorded, PyroModule):
    r"""A normalizing flow: called, it is a distribution.

    .. math:: x \sim p_0, \qquad y = g(f_K \circ \dots \circ f_1(x; c)) \quad\Rightarrow\quad
        \log p(y \mid c) = \log p_0(x) - \sum_k \log|\det J_k| - \log|\det J_g|.

    ``flow()`` or ``flow(context)`` returns a :class:`FlowDistribution`, whose batch shape is that
    of the context. Called in a model or a guide, the flow puts its parameters into Pyro's param
    store under its name, which is all that ``pyro.sample("z", flow(h))`` needs to train. As an
    attribute of a :class:`pyro.nn.PyroModule` it is named by it.

    Args:
        transforms: Transforms in generative order, first applied first.
        base: Any distribution over events of the first transform; the standard normal by default.
            It moves with the module from device to device. Or a module that returns one when called
            without arguments, such as :class:`pyroflows.distributions.StudentTBase`, whose
            parameters train with the flow.
        support: Any constraint with a bijection from real vectors, such as
            ``constraints.positive``. It moves likewise. The transforms give events of the shape
            that is mapped onto it: two features for a simplex of 3 entries.
        name: Name in the param store; the class's by default. Two flows in one model need two
            names.
        reversible: Whether training recomputes activations by inversion instead of keeping them;
            see :class:`pyroflows.transforms.Compose`.
        standardize: Whether to add a last layer :class:`pyroflows.transforms.Standardize`, which
            :func:`pyroflows.fit_density` fits to the means and scales of its data.

    Values and contexts may be of any floating-point dtype. They are computed in the dtype of the
    parameters, which samples and log-densities have too: ``flow.double()`` for float64.

    To compile a flow, take its distribution first: ``torch.compile(flow().log_prob,
    fullgraph=True)``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the shapes of the parts do not fit together, or if ``reversible`` is asked of
            transforms that cannot.

    Reference:
        Rezende, Mohamed, "Variational inference with normalizing flows", 2015,
        https://arxiv.org/abs/1505.05770

    Example:
        >>> import pyroflows as pf
        >>> from pyroflows.transforms import AffineCoupling, Reverse
        >>> flow = pf.Flow([AffineCoupling(3), Reverse(3), AffineCoupling(3)])
        >>> flow().sample((5,)).shape
        torch.Size([5, 3])
    """

    transform: Compose
    learned_base: nn.Module | None
    _zeros: Tensor

    def __init__(
        self,
        transforms: Iterable[Transform],
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        reversible: bool = False,
        standardize: bool = False,
    ) -> None:
        super().__init__(type(self).__name__ if name is None else _check_name(name))
        self.transform = Compose(
            [transforms] if isinstance(transforms, Transform) else transforms, reversible
        )
        if check_flag("standardize", standardize):
            last = Standardize(self.transform.image_shape)
            layers: list[Any] = [*self.transform.layers, last]
            self.transform = Compose(layers, reversible)
        for part in self.transform.modules():
            if isinstance(part, Transform):
                part.exact = False
        # Copies, for they move with the module.
        self.support = (
            None if support is None else copy.deepcopy(_check_support(support, self.transform))
        )
        self.learned_base = base if isinstance(base, nn.Module) else None
        checked = None if base is None else _check_base(_made(base), self.event_shape)
        self._base = None if checked is None or self.learned_base is not None else _copy(checked)
        self.register_buffer("_zeros", torch.zeros(self.event_shape), persistent=False)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one point before it is mapped onto the support."""
        return self.transform.event_shape

    @property
    def context_shape(self) -> torch.Size | None:
        """Shape of the context, or ``None``."""
        return self.transform.context_shape

    @property
    def context_features(self) -> int | None:
        """Entries of the context, or ``None``."""
        return self.transform.context_features

    @property
    def base(self) -> torch.distributions.Distribution:
        """The base distribution."""
        base = self.given_base
        if isinstance(base, nn.Module):
            return base()
        if base is not None:
            return base
        zeros = self._zeros
        normal = StandardNormal(zeros, torch.ones_like(zeros), validate_args=False)
        return dist.Independent(normal, zeros.dim(), validate_args=False)

    @property
    def given_base(self) -> Base | None:
        """The base as it was given: a distribution, a module that makes one, or ``None``."""
        return self._base if self.learned_base is None else self.learned_base

    def forward(
        self, context: Tensor | None = None, *, path_gradient: bool = False
    ) -> FlowDistribution:
        """Returns the distribution given a context.

        Args:
            context: Tensor of shape ``(*, *context_shape)``, or ``None`` for a flow without
                context.
            path_gradient: Whether an ELBO gets the path gradient of this guide; see
                :class:`pyroflows.distributions.FlowDistribution`.

        Returns:
            A distribution of batch shape ``(*)``.

        Raises:
            ValueError: If the context is missing, unwanted or of another shape.
        """
        given = check_context(context, self.context_shape, type(self).__name__)
        if am_i_wrapped():
            register_parameters(self)
        transform = self.transform if given is None else self.transform.condition(given)
        return FlowDistribution(self.base, transform, self.support, path_gradient)

    def __getattr__(self, name: str) -> Any:
        # Pyro would register each submodule again, under other names, whenever one is read in a
        # model.
        return nn.Module.__getattr__(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Flow:
        for part in (self._base, self.support):
            _apply_to_tensors(part, fn, set())
        return super()._apply(fn, recurse)


def register_parameters(module: PyroModule) -> None:
    """Puts the parameters of a module into the param store under its full name.

    It is called once per call in a model or guide.

    What the store holds under that name is taken over if it was loaded from a file, and replaced if
    it belongs to another instance: a fresh flow trains its own parameters, and a saved store
    restores them.

    Args:
        module: The module, inside its own call.

    Raises:
        ValueError: If another flow goes by the same name in the same trace, or if what was loaded
            has another shape.
    """
    local = pyro.settings.get("module_local_params")
    for name, parameter in module.named_parameters():
        full = full_name(module, name)
        if local:
            _check_single_name(full, parameter, module_name(module))
            _state_local(full, parameter)
        elif not _has_other_name(full, parameter):
            _register(full, parameter, module_name(module))


def _register(full: str, parameter: nn.Parameter, module_name: str) -> None:
    store = pyro.get_param_store()
    stored = stored_parameters().get(full)
    if stored is not None and stored is not parameter:
        if stored in _OWN_PARAMETERS:
            _check_single_name(full, parameter, module_name)
        else:
            if stored.shape != parameter.shape:
                raise ValueError(
                    f"Expected the param store to hold {full} of shape "
                    f"{tuple(parameter.shape)}; got {tuple(stored.shape)}. "
                    "Call pyro.clear_param_store(), or give the flow another name."
                )
            with torch.no_grad():
                parameter.copy_(stored)
        del store[full]
    if parameter.requires_grad:
        pyro.param(full, parameter)
        _OWN_PARAMETERS[parameter] = True


def _state_local(full: str, parameter: nn.Parameter) -> None:
    """A statement that handlers see, without the store; SVI asks it for ``unconstrained``."""
    if parameter.requires_grad:
        parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
        statement = pyro.poutine.runtime.effectful(lambda *_, **__: parameter, type="param")
        statement(full, parameter, constraint=constraints.real, name=full)


def _has_other_name(full: str, parameter: nn.Parameter) -> bool:
    """Whether ``pyro.module`` has put it into this trace; under two names compiled ELBOs fail."""
    other = pyro.get_param_store().param_name(parameter)
    return (
        other is not None
        and other != full
        and any(traced is parameter for traced in _traced(other))
    )


def _check_single_name(full: str, parameter: nn.Parameter, module_name: str) -> None:
    if any(traced is not parameter for traced in _traced(full)):
        raise ValueError(
            f"Expected flows with different names in one model; got two named {module_name!r}. "
            f"Give each its own, as in RealNVP(..., name='prior')."
        )


def _traced(name: str) -> list[Tensor]:
    """What goes by a name in the traces that are being recorded."""
    values = [trace.nodes[name]["value"] for trace in active_traces() if name in trace.nodes]
    return [value.unconstrained() for value in values if hasattr(value, "unconstrained")]


def _made(base: Any) -> Any:
    """The distribution that a module makes; what is no module comes back as it is."""
    if not isinstance(base, nn.Module):
        return base
    try:
        return base()
    except TypeError:  # a module that takes arguments
        return base


def _check_base(base: Any, event_shape: torch.Size) -> torch.distributions.Distribution:
    if not isinstance(base, torch.distributions.Distribution):
        raise TypeError(
            "Expected base to be a distribution, or a module that makes one without arguments; "
            f"got {base!r}."
        )
    shape = base.batch_shape + base.event_shape
    if shape[max(0, len(shape) - len(event_shape)) :] != event_shape or len(base.event_shape) > len(
        event_shape
    ):
        raise ValueError(
            f"Expected base of shape (*, {', '.join(map(str, event_shape))}); got {tuple(shape)}."
        )
    if not base.has_rsample:
        raise ValueError(
            f"Expected a base with reparametrised samples (has_rsample); got {type(base).__name__}."
        )
    return base


def _copy(base: torch.distributions.Distribution) -> torch.distributions.Distribution:
    try:
        own = copy.deepcopy(base)
    except RuntimeError:  # torch copies no tensor that was computed with gradients
        own = None
    found: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _apply_to_tensors(own, see, set())
    if own is None or any(tensor.requires_grad for tensor in found):
        raise ValueError(
            "Expected a base without tensors that require gradients, which the flow would not "
            f"train; got {type(base).__name__} with some. Detach them, or give a module that makes "
            "the base, such as StudentTBase."
        )
    return own


def _check_support(support: Any, transform: Transform) -> constraints.Constraint:
    onto, shape = bijection_onto(support), transform.image_shape
    try:
        onto.forward_shape(shape)
    except (ValueError, RuntimeError):
        raise ValueError(
            f"Expected features that fit the support {support}; got events of shape {tuple(shape)}."
        ) from None
    return support


def _check_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"Expected name to be a string; got {name!r}.")
    if not name:
        raise ValueError("Expected name to have at least one character; got ''.")
    return name


def _apply_to_tensors(value: Any, fn: Callable[[Tensor], Tensor], seen: set[int]) -> Any:
    """Applies a function to all tensors within a part of a flow, in place, each once."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, nn.Module):
        return apply_to_module(value, fn)
    if isinstance(value, list):
        return [_apply_to_tensors(item, fn, seen) for item in value]
    parts = (
        torch.distributions.Distribution,
        torch.distributions.Transform,
        constraints.Constraint,
    )
    if isinstance(value, parts) and id(value) not in seen:
        seen.add(id(value))  # a transform and its inverse refer to each other
        for key, item in list(vars(value).items()):
            vars(value)[key] = _apply_to_tensors(item, fn, seen)
    return value
