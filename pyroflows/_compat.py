"""The one door to private names of torch and Pyro: each with the reason why it is needed.

A test for every name fails when an upgrade changes what it means, and another one reads the
sources and fails where the package uses a private name outside of this file
(``tests/test_compat.py``). A subclass may still override the hooks of its base class, such as
``_call`` or ``_pyro_sample``, and reach them through ``self`` and ``super()``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from traceback import walk_tb
from typing import Any

import pyro
import torch
from pyro.distributions import MaskedDistribution, stable, stable_log_prob
from pyro.infer.autoguide import AutoNormal, AutoNormalizingFlow
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK, apply_stack
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.trace_messenger import TraceHandler, TraceMessenger
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function, forward_ad
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "ERROR_CHECK",
    "FACTORISATIONS_OF_FINITE",
    "FACTORISATIONS_WITH_INFO",
    "TorchDispatchMode",
    "WeakIdKeyDictionary",
    "active_traces",
    "apply_to_module",
    "array_of",
    "build_guide",
    "copy_all",
    "default_validation",
    "definition_of",
    "dtype_of",
    "full_name",
    "functions_of_any_style",
    "in_forward_mode",
    "init_transform_of",
    "interpolate_all",
    "is_batched",
    "is_mutating",
    "location_and_scale",
    "make_fx",
    "mask_of",
    "message_in",
    "module_name",
    "named_dims",
    "number_of",
    "packed_dims",
    "plate_in",
    "record_operations",
    "stable_density_at_zero",
    "stable_density_of",
    "stable_integral",
    "stamp",
    "start_in_open_plates",
    "storage_of",
    "stored_parameters",
    "trace_in",
    "transforming",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "unvalidated",
    "validates",
    "whole_plates",
    "without_handlers",
]

# Names of modules that torch has not documented. `WeakIdKeyDictionary` finds a tensor by its
# identity: as keys of a `WeakKeyDictionary`, tensors would be compared entry by entry. `make_fx`
# records the operations of a function, gradients among them, which `torch.compile` does not read.
# `TorchDispatchMode` sees the operations below differentiation.
# The trees are nested lists and dictionaries as `torch.func` and the compiler walk through them.


# Pyro: handlers


@contextlib.contextmanager
def without_handlers() -> Iterator[None]:
    """Takes Pyro's handlers off for a while.

    Pyro has no public way to step out of all of them; ``poutine.block`` hides sites only from the
    handlers around it, and leaves ``am_i_wrapped`` true.
    """
    handlers = list(_PYRO_STACK)
    _PYRO_STACK.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:] = handlers


def active_traces() -> list[Any]:
    """Returns the traces that are being recorded.

    A flow looks its name up in them, because two flows of one name would share their parameters.
    """
    return [handler.trace for handler in _PYRO_STACK if isinstance(handler, TraceMessenger)]


def start_in_open_plates(starter: Any, message: Any) -> Any:
    """Returns the value that a handler of Pyro's gives a site once all open plates have seen it.

    Pyro lets a reparametrised site start before the plates around it have seen it.
    """
    seen: Any = {**message, "cond_indep_stack": ()}
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, IndepMessenger):
            handler._process_message(seen)
    starter._process_message(seen)
    return seen["value"]


def viewed(tensor: Tensor) -> Tensor:
    """Returns the leaf of which a tensor is a view that was taken without gradients.

    Such a view says of itself that it is a leaf that requires a gradient.
    """
    base = tensor._base
    if base is None or not (base.is_leaf and base.requires_grad):
        return tensor
    return base


@contextlib.contextmanager
def whole_plates() -> Iterator[None]:
    """Makes all plates see all of their rows for a while.

    No handler can do this: a plate refuses rows of another number than its own, and counts by that
    number.
    """
    subsample = SubsampleMessenger._subsample

    def whole(
        name: str, size: Any = None, subsample_size: Any = None, rows: Any = None, *rest: Any
    ) -> Any:
        return subsample(name, size, None if rows is None else subsample_size, rows, *rest)

    SubsampleMessenger._subsample = staticmethod(whole)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(subsample)  # type: ignore[method-assign]


def message_in(error: BaseException) -> Any:
    """Returns the message of the innermost statement that an error passed through, or ``None``.

    Errors of Pyro do not know their site, and only the frames of the traceback have its message.
    """
    frames = _frames_of(apply_stack, error)
    return frames[-1]["msg"] if frames else None


def plate_in(error: BaseException) -> tuple[str, Any] | None:
    """Returns name and size of the plate in whose making an error arose, or ``None``."""
    frames = _frames_of(IndepMessenger.__init__, error)
    return (frames[-1]["name"], frames[-1]["size"]) if frames else None


def trace_in(error: BaseException) -> Any:
    """Returns the trace of the outermost run of a model that an error ended, or ``None``."""
    frames = _frames_of(TraceHandler.__call__, error)
    return frames[0]["self"].trace if frames else None


def _frames_of(function: Any, error: BaseException) -> list[Mapping[str, Any]]:
    """The local variables of the calls of a function that an error passed through."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return [frame.f_locals for frame in frames if frame.f_code is function.__code__]


# Pyro: modules, parameters, guides


def full_name(module: PyroModule, name: str) -> str:
    """Returns the name under which Pyro registers a parameter of a module inside its call.

    Parameters are registered by the flow itself, under the names that Pyro would give them.
    """
    return module._pyro_get_fullname(name)


def module_name(module: PyroModule) -> str:
    """Returns the name of a module within the one that holds it, for sentences."""
    return module._pyro_name


def stored_parameters() -> Mapping[str, Tensor]:
    """Returns the unconstrained tensors of the param store by name.

    The public ``named_parameters()`` gives them as pairs, in which a name must be searched for.
    """
    return pyro.get_param_store()._params


def build_guide(guide: Any, args: Any, kwargs: Any) -> None:
    """Builds an autoguide for a model's arguments, without the draw of its first public call."""
    guide._setup_prototype(*args, **kwargs)
    guide._create_plates(*args, **kwargs)


def location_and_scale(guide: AutoNormal, site: str) -> tuple[Tensor, Tensor]:
    """Returns mean and sd of an unconstrained site of an ``AutoNormal``, whatever its module is."""
    return guide._get_loc_and_scale(site)


def init_transform_of(guide: AutoNormalizingFlow) -> Callable[[int], Any]:
    """Returns the callable that made the transform of an ``AutoNormalizingFlow``.

    The guide keeps it under no public name, and cannot be made anew without it.
    """
    return guide._init_transform_fn


def packed_dims(term: Tensor) -> str:
    """Returns the letters by which Pyro's packed tensors name their dimensions."""
    dims: str = term._pyro_dims  # type: ignore[attr-defined]
    return dims


def named_dims(term: Tensor, dims: str) -> Tensor:
    """Names the dimensions of a tensor as Pyro's packed tensors do, in place."""
    term._pyro_dims = dims  # type: ignore[attr-defined]
    return term


# torch: distributions


def default_validation() -> bool:
    """Returns whether distributions check their arguments; torch has only a setter for it."""
    return Distribution._validate_args


def validates(distribution: Any) -> bool:
    """Returns whether a distribution checks the values that it scores."""
    return bool(getattr(distribution, "_validate_args", False))


def mask_of(distribution: MaskedDistribution) -> Any:
    """Returns the mask of a masked distribution, which has no public name for it."""
    return distribution._mask


def unvalidated(distribution: Any) -> Any:
    """Returns the distribution without checks of values, within those that wrap it too.

    A check reads values, which neither ``vmap`` nor a captured graph can; and the switch for all
    comes too late for distributions that were made before.
    """
    base = getattr(distribution, "base_dist", None)
    bare = base if base is None else unvalidated(base)
    if bare is base and not validates(distribution):
        return distribution
    copied = copy.copy(distribution)
    if base is not None:
        copied.base_dist = bare  # first, because Pyro's Independent hands the flag to its base
    copied._validate_args = False
    return copied


# Pyro: distributions


@contextlib.contextmanager
def stable_density_of(
    away_from_one: Callable[..., Tensor], anywhere: Callable[..., Tensor]
) -> Iterator[None]:
    """Puts functions in the place of two within the density of Pyro's stable distributions.

    Pyro's select the entries that need another formula, of which each point has another number.
    """
    originals = stable_log_prob._unsafe_alpha_stable_log_prob_S0, stable._stable_log_prob
    stable_log_prob._unsafe_alpha_stable_log_prob_S0 = away_from_one
    stable._stable_log_prob = anywhere
    try:
        yield
    finally:
        stable_log_prob._unsafe_alpha_stable_log_prob_S0 = originals[0]
        stable._stable_log_prob = originals[1]


def stable_integral(alpha: Tensor, beta: Tensor, value: Tensor) -> Tensor:
    """Returns the log density of a stable distribution away from one and zero."""
    return stable_log_prob._unsafe_stable_log_prob(alpha, beta, value)


def stable_density_at_zero(alpha: Tensor) -> Tensor:
    """Returns the log density of a symmetric stable distribution at zero."""
    return stable_log_prob._unsafe_alpha_stable_log_prob_at_zero(alpha, 0)


# torch: functions of autograd


@contextlib.contextmanager
def functions_of_any_style() -> Iterator[list[Any]]:
    """Lets ``torch.func`` transform functions of autograd that have no ``setup_context``.

    Pyro's are of the old style, in which ``forward`` takes the context. ``torch.func`` refuses them
    in ``Function.apply``, and no mode sees that call. Yields the list of the functions applied.
    """
    apply = vars(Function)["apply"]
    applied: list[Any] = []

    def apply_any(cls: Any, *args: Any, **kwargs: Any) -> Any:
        applied.append(cls)
        old = cls.setup_context is Function.setup_context
        return apply.__get__(None, _modern(cls) if old and transforming() else cls)(*args, **kwargs)

    Function.apply = classmethod(apply_any)  # type: ignore[method-assign,assignment]
    try:
        yield applied
    finally:
        Function.apply = apply  # type: ignore[method-assign]


@functools.cache
def _modern(cls: type[Function]) -> type[Function]:
    """A function of the old style in the new one, whose forward pass is run for its context too."""

    def forward(*args: Any) -> Any:
        return cls.forward(_NoContext(), *args)

    def setup_context(context: Any, args: tuple[Any, ...], _: Any) -> None:
        cls.forward(context, *args)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": cls.__dict__["backward"],
        "generate_vmap_rule": True,
    }
    return type(cls.__name__, (Function,), members)


class _NoContext:
    """A context that forgets all that the forward pass of a function saves in it."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


# torch: tensors and modules


def record_operations(function: Callable[..., Any]) -> Callable[..., GraphModule]:
    """Returns ``make_fx`` of a function that may read values, which are noted in the graph.

    Without its private option, ``make_fx`` refuses even to read constants. Without a mode given for
    all operations, it makes one for each to note their shapes, which takes most of its time.
    """
    recorded = make_fx(function, _error_on_data_dependent_ops=False)

    def record(*args: Any) -> GraphModule:
        with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            return recorded(*args)

    return record


def is_batched(tensor: Tensor) -> bool:
    """Returns whether a tensor stands for many, one for each point of a ``torch.func.vmap``.

    An operation must know whether it may read values, and ``torch.func`` has no public question.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def number_of(tensor: Tensor) -> bool | float:
    """Returns the first of the numbers that a tensor holds, unseen by transforms and recording.

    Under ``torch.func.vmap``, which refuses to tell, this is the number for the first point.
    """
    with torch._C._DisableFuncTorch(), _disable_current_modes():
        return _unwrapped(tensor).detach().flatten()[0].item()


def array_of(tensor: Tensor) -> Any:
    """Returns the entries of a tensor as an array of numpy, unseen by transforms and recording."""
    with torch._C._DisableFuncTorch(), _disable_current_modes():
        return _unwrapped(tensor).numpy(force=True).copy()


def storage_of(tensor: Tensor) -> int:
    """Returns the identity of a tensor's memory, which its views share."""
    return _unwrapped(tensor).untyped_storage()._cdata


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside of those by which ``torch.func`` stands around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def transforming() -> bool:
    """Returns whether tensors are stand-ins: under compilation and inside function transforms.

    ``torch.func`` has no public question for this.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_mode() -> bool:
    """Returns whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def stamp(tensor: Tensor) -> tuple[Any, ...]:
    """Returns what changes whenever a tensor is another one, or has been written to.

    The version counts writes; an assignment to ``.data``, as in ``module.double()``, only shows in
    the storage. Tensors of inference mode do not count.
    """
    version = None if tensor.is_inference() else tensor._version
    storage = tensor.untyped_storage()._cdata
    return id(tensor), version, storage, tensor.requires_grad, tensor.retains_grad


def definition_of(module: nn.Module) -> list[Tensor | bool]:
    """Returns the tensors of a module and all within it, and which of them train.

    Several times faster than ``parameters()`` and ``buffers()``, because every evaluation of a
    transform asks for it.
    """
    parts: list[Tensor | bool] = []
    modules = [module]
    while modules:
        here = modules.pop()
        parts.append(here.training)
        tensors = (*here._parameters.values(), *here._buffers.values())
        parts += [tensor for tensor in tensors if tensor is not None]
        modules += [child for child in here._modules.values() if child is not None]
    return parts


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Returns the dtype of the floating-point parameters of a module, or else of its buffers.

    Several times faster than ``parameters()``, because every evaluation of a transform asks for it.
    """
    of_buffers = None
    modules = [module]
    while modules:
        here = modules.pop()
        of_parameters = _floating(here._parameters.values())
        if of_parameters is not None:
            return of_parameters
        of_buffers = of_buffers or _floating(here._buffers.values())
        modules += [child for child in here._modules.values() if child is not None]
    return of_buffers


def _floating(tensors: Iterable[Tensor | None]) -> torch.dtype | None:
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            return tensor.dtype
    return None


def apply_to_module(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Applies a function to all tensors of a module, as ``module.to`` does."""
    return module._apply(function)


def is_mutating(target: Any) -> bool:
    """Returns whether an operation of a captured graph writes to one of its arguments."""
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies tensors into others in place, in one kernel on a GPU."""
    torch._foreach_copy_(targets, sources)


def interpolate_all(targets: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Moves tensors by a share of the way to others in place, in one kernel on a GPU."""
    torch._foreach_lerp_(targets, ends, weight)


# torch: linear algebra

# All that torch has for factorisations comes down to these operations. The first tell by their last
# result which matrices of a batch have failed; then follows a check that raises. The others raise
# themselves, where a matrix is not finite.
ERROR_CHECK = torch.ops.aten._linalg_check_errors.default
FACTORISATIONS_WITH_INFO = (
    torch.ops.aten.linalg_cholesky_ex.default,
    torch.ops.aten.linalg_inv_ex.default,
    torch.ops.aten._linalg_solve_ex.default,
    torch.ops.aten.linalg_lu_factor_ex.default,
    torch.ops.aten.linalg_ldl_factor_ex.default,
)
FACTORISATIONS_OF_FINITE = (
    torch.ops.aten._linalg_eigh.default,
    torch.ops.aten._linalg_svd.default,
    torch.ops.aten.linalg_eig.default,
    torch.ops.aten.linalg_lstsq.default,
    torch.ops.aten.linalg_pinv.atol_rtol_tensor,
)
