"""Affine maps of the line."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_positive
from .._saturation import limit_log
from .base import Univariate, soft_clip

__all__ = ["Affine", "Scale", "Shift"]


@dataclass(frozen=True)
class Shift(Univariate):
    r"""Translation, :math:`y = x + t`; its derivative is one.

    Reference:
        Dinh, Krueger, Bengio, "NICE: Non-linear independent components estimation", 2014,
        https://arxiv.org/abs/1410.8516

    Example:
        >>> Shift().forward_and_log_det(torch.zeros(2), torch.ones(1, 2))
        (tensor([1., 1.]), tensor([0., 0.]))
    """

    parameters = 1
    linear = True

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        y = x + raw.select(-2, 0)
        return y, torch.zeros_like(y)

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        x = y - raw.select(-2, 0)
        return x, torch.zeros_like(x)


@dataclass(frozen=True)
class _Scaled(Univariate):
    scale: str = "softclip"
    bound: float = 3.0

    def __post_init__(self) -> None:
        if not isinstance(self.scale, str) or self.scale not in _LOG_SCALES:
            raise ValueError(
                f"Expected scale to be one of {', '.join(_LOG_SCALES)}; got {self.scale!r}."
            )
        check_positive("bound", self.bound)

    def log_scale(self, raw: Tensor) -> Tensor:
        """The logarithm of the scale that raw parameters stand for."""
        return _LOG_SCALES[self.scale](raw, self.bound)


@dataclass(frozen=True)
class Scale(_Scaled):
    r"""Scaling, :math:`y = e^{s(a)} x`, with the same choices of :math:`s` as :class:`Affine`.

    Args:
        scale: ``"softclip"``, ``"exp"``, ``"softplus"`` or ``"sigmoid"``.
        bound: Bound of the soft clip.

    Raises:
        ValueError: If ``scale`` is unknown or ``bound`` is not positive.

    Example:
        >>> Scale("exp").forward_and_log_det(torch.ones(1), torch.zeros(1, 1))
        (tensor([1.]), tensor([0.]))
    """

    parameters = 1
    linear = True

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        s = self.log_scale(raw.select(-2, 0))
        y = x * s.exp()
        return y, s.expand_as(y)

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        s = self.log_scale(raw.select(-2, 0))
        x = y * s.neg().exp()
        return x, s.neg().expand_as(x)


@dataclass(frozen=True)
class Affine(_Scaled):
    r"""Affine map, :math:`y = e^{s(a)} x + t`, with log-scale :math:`s` and shift :math:`t`.

    The raw parameter :math:`a` gives the log-scale by one of

    - ``"softclip"``: :math:`s(a) = B \tanh(a / B)`, so that scales stay within :math:`e^{\pm B}`
      (the default, B = 3);
    - ``"exp"``: :math:`s(a) = a`, stopped only where scales would outgrow the dtype, at 31 in
      single precision;
    - ``"softplus"``: :math:`e^{s(a)} = \log(1 + e^{a + a_0})` with :math:`a_0 = \log(e - 1)`;
    - ``"sigmoid"``: :math:`e^{s(a)} = 2 / (1 + e^{-a})`, at most 2.

    All are the identity at :math:`a = t = 0`.

    Args:
        scale: ``"softclip"``, ``"exp"``, ``"softplus"`` or ``"sigmoid"``.
        bound: Bound :math:`B` of the soft clip; without effect for the others.

    Raises:
        ValueError: If ``scale`` is unknown or ``bound`` is not positive.

    Reference:
        Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2016,
        https://arxiv.org/abs/1605.08803

    Example:
        >>> raw = torch.tensor([[0.0], [1.0]])
        >>> Affine().forward_and_log_det(torch.zeros(1), raw)
        (tensor([1.]), tensor([0.]))
    """

    parameters = 2
    linear = True

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        a, t = raw.unbind(-2)
        s = self.log_scale(a)
        y = torch.addcmul(t, x, s.exp())
        return y, s.expand_as(y)

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        a, t = raw.unbind(-2)
        s = self.log_scale(a).neg()
        x = (y - t) * s.exp()
        return x, s.expand_as(x)


_SOFTPLUS_AT_ONE = math.log(math.expm1(1.0))


def _log_softplus(raw: Tensor, bound: float) -> Tensor:
    a = raw + _SOFTPLUS_AT_ONE
    # Far to the left softplus(a) is e^a, which underflows before its logarithm, a, does.
    far = a < -30
    return torch.where(far, a, F.softplus(torch.where(far, 0.0, a)).log())


_LOG_SCALES = {
    "softclip": soft_clip,
    "exp": lambda raw, bound: limit_log(raw),
    "softplus": _log_softplus,
    "sigmoid": lambda raw, bound: F.logsigmoid(raw) + math.log(2.0),
}
