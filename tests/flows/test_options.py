"""The options of ready-made flows: their signatures, refusals, and the structures behind them."""

from __future__ import annotations

import copy
import inspect
import pydoc
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from families.sizes import HIDDEN, NET, C, D
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.flows import AutoregressiveFlow, CouplingFlow, FlowOptions, LayeredFlow
from pyroflows.flows.autoregressive import AutoregressiveOptions
from pyroflows.flows.coupling import CouplingOptions
from pyroflows.nn import convnet, mlp
from pyroflows.transforms import LULinear, Permute, Planar, Reverse
from pyroflows.univariate import Affine, Shift, Univariate

READY_MADE: dict[str, type[LayeredFlow]] = {
    name: flow
    for name, flow in vars(pf.flows).items()
    if inspect.isclass(flow)
    and issubclass(flow, LayeredFlow)
    and flow not in (LayeredFlow, CouplingFlow, AutoregressiveFlow)
}
#: Options that make a flow quick to make and score.
QUICK: dict[str, dict[str, Any]] = {"FFJORD": {"solver": "rk4", "steps": 4}}


@pytest.fixture(params=list(READY_MADE))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def flow_class(name: str) -> type[LayeredFlow]:
    return READY_MADE[name]


def parameters(flow: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(flow).parameters)


def same_parameters(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


# Signatures


def test_there_are_seventeen_ready_made_flows():
    assert len(READY_MADE) == 17
    assert READY_MADE.keys() <= set(pf.__all__)


def test_a_signature_spells_out_every_option(flow_class):
    spelt = parameters(flow_class)
    positional, by_keyword = list(spelt)[:2], list(spelt)[2:]
    assert positional == ["features", "context_features"]
    assert all(spelt[option].kind is inspect.Parameter.KEYWORD_ONLY for option in by_keyword)
    shared = list(FlowOptions.__annotations__)
    assert by_keyword[-len(shared) :] == shared
    assert {"context_shape", "transforms"} <= set(by_keyword)


def test_help_and_completion_show_the_options(name, flow_class):
    text = pydoc.plain(pydoc.render_doc(flow_class))
    heading = next(line for line in text.splitlines() if line.startswith(f" |  {name}("))
    for option in parameters(flow_class):
        assert option in heading


def test_defaults_of_a_signature_are_those_in_effect(name, flow_class, device):
    torch.manual_seed(0)
    plain = flow_class(D, **QUICK.get(name, {})).to(device)
    bound = inspect.signature(flow_class).bind(D, **QUICK.get(name, {}))
    bound.apply_defaults()
    torch.manual_seed(0)
    explicit = flow_class(*bound.args, **bound.kwargs).to(device)
    assert repr(plain.transform) == repr(explicit.transform)
    assert same_parameters(plain, explicit)
    assert plain._pyro_name == explicit._pyro_name == name


def test_the_typed_options_are_those_that_structures_take():
    taken = {
        LayeredFlow: FlowOptions,
        CouplingFlow: CouplingOptions,
        AutoregressiveFlow: AutoregressiveOptions,
    }
    own = {"transforms", "fast", "last"}
    for structure, options in taken.items():
        spelt = parameters(structure).values()
        keywords = {p.name for p in spelt if p.kind is inspect.Parameter.KEYWORD_ONLY}
        assert keywords - own == set(options.__annotations__)


def test_a_flow_of_the_users_own_is_spelt_out_too():
    class Small(pf.RealNVP):
        def __init__(self, features: int, *, depth: int = 2, **options: Any) -> None:
            super().__init__(features, transforms=depth, **options)

    class Smaller(Small):
        pass

    assert parameters(Small).keys() >= {"depth", "scale", "mask", "mixing"}
    assert parameters(Smaller) == parameters(Small)
    assert len(Smaller(D, depth=3, mixing=None).transform.layers) == 3
    with pytest.raises(TypeError, match="of the options of Smaller, which are depth, "):
        Smaller(D, widths=3)


# Refusals


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [("hidden_features", "hidden or another"), ("mixin", "mixing or another"), ("zzz", "one")],
)
def test_an_unknown_option_is_named_beside_those_that_exist(wrong: str, hint: str):
    with pytest.raises(TypeError) as caught:
        pf.MAF(D, **{wrong: 1})
    message = str(caught.value)
    assert message.startswith(f"Expected {hint} of the options of MAF, which are transforms, ")
    assert message.endswith(f"; got {wrong!r}.")
    for option in list(parameters(pf.MAF))[2:]:
        assert option in message


def test_options_are_given_by_keyword(flow_class):
    with pytest.raises(TypeError, match="positional"):
        flow_class(D, C, 2)


@pytest.mark.parametrize(
    ("coupling", "option"), [(True, "hidden"), (True, "order"), (False, "network"), (False, "mask")]
)
def test_a_spline_flow_takes_the_options_of_its_structure_alone(coupling: bool, option: str):
    value = {"hidden": (8,), "order": "natural", "network": mlp(), "mask": "half"}[option]
    structure = "CouplingFlow" if coupling else "AutoregressiveFlow"
    with pytest.raises(TypeError, match=f"of the options of {structure}, .*got {option!r}"):
        pf.NSF(D, coupling=coupling, **{option: value})


def test_reversible_is_for_layers_that_are_fast_both_ways(name, flow_class):
    fast = flow_class(D, **QUICK.get(name, {})).transform.fast
    if fast == "both":
        assert flow_class(D, reversible=True).transform.reversible
        return
    with pytest.raises(ValueError, match="Expected reversible=True with transforms fast in both"):
        flow_class(D, reversible=True, **QUICK.get(name, {}))


# Structures


class Scaled(Univariate, nn.Module):
    """A univariate map with a parameter of its own."""

    parameters = 1  # type: ignore[assignment]
    identity = (0.0,)  # type: ignore[assignment]
    linear = True  # type: ignore[assignment]

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward_and_log_det(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = (raw[..., 0, :] + self.log_scale).expand(x.shape)
        return x * log_scale.exp(), log_scale

    def inverse_and_log_det(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = (raw[..., 0, :] + self.log_scale).expand(y.shape)
        return y / log_scale.exp(), -log_scale


def test_ready_made_flows_are_their_structures():
    for flow, structure in [
        (lambda: pf.RealNVP(D, C, **NET), lambda: CouplingFlow(Affine(), D, C, mixing="lu", **NET)),
        (
            lambda: pf.MAF(D, **HIDDEN),
            lambda: AutoregressiveFlow(Affine(), D, mixing="lu", **HIDDEN),
        ),
        (
            lambda: pf.PlanarFlow(D, transforms=3),
            lambda: LayeredFlow([Planar(D) for _ in range(3)]),
        ),
        (
            lambda: pf.NSF(D, C, transforms=2, coupling=False, **HIDDEN),
            lambda: AutoregressiveFlow(
                pf.univariate.RationalQuadraticSpline(8, 3.0),
                D,
                C,
                transforms=2,
                mixing="lu",
                **HIDDEN,
            ),
        ),
    ]:
        torch.manual_seed(0)
        made = flow()
        torch.manual_seed(0)
        assert same_parameters(made, structure())


@pytest.mark.parametrize("structure", [CouplingFlow, AutoregressiveFlow])
def test_each_layer_has_a_univariate_map_of_its_own(structure: Any, device: torch.device):
    univariate = Scaled()
    flow = structure(univariate, 2, transforms=2).to(device)
    own = [p for name, p in flow.named_parameters() if name.endswith("log_scale")]
    assert len(own) == 2 and own[0] is not own[1] and own[0] is not univariate.log_scale


@pytest.mark.parametrize("structure", [CouplingFlow, AutoregressiveFlow])
def test_the_fast_direction_is_chosen(structure: Any):
    univariate = pf.univariate.LogisticMixture(2)
    for fast in ("forward", "inverse"):
        assert structure(univariate, 2, transforms=2, fast=fast).transform.fast == fast
    with pytest.raises(ValueError, match="fast to be"):
        structure(univariate, 2, fast="both")


def test_couplings_take_images_and_contexts_of_their_positions(device: torch.device):
    flow = CouplingFlow(
        Affine(),
        (4, 8, 8),
        context_shape=(1, 8, 8),
        transforms=2,
        network=convnet((8,)),
        tails="loft",
        standardize=True,
    ).to(device)
    flow_of = flow(torch.zeros(5, 1, 8, 8, device=device))
    y = flow_of.sample()
    assert y.shape == (5, 4, 8, 8)
    assert flow_of.log_prob(y).shape == (5,)


def test_a_context_may_have_a_shape(name, flow_class, device: torch.device):
    options = QUICK.get(name, {})
    flow = flow_class(D, context_shape=(2, 3), transforms=1, **options).to(device)
    assert flow.context_shape == (2, 3)
    assert flow(torch.zeros(5, 2, 3, device=device)).batch_shape == (5,)


# Maps between layers, tails, bases


def between(flow: pf.Flow) -> list[Any]:
    return list(flow.transform.layers)[1::2]


@pytest.mark.parametrize(
    ("make", "mixed"),
    [
        (pf.RealNVP, True),
        (pf.MAF, True),
        (pf.NSF, True),
        (lambda n, **options: pf.NSF(n, coupling=False, **options), True),
        (lambda n, **options: pf.NSF(n, spline="circular", **options), False),
        (pf.NICE, False),
        (pf.IAF, False),
    ],
)
def test_what_mixing_stands_for_by_itself(make: Any, mixed: bool):
    flow = make(D, transforms=3)
    assert all(isinstance(layer.inv, LULinear) for layer in between(flow)) == mixed
    assert len(make(D, transforms=3, mixing=None).transform.layers) == 3 + (make is pf.NICE)


def test_maps_between_layers():
    permutations = between(pf.NICE(6, transforms=4, mixing="permute"))[:3]
    assert all(isinstance(layer, Permute) for layer in permutations)
    assert len({tuple(layer.permutation.tolist()) for layer in permutations}) > 1
    own = pf.NICE(D, transforms=3, mixing=Reverse).transform.layers
    assert [type(layer).__name__ for layer in own] == [
        *("Coupling", "Reverse", "Coupling", "Reverse", "Coupling", "Rescale")
    ]


@pytest.mark.parametrize("transforms", [1, 2, 3, 4])
def test_linear_maps_start_at_the_identity_together(transforms: int, device: torch.device):
    flow = pf.RealNVP(4, transforms=transforms, mixing="lu").to(device)
    x = torch.randn(5, 4, device=device)
    torch.testing.assert_close(flow.transform(x), x)


def test_a_flow_tells_the_base_that_it_was_given():
    assert pf.RealNVP(D).given_base is None
    normal = dist.Normal(torch.ones(D), 2.0).to_event(1)
    given = pf.RealNVP(D, base=normal).given_base
    assert isinstance(given, dist.Independent) and given is not normal
    student = pf.RealNVP(D, tails="student").given_base
    assert isinstance(student, pf.distributions.StudentTBase)
    assert pf.NSF(D, spline="circular").given_base is not None


def test_a_flow_survives_copies(name, flow_class):
    flow = flow_class(D, transforms=1, **QUICK.get(name, {}))
    assert same_parameters(flow, copy.deepcopy(flow))


def test_layers_may_be_followed_by_others():
    flow = CouplingFlow(Shift(), D, transforms=2, last=[Reverse(D)], mixing="reverse", tails="loft")
    assert [type(layer).__name__ for layer in flow.transform.layers] == [
        *("Coupling", "Reverse", "Coupling", "Reverse", "LOFT")
    ]


def test_layers_are_transforms():
    with pytest.raises(TypeError, match="Expected transforms to be a sequence of transforms"):
        LayeredFlow(Reverse(D))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected at least one transform"):
        LayeredFlow([])


@pytest.mark.parametrize("option", ["standardize", "reversible"])
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_switches_are_true_or_false(option: str, value: Any):
    with pytest.raises(TypeError, match=f"Expected {option} to be True or False; got {value!r}"):
        pf.RealNVP(3, **{option: value})


def test_channels_share_parameters_or_not():
    with pytest.raises(TypeError, match="Expected per_channel to be True or False; got 3"):
        pf.transforms.Elementwise(Affine(), (2, 3), per_channel=3)


@pytest.mark.parametrize("flow_class", [pf.RealNVP, pf.NSF, pf.NICE])
def test_an_event_without_dimensions_is_told(flow_class: Any):
    with pytest.raises(ValueError, match="Expected features with 1 dimension at least"):
        flow_class(())


@pytest.mark.parametrize("mixing", [lambda: Permute(3), nn.Linear])
def test_a_mixing_of_another_signature_is_told(mixing: Any):
    with pytest.raises(TypeError, match=r"Expected mixing to be called with .features."):
        pf.MAF(3, mixing=mixing)


@pytest.mark.parametrize("last", [3, Permute(3)], ids=["number", "transform"])
def test_layers_that_follow_are_a_sequence(last: Any):
    with pytest.raises(TypeError, match="Expected last to be a sequence of transforms"):
        CouplingFlow(Affine(), 3, last=last)
