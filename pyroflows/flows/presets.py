"""Ready-made flows, by the names of their papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .._checks import check_size
from ..nn import mlp
from ..nn.made import check_order
from ..transforms import (
    AdditiveCoupling,
    AffineCoupling,
    Autoregressive,
    BlockAutoregressive,
    ContinuousFlow,
    Coupling,
    GlowStep,
    Planar,
    Radial,
    Rescale,
    Residual,
    Sylvester,
    Transform,
    coupling_masks,
)
from ..univariate import (
    Affine,
    Bernstein,
    CircularSpline,
    LinearRationalSpline,
    LogisticMixture,
    MonotoneIntegral,
    MonotoneNetwork,
    RationalQuadraticSpline,
    SumOfSquares,
    Univariate,
)
from .flow import Base, Flow
from .options import Mixing, mixed, with_tails

__all__ = [
    "BNAF",
    "BPF",
    "FFJORD",
    "IAF",
    "MAF",
    "NAF",
    "NICE",
    "NSF",
    "SOSPF",
    "UNAF",
    "FlowPlusPlus",
    "Glow",
    "PlanarFlow",
    "RadialFlow",
    "RealNVP",
    "ResidualFlow",
    "SylvesterFlow",
]


class NICE(Flow):
    r"""NICE: additive couplings, then one diagonal scaling.

    .. math:: y_B = x_B + t_k(x_A, c) \ \text{for}\ k = 1 \dots K, \qquad y \leftarrow e^{s} \odot y.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context, or ``None``.
        transforms: Number of couplings.
        hidden_features: Widths of each coupling's network.
        activation: Its activation, a callable without arguments that makes a module.
        mask: Which entries stay; see :func:`pyroflows.transforms.coupling_masks`.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        reversible: Whether training recomputes activations by inversion instead of keeping them.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Dinh, Krueger, Bengio, "NICE: Non-linear independent components estimation", 2014, https://arxiv.org/abs/1410.8516

    Example:
        >>> NICE(features=3, context_features=2)(torch.zeros(7, 2)).batch_shape
        torch.Size([7])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        mask: str | Tensor | Sequence[bool] = "random",
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        reversible: bool = False,
        standardize: bool = False,
    ) -> None:
        layers = [
            AdditiveCoupling(
                features,
                context_features,
                mask=chosen,
                network=mlp(hidden_features, activation),
            )
            for chosen in coupling_masks(mask, features, check_size("transforms", transforms))
        ]
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), Rescale(features), *last],
            base,
            support,
            name,
            reversible,
            standardize,
        )


class RealNVP(Flow):
    r"""RealNVP: affine couplings, and between them learned linear maps.

    .. math:: y_B = e^{s_k(x_A, c)} \odot x_B + t_k(x_A, c) \ \text{for}\ k = 1 \dots K.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context, or ``None``.
        transforms: Number of couplings.
        hidden_features: Widths of each coupling's network.
        activation: Its activation, a callable without arguments that makes a module.
        mask: Which entries stay; see :func:`pyroflows.transforms.coupling_masks`.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, a callable that makes a
            transform of so many features, or ``None``, with which the flow is that of the paper. ``"lu"`` mostly fits data
            better; between two layers it learns ``features ** 2`` numbers more, which is much for many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        scale: How raw parameters give scales; see :class:`pyroflows.univariate.Affine`.
        bound: Bound of the soft clip on the log-scale.
        name: Name in the param store.
        reversible: Whether training recomputes activations by inversion instead of keeping them.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2016, https://arxiv.org/abs/1605.08803

    Example:
        >>> flow = RealNVP(features=3, support=constraints.positive)
        >>> bool((flow().sample((100,)) > 0).all())
        True
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        mask: str | Tensor | Sequence[bool] = "random",
        mixing: Mixing = "lu",
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        scale: str = "softclip",
        bound: float = 3.0,
        name: str | None = None,
        reversible: bool = False,
        standardize: bool = False,
    ) -> None:
        layers = [
            AffineCoupling(
                features,
                context_features,
                mask=chosen,
                network=mlp(hidden_features, activation),
                scale=scale,
                bound=bound,
            )
            for chosen in coupling_masks(mask, features, check_size("transforms", transforms))
        ]
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, reversible, standardize
        )


class MAF(Flow):
    r"""Masked autoregressive flow: affine maps whose parameters depend on the entries before; fast to score.

    .. math:: x_i = e^{s_k(y_{<i}, c)} \, y_i + t_k(y_{<i}, c) \ \text{for}\ k = 1 \dots K.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        scale: How raw parameters give scales; see :class:`pyroflows.univariate.Affine`.
        bound: Bound of the soft clip on the log-scale.
        order: ``"alternating"`` (natural, then reversed, from layer to layer), ``"natural"``, ``"random"`` (a new one for
            every layer, the same for every flow) or a permutation.
        residual: Whether the masked networks have residual connections.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, a callable that makes a
            transform of so many features, or ``None``, with which the flow is that of the paper. ``"lu"`` mostly fits data
            better; between two layers it learns ``features ** 2`` numbers more, which is much for many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Papamakarios, Pavlakou, Murray, "Masked autoregressive flow for density estimation", 2017,
        https://arxiv.org/abs/1705.07057

    Example:
        >>> MAF(features=3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 5,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        scale: str = "softclip",
        bound: float = 3.0,
        order: str | Sequence[int] | Tensor = "alternating",
        residual: bool = False,
        mixing: Mixing = "lu",
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = _autoregressive(
            lambda: Affine(scale, bound),
            features,
            context_features,
            transforms,
            hidden_features,
            activation,
            order,
            residual,
        )
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class IAF(Flow):
    r"""Inverse autoregressive flow: the layers of ``MAF`` run the other way; fast to sample, and to score what it sampled.

    .. math:: y_i = e^{s_k(x_{<i}, c)} \, x_i + t_k(x_{<i}, c) \ \text{for}\ k = 1 \dots K.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        scale: How raw parameters give scales; see :class:`pyroflows.univariate.Affine`.
        bound: Bound of the soft clip on the log-scale.
        order: ``"alternating"`` (natural, then reversed, from layer to layer), ``"natural"``, ``"random"`` (a new one for
            every layer, the same for every flow) or a permutation.
        residual: Whether the masked networks have residual connections.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving variational inference with inverse
        autoregressive flow", 2016, https://arxiv.org/abs/1606.04934

    Example:
        >>> y, log_prob = IAF(features=3)().rsample_and_log_prob((5,))
        >>> log_prob.shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 5,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        scale: str = "softclip",
        bound: float = 3.0,
        order: str | Sequence[int] | Tensor = "alternating",
        residual: bool = False,
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = _autoregressive(
            lambda: Affine(scale, bound),
            features,
            context_features,
            transforms,
            hidden_features,
            activation,
            order,
            residual,
            fast="forward",
        )
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class NSF(Flow):
    r"""Neural spline flow: monotone rational splines, in couplings or autoregressive layers.

    .. math:: y_B = \mathrm{spline}(x_B;\ \theta_k(x_A, c)) \ \text{or} \ x_i = \mathrm{spline}(y_i;\ \theta_k(y_{<i}, c)).

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        coupling: Whether layers are couplings, fast both ways; else they are autoregressive, fast to score.
        bins: Pieces of each spline.
        bound: Half-width of the box in which the splines bend; beyond it they are the identity.
        spline: ``"rational-quadratic"``, ``"linear-rational"``, or ``"circular"`` for angles in :math:`[-\pi, \pi)`,
            whose base is uniform.
        mask: Which entries stay in couplings; see :func:`pyroflows.transforms.coupling_masks`.
        order: ``"alternating"`` (natural, then reversed, from layer to layer), ``"natural"``, ``"random"`` (a new one for
            every layer, the same for every flow) or a permutation.
        residual: Whether the masked networks have residual connections.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, a callable that makes a
            transform of so many features, ``None``, or ``"auto"``: ``"lu"``, as in the paper, but nothing for angles.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        reversible: Whether training recomputes activations by inversion instead of keeping them.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Durkan, Bekasov, Murray, Papamakarios, "Neural spline flows", 2019, https://arxiv.org/abs/1906.04032;
        Dolatabadi, Erfani, Leckie, "Invertible generative modeling using linear rational splines", 2020,
        https://arxiv.org/abs/2001.05168; Rezende et al., "Normalizing flows on tori and spheres", 2020,
        https://arxiv.org/abs/2002.02428

    Example:
        >>> NSF(features=3, bins=4)().sample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 5,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        coupling: bool = True,
        bins: int = 8,
        bound: float = 3.0,
        spline: str = "rational-quadratic",
        mask: str | Tensor | Sequence[bool] = "random",
        order: str | Sequence[int] | Tensor = "alternating",
        residual: bool = False,
        mixing: Mixing = "auto",
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        reversible: bool = False,
        standardize: bool = False,
    ) -> None:
        make = _spline(spline, bins, bound)
        _orders(order, features, transforms)
        if isinstance(mixing, str) and mixing == "auto":
            mixing = None if spline == "circular" else "lu"
        if coupling:
            layers: list[Transform] = [
                Coupling(
                    make(),
                    features,
                    context_features,
                    mask=chosen,
                    network=mlp(hidden_features, activation),
                )
                for chosen in coupling_masks(mask, features, check_size("transforms", transforms))
            ]
        else:
            layers = _autoregressive(
                make,
                features,
                context_features,
                transforms,
                hidden_features,
                activation,
                order,
                residual,
            )
        if spline == "circular":
            uniform = _circular_base(features, mixing, tails)
            base = uniform if base is None else base
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, reversible, standardize
        )


class NAF(Flow):
    r"""Neural autoregressive flow: a monotone network per entry; fast to score.

    .. math:: x_i = m(y_i;\ \theta_k(y_{<i}, c)) \ \text{with a monotone network}\ m.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        units: Units of each monotone network.
        order: ``"alternating"`` (natural, then reversed, from layer to layer), ``"natural"``, ``"random"`` (a new one for
            every layer, the same for every flow) or a permutation.
        residual: Whether the masked networks have residual connections.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Huang, Krueger, Lacoste, Courville, "Neural autoregressive flows", 2018, https://arxiv.org/abs/1804.00779

    Example:
        >>> NAF(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 3,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        units: int = 8,
        order: str | Sequence[int] | Tensor = "alternating",
        residual: bool = False,
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = _autoregressive(
            lambda: MonotoneNetwork(units),
            features,
            context_features,
            transforms,
            hidden_features,
            activation,
            order,
            residual,
        )
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class UNAF(Flow):
    r"""Unconstrained neural autoregressive flow: the integral of a positive network per entry; fast to score.

    .. math:: x_i = b + \int_0^{y_i} g(t;\ \theta_k(y_{<i}, c)) \, dt, \quad g > 0.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        order: ``"alternating"`` (natural, then reversed, from layer to layer), ``"natural"``, ``"random"`` (a new one for
            every layer, the same for every flow) or a permutation.
        residual: Whether the masked networks have residual connections.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Wehenkel, Louppe, "Unconstrained monotonic neural networks", 2019, https://arxiv.org/abs/1908.05164

    Example:
        >>> UNAF(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 3,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        order: str | Sequence[int] | Tensor = "alternating",
        residual: bool = False,
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = _autoregressive(
            MonotoneIntegral,
            features,
            context_features,
            transforms,
            hidden_features,
            activation,
            order,
            residual,
        )
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class BNAF(Flow):
    r"""Block neural autoregressive flow: networks that are triangular by blocks; fast to score.

    .. math:: x = f_k(y; c), \quad \partial x_i / \partial y_j = 0 \ (j > i), \quad \partial x_i / \partial y_i > 0.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of the hidden layers, for each entry.
        order: ``"alternating"`` (natural, then reversed, from layer to layer), ``"natural"``, ``"random"`` or a permutation.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        De Cao, Titov, Aziz, "Block neural autoregressive flow", 2019, https://arxiv.org/abs/1904.04676

    Example:
        >>> BNAF(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 3,
        hidden_features: Sequence[int] = (8, 8),
        order: str | Sequence[int] | Tensor = "alternating",
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = [
            BlockAutoregressive(features, context_features, hidden=hidden_features, order=chosen)
            for chosen in _orders(order, features, transforms)
        ]
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class SOSPF(Flow):
    r"""Sum-of-squares polynomial flow: the integral of a sum of squared polynomials per entry; fast to score.

    .. math:: x_i = b + \int_0^{y_i} \sum_p q_p(t;\ \theta_k(y_{<i}, c))^2 \, dt.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        polynomials: Polynomials under the sum.
        degree: Their degree.
        order: ``"alternating"`` (natural, then reversed, from layer to layer), ``"natural"``, ``"random"`` (a new one for
            every layer, the same for every flow) or a permutation.
        residual: Whether the masked networks have residual connections.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Jaini, Selby, Yu, "Sum-of-squares polynomial flow", 2019, https://arxiv.org/abs/1905.02325

    Example:
        >>> SOSPF(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 3,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        polynomials: int = 3,
        degree: int = 4,
        order: str | Sequence[int] | Tensor = "alternating",
        residual: bool = False,
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = _autoregressive(
            lambda: SumOfSquares(polynomials, degree),
            features,
            context_features,
            transforms,
            hidden_features,
            activation,
            order,
            residual,
        )
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class BPF(Flow):
    r"""Bernstein polynomial flow: an increasing Bernstein polynomial per entry; fast to score.

    .. math:: x_i = \sum_j \vartheta_j(y_{<i}, c) \, b_{j, n}(y_i), \quad \vartheta_0 < \dots < \vartheta_n.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        degree: Degree of the polynomials.
        bound: Half-width of the box in which they bend; beyond it they go on as straight lines.
        order: ``"alternating"`` (natural, then reversed, from layer to layer), ``"natural"``, ``"random"`` (a new one for
            every layer, the same for every flow) or a permutation.
        residual: Whether the masked networks have residual connections.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Ramasinghe, Fernando, Khan, Barnes, "Robust normalizing flows using Bernstein-type polynomials", 2021,
        https://arxiv.org/abs/2102.03509

    Example:
        >>> BPF(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 3,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        degree: int = 16,
        bound: float = 4.0,
        order: str | Sequence[int] | Tensor = "alternating",
        residual: bool = False,
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = _autoregressive(
            lambda: Bernstein(degree, bound),
            features,
            context_features,
            transforms,
            hidden_features,
            activation,
            order,
            residual,
        )
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class PlanarFlow(Flow):
    r"""Planar flow: ridges; fast to sample, and able to score any point.

    .. math:: y = x + \hat u_k \tanh(w_k^\top x + b_k).

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of the networks that read the context.
        activation: Its activation, a callable without arguments that makes a module.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Rezende, Mohamed, "Variational inference with normalizing flows", 2015, https://arxiv.org/abs/1505.05770

    Example:
        >>> PlanarFlow(features=3, transforms=4)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 16,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = [
            Planar(features, context_features, network=mlp(hidden_features, activation))
            for _ in range(check_size("transforms", transforms))
        ]
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class RadialFlow(Flow):
    r"""Radial flow: dents and bulges around points; fast to sample, and able to score any point.

    .. math:: y = x + \beta_k \, (x - x_k) / (\alpha_k + |x - x_k|).

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of the networks that read the context.
        activation: Its activation, a callable without arguments that makes a module.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Rezende, Mohamed, "Variational inference with normalizing flows", 2015, https://arxiv.org/abs/1505.05770

    Example:
        >>> RadialFlow(features=3, transforms=4)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 16,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = [
            Radial(features, context_features, network=mlp(hidden_features, activation))
            for _ in range(check_size("transforms", transforms))
        ]
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class SylvesterFlow(Flow):
    r"""Sylvester flow: several ridges at once, along orthogonal directions; fast to sample, and able to score any point.

    .. math:: y = x + Q_k R_k \tanh(\tilde R_k Q_k^\top x + b_k).

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        units: Units of each layer, at most ``features``, which is the default.
        hidden_features: Widths of the networks that read the context.
        activation: Its activation, a callable without arguments that makes a module.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        van den Berg, Hasenclever, Tomczak, Welling, "Sylvester normalizing flows for variational inference", 2018,
        https://arxiv.org/abs/1803.05649

    Example:
        >>> SylvesterFlow(features=3, transforms=4)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 8,
        units: int | None = None,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = [
            Sylvester(
                features,
                context_features,
                units=units,
                network=mlp(hidden_features, activation),
            )
            for _ in range(check_size("transforms", transforms))
        ]
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class Glow(Flow):
    r"""Glow on vectors: steps of normalisation, a learned linear map and an affine coupling.

    .. math:: y = s_k \odot P_k L_k U_k \, f_k(x; c) + b_k.

    The data-dependent initialisation takes place at the first scoring in training mode.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context, or ``None``.
        transforms: Number of steps.
        hidden_features: Widths of each coupling's network.
        activation: Its activation, a callable without arguments that makes a module.
        mask: Which entries stay; see :func:`pyroflows.transforms.coupling_masks`.
        scale: How raw parameters give scales; see :class:`pyroflows.univariate.Affine`.
        bound: Bound of the soft clip on the log-scale.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        reversible: Whether training recomputes activations by inversion instead of keeping them.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Kingma, Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018, https://arxiv.org/abs/1807.03039

    Example:
        >>> Glow(features=3)().rsample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        mask: str | Tensor | Sequence[bool] = "random",
        scale: str = "softclip",
        bound: float = 3.0,
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        reversible: bool = False,
        standardize: bool = False,
    ) -> None:
        layers = [
            GlowStep(
                features,
                context_features,
                mask=chosen,
                network=mlp(hidden_features, activation),
                scale=scale,
                bound=bound,
            )
            for chosen in coupling_masks(mask, features, check_size("transforms", transforms))
        ]
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, reversible, standardize
        )


class ResidualFlow(Flow):
    r"""Residual flow: steps of Lipschitz constant below one are added; fast to score.

    .. math:: x = y + g_k(y; c), \quad \mathrm{Lip}(g_k) \le q < 1.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        lipschitz: The bound :math:`q`.
        trace: How log-determinants are found; see :class:`pyroflows.transforms.Residual`.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling", 2019,
        https://arxiv.org/abs/1906.02735

    Example:
        >>> ResidualFlow(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        lipschitz: float = 0.97,
        trace: str = "auto",
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = [
            Residual(
                features,
                context_features,
                hidden=hidden_features,
                activation=activation,
                lipschitz=lipschitz,
                trace=trace,
            )
            for _ in range(check_size("transforms", transforms))
        ]
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class FFJORD(Flow):
    r"""FFJORD: the flow of a learned differential equation.

    .. math:: y = z(1), \quad \dot z = v_k(z, t; c), \quad z(0) = x.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        hidden_features: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        solver: Solver of torchdiffeq.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver.
        steps: Steps of a solver of fixed step.
        trace: How the divergence is found; see :class:`pyroflows.transforms.ContinuousFlow`.
        adjoint: Whether gradients come from the adjoint equation, in constant memory.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD: Free-form continuous dynamics for scalable reversible
        generative models", 2019, https://arxiv.org/abs/1810.01367

    Example:
        >>> FFJORD(features=3, solver="rk4", steps=8)().sample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 1,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.Tanh,
        solver: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        steps: int | None = None,
        trace: str = "auto",
        adjoint: bool = False,
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = [
            ContinuousFlow(
                features,
                context_features,
                hidden=hidden_features,
                activation=activation,
                trace=trace,
                solver=solver,
                rtol=rtol,
                atol=atol,
                steps=steps,
                adjoint=adjoint,
            )
            for _ in range(check_size("transforms", transforms))
        ]
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


class FlowPlusPlus(Flow):
    r"""Flow++ on vectors: couplings by the distribution function of a mixture of logistics; fast to score.

    .. math:: x_B = e^{s} \operatorname{logit} \big( \sum_j \pi_j \, \sigma((y_B - \mu_j) / \varsigma_j) \big) + t.

    Args:
        features: Entries of the vector, at least 2.
        context_features: Entries of the context, or ``None``.
        transforms: Number of couplings.
        hidden_features: Widths of each coupling's network.
        activation: Its activation, a callable without arguments that makes a module.
        components: Components of each mixture.
        mask: Which entries stay; see :func:`pyroflows.transforms.coupling_masks`.
        mixing: What mixes entries between two layers: a name of :data:`pyroflows.flows.MIXINGS`, such as ``"lu"``, or a
            callable that makes a transform of so many features.
        tails: What shapes the tails: ``"gpd"`` or ``"loft"``, last layers of :mod:`pyroflows.transforms.tails`, or
            ``"student"``, a base of Student-t with learned
            degrees.
        base: Base distribution; the standard normal by default.
        support: Constraint that values satisfy; the whole space by default.
        name: Name in the param store.
        standardize: Whether a last layer takes over the means and scales of the data that ``fit_density`` is given.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Ho, Chen, Srinivas, Duan, Abbeel, "Flow++: Improving flow-based generative models with variational dequantization and
        architecture design", 2019, https://arxiv.org/abs/1902.00275

    Example:
        >>> FlowPlusPlus(features=3, transforms=2)().sample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        transforms: int = 5,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        components: int = 8,
        mask: str | Tensor | Sequence[bool] = "random",
        mixing: Mixing = None,
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        standardize: bool = False,
    ) -> None:
        layers = [
            Coupling(
                LogisticMixture(components),
                features,
                context_features,
                mask=chosen,
                network=mlp(hidden_features, activation),
            ).inv
            for chosen in coupling_masks(mask, features, check_size("transforms", transforms))
        ]
        last, base = with_tails(tails, features, base)
        super().__init__(
            [*mixed(layers, features, mixing), *last], base, support, name, standardize=standardize
        )


def _orders(order: Any, features: int, transforms: int) -> list[list[int]]:
    """One order of the entries for each layer."""
    natural = list(range(check_size("features", features)))
    count = check_size("transforms", transforms)
    if not isinstance(order, str):
        return [check_order(order, features)] * count
    if order == "natural":
        return [natural] * count
    if order == "alternating":
        return [natural if layer % 2 == 0 else natural[::-1] for layer in range(count)]
    if order == "random":
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randperm(features, generator=generator, device="cpu").tolist()
            for _ in range(count)
        ]
    raise ValueError(
        f"Expected order to be alternating, natural, random or a permutation; got {order!r}."
    )


def _autoregressive(
    make: Callable[[], Univariate],
    features: int,
    context_features: int | None,
    transforms: int,
    hidden_features: Sequence[int],
    activation: Callable[[], nn.Module],
    order: Any,
    residual: bool,
    fast: str = "inverse",
) -> list[Transform]:
    return [
        Autoregressive(
            make(),
            features,
            context_features,
            hidden=hidden_features,
            activation=activation,
            order=chosen,
            residual=residual,
            fast=fast,
        )
        for chosen in _orders(order, features, transforms)
    ]


def _circular_base(
    features: int, mixing: Mixing, tails: str | None
) -> torch.distributions.Distribution:
    """The uniform distribution of angles."""
    if tails is not None or mixing not in (None, "reverse", "permute"):
        raise ValueError(
            f"Expected no tails, and no mixing but reverse or permute, for angles; got tails={tails!r}, mixing={mixing!r}."
        )
    bound = math.pi * torch.ones(features)
    return dist.Uniform(-bound, bound, validate_args=False).to_event(1)


def _spline(spline: Any, bins: int, bound: float) -> Callable[[], Univariate]:
    """Makes the splines of one kind."""
    if spline == "rational-quadratic":
        return lambda: RationalQuadraticSpline(bins, bound)
    if spline == "linear-rational":
        return lambda: LinearRationalSpline(bins, bound)
    if spline == "circular":
        return lambda: CircularSpline(bins)
    raise ValueError(
        f"Expected spline to be rational-quadratic, linear-rational or circular; got {spline!r}."
    )
