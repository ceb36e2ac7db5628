"""Run an example as a person does, and read what it wrote."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
QUICK = ["--num_train_epochs", "1", "--logging_steps", "1", "--use_cpu"]


def launch(script, *arguments, config="cpu.yaml", check=True):
    """Run an example with a launch configuration, within a hard time limit."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [
        str(ROOT / "accelerate_configs" / config),
        str(ROOT / "examples" / script),
        *map(str, arguments),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if sys.platform == "linux":  # a core each, so that examples side by side do not wait for one another
        cores = sorted(os.sched_getaffinity(0))
        core = cores[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % len(cores)]
        command = ["taskset", "--cpu-list", str(core), *command]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert not check or run.returncode == 0, run.stderr[-3000:]
    return run


def run_here(script, *flags, monkeypatch):
    """An example with its command line, in this process, which has imported everything."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)


def metrics(folder):
    return json.loads((folder / "all_results.json").read_text())


def training_log(folder):
    """What was logged of each training step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def assert_drawn(*pictures):
    """Pictures with something on them."""
    for picture in pictures:
        assert np.asarray(Image.open(picture).convert("L")).std() > 5, picture
