"""The planner's forecast against what a step takes: peak memory on the CPU, each step in a process of its own.

    python benchmarks/planning.py                                    # the table
    python benchmarks/planning.py --one vit 64 8 1                   # model, batch, chunk, retain

Measured is the peak of resident memory beyond what the process holds after its imports and a first small step:
weights, AdamW's state, a batch, and two steps. So that resident memory is memory in use, glibc is told to give
every block of more than 64 KiB back as soon as it is free (MALLOC_MMAP_THRESHOLD_); `--malloc default` leaves it
as it is, and the forecast is then exceeded by what glibc keeps for later.
"""

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from transformers import CLIPModel, ViTConfig, ViTModel

from gc_accel import DualEncoder, GradientCache, VisionEncoder
from gc_accel.data import image_statistics, numbers_config, numbers_processor
from gc_accel.losses import CLIPLoss, NTXentLoss
from gc_accel.planning import plan

Batch = dict[str, Tensor]
EAGER_FREE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CASES = [
    ("clip", 1024, 64, "0"),
    ("clip", 1024, 128, "1"),
    ("clip", 512, 128, "all"),
    ("vit", 64, 2, "1"),
    ("vit", 64, 8, "0"),
    ("vit", 64, 8, "3"),
    ("resnet", 32, 2, "0"),
    ("resnet", 32, 4, "1"),
    ("resnet", 32, 8, "2"),
]


def clip() -> tuple[nn.Module, nn.Module, Callable[[int], Batch]]:
    """The built-in CLIP of examples/clip_train.py."""
    mean, std = image_statistics(numbers_processor())

    def batch(size: int) -> Batch:
        pixels = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8)
        ids = torch.randint(3, 20, (size, 15))
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return DualEncoder(CLIPModel(numbers_config()), image_mean=mean, image_std=std), CLIPLoss(), batch


def views(size: int) -> Batch:
    """Two views of 224 x 224 as the collator gives them."""
    return {"pixel_values": torch.randint(0, 256, (size, 2, 3, 224, 224), dtype=torch.uint8)}


STATISTICS = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}


def vit() -> tuple[nn.Module, nn.Module, Callable[[int], Batch]]:
    """ViT-S/16 with four of its twelve layers."""
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=1536,
        hidden_dropout_prob=0.1,
    )
    return VisionEncoder(ViTModel(config), **STATISTICS), NTXentLoss(), views


def resnet() -> tuple[nn.Module, nn.Module, Callable[[int], Batch]]:
    """ResNet-18, whose BatchNorm the cache freezes."""
    return VisionEncoder(timm.create_model("resnet18", num_classes=0), **STATISTICS), NTXentLoss(), views


MODELS = {"clip": clip, "vit": vit, "resnet": resnet}


def resident(what: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the start or `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def reset_peak() -> None:
    """Let the largest resident memory be what it is now."""
    Path("/proc/self/clear_refs").write_text("5")


def take_steps(name: str, batch_size: int, chunk_size: int, retain: int | str, steps: int = 2) -> None:
    """Build everything and train for some steps."""
    encoder, loss, batch_of = MODELS[name]()
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    cache = GradientCache(encoder.train(), loss, chunk_size, retain=retain, batch_norm="frozen")
    batch = batch_of(batch_size)
    for _ in range(steps):
        cache.forward_backward(batch)
        optimizer.step()
        optimizer.zero_grad()


def measure(name: str, batch_size: int, chunk_size: int, retain: int | str) -> tuple[int, int]:
    """Bytes measured, and bytes forecast, in this process."""
    torch.set_num_threads(1)
    take_steps(name, 2, 1, 0, steps=1)
    gc.collect()
    reset_peak()
    before = resident("VmRSS")
    take_steps(name, batch_size, chunk_size, retain)
    measured = resident("VmHWM") - before
    encoder, _, batch_of = MODELS[name]()
    forecast = plan(encoder, batch_of(2), batch_size, memory=1, chunk_size=chunk_size, retain=retain).peak
    return measured, forecast


def measure_apart(*case: object, malloc: str = "eager") -> tuple[int, int]:
    """The same, from a fresh process."""
    environment = os.environ | (EAGER_FREE if malloc == "eager" else {})
    command = [sys.executable, __file__, "--one", *map(str, case)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    measured, forecast = run.stdout.split()[-2:]
    return int(measured), int(forecast)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "BATCH", "CHUNK", "RETAIN"))
    parser.add_argument("--malloc", choices=["eager", "default"], default="eager")
    args = parser.parse_args()
    if args.one:
        name, batch_size, chunk_size, retain = args.one
        kept = retain if retain == "all" else int(retain)
        print(*measure(name, int(batch_size), int(chunk_size), kept))
        return
    print("| model | batch | chunk | retain | measured, MiB | computed, MiB | computed / measured |")
    print("|---" * 7 + "|")
    for case in CASES:
        measured, forecast = measure_apart(*case, malloc=args.malloc)
        name, batch_size, chunk_size, retain = case
        cells = f"{measured / 2**20:,.0f} | {forecast / 2**20:,.0f} | {forecast / measured:.2f}"
        print(f"| {name} | {batch_size:,} | {chunk_size} | {retain} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
