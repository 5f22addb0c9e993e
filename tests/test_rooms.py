"""The rooms of the package: a file imports only from the floors below its own, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import pyroflows

PACKAGE = Path(pyroflows.__file__).parent
#: From the bottom to the top. The leaves are the files pyroflows/_*.py, the face its __init__.py.
FLOORS = [
    "leaves",
    "report",
    "nn",
    "univariate",
    "transforms",
    "distributions",
    "flows",
    "model",
    "guides",
    "sampling",
    "train",
    "posterior",
    "study",
    "testing",
    "face",
    "examples",
    "cli",
]
#: Rooms that may import less than what lies below them.
NARROW = {
    "nn": {"leaves"},
    "report": {"leaves"},
    "univariate": {"leaves", "nn"},
    "model": {"leaves", "report"},
    "examples": set[str](),
}


class Import(NamedTuple):
    """One import, from a module to a module of the package, such as ``flows.flow``."""

    file: str
    line: int
    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.source} imports {self.target}"


def imports_in(file: Path, text: str, modules: set[str]) -> Iterator[Import]:
    """All imports of the package in a source, those within functions and conditions too."""
    source = module_of(file)
    package = file.parent.parts
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            outer = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*outer, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            target = resolve(name, modules)
            if target is not None and target != source:
                yield Import(str(file), node.lineno, source, target)


def resolve(name: str, modules: set[str]) -> str | None:
    """The module in which a dotted name is found: itself, or the one that defines it."""
    root, _, inner = name.partition(".")
    if root != "pyroflows":
        return None
    return inner if inner in modules else inner.rpartition(".")[0]


def module_of(file: Path) -> str:
    parts = file.with_suffix("").parts[1:]
    return ".".join(part for part in parts if part != "__init__")


def room_of(module: str) -> str:
    room = module.partition(".")[0]
    if room == "__main__":
        return "cli"
    return "leaves" if room.startswith("_") else room or "face"


def may_import(source: str, target: str) -> bool:
    if source == target:
        return True
    below = FLOORS[: FLOORS.index(source)]
    return target in NARROW.get(source, set(below))


def circle(imports: list[Import], room: str) -> list[str]:
    """The modules of one room that import each other in a circle, if there are such."""
    graph: dict[str, set[str]] = {}
    for one in imports:
        if room_of(one.source) == room_of(one.target) == room:
            graph.setdefault(one.source, set()).add(one.target)
    return cycle_in(graph)


def cycle_in(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    files = sorted(PACKAGE.rglob("*.py"))
    modules = {module_of(file.relative_to(PACKAGE.parent)) for file in files}
    return [
        one
        for file in files
        for one in imports_in(file.relative_to(PACKAGE.parent), file.read_text(), modules)
    ]


def test_every_room_has_its_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(FLOORS)


def test_no_import_goes_upwards(imports):
    upwards = [
        str(one) for one in imports if not may_import(room_of(one.source), room_of(one.target))
    ]
    assert upwards == []


@pytest.mark.parametrize("room", FLOORS)
def test_no_room_imports_in_a_circle(imports, room):
    assert circle(imports, room) == []


def test_the_package_never_imports_its_benchmarks_or_tests():
    texts = {path: ast.walk(ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")}
    found = [
        f"{path}, line {node.lineno}"
        for path, nodes in texts.items()
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and any(name in ast.unparse(node).split() for name in ("benchmarks", "tests"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("from ..posterior.fit import fit_posterior", "posterior.fit"),
        ("from .. import posterior", "posterior"),
        ("def f():\n    from ..posterior import fit", "posterior.fit"),
        ("if TYPE_CHECKING:\n    from ..posterior.fit import x", "posterior.fit"),
        ("import pyroflows.posterior.fit", "posterior.fit"),
        ("from pyroflows import fit_posterior", ""),
        ("from .auto import AutoFlow", "guides.auto"),
    ],
)
def test_the_reading_of_imports(text, target):
    modules = {"", "posterior", "posterior.fit", "guides.auto"}
    [found] = imports_in(Path("pyroflows/guides/mixture.py"), text, modules)
    assert found.target == target
    assert may_import("guides", room_of(found.target)) == (target == "guides.auto")


def test_a_circle_is_told():
    assert set(cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}}) == []
