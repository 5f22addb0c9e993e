"""Files of posteriors: what may stand in them, and what a damaged or hostile one does."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyroflows as pf
from pyroflows._spec import resolve, resolve_class
from pyroflows.posterior.files import FIELDS

HARMLESS = [
    "pyroflows.flows.coupling:RealNVP",
    "pyroflows.guides.adapters:VectorGuide",
    "pyroflows.nn.mlp:MLP",
    "torch.nn.modules.activation:SiLU",
    "torch:tanh",
    "torch.nn.functional:relu",
    "pyro.distributions.transforms.affine_autoregressive:affine_autoregressive",
    "pyro.infer.autoguide.guides:AutoNormal",
]
HARMFUL = [
    "os:system",
    "builtins:eval",
    "torch:load",
    "torch:from_file",
    "torch:compile",
    "torch:set_default_dtype",
    "torch:set_default_device",
    "torch:set_num_threads",
    "torch:use_deterministic_algorithms",
    "torch.serialization:load",
    "torch.hub:load",
    "pyroflows.__main__:main",
    "pyroflows.cli:main",
    "pyroflows.cli.options:Options",
    "pyroflows.train.checkpoint:Checkpoint",
    "pyroflows.posterior.posterior:Posterior",
    "pyroflows._spec:importlib.import_module",
    "pyro:clear_param_store",
    "",
    ":",
]


def model() -> None:
    pyro.sample("x", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))


@cache
def state() -> dict[str, Any]:
    posterior = pf.fit_posterior(model, guide=pf.MAF, steps=1, progress=False)
    return {"format": 4, **posterior._to_plain()}


def load(tmp_path: Path, **fields: Any) -> pf.Posterior:
    torch.save({**state(), **fields}, tmp_path / "x.pt")
    return pf.load_posterior(tmp_path / "x.pt", model)


def error_of(action: Callable[[], Any]) -> str:
    """The sentence of a ``ValueError``; an error of another type goes on."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return "none"


def guide_of(flow: Any) -> dict[str, Any]:
    return {"guide": "pyroflows.guides.auto:AutoFlow", "flow": flow}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_file_names_the_parts_of_guides(name: str) -> None:
    assert callable(resolve(name))


@pytest.mark.parametrize("name", HARMFUL)
def test_a_file_names_nothing_else(name: str) -> None:
    with pytest.raises(ValueError, match="of which guides are made"):
        resolve(name)


def test_a_function_is_not_called_in_the_place_of_a_class() -> None:
    with pytest.raises(ValueError, match="another class"):
        resolve_class("torch:tanh", object)


@pytest.mark.parametrize("name", ["torch:tanh", *HARMFUL])
@pytest.mark.parametrize("kind", ["guide", "call", "object", "name", "partial"])
def test_a_hostile_file_calls_nothing(name: str, kind: str, tmp_path: Path) -> None:
    target, kwargs = str(tmp_path / "made"), {"path": str(tmp_path / "made")}
    partial = {"partial": {"name": name}, "args": [target], "kwargs": {}}
    guide = {
        "guide": {"guide": name},
        "call": guide_of({"call": name, "kwargs": kwargs}),
        "object": guide_of({"object": name, "state": kwargs}),
        "name": guide_of({"name": name}),
        "partial": guide_of({"call": "pyroflows.flows:MAF", "kwargs": {"mixing": partial}}),
    }[kind]
    with pytest.raises((ValueError, TypeError), match="Expected"):
        load(tmp_path, guide=guide)
    assert not (tmp_path / "made").exists()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("option", ["transforms", "features", "passes"])
def test_a_file_makes_nothing_larger_than_its_numbers(option: str, tmp_path: Path) -> None:
    flow = {"call": "pyroflows.flows.autoregressive:MAF", "kwargs": {option: 10**9}}
    with pytest.raises(ValueError, match=r"is damaged .its guide has a size of 1000000000"):
        load(tmp_path, guide=guide_of(flow))


@pytest.mark.parametrize("value", [None, 3, "x", [1], {"a": 1}, [[1]], torch.zeros(2)])
@pytest.mark.parametrize("field", ["format", *FIELDS])
def test_a_field_of_another_kind_is_told(field: str, value: Any, tmp_path: Path) -> None:
    message = error_of(lambda: load(tmp_path, **{field: value}).sample(3))
    assert message.startswith("Expected") or message == "none"


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_is_told_or_harmless(seed: int, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    place = int(torch.randint(len(content), (), generator=torch.Generator().manual_seed(seed)))
    content[place] ^= 1 << seed
    (tmp_path / "x.pt").write_bytes(content)
    message = error_of(lambda: pf.load_posterior(tmp_path / "x.pt", model).sample(3))
    assert message.startswith("Expected") or message == "none"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut_is_told(share: float, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"Expected the file of a saved posterior; .* is none\."):
        pf.load_posterior(tmp_path / "x.pt", model)


@pytest.mark.parametrize("path", [3, None, ["x"]], ids=repr)
def test_no_path_is_told(path: Any) -> None:
    with pytest.raises(TypeError, match="Expected path to be a path"):
        pf.load_posterior(path, model)


def test_a_model_of_another_support_is_told(tmp_path: Path) -> None:
    def other() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    torch.save(state(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="Expected the model of the saved posterior"):
        pf.load_posterior(tmp_path / "x.pt", other)


def hand_written(name: str = "loc", shape: tuple[int, ...] = (2,)) -> Any:
    def guide() -> None:
        loc = pyro.param(name, torch.zeros(shape)) if name else torch.zeros(2)
        pyro.sample("x", dist.LogNormal(loc + torch.zeros(2), 1.0).to_event(1))

    return guide


@pytest.mark.parametrize(
    "guide",
    [hand_written(""), hand_written("other"), hand_written("loc", ()), "AutoNormal", "AutoFlow"],
    ids=["without", "name", "shape", "AutoNormal", "AutoFlow"],
)
def test_a_guide_with_other_parameters_is_told(guide: Any, tmp_path: Path) -> None:
    posterior = pf.judge(hand_written(), model, draws=50)
    posterior.save(tmp_path / "x.pt")
    pyro.clear_param_store()
    made = {"AutoNormal": AutoNormal, "AutoFlow": pf.AutoFlow}
    given = made[guide](model) if isinstance(guide, str) else guide
    with pytest.raises(ValueError, match="Expected a guide made as the one saved"):
        pf.load_posterior(tmp_path / "x.pt", model, guide=given)


def test_a_made_flow_is_no_guide() -> None:
    with pytest.raises(TypeError, match=r"AutoFlow\(model, RealNVP\); got a made RealNVP\."):
        pf.judge(pf.RealNVP(2), model)


def test_a_posterior_needs_a_guide() -> None:
    with pytest.raises(TypeError, match=r"Expected guide to be a Guide, .* got int"):
        pf.Posterior(3)


def test_a_pickle_is_no_saved_posterior(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"format": 4}))
    with pytest.raises(ValueError, match="Expected the file of a saved posterior"):
        pf.load_posterior(tmp_path / "x.pt", model)
