"""Free-form monotone maps of the line: a monotone network, and the integral of a positive network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_positive, check_size
from ._numeric import invert
from .base import Univariate, soft_clip

__all__ = ["MonotoneIntegral", "MonotoneNetwork"]


@dataclass(frozen=True)
class MonotoneNetwork(Univariate):
    r"""The deep sigmoidal flow of NAF, the monotone network whose weights are the raw parameters.

    One layer is

    .. math:: x \mapsto (1 - \varepsilon) \operatorname{logit} \sum_j w_j\, \sigma(a_j x + b_j) + \varepsilon x, \quad
        w_j > 0, \quad \sum_j w_j = 1, \quad a_j > 0,

    with :math:`a_j` softly clipped to :math:`e^{\pm 5}` and :math:`\varepsilon = 10^{-3}`. Far out
    it is a line, so the map takes the whole line onto the whole line, and no slope of a layer is
    below :math:`\varepsilon`, so that it can be inverted everywhere. With every raw parameter zero
    all :math:`a_j = 1` and :math:`b_j = 0`, and the map is the identity.

    Forward is a formula; the inverse is found numerically, with exact gradients. So
    :class:`Elementwise` and :class:`Coupling` of it are faster to sample than to score; their
    inverses are the opposite.

    Args:
        units: Sigmoids per layer.
        layers: How many layers.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive.

    Reference:
        Huang, Krueger, Lacoste, Courville, "Neural autoregressive flows", 2018,
        https://arxiv.org/abs/1804.00779

    Example:
        >>> t = MonotoneNetwork(units=4, layers=1)
        >>> t.forward_and_log_det(torch.ones(2), torch.zeros(t.parameters, 2))[0]
        tensor([1., 1.])
    """

    units: int = 8
    layers: int = 2

    fast = "forward"

    def __post_init__(self) -> None:
        check_size("units", self.units)
        check_size("layers", self.layers)

    @property
    def parameters(self) -> int:
        """Three numbers per unit."""
        return 3 * self.units * self.layers

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        total: Tensor | None = None
        for weight, gain, shift in _units(raw, self.layers, self.units):
            x, log_slope = _sigmoidal(x, weight, gain, shift)
            total = log_slope if total is None else total + log_slope
        assert total is not None
        return x, total

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        y = y + torch.zeros_like(raw.select(-2, 0))  # the batch of both, that of vmap included
        return invert(lambda x: self.forward_and_log_det(x, raw), y, type(self).__name__)


#: Bound of the logarithm of a sigmoid's slope, and least slope of a layer.
_STEEPEST, _FLOOR = 5.0, 1e-3


def _units(raw: Tensor, layers: int, units: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each layer the logarithms of weights and slopes, and the shifts, each of shape ``(*, units, features)``."""
    weight, first, second = raw.unflatten(-2, (layers, 3, units)).unbind(-3)
    # Units that start equal would stay equal: their gradients are the same. So the slope and the shift of each unit are its
    # two raw numbers turned by an angle and stretched by a factor of the unit's own.
    index = torch.arange(units, dtype=raw.dtype, device=raw.device).unsqueeze(-1)
    angle, stretch = 2 * math.pi * (index + 0.5) / units, 0.5 + 3 * index / max(units - 1, 1)
    gain = soft_clip(angle.cos() * first - angle.sin() * second, _STEEPEST)
    shift = stretch * (angle.sin() * first + angle.cos() * second)
    return list(
        zip(weight.log_softmax(-2).unbind(-3), gain.unbind(-3), shift.unbind(-3), strict=True)
    )


def _sigmoidal(x: Tensor, weight: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    u = gain.exp() * x.unsqueeze(-2) + shift
    # With p = sum_j w_j sigmoid(u_j), the logarithms of p / sigmoid(r) and of (1 - p) / sigmoid(-r). The reference r drops
    # out of the result; the u_j that rules the tail leaves nothing to cancel, and zero where all u_j are the same.
    reference = torch.where(
        x.unsqueeze(-2) > 0, u.amin(-2, keepdim=True), u.amax(-2, keepdim=True)
    ).detach()
    above = weight + (F.logsigmoid(u) - F.logsigmoid(reference))
    below = weight + (F.logsigmoid(-u) - F.logsigmoid(-reference))
    y = reference.squeeze(-2) + (above.logsumexp(-2) - below.logsumexp(-2))
    # The slopes of log p and of -log(1 - p), sums of positive terms: nothing cancels, however far out.
    rising = above.softmax(-2) * torch.sigmoid(-u) + below.softmax(-2) * torch.sigmoid(u)
    slope = (gain.exp() * rising).sum(-2)
    return (1 - _FLOOR) * y + _FLOOR * x, torch.log(_FLOOR + (1 - _FLOOR) * slope)


@dataclass(frozen=True)
class MonotoneIntegral(Univariate):
    r"""The integral of a positive network, the map of unconstrained monotonic neural networks and autoregressive flows.

    .. math:: y = b + e^s \int_0^x g(t)\, dt, \qquad \log \frac{dy}{dx} = s + \log g(x), \qquad
        \log g(t) = \sum_j v_j \tanh(a_j (\operatorname{asinh} t - c_j)),

    where the weights of the network :math:`\log g`, the log-scale :math:`s` and the shift :math:`b`
    are the raw parameters. The network is evaluated at fixed nodes from :math:`-B` to :math:`B`,
    dense around zero and sparse far out, and :math:`g` is the linear interpolant between them,
    constant beyond. So the trapezoidal rule is no approximation: the map increases strictly, its
    log-derivative is the exact one, it takes the whole line onto the whole line, and both
    directions are formulas of the same cost. :math:`\log g` is softly clipped to :math:`\pm 7` and
    :math:`s` to :math:`\pm 3`.

    With every raw parameter zero all :math:`v_j = 0`, the centres :math:`c_j` lie spread over the
    nodes, and the map is the identity.

    Args:
        units: Hidden units of the network.
        nodes: How many nodes; an odd number, so that zero is one of them.
        bound: Outermost node :math:`B`.

    Raises:
        TypeError: If a size is not an integer or ``bound`` is not a number.
        ValueError: If ``units`` or ``bound`` is not positive, or ``nodes`` is even or below 3.

    Reference:
        Wehenkel, Louppe, "Unconstrained monotonic neural networks", 2019,
        https://arxiv.org/abs/1908.05164

    Example:
        >>> t = MonotoneIntegral(units=4)
        >>> t.forward_and_log_det(torch.ones(2), torch.zeros(t.parameters, 2))
        (tensor([1., 1.]), tensor([0., 0.]))
    """

    units: int = 8
    nodes: int = 65
    bound: float = 10.0

    def __post_init__(self) -> None:
        check_size("units", self.units)
        if check_size("nodes", self.nodes, least=3) % 2 == 0:
            raise ValueError(
                f"Expected nodes to be odd, so that zero is one of them; got {self.nodes}."
            )
        check_positive("bound", self.bound)

    @property
    def parameters(self) -> int:
        """Three numbers per unit, a log-scale and a shift."""
        return 3 * self.units + 2

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        tables, scale, shift = self._tables(raw)
        side, (near, far, below, above, area, _), rest, beyond = _cell(x, 0, tables)
        share = rest / (far - near)
        slope = below * (1 - share) + above * share
        integral = area + 0.5 * (below + slope) * rest + slope * beyond
        return shift + scale.exp() * side * integral, slope.log() + scale

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        tables, scale, shift = self._tables(raw)
        side, (near, far, below, above, area, end), rest, beyond = _cell(
            (y - shift) * scale.neg().exp(), 2, tables
        )
        # The squared slope is linear in the integral. Seen from the end where it is least, all terms are positive.
        rises = above >= below
        least, risen = torch.where(rises, below, above), torch.where(rises, rest, end - area - rest)
        slope = (least.square() + 2 * (above - below).abs() / (far - near) * risen).sqrt()
        return side * (near + 2 * rest / (below + slope) + beyond / above), -(slope.log() + scale)

    def _tables(self, raw: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """Nodes, integrand and integral from zero outwards to either side, ``(*, features, 2, nodes)``; log-scale; shift."""
        half, reach = self.nodes // 2, math.asinh(self.bound)
        grid = torch.arange(half + 1, dtype=raw.dtype, device=raw.device) * (reach / half)
        widths = grid.sinh().diff()
        # Hidden units start spread over the middle four fifths of the nodes.
        places = torch.stack([-grid, grid]) / (1.6 * reach / self.units)
        log_slope: Tensor | None = None
        # One unit after the other, which takes less memory than all at once, and less time.
        for unit, (weight, centre, gain) in enumerate(_per_unit(raw[..., :-2, :], self.units)):
            steep = soft_clip(gain, 3.0).exp()
            hidden = torch.addcmul(
                -steep * (centre + (unit - (self.units - 1) / 2)), steep, places
            ).tanh()
            log_slope = (
                weight * hidden if log_slope is None else torch.addcmul(log_slope, weight, hidden)
            )
        assert log_slope is not None
        slopes = soft_clip(log_slope, 7.0).exp()
        # Areas add up just as widths do, so that the integral of one is the node itself.
        areas = (0.5 * (slopes[..., 1:] + slopes[..., :-1]) * widths).cumsum(-1)
        nodes = F.pad(widths.cumsum(-1), (1, 0)).expand(2, -1)
        return (
            (nodes, slopes, F.pad(areas, (1, 0))),
            soft_clip(raw.select(-2, -2), 3.0),
            raw.select(-2, -1),
        )


def _per_unit(raw: Tensor, units: int) -> list[tuple[Tensor, ...]]:
    """The three numbers of each hidden unit, each of shape ``(*, features, 1, 1)``."""
    parts = raw.unflatten(-2, (3, units)).unsqueeze(-1).unsqueeze(-1)
    return [part.unbind(-4) for part in parts.unbind(-4)]


def _cell(
    value: Tensor, knots: int, tables: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    r"""Finds the cell that values lie in by one of the tables.

    Returns:
        The side of zero, :math:`\pm 1`; the entries of the tables at the two ends of the cell; how
        far the value lies past the inner end, and how far past the last node.
    """
    left, right = tables[knots].unbind(-2)
    negative = value < 0
    side = torch.where(negative, -1.0, torch.ones_like(value))
    above = torch.where(
        negative.unsqueeze(-1), -value.unsqueeze(-1) >= left, value.unsqueeze(-1) >= right
    )
    count = left.shape[-1]
    inner = (above.sum(-1) - 1).clamp(0, count - 2)
    inner = torch.where(negative, inner, inner + count).unsqueeze(-1)
    shape = torch.broadcast_shapes(inner.shape[:-1], tables[1].shape[:-2])
    index = torch.cat([inner, inner + 1], -1).expand(*shape, 2)
    ends = [
        end
        for table in tables
        for end in table.flatten(-2).expand(*shape, -1).gather(-1, index).unbind(-1)
    ]
    outward = side * value
    inside = torch.minimum(outward, ends[2 * knots + 1])
    return side, tuple(ends), inside - ends[2 * knots], outward - inside
