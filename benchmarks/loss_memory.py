"""Peak memory of one forward and backward of a loss, beyond what was there before, by batch size.

    python benchmarks/loss_memory.py                     # the table of docs/benchmarks.md

Each size runs in a process of its own, because resident memory has a peak that never falls.
"""

import argparse
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from gc_accel.losses import CLIPLoss, SigLIPLoss, dense
from gc_accel.memory import peak_memory_mib

DIM = 32
WARM_UP = 256  # allocates what any size needs: threads, buffers of the matrix library


def step(loss_name: str, tile_budget: int, size: int) -> None:
    """Forward and backward on random representations `(size, DIM)`."""
    losses = {"clip": CLIPLoss(tile_budget=tile_budget), "siglip": SigLIPLoss(), "dense": dense.clip_loss}
    image, text = (F.normalize(torch.randn(size, DIM), dim=1).requires_grad_() for _ in range(2))
    loss: Tensor = losses[loss_name](image, text, torch.tensor([10.0], requires_grad=True))
    loss.backward()


def measure(loss_name: str, tile_budget: int, size: int) -> float:
    """Peak in MiB of one step in this process."""
    torch.set_num_threads(1)
    step(loss_name, tile_budget, WARM_UP)
    before = peak_memory_mib(torch.device("cpu"))
    step(loss_name, tile_budget, size)
    return peak_memory_mib(torch.device("cpu")) - before


def measure_apart(loss_name: str, tile_budget: int, size: int) -> float:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--one", loss_name, str(tile_budget), str(size)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    return float(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--one", nargs=3, metavar=("LOSS", "BUDGET", "SIZE"), help="one measurement, as a number"
    )
    args = parser.parse_args()
    if args.one:
        loss, budget, size = args.one
        print(measure(loss, int(budget), int(size)))
        return
    rows = {
        "CLIP, budget 0": ("clip", 0),
        "CLIP, budget 64 MiB": ("clip", 64 * 2**20),
        "SigLIP": ("siglip", 0),
        "dense CLIP": ("dense", 0),
    }
    print("| MiB at B = | " + " | ".join(f"{size:,}" for size in args.sizes) + " |")
    print("|---" * (len(args.sizes) + 1) + "|")
    print("| one B × B matrix | " + " | ".join(f"{size**2 / 2**18:,.0f}" for size in args.sizes) + " |")
    for name, (loss, budget) in rows.items():
        print(
            f"| {name} | " + " | ".join(f"{measure_apart(loss, budget, n):,.0f}" for n in args.sizes) + " |"
        )


if __name__ == "__main__":
    main()
