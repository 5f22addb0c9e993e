"""Flows of layers in a row, the structure of all ready-made flows."""

# Without `from __future__ import annotations`, because signatures are read when classes are made.

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from torch import nn
from torch.distributions import constraints
from typing_extensions import Unpack

from .._checks import check_size
from ..nn import Network, mlp
from ..transforms import Compose, ContinuousFlow, Planar, Radial, Residual, Sylvester, Transform
from .flow import Base, Flow
from .options import (
    FlowOptions,
    Mixing,
    check_options,
    event_size,
    mix_layers,
    spell_out_options,
    tail_base,
    tail_layers,
)

__all__ = [
    "FFJORD",
    "LayeredFlow",
    "PlanarFlow",
    "RadialFlow",
    "ResidualFlow",
    "SylvesterFlow",
]


class LayeredFlow(Flow):
    r"""Layers in a row, with the options that all ready-made flows share.

    .. math:: f = h \circ f_K \circ m_{K-1} \circ \dots \circ m_1 \circ f_1

    with maps :math:`m_k` that mix entries and a map :math:`h` that shapes the tails, where they are
    asked for.

    A subclass makes the layers, takes ``**options: Unpack[FlowOptions]`` and passes them on; they
    are spelt out in its signature.

    Args:
        transforms: Transforms in generative order, first applied first.
        last: Transforms that follow without a map between, before the tails.
        mixing, tails, base, support, name, reversible, standardize: See :class:`FlowOptions`.

    Raises:
        TypeError: If an option is unknown or of the wrong type.
        ValueError: If an option is out of its range, or if ``reversible`` is asked of layers that
            cannot.

    Example:
        >>> from pyroflows.transforms import Planar
        >>> flow = LayeredFlow([Planar(3) for _ in range(4)], mixing="householder", tails="gpd")
        >>> flow().sample((5,)).shape
        torch.Size([5, 3])
    """

    #: What ``mixing="auto"`` stands for.
    auto_mixing: ClassVar[str | None] = None
    __signature__: ClassVar[inspect.Signature]

    def __init__(
        self,
        transforms: Iterable[Transform],
        last: Iterable[Transform] = (),
        *,
        mixing: Mixing = "auto",
        tails: str | None = None,
        base: Base | None = None,
        support: constraints.Constraint | None = None,
        name: str | None = None,
        reversible: bool = False,
        standardize: bool = False,
        **unknown: Any,
    ) -> None:
        check_options(type(self), unknown)
        layers: list[Any] = list(Compose(transforms).layers)
        features = event_size(layers)
        base = tail_base(tails, features, base)
        if isinstance(last, Transform) or not isinstance(last, Iterable):
            raise TypeError(
                f"Expected last to be a sequence of transforms; got {type(last).__name__}."
            )
        outer = [*last, *tail_layers(tails, features)]
        layers = [*mix_layers(layers, self.find_mixing(mixing)), *outer]
        super().__init__(layers, base, support, name, reversible, standardize)

    @classmethod
    def find_mixing(cls, mixing: Mixing) -> Mixing:
        """Returns what ``mixing="auto"`` stands for, and any other as it is."""
        return cls.auto_mixing if isinstance(mixing, str) and mixing == "auto" else mixing

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = spell_out_options(cls)


LayeredFlow.__signature__ = spell_out_options(LayeredFlow)


class PlanarFlow(LayeredFlow):
    r"""Planar flow: ridges; fast to sample, and able to score any point.

    .. math:: y = x + \hat u_k \tanh(w_k^\top x + b_k).

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        transforms: Number of layers.
        network: Factory of the networks that read the context.

    Other options: see :class:`FlowOptions`.

    Reference:
        Rezende, Mohamed, "Variational inference with normalizing flows", 2015,
        https://arxiv.org/abs/1505.05770

    Example:
        >>> import torch
        >>> PlanarFlow(features=3, transforms=4)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        transforms: int = 16,
        network: Network = mlp(),
        **options: Unpack[FlowOptions],
    ) -> None:
        layers = [
            Planar(features, context_features, context_shape=context_shape, network=network)
            for _ in range(check_size("transforms", transforms))
        ]
        super().__init__(layers, **options)


class RadialFlow(LayeredFlow):
    r"""Radial flow: dents and bulges around points; fast to sample, and able to score any point.

    .. math:: y = x + \beta_k \, (x - x_k) / (\alpha_k + |x - x_k|).

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        transforms: Number of layers.
        network: Factory of the networks that read the context.

    Other options: see :class:`FlowOptions`.

    Reference:
        Rezende, Mohamed, "Variational inference with normalizing flows", 2015,
        https://arxiv.org/abs/1505.05770

    Example:
        >>> import torch
        >>> RadialFlow(features=3, transforms=4)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        transforms: int = 16,
        network: Network = mlp(),
        **options: Unpack[FlowOptions],
    ) -> None:
        layers = [
            Radial(features, context_features, context_shape=context_shape, network=network)
            for _ in range(check_size("transforms", transforms))
        ]
        super().__init__(layers, **options)


class SylvesterFlow(LayeredFlow):
    r"""Sylvester flow: several ridges at once, along orthogonal directions; fast to sample.

    It can score any point.

    .. math:: y = x + Q_k R_k \tanh(\tilde R_k Q_k^\top x + b_k).

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        transforms: Number of layers.
        units: Units of each layer, at most ``features``, which is the default.
        network: Factory of the networks that read the context.

    Other options: see :class:`FlowOptions`.

    Reference:
        van den Berg, Hasenclever, Tomczak, Welling, "Sylvester normalizing flows for variational
        inference", 2018, https://arxiv.org/abs/1803.05649

    Example:
        >>> import torch
        >>> SylvesterFlow(features=3, transforms=4)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        transforms: int = 8,
        units: int | None = None,
        network: Network = mlp(),
        **options: Unpack[FlowOptions],
    ) -> None:
        layers = [
            Sylvester(
                features,
                context_features,
                context_shape=context_shape,
                units=units,
                network=network,
            )
            for _ in range(check_size("transforms", transforms))
        ]
        super().__init__(layers, **options)


class ResidualFlow(LayeredFlow):
    r"""Residual flow: steps of Lipschitz constant below one are added; fast to score.

    .. math:: x = y + g_k(y; c), \quad \mathrm{Lip}(g_k) \le q < 1.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        transforms: Number of layers.
        hidden: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        lipschitz: The bound :math:`q`.
        trace: How log-determinants are found; see :class:`pyroflows.transforms.Residual`.

    Other options: see :class:`FlowOptions`.

    Reference:
        Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling",
        2019, https://arxiv.org/abs/1906.02735

    Example:
        >>> import torch
        >>> ResidualFlow(features=3, transforms=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        transforms: int = 8,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        lipschitz: float = 0.97,
        trace: str = "auto",
        **options: Unpack[FlowOptions],
    ) -> None:
        layers = [
            Residual(
                features,
                context_features,
                context_shape=context_shape,
                hidden=hidden,
                activation=activation,
                lipschitz=lipschitz,
                trace=trace,
            )
            for _ in range(check_size("transforms", transforms))
        ]
        super().__init__(layers, **options)


class FFJORD(LayeredFlow):
    r"""FFJORD: the flow of a learned differential equation.

    .. math:: y = z(1), \quad \dot z = v_k(z, t; c), \quad z(0) = x.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        transforms: Number of layers.
        hidden: Widths of each layer's network.
        activation: Its activation, a callable without arguments that makes a module.
        solver: Solver of torchdiffeq.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver.
        steps: Steps of a solver of fixed step.
        trace: How the divergence is found; see :class:`pyroflows.transforms.ContinuousFlow`.
        adjoint: Whether gradients come from the adjoint equation, in constant memory.

    Other options: see :class:`FlowOptions`.

    Reference:
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD: Free-form continuous dynamics
        for scalable reversible generative models", 2019, https://arxiv.org/abs/1810.01367

    Example:
        >>> FFJORD(features=3, solver="rk4", steps=8)().sample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        transforms: int = 1,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.Tanh,
        solver: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        steps: int | None = None,
        trace: str = "auto",
        adjoint: bool = False,
        **options: Unpack[FlowOptions],
    ) -> None:
        layers = [
            ContinuousFlow(
                features,
                context_features,
                context_shape=context_shape,
                hidden=hidden,
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
        super().__init__(layers, **options)
