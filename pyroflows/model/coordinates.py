"""Coordinates in which the entries of a vector touch fewer others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["PartialSums"]


class PartialSums:
    r"""Coordinates with partial sums in the place of some entries.

    .. math:: w_t = z_1 + \dots + z_t

    A chain that is written by its increments, ``pyro.sample("dx", ...).cumsum(-1)``, makes each of
    them touch all others; its states touch their neighbours. Sums of sums do the same for a trend.
    The map has determinant one.

    Args:
        chains: For each site that is summed the entries of its chains, in order, of shape
            ``(k, length)``; twice for sums of sums.

    Example:
        >>> import torch
        >>> sums = PartialSums([torch.tensor([[1, 2, 3]])])
        >>> sums.to_sums(torch.ones(4))
        tensor([1., 1., 2., 3.])
        >>> sums.from_sums(torch.tensor([1.0, 1.0, 2.0, 3.0]))
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, chains: Sequence[Tensor] = ()) -> None:
        self.chains = tuple(chains)

    def to_sums(self, z: Tensor) -> Tensor:
        """The coordinates of vectors of shape ``(*, features)``."""
        w = z.clone()
        for chain in self.chains:
            w[..., chain] = w[..., chain].cumsum(-1)
        return w

    def from_sums(self, w: Tensor) -> Tensor:
        """The vectors of coordinates of shape ``(*, features)``."""
        z = w.clone()
        for chain in reversed(self.chains):
            z[..., chain[:, 1:]] = z[..., chain].diff(dim=-1)
        return z

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradients by the coordinates, from those by the vector ``(*, features)``."""
        pulled = gradient.clone()
        for chain in self.chains:
            pulled[..., chain[:, :-1]] = -pulled[..., chain].diff(dim=-1)
        return pulled
