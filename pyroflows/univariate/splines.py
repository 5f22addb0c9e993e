"""Monotone splines: a box is cut into bins, and in each bin the map is a ratio of polynomials."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from .._checks import check_positive, check_size
from .._compat import in_forward_mode, transforming
from .base import Univariate, soft_clip

__all__ = ["CircularSpline", "LinearRationalSpline", "RationalQuadraticSpline"]


# The box and its bins


class Box(NamedTuple):
    r"""The square :math:`[-B, B]^2` that a spline maps onto itself along the diagonal, and what its bins share.

    Lengths in it are counted from the lower left corner in a unit such that bin :math:`k` is
    :math:`m + s_k` wide, with :math:`m` the least size and :math:`s` a softmax, and likewise high:
    so no table has to be scaled.

    Raw parameters are ``bins`` widths, ``bins`` heights and the slopes at the knots: at the inner
    ones, for at the outer ones the slope is one; or, where the spline is periodic, at all but the
    last, which is the first.
    """

    bins: int
    bound: float
    min_size: float
    min_slope: float
    periodic: bool = False

    @property
    def unit(self) -> float:
        return 2 * self.bound * (1 - self.bins * self.min_size)

    @property
    def least(self) -> float:
        return self.min_size / (1 - self.bins * self.min_size)

    @property
    def slopes(self) -> int:
        return self.bins if self.periodic else self.bins - 1

    @property
    def clip(self) -> float:
        """Bound of the logarithms of slopes."""
        return -math.log(self.min_slope)

    def measure(self, x: Tensor) -> Tensor:
        """Points in units, those outside of the box at its edge."""
        return ((x + self.bound) / self.unit).clamp(0.0, 1 + self.bins * self.least)

    def holds(self, x: Tensor) -> Tensor:
        """One for points in the box, zero for those in the tails."""
        return (x.abs() < self.bound).to(x.dtype)

    def slope_rows(self, j: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the raw slopes at both ends of bin ``j`` are, and, if some do not exist, which do."""
        if self.periodic:
            return torch.cat([j, (j + 1) % self.bins], -2), None
        rows = torch.cat([j - 1, j], -2)
        inner = rows.clamp(0, self.slopes - 1)
        return inner, rows == inner


class Bin(NamedTuple):
    """The bins that hold the entries, in units: for each its corner, its width and height, and the slopes at both ends.

    Each is a tensor of shape ``(*, 2, features)``.
    """

    corner: Tensor
    size: Tensor
    slope: Tensor

    def unbind(self) -> list[Tensor]:
        """Left, bottom, width, height, and slope at the left and right end, each of shape ``(*, features)``."""
        return [half for pair in self for half in pair.unbind(-2)]


def find_bin(box: Box, z: Tensor, raw: Tensor, axis: int) -> tuple[Bin, Tensor, Tensor]:
    """Finds the bins that hold points.

    Args:
        box: The box.
        z: Points in units, of shape ``(*, features)``.
        raw: Raw parameters of shape ``(*, parameters, features)``.
        axis: 0 to look along the widths, 1 along the heights.

    Returns:
        The bins, their numbers ``(*, 1, features)``, and the shares ``(*, 2, bins, features)`` of
        widths and heights.
    """
    shares = raw.narrow(-2, 0, 2 * box.bins).unflatten(-2, (2, box.bins)).softmax(-2)
    steps = torch.arange(1, box.bins, device=raw.device, dtype=raw.dtype).unsqueeze(-1)
    knots = shares.narrow(-2, 0, box.bins - 1).cumsum(-2).add_(box.least * steps)
    j = (knots.select(-3, axis) <= z.unsqueeze(-2)).sum(-2, keepdim=True)
    corner = _pick_pair(knots, (j - 1).clamp(min=0)) * (j > 0)  # the first corner is exactly zero
    rows, exist = box.slope_rows(j)
    ends = _pick(raw, 2 * box.bins + rows)
    ends = ends if exist is None else ends * exist
    return (
        Bin(
            corner,
            _pick_pair(shares, j) + box.least,
            soft_clip(ends, box.clip).exp(),
        ),
        j,
        shares,
    )


def _pick(table: Tensor, rows: Tensor) -> Tensor:
    return table.expand(*rows.shape[:-2], *table.shape[-2:]).gather(-2, rows)


def _pick_pair(table: Tensor, j: Tensor) -> Tensor:
    batch, features = j.shape[:-2], j.shape[-1]
    rows = j.unsqueeze(-3).expand(*batch, 2, 1, features)
    return table.expand(*batch, *table.shape[-3:]).gather(-2, rows).squeeze(-2)


def pull_bin(box: Box, bin: Bin, j: Tensor, shares: Tensor, raw: Tensor, grad: Bin) -> Tensor:
    r"""The gradient with respect to the raw parameters, given that with respect to the bins.

    With :math:`a` the gradient of the corner, which is :math:`m j + \sum_{k<j} s_k`, and :math:`b`
    that of the size :math:`m + s_j`, and shares from a softmax,

    .. math:: g_k = s_k \, (a [k < j] + b [k = j] - \bar g), \quad \bar g = a \sum_{k<j} s_k + b s_j.
    """
    number = j.to(raw.dtype)
    mean = grad.corner * (bin.corner - box.least * number) + grad.size * (bin.size - box.least)
    order = torch.arange(box.bins, device=raw.device, dtype=raw.dtype).unsqueeze(-1)
    before = (number - order).clamp(0.0, 1.0)
    grads = (before.unsqueeze(-3) * grad.corner.unsqueeze(-2)).sub_(mean.unsqueeze(-2))
    pair = j.unsqueeze(-3).expand(*grads.shape[:-2], 1, -1)
    grads.scatter_add_(-2, pair, grad.size.unsqueeze(-2)).mul_(shares)
    rows, exist = box.slope_rows(j)
    ends = grad.slope * bin.slope * (1 - (bin.slope.log() / box.clip).square())
    ends = ends if exist is None else ends * exist
    slopes = ends.new_zeros(*ends.shape[:-2], box.slopes, ends.shape[-1]).scatter_add(
        -2, rows, ends
    )
    return torch.cat([*grads.unbind(-3), slopes], -2).sum_to_size(raw.shape)


def finish(
    box: Box, x: Tensor, excess: Tensor, root: Tensor, slope: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The value and the logarithm of its slope, from what the map adds to a point and from its root, both in units."""
    moved, log_slope = box.unit * excess, slope.log()
    if not box.periodic:
        inside = box.holds(x)
        moved, log_slope = moved * inside, log_slope * inside
    if not inverse:
        return x + moved, log_slope
    # Where the map is steep, the excess would multiply the rounding of the root.
    return torch.where(slope < 2, x - moved, box.unit * root - box.bound), -log_slope


# The rational-quadratic spline


def rational_quadratic(p: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    r"""The map within a bin at the fraction :math:`p` of its width, as an excess over the identity, and its slope.

    With mean slope :math:`s`, end slopes :math:`d_0, d_1`, :math:`q = p (1 - p)` and
    :math:`e = d_0 + d_1 - 2 s`,

    .. math:: y = h \, \frac{s p^2 + d_0 q}{s + e q}, \quad
        \frac{y - w p}{w} = \frac{p}{s + e q} \, \bigl(s (s - 1) p + s (d_0 - 1) (1 - p) - e q\bigr), \quad
        \frac{dy}{dx} = s^2 \, \frac{d_1 p^2 + 2 s q + d_0 (1 - p)^2}{(s + e q)^2}.

    The excess is exactly zero for the identity, and never larger than the bin, so that nothing is
    lost by its use.
    """
    o = 1 - p
    a0, a1, k = d0 * o, d1 * p, _twice(p * o * s)
    eq = a0 * p + a1 * o - k
    over = (s + eq).reciprocal()
    # The slope at the start is interpolated so that it is exactly one where both are.
    excess = p * (s * (torch.lerp(d0, s, p) - 1) - eq) * over
    slope = (s * over).square() * (a0 * o + a1 * p + k)
    return excess, slope


def _twice(x: Tensor) -> Tensor:
    # Cheaper than a product with a number, which torch first makes a tensor of.
    return x + x


def rational_quadratic_root(t: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    r"""The fraction :math:`p` of the width at which the map takes the fraction :math:`t` of the height.

    It is the root of :math:`a p^2 + b p - s t = 0` with :math:`e` as above, :math:`b = d_0 - e t`
    and :math:`a = s - b`, computed without cancellation. Where :math:`b < 0`, :math:`a > s`.
    """
    twice_st = _twice(s * t)
    b = d0 - (d0 + d1) * t + twice_st
    a = s - b
    # In exact arithmetic the discriminant is positive.
    root = torch.addcmul(b * b, twice_st, a, value=2).clamp(min=torch.finfo(t.dtype).tiny).sqrt()
    total = b.abs() + root
    return torch.where(b.signbit(), total / _twice(torch.maximum(a, s)), twice_st / total).clamp(
        0.0, 1.0
    )


class Mapped(NamedTuple):
    """A map of points, its log-slope, and what its gradient needs."""

    y: Tensor
    log_slope: Tensor
    p: Tensor
    slope: Tensor
    bin: Bin
    j: Tensor
    shares: Tensor


def map_points(box: Box, x: Tensor, raw: Tensor, inverse: bool) -> Mapped:
    """The spline, or its inverse, in formulas that can be differentiated any number of times."""
    z = box.measure(x)
    bin, j, shares = find_bin(box, z, raw, int(inverse))
    left, bottom, width, height, d0, d1 = bin.unbind()
    s = height / width
    if inverse:
        p = rational_quadratic_root(((z - bottom) / height).clamp(0.0, 1.0), s, d0, d1)
    else:
        p = ((z - left) / width).clamp(0.0, 1.0)
    excess, slope = rational_quadratic(p, s, d0, d1)
    y, log_slope = finish(box, x, bottom - left + width * excess, left + width * p, slope, inverse)
    return Mapped(y, log_slope, p, slope, bin, j, shares)


class _RationalQuadratic(torch.autograd.Function):
    """The spline with its gradient in closed form, which saves a third of the time of automatic differentiation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, raw: Tensor, box: Box, inverse: bool) -> tuple[Tensor, Tensor]:
        done = map_points(box, x, raw, inverse)
        ctx.box, ctx.inverse = box, inverse
        ctx.save_for_backward(x, raw, done.p, done.slope, done.j, done.shares, *done.bin)
        return done.y, done.log_slope

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log: Tensor) -> tuple[Tensor | None, ...]:
        x, raw, p, slope, j, shares, *parts = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return (
                *_differentiable_pull(ctx.box, x, raw, ctx.inverse, grad_y, grad_log, wanted),
                None,
                None,
            )
        box, bin = ctx.box, Bin(*parts)
        passed = 0.0
        if not box.periodic:
            inside = box.holds(x)
            passed = grad_y * (1 - inside)
            grad_y, grad_log = grad_y * inside, grad_log * inside
        grad_z, grad_bin = _pull_map(bin, p, slope, box.unit * grad_y, grad_log, ctx.inverse)
        grad_raw = pull_bin(box, bin, j, shares, raw, grad_bin) if wanted[1] else None
        return (grad_z / box.unit + passed).sum_to_size(x.shape), grad_raw, None, None


def _differentiable_pull(
    box: Box,
    x: Tensor,
    raw: Tensor,
    inverse: bool,
    grad_y: Tensor,
    grad_log: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    with torch.enable_grad():
        outputs = map_points(box, x, raw, inverse)[:2]
        inputs = [value for value, asked in zip((x, raw), wanted, strict=True) if asked]
        grads = iter(torch.autograd.grad(outputs, inputs, (grad_y, grad_log), create_graph=True))
    x_grad, raw_grad = (next(grads) if asked else None for asked in wanted)
    return x_grad, raw_grad


def _pull_map(
    bin: Bin, p: Tensor, slope: Tensor, grad_y: Tensor, grad_log: Tensor, inverse: bool
) -> tuple[Tensor, Bin]:
    r"""The gradient with respect to the point and the bins, all in units.

    Let :math:`y = f(z, \theta)` and :math:`\ell = \log \partial f / \partial z`. For gradients
    :math:`u` of :math:`y` and :math:`v` of :math:`\ell`, those of :math:`z` and :math:`\theta` are
    :math:`u f_z + v \ell_z` and :math:`u f_\theta + v \ell_\theta`. The inverse has gradients
    :math:`u` of :math:`z` and :math:`v` of :math:`-\ell`; by the implicit function theorem the one
    of :math:`y` is :math:`g = (u - v \ell_z) / f_z` and that of :math:`\theta` is
    :math:`-g f_\theta - v \ell_\theta`.

    In a bin :math:`f` is a function of :math:`p = (z - x_0) / w`, :math:`s = h / w`, :math:`d_0`
    and :math:`d_1`: with the notation of :func:`rational_quadratic`, :math:`o = 1 - p`,
    :math:`D = s + e q` and :math:`M = d_1 p^2 + 2 s q + d_0 o^2`,

    .. math::
        f &= y_0 + h N / D, & N &= s p^2 + d_0 q, &
        \partial_s (N / D) &= q (d_1 p^2 - d_0 o^2) / D^2, \\
        \partial_{d_0} (N / D) &= q (s o^2 + d_1 q) / D^2, & \partial_{d_1} (N / D) &= -q N / D^2, &
        \ell &= 2 \log s + \log M - 2 \log D, \\
        \partial_p M &= 2 (d_1 p + s (o - p) - d_0 o), & \partial_p D &= e (o - p), & \partial_s D &= 1 - 2 q.
    """
    _, _, width, height, d0, d1 = bin.unbind()
    s = height / width
    o = 1 - p
    q, tilt = p * o, o - p
    a0, a1, k = d0 * o, d1 * p, _twice(q * s)
    d0oo, d1pp = a0 * o, a1 * p
    d0q, d1q = a0 * p, a1 * o
    over_m = (d0oo + d1pp + k).reciprocal()
    over_d = (s + (d0q + d1q - k)).reciprocal()
    n_over_d = (s * p * p + d0q) * over_d
    q_over_d, q_over_m = _twice(q) * over_d, q * over_m
    log_p = _twice((a1 - a0 + s * tilt) * over_m - (d0 + d1 - _twice(s)) * tilt * over_d)
    log_s = _twice(s.reciprocal() + q_over_m - over_d + q_over_d)
    log_z = log_p / width
    if inverse:
        grad_z = (grad_y - grad_log * log_z) / slope
        along, grad_y, grad_log = -grad_y, -grad_z, -grad_log
    else:
        grad_z = along = grad_y * slope + grad_log * log_z
    lever = grad_y * height * q * over_d
    twist = grad_log * over_m
    spin = grad_log * q_over_d
    grad_s = lever * over_d * (d1pp - d0oo) + grad_log * log_s
    grad_d0 = lever * over_d * (s * o * o + d1q) + twist * o * o - spin
    grad_d1 = twist * p * p - spin - lever * n_over_d
    grad_w = -(along * p + grad_s * s / width)
    grad_h = grad_y * n_over_d + grad_s / width
    return grad_z, Bin(
        *(
            torch.stack(pair, -2)
            for pair in ((-along, grad_y), (grad_w, grad_h), (grad_d0, grad_d1))
        )
    )


def rational_quadratic_spline(
    box: Box, x: Tensor, raw: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The spline, or its inverse, and the logarithm of its slope."""
    # Function transforms, compilers and forward mode see formulas, which they differentiate by themselves.
    if transforming() or torch.jit.is_tracing() or in_forward_mode():
        y, log_slope = map_points(box, x, raw, inverse)[:2]
        return y, log_slope
    return _RationalQuadratic.apply(x, raw, box, inverse)


# The linear-rational spline


def linear_rational_spline(
    box: Box, x: Tensor, raw: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    r"""The spline, or its inverse, and the logarithm of its slope.

    A bin is split at the fraction :math:`\lambda` of its width. Seen from the end of slope
    :math:`d` (the left one, or the right one in a mirror, where :math:`\lambda` and :math:`p` are
    counted from), each part is a ratio of linear functions,

    .. math:: \frac{y}{w} = \frac{\lambda d \, p}{\lambda - p + \kappa p}, \quad
        \frac{dy}{dx} = d \, \Bigl(\frac{\lambda}{\lambda - p + \kappa p}\Bigr)^2, \quad
        \kappa = \frac{\lambda d + (1 - \lambda) \sqrt{d_0 d_1}}{s}.
    """
    z = box.measure(x)
    bin, j, _ = find_bin(box, z, raw, int(inverse))
    left, bottom, width, height, d0, d1 = bin.unbind()
    middle = 0.05 / 2 + 0.95 * _pick(raw, 3 * box.bins - 1 + j).squeeze(-2).sigmoid()
    roots = bin.slope.sqrt()
    r0, r1 = roots.unbind(-2)
    low, high = middle * r0, (1 - middle) * r1  # the heights of the parts are in this proportion
    fraction = ((z - bottom) / height if inverse else (z - left) / width).clamp(0.0, 1.0)
    second = fraction > (low / (low + high) if inverse else middle)
    fraction = torch.where(second, 1 - fraction, fraction)
    part = torch.where(second, 1 - middle, middle)
    d = torch.where(second, d1, d0)
    kappa = (part * d + (1 - part) * r0 * r1) * width / height
    if inverse:
        share = torch.where(second, high, low) / (low + high)
        p = part * fraction / (kappa * (share - fraction).clamp(min=0.0) + fraction)
    else:
        p = fraction
    over = (part - p + kappa * p).reciprocal()
    excess = width * p * ((d - 1) * part - (kappa - 1) * p) * over
    slope = d * (part * over).square()
    return finish(
        box,
        x,
        bottom - left + torch.where(second, height - width - excess, excess),
        left + width * torch.where(second, 1 - p, p),
        slope,
        inverse,
    )


# What structures take


def _check_sizes(bins: Any, min_size: Any, min_slope: Any) -> None:
    check_size("bins", bins, least=2)
    if check_positive("min_size", min_size) * bins >= 1:
        raise ValueError(
            f"Expected min_size < 1 / bins, for bins that fill the box; got {min_size} with {bins} bins."
        )
    if check_positive("min_slope", min_slope) >= 1:
        raise ValueError(f"Expected min_slope < 1; got {min_slope}.")


@dataclass(frozen=True)
class RationalQuadraticSpline(Univariate):
    r"""Rational-quadratic spline on :math:`[-B, B]`, the identity beyond.

    The box is cut into :math:`K` bins, whose widths and heights are a softmax of raw parameters;
    the slopes :math:`d_k` at the knots in between are :math:`e^{b \tanh(a_k / b)}` with
    :math:`b = -\log` ``min_slope``. In a bin with corner :math:`(x_0, y_0)`, mean slope
    :math:`s = h / w` and :math:`p = (x - x_0) / w`,

    .. math:: y = y_0 + h \, \frac{s p^2 + d_k p (1 - p)}{s + (d_k + d_{k+1} - 2 s) \, p (1 - p)},

    whose inverse is the root of a quadratic. It is exactly the identity where all :math:`3 K - 1`
    raw parameters are zero. Both directions are fast.

    Args:
        bins: Number of bins :math:`K`, at least 2.
        bound: Half the side of the box, :math:`B`.
        min_size: Least width and height of a bin, as a fraction of the side.
        min_slope: Least slope at a knot; the largest is its reciprocal.

    Raises:
        TypeError: If ``bins`` is not an integer or another option not a number.
        ValueError: If an option is out of range.

    Reference:
        Durkan, Bekasov, Murray, Papamakarios, "Neural spline flows", 2019,
        https://arxiv.org/abs/1906.04032

    Example:
        >>> spline = RationalQuadraticSpline(bins=4)
        >>> spline.forward_and_log_det(torch.tensor([1.0, 7.0]), torch.zeros(11, 2))
        (tensor([1., 7.]), tensor([0., 0.]))
    """

    bins: int = 8
    bound: float = 5.0
    min_size: float = 1e-3
    min_slope: float = 1e-3

    def __post_init__(self) -> None:
        _check_sizes(self.bins, self.min_size, self.min_slope)
        check_positive("bound", self.bound)

    @property
    def parameters(self) -> int:
        return 3 * self.bins - 1

    @property
    def box(self) -> Box:
        """What all bins share."""
        return Box(self.bins, self.bound, self.min_size, self.min_slope)

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(self.box, x, raw, inverse=False)

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(self.box, y, raw, inverse=True)


@dataclass(frozen=True)
class LinearRationalSpline(RationalQuadraticSpline):
    r"""Linear-rational spline on :math:`[-B, B]`, the identity beyond; the spline of Pyro's ``Spline`` by default.

    Bins and slopes are those of :class:`RationalQuadraticSpline`. Each bin has a knot more, at a
    learned fraction of its width, :math:`\lambda_k \in [0.025, 0.975]`, and on either side the map
    is :math:`(a + b x) / (c + d x)`, so that the inverse is a spline of the same kind. It is
    exactly the identity where all :math:`4 K - 1` raw parameters are zero. Both directions are
    fast.

    Args:
        bins: Number of bins :math:`K`, at least 2.
        bound: Half the side of the box, :math:`B`.
        min_size: Least width and height of a bin, as a fraction of the side.
        min_slope: Least slope at a knot; the largest is its reciprocal.

    Raises:
        TypeError: If ``bins`` is not an integer or another option not a number.
        ValueError: If an option is out of range.

    Reference:
        Dolatabadi, Erfani, Leckie, "Invertible generative modeling using linear rational splines",
        2020, https://arxiv.org/abs/2001.05168

    Example:
        >>> spline = LinearRationalSpline(bins=4)
        >>> spline.forward_and_log_det(torch.tensor([1.0, 7.0]), torch.zeros(15, 2))
        (tensor([1., 7.]), tensor([0., 0.]))
    """

    @property
    def parameters(self) -> int:
        return 4 * self.bins - 1

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return linear_rational_spline(self.box, x, raw, inverse=False)

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return linear_rational_spline(self.box, y, raw, inverse=True)


def _as_angle(x: Tensor) -> Tensor:
    """The angle in [-pi, pi) that points the same way; what lies there already stays as it is."""
    turned = torch.remainder(x + math.pi, 2 * math.pi) - math.pi
    return torch.where((x >= -math.pi) & (x < math.pi), x, turned)


@dataclass(frozen=True)
class CircularSpline(Univariate):
    r"""Rational-quadratic spline of the circle onto itself, for angles in :math:`[-\pi, \pi)`.

    .. math:: y = f(x) + \varphi \mod 2 \pi,

    where :math:`f` is the spline of :class:`RationalQuadraticSpline` on :math:`[-\pi, \pi]` with
    the same learned slope at both ends, so that it is smooth across the seam, and :math:`\varphi` a
    learned rotation, so that the seam moves. It is exactly the identity where all :math:`3 K + 1`
    raw parameters are zero. Both directions are fast. The base distribution has to live on the
    circle too, as the uniform and von Mises distributions do; networks that take the angles as
    input see :math:`(\cos x, \sin x)`.

    Args:
        bins: Number of bins :math:`K`, at least 2.
        min_size: Least width and height of a bin, as a fraction of the circle.
        min_slope: Least slope at a knot; the largest is its reciprocal.

    Raises:
        TypeError: If ``bins`` is not an integer or another option not a number.
        ValueError: If an option is out of range.

    Reference:
        Rezende, Papamakarios, Racaniere, Albergo, Kanwar, Shanahan, Cranmer, "Normalizing flows on
        tori and spheres", 2020, https://arxiv.org/abs/2002.02428

    Example:
        >>> raw = torch.zeros(13, 1)
        >>> raw[-1] = 3.0
        >>> CircularSpline(bins=4).forward_and_log_det(torch.tensor([1.0]), raw)
        (tensor([-2.2832]), tensor([0.]))
    """

    bins: int = 8
    min_size: float = 1e-3
    min_slope: float = 1e-3

    support = constraints.interval(-math.pi, math.pi)
    codes = 2

    def __post_init__(self) -> None:
        _check_sizes(self.bins, self.min_size, self.min_slope)

    @property
    def parameters(self) -> int:
        return 3 * self.bins + 1

    @property
    def box(self) -> Box:
        """What all bins share."""
        return Box(self.bins, math.pi, self.min_size, self.min_slope, periodic=True)

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x.cos(), x.sin()], -1)

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        shape, rotation = raw.split([self.parameters - 1, 1], -2)
        y, log_slope = rational_quadratic_spline(self.box, _as_angle(x), shape, inverse=False)
        return _as_angle(y + _as_angle(rotation.squeeze(-2))), log_slope

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        shape, rotation = raw.split([self.parameters - 1, 1], -2)
        x, log_slope = rational_quadratic_spline(
            self.box, _as_angle(y - _as_angle(rotation.squeeze(-2))), shape, inverse=True
        )
        return _as_angle(x), log_slope
