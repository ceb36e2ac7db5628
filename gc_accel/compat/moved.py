"""Modules under the names that they had before they moved: the same objects, without a warning.

`import gc_accel` registers `Moved` once. A module is imported when its old name is first asked for, not before.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FOLDERS = {  # where modules are now, below `gc_accel`, and the names that they had there before
    "compat": ("functional",),
    "data.builtin": ("data.digits", "data.numbers", "data.passages", "data.scans"),
    "data.loading": ("data.loader", "data.plan", "data.streaming"),
    "data.sources": ("data.precomputed", "data.readers", "data.rows", "data.triplets"),
    "engine": ("batch_norm", "encoding", "schedule", "transfer"),
    "inputs": ("packing", "trimming"),
    "losses.kernel": tuple(
        f"losses.{name}"
        for name in ("classes", "eager", "exponentials", "pairs", "sigmoid", "streaming", "tiling")
    ),
    "losses.stateful": tuple(
        f"losses.{name}"
        for name in ("accumulated", "byol", "moco", "momentum", "nnclr", "queue", "simsiam", "swav")
    ),
    "memory": ("retention", "recovery"),
    "programs": ("command_line", "cores", "data.splits"),
    "state": ("modules", "rng"),
}
RENAMED = {
    "chunk_fitting": "memory.fitting",
    "chunk_size": "memory.chunk_sizes",
    "chunking": "inputs.nested",
    "distributed.alignment": "engine.alignment",
    "equivalence.graph": "state.graph",
    "equivalence.joining": "inputs.joining",
    "losses.inputs": "losses.checks",
    "numerics": "engine.checks",
    "planning.table": "planning.report",
    "training.planning": "programs.planning",
}
MOVED = {
    f"gc_accel.{old}": f"gc_accel.{folder}.{old.rpartition('.')[2]}"
    for folder, names in FOLDERS.items()
    for old in names
} | {f"gc_accel.{old}": f"gc_accel.{new}" for old, new in RENAMED.items()}


class Moved(MetaPathFinder, Loader):
    """Finds a module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just given the module the specification of its old name.
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def register() -> None:
    """Let old names be imported from now on."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
