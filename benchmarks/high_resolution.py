"""Images of 1024 x 1024: memory of a step against its chunk, measured here, and which chunk to take, computed.

    python -m benchmarks.high_resolution --measure     # the steps: table and docs/figures/high_resolution.png
    python -m benchmarks.high_resolution --advise      # ViT-S/B/L at three resolutions on four sizes of memory

Measured is a step of a batch of 256 images, SupCon with one view, a tiny ViT with patch 32 (1,025 tokens, width 192,
two layers), on the CPU in float32, each in a process of its own, as `benchmarks/planning.py` does. Steps that are
already in the output folder are not taken again. Nothing of the second table was run.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from transformers import ViTConfig, ViTModel

from benchmarks.planning import EAGER_FREE, reset_peak, resident
from gc_accel import GradientCache, VisionEncoder
from gc_accel.losses import SupConLoss
from gc_accel.memory.budget import OPTIMIZER_COPIES
from gc_accel.planning import plan
from gc_accel.planning.dry_run import DryRun
from gc_accel.planning.plan import Room, suggest
from gc_accel.planning.step import StepCost

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "high_resolution.png"
SIDE, BATCH, CLASSES = 1024, 256, 16
CHUNKS = [4, 16, 64]
STATISTICS = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
WIDTHS = {
    "ViT-S/16": (384, 12, 6),
    "ViT-B/16": (768, 12, 12),
    "ViT-L/16": (1024, 24, 16),
}  # width, layers, heads
SIDES, MEMORY = [224, 512, 1024], [8, 16, 24, 80]
ADVISED_BATCH = 4096
GIB = 2**30


def encoder_of(
    width: int, layers: int, heads: int, *, side: int, patch: int, checkpointing: bool
) -> VisionEncoder:
    """A ViT of one resolution behind a head, on torch's default device."""
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=patch,
    )
    encoder = VisionEncoder(ViTModel(config), **STATISTICS).train()
    if checkpointing:
        encoder.gradient_checkpointing_enable()
    return encoder


def tiny(checkpointing: bool) -> VisionEncoder:
    return encoder_of(192, 2, 3, side=SIDE, patch=32, checkpointing=checkpointing)


def images(count: int, side: int = SIDE) -> dict[str, Tensor]:
    """As a collator gives them, with classes."""
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    return {"pixel_values": pixels, "labels": torch.arange(count) % CLASSES}


def take_step(batch_size: int, chunk_size: int, checkpointing: bool) -> None:
    encoder = tiny(checkpointing)
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    for parameter in encoder.parameters():  # so that the optimizer has its state before the step
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    GradientCache(encoder, SupConLoss(), chunk_size).forward_backward(images(batch_size))
    optimizer.step()


def measure(chunk_size: int, checkpointing: bool) -> dict[str, float]:
    """One step in this process: bytes beyond what it held before, and seconds of processor time."""
    torch.set_num_threads(1)
    take_step(2, 1, checkpointing)
    gc.collect()
    reset_peak()
    before, begin = resident("VmRSS"), time.process_time()
    take_step(BATCH, chunk_size, checkpointing)
    return {"measured": resident("VmHWM") - before, "seconds": time.process_time() - begin}


def measured_apart(folder: Path, chunk_size: int, checkpointing: bool) -> dict[str, float]:
    """The same from a fresh process, or from the folder."""
    result = folder / f"chunk{chunk_size}_{'checkpointed' if checkpointing else 'plain'}.json"
    if not result.exists():
        command = [
            sys.executable,
            "-m",
            "benchmarks.high_resolution",
            "--one",
            str(chunk_size),
            str(int(checkpointing)),
        ]
        run = subprocess.run(command, env=os.environ | EAGER_FREE, capture_output=True, text=True, check=True)
        folder.mkdir(parents=True, exist_ok=True)
        result.write_text(run.stdout.splitlines()[-1])
    return json.loads(result.read_text())


def computed(chunk_size: int, checkpointing: bool) -> int:
    """Bytes of the step by the planner; with a chunk of the whole batch, of one without a cache."""
    retain: Any = "all" if chunk_size == BATCH else 1
    encoder, sample = tiny(checkpointing), images(1)
    return plan(encoder, sample, BATCH, memory=1, chunk_size=chunk_size, retain=retain).peak


def print_measured(folder: Path, chunks: list[int]) -> None:
    """The table of steps, and the plot."""
    measured: dict[bool, dict[int, float]] = {False: {}, True: {}}
    forecast: dict[bool, dict[int, float]] = {False: {}, True: {}}
    print(
        "| chunk | checkpointing | measured, GiB | computed, GiB | processor minutes |\n|---|---|---|---|---|"
    )
    for checkpointing, answer in ((False, "no"), (True, "yes")):
        for chunk in (*chunks, BATCH):
            forecast[checkpointing][chunk] = computed(chunk, checkpointing) / GIB
            cells = ["not run", f"{forecast[checkpointing][chunk]:.2f}", ""]
            if chunk != BATCH:
                step = measured_apart(folder, chunk, checkpointing)
                measured[checkpointing][chunk] = step["measured"] / GIB
                cells = [f"{step['measured'] / GIB:.2f}", cells[1], f"{step['seconds'] / 60:.1f}"]
            print(f"| {chunk} | {answer} | {' | '.join(cells)} |", flush=True)
    draw(measured, forecast)


def draw(measured: dict[bool, dict[int, float]], forecast: dict[bool, dict[int, float]]) -> None:
    """Peak memory over the chunk: measured as dots, computed as lines, up to the step without a cache."""
    figure = Figure(figsize=(6, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for checkpointing, name in ((False, "without checkpointing"), (True, "with checkpointing")):
        (line,) = axes.plot(*zip(*forecast[checkpointing].items(), strict=True), label=f"computed, {name}")
        dots = zip(*measured[checkpointing].items(), strict=True)
        axes.plot(*dots, "o", color=line.get_color(), label=f"measured, {name}")
    ticks = [2**power for power in range(9)]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_yticks(ticks[:5], map(str, ticks[:5]))
    axes.set_xlabel(f"images of {SIDE} x {SIDE} in a chunk; {BATCH} is the step without a cache")
    axes.set_ylabel("peak memory, GiB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FIGURE)
    print(f"Plot: {FIGURE}")


def print_advice(checkpointing: bool) -> None:
    """What to take for a batch of 4,096 images on one GPU: bf16, AdamW. Computed, all of it."""
    headings = " | ".join(f"{memory} GB" for memory in MEMORY)
    print(f"\n| {'with' if checkpointing else 'without'} checkpointing | {headings} |")
    print("|---" * (len(MEMORY) + 1) + "|")
    for name, (width, layers, heads) in WIDTHS.items():
        for side in SIDES:
            with torch.device("meta"):
                encoder = encoder_of(width, layers, heads, side=side, patch=16, checkpointing=checkpointing)
            run = DryRun(encoder, images(1, side), torch.device("cpu"), torch.bfloat16)
            step = StepCost(run, ADVISED_BATCH, 1, OPTIMIZER_COPIES, torch.device("cuda"))
            found = (suggest(step, Room(memory * GIB)) for memory in MEMORY)
            cells = (f"{chunk}, {retain}" if chunk else "does not fit" for chunk, retain in found)
            print(f"| {name} at {side} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--advise", action="store_true")
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/high_resolution"))
    parser.add_argument(
        "--one", nargs=2, metavar=("CHUNK", "CHECKPOINTING"), help="one step, in this process"
    )
    args = parser.parse_args()
    if args.one:
        chunk, checkpointing = args.one
        print(json.dumps(measure(int(chunk), checkpointing == "1")))
    if args.measure:
        print_measured(args.output_dir, args.chunks)
    if args.advise:
        for checkpointing in (False, True):
            print_advice(checkpointing)


if __name__ == "__main__":
    main()
