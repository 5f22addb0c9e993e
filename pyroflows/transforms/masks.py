"""Masks of couplings: which entries stay, and which move."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_size

__all__ = ["Mask", "coupling_masks"]

Mask = str | Tensor | Sequence[bool]


def coupling_masks(
    mask: Mask | Sequence[Mask], features: int, transforms: int, seed: int = 0
) -> list[Tensor]:
    r"""Masks for a stack of couplings; ``True`` marks the entries that stay and condition the others.

    Args:
        mask: ``"half"`` (the first half stays), ``"checkerboard"`` (entries of even index stay),
            ``"random"`` (a random half stays, a new one for every second layer), each swapped with
            its complement from layer to layer; ``"alternating"`` (half and checkerboard in turn,
            then both swapped); one boolean mask of shape ``(features,)``, swapped from layer to
            layer; or one boolean mask per layer, ``(transforms, features)``.
        features: Entries of the vector.
        transforms: Number of layers.
        seed: Seed of the random masks. They depend on nothing else, so that a flow made again, to
            load saved parameters, has the masks that the parameters were trained with.

    Returns:
        One boolean tensor of shape ``(features,)`` per layer.

    Raises:
        TypeError: If the mask is neither a name nor boolean.
        ValueError: If the name is unknown, the shape is wrong, or a mask leaves no entry to
            condition on or none to transform.

    Example:
        >>> coupling_masks("half", 3, 2)
        [tensor([ True, False, False]), tensor([False,  True,  True])]
    """
    if check_size("features", features) < 2:
        raise ValueError(
            "Expected features >= 2 for a coupling, which needs one entry to condition on and one to transform; "
            f"got {features}. For one feature use Elementwise instead. Ready-made flows for it are "
            "MAF and NSF, which take contexts too."
        )
    check_size("transforms", transforms)
    check_size("seed", seed, least=0)
    if isinstance(mask, str):
        return _named_masks(mask, features, transforms, seed)
    try:
        given = torch.as_tensor(mask, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"Expected mask to be a name or a boolean tensor; got {mask!r}.") from None
    if given.dtype != torch.bool:
        raise TypeError(f"Expected mask to be boolean; got {given.dtype}.")
    if given.shape == (features,):
        masks = [given if layer % 2 == 0 else ~given for layer in range(transforms)]
    elif given.shape == (transforms, features):
        masks = list(given)
    else:
        raise ValueError(
            f"Expected mask of shape ({features},) or ({transforms}, {features}); got {tuple(given.shape)}."
        )
    for row in masks:
        if bool(row.all()):
            raise ValueError(
                "Expected mask to leave an entry to transform; got one that is True everywhere."
            )
        if not bool(row.any()):
            raise ValueError(
                "Expected mask to leave an entry to condition on; got one that is False everywhere. Use Elementwise instead."
            )
    return masks


def _named_masks(name: str, features: int, transforms: int, seed: int) -> list[Tensor]:
    index = torch.arange(features, device="cpu")
    half, checkerboard = index < features // 2, index % 2 == 0
    if name == "half":
        cycle = [half, ~half]
    elif name == "checkerboard":
        cycle = [checkerboard, ~checkerboard]
    elif name == "alternating":
        cycle = [half, checkerboard, ~half, ~checkerboard]
    elif name == "random":
        halves = _spread_halves(half, (transforms + 1) // 2, torch.Generator().manual_seed(seed))
        cycle = [mask for chosen in halves for mask in (chosen, ~chosen)]
    else:
        raise ValueError(
            f"Expected mask to be half, checkerboard, alternating, random or a tensor; got {name!r}."
        )
    return [cycle[layer % len(cycle)].clone() for layer in range(transforms)]


def _spread_halves(
    half: Tensor, count: int, generator: torch.Generator, candidates: int = 64
) -> list[Tensor]:
    """Random halves, each the one of some candidates that parts most pairs of entries that none before it has parted.

    Two entries that are never parted never condition each other.
    """
    # Entries of one group have not been parted yet.
    group = torch.zeros(len(half), dtype=torch.long, device="cpu")
    chosen: list[Tensor] = []
    for _ in range(count):
        shuffled = [
            half[torch.randperm(len(half), generator=generator, device="cpu")]
            for _ in range(candidates)
        ]
        # The layer before has the complement of the last one; the same mask twice would make one layer of two.
        new = [mask for mask in shuffled if not chosen or not torch.equal(mask, ~chosen[-1])]
        best = max(new, key=functools.partial(_count_parted, group))
        group = torch.unique(2 * group + best, return_inverse=True)[1]
        chosen.append(best)
        if int(group.amax()) == len(half) - 1:
            group.zero_()
    return chosen


def _count_parted(group: Tensor, mask: Tensor) -> int:
    """How many pairs of entries of one group a mask parts."""
    inside = torch.bincount(group, mask.double())
    return int((inside * (torch.bincount(group) - inside)).sum())
