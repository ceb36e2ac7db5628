"""Captions of realistic length: what sorting by length and trimming saves of a text tower, and of CLIP.

    python -m benchmarks.captions                  # the tables and the plot of docs/benchmarks.md
    python -m benchmarks.captions --counts         # tokens alone, a few seconds

Lengths are drawn as `clips.py` says. A batch comes padded to its longest caption, as a processor hands it over, and
the ways differ in what they make of it:

    GradCache, direct         encode it as it is
    sentence-transformers     cuts chunks in the order of the batch, each trimmed to its longest
    gc_accel                  `length_sorted_chunks`, as part of the step: sorted, cut, trimmed

The text tower alone trains against image representations that are given. Time and memory are measured as in
`peers.py`, times relative to gc_accel. Tokens are those of one pass over the batch, padding included.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure

from benchmarks import contenders
from benchmarks.clips import DIM, TINY, Batch, Clip, caption_lengths
from benchmarks.measuring import (
    Forwards,
    called,
    error,
    gradients,
    peak,
    print_table,
    ratio,
    ratios,
    scientific,
    settle,
    spread,
    times,
)
from gc_accel import DualEncoder
from gc_accel.pictures.png import save_png

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "captions.png"
CONTENDERS: dict[str, contenders.Make] = {
    "direct, padded to the batch": contenders.direct,
    "GradCache 0.0.1, padded to the batch": contenders.grad_cache,
    "sentence-transformers": contenders.sentence_transformers,
    "gc_accel, padded to the batch": contenders.gc_accel,
    "gc_accel": contenders.gc_accel_sorted,
}
DIRECT, *_, OURS = CONTENDERS


def widths(lengths: Sequence[int], chunk_size: int) -> list[int]:
    """The longest of each chunk, in the order given."""
    return [max(lengths[i : i + chunk_size]) for i in range(0, len(lengths), chunk_size)]


def tokens(lengths: Sequence[int], chunk_size: int) -> tuple[int, int, int, int]:
    """Of one pass: without padding, sorted, in the order of the batch, padded to the batch."""
    ordered, as_is = (chunk_size * sum(widths(each, chunk_size)) for each in (sorted(lengths), lengths))
    return sum(lengths), ordered, as_is, len(lengths) * max(lengths)


def print_counts(size: int, chunks: Sequence[int], sigmas: Sequence[float], draws: int = 20) -> None:
    """Tokens per caption by spread and chunk, means over draws."""

    def row(sigma: float, chunk: int) -> list[str]:
        found = [tokens(caption_lengths(size, sigma=sigma), chunk) for _ in range(draws)]
        bare, ordered, as_is, padded = (mean(each) / size for each in zip(*found, strict=True))
        cells = [f"{each:.1f}" for each in (bare, ordered, as_is, padded)]
        return [f"{sigma}", f"{chunk}", *cells, f"{as_is / ordered:.2f}", f"{padded / ordered:.2f}"]

    header = ["sigma", "chunk", "tokens", "sorted", "in order", "padded to the batch"]
    header += ["in order / sorted", "padded / sorted"]
    print_table(header, (row(sigma, chunk) for sigma in sigmas for chunk in chunks))


def text_alone(clip: Clip, lengths: Sequence[int]) -> tuple[DualEncoder, Batch]:
    """The image tower is frozen, and its representations are in the batch."""
    batch = clip.batch(lengths)
    del batch["pixel_values"]
    embeds = torch.nn.functional.normalize(torch.randn(len(lengths), DIM), dim=1)
    return clip.encoder(freeze=("image",)), {"image_embeds": embeds} | batch


def whole(clip: Clip, lengths: Sequence[int]) -> tuple[DualEncoder, Batch]:
    return clip.encoder(), clip.batch(lengths)


def measure(
    encoder: DualEncoder, batch: Batch, chunk_size: int, rounds: int
) -> tuple[list[list[str]], dict[str, list[float]]]:
    """The rows of a table, and the times that they are from."""
    steps = {name: partial(make(encoder, chunk_size), batch) for name, make in CONTENDERS.items()}
    found: dict[str, list[str]] = {}
    for name, step in steps.items():
        forwards = Forwards()
        with called(encoder, forwards):
            most = peak(step, encoder, batch)
        if name == DIRECT:
            expected, _ = gradients(encoder)
        off = error(gradients(encoder)[0], expected)
        found[name] = [f"{forwards.tokens:,}", f"{most:,.1f}", scientific(off)]
    taken = times(steps, rounds)
    rows = []
    for name, (encoded, mebibytes, difference) in found.items():
        low, middle, high = spread(ratios(taken, name, OURS))
        rows.append([name, encoded, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", mebibytes, difference])
    return rows, taken


def draw(lengths: Sequence[int], chunk_size: int, taken: dict[str, list[float]], path: Path) -> None:
    """Widths of the chunks, whose area is the tokens, and the times of a step."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    number = -(-len(lengths) // chunk_size)
    ways = {
        "padded to the batch": [max(lengths)] * number,
        "cut in order, trimmed": widths(lengths, chunk_size),
        "sorted, trimmed": widths(sorted(lengths), chunk_size),
    }
    colours = dict(zip(ways, ("#d0d4da", "#8fb3d9", "#1a7f37"), strict=True))
    for way, values in ways.items():
        total = chunk_size * sum(values)
        edges = [-0.5 + step for step in range(number + 1)]
        left.stairs(values, edges, fill=True, color=colours[way], label=f"{way}: {total:,} tokens")
    left.set_xlabel(f"chunk of {chunk_size} captions")
    left.set_ylabel("tokens of each caption")
    left.set_ylim(0, 1.45 * max(lengths))
    left.legend(frameon=False, fontsize="small", loc="upper left")
    shown = {
        "GradCache 0.0.1, padded to the batch": "padded to the batch",
        "sentence-transformers": "cut in order, trimmed",
        OURS: "sorted, trimmed",
    }
    for place, (name, way) in enumerate(shown.items()):
        value = ratio(taken, name, OURS)
        right.barh(place, value, color=colours[way])
        right.text(value + 0.05, place, f"{value:.2f}", va="center")
    right.set_yticks(range(len(shown)), [name.split(",")[0] for name in shown])
    right.invert_yaxis()
    right.set_xlim(0, 1.15 * max(ratio(taken, name, OURS) for name in shown))
    right.set_xlabel("time of a step of the text tower, gc_accel = 1")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", action="store_true", help="tokens alone")
    parser.add_argument("--tiny", action="store_true", help="towers of one layer, to see that it runs")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args()
    settle()
    print_counts(args.batch, args.chunks, [0.4, 0.5, 0.6])
    if args.counts:
        return
    clip = TINY if args.tiny else Clip(text=(192, 3))
    lengths = caption_lengths(args.batch)
    print(f"{sum(lengths):,} tokens, the longest caption has {max(lengths)}\n")
    header = ["tokens encoded", "time", "quartiles", "MiB", "error"]
    for chunk in args.chunks:
        rows, taken = measure(*text_alone(clip, lengths), chunk, args.rounds)
        print_table([f"text tower, chunk {chunk}", *header], rows)
        if chunk == args.chunks[0]:
            draw(lengths, chunk, taken, args.figure)
    rows, _ = measure(*whole(clip, lengths), args.chunks[0], args.rounds)
    print_table([f"CLIP, chunk {args.chunks[0]}", *header], rows)


if __name__ == "__main__":
    main()
