"""Maps of the line that make tails heavier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import check_positive
from .base import Univariate, soft_clip

__all__ = ["GPDTail"]

#: Exponents are exact up to this bound; beyond, where values pass 1e30, the map bends to what floats can hold.
_CAP = 70.0
_QUARTILE = 0.6744897501960817  # of the standard normal


@dataclass(frozen=True)
class GPDTail(Univariate):
    r"""Normal tails made those of a generalised Pareto distribution, each side with a weight of its own.

    .. math:: f(z) = \mu + \sigma \, \frac{s}{\lambda_s} \Big( \operatorname{erfc}\big( |z| / \sqrt 2 \big)^{-\lambda_s} - 1
        \Big), \qquad s = \operatorname{sign} z.

    For a standard normal :math:`z` the tail of :math:`f(z)` falls like :math:`y^{-1 / \lambda_s}`:
    moments of order :math:`1 / \lambda_s` and above are infinite, a Student-t of :math:`\nu`
    degrees has :math:`\lambda = 1 / \nu`. As :math:`\lambda \to 0` the tails become exponential. It
    is the last layer of a flow, after a body that keeps normal tails. Both directions are fast, and
    finite for :math:`|z|` and :math:`|y|` up to 1e30: where :math:`\operatorname{erfc}^{-\lambda}`
    would pass :math:`e^{70}` the map goes on in the logarithm of the exponent.

    No map of this family is the identity, for all of them lengthen the tails. It starts at
    :math:`\mu = 0`, :math:`\lambda_\pm` as given and the :math:`\sigma` that keeps the quartiles of
    the base; from there :math:`\log \sigma` and :math:`\log \lambda_\pm` move by at most :math:`B`,
    as :math:`B \tanh(a / B)`.

    Args:
        start: The :math:`\lambda` that both sides start with.
        bound: Bound :math:`B` of the soft clip.

    Raises:
        ValueError: If an argument is not positive.

    Reference:
        Hickling, Prangle, "Flexible tails for normalizing flows", 2025,
        https://arxiv.org/abs/2406.16971

    Example:
        >>> tail = GPDTail(start=0.5)
        >>> y, _ = tail.forward_and_log_det(torch.tensor([0.6745, 3.0]), torch.zeros(4, 2))
        >>> y
        tensor([ 0.6745, 29.7107])
    """

    start: float = 0.1
    bound: float = 3.0

    parameters = 4
    exempt_laws: ClassVar[Mapping[str, str]] = {
        "starts_at_identity": "all maps of the family lengthen the tails"
    }

    def __post_init__(self) -> None:
        check_positive("start", self.start)
        check_positive("bound", self.bound)

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, log_weight, sign, size = self._split(x, raw)
        u, log_slope = _lengthen(size, log_weight)
        return torch.addcmul(raw.select(-2, 0), sign * log_scale.exp(), u), log_slope + log_scale

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, log_weight, sign, size = self._split(y - raw.select(-2, 0), raw)
        z, log_slope = _shorten(size * log_scale.neg().exp(), log_weight)
        return sign * z, log_slope - log_scale

    def _split(self, offset: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
        """Logarithms of the scale and of the weight on this side, and sign and size of what is off the centre."""
        _, scale, lower, upper = raw.unbind(-2)
        # By comparison, since at zero the derivatives of sign and abs are zero.
        below = offset < 0
        start = (
            math.log(_QUARTILE)
            + math.log(self.start)
            - math.log(math.expm1(self.start * math.log(2.0)))
        )
        weight = math.log(self.start) + soft_clip(torch.where(below, lower, upper), self.bound)
        sign = torch.where(below, -1.0, torch.ones_like(offset))
        return (
            start + soft_clip(scale, self.bound),
            weight,
            sign,
            torch.where(below, -offset, offset),
        )


def _lengthen(size: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`(\operatorname{erfc}(z / \sqrt 2)^{-\lambda} - 1) / \lambda` for :math:`z \ge 0`, and its log-derivative."""
    x, weight = size / math.sqrt(2.0), log_weight.exp()
    inside = weight * _exponent(x.detach().clamp(max=1e15)) <= _CAP
    near = torch.where(inside, x, 0.0)
    exponent = _exponent(near)
    growth = weight * exponent
    value = exponent * _relative_expm1(growth)
    far, log_weight = torch.where(inside, 1.0, x), torch.where(inside, 0.0, log_weight)
    excess = log_weight + _log_exponent(far) - math.log(_CAP)
    value_far = torch.exp(_CAP - log_weight) * (1 + _CAP * excess)
    return torch.where(inside, value, value_far), torch.where(
        inside, growth, _CAP - excess
    ) + _log_slope(x)


def _shorten(size: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`_lengthen` and its log-derivative."""
    weight = log_weight.exp()
    inside = weight * size <= math.exp(_CAP)
    near, far = torch.where(inside, size, 0.0), torch.where(inside, 1.0, size)
    exponent = near * _relative_log1p(weight * near)
    excess = (far * torch.exp(log_weight - _CAP) - 1) / _CAP
    log_exponent = math.log(_CAP) + excess - torch.where(inside, 0.0, log_weight)
    log_exponent = log_exponent.clamp(max=1.8 * math.log(torch.finfo(size.dtype).max))
    huge = log_exponent > 50  # where the exponent is the square to the last digit, and may overflow
    exponent = torch.where(inside, exponent, torch.where(huge, 0.0, log_exponent).exp())
    x = torch.where(
        huge, torch.exp(0.5 * torch.where(huge, log_exponent, 0.0)), _invert_exponent(exponent)
    )
    growth = torch.where(inside, torch.log1p(weight * near), _CAP - excess)
    return math.sqrt(2.0) * x, -(growth + _log_slope(x))


def _exponent(x: Tensor) -> Tensor:
    r""":math:`-\log \operatorname{erfc} x` for :math:`x \ge 0`."""
    small = x < 0.5
    near, far = torch.where(small, x, 0.0), torch.where(small, 1.0, x)
    return torch.where(small, -torch.log1p(-torch.erf(near)), far.square() - _log_erfcx(far))


def _log_exponent(x: Tensor) -> Tensor:
    """The logarithm of :func:`_exponent` for ``x`` whose square may overflow."""
    return 2 * x.log() + torch.log1p(-_log_erfcx(x) / x / x)


def _log_slope(x: Tensor) -> Tensor:
    r"""The logarithm of the derivative of :func:`_exponent` with respect to :math:`z = \sqrt 2 x`."""
    return 0.5 * math.log(2 / math.pi) - _log_erfcx(x)


def _log_erfcx(x: Tensor) -> Tensor:
    r""":math:`\log(e^{x^2} \operatorname{erfc} x)` for :math:`x \ge 0`."""
    # Far out by the asymptotic series, since the derivative of torch's erfcx cancels there.
    large = x > 100
    near, far = torch.where(large, 1.0, x), torch.where(large, x, 100.0)
    s = 0.5 / far / far
    series = torch.log1p(-s * (1 - 3 * s * (1 - 5 * s))) - far.log() - 0.5 * math.log(math.pi)
    return torch.where(large, series, torch.special.erfcx(near).log())


def _invert_exponent(exponent: Tensor) -> Tensor:
    """Solves ``_exponent(x) = exponent`` by Newton's method, which for this convex function needs no bracket."""
    with torch.no_grad():
        v = exponent.detach()
        x = (
            math.sqrt(math.pi) * v / (torch.sqrt(1 + 2 * v) + 1)
        )  # right to two terms at zero, 25 percent off at infinity
        for _ in range(6):
            x = x - _newton_step(x, v)
    if torch.is_grad_enabled():
        for _ in range(2):  # one step for first derivatives, another for the second and third
            step = _newton_step(x, exponent)
            x = x - (step - step.detach())
    return x


def _newton_step(x: Tensor, exponent: Tensor) -> Tensor:
    return (_exponent(x) - exponent) * (0.5 * math.sqrt(math.pi)) * _log_erfcx(x).exp()


def _relative_expm1(x: Tensor) -> Tensor:
    """``expm1(x) / x``, with derivatives that do not cancel at zero."""
    small = x.abs() < 0.1
    near, far = torch.where(small, x, 0.0), torch.where(small, 1.0, x)
    series = torch.ones_like(near)
    for n in range(11, 1, -1):
        series = 1 + near / n * series
    return torch.where(small, series, torch.expm1(far) / far)


def _relative_log1p(x: Tensor) -> Tensor:
    """``log1p(x) / x``, with derivatives that do not cancel at zero."""
    small = x.abs() < 0.1
    near, far = torch.where(small, x, 0.0), torch.where(small, 1.0, x)
    square = (near / (2 + near)).square()
    series = torch.zeros_like(near)
    for n in range(13, 0, -2):
        series = series * square + 1 / n
    return torch.where(small, series * 2 / (2 + near), torch.log1p(far) / far)
