"""The step of Glow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from .base import Compose
from .coupling import AffineCoupling, Mask
from .linear import LULinear
from .normalization import ActNorm

__all__ = ["GlowStep"]


class GlowStep(Compose):
    r"""One step of Glow: an affine coupling, an invertible matrix, and an activation normalisation.

    .. math:: y = e^s \, P L U f(x; c) + b,

    where :math:`f` is the coupling, the only part that reads the context. Data that are scored pass :class:`ActNorm` first,
    which starts from the first batch in training mode, then :class:`LULinear`, then :class:`AffineCoupling`. Both directions
    cost one evaluation of a network. Before data come, it starts at the identity, with ``rotate`` at a random rotation.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context :math:`c`, or ``None``.
        mask: See :class:`Coupling`.
        hidden_features: Widths of the network.
        activation: Its activation.
        scale: How raw parameters give scales; see :class:`Affine`.
        bound: Bound of the soft clip.
        rotate: Whether the matrix starts at a random rotation, as in the paper.
        seed: Seed of that rotation.

    Raises:
        ValueError: As :class:`AffineCoupling` and :class:`LULinear`.

    Reference:
        Kingma, Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018, https://arxiv.org/abs/1807.03039

    Example:
        >>> import torch
        >>> step = GlowStep(3, context_features=2).condition(torch.zeros(2))
        >>> data = 5 + 2 * torch.randn(100, 3)
        >>> x = step.inv(data)
        >>> torch.testing.assert_close(x.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        mask: Mask = "half",
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        scale: str = "softclip",
        bound: float = 3.0,
        rotate: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            [
                AffineCoupling(
                    features, context_features, mask, hidden_features, activation, scale, bound
                ),
                LULinear(
                    features, bias=False, rotate=rotate, seed=seed
                ),  # the offset is that of the normalisation
                ActNorm(features),
            ]
        )
