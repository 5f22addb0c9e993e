"""The same families of flow from pyroflows, Pyro, Zuko, nflows and normflows, behind one face.

A builder takes the number of features, the width of its networks' two hidden layers and the number of layers, and
returns a `Model`. Each library's networks, activations, initialisation and permutations are those that it has by default
or, where it leaves them open, those of its own examples; splines have 8 bins.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("realnvp", "maf", "nsf-coupling", "nsf-autoregressive")
LAYERS, BINS, WIDTH = 5, 8, 64
TOLERANCE = 0.05


@dataclass(frozen=True)
class Model:
    """A flow.

    Args:
        module: What holds the parameters and the training mode.
        log_prob: Scores points `(N, features)`, giving `(N,)`.
        sample: Draws that many points, `(N, features)`, without gradient.
        rsample_and_log_prob: Draws that many points and scores them, both with gradients.
    """

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    rsample_and_log_prob: Callable[[int], tuple[Tensor, Tensor]]

    @property
    def parameters(self) -> int:
        """How many numbers are learnt."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)


Build = Callable[[int, int, int], Model]


# pyroflows


def _pyroflows(preset: str, **options: Any) -> Build:
    def build(features: int, hidden: int, layers: int) -> Model:
        import pyroflows

        widths = (hidden, hidden)
        masked = preset == "MAF" or options.get("coupling") is False
        network = {"hidden": widths} if masked else {"network": pyroflows.nn.mlp(widths)}
        make = getattr(pyroflows, preset)
        flow = make(features, transforms=layers, **network, **options)
        return Model(
            flow,
            log_prob=lambda x: flow().log_prob(x),
            sample=lambda n: flow().sample((n,)),
            rsample_and_log_prob=lambda n: flow().rsample_and_log_prob((n,)),
        )

    return build


# Pyro: a layer and a permutation in turn; an autoregressive layer is inverted, so that scoring is its fast direction.


def _pyro(helper: str, inverted: bool, **options: Any) -> Build:
    def build(features: int, hidden: int, layers: int) -> Model:
        import pyro.distributions as dist
        from pyro.distributions import transforms

        make = getattr(transforms, helper)
        parts = [make(features, hidden_dims=[hidden, hidden], **options) for _ in range(layers)]
        stack: list[Any] = []
        for part in parts:
            stack += [
                transforms.Permute(torch.arange(features).flip(0)),
                part.inv if inverted else part,
            ]
        base = dist.Normal(torch.zeros(features), torch.ones(features)).to_event(1)
        flow = dist.TransformedDistribution(base, stack)

        def forget() -> None:
            for part in parts:
                part._cached_x_y = None, None

        def log_prob(x: Tensor) -> Tensor:
            forget()  # what a layer remembers of the last step has the parameters of then
            return flow.log_prob(x)

        def sample(n: int) -> Tensor:
            forget()
            return flow.sample((n,))

        def rsample_and_log_prob(n: int) -> tuple[Tensor, Tensor]:
            forget()
            x = flow.rsample((n,))
            return x, flow.log_prob(x)

        return Model(nn.ModuleList(parts), log_prob, sample, rsample_and_log_prob)

    return build


# Zuko


def _zuko(name: str, **options: Any) -> Build:
    def build(features: int, hidden: int, layers: int) -> Model:
        import zuko.flows

        flow = getattr(zuko.flows, name)(
            features, transforms=layers, hidden_features=(hidden, hidden), **options
        )
        return Model(
            flow,
            log_prob=lambda x: flow().log_prob(x),
            sample=lambda n: flow().sample((n,)),
            rsample_and_log_prob=lambda n: flow().rsample_and_log_prob((n,)),
        )

    return build


# nflows: residual networks of one block; permutations as in its ready-made flows and in the paper on spline flows.


def _nflows_model(flow: Any) -> Model:
    @torch.no_grad()
    def sample(n: int) -> Tensor:
        return flow.sample(n)

    return Model(flow, flow.log_prob, sample, flow.sample_and_log_prob)


def _nflows_realnvp(features: int, hidden: int, layers: int) -> Model:
    from nflows.flows import SimpleRealNVP

    return _nflows_model(SimpleRealNVP(features, hidden, layers, num_blocks_per_layer=1))


def _nflows_maf(features: int, hidden: int, layers: int) -> Model:
    from nflows.flows import MaskedAutoregressiveFlow

    return _nflows_model(MaskedAutoregressiveFlow(features, hidden, layers, num_blocks_per_layer=1))


def _nflows_nsf(coupling: bool) -> Build:
    def build(features: int, hidden: int, layers: int) -> Model:
        from nflows import transforms
        from nflows.distributions import StandardNormal
        from nflows.flows import Flow
        from nflows.nn.nets import ResidualNet
        from nflows.utils import create_alternating_binary_mask

        spline: dict[str, Any] = {"num_bins": BINS, "tails": "linear", "tail_bound": 3.0}

        def layer(number: int) -> Any:
            if not coupling:
                return transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                    features, hidden, num_blocks=1, **spline
                )
            return transforms.PiecewiseRationalQuadraticCouplingTransform(
                create_alternating_binary_mask(features, even=number % 2 == 0),
                lambda ins, outs: ResidualNet(ins, outs, hidden, num_blocks=1),
                **spline,
            )

        stack: list[Any] = []
        for number in range(layers):
            stack += [
                transforms.RandomPermutation(features),
                transforms.LULinear(features, identity_init=True),
            ]
            stack.append(layer(number))
        return _nflows_model(Flow(transforms.CompositeTransform(stack), StandardNormal([features])))

    return build


# normflows: as in its examples. Its affine autoregressive layer samples fast and is turned round here to score fast.


def _normflows(make: Callable[[Any, int, int], list[Any]]) -> Build:
    def build(features: int, hidden: int, layers: int) -> Model:
        import normflows

        stack = [flow for _ in range(layers) for flow in make(normflows, features, hidden)]
        model = normflows.NormalizingFlow(
            normflows.distributions.base.DiagGaussian(features), stack
        )

        @torch.no_grad()
        def sample(n: int) -> Tensor:
            return model.sample(n)[0]

        return Model(model, model.log_prob, sample, model.sample)

    return build


def _normflows_realnvp(nf: Any, features: int, hidden: int) -> list[Any]:
    moves = features // 2
    network = nf.nets.MLP([features - moves, hidden, hidden, 2 * moves], init_zeros=True)
    return [nf.flows.AffineCouplingBlock(network), nf.flows.Permute(features, mode="swap")]


def _normflows_maf(nf: Any, features: int, hidden: int) -> list[Any]:
    layer = nf.flows.MaskedAffineAutoregressive(features, hidden, num_blocks=1)
    return [nf.flows.base.Reverse(layer), nf.flows.LULinearPermute(features)]


def _normflows_nsf_coupling(nf: Any, features: int, hidden: int) -> list[Any]:
    layer = nf.flows.CoupledRationalQuadraticSpline(features, 1, hidden, num_bins=BINS)
    return [layer, nf.flows.LULinearPermute(features)]


def _normflows_nsf_autoregressive(nf: Any, features: int, hidden: int) -> list[Any]:
    layer = nf.flows.AutoregressiveRationalQuadraticSpline(features, 1, hidden, num_bins=BINS)
    return [layer, nf.flows.LULinearPermute(features)]


#: Family -> builder of the layers alone, without linear maps between them: what all libraries' numbers of parameters match.
PLAIN: dict[str, Build] = {
    "realnvp": _pyroflows("RealNVP", mixing=None, mask="half"),
    "maf": _pyroflows("MAF", mixing=None),
    "nsf-coupling": _pyroflows("NSF", coupling=True, bins=BINS, mixing=None),
    "nsf-autoregressive": _pyroflows("NSF", coupling=False, bins=BINS, mixing=None),
}

#: Library -> family -> builder.
BUILDERS: dict[str, dict[str, Build]] = {
    "pyroflows": {
        "realnvp": _pyroflows("RealNVP"),
        "maf": _pyroflows("MAF"),
        "nsf-coupling": _pyroflows("NSF", coupling=True, bins=BINS),
        "nsf-autoregressive": _pyroflows("NSF", coupling=False, bins=BINS),
    },
    "pyro": {
        "realnvp": _pyro("affine_coupling", inverted=False),
        "maf": _pyro("affine_autoregressive", inverted=True),
        "nsf-coupling": _pyro("spline_coupling", inverted=False, count_bins=BINS),
        "nsf-autoregressive": _pyro("spline_autoregressive", inverted=True, count_bins=BINS),
    },
    "zuko": {
        "realnvp": _zuko("RealNVP"),
        "maf": _zuko("MAF"),
        "nsf-coupling": _zuko("NSF", passes=2, bins=BINS),
        "nsf-autoregressive": _zuko("NSF", bins=BINS),
    },
    "nflows": {
        "realnvp": _nflows_realnvp,
        "maf": _nflows_maf,
        "nsf-coupling": _nflows_nsf(coupling=True),
        "nsf-autoregressive": _nflows_nsf(coupling=False),
    },
    "normflows": {
        "realnvp": _normflows(_normflows_realnvp),
        "maf": _normflows(_normflows_maf),
        "nsf-coupling": _normflows(_normflows_nsf_coupling),
        "nsf-autoregressive": _normflows(_normflows_nsf_autoregressive),
    },
}


def missing(library: str) -> str:
    """Return why a library cannot be run, in a sentence; nothing if it can.

    Zuko switches the validation of arguments off for the whole process when it is imported; it is put back here.

    Args:
        library: A key of `BUILDERS`.
    """
    validate = torch.distributions.Distribution._validate_args
    try:
        importlib.import_module(library)
    except ImportError as error:
        return f"{library} is left out, for it cannot be imported ({error}); pip install 'pyroflows[benchmarks]' has it."
    finally:
        torch.distributions.Distribution.set_default_validate_args(validate)
    return ""


def width_of(features: int) -> int:
    """Return the width of pyroflows' networks, to whose number of parameters the others are matched.

    Args:
        features: Columns. Masked networks should not be narrower than their input.
    """
    return WIDTH if features <= WIDTH // 2 else 2 * WIDTH


def matching_width(build: Build, features: int, parameters: int, layers: int = LAYERS) -> int:
    """Return the width with which a model's number of parameters comes nearest to the given one.

    Args:
        build: A builder; its count must grow with the width.
        features: Columns; Pyro's masked networks are never narrower.
        parameters: The number to match.
        layers: Layers.

    Raises:
        ValueError: If no width comes within `TOLERANCE` of it.
    """

    def count(hidden: int) -> int:
        return build(features, hidden, layers).parameters

    low, high = features, features + 1
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    width = min((low, high), key=lambda hidden: abs(count(hidden) - parameters))
    if abs(count(width) - parameters) > TOLERANCE * parameters:
        raise ValueError(
            f"Expected a model of about {parameters} parameters; the nearest has {count(width)}."
        )
    return width
