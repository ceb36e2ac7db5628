"""Names of modules that have moved still import, as the same objects and without a warning."""

import json
import subprocess
import sys

import pytest

from gc_accel.compat.moved import MOVED

PROGRAM = """
import importlib, json, os, sys, traceback, warnings

import gc_accel  # for the libraries, which take long

for name in [name for name in sys.modules if name.split(".")[0] == "gc_accel"]:
    del sys.modules[name]
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("gc_accel")]
warnings.simplefilter("error")


def check(old, new, names):
    found, expected = importlib.import_module(old), importlib.import_module(new)
    assert found is expected, (found, expected)
    assert found.__name__ == new and found.__spec__.name == new, found.__spec__
    assert importlib.reload(found) is found
    for name in names:
        getattr(found, name)


failed = []
for old, new, names in json.loads(sys.argv[1]):
    assert not [name for name in sys.modules if name.startswith("gc_accel")]
    process = os.fork()
    if not process:
        try:
            check(old, new, names)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        failed.append(old)
sys.exit(f"do not import: {failed}" if failed else 0)
"""
NAMES = {  # public names of the README and of the documents, where they were
    "gc_accel.trimming": ("length_sorted_chunks", "trimming_is_inert", "trim_padding"),
    "gc_accel.packing": ("pack", "images_per_sample"),
    "gc_accel.memory": ("peak_memory_mib", "SavedBytes", "LiveBytes"),
    "gc_accel.functional": ("cached", "cat_input_tensor", "gather_input_tensor"),
    "gc_accel.data.sources": ("load_image_text",),
    "gc_accel.data.triplets": ("TripletDataset", "load_triplets"),
    "gc_accel.losses.momentum": ("MomentumEncoder",),
    "gc_accel.losses.accumulated": ("AccumulatedLoss", "StatefulLoss"),
    "gc_accel.command_line": ("option", "parse", "run"),
}


def in_fresh_processes(modules: list[tuple[str, str, tuple[str, ...]]]) -> None:
    """Import each module under its old name in a process that has not imported the package before."""
    program = [sys.executable, "-c", PROGRAM, json.dumps(modules)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=240)
    assert not done.returncode, done.stderr


@pytest.mark.slow
def test_every_old_name_imports_in_a_fresh_process():
    in_fresh_processes([(old, new, ()) for old, new in MOVED.items()])


def test_public_names_are_where_they_were():
    in_fresh_processes([(old, MOVED.get(old, old), names) for old, names in NAMES.items()])
