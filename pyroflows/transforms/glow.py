"""The step of Glow."""

from __future__ import annotations

from collections.abc import Sequence

from ..nn.network import Network, mlp
from .compose import Compose
from .coupling import AffineCoupling
from .linear import LULinear
from .masks import Mask
from .normalization import ActNorm

__all__ = ["GlowStep"]


class GlowStep(Compose):
    r"""One step of Glow: an affine coupling, an invertible matrix, and an activation normalisation.

    .. math:: y = e^s \, P L U f(x; c) + b,

    where :math:`f` is the coupling, the only part that reads the context. Data that are scored pass
    :class:`ActNorm` first, which starts from the first batch in training mode, then
    :class:`LULinear`, then :class:`AffineCoupling`. Both directions cost one evaluation of a
    network. Before data come, it starts at the identity, with ``rotate`` at a random rotation.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context :math:`c`, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        mask: See :class:`Coupling`.
        network: Factory of the network.
        scale: How raw parameters give scales; see :class:`Affine`.
        bound: Bound of the soft clip.
        rotate: Whether the matrix starts at a random rotation, as in the paper.
        seed: Seed of that rotation.

    Raises:
        ValueError: As :class:`AffineCoupling` and :class:`LULinear`.

    Reference:
        Kingma, Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018,
        https://arxiv.org/abs/1807.03039

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
        *,
        context_shape: Sequence[int] | None = None,
        mask: Mask = "half",
        network: Network = mlp(),
        scale: str = "softclip",
        bound: float = 3.0,
        rotate: bool = False,
        seed: int = 0,
    ) -> None:
        # The offset is that of the normalisation.
        linear = LULinear(features, bias=False, rotate=rotate, seed=seed)
        coupling = AffineCoupling(
            features,
            context_features,
            context_shape=context_shape,
            mask=mask,
            network=network,
            scale=scale,
            bound=bound,
        )
        super().__init__([coupling, linear, ActNorm(features)])
