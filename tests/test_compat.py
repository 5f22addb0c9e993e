"""The private names of torch and Pyro: what each means today, and that all use goes by one door."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.ops import packed
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.autograd import forward_ad

import pyroflows
from pyroflows import _compat

ROOT = Path(pyroflows.__file__).parent


# One test for each name


def test_without_handlers_no_statement_is_seen():
    with poutine.trace() as around:
        pyro.sample("before", dist.Normal(0.0, 1.0))
        with _compat.without_handlers():
            assert not am_i_wrapped()
            pyro.sample("between", dist.Normal(0.0, 1.0))
        pyro.sample("after", dist.Normal(0.0, 1.0))
    assert {"before", "after"} <= set(around.trace.nodes)
    assert "between" not in around.trace.nodes


def test_active_traces_are_those_around():
    assert _compat.active_traces() == []
    with poutine.trace() as outer, poutine.block(), poutine.trace() as inner:
        assert set(map(id, _compat.active_traces())) == {id(outer.trace), id(inner.trace)}


def test_an_error_knows_its_statement_its_plate_and_its_trace():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError) as caught:
        poutine.trace(model).get_trace()
    assert _compat.message_in(caught.value)["name"] == "y"
    assert "x" in _compat.trace_in(caught.value)
    assert _compat.plate_in(caught.value) is None
    with pytest.raises(ZeroDivisionError) as caught:
        pyro.plate("rows", 0)
    assert _compat.plate_in(caught.value) == ("rows", 0)
    assert _compat.message_in(caught.value) is _compat.trace_in(caught.value) is None


def test_a_view_that_was_taken_without_gradients_is_one_of_its_leaf():
    leaf = torch.zeros((), requires_grad=True)
    with torch.no_grad():
        view = leaf.expand(3)
    assert view.is_leaf  # torch says so
    assert view.requires_grad
    assert _compat.viewed(view) is leaf
    assert _compat.viewed(leaf) is leaf
    own = torch.nn.Parameter(leaf.detach())
    assert _compat.viewed(own) is own


def test_whole_plates_see_all_rows():
    def rows() -> tuple[int, float]:
        with pyro.plate("rows", 10, subsample_size=4) as index:
            return len(index), poutine.trace(_site).get_trace().nodes["x"]["scale"]

    with _compat.whole_plates():
        assert rows() == (10, 1.0)
    assert rows() == (4, 2.5)


def _site() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))


def test_names_of_a_module_are_those_of_its_parameters_in_the_store():
    class Inner(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self) -> str:
            assert self.weight is not None
            return _compat.full_name(self, "weight")

    class Outer(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self) -> str:
            return self.inner()

    pyro.clear_param_store()
    outer = Outer()
    with poutine.trace():
        name = outer()
    assert name == "inner.weight"
    assert _compat.module_name(outer.inner) == "inner"
    assert set(pyro.get_param_store().keys()) == {name}


def test_stored_parameters_are_the_unconstrained_tensors():
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    stored = _compat.stored_parameters()["scale"]
    assert stored is dict(pyro.get_param_store().named_parameters())["scale"]
    assert float(stored.detach().exp()) == pytest.approx(2.0)
    pyro.clear_param_store()


def test_build_guide_makes_the_parameters_of_an_autoguide():
    def model(n: int) -> None:
        with pyro.plate("rows", n):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    guide = AutoNormal(model)
    _compat.build_guide(guide, (3,), {})
    assert {name for name, _ in guide.named_parameters()} == {
        "locs.x_unconstrained",
        "scales.x_unconstrained",
    }
    assert set(guide.plates) == {"rows"}


def test_location_and_scale_of_a_site_of_a_fresh_guide():
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.full((2,), 3.0), 1.0).to_event(1))

    guide = AutoNormal(model, init_loc_fn=pyro.infer.autoguide.init_to_mean, init_scale=0.5)
    guide()
    loc, scale = _compat.location_and_scale(guide, "x")
    torch.testing.assert_close(loc, torch.full((2,), 3.0))
    torch.testing.assert_close(scale, torch.full((2,), 0.5))


def test_init_transform_is_the_callable_that_was_given():
    def make(features: int) -> Any:
        return dist.transforms.affine_autoregressive(features)

    guide = pyro.infer.autoguide.AutoNormalizingFlow(lambda: None, make)
    assert _compat.init_transform_of(guide) is make


def test_dimensions_of_packed_tensors_have_names():
    term = packed.pack(torch.zeros(3, 1, 2), {-1: "a", -3: "b"})
    assert _compat.packed_dims(term) == "ba"
    renamed = _compat.named_dims(torch.zeros(3, 2), "ba")
    assert packed.unpack(renamed, {"a": -1, "b": -3}).shape == (3, 1, 2)


def test_default_validation_is_what_the_setter_sets():
    before = _compat.default_validation()
    try:
        for value in (False, True):
            torch.distributions.Distribution.set_default_validate_args(value)
            assert _compat.default_validation() is value
            assert _compat.validates(torch.distributions.Normal(0.0, 1.0)) is value
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def test_unvalidated_scores_any_value_and_leaves_the_original():
    bounded = dist.Uniform(torch.zeros(2), 1.0, validate_args=True)
    wrapped = dist.Independent(bounded, 1, validate_args=True)
    outside = torch.full((2,), 3.0)
    for distribution in (bounded, wrapped):
        assert _compat.validates(distribution)
        with pytest.raises(ValueError, match="support"):
            distribution.log_prob(outside)
        free = _compat.unvalidated(distribution)
        assert bool((free.log_prob(outside) == -torch.inf).all())
        assert _compat.validates(distribution)
        assert not _compat.validates(free)
    assert _compat.unvalidated(free) is free


def test_transforming_only_within_function_transforms_and_compilation():
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(_compat.transforming())
        return x.sum()

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    torch.func.grad(look)(torch.ones(2))
    look(torch.ones(2))
    assert seen == [False, True, True, False]


def test_in_forward_mode_only_within_a_dual_level():
    assert not _compat.in_forward_mode()
    with forward_ad.dual_level():
        assert _compat.in_forward_mode()
    assert not _compat.in_forward_mode()


def _assign(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


@pytest.mark.parametrize(
    "change",
    [lambda t: t.add_(1), _assign, lambda t: t.requires_grad_()],
    ids=["a write", "an assignment to data", "a flag"],
)
def test_stamp_changes_with_its_tensor(change):
    tensor = torch.zeros(3)
    before = _compat.stamp(tensor)
    assert _compat.stamp(tensor) == before
    change(tensor)
    assert _compat.stamp(tensor) != before


def test_stamp_of_inference_tensors():
    with torch.inference_mode():
        tensor = torch.zeros(3)
    assert _compat.stamp(tensor) == _compat.stamp(tensor)


def test_dtype_of_a_module_is_that_of_its_parameters_or_else_of_its_buffers():
    module = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.ReLU(), nn.Linear(2, 2).double())
    assert _compat.dtype_of(module) == torch.float64
    assert _compat.dtype_of(module[:2]) == torch.float32
    assert _compat.dtype_of(nn.ReLU()) is None


def test_definition_of_a_module_is_all_that_it_holds():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)), nn.ReLU())
    module[2].eval()
    parts = _compat.definition_of(module)
    tensors = {id(part) for part in parts if isinstance(part, Tensor)}
    assert tensors == {id(t) for t in (*module.parameters(), *module.buffers())}
    flags = [part for part in parts if isinstance(part, bool)]
    assert sorted(flags) == sorted(child.training for child in module.modules())


def test_apply_to_module_reaches_parameters_and_buffers():
    module = nn.BatchNorm1d(2)
    assert _compat.apply_to_module(module, lambda t: t.double()) is module
    floating = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float64}


def test_weak_keys_are_told_apart_by_identity_and_let_go():
    mapping = _compat.WeakIdKeyDictionary()
    one, same = torch.ones(2), torch.ones(2)
    mapping[one] = "one"
    assert mapping[one] == "one"
    assert same not in mapping
    gone = weakref.ref(one)
    del one
    assert gone() is None
    assert len(mapping) == 0


def test_make_fx_records_gradients():
    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((x**3).sum(), x)[0]

    graph = _compat.make_fx(slope)(torch.ones(2))
    torch.testing.assert_close(graph(torch.tensor([2.0, 3.0])), torch.tensor([12.0, 27.0]))


def test_recorded_operations_may_read_constants_and_say_so():
    constant = torch.tensor([2.0, 3.0])
    graph = _compat.record_operations(lambda x: x * constant.max().item())(torch.ones(2))
    assert any("_local_scalar_dense" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(torch.ones(2)), torch.full((2,), 3.0))


def test_all_recorded_operations_note_their_shapes_in_one_mode():
    graph = _compat.record_operations(lambda x: x.exp() + x[:2].sum())(torch.ones(3))
    noted = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta]
    assert len(noted) > 3 and len({id(value.fake_mode) for value in noted}) == 1


def test_what_is_batched_and_what_it_holds():
    shared, points = torch.tensor([4.0, 5.0]), torch.tensor([[1.0], [2.0]])
    row = shared[1:]
    found = []

    def look(point: Tensor) -> Tensor:
        found.append((_compat.is_batched(point), _compat.is_batched(shared * 2)))
        found.append((_compat.number_of(point), _compat.number_of(shared)))
        found.append(_compat.array_of(shared + 1).tolist())
        found.append(_compat.storage_of(point) == _compat.storage_of(points))
        found.append(_compat.storage_of(row) == _compat.storage_of(shared))
        return point.sum()

    torch.func.vmap(torch.func.grad(look))(points)
    assert found == [(True, False), (1.0, 4.0), [5.0, 6.0], True, True]
    assert not _compat.is_batched(shared)


def test_functions_of_the_old_style_are_transformed():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.factor = 3.0  # not the slope, to tell this gradient from torch's own
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return ctx.factor * grad

    x = torch.tensor([1.0, 2.0])
    slopes = torch.func.vmap(torch.func.grad(lambda entry: Double.apply(entry)))
    with pytest.raises(RuntimeError, match="setup_context"):
        slopes(x)
    with _compat.functions_of_any_style() as applied:
        assert slopes(x).tolist() == [3.0, 3.0]
        assert applied
    with pytest.raises(RuntimeError, match="setup_context"):
        slopes(x)


def test_parts_of_the_stable_density():
    alpha, zero = torch.tensor([1.7]), torch.zeros(1)
    scored = dist.StableWithLogProb(alpha, zero, 1.0, 0.0)
    value = torch.tensor([0.8])
    integral = _compat.stable_integral(alpha, zero, value).float()
    torch.testing.assert_close(integral, scored.log_prob(value))
    at_zero = _compat.stable_density_at_zero(alpha)
    torch.testing.assert_close(at_zero, scored.log_prob(zero), rtol=1e-4, atol=1e-4)
    ones = torch.ones(1)
    with _compat.stable_density_of(lambda *_: ones, lambda *_: ones):
        assert torch.equal(scored.log_prob(value), ones)
    assert not torch.equal(scored.log_prob(value), ones)


def test_trees_are_taken_apart_and_made_again():
    tree = {"a": torch.ones(2), "b": [torch.zeros(1), 3]}
    leaves, spec = _compat.tree_flatten(tree)
    assert leaves == _compat.tree_leaves(tree) == [tree["a"], tree["b"][0], 3]
    assert _compat.tree_unflatten([1, 2, 3], spec) == {"a": 1, "b": [2, 3]}
    assert _compat.tree_map(type, tree) == {"a": Tensor, "b": [Tensor, int]}
    assert _compat.tree_map_only(Tensor, len, tree) == {"a": 2, "b": [1, 3]}


def test_mask_of_a_masked_distribution():
    mask = torch.tensor([True, False])
    assert _compat.mask_of(dist.Normal(torch.zeros(2), 1.0).mask(mask)) is mask


def test_is_mutating_tells_operations_in_place():
    def write(x: Tensor) -> Tensor:
        return (x + 1).mul_(2)

    graph = _compat.make_fx(write)(torch.ones(2)).graph
    found = {str(node.target): _compat.is_mutating(node.target) for node in graph.nodes}
    assert found["aten.add.Tensor"] is False
    assert found["aten.mul_.Tensor"] is True


def test_many_tensors_are_copied_and_interpolated_in_place():
    targets = [torch.zeros(2), torch.zeros(3)]
    _compat.interpolate_all(targets, [torch.ones(2), torch.ones(3)], 0.25)
    assert [t.tolist() for t in targets] == [[0.25] * 2, [0.25] * 3]
    _compat.copy_all(targets, [torch.ones(2), torch.ones(3)])
    assert [t.tolist() for t in targets] == [[1.0] * 2, [1.0] * 3]


def test_factorisations_tell_by_their_last_result_which_have_failed():
    batch = torch.stack([torch.eye(2), torch.zeros(2, 2)])
    seen = []

    class Recorder(_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for factorise in (torch.linalg.cholesky, torch.linalg.inv):
        with Recorder(), pytest.raises(torch.linalg.LinAlgError):
            factorise(batch)
        operation, check = [f for f in seen if "linalg" in str(f)][-2:]
        assert operation in _compat.FACTORISATIONS_WITH_INFO
        assert check is _compat.ERROR_CHECK
        assert (operation(batch)[-1] != 0).tolist() == [False, True]
    for operation in _compat.FACTORISATIONS_OF_FINITE:
        assert operation.namespace == "aten"


def test_a_site_is_started_as_open_plates_have_made_it():
    started = pyro.infer.autoguide.initialization.InitMessenger(lambda site: site["fn"].mean)
    message = {
        "type": "sample",
        "name": "x",
        "fn": dist.Normal(1.0, 1.0),
        "value": None,
        "done": False,
        "scale": 1.0,
        "mask": None,
    }
    with pyro.plate("n", 3):
        value = _compat.start_in_open_plates(started, message)
    assert value.tolist() == [1.0] * 3
    assert message["value"] is None


# All use goes by one door

#: Modules of torch whose names have no underscore, but which torch does not document.
UNDOCUMENTED = ("torch.fx.experimental", "torch.utils.weak")
#: Hooks of torch's and Pyro's classes that classes of the package override or reach as ``self._x``.
HOOKS = {
    dist.MixtureSameFamily: [
        "_component_distribution",
        "_extended_shape",
        "_mixture_distribution",
    ],
    torch.distributions.Distribution: [
        "_get_checked_instance",
        "_validate_args",
        "_validate_sample",
    ],
    pyro.infer.ELBO: ["_get_trace", "_get_traces"],
    pyro.infer.autoguide.AutoContinuous: [
        "_create_plates",
        "_init_loc",
        "_init_scale",
        "_loc_scale",
        "_setup_prototype",
        "_unpack_latent",
    ],
    nn.Module: [
        "_apply",
        "_buffers",
        "_load_from_state_dict",
        "_modules",
        "_save_to_state_dict",
    ],
    poutine.messenger.Messenger: ["_pyro_sample"],
    torch.distributions.Transform: ["_call", "_inv_call", "_inverse"],
}
#: Hooks that no class has: constructors set them, or handlers look for them by the kind of site.
OF_INSTANCES = {
    "_buffers",
    "_component_distribution",
    "_init_scale",
    "_mixture_distribution",
    "_model",
    "_modules",
    "_pyro_sample",
}
#: Members of the package's own classes, of which one object asks another; torch has the names too.
AMONG_OURSELVES = {"_base", "_inv_call"}
#: Private by their look only, or of Python itself.
OF_PYTHON = {"_replace", "_asdict", "_fields", "_getframe"}


def test_hooks_exist():
    missing = [
        f"{base.__name__}.{name}"
        for base, names in HOOKS.items()
        for name in names
        if name not in OF_INSTANCES and not hasattr(base, name)
    ]
    assert missing == []
    modules = nn.Module()
    assert modules._buffers == modules._modules == {}


def test_private_names_of_torch_and_pyro_are_used_in_one_place():
    own = set().union(*(_defined(tree) for _, tree in _sources()))
    offences = [
        f"{path}, line {line}: {use}"
        for path, tree in _sources()
        if path.name != "_compat.py"
        for line, use in _offences(tree, own, _foreign())
    ]
    assert offences == []


@pytest.mark.parametrize(
    "source",
    [
        "from pyro.poutine.runtime import _PYRO_STACK",
        "import torch._dynamo",
        "from torch.utils.weak import WeakTensorKeyDictionary",
        "store._params",
        "torch._C._functorch",
        "fn._validate_args = False",
        "getattr(fn, '_validate_args', False)",
        "self._cudagraphs",
        "module._parameters.values()",
        "term._pyro_dims = dims",
    ],
)
def test_the_reading_of_sources_sees(source):
    assert list(_offences(ast.parse(source), set(), _foreign()))


@pytest.mark.parametrize(
    "source",
    [
        "self._call(x)",
        "super()._apply(fn)",
        "self._own",
        "other._own",
        "point._replace(x=1)",
        "x.__dict__",
    ],
)
def test_the_reading_of_sources_lets_pass(source):
    assert list(_offences(ast.parse(source), {"_own"}, _foreign())) == []


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT.parent), ast.parse(path.read_text())


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.Module) -> set[str]:
    """Private members that a source gives to objects: in the bodies of classes or by assignment."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    names.add(member.name)
                targets = getattr(member, "targets", [getattr(member, "target", None)])
                names.update(target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return set(filter(_is_private, names))


def _foreign() -> set[str]:
    """Private members of torch's and Pyro's classes that the package's classes descend from."""
    bases: set[Any] = {Tensor, ParamStoreDict, pyro.poutine.subsample_messenger.SubsampleMessenger}
    for module in pkgutil.walk_packages(pyroflows.__path__, "pyroflows."):
        if not module.name.endswith("__main__"):
            for value in vars(importlib.import_module(module.name)).values():
                bases.update(value.__mro__ if isinstance(value, type) else ())
    foreign = {base for base in bases if base.__module__.split(".")[0] in ("torch", "pyro")}
    return set(filter(_is_private, set().union(*map(dir, foreign))))


def _offences(tree: ast.Module, own: set[str], foreign: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            modules = []
        yield from ((node.lineno, f"import of {name}") for name in modules if _is_inner(name))
        if isinstance(node, ast.Attribute) and not _is_allowed(node.value, node.attr, own, foreign):
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "hasattr",
            "setattr",
        ):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if not _is_allowed(node.args[0], name, own, foreign):
                yield node.lineno, ast.unparse(node)


def _is_inner(module: str) -> bool:
    parts = module.split(".")
    if parts[0] not in ("torch", "pyro"):
        return False
    return any(map(_is_private, parts)) or module.startswith(UNDOCUMENTED)


def _is_allowed(value: ast.expr, name: str, own: set[str], foreign: set[str]) -> bool:
    if not _is_private(name) or name in OF_PYTHON | AMONG_OURSELVES:
        return True
    if _is_own_object(value):
        return name in own or name in OF_INSTANCES.union(*HOOKS.values())
    return name in own - foreign and not name.startswith("_pyro")


def _is_own_object(value: ast.expr) -> bool:
    return ast.unparse(value) in ("self", "cls", "super()")
