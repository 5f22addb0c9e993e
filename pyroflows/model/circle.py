"""Angles as entries of an unconstrained vector."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

__all__ = ["CircleMap", "wrap"]


def wrap(angle: Tensor) -> Tensor:
    r"""Returns an angle in :math:`[-\pi, \pi)`, up to whole turns the same.

    Example:
        >>> wrap(torch.tensor([0.5, 3.5]))
        tensor([ 0.5000, -2.7832])
    """
    wrapped = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    return torch.where(wrapped < math.pi, wrapped, -math.pi)


class CircleMap(Transform):
    r"""A map of the line onto the circle, which it covers once.

    .. math:: \theta = c + \pi\, (2 \Phi(u) - 1)

    with the normal distribution function :math:`\Phi` and a centre :math:`c`: the angles around the
    centre are the numbers around zero, and the circle is cut at :math:`c + \pi`. A uniform angle is
    a standard normal number, and any other density of angles, if it is bounded, differs from that
    by a bounded factor. So the cut does no harm where the posterior has little mass, and none
    where it is spread over the whole circle.

    Args:
        centre: The angle :math:`c`, of any shape that broadcasts with the angles.

    Example:
        >>> turned = CircleMap(torch.tensor(math.pi))
        >>> turned(torch.tensor([0.0, 0.1]))
        tensor([-3.1416, -2.8913])
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, centre: Tensor | float = 0.0) -> None:
        super().__init__()
        self.centre = centre

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CircleMap) and bool(
            torch.as_tensor(self.centre).eq(torch.as_tensor(other.centre)).all()
        )

    __hash__ = Transform.__hash__

    def __repr__(self) -> str:
        return "CircleMap()"

    def _call(self, x: Tensor) -> Tensor:
        return wrap(self.centre + math.pi * torch.erf(x / math.sqrt(2)))

    def _inverse(self, y: Tensor) -> Tensor:
        edge = 1 - torch.finfo(y.dtype).eps
        turn: Any = wrap(y - self.centre) / math.pi
        return math.sqrt(2) * torch.erfinv(turn.clamp(-edge, edge))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log of the derivative, of the shape of the angles."""
        return 0.5 * math.log(2 * math.pi) - x.square() / 2
