"""The launch configurations: read by accelerate's own loader, and those for the CPU really launched.

`accelerate launch` starts fewer ranks than asked for, or ranks that do not know each other, without an error.
So the launched script says what it found: the world size, the backend, and the sum over all ranks.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[1] / "accelerate_configs"

EXPECTED = {
    "cpu": (DistributedType.NO, "no", 1),
    "ddp_cpu": (DistributedType.MULTI_GPU, "no", 2),
    "single_gpu": (DistributedType.NO, "bf16", 1),
    "multi_gpu": (DistributedType.MULTI_GPU, "bf16", -1),
    "fsdp2": (DistributedType.FSDP, "bf16", -1),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, "bf16", -1),
    "multi_node": (DistributedType.MULTI_GPU, "bf16", 16),
}

SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from gc_accel.programs.command_line import run

def main():
    accelerator = Accelerator(cpu="--cpu" in sys.argv)
    ranks = accelerator.reduce(torch.tensor([accelerator.process_index + 1]))
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "none"
    world, device = accelerator.num_processes, accelerator.device.type
    sys.stdout.write(f"world={world} backend={backend} device={device} sum={int(ranks)}\\n")

run(main)
"""


def test_every_configuration_is_expected_here() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_configuration(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    kind, precision, processes = EXPECTED[name]
    assert (config.distributed_type, config.mixed_precision) == (kind, precision)
    # -1: accelerate asks for --num_processes instead of guessing the number of GPUs.
    assert config.num_processes == processes
    assert config.use_cpu == ("cpu" in name)
    assert (config.num_machines > 1) == (name == "multi_node")


@pytest.mark.parametrize("name", EXPECTED)
def test_the_first_line_says_how_to_launch_it(name: str) -> None:
    first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert re.match(
        rf"# .+: .*accelerate launch --config_file accelerate_configs/{name}\.yaml .*\.py$", first
    )
    asks_for_processes = EXPECTED[name][2] == -1
    assert ("--num_processes" in first) == asks_for_processes


def test_fsdp_is_version_2_and_saves_one_file() -> None:
    config = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert config["fsdp_version"] == 2
    assert config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_deepspeed_is_zero_2_and_leaves_accumulation_to_the_training_arguments() -> None:
    config = load_config_from_file(str(FOLDER / "deepspeed_zero2.yaml")).deepspeed_config
    assert config["zero_stage"] == 2
    assert "gradient_accumulation_steps" not in config


def launch(name: str, tmp_path: Path, *arguments: str, **variables: str) -> list[str]:
    """The lines that the ranks wrote."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # Nothing of an outer launch or of the user's own settings may reach the inner one.
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ACCELERATE_", "MASTER_")) and key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(FOLDER / f"{name}.yaml"),
    ]
    done = subprocess.run(
        [*command, str(script), *arguments],
        env=inherited | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"world=\d+ backend=\w+ device=\w+ sum=\d+", done.stdout)


@pytest.mark.slow
def test_cpu_is_one_process(tmp_path: Path) -> None:
    assert launch("cpu", tmp_path) == ["world=1 backend=none device=cpu sum=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "variables"),
    [([], {"ACCELERATE_USE_CPU": "true"}), (["--cpu"], {})],
    ids=["by the variable", "by the script"],
)
def test_ddp_cpu_is_two_connected_ranks(
    arguments: list[str], variables: dict[str, str], tmp_path: Path
) -> None:
    lines = launch("ddp_cpu", tmp_path, *arguments, **variables)
    assert lines == ["world=2 backend=gloo device=cpu sum=3"] * 2
