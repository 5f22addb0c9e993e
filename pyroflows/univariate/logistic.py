"""The distribution function of a mixture of logistics, as a monotone map of the line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_positive, check_size
from ._numeric import invert
from .base import Univariate, soft_clip
from .polynomial import gains

__all__ = ["LogisticMixture"]

#: Components lie within the one, and beyond the other, far from all of them, the map goes on as a line: derivatives of what
#: is larger would cancel to rounding errors.
_NEAR, _FAR = 1e2, 1e4


@dataclass(frozen=True)
class LogisticMixture(Univariate):
    r"""Distribution function of a mixture of logistics, taken back to the line, the transformer of Flow++.

    .. math:: f(x) = t + e^b \, \operatorname{logit} \Big( \sum_{k=1}^K \pi_k \,
        \sigma\big( (x - \mu_k) / s_k \big) \Big), \qquad
        \pi = \operatorname{softmax}(w), \quad \mu_k = 100 \tanh(g_k m_k / 100), \quad
        \log s_k = B \tanh(g_k r_k / B), \quad b = B \tanh(a / B),

    with soft clips of locations and scales, and fixed factors :math:`g_k \in [1/2, 3/2]` that let
    components that start alike learn apart. Far out the widest component takes over and the map is
    linear, from :math:`|x| = 10^4` on exactly so. Everything is computed as a displacement from
    :math:`x`, and from both tails, so that nothing saturates. It is the identity where all raw
    parameters are zero.

    The forward direction is fast; the inverse is numeric.

    Args:
        components: Number :math:`K` of logistics.
        bound: Bound :math:`B` of the soft clips of scales.

    Raises:
        ValueError: If an argument is not positive.

    Reference:
        Ho, Chen, Srinivas, Duan, Abbeel, "Flow++: Improving flow-based generative models with
        variational dequantization and architecture design", 2019, https://arxiv.org/abs/1902.00275

    Example:
        >>> univariate = LogisticMixture(components=4)
        >>> univariate.forward_and_log_det(torch.ones(1), torch.zeros(univariate.parameters, 1))
        (tensor([1.]), tensor([0.]))
    """

    components: int = 8
    bound: float = 3.0
    fast = "forward"

    def __post_init__(self) -> None:
        check_size("components", self.components)
        check_positive("bound", self.bound)

    @property
    def linear(self) -> bool:
        return self.components == 1

    @property
    def parameters(self) -> int:
        return 3 * self.components + 2

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = _logit_of_mixture(x, *self._mixture(raw))
        log_scale, shift = soft_clip(raw.select(-2, -2), self.bound), raw.select(-2, -1)
        return torch.addcmul(shift, y, log_scale.exp()), log_slope + log_scale

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        mixture = self._mixture(raw)
        log_scale, shift = soft_clip(raw.select(-2, -2), self.bound), raw.select(-2, -1)
        unscaled = (y - shift) * log_scale.neg().exp()
        x, log_slope = invert(
            lambda x: _logit_of_mixture(x, *mixture), unscaled, type(self).__name__
        )
        return x, log_slope - log_scale

    def _mixture(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the weights, locations and logarithms of the scales, each of shape ``(*, components, features)``."""
        weights, locs, scales = (
            raw.narrow(-2, 0, 3 * self.components).unflatten(-2, (3, self.components)).unbind(-3)
        )
        factors = gains(self.components, raw).unsqueeze(-1)
        return weights, soft_clip(factors * locs, _NEAR), soft_clip(factors * scales, self.bound)


def _logit_of_mixture(
    x: Tensor, weights: Tensor, locs: Tensor, log_scales: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The logit of the mixture's distribution function, and the logarithm of its derivative.

    Each component is compared with the standard logistic, whose logit is ``x`` itself: what lies
    below ``x`` and above it are ratios of probabilities that do not underflow together, and are 1
    at the identity. The derivative is a sum over what each component has of either,
    :math:`\sum_k r_k q_k / (\pi_k s_k)`, in which nothing large cancels.
    """
    near = x.clamp(-_FAR, _FAR)
    at = near.unsqueeze(-2)
    z = (at - locs) * log_scales.neg().exp()
    below = weights + F.logsigmoid(z) - F.logsigmoid(at)
    above = weights + F.logsigmoid(-z) - F.logsigmoid(-at)
    shares = (
        torch.log_softmax(below, -2) + torch.log_softmax(above, -2) - torch.log_softmax(weights, -2)
    )
    log_slope = torch.logsumexp(shares - log_scales, -2)
    displacement = torch.logsumexp(below, -2) - torch.logsumexp(above, -2)
    return near + log_slope.exp() * (x - near) + displacement, log_slope
