"""Autoregressive flows: every entry moves as those before it tell."""

# Without `from __future__ import annotations`, because signatures are read when classes are made.

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from typing_extensions import Unpack

from .._checks import check_positive, check_size
from ..transforms import Autoregressive, BlockAutoregressive
from ..transforms.autoregressive import Order
from ..univariate import (
    Affine,
    Bernstein,
    MonotoneIntegral,
    MonotoneNetwork,
    SumOfSquares,
    Univariate,
)
from .layered import LayeredFlow
from .options import SHALLOW, FlowOptions, depth_share

__all__ = [
    "BNAF",
    "BPF",
    "IAF",
    "MAF",
    "NAF",
    "SOSPF",
    "UNAF",
    "AutoregressiveFlow",
    "AutoregressiveOptions",
]


class AutoregressiveOptions(FlowOptions, total=False):
    """Options that autoregressive flows share, by keyword; see :class:`AutoregressiveFlow`."""

    context_shape: Sequence[int] | None
    order: Order
    hidden: Sequence[int]
    activation: Callable[[], nn.Module]
    residual: bool


class AutoregressiveFlow(LayeredFlow):
    r"""Autoregressive layers of one univariate map :math:`f`.

    .. math:: x_i = f(y_i;\ \theta_k(y_{<i}, c)) \ \text{for}\ k = 1 \dots K,

    fast to score, or with :math:`x` and :math:`y` exchanged, fast to sample.

    Args:
        univariate: A monotone map, such as ``Affine()``; each layer has a copy of its own.
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        transforms: Number of layers.
        order: ``"alternating"`` (natural, then reversed, from layer to layer), ``"natural"``,
            ``"reversed"``, ``"random"`` (a new one for every layer, the same for every flow) or a
            permutation.
        hidden: Widths of each layer's masked network.
        activation: Its activation, a callable without arguments that makes a module.
        residual: Whether the masked networks have residual connections.
        fast: The direction that evaluates :math:`f` itself: ``"inverse"``, as above, or
            ``"forward"``.

    Other options: see :class:`FlowOptions`.

    Raises:
        TypeError: If an option is unknown or of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Papamakarios, Pavlakou, Murray, "Masked autoregressive flow for density estimation", 2017,
        https://arxiv.org/abs/1705.07057

    Example:
        >>> import pyroflows as pf
        >>> monotone = pf.univariate.MonotoneNetwork()
        >>> flow = AutoregressiveFlow(monotone, 3, transforms=2, fast="forward")
        >>> flow().sample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        univariate: Univariate,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        transforms: int = 5,
        order: Order = "alternating",
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        residual: bool = False,
        fast: str = "inverse",
        **options: Unpack[FlowOptions],
    ) -> None:
        # Copies, because a map may have parameters, which belong to its layer.
        layers = [
            Autoregressive(
                copy.deepcopy(univariate),
                features,
                context_features,
                context_shape=context_shape,
                hidden=hidden,
                activation=activation,
                residual=residual,
                fast=fast,
                **chosen,
            )
            for chosen in layer_orders(order, transforms)
        ]
        for layer in layers if transforms > SHALLOW else []:
            layer.temper(depth_share(transforms))
        super().__init__(layers, **options)


class MAF(AutoregressiveFlow):
    r"""Masked autoregressive flow: affine maps that depend on the entries before; fast to score.

    .. math:: x_i = e^{s_k(y_{<i}, c)} \, y_i + t_k(y_{<i}, c) \ \text{for}\ k = 1 \dots K.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        scale: How raw parameters give scales; see :class:`pyroflows.univariate.Affine`.
        bound: Bound of the soft clip on the log-scale; of more than 8 layers each has a share of
            8 bounds, so that scales do not multiply up.

    Other options: see :class:`AutoregressiveFlow` and :class:`FlowOptions`.

    Reference:
        Papamakarios, Pavlakou, Murray, "Masked autoregressive flow for density estimation", 2017,
        https://arxiv.org/abs/1705.07057

    Example:
        >>> import torch
        >>> MAF(features=3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    auto_mixing = "lu"

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        transforms: int = 5,
        scale: str = "softclip",
        bound: float = 3.0,
        **options: Unpack[AutoregressiveOptions],
    ) -> None:
        univariate = Affine(
            scale,
            check_positive("bound", bound) * depth_share(check_size("transforms", transforms)),
        )
        super().__init__(univariate, features, context_features, transforms=transforms, **options)


class IAF(AutoregressiveFlow):
    r"""Inverse autoregressive flow: the layers of ``MAF`` the other way; fast to sample.

    What it sampled it scores at no further cost.

    .. math:: y_i = e^{s_k(x_{<i}, c)} \, x_i + t_k(x_{<i}, c) \ \text{for}\ k = 1 \dots K.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        scale: How raw parameters give scales; see :class:`pyroflows.univariate.Affine`.
        bound: Bound of the soft clip on the log-scale; of more than 8 layers each has a share of
            8 bounds, so that scales do not multiply up.

    Other options: see :class:`AutoregressiveFlow` and :class:`FlowOptions`.

    Reference:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving variational inference
        with inverse autoregressive flow", 2016, https://arxiv.org/abs/1606.04934

    Example:
        >>> y, log_prob = IAF(features=3)().rsample_and_log_prob((5,))
        >>> log_prob.shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        transforms: int = 5,
        scale: str = "softclip",
        bound: float = 3.0,
        **options: Unpack[AutoregressiveOptions],
    ) -> None:
        super().__init__(
            Affine(
                scale,
                check_positive("bound", bound) * depth_share(check_size("transforms", transforms)),
            ),
            features,
            context_features,
            transforms=transforms,
            fast="forward",
            **options,
        )


class NAF(AutoregressiveFlow):
    r"""Neural autoregressive flow: a monotone network per entry; fast to score.

    .. math:: x_i = m(y_i;\ \theta_k(y_{<i}, c)) \ \text{with a monotone network}\ m.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        units: Units of each monotone network.

    Other options: see :class:`AutoregressiveFlow` and :class:`FlowOptions`.

    Reference:
        Huang, Krueger, Lacoste, Courville, "Neural autoregressive flows", 2018,
        https://arxiv.org/abs/1804.00779

    Example:
        >>> import torch
        >>> NAF(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        transforms: int = 3,
        units: int = 8,
        **options: Unpack[AutoregressiveOptions],
    ) -> None:
        univariate = MonotoneNetwork(units)
        super().__init__(univariate, features, context_features, transforms=transforms, **options)


class UNAF(AutoregressiveFlow):
    r"""Unconstrained neural autoregressive flow: an integral of a network per entry; fast to score.

    .. math:: x_i = b + \int_0^{y_i} g(t;\ \theta_k(y_{<i}, c)) \, dt, \quad g > 0.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.

    Other options: see :class:`AutoregressiveFlow` and :class:`FlowOptions`.

    Reference:
        Wehenkel, Louppe, "Unconstrained monotonic neural networks", 2019,
        https://arxiv.org/abs/1908.05164

    Example:
        >>> import torch
        >>> UNAF(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        transforms: int = 3,
        **options: Unpack[AutoregressiveOptions],
    ) -> None:
        univariate = MonotoneIntegral()
        super().__init__(univariate, features, context_features, transforms=transforms, **options)


class SOSPF(AutoregressiveFlow):
    r"""Sum-of-squares polynomial flow: an integral of polynomials per entry; fast to score.

    .. math:: x_i = b + \int_0^{y_i} \sum_p q_p(t;\ \theta_k(y_{<i}, c))^2 \, dt.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        polynomials: Polynomials under the sum.
        degree: Their degree.

    Other options: see :class:`AutoregressiveFlow` and :class:`FlowOptions`.

    Reference:
        Jaini, Selby, Yu, "Sum-of-squares polynomial flow", 2019, https://arxiv.org/abs/1905.02325

    Example:
        >>> import torch
        >>> SOSPF(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        transforms: int = 3,
        polynomials: int = 3,
        degree: int = 4,
        **options: Unpack[AutoregressiveOptions],
    ) -> None:
        univariate = SumOfSquares(polynomials, degree)
        super().__init__(univariate, features, context_features, transforms=transforms, **options)


class BPF(AutoregressiveFlow):
    r"""Bernstein polynomial flow: an increasing Bernstein polynomial per entry; fast to score.

    .. math:: x_i = \sum_j \vartheta_j(y_{<i}, c) \, b_{j, n}(y_i),
        \quad \vartheta_0 < \dots < \vartheta_n.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        degree: Degree of the polynomials.
        bound: Half-width of the box in which they bend; beyond it they go on as straight lines.

    Other options: see :class:`AutoregressiveFlow` and :class:`FlowOptions`.

    Reference:
        Ramasinghe, Fernando, Khan, Barnes, "Robust normalizing flows using Bernstein-type
        polynomials", 2021, https://arxiv.org/abs/2102.03509

    Example:
        >>> import torch
        >>> BPF(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        transforms: int = 3,
        degree: int = 16,
        bound: float = 4.0,
        **options: Unpack[AutoregressiveOptions],
    ) -> None:
        univariate = Bernstein(degree, bound)
        super().__init__(univariate, features, context_features, transforms=transforms, **options)


class BNAF(LayeredFlow):
    r"""Block neural autoregressive flow: networks that are triangular by blocks; fast to score.

    .. math:: x = f_k(y; c), \quad \partial x_i / \partial y_j = 0 \ (j > i),
        \quad \partial x_i / \partial y_i > 0.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        transforms: Number of layers.
        hidden: Widths of the hidden layers, for each entry.
        order: As in :class:`AutoregressiveFlow`.

    Other options: see :class:`FlowOptions`.

    Reference:
        De Cao, Titov, Aziz, "Block neural autoregressive flow", 2019,
        https://arxiv.org/abs/1904.04676

    Example:
        >>> import torch
        >>> BNAF(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        transforms: int = 3,
        hidden: Sequence[int] = (8, 8),
        order: Order = "alternating",
        **options: Unpack[FlowOptions],
    ) -> None:
        layers = [
            BlockAutoregressive(
                features, context_features, context_shape=context_shape, hidden=hidden, **chosen
            )
            for chosen in layer_orders(order, transforms)
        ]
        super().__init__(layers, **options)


def layer_orders(order: Order, transforms: int) -> list[dict[str, Any]]:
    """Returns the order of each layer, with the seed of a random one, as layers take them.

    Args:
        order: The option; see :class:`AutoregressiveFlow`.
        transforms: Number of layers.
    """
    names = ("alternating", "natural", "reversed", "random")
    if isinstance(order, str) and order not in names:
        raise ValueError(
            f"Expected order to be {', '.join(names)} or a permutation; got {order!r}."
        )
    alternating = isinstance(order, str) and order == "alternating"
    cycle = ("natural", "reversed") if alternating else (order, order)
    return [
        {"order": cycle[layer % 2], "seed": layer}
        for layer in range(check_size("transforms", transforms))
    ]
