"""Layers that make tails heavier or lighter: the last of a flow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import check_positive
from ..univariate import GPDTail
from .base import Transform, vjp
from .elementwise import Elementwise

__all__ = ["LOFT", "tail_transform"]

#: Exponents are exact up to this bound; beyond, where values pass 1e30, the map bends to what floats can hold.
_CAP = 70.0


class LOFT(Transform):
    r"""The soft log that keeps samples within reach (log soft extension).

    .. math:: f(z)_i = \operatorname{sign}(z_i) \big( \log(\max(|z_i| - B, 0) + 1) + \min(|z_i|, B) \big),

    the identity on :math:`|z_i| \le B` and logarithmic beyond, so that the rare huge samples of a
    deep flow do not make its gradients explode. It is a last layer for variational inference, has
    no parameters, starts at and stays the identity within the bound, and is fast in both
    directions. Values beyond :math:`B + 70` stand for samples beyond :math:`e^{70}`; from there the
    inverse grows so slowly that it is finite for :math:`|y|` up to 1e30.

    Args:
        features: Entries of a vector, or the shape of an event.
        bound: Where the logarithm starts, :math:`B`.

    Raises:
        ValueError: If ``features`` or ``bound`` is not positive.

    Reference:
        Andrade, "Stable training of normalizing flows for high-dimensional variational inference",
        2024, https://arxiv.org/abs/2402.16408

    Example:
        >>> LOFT(3)(torch.tensor([-1.0, 100.0, 1e6]))
        tensor([ -1.0000, 100.0000, 113.8154])
    """

    exempt_laws: ClassVar[Mapping[str, str]] = {
        "starts_at_identity": "it is the identity within its bound only"
    }

    def __init__(self, features: int | Sequence[int], *, bound: float = 100.0) -> None:
        super().__init__(features)
        self.bound = check_positive("bound", bound)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, log_slope = self._compress(x)
        return y, self.entries(log_slope).sum(-1)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        inside, excess = self._excess(y)
        near = excess <= _CAP
        close, far = torch.where(near, excess, 0.0), torch.where(near, 0.0, excess - _CAP)
        grown = torch.where(near, torch.expm1(close), math.exp(_CAP) * (1 + torch.log1p(far)))
        log_slope = torch.where(near, close, _CAP - torch.log1p(far))
        return inside + torch.where(y < 0, -grown, grown), self.entries(log_slope).sum(-1)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            y, log_slope = self._compress(x)
            curvature = vjp([(log_slope, torch.ones_like(log_slope))], x)
        log_det = self.entries(log_slope).sum(-1)
        return y, log_det, ((score - curvature) * log_slope.neg().exp()).detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bound={self.bound}"

    def _compress(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside, excess = self._excess(x)
        near = excess <= math.exp(_CAP)
        close, far = (
            torch.where(near, excess, 0.0),
            torch.where(near, 0.0, excess * math.exp(-_CAP) - 1),
        )
        logarithm = torch.log1p(close)
        shrunk = torch.where(near, logarithm, _CAP + torch.expm1(far))
        return inside + torch.where(x < 0, -shrunk, shrunk), torch.where(
            near, -logarithm, far - _CAP
        )

    def _excess(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """What lies within the bound, and the size of what is beyond."""
        inside = value.clamp(-self.bound, self.bound)
        beyond = value - inside
        return inside, torch.where(beyond < 0, -beyond, beyond)


def tail_transform(tails: str, features: int | Sequence[int]) -> Transform:
    """The last layer of a flow, which shapes its tails.

    Args:
        tails: ``"gpd"`` for :class:`GPDTail`, learned for each entry and side, or ``"loft"`` for
            :class:`LOFT`.
        features: Entries of a vector, or the shape of an event.

    Returns:
        A transform.

    Raises:
        ValueError: If ``tails`` is unknown or a size is not positive.

    Example:
        >>> tail_transform("gpd", 3)
        Elementwise(GPDTail(start=0.1, bound=3.0), 3, fast: both directions)
    """
    if tails == "gpd":
        return Elementwise(GPDTail(), features)
    if tails == "loft":
        return LOFT(features)
    raise ValueError(f"Expected tails to be gpd or loft; got {tails!r}.")
