"""Operations that :func:`torch.func.vmap` refuses, replaced by others of the same value."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._compat import array_of, is_batched, number_of, storage_of, tree_leaves, tree_map_only

__all__ = ["READINGS", "REPLACEMENTS", "Batchable", "written"]

_READ_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_DTYPES_OF_MASKS = (torch.bool, torch.uint8)


class Batchable(TorchFunctionMode):
    """Lets a function of one point do things that :func:`torch.func.vmap` refuses.

    - A write in place, such as ``zeros[i] = x``, into a tensor that is the same for all points: the
      tensor and all views of it are replaced by copies, one for each point.
    - A write by a mask, ``x[x > 0] = 0``.
    - Reading data as numbers, by ``tolist()`` or ``numpy()``, and printing a tensor of which each
      point has another.
    - ``tensor.data``, which Pyro's enumeration asks for its shape; ``searchsorted`` and
      ``bucketize``.
    - A branch on values of latent sites: all points take that of the first of them, and ``held``
      tells at which points it is the right one.

    Args:
        point: The point, of shape ``(features,)``.

    Attributes:
        held: Whether the point takes the branches that were followed, a tensor without dimensions.
        branched: Whether there were any.
    """

    def __init__(self, point: Tensor) -> None:
        super().__init__()
        self.held = torch.ones((), dtype=torch.bool, device=point.device)
        self.branched = False
        self._zero = torch.zeros_like(point.detach().reshape(-1)[:1].sum())
        # Originals are kept with their copies, so that no identity is used twice.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._views: list[_View] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._copies:
            args, kwargs = tree_map_only(Tensor, self.current, (args, kwargs))
        target = written(func, args, kwargs)
        if target is not None and not is_batched(target) and _any_batched((args, kwargs)):
            self._copy(target)
            args, kwargs = tree_map_only(Tensor, self.current, (args, kwargs))
        if func in _NUMBERS and _is_decision(func, args[0]):
            return self._decide(func, args[0])
        if func in _SIZED:
            args = tuple(map(self._size, args))
        elif func in _INDEXED:
            args = (args[0], self._index(args[1]), *args[2:])
        replacement = REPLACEMENTS.get(func) or _out_of_place(func, target)
        result = (replacement or func)(*args, **kwargs)
        if func in _COMPARISONS:
            return self.__torch_function__(Tensor.__bool__, (), (result,))
        if target is None and args and isinstance(args[0], Tensor):
            self._note_views(func, args, kwargs, result)
        return result

    def current(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor, if it has one, or else the tensor itself."""
        pair = self._copies.get(id(tensor))
        return tensor if pair is None else pair[1]

    def _size(self, argument: Any) -> Any:
        """A number in the place of a whole one that is another for each point."""
        if isinstance(argument, Tensor) and _is_integer(argument) and is_batched(argument):
            return self._decide(Tensor.__index__, argument)
        return argument

    def _index(self, index: Any) -> Any:
        """An index whose slices have numbers as their ends."""
        if isinstance(index, tuple):
            return tuple(map(self._index, index))
        if not isinstance(index, slice):
            return index
        return slice(self._size(index.start), self._size(index.stop), self._size(index.step))

    def _decide(self, func: Any, tensor: Tensor) -> bool | float:
        """The number that a tensor has for the first point; other points may not follow it."""
        number = number_of(tensor)
        if func in _TRUTHS:
            number, tensor = bool(number), tensor != 0
        elif tensor.is_floating_point():
            number, tensor = int(number), tensor.trunc()
        self.held = self.held & (tensor == number).reshape(())
        self.branched = True
        return number

    def _copy(self, tensor: Tensor) -> None:
        """Puts a copy for each point in the place of a tensor and of all that share its storage."""
        storage = storage_of(tensor)
        shared = [view for view in self._views if storage_of(view.tensor) == storage]
        base = shared[0].args[0] if shared else tensor
        self._copies[id(base)] = base, _expanded(base, self._zero)
        for view in shared:
            parent = self.current(view.args[0])
            if parent is not view.args[0]:
                again = view.make(parent, *view.args[1:])
                self._copies[id(view.tensor)] = view.tensor, again

    def _note_views(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        parent = args[0]
        if is_batched(parent):
            return
        storage = storage_of(parent)
        several = isinstance(result, (tuple, list))
        for i, tensor in enumerate(result if several else [result]):
            shares = isinstance(tensor, Tensor) and tensor is not parent
            if shares and storage_of(tensor) == storage:
                self._views.append(_View(tensor, func, args, kwargs, i if several else None))


class _View:
    """A view of a tensor, and how it was made.

    Args:
        tensor: The view.
        func: The function that made it of its first argument.
        args: The positional arguments.
        kwargs: The keyword arguments.
        index: Its place among the results if there are several.
    """

    def __init__(
        self,
        tensor: Tensor,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: int | None,
    ) -> None:
        self.tensor, self.func, self.args, self.kwargs = tensor, func, args, kwargs
        self.index = index

    def make(self, *args: Any) -> Tensor:
        """The same view of another tensor."""
        made = self.func(*args, **self.kwargs)
        view: Tensor = made if self.index is None else made[self.index]
        return view


def written(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor into which a function writes, if it does."""
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    if args and isinstance(args[0], Tensor) and (in_place or name in _WRITING):
        return args[0]
    return None


_WRITING = {"__setitem__"} | {
    f"__i{name}__"
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "div", "mod", "pow"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
}


# Conversions of a tensor to a number, by which a program decides how to go on.
_TRUTHS = {Tensor.__bool__, Tensor.is_nonzero}
_NUMBERS = {*_TRUTHS, Tensor.__int__, Tensor.__index__, Tensor.item}


# All that read a value out of a tensor.
READINGS = {
    *_NUMBERS,
    *(Tensor.__float__, Tensor.__complex__, Tensor.tolist, Tensor.numpy, Tensor.__array__),
    *(torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, Tensor.__contains__),
}


_INDEXED = {Tensor.__getitem__, Tensor.__setitem__}
# Functions that take the shape of their result as numbers.
_SIZED = {torch.arange, torch.zeros, torch.ones, torch.empty, torch.eye}


def _is_decision(func: Any, tensor: Tensor) -> bool:
    """Whether a conversion to a number leaves few numbers that it may be."""
    countable = func is not Tensor.item or not tensor.is_floating_point()
    return countable and tensor.numel() == 1 and is_batched(tensor)


def _out_of_place(func: Any, target: Tensor | None) -> Callable[..., Any] | None:
    """An operation in place as one that is not, which vmap is more likely to know, and a copy."""
    name = getattr(func, "__name__", "")
    pure = getattr(Tensor, name[:-1], None) if name.endswith("_") else None
    if target is None or pure is None or name in _MAKING or not is_batched(target):
        return None

    def write(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Of a clone, because its gradient may need the entries that are overwritten here.
        return tensor.copy_(pure(tensor.clone(), *args, **kwargs))

    return write


# Operations in place whose namesakes do something else, or that copy takes too.
_MAKING = {
    "copy_",
    "requires_grad_",
    "detach_",
    "squeeze_",
    "unsqueeze_",
    "t_",
    "transpose_",
    "swapaxes_",
    "swapdims_",
}


def _any_batched(arguments: Any) -> bool:
    tensors = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    return any(map(is_batched, tensors))


def _expanded(tensor: Tensor, zero: Tensor) -> Tensor:
    """A copy of a tensor for each point."""
    if tensor.dtype == torch.bool:
        return tensor | zero.bool()
    return tensor + zero.to(tensor.dtype)


# Replacements


def _set_item(target: Tensor, index: Any, value: Any) -> None:
    mask = _whole_mask(target, index)
    if mask is None or (isinstance(value, Tensor) and value.dim() > target.dim() - mask.dim()):
        target[index] = value
        return
    mask = mask.reshape(mask.shape + (1,) * (target.dim() - mask.dim()))
    value = torch.as_tensor(value, dtype=target.dtype, device=target.device)
    target.copy_(torch.where(mask, value, target))


def _whole_mask(target: Tensor, index: Any) -> Tensor | None:
    """The mask by which the first dimensions of a tensor are indexed, if one is."""
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if not isinstance(index, Tensor) or index.dtype not in _DTYPES_OF_MASKS:
        return None
    mask = index.bool()
    return mask if mask.shape == target.shape[: mask.dim()] else None


def _search(
    boundaries: Tensor,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    if not _any_batched((boundaries, values)):
        return torch.searchsorted(
            boundaries, values, out_int32=out_int32, right=right, side=side, sorter=sorter
        )
    if sorter is not None:
        boundaries = boundaries.gather(-1, sorter)
    values = torch.as_tensor(values)
    inner = boundaries.unsqueeze(-2) if boundaries.dim() > 1 else boundaries
    entry = values.unsqueeze(-1)
    below = inner <= entry if right or side == "right" else inner < entry
    count = below.sum(-1)
    return count.int() if out_int32 else count


def _bucketize(
    values: Any, boundaries: Tensor, *, out_int32: bool = False, right: bool = False
) -> Tensor:
    return _search(boundaries, values, out_int32=out_int32, right=right)


def _cross_entropy(logits: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The negative log density of Bernoulli distributions, in three operations where vmap's own
    rule takes fourteen."""
    options = {name: value for name, value in kwargs.items() if value is not None}
    if args or options != {"reduction": "none"} or logits.shape != target.shape:
        return nn.functional.binary_cross_entropy_with_logits(logits, target, *args, **kwargs)
    # Distributions expand their parameters to the shape of the data before they use them.
    softplus = nn.functional.softplus(_narrowed(logits), threshold=40.0)
    return softplus - target * logits


def _narrowed(tensor: Tensor) -> Tensor:
    """An expanded tensor with its own size, one, along the dimensions of the expansion."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _to_list(tensor: Tensor) -> Any:
    if is_batched(tensor):
        return tensor.tolist()  # and torch says why it refuses
    return _to_array(tensor).tolist()


def _to_array(tensor: Tensor, *args: Any, force: bool = False, **kwargs: Any) -> Any:
    if is_batched(tensor):
        return tensor.numpy()
    # A graph sees that a number was read, but not the reading of memory.
    tensor.detach().sum().item()
    return numpy.asarray(array_of(tensor), *args, **kwargs)


def _get_item(tensor: Tensor, index: Any) -> Tensor:
    """As torch's, but a number in the index may be another one for each point."""
    if not _any_batched(index):
        return operator.getitem(tensor, index)
    given = index if isinstance(index, tuple) else (index,)
    found: list[Any] = []
    for i, part in enumerate(given):
        if isinstance(part, Tensor) and part.dim() == 0 and _is_integer(part) and is_batched(part):
            dim = _dimension(tensor, given, i)
            rows = part.reshape(1) + torch.where(part < 0, tensor.shape[dim], 0)
            tensor, part = tensor.index_select(dim, rows), 0
        found.append(part)
    return operator.getitem(tensor, tuple(found))


def _dimension(tensor: Tensor, index: tuple[Any, ...], place: int) -> int:
    """The dimension of a tensor to which a part of an index applies."""
    before = index[:place]
    if any(part is Ellipsis for part in before):
        return tensor.dim() - sum(map(_consumed, index[place:]))
    return sum(map(_consumed, before))


def _consumed(part: Any) -> int:
    """How many dimensions a part of an index takes."""
    if isinstance(part, Tensor) and part.dtype in _DTYPES_OF_MASKS:
        return part.dim()
    return 0 if part is None else 1


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.dtype in _DTYPES_OF_MASKS)


def _is_close(
    a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> Tensor:
    near = (a - b).abs() <= atol + rtol * b.abs()
    near = (near & b.isfinite()) | (a == b)
    return near | (a.isnan() & b.isnan()) if equal_nan else near


def _all_close(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _is_close(a, b, *args, **kwargs).all()


def _equal(a: Tensor, b: Tensor) -> Any:
    return (a == b).all() if a.shape == b.shape else torch.tensor(False)


def _format(tensor: Tensor, specification: str = "") -> str:
    return _text(tensor) if is_batched(tensor) else format(tensor, specification)


def _text(tensor: Tensor, **options: Any) -> str:
    if is_batched(tensor):
        return f"tensor of shape {tuple(tensor.shape)}"
    return Tensor.__repr__(tensor, **options)


_COMPARISONS: dict[Any, Callable[..., Tensor]] = {
    torch.allclose: _all_close,
    Tensor.allclose: _all_close,
    torch.equal: _equal,
    Tensor.equal: _equal,
}
REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    _READ_DATA: Tensor.detach,
    Tensor.__setitem__: _set_item,
    Tensor.__getitem__: _get_item,
    torch.masked_select: operator.getitem,
    Tensor.masked_select: operator.getitem,
    torch.searchsorted: _search,
    torch.bucketize: _bucketize,
    Tensor.tolist: _to_list,
    Tensor.numpy: _to_array,
    Tensor.__array__: _to_array,
    nn.functional.binary_cross_entropy_with_logits: _cross_entropy,
    Tensor.__format__: _format,
    Tensor.__repr__: _text,
    torch.isclose: _is_close,
    Tensor.isclose: _is_close,
    **_COMPARISONS,
}
