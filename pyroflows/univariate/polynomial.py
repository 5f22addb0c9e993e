"""Monotone polynomials: sums of squares, and Bernstein polynomials of increasing coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_positive, check_size
from .._saturation import limit
from ._numeric import invert
from .base import Univariate, soft_clip

__all__ = ["Bernstein", "SumOfSquares"]

#: Least derivative of a sum of squares, a power of two, so that it and its complement add up to one exactly.
_FLOOR = 2.0**-10
#: Bound of the logarithm of the derivative of a Bernstein polynomial.
_STEEPEST = 5.0


def gains(count: int, like: Tensor) -> Tensor:
    """Fixed factors between 1/2 and 3/2, no two alike.

    Parts that start alike must not learn alike, or they stay alike for ever; Adam would even out
    gradients of different sizes, but not factors of the parameters.
    """
    return 1 + 0.5 * torch.cos(torch.arange(1, count + 1, device=like.device, dtype=like.dtype))


def polynomial(coefficients: Sequence[Tensor], u: Tensor) -> Tensor:
    """The polynomial with these coefficients, lowest power first, by Horner's rule."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = torch.addcmul(coefficient, value, u)
    return value


@dataclass(frozen=True)
class SumOfSquares(Univariate):
    r"""Polynomial whose derivative is a sum of squares, the transformer of SOS flows.

    .. math:: f(x) = t + \int_0^x \Big( \varepsilon + \frac{1 - \varepsilon}{K} \sum_{k=1}^K p_k(2 s / B)^2 \Big) ds,
        \qquad p_k(u) = 1 + \sum_{j=0}^d g_{kj} a_{kj} u^j,

    on :math:`|x| \le B`, with the line of the same value and slope beyond, where powers would
    overflow. The integral is a polynomial of degree :math:`2d + 1`, in closed form. The floor is
    :math:`\varepsilon = 2^{-10}`, and the fixed factors :math:`g_{kj} \in [1/2, 3/2]` let
    polynomials that start alike learn apart. The :math:`a_{kj}` stop at :math:`M^{1/12}`, 1625 in
    single precision, because their squares would overflow. It is the identity at
    :math:`a_{kj} = t = 0`.

    The forward direction is fast; the inverse is numeric.

    Args:
        polynomials: Number :math:`K` of polynomials.
        degree: Their degree :math:`d`.
        bound: Half-width :math:`B` of the interval.

    Raises:
        ValueError: If an argument is not positive.

    Reference:
        Jaini, Selby, Yu, "Sum-of-squares polynomial flow", 2019, https://arxiv.org/abs/1905.02325

    Example:
        >>> univariate = SumOfSquares(polynomials=2, degree=3)
        >>> univariate.forward_and_log_det(torch.ones(1), torch.zeros(univariate.parameters, 1))
        (tensor([1.]), tensor([0.]))
    """

    polynomials: int = 3
    degree: int = 4
    bound: float = 4.0

    fast = "forward"

    def __post_init__(self) -> None:
        check_size("polynomials", self.polynomials)
        check_size("degree", self.degree)
        check_positive("bound", self.bound)

    @property
    def parameters(self) -> int:
        return self.polynomials * (self.degree + 1) + 1

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        squared, integral = self._coefficients(raw)
        y, log_slope = self._evaluate(x, squared, integral)
        return y + raw.select(-2, -1), log_slope

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        squared, integral = self._coefficients(raw)
        return invert(
            lambda x: self._evaluate(x, squared, integral),
            y - raw.select(-2, -1),
            type(self).__name__,
        )

    def _coefficients(self, raw: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the polynomials, each of shape ``(*, K, features)``, and of the mean of their squares, integrated."""
        k, n = self.polynomials, self.degree + 1
        largest = limit(raw.dtype, 1 / 12)
        weights = F.hardtanh(raw.narrow(-2, 0, k * n), -largest, largest)
        scaled = weights * gains(k * n, raw).unsqueeze(-1)
        first, *others = scaled.unflatten(-2, (k, n)).unbind(-2)
        squared = [1 + first, *others]
        integral = []
        for power in range(2 * n - 1):
            pairs = [
                squared[i] * squared[power - i]
                for i in range(max(0, power - n + 1), min(power, n - 1) + 1)
            ]
            integral.append(sum(pairs[1:], pairs[0]).sum(-2) / (k * (power + 1)))
        return squared, integral

    def _evaluate(
        self, x: Tensor, squared: list[Tensor], integral: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        inside = x.clamp(-self.bound, self.bound)
        u = 2 * inside / self.bound
        # The slope from the squares themselves: no cancellation makes it negative.
        squares = polynomial(squared, u.unsqueeze(-2)).square().sum(-2)
        slope = _FLOOR + (1 - _FLOOR) / self.polynomials * squares
        mean_slope = _FLOOR + (1 - _FLOOR) * polynomial(integral, u)
        return inside * mean_slope + slope * (x - inside), slope.log()


@dataclass(frozen=True)
class Bernstein(Univariate):
    r"""Bernstein polynomial of increasing coefficients.

    .. math:: f(x) = t + \sum_{j=0}^n \theta_j \binom{n}{j} u^j (1 - u)^{n - j}, \qquad u = \frac{x + B}{2 B}, \qquad
        \theta_{j+1} - \theta_j = \frac{2 B}{n} h_j, \quad \log h_j = 5 \tanh(a_j / 5),

    on :math:`|x| \le B`, with the line of the same value and slope beyond, and
    :math:`\theta_0 = -\theta_n`. The derivative is the Bernstein polynomial of the :math:`h_j > 0`.
    Both are evaluated by de Casteljau's algorithm, a cascade of averages, the value as a
    displacement from :math:`x`, so that nothing cancels. It is the identity at :math:`a_j = t = 0`.

    The forward direction is fast; the inverse is numeric.

    Args:
        degree: Degree :math:`n` of the polynomial.
        bound: Half-width :math:`B` of the interval.

    Raises:
        ValueError: If an argument is not positive.

    Reference:
        Sick, Hothorn, Dürr, "Deep transformation models: Tackling complex regression problems with
        neural network based transformation models", 2021, https://arxiv.org/abs/2004.00464

        Ramasinghe, Fernando, Khan, Barnes, "Robust normalizing flows using Bernstein-type
        polynomials", 2021, https://arxiv.org/abs/2102.03509

    Example:
        >>> univariate = Bernstein(degree=8)
        >>> univariate.forward_and_log_det(torch.ones(1), torch.zeros(univariate.parameters, 1))
        (tensor([1.]), tensor([0.]))
    """

    degree: int = 16
    bound: float = 4.0

    def __post_init__(self) -> None:
        check_size("degree", self.degree)
        check_positive("bound", self.bound)

    @property
    def linear(self) -> bool:
        return self.degree == 1

    @property
    def parameters(self) -> int:
        return self.degree + 1

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        slopes, displacements = self._coefficients(raw)
        y, log_slope = self._evaluate(x, slopes, displacements)
        return y + raw.select(-2, -1), log_slope

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        slopes, displacements = self._coefficients(raw)
        return invert(
            lambda x: self._evaluate(x, slopes, displacements),
            y - raw.select(-2, -1),
            type(self).__name__,
        )

    def _coefficients(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the derivative, ``(*, degree, features)``, and of the displacement, ``(*, degree + 1, features)``."""
        log_slopes = soft_clip(raw.narrow(-2, 0, self.degree), _STEEPEST)
        steps = torch.expm1(log_slopes)
        risen = torch.cat([torch.zeros_like(steps[..., :1, :]), steps.cumsum(-2)], -2)
        return log_slopes.exp(), (2 * self.bound / self.degree) * (
            risen - 0.5 * steps.sum(-2, keepdim=True)
        )

    def _evaluate(self, x: Tensor, slopes: Tensor, displacements: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.clamp(-self.bound, self.bound)
        u = 0.5 + 0.5 * inside / self.bound
        slope, displacement = _casteljau(slopes, u), _casteljau(displacements, u)
        return inside + slope * (x - inside) + displacement, slope.log()


def _casteljau(coefficients: Tensor, u: Tensor) -> Tensor:
    """The Bernstein polynomial with these coefficients, of shape ``(*, degree + 1, features)``, at ``u`` in [0, 1]."""
    u = u.unsqueeze(-2)
    while coefficients.shape[-2] > 1:
        last = coefficients.shape[-2] - 1
        coefficients = torch.lerp(
            coefficients.narrow(-2, 0, last), coefficients.narrow(-2, 1, last), u
        )
    return coefficients.squeeze(-2).expand(
        torch.broadcast_shapes(coefficients.shape[:-2], u.shape[:-2]) + u.shape[-1:]
    )
