"""How programs end."""

import runpy
import time

import pytest
import torch.distributed as dist

from gc_accel.programs import command_line
from gc_accel.programs.command_line import LAST_WORKS, run
from tests.launching import ROOT


def test_threads_of_gloo_get_the_interpreter_before_it_goes(tmp_path, monkeypatch):
    calls = []

    def main():
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
        calls.append("main")

    monkeypatch.setattr(time, "sleep", lambda seconds: calls.append((seconds, dist.is_initialized())))
    run(main)
    assert calls == ["main", (LAST_WORKS, False)]


def test_one_process_does_not_wait(monkeypatch):
    calls = []
    monkeypatch.setattr(time, "sleep", calls.append)
    run(lambda: calls.append("main"))
    assert calls == ["main"]


@pytest.mark.parametrize("script", ["clip_train.py", "vision_train.py", "dense_retrieval.py"])
def test_an_example_that_gathers_ends_so(monkeypatch, script):
    programs = []
    monkeypatch.setattr(command_line, "run", programs.append)
    monkeypatch.syspath_prepend(ROOT / "examples")
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert [main.__name__ for main in programs] == ["main"]
