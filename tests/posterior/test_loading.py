"""Files of posteriors: what may stand in them, and what a damaged or hostile one does."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro.infer.autoguide import AutoNormal

import pyroflows as pf
from pyroflows._archive import SEAL, write_archive
from pyroflows._schema import check_form
from pyroflows._spec import resolve, resolve_class
from pyroflows.model import LogDensity, minibatch
from pyroflows.posterior import loading
from pyroflows.posterior.loading import Saved

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
    return {"format": 5, **posterior._to_plain()}


@cache
def density() -> LogDensity:
    return LogDensity(model)


@pytest.fixture(autouse=True)
def one_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures the model once for all tests."""

    def log_density_of(given: Any, args: Any, kwargs: Any) -> Any:
        same = given is model and not args and not kwargs
        return density() if same else minibatch.log_density_of(given, args, kwargs)

    monkeypatch.setattr(loading, "log_density_of", log_density_of)


def load(tmp_path: Path, **fields: Any) -> pf.Posterior:
    write_archive({**state(), **fields}, str(tmp_path / "x.pt"))
    return pf.load_posterior(tmp_path / "x.pt", model)


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


def test_a_guide_of_many_parts_is_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    network = {"call": "pyroflows.nn.mlp:MLP", "kwargs": {"hidden": (4096,) * 50}}
    hidden = {"hidden": (4096,) * 50, "features": 2, "transforms": 4096}
    for flow in (network, {"call": "pyroflows.flows.autoregressive:MAF", "kwargs": hidden}):
        with pytest.raises(ValueError, match=r"x\.pt' is damaged"):
            load(tmp_path, guide=guide_of(flow))


# What stands in the place of what was written

WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "zero": lambda: 0,
    "negative": lambda: -1,
    "huge": lambda: 10**9,
    "beyond 64 bits": lambda: 10**30,
    "float": lambda: 1e308,
    "nan": lambda: float("nan"),
    "empty string": lambda: "",
    "string": lambda: "x",
    "list": lambda: [],
    "lists": lambda: [[1]],
    "bottomless": lambda: deep_list(200),
    "dictionary": lambda: {},
    "number for a name": lambda: {3: 3},
    "flag": lambda: True,
    "bytes": lambda: b"x",
    "tensor": lambda: torch.zeros(2, 7),
    "scalar": lambda: torch.tensor(1.0),
    "float64": lambda: torch.zeros(2, dtype=torch.float64),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
    "integers": lambda: torch.zeros(2, dtype=torch.int64),
    "stride 0": lambda: torch.zeros(1).as_strided((10**6, 10**6), (0, 0)),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "meta": lambda: torch.zeros(2, device="meta"),
}


def deep_list(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all parts of nested data."""
    if path:
        yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from places(value, (*path, key))
    elif isinstance(data, (list, tuple)):
        for i, value in enumerate(data[:3]):
            yield from places(value, (*path, i))


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested data with another value at a path."""
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = replaced(data[path[0]], path[1:], value)
    return copy if isinstance(data, dict) else type(data)(copy)


def forge(state: Any, path: Path) -> None:
    """Writes a file with a right checksum, of tensors as they are."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path.write_bytes(content + SEAL + hashlib.sha256(content).digest())


@pytest.mark.parametrize("wrong", slow_but_for(list(WRONG)[::3], WRONG))
def test_a_forged_field_is_told_or_loads_something_that_works(wrong: str, tmp_path: Path) -> None:
    path, turn = tmp_path / "x.pt", list(WRONG).index(wrong)
    for field in ("format", *Saved.__annotations__):
        inner = [place for place in places(state()) if place[0] == field]
        place = inner[7 * turn % len(inner)]
        forge(replaced(state(), place, WRONG[wrong]()), path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_told_or_working(path, place)


def test_every_part_of_a_file_is_of_a_declared_kind() -> None:
    fields = {name: value for name, value in state().items() if name != "format"}
    check_form(fields, Saved)
    for place in places(fields):
        forged = replaced(fields, place, b"bytes")
        with pytest.raises(ValueError, match=r"bytes|of type|holds|lacks"):
            check_form(forged, Saved)


def check_told_or_working(path: Path, place: tuple[Any, ...]) -> None:
    try:
        loaded = pf.load_posterior(path, model)
    except ValueError as error:
        told = str(error)
    else:
        told = ""
        repr(loaded)
        loaded.sample(3)
        loaded.save(path)
    named = not told or str(path) in told or "Expected the model of the saved" in told
    assert named and "\n" not in told, (place, told)


def test_a_field_too_many_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"damaged .the posterior holds surplus"):
        load(tmp_path, surplus=1)


def damages(content: bytes, seed: int) -> Iterator[bytes]:
    """What may happen to a file on its way."""
    rng = random.Random(seed)
    for _ in range(500):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
    for size in {0, 1, 4, 100, 512, len(content) // 2, *(len(content) - k for k in range(1, 60))}:
        yield content[:size]
    for more in (b"\0", b"PK", content[-48:], content):
        yield content + more
    yield content[64:128] + content[:64] + content[128:]
    yield content[:-48] + bytes(48)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "x.pt")
    write_archive({"format": 5, "x": torch.arange(3.0), "name": "y"}, path)
    for content in damages(Path(path).read_bytes(), seed=0):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"^Expected the file of a saved posterior; .*x\.pt' "):
            pf.load_posterior(path, model)


def test_members_of_another_file_are_told(tmp_path: Path) -> None:
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    write_archive({**state(), "seconds": 1.0}, str(one))
    write_archive({**state(), "seconds": 2.0}, str(two))
    buffer = io.BytesIO()
    mixed = zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED)
    with zipfile.ZipFile(one) as first, zipfile.ZipFile(two) as second, mixed:
        for name in first.namelist():
            inner = name.partition("/")[2]
            mixed.writestr(name, (second if inner == "data.pkl" else first).read(name))
    one.write_bytes(buffer.getvalue() + one.read_bytes()[-48:])
    with pytest.raises(ValueError, match=r"one\.pt' is damaged .its checksum is wrong"):
        pf.load_posterior(one, model)


@pytest.mark.parametrize("special", ["/dev/zero", "/dev/null", ".", "a\0b", "\ud800"])
def test_what_is_no_file_is_told(special: str) -> None:
    with pytest.raises(
        ValueError, match=r"Expected the file of a saved posterior; .* (cannot be|is none)"
    ):
        pf.load_posterior(special, model)


@pytest.mark.parametrize("special", ["/dev/full", "/dev/null/x", ".", "a\0b", "no/such/x"])
def test_what_cannot_be_written_is_told(special: str, tmp_path: Path) -> None:
    posterior = load(tmp_path)
    with pytest.raises(ValueError, match="Expected a path that can be written; got"):
        posterior.save(special)


def test_an_empty_path_is_told(tmp_path: Path) -> None:
    for act in (load(tmp_path).save, lambda path: pf.load_posterior(path, model)):
        with pytest.raises(ValueError, match=r"Expected path to be the name of a file; got ''\."):
            act("")


# The verdict belongs to the data that it was on


def observed(y: torch.Tensor, scale: float = 1.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


DATA = torch.linspace(-1.0, 2.0, 50)


def nudged() -> torch.Tensor:
    y = DATA.clone()
    y[7] += 1e-6
    return y


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judged") / "x.pt"
    pf.judge(AutoNormal(observed), observed, (DATA,), draws=500).save(path)
    return path


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((DATA,), {}), ((), {"y": DATA.clone()}), ((DATA, 1.0), {}), (None, None)],
    ids=["same", "by name", "default", "of the file"],
)
def test_a_verdict_stays_with_its_data(args: Any, kwargs: Any, judged: Path) -> None:
    loaded = pf.load_posterior(judged, observed, args, kwargs)
    assert loaded.verdict.importance is not None


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((DATA + 1,), {}), ((nudged(),), {}), ((DATA.flip(0),), {}), ((DATA,), {"scale": 2.0})],
    ids=["other", "nudged", "order", "option"],
)
def test_a_verdict_on_other_data_is_left_out(args: Any, kwargs: Any, judged: Path) -> None:
    with pytest.warns(UserWarning, match="not those that the posterior in .*x.pt' was fitted to"):
        loaded = pf.load_posterior(judged, observed, args, kwargs)
    assert not loaded.verdict.ok
    assert "because the model or its data are not those" in loaded.verdict.reason
    assert not loaded.corrects


def test_data_that_a_model_holds_are_known_again(tmp_path: Path) -> None:
    y = DATA.clone()
    pf.judge(AutoNormal(lambda: observed(y)), lambda: observed(y), draws=50).save(tmp_path / "x.pt")
    y += 1
    with pytest.warns(UserWarning, match="The model or its data"):
        loaded = pf.load_posterior(tmp_path / "x.pt", lambda: observed(y))
    assert not loaded.verdict.ok


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_posterior_is_not_pickled(protocol: int) -> None:
    posterior = pf.judge(AutoNormal(model), model, draws=50)
    with pytest.raises(TypeError, match=r"Expected Posterior\.save and pyroflows\.load_posterior"):
        pickle.dumps(posterior, protocol)
    for copied in (copy.copy(posterior), copy.deepcopy(posterior)):
        assert torch.equal(copied.sample(3, seed=0)["x"], posterior.sample(3, seed=0)["x"])


@pytest.mark.parametrize("path", [3, None, ["x"]], ids=repr)
def test_no_path_is_told(path: Any) -> None:
    with pytest.raises(TypeError, match="Expected path to be a path"):
        pf.load_posterior(path, model)


def test_a_model_of_another_support_is_told(tmp_path: Path) -> None:
    def other() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    write_archive(state(), str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match="Expected the model of the saved posterior"):
        pf.load_posterior(tmp_path / "x.pt", other)


def hand_written(name: str = "loc", shape: tuple[int, ...] = (2,)) -> Any:
    def guide() -> None:
        loc = pyro.param(name, torch.zeros(shape)) if name else torch.zeros(2)
        pyro.sample("x", dist.LogNormal(loc + torch.zeros(2), 1.0).to_event(1))

    return guide


@pytest.fixture(scope="module")
def saved_by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "x.pt"
    pf.judge(hand_written(), model, draws=50).save(path)
    return path


@pytest.mark.parametrize(
    "guide",
    [hand_written(""), hand_written("other"), hand_written("loc", ()), "AutoNormal", "AutoFlow"],
    ids=["without", "name", "shape", "AutoNormal", "AutoFlow"],
)
def test_a_guide_with_other_parameters_is_told(guide: Any, saved_by_hand: Path) -> None:
    made = {"AutoNormal": AutoNormal, "AutoFlow": pf.AutoFlow}
    given = made[guide](model) if isinstance(guide, str) else guide
    with pytest.raises(ValueError, match="Expected a guide made as the one saved"):
        pf.load_posterior(saved_by_hand, model, guide=given)


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
