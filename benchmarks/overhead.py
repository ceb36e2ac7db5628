"""What an engine itself takes of a step: all but calls of the encoder, backward passes and the loss.

    python -m benchmarks.overhead                  # the table of docs/benchmarks.md
    python -m benchmarks.overhead --profile        # which of its functions take it

Seconds of processor time of the one thread, medians over interleaved rounds, retain=1. A call of the encoder is timed
from its first line to its last, a backward pass (the loss's and each chunk's) around `torch.autograd.backward`, the
loss around its forward; the rest of the step is the engine, and so is timing, a microsecond a call.

That rest includes what frees a chunk's graph, which a step without an engine has to do as well. So the same is
measured with towers that do nothing, which leave no graph to speak of: what is left is the engine alone, and its share
is taken of the step with the real towers. GradCache, measured alike, shows how much of it any engine has.
"""

import argparse
import cProfile
import pstats
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import contenders
from benchmarks.clips import DIM, TINY, Clip
from benchmarks.measuring import percent, print_table, settle
from benchmarks.peers import LENGTH
from gc_accel import DualEncoder
from gc_accel.losses import CLIPLoss

CONTENDERS = {"gc_accel": contenders.gc_accel, "GradCache 0.0.1": contenders.grad_cache}


class Parts:
    """Seconds and calls of some functions."""

    def __init__(self) -> None:
        self.seconds, self.calls = defaultdict[str, float](float), Counter[str]()

    def timed(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is added up under a name."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            result = fn(*args, **kwargs)
            self.seconds[name] += time.thread_time() - begin
            self.calls[name] += 1
            return result

        return run


def take(step: Callable[[], Any], encoder: nn.Module) -> tuple[float, Parts]:
    """Seconds of one step, and of its parts."""
    parts = Parts()
    encoder.zero_grad()
    with (
        patch.object(encoder, "forward", parts.timed("encoder", encoder.forward)),
        patch.object(CLIPLoss, "forward", parts.timed("loss", CLIPLoss.forward)),
        patch.object(contenders, "loss_of", parts.timed("loss", contenders.loss_of)),
        patch("torch.autograd.backward", parts.timed("backward", torch.autograd.backward)),
    ):
        begin = time.thread_time()
        step()
        return time.thread_time() - begin, parts


class Hollow(nn.Module):
    """A CLIP whose towers do nothing but give every sample a representation."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.textual = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.ones(DIM))
        self.logit_scale = nn.Parameter(torch.ones(()))

    def get_image_features(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=pixel_values.flatten(1)[:, :DIM] * self.visual)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=input_ids[:, :1] * self.textual)


def measure(clip: Clip, size: int, chunk_size: int, rounds: int) -> Iterator[list[str]]:
    """Rows: seconds of a step, calls, microseconds of the engine per call and its share, twice."""
    batch = clip.batch([LENGTH] * size)
    encoders = {"real": clip.encoder(), "hollow": DualEncoder(Hollow().train())}
    cases = {(name, kind): make for name, make in CONTENDERS.items() for kind in encoders}
    steps = {case: partial(make(encoders[case[1]], chunk_size), batch) for case, make in cases.items()}
    taken: dict[tuple[str, str], list[tuple[float, Parts]]] = {case: [] for case in steps}
    for number in range(rounds + 1):
        for case, step in steps.items():
            found = take(step, encoders[case[1]])
            if number:  # the first round warms up
                taken[case].append(found)
    for name in CONTENDERS:
        whole = median(seconds for seconds, _ in taken[name, "real"])
        calls = taken[name, "real"][0][1].calls["encoder"]
        cells = [name, f"{whole:.2f}", f"{calls}"]
        for kind in encoders:
            engine = median(seconds - sum(parts.seconds.values()) for seconds, parts in taken[name, kind])
            cells += [f"{1e6 * engine / calls:.0f}", percent(engine / whole)]
        yield cells


def profile(clip: Clip, size: int, chunk_size: int) -> None:
    """Prints where the engine's own functions spend their time."""
    encoder, batch = clip.encoder(), clip.batch([LENGTH] * size)
    step = contenders.gc_accel(encoder, chunk_size)
    step(batch)
    profiler = cProfile.Profile(time.thread_time)
    profiler.runcall(step, batch)
    pstats.Stats(profiler).sort_stats("tottime").print_stats("gc_accel|torch/random|_C", 25)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="towers of one layer, to see that it runs")
    args = parser.parse_args()
    settle()
    clip = TINY if args.tiny else Clip()
    if args.profile:
        profile(clip, args.batches[0], args.chunks[0])
        return
    header = [
        "batch",
        "chunk",
        "",
        "seconds",
        "calls of the encoder",
        "engine and freeing, µs a call",
        "of the step",
        "engine alone, µs a call",
        "of the step",
    ]
    cases = [(size, chunk) for size in args.batches for chunk in args.chunks]
    rows = (
        [f"{size:,}", chunk, *row] for size, chunk in cases for row in measure(clip, size, chunk, args.rounds)
    )
    print_table(header, rows)


if __name__ == "__main__":
    main()
