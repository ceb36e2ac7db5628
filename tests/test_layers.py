"""Imports point downwards only, those for type checking too: every part of the package knows the parts below it."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import gc_accel

PACKAGE = Path(gc_accel.__file__).parent
LAYERS = [  # from the bottom to the top; a folder is one unit
    {"state"},
    {"distributed"},
    {"contracts"},
    {"inputs"},
    {"engine"},
    {"losses", "memory"},
    {"passes"},
    {"accumulation", "differentiable"},
    {"gradient_cache", "encoders", "data"},
    {"pictures", "evaluation", "planning"},
    {"equivalence"},
    {"training"},
    {"programs"},
    {"compat"},
    {"__init__"},
]
LAYER = {unit: height for height, units in enumerate(LAYERS) for unit in units}
ENGINE = {
    "gradient_cache",
    "passes",
    "accumulation",
    "differentiable",
    "engine",
    "memory",
    "distributed",
    "contracts",
}


def unit_of(module: str) -> str:
    """The part of a dotted name below the package."""
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Names that a file imports from this package, inside of functions and for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gc_accel":
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "gc_accel")


def modules() -> dict[str, Path]:
    """All files of the package by their dotted names."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        *folders, name = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(folders if name == "__init__" else [*folders, name])] = path
    return found


def imports() -> dict[str, set[str]]:
    """By module, the modules that it imports."""
    known = modules()

    def module_of(name: str) -> str:
        return name if name in known else name.rpartition(".")[0]

    return {
        module: {module_of(name) for name in imports_of(ast.parse(path.read_text()))} - {module}
        for module, path in known.items()
    }


def test_every_unit_has_a_layer():
    units = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert units == set(LAYER)


def test_at_most_half_a_dozen_files_lie_loose_at_the_top():
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= 6


def test_imports_point_downwards():
    pairs = {(a, b) for a, found in imports().items() for b in found if unit_of(a) != unit_of(b)}
    assert len(pairs) > 100, "few were found"
    assert not [f"{a} imports {b}" for a, b in sorted(pairs) if LAYER[unit_of(b)] >= LAYER[unit_of(a)]]


def test_no_modules_import_each_other_in_a_circle():
    # A folder's __init__ hands on what its files define, which may import one another past it.
    folders = {name for name, path in modules().items() if path.name == "__init__.py"}
    graph = {a: found - folders for a, found in imports().items() if a not in folders}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {error.args[1]}") from None


def test_the_engine_knows_no_loss_and_no_model():
    known = {(a, b) for a, found in imports().items() for b in found if unit_of(a) in ENGINE}
    assert not [pair for pair in known if unit_of(pair[1]) in ("losses", "encoders", "data", "evaluation")]


def test_losses_know_no_engine():
    known = {b for a, found in imports().items() for b in found if unit_of(a) == "losses"}
    assert {unit_of(b) for b in known} <= {"losses", "contracts", "distributed", "state"}
