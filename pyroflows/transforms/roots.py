"""Roots of covariances: matrices, or of many entries roots of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .low_rank import LowRankRoot

__all__ = [
    "Root",
    "is_finite",
    "join_roots",
    "log_det",
    "multiply_root",
    "multiply_transposed",
    "pick_root",
    "solve_root",
    "triangle",
]

#: Of shape ``(*, features, features)``, where it is a matrix.
Root: TypeAlias = Tensor | LowRankRoot


def multiply_root(root: Root, x: Tensor) -> Tensor:
    """Products of roots of shape ``(*, features, features)`` with vectors ``(*, m, features)``."""
    return x @ root.mT if isinstance(root, Tensor) else root.multiply(x)


def multiply_transposed(root: Root, x: Tensor) -> Tensor:
    """Products of transposed roots with vectors of shape ``(*, m, features)``."""
    return x @ root if isinstance(root, Tensor) else root.multiply_transposed(x)


def solve_root(root: Root, y: Tensor) -> Tensor:
    """Solutions for vectors of shape ``(*, m, features)``, not finite where there are none."""
    if isinstance(root, Tensor):
        return torch.linalg.solve_ex(root, y.mT)[0].mT
    return root.solve(y)


def log_det(root: Root) -> Tensor:
    """The logarithms of the determinants, of shape ``(*)``."""
    return torch.linalg.slogdet(root)[1] if isinstance(root, Tensor) else root.log_det


def is_finite(root: Root) -> Tensor:
    """Which of several roots are finite, of shape ``(count,)``."""
    parts = [root] if isinstance(root, Tensor) else list(root)
    finite = [part.isfinite().flatten(1).all(-1) for part in parts]
    return torch.stack(finite).all(0)


def pick_root(root: Root, index: Tensor | int) -> Root:
    """Some of several roots, by indices or a mask."""
    return root[index] if isinstance(root, Tensor) else root.pick(index)


def join_roots(roots: Sequence[Root]) -> Root:
    """All roots, which are of one kind, one after the other."""
    matrices = [root for root in roots if isinstance(root, Tensor)]
    if matrices:
        return torch.cat(matrices)
    return LowRankRoot(*(torch.cat(parts) for parts in zip(*roots, strict=True)))


def triangle(root: Root) -> Tensor:
    """The lower-triangular root of the same covariance, of few features."""
    return root if isinstance(root, Tensor) else root.triangle()
