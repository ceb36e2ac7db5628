"""A step of this version against one of another version of the package: time, peak memory and forward passes.

    git worktree add ../before COMMIT
    python -m benchmarks.versions ../before                 # the table that a rewrite of the engine is held to

The other version is imported beside this one under another name, and both take turns in every round of one process.
Measures are those of `peers.py`: processor time of the one thread, all tensors alive at once besides weights and batch,
and samples through a tower over those of the batch. The error is the relative distance of the two gradients.
"""

import argparse
import importlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clips import TINY, Clip
from benchmarks.measuring import (
    Forwards,
    called,
    error,
    peak,
    print_table,
    ratio,
    scientific,
    settle,
    times,
)
from benchmarks.peers import LENGTH
from gc_accel import GradientCache, VisionEncoder
from gc_accel.losses import CLIPLoss, NTXentLoss

OTHER = "gc_accel_other"
Step = Callable[[Any], Any]


def other_version(tree: Path) -> Any:
    """The package of another checkout, imported as `gc_accel_other`."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(tree / "gc_accel", folder / OTHER)
    for path in (folder / OTHER).rglob("*.py"):
        path.write_text(re.sub(r"\bgc_accel\b", OTHER, path.read_text()))
    sys.path.insert(0, str(folder))
    return importlib.import_module(OTHER)


def clip_of(clip: Clip, size: int, dropout: float) -> tuple[nn.Module, Any, list[Any]]:
    """An encoder of images and texts, a batch, and the loss of either version."""
    encoder, batch = clip.encoder(dropout), clip.batch([LENGTH] * size)
    return encoder, batch, [CLIPLoss(), importlib.import_module(f"{OTHER}.losses").CLIPLoss()]


def views_of(clip: Clip, size: int, dropout: float) -> tuple[nn.Module, Any, list[Any]]:
    """An encoder of a single stream, likewise."""
    vision = clip.encoder(dropout).model.vision_model
    encoder = VisionEncoder(vision, projection_dim=32).train()
    batch = {"pixel_values": torch.randn(size // 2, 2, 3, clip.side, clip.side)}
    return encoder, batch, [NTXentLoss(0.3), importlib.import_module(f"{OTHER}.losses").NTXentLoss(0.3)]


MODELS = {"CLIP": clip_of, "one stream": views_of}


def measure(
    model: str, clip: Clip, size: int, chunk: int, retain: Any, dropout: float, rounds: int
) -> list[str]:
    """One row: this version over the other."""
    torch.manual_seed(0)
    encoder, batch, losses = MODELS[model](clip, size, dropout)
    caches = [GradientCache, importlib.import_module(OTHER).GradientCache]
    steps: dict[str, Step] = {
        name: cache(encoder, loss, chunk, retain=retain).forward_backward
        for name, cache, loss in zip(("now", "before"), caches, losses, strict=True)
    }
    found: dict[str, tuple[float, float, Tensor]] = {}
    for name, step in steps.items():
        forwards = Forwards()
        with called(encoder, forwards):
            taken = peak(partial(step, batch), encoder, batch)
        encoder.zero_grad()
        torch.manual_seed(1)
        step(batch)
        samples = sum(forwards.samples.values()) / len(next(iter(batch.values())))
        found[name] = (
            taken,
            samples,
            torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]),
        )
    seconds = times({name: partial(step, batch) for name, step in steps.items()}, rounds)
    (bytes_now, samples_now, grad_now), (bytes_before, samples_before, grad_before) = found.values()
    return [
        f"{model}, chunk {chunk}, retain={retain}",
        f"{ratio(seconds, 'now', 'before'):.3f}",
        f"{bytes_now:,.1f} / {bytes_before:,.1f}",
        f"{samples_now:g} / {samples_before:g}",
        scientific(error(grad_now, grad_before)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, help="a checkout of the other version")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="towers of one layer, to see that it runs")
    args = parser.parse_args()
    settle()
    other_version(args.tree)
    clip = TINY if args.tiny else Clip()
    header = [f"B = {args.size:,}", "time", "MiB, now / before", "forwards, now / before", "difference"]
    cases = [(model, chunk, retain) for model in MODELS for chunk in args.chunks for retain in (0, 1, "all")]
    rows = (
        measure(model, clip, args.size, chunk, retain, 0.0, args.rounds) for model, chunk, retain in cases
    )
    print_table(header, rows)


if __name__ == "__main__":
    main()
