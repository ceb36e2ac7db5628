"""Imports point downwards only: every module of the package imports from the layers below its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import gc_accel

PACKAGE = Path(gc_accel.__file__).parent
LAYERS = [  # from the bottom to the top; a package is one unit
    {"packing", "rng", "numerics", "memory", "cores", "command_line", "modules"},
    {"chunking", "batch_norm"},
    {"transfer", "schedule", "trimming"},
    {"encoding"},
    {"distributed"},
    {"losses", "functional", "retention"},
    {"recovery"},
    {"chunk_fitting", "accumulation"},
    {"chunk_size"},
    {"gradient_cache", "encoders", "data"},
    {"pictures", "evaluation", "planning", "compat"},
    {"equivalence"},
    {"training"},
    {"__init__"},
]
LAYER = {unit: height for height, units in enumerate(LAYERS) for unit in units}


def unit_of(module: str) -> str:
    """The part of a dotted name below the package."""
    return module.split(".")[1] if "." in module else "__init__"


def runtime_imports(tree: ast.AST) -> Iterator[str]:
    """Modules of this package that are imported when the code runs, inside of functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gc_accel":
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] == "gc_accel")
        yield from runtime_imports(node)


def imports() -> Iterator[tuple[str, str]]:
    """Pairs of an importing and an imported module."""
    for path in PACKAGE.rglob("*.py"):
        *folders, name = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = ".".join(folders if name == "__init__" else [*folders, name])
        yield from ((module, imported) for imported in runtime_imports(ast.parse(path.read_text())))


def test_every_unit_has_a_layer():
    units = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert units == set(LAYER)


def test_imports_point_downwards():
    pairs = {(a, b) for a, b in imports() if unit_of(a) != unit_of(b)}
    assert len(pairs) > 50, "few were found"
    upwards = [f"{a} imports {b}" for a, b in sorted(pairs) if LAYER[unit_of(b)] >= LAYER[unit_of(a)]]
    assert not upwards


def test_the_engine_knows_no_loss_and_no_model():
    """But for what a loss declares if it needs less than a gradient cache."""
    engine = {
        "gradient_cache",
        "accumulation",
        "encoding",
        "schedule",
        "retention",
        "recovery",
        "chunk_size",
        "chunk_fitting",
    }
    known = {
        b
        for a, b in imports()
        if unit_of(a) in engine and unit_of(b) in ("losses", "encoders", "data", "evaluation")
    }
    assert known == {"gc_accel.losses.stateful.accumulated"}
