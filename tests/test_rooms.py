"""The rule of the rooms: a folder imports only from those below it, beside it nothing, and no import goes in a circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import wina_convert

PACKAGE = Path(wina_convert.__file__).parent
FLOORS = [{"ground"}, {"format"}, {"runtime"}, {"models", "fitting"}, {"conversion", "verbs", "serving"}, {"cli"}]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in PACKAGE.rglob("*.py")
}
FACE = ("", "__main__")  # the package itself opens doors to all rooms; what others import of it is its version


def room(module: str) -> str:
    return module.partition(".")[0] if (PACKAGE / module.partition(".")[0]).is_dir() and module else "ground"


def floor(module: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room(module) in rooms)


def imported(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it."""
    path = MODULES[module]
    home = ["wina_convert", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{full}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            full, names = "", [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            inside = name.removeprefix("wina_convert.") if name.startswith("wina_convert.") else None
            if inside in MODULES:
                yield inside
            elif full.startswith("wina_convert"):
                yield full.removeprefix("wina_convert").removeprefix(".")


def test_every_module_is_in_a_room():
    assert {room(module) for module in MODULES} == set().union(*FLOORS)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in FACE])
def test_a_module_imports_from_its_own_room_and_from_below_only(module: str):
    others = {other for other in imported(module) if room(other) != room(module)}
    assert {other for other in others if floor(other) >= floor(module)} == set()


def test_no_import_goes_in_a_circle():
    graph = {module: {other for other in imported(module) if other not in FACE} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # raises where there is a circle
    assert sum(map(len, graph.values())) > len(MODULES)


def test_no_file_is_longer_than_one_reads():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.name: length for path, length in lengths.items() if length > 400} == {}
