"""Flows of couplings: one part of the vector stays and tells how to move the rest."""

# Without `from __future__ import annotations`, because signatures are read when classes are made.

import copy
from collections.abc import Iterable, Sequence

from torch import Tensor
from typing_extensions import Unpack

from .._checks import check_choice, check_positive, check_shape, check_size
from ..nn import Network, mlp
from ..transforms import Coupling, GlowStep, Rescale, Transform, coupling_masks
from ..transforms.coupling import Mask
from ..univariate import Affine, LogisticMixture, Shift, Univariate
from .layered import LayeredFlow
from .options import SHALLOW, FlowOptions, depth_share, mix_layers, never_moved

__all__ = ["NICE", "CouplingFlow", "CouplingOptions", "FlowPlusPlus", "Glow", "RealNVP"]

Masks = Mask | Sequence[Mask]


class CouplingOptions(FlowOptions, total=False):
    """Options that all flows of couplings share, given by keyword; see :class:`CouplingFlow`."""

    context_shape: Sequence[int] | None
    mask: Masks
    network: Network


class CouplingFlow(LayeredFlow):
    r"""Couplings of one univariate map :math:`f`.

    .. math:: y_A = x_A, \quad y_B = f(x_B;\ \theta_k(x_A, c)) \ \text{for}\ k = 1 \dots K.

    Args:
        univariate: A monotone map, such as ``Affine()``; each layer has a copy of its own.
        features: Entries of the vector, at least 2, or the shape of an event; see
            :class:`pyroflows.transforms.Coupling`.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        transforms: Number of couplings. One more follows where they would leave an entry that none
            of them moves, as a single one does.
        mask: Which entries stay; see :func:`pyroflows.transforms.coupling_masks`.
        network: Factory of each coupling's network.
        fast: The direction that evaluates :math:`f` itself: ``"forward"``, as above, or
            ``"inverse"``, which makes a map without an inverse in closed form fast to score.
        last: Transforms that follow the couplings.

    Other options: see :class:`FlowOptions`.

    Raises:
        TypeError: If an option is unknown or of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Dinh, Krueger, Bengio, "NICE: Non-linear independent components estimation", 2014,
        https://arxiv.org/abs/1410.8516

    Example:
        >>> import pyroflows as pf
        >>> flow = CouplingFlow(pf.univariate.Bernstein(), 3, transforms=2, fast="inverse")
        >>> flow().sample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        univariate: Univariate,
        features: int | Sequence[int],
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        transforms: int = 8,
        mask: Masks = "random",
        network: Network = mlp(),
        fast: str = "forward",
        last: Iterable[Transform] = (),
        **options: Unpack[FlowOptions],
    ) -> None:
        check_choice("fast", fast, ("forward", "inverse"))
        channels = check_shape("features", features, least=1)[0]
        masks = coupling_masks(mask, channels, check_size("transforms", transforms))

        def couple(chosen: Tensor) -> Transform:
            # A copy, because a map may have parameters, which belong to its layer.
            layer = Coupling(
                copy.deepcopy(univariate),
                features,
                context_features,
                context_shape=context_shape,
                mask=chosen,
                network=network,
            )
            if transforms > SHALLOW:
                layer.temper(depth_share(transforms))
            return layer if fast == "forward" else layer.inv

        mixing = self.find_mixing(options.get("mixing", "auto"))
        layers = mix_layers(list(map(couple, masks)), mixing)
        still = never_moved(layers, masks)
        if bool(still.any()):
            layers.append(couple(~still))
        options["mixing"] = None  # they are mixed
        super().__init__(layers, last, **options)


class NICE(CouplingFlow):
    r"""NICE: additive couplings, then one diagonal scaling.

    .. math:: y_B = x_B + t_k(x_A, c) \ \text{for}\ k = 1 \dots K,
        \qquad y \leftarrow e^{s} \odot y.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context, or ``None``.
        transforms: Number of couplings.

    Other options: see :class:`CouplingFlow` and :class:`FlowOptions`.

    Reference:
        Dinh, Krueger, Bengio, "NICE: Non-linear independent components estimation", 2014,
        https://arxiv.org/abs/1410.8516

    Example:
        >>> import torch
        >>> NICE(features=3, context_features=2)(torch.zeros(7, 2)).batch_shape
        torch.Size([7])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        transforms: int = 8,
        **options: Unpack[CouplingOptions],
    ) -> None:
        last = [Rescale(features)]
        super().__init__(
            Shift(), features, context_features, transforms=transforms, last=last, **options
        )


class RealNVP(CouplingFlow):
    r"""RealNVP: affine couplings, and between them learned linear maps.

    .. math:: y_B = e^{s_k(x_A, c)} \odot x_B + t_k(x_A, c) \ \text{for}\ k = 1 \dots K.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context, or ``None``.
        transforms: Number of couplings.
        scale: How raw parameters give scales; see :class:`pyroflows.univariate.Affine`.
        bound: Bound of the soft clip on the log-scale; of more than 8 layers each has a share of
            8 bounds, so that scales do not multiply up.

    Other options: see :class:`CouplingFlow` and :class:`FlowOptions`.

    Reference:
        Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2016,
        https://arxiv.org/abs/1605.08803

    Example:
        >>> from torch.distributions import constraints
        >>> flow = RealNVP(features=3, support=constraints.positive)
        >>> bool((flow().sample((100,)) > 0).all())
        True
    """

    auto_mixing = "lu"

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        transforms: int = 8,
        scale: str = "softclip",
        bound: float = 3.0,
        **options: Unpack[CouplingOptions],
    ) -> None:
        univariate = Affine(
            scale,
            check_positive("bound", bound) * depth_share(check_size("transforms", transforms)),
        )
        super().__init__(univariate, features, context_features, transforms=transforms, **options)


class FlowPlusPlus(CouplingFlow):
    r"""Flow++ on vectors: couplings by the CDF of a mixture of logistics; fast to score.

    .. math:: x_B = t + e^{s}
        \operatorname{logit} \big( \sum_j \pi_j \, \sigma((y_B - \mu_j) / \varsigma_j) \big).

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context, or ``None``.
        transforms: Number of couplings.
        components: Components of each mixture.

    Other options: see :class:`CouplingFlow` and :class:`FlowOptions`.

    Reference:
        Ho, Chen, Srinivas, Duan, Abbeel, "Flow++: Improving flow-based generative models with
        variational dequantization and architecture design", 2019, https://arxiv.org/abs/1902.00275

    Example:
        >>> FlowPlusPlus(features=3, transforms=2)().sample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        transforms: int = 5,
        components: int = 8,
        **options: Unpack[CouplingOptions],
    ) -> None:
        super().__init__(
            LogisticMixture(components),
            features,
            context_features,
            transforms=transforms,
            fast="inverse",
            **options,
        )


class Glow(LayeredFlow):
    r"""Glow on vectors: steps of normalisation, a learned linear map and an affine coupling.

    .. math:: y = s_k \odot P_k L_k U_k \, f_k(x; c) + b_k.

    The data-dependent initialisation takes place at the first scoring in training mode.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        transforms: Number of steps.
        mask: Which entries stay; see :func:`pyroflows.transforms.coupling_masks`.
        network: Factory of each coupling's network.
        scale: How raw parameters give scales; see :class:`pyroflows.univariate.Affine`.
        bound: Bound of the soft clip on the log-scale; of more than 8 layers each has a share of
            8 bounds, so that scales do not multiply up.

    Other options: see :class:`FlowOptions`.

    Reference:
        Kingma, Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018,
        https://arxiv.org/abs/1807.03039

    Example:
        >>> Glow(features=3)().rsample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        transforms: int = 8,
        mask: Masks = "random",
        network: Network = mlp(),
        scale: str = "softclip",
        bound: float = 3.0,
        **options: Unpack[FlowOptions],
    ) -> None:
        share = depth_share(check_size("transforms", transforms))
        layers = [
            GlowStep(
                features,
                context_features,
                context_shape=context_shape,
                mask=chosen,
                network=network,
                scale=scale,
                bound=check_positive("bound", bound) * share,
            )
            for chosen in coupling_masks(mask, features, transforms)
        ]
        for layer in layers if transforms > SHALLOW else []:
            layer.layers[0].temper(share)  # type: ignore[operator]
        super().__init__(layers, **options)
