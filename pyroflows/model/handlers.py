"""How a model is run: handlers of Pyro and of torch that stand around a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._compat import tree_leaves, tree_map_only, unvalidated, whole_plates

__all__ = [
    "FirstRows",
    "GivenRows",
    "NanWhereSingular",
    "ParameterRecorder",
    "SubstituteTensors",
    "Unvalidated",
    "WholePlates",
]


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
                self.parameters.setdefault(id(leaf), leaf)
        return func(*args, **(kwargs or {}))


class SubstituteTensors(TorchFunctionMode):
    """Puts tensors in the place of others wherever a run uses those.

    Args:
        pairs: The tensors to replace, each with its replacement.
    """

    def __init__(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        # The originals are kept too, so that their identities cannot be reused.
        self.pairs = {id(original): (original, value) for original, value in pairs}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._replace, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _replace(self, tensor: Tensor) -> Tensor:
        pair = self.pairs.get(id(tensor))
        return tensor if pair is None else pair[1]


# What a run under vmap may not do


def _cholesky(matrix: Tensor, *, upper: bool = False) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix, upper=upper)
    return _nan_where_failed(factor, info)


def _old_cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    return _cholesky(matrix, upper=upper)


def _inv(matrix: Tensor) -> Tensor:
    inverse, info = torch.linalg.inv_ex(matrix)
    return _nan_where_failed(inverse, info)


def _solve(matrix: Tensor, right: Tensor, *, left: bool = True) -> Tensor:
    solution, info = torch.linalg.solve_ex(matrix, right, left=left)
    vector = solution.dim() == info.dim() + 1
    if vector:
        return solution.where((info == 0).unsqueeze(-1), torch.nan)
    return _nan_where_failed(solution, info)


def _nan_where_failed(matrix: Tensor, info: Tensor) -> Tensor:
    return matrix.where((info == 0).unsqueeze(-1).unsqueeze(-1), torch.nan)


class NanWhereSingular(TorchFunctionMode):
    """Lets a factorisation that fails return NaN for its matrix, so that one matrix that has none
    does not end the evaluation of a whole batch."""

    REPLACEMENTS = {  # noqa: RUF012
        torch.linalg.cholesky: _cholesky,
        torch.cholesky: _old_cholesky,
        Tensor.cholesky: _old_cholesky,
        torch.linalg.inv: _inv,
        torch.inverse: _inv,
        Tensor.inverse: _inv,
        torch.linalg.solve: _solve,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))
