"""Limits far from every ordinary number, at which values stop, so that nothing overflows later."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["bound_gradient", "limit", "limit_log", "saturate"]

#: The largest scale of a layer, as a power of the largest number of its dtype. With that of
#: :func:`saturate` it leaves room for a sum over the entries.
_SCALE = 0.35
#: The largest gradient that passes from layer to layer. Times a value and the weights of a network
#: it is finite.
_STEEPNESS = 0.25


def limit(dtype: torch.dtype, power: float) -> float:
    """A power of the largest number of a dtype."""
    return torch.finfo(dtype).max ** power


def saturate(x: Tensor) -> Tensor:
    r"""Stops values at :math:`\pm \sqrt M`, for the largest number :math:`M` of their dtype.

    Products of two such values are finite. Where they stop the gradient is zero, even if the one
    that comes down to it is infinite or NaN.

    Args:
        x: Values.

    Example:
        >>> saturate(torch.tensor([1.0, -1e38, torch.inf]))
        tensor([ 1.0000e+00, -1.8447e+19,  1.8447e+19])
    """
    most = limit(x.dtype, 0.5)
    # The backward pass of hardtanh is one kernel; that of clamp takes four.
    return F.hardtanh(x, -most, most)


def bound_gradient(x: Tensor) -> Tensor:
    r"""Stops gradients at :math:`\pm M^{1/4}`, 4e9 in single precision; values stay as they are.

    So nothing overflows on its way through many layers. In half precision gradients pass as they
    are, because a loss may be scaled up beyond that bound, 16, on purpose.

    Args:
        x: Values, the result of an operation.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> (bound_gradient(2 * x) * torch.tensor([1.0, 1e30])).sum().backward()
        >>> x.grad
        tensor([2.0000e+00, 8.5899e+09])
    """
    if x.requires_grad and x.dtype != torch.float16:
        steepest = limit(x.dtype, _STEEPNESS)
        # A hook and no autograd function: it takes part in every transformation of torch.func.
        x.register_hook(lambda gradient: gradient.clamp(-steepest, steepest))
    return x


def limit_log(log_scale: Tensor) -> Tensor:
    r"""Stops logarithms of scales at :math:`\pm 0.35 \log M`, 31 in single precision."""
    most = math.log(limit(log_scale.dtype, _SCALE))
    return F.hardtanh(log_scale, -most, most)
