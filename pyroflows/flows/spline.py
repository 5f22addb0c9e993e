"""Neural spline flows, of couplings or of autoregressive layers."""

# Without `from __future__ import annotations`, because signatures are read when classes are made.

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import nn
from typing_extensions import Unpack

from .._checks import check_choice, check_flag
from ..nn import Network
from ..transforms import Transform
from ..transforms.autoregressive import Order
from ..univariate import (
    CircularSpline,
    LinearRationalSpline,
    RationalQuadraticSpline,
    Univariate,
)
from .autoregressive import AutoregressiveFlow
from .coupling import CouplingFlow, Masks
from .layered import LayeredFlow
from .options import FlowOptions, check_options

__all__ = ["NSF"]


class SplineOptions(FlowOptions, total=False):
    """Options of couplings and of autoregressive layers; ``None`` for the default there."""

    context_shape: Sequence[int] | None
    mask: Masks | None
    network: Network | None
    order: Order | None
    hidden: Sequence[int] | None
    activation: Callable[[], nn.Module] | None
    residual: bool | None


class NSF(LayeredFlow):
    r"""Neural spline flow: monotone rational splines, in couplings or autoregressive layers.

    .. math:: y_B = \mathrm{spline}(x_B;\ \theta_k(x_A, c)) \ \text{or}\
        x_i = \mathrm{spline}(y_i;\ \theta_k(y_{<i}, c)).

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        transforms: Number of layers.
        coupling: Whether layers are couplings, fast both ways, with the options of
            :class:`CouplingFlow`; else they are autoregressive, fast to score, with those of
            :class:`AutoregressiveFlow`. By default they are couplings, for which one feature is too
            few: then they are autoregressive.
        bins: Pieces of each spline.
        bound: Half-width of the box in which the splines bend; beyond it they are the identity.
        spline: ``"rational-quadratic"``, ``"linear-rational"``, or ``"circular"`` for angles in
            :math:`[-\pi, \pi)`, whose base is uniform.

    Other options: see :class:`CouplingFlow` or :class:`AutoregressiveFlow`, and
    :class:`FlowOptions`.

    Raises:
        TypeError: If an option is unknown or of the wrong type.
        ValueError: If an option is out of its range.

    Reference:
        Durkan, Bekasov, Murray, Papamakarios, "Neural spline flows", 2019,
        https://arxiv.org/abs/1906.04032; Dolatabadi, Erfani, Leckie, "Invertible generative
        modeling using linear rational splines", 2020, https://arxiv.org/abs/2001.05168; Rezende et
        al., "Normalizing flows on tori and spheres", 2020, https://arxiv.org/abs/2002.02428

    Example:
        >>> NSF(features=3, bins=4)().sample((5,)).shape
        torch.Size([5, 3])
        >>> print(NSF(3, coupling=False, hidden=(32, 32)).transform.fast)
        inverse
    """

    auto_mixing = "lu"

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        transforms: int = 5,
        coupling: bool | None = None,
        bins: int = 8,
        bound: float = 3.0,
        spline: str = "rational-quadratic",
        **options: Unpack[SplineOptions],
    ) -> None:
        check_options(type(self), options)
        check_choice("spline", spline, tuple(SPLINES))
        given: dict[str, Any] = dict(options)
        shared = {name: given.pop(name) for name in FlowOptions.__annotations__ if name in given}
        chosen = {name: value for name, value in given.items() if value is not None}
        if coupling is None:
            coupling = features != 1
        structure: Callable[..., LayeredFlow] = (
            CouplingFlow if check_flag("coupling", coupling) else AutoregressiveFlow
        )
        if spline == "circular":
            shared = _on_circles(features, shared)
        made = structure(
            SPLINES[spline](bins, bound),
            features,
            context_features,
            transforms=transforms,
            mixing=self.find_mixing(shared.pop("mixing", "auto")),
            **chosen,
        )
        super().__init__(cast("list[Transform]", made.transform.layers), mixing=None, **shared)


#: Makers of splines of so many bins within a bound.
SPLINES: dict[str, Callable[[int, float], Univariate]] = {
    "rational-quadratic": RationalQuadraticSpline,
    "linear-rational": LinearRationalSpline,
    "circular": lambda bins, bound: CircularSpline(bins),
}


def _on_circles(features: int, options: dict[str, Any]) -> dict[str, Any]:
    """Completes the options of a flow of angles, whose base is uniform."""
    mixing, tails = options.pop("mixing", "auto"), options.get("tails")
    mixing = None if mixing == "auto" else mixing
    if tails is not None or mixing not in (None, "reverse", "permute"):
        raise ValueError(
            "Expected no tails, and no mixing but reverse or permute, for angles; "
            f"got tails={tails!r}, mixing={mixing!r}."
        )
    if options.get("base") is None:
        bound = math.pi * torch.ones(features)
        options["base"] = dist.Uniform(-bound, bound, validate_args=False).to_event(1)
    return {**options, "mixing": mixing}
