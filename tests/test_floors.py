"""The package's floors: an import goes down, never up, and leads in no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import probsym_fast

ROOT = Path(probsym_fast.__file__).parent
FLOORS = (  # a room may import itself and the rooms of the floors before its own
    {"_autocast", "_batch", "_compilers", "_files", "_memory", "_output", "_progress", "_untrusted"},
    {"_checks", "_plots"},
    {"_checkpointing", "_images", "_inputs"},
    {"ops", "data"},
    {"_geometric", "draws"},
    {"batches"},
    {"groups"},
    {"distributions"},
    {"models"},
    {"exporting", "profiling"},
    {"training"},
    {"tasks"},
    {""},  # the package's face
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(x for x in path.relative_to(ROOT).with_suffix("").parts if x != "__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports(name: str) -> set[str]:
    """The modules of the package that this one imports, anywhere in it but for type checkers."""
    found, nodes = set(), [ast.parse(MODULES[name].read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {x.name.partition(".")[2] for x in node.names if x.name.split(".")[0] == "probsym_fast"}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "probsym_fast":
            where = node.module.partition(".")[2]
            inner = {f"{where}.{x.name}".strip(".") for x in node.names}
            found |= {x if x in MODULES else where for x in inner}
    return found - {name}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name):
    room = name.split(".")[0]
    for other in imports(name):
        below = other.split(".")[0]
        assert below == room or FLOOR[below] < FLOOR[room], f"{name} imports {other}"


def test_data_need_the_ground_floor_only():
    wanted = {x.split(".")[0] for name in MODULES if name.split(".")[0] == "data" for x in imports(name)}
    assert wanted <= FLOORS[0] | FLOORS[1] | {"data"}


def test_no_circles():
    assert len(list(TopologicalSorter({name: imports(name) for name in MODULES}).static_order())) == len(MODULES)
