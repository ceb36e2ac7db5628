"""The same program on GradCache 0.0.1 and on its drop-in: how many times faster it is with the import changed.

    python -m benchmarks.compat

A step of CLIP, processor time of the one thread; both take turns in every round, each ratio is taken within its
round, the table has quartiles and medians. In theory n / (n - 1/4) with n chunks in all, as the chunk that keeps its
graph saves one of four passes.
"""

import argparse
from functools import partial

import torch

from benchmarks import contenders
from benchmarks.clips import Clip
from benchmarks.measuring import print_table, ratios, settle, spread, times
from gc_accel.compat.grad_cache import GradCache

LENGTH = 77  # tokens of every caption
EVEN = Clip(image=(128, 3), text=(64, 3))  # towers that take about as long as each other


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settle()
    encoder, batch = EVEN.encoder(), EVEN.batch([LENGTH] * args.batch)
    rows = []
    for size in args.chunks:
        published = contenders.grad_cache(encoder, size)
        drop_in = contenders.grad_cache(encoder, size, GradCache)
        steps = {"published": partial(published, batch), "drop-in": partial(drop_in, batch)}
        times(steps, 1)
        low, middle, high = spread(ratios(times(steps, args.rounds), "published", "drop-in"))
        chunks = 2 * -(-args.batch // size)
        rows.append(
            (size, chunks, f"{chunks / (chunks - 0.25):.3f}", f"{low:.3f}", f"{middle:.3f}", f"{high:.3f}")
        )
    print_table(("chunk", "chunks in all", "theory", "lower quartile", "median", "upper quartile"), rows)


if __name__ == "__main__":
    main()
