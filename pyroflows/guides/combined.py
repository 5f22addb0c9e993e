"""Guides made of other guides: of blocks side by side, and in another order of entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributions.flow import sum_rightmost
from .guide import Base, BaseSpace, Guide, Map

__all__ = ["ProductGuide", "ReorderedGuide", "TorchMap"]


class ProductGuide(Guide):
    """Independent guides, each of a block of the vector.

    Args:
        guides: The guides, in the order of their blocks.
        spec: Gives plain data that say how they were made.
    """

    def __init__(self, guides: Sequence[Guide], spec: Callable[[], dict[str, Any]]) -> None:
        self.guides, self._spec = list(guides), spec
        self._sizes = [guide.features for guide in self.guides]
        self.features = sum(self._sizes)

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws each block; see :meth:`Guide.sample_and_log_prob`."""
        pairs = [guide.sample_and_log_prob(n, rows) for guide in self.guides]
        blocks, log_probs = zip(*pairs, strict=True)
        return torch.cat(blocks, -1), torch.stack(log_probs).sum(0)

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores each block; see :meth:`Guide.log_prob`."""
        pairs = zip(self.guides, z.split(self._sizes, -1), strict=True)
        return torch.stack([guide.log_prob(block, rows) for guide, block in pairs]).sum(0)

    def base_spaces(self) -> Sequence[BaseSpace]:
        """The product of the base spaces, if each guide has one."""
        each = [guide.base_spaces() for guide in self.guides]
        if any(len(spaces) != 1 for spaces in each):
            return ()
        transforms = [space.transform for (space,) in each]
        bases = [space.base for (space,) in each]
        return (BaseSpace(_ProductMap(transforms, self._sizes), _Product(bases, self._sizes)),)

    def centres(self) -> dict[str, Tensor]:
        """Those of all guides; see :meth:`Guide.centres`."""
        merged: dict[str, Tensor] = {}
        for guide in self.guides:
            merged.update(guide.centres())
        return merged

    def spec(self) -> dict[str, Any]:
        """Plain data from which the guide is made anew; see :meth:`Guide.spec`."""
        return self._spec()

    def state_dict(self) -> dict[str, Any]:
        """The numbers that the guides have learned."""
        return {str(k): dict(guide.state_dict()) for k, guide in enumerate(self.guides)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the numbers of :meth:`state_dict`."""
        for k, guide in enumerate(self.guides):
            guide.load_state_dict(state[str(k)])


class ReorderedGuide(Guide):
    """A guide whose vector holds its entries in another order.

    Args:
        guide: The guide.
        order: For each entry its place in the vector of ``guide``, of shape ``(features,)``.
    """

    def __init__(self, guide: Guide, order: Tensor) -> None:
        self.guide, self._order = guide, order
        self.features = guide.features

    def centres(self) -> Mapping[str, Tensor]:
        """Those of the guide; see :meth:`Guide.centres`."""
        return self.guide.centres()

    def spec(self) -> dict[str, Any]:
        """The description of the guide; its order follows from the model."""
        return self.guide.spec()

    def state_dict(self) -> Mapping[str, Any]:
        """The numbers that the guide has learned."""
        return self.guide.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the numbers of :meth:`state_dict`."""
        self.guide.load_state_dict(state)

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws vectors and reorders them; see :meth:`Guide.sample_and_log_prob`."""
        z, log_prob = self.guide.sample_and_log_prob(n, rows)
        return _take(z, self._order), log_prob

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores vectors; see :meth:`Guide.log_prob`."""
        return self.guide.log_prob(_take(z, self._order.argsort()), rows)

    def base_spaces(self) -> Sequence[BaseSpace]:
        """The base spaces of the guide."""
        return tuple(self._reorder(space) for space in self.guide.base_spaces())

    def _reorder(self, space: BaseSpace) -> BaseSpace:
        log_share, back = space.log_share, self._order.argsort()
        return BaseSpace(
            _ReorderedMap(space.transform, self._order),
            space.base,
            None if log_share is None else lambda z: log_share(_take(z, back)),
        )


class TorchMap:
    """A transform of torch or Pyro, of vectors or of each entry, as a map.

    Args:
        transform: The transform.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps base to event."""
        x = x.view_as(x)  # new to the caches of Pyro's transforms
        y = self.transform(x)
        return y, self._log_det(x, y)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Maps event to base."""
        y = y.view_as(y)
        x = self.transform.inv(y)
        return x, -self._log_det(x, y)

    def _log_det(self, x: Tensor, y: Tensor) -> Tensor:
        log_det = self.transform.log_abs_det_jacobian(x, y)
        return sum_rightmost(log_det, 1 - self.transform.domain.event_dim)


class _ProductMap:
    """Maps of the blocks of a vector."""

    def __init__(self, maps: Sequence[Map], sizes: Sequence[int]) -> None:
        self.maps, self.sizes = list(maps), list(sizes)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = zip(self.maps, x.split(self.sizes, -1), strict=True)
        return _joined([each.forward_and_log_det(block) for each, block in blocks])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        blocks = zip(self.maps, y.split(self.sizes, -1), strict=True)
        return _joined([each.inverse_and_log_det(block) for each, block in blocks])


class _Product:
    """Independent distributions of the blocks of a vector."""

    def __init__(self, bases: Sequence[Base], sizes: Sequence[int]) -> None:
        self.bases, self.sizes = list(bases), list(sizes)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.cat([base.sample(sample_shape) for base in self.bases], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        blocks = zip(self.bases, value.split(self.sizes, -1), strict=True)
        return torch.stack([base.log_prob(block) for base, block in blocks]).sum(0)


class _ReorderedMap:
    """A map whose result is put into another order."""

    def __init__(self, inner: Map, order: Tensor) -> None:
        self.inner, self.order = inner, order

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self.inner.forward_and_log_det(x)
        return _take(y, self.order), log_det

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.inverse_and_log_det(_take(y, self.order.argsort()))


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    blocks, log_dets = zip(*pairs, strict=True)
    return torch.cat(blocks, -1), torch.stack(log_dets).sum(0)


def _take(z: Tensor, order: Tensor) -> Tensor:
    return z.index_select(-1, order.to(z.device))
