"""A step of CLIP in every way there is: time, peak memory, forward passes and gradient error.

    python -m benchmarks.peers                                        # both tables of docs/benchmarks.md
    python -m benchmarks.peers --batches 256 --chunks 16 --dropouts 0 --rounds 3

Time is processor time of the one thread as a multiple of the direct step's: all contenders take turns in every round,
each ratio is taken within its round, and the table has the median. Memory is that of all tensors alive at once,
besides the weights and the batch; gradients are part of it. The error is |g - r| / |r| over the weights of the
towers, and in a column of its own for the logit scale, in float32, where r is the gradient of one graph with the
same encoder calls, dropout masks included, as the contender's first pass. One forward pass is the batch through one
tower once.
"""

import argparse
import itertools
from functools import partial

import torch

from benchmarks import contenders
from benchmarks.clips import TINY, Clip
from benchmarks.measuring import (
    Forwards,
    called,
    gradient_errors,
    peak,
    print_table,
    ratio,
    scientific,
    settle,
    times,
)

LENGTH = 16  # tokens of every caption
CONTENDERS: dict[str, contenders.Make] = {
    "direct": contenders.direct,
    "direct, in chunks": contenders.chunked,
    "plain accumulation (another objective)": contenders.accumulation,
    "GradCache 0.0.1": contenders.grad_cache,
    "sentence-transformers": contenders.sentence_transformers,
    "open_clip, accum-freq": contenders.accum_freq,
    "gc_accel, retain=0": partial(contenders.gc_accel, retain=0),
    "gc_accel": partial(contenders.gc_accel, retain=1),
}
Column = dict[str, float]


def measure(clip: Clip, size: int, chunk_size: int, dropout: float, rounds: int) -> dict[str, Column]:
    """By measure and contender."""
    torch.manual_seed(0)
    encoder, batch = clip.encoder(dropout), clip.batch([LENGTH] * size)
    steps = {name: partial(make(encoder, chunk_size), batch) for name, make in CONTENDERS.items()}
    found: dict[str, Column] = {"peak": {}, "error": {}, "scale": {}, "image": {}, "text": {}}
    for name, step in steps.items():
        forwards = Forwards()
        with called(encoder, forwards):
            found["peak"][name] = peak(step, encoder, batch)
        found["image"][name], found["text"][name] = (
            forwards.samples[stream] / size for stream in ("image", "text")
        )
        found["error"][name], found["scale"][name] = gradient_errors(step, encoder, batch, contenders.loss_of)
    taken = times(steps, rounds)
    return found | {"time": {name: ratio(taken, name, "direct") for name in steps}}


def print_size(clip: Clip, size: int, chunks: list[int], dropouts: list[float], rounds: int) -> None:
    """The table of one batch size."""
    cases = list(itertools.product(dropouts, chunks))
    found = {(dropout, chunk): measure(clip, size, chunk, dropout, rounds) for dropout, chunk in cases}
    header = [f"B = {size:,}"]
    header += [f"time, chunk {chunk}" + (f", dropout {rate:g}" if rate else "") for rate, chunk in cases]
    header += [f"MiB, chunk {chunk}" for chunk in chunks]
    header += [f"error, dropout {rate:g}" for rate in dropouts]
    header += [f"of the logit scale, chunk {chunk}" for chunk in chunks]
    header += [f"forwards, chunk {chunk}" for chunk in chunks]
    first = dropouts[0]

    def row(name: str) -> list[str]:
        cells = [name, *(f"{found[case]['time'][name]:.2f}" for case in cases)]
        cells += [f"{found[first, chunk]['peak'][name]:,.1f}" for chunk in chunks]
        cells += [scientific(max(found[rate, chunk]["error"][name] for chunk in chunks)) for rate in dropouts]
        cells += [scientific(found[first, chunk]["scale"][name]) for chunk in chunks]
        both = [[found[first, chunk][stream][name] for stream in ("image", "text")] for chunk in chunks]
        return cells + [" + ".join(f"{count:g}" for count in counts) for counts in both]

    print_table(header, (row(name) for name in CONTENDERS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, nargs="+", default=[7, 3], help="for each of the batches")
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--tiny", action="store_true", help="towers of one layer, to see that it runs")
    args = parser.parse_args()
    settle()
    for size, rounds in zip(args.batches, args.rounds, strict=False):
        print_size(TINY if args.tiny else Clip(), size, args.chunks, args.dropouts, rounds)


if __name__ == "__main__":
    main()
