"""Peak memory against the batch: what a step takes besides weights and the batch on the host.

    python -m benchmarks.batch_memory                        # the table and the plot of docs/benchmarks.md
    python -m benchmarks.batch_memory --one gc_accel 4096    # MiB of one step, resident and of tensors

Resident memory is the peak of a process of its own beyond what it held before the step, after a step of 256 samples
that allocates what any batch needs; glibc is told to give every block of more than 64 KiB back at once, so that what
is resident is in use. Next to it the tensors alive at once. A small CLIP, so that the batch can be large: images of
32 pixels, captions of 8 tokens, representations of 128 numbers.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import contenders
from benchmarks.clips import DIM, TINY
from benchmarks.measuring import peak, print_table
from gc_accel import GradientCache
from gc_accel.losses import CLIPLoss
from gc_accel.pictures.png import save_png

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "batch_memory.png"
CHUNK, LENGTH, SMALL = 64, 8, 256
EAGER_FREE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
RESIDENT, TENSORS = 0, 1


def of_tiles(encoder: contenders.DualEncoder, chunk_size: int, *, tile_budget: int) -> contenders.Step:
    return GradientCache(encoder, CLIPLoss(tile_budget=tile_budget), chunk_size).forward_backward


CONTENDERS: dict[str, contenders.Make] = {
    "gc_accel": partial(of_tiles, tile_budget=0),
    "gc_accel, 64 MiB of tiles": partial(of_tiles, tile_budget=64 * 2**20),
    "sentence-transformers": contenders.sentence_transformers,
    "GradCache 0.0.1": contenders.grad_cache,
    "direct": contenders.direct,
}
LARGEST = {"GradCache 0.0.1": 8192, "direct": 2048}  # what else a machine of 16 GB does not bear


def resident(what: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at most since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def reset_peak() -> None:
    """Let the largest resident memory be what it is now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, size: int) -> tuple[float, float]:
    """MiB of a step of one contender in this process: resident, and of tensors."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder, batch = TINY.encoder(), TINY.batch([LENGTH] * size)
    make = CONTENDERS[name]
    step = make(encoder, CHUNK)
    step({key: value[:SMALL] for key, value in batch.items()})
    encoder.zero_grad()
    reset_peak()
    before = resident("VmRSS")
    step(batch)
    measured = resident("VmHWM") - before
    return measured, peak(partial(step, batch), encoder, batch)


def measure_apart(name: str, size: int) -> tuple[float, float]:
    """The same, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.batch_memory", "--one", name, str(size)]
    root, environment = Path(__file__).parents[1], os.environ | EAGER_FREE
    run = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=True, timeout=1200
    )
    measured, tensors = map(float, run.stdout.split()[-2:])
    return measured, tensors


def draw(sizes: Sequence[int], found: dict[str, dict[int, tuple[float, float]]], path: Path) -> None:
    """Resident memory over the batch, one line for each contender."""
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    reps = [_representations(size) for size in sizes]
    axes.plot(sizes, reps, "--", color="#888888", label="representations and gradients")
    for name, peaks in found.items():
        axes.plot(list(peaks), [each[RESIDENT] for each in peaks.values()], "o-", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel("batch")
    axes.set_ylabel("peak memory of a step besides the batch, MiB")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    save_png(figure, path)


def _representations(size: int) -> float:
    """MiB of those of both towers and of their gradients."""
    return 2 * 2 * 4 * DIM * size / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "BATCH"))
    parser.add_argument("--batches", type=int, nargs="+", default=[2**n for n in range(8, 15)])
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args()
    if args.one:
        print(*measure(args.one[0], int(args.one[1])))
        return
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for name in CONTENDERS:
        fitting = [size for size in args.batches if size <= LARGEST.get(name, size)]
        found[name] = {size: measure_apart(name, size) for size in fitting}
    header = ["MiB, resident (tensors), at B =", *(f"{size:,}" for size in args.batches)]
    reps = [
        "representations and their gradients",
        *(f"{_representations(size):.1f}" for size in args.batches),
    ]
    rows = [[name, *(_cell(peaks.get(size)) for size in args.batches)] for name, peaks in found.items()]
    print_table(header, [reps, *rows])
    draw(args.batches, found, args.figure)


def _cell(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[RESIDENT]:,.0f} ({pair[TENSORS]:,.0f})"


if __name__ == "__main__":
    main()
