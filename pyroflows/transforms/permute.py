"""Permutations of the entries of vectors, and of the channels of images and series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import check_shape, check_size
from ..nn.made import check_order
from .base import Transform

__all__ = ["Permute", "Reverse"]


def inverse_permutation(permutation: list[int]) -> list[int]:
    """The inverse of a permutation of ``0 .. n - 1``."""
    return sorted(range(len(permutation)), key=permutation.__getitem__)


class Permute(Transform):
    r"""A fixed permutation of the entries of a vector, or the channels of an image or series.

    .. math:: y_i = x_{\pi(i)}.

    It is saved and moved with the module.

    Args:
        permutation: The permutation :math:`\pi` as a sequence of ``0 .. n - 1``, or the number
            :math:`n` for a random one.
        positions: Shape of what each entry holds: ``()`` for vectors, ``(height, width)`` for the
            channels of an image.
        seed: Seed of the random one. It depends on nothing else, so that a flow made again, to load
            saved parameters, has the permutation that the parameters were trained with.

    Raises:
        TypeError: If an entry is not an integer.
        ValueError: If the sequence is no permutation.

    Example:
        >>> Permute([2, 0, 1])(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 1., 2.])
    """

    exempt_laws: ClassVar[Mapping[str, str]] = {"starts_at_identity": "it permutes by intention"}
    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(
        self,
        permutation: int | Sequence[int] | Tensor,
        *,
        positions: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        chosen = _check_permutation(permutation, check_size("seed", seed, least=0))
        super().__init__((len(chosen), *check_shape("positions", positions)))
        self._dim = -len(self.event_shape)
        #: The permutation that it was made with, to be read on the meta device too.
        self.made_of: list[int] = chosen
        self.register_buffer("permutation", torch.tensor(chosen))
        self.register_buffer("inverse_permutation", torch.tensor(inverse_permutation(chosen)))

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._gather(x, self.permutation), self._no_log_det(x)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._gather(y, self.inverse_permutation), self._no_log_det(y)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, self._gather(score, self.permutation)

    def _gather(self, x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(self._dim, index)

    def _no_log_det(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[: self._dim])


def _check_permutation(permutation: Any, seed: int) -> list[int]:
    if isinstance(permutation, str):
        raise TypeError(
            "Expected permutation to be a sequence of integers or their number; "
            f"got {permutation!r}."
        )
    if isinstance(permutation, Tensor):
        permutation = permutation.tolist()
    if not isinstance(permutation, Sequence):
        generator = torch.Generator().manual_seed(seed)
        size = check_size("features", permutation)
        return torch.randperm(size, generator=generator, device="cpu").tolist()
    check_size("features", len(permutation))
    return check_order(permutation, len(permutation), "permutation")


class Reverse(Permute):
    r"""Reverses the order of the entries or channels, :math:`y_i = x_{n+1-i}`.

    Args:
        features: Entries of a vector, or the shape of an event, whose first dimension is reversed.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive.

    Example:
        >>> Reverse(3)(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 2., 1.])
    """

    def __init__(self, features: int | Sequence[int]) -> None:
        channels, *positions = check_shape("features", features, least=1)
        super().__init__(list(reversed(range(channels))), positions=positions)
