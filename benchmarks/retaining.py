"""What retained graphs are worth: at equal memory against peers, and for any budget of memory.

    python -m benchmarks.retaining                 # the tables and the plot of docs/benchmarks.md

Time, memory and forward passes are measured as in `peers.py`. Theory counts a backward pass as two forward passes: a
tower of which k of n chunks are retained takes 1 + (n - k) / 3n of the time it takes in one graph, one of which
nothing is retained 4/3. The first table is for an image tower with nearly all of the work, the second for a CLIP with
a text tower of some weight (its share is measured), at budgets that are fractions of what autograd saves for the
direct step.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import contenders
from benchmarks.clips import TINY, Batch, Clip
from benchmarks.measuring import (
    Forwards,
    called,
    peak,
    percent,
    print_table,
    ratio,
    ratios,
    settle,
    spread,
    times,
)
from benchmarks.peers import LENGTH
from gc_accel import DualEncoder
from gc_accel.memory.meters import SavedBytes
from gc_accel.pictures.png import save_png

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "retaining.png"
IMAGE_ALONE = Clip(text=(64, 1))
PEERS = {
    "GradCache 0.0.1": contenders.grad_cache,
    "sentence-transformers": contenders.sentence_transformers,
    "open_clip, accum-freq": contenders.accum_freq,
}
OURS = "gc_accel, retain=1"
Found = dict[str, Any]


def measure(encoder: DualEncoder, batch: Batch, makes: Found, chunk_size: int, rounds: int) -> Found:
    """Peaks and forward passes by contender, and the times of all rounds."""
    size = len(batch["input_ids"])
    steps = {name: partial(make(encoder, chunk_size), batch) for name, make in makes.items()}
    found: Found = {"peak": {}, "forwards": {}}
    for name, step in steps.items():
        step()  # in which retain="auto" decides
        forwards = Forwards()
        with called(encoder, forwards):
            found["peak"][name] = peak(step, encoder, batch)
        found["forwards"][name] = [forwards.samples[stream] / size for stream in ("image", "text")]
    return found | {"times": times(steps, rounds)}


def print_equal_memory(clip: Clip, size: int, chunk_size: int, rounds: int) -> None:
    """retain=1 against peers that take as much memory."""
    makes = PEERS | {"gc_accel, retain=0": partial(contenders.gc_accel, retain=0)}
    makes |= {OURS: partial(contenders.gc_accel, retain=1)}
    found = measure(clip.encoder(), clip.batch([8] * size), makes, chunk_size, rounds)

    def row(name: str) -> list[str]:
        low, middle, high = spread([1 - each for each in ratios(found["times"], OURS, name)])
        most, (image, _) = found["peak"][name], found["forwards"][name]
        cells = [name, f"{most:.1f}", percent(found["peak"][OURS] / most - 1), f"{image:g}"]
        if name == OURS:
            return [*cells, "", "", ""]
        theory = 1 - (found["forwards"][OURS][0] + 2) / (image + 2)
        return [*cells, percent(theory), percent(middle), f"{percent(low)} to {percent(high)}"]

    header = [f"{size // chunk_size} chunks of {chunk_size}", "MiB", "retain=1 takes more memory by"]
    header += ["image forwards", "retain=1 is faster by: theory", "measured", "quartiles"]
    print_table(header, (row(name) for name in makes))


def graph_bytes(encoder: DualEncoder, batch: Batch) -> int:
    """What autograd saves for the direct step."""
    saved = SavedBytes(besides=[*encoder.parameters(), *batch.values()])
    with saved:
        contenders.encode(encoder, batch)
    return saved.total


def text_share(encoder: DualEncoder, batch: Batch, rounds: int) -> float:
    """Of the work of both towers, from their times without a graph."""
    parts = {key: {key: batch[key]} for key in ("pixel_values", "input_ids")}
    towers = {"image": partial(encoder, image=parts["pixel_values"])}
    towers |= {"text": partial(encoder, text=parts["input_ids"])}
    found = times(towers, rounds)
    share = ratio(found, "text", "image")
    return share / (1 + share)


def sweep(clip: Clip, size: int, chunk_size: int, rounds: int, fractions: Sequence[float]) -> list[Found]:
    """The table of budgets; returned are its points, peers first."""
    encoder, batch = clip.encoder(), clip.batch([LENGTH] * size)
    graph, share = graph_bytes(encoder, batch), text_share(encoder, batch, rounds)
    makes: Found = {"direct": contenders.direct, "direct, in chunks": contenders.chunked} | PEERS
    makes |= {f"retain={count}": partial(contenders.gc_accel, retain=count) for count in (0, 1)}
    for each in fractions:
        auto = partial(contenders.gc_accel, retain="auto", memory_budget=each * graph)
        makes[f"memory for {each:g} of the batch"] = auto
    found = measure(encoder, batch, makes, chunk_size, rounds)
    points = []
    for name in makes:
        image, text = found["forwards"][name]
        point = {"name": name, "peak": found["peak"][name], "image": image, "text": text}
        point["theory"] = ((1 - share) * (image + 2) + share * (text + 2)) / 3
        point["time"] = spread(ratios(found["times"], name, "direct"))
        point["in chunks"] = ratio(found["times"], name, "direct, in chunks")
        points.append(point)
    print(
        f"Text has {percent(share)} of the work; the graph of the direct step has {graph / 2**20:,.0f} MiB.\n"
    )
    print_table(
        [
            f"B = {size:,}, chunk {chunk_size}",
            "MiB",
            "forwards",
            "theory",
            "time",
            "quartiles",
            "to direct in chunks",
        ],
        (_cells(point) for point in points),
    )
    return points


def _cells(point: Found) -> list[str]:
    low, middle, high = point["time"]
    forwards = f"{point['image']:.3g} + {point['text']:.3g}"
    cells = [point["name"], f"{point['peak']:,.0f}", forwards, f"{point['theory']:.2f}", f"{middle:.2f}"]
    return [*cells, f"{low:.2f} to {high:.2f}", f"{point['in chunks']:.2f}"]


def draw(points: Sequence[Found], title: str, path: Path) -> None:
    """Time over memory: peers as points, budgets as a line."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    ours = [point for point in points if point["name"].startswith(("retain", "memory"))]
    memory, taken = [point["peak"] for point in ours], [point["time"][1] for point in ours]
    axes.plot(memory, [point["theory"] for point in ours], "--", color="#888888", label="gc_accel, theory")
    axes.plot(memory, taken, "o-", color="#1a7f37", label="gc_accel: retain=0, 1, budgets")
    markers = {
        "direct": "s",
        "GradCache 0.0.1": "^",
        "sentence-transformers": "v",
        "open_clip, accum-freq": "D",
    }
    for point in points:
        if point["name"] in markers:
            axes.plot(point["peak"], point["time"][1], markers[point["name"]], label=point["name"])
    axes.set_xlabel("peak memory besides weights and batch, MiB")
    axes.set_ylabel("time of a step, direct = 1")
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    save_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=256, help="of the first table")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 32], help="of the first table")
    parser.add_argument("--sweep_batch", type=int, default=512)
    parser.add_argument("--sweep_chunks", type=int, nargs="*", default=[64])
    parser.add_argument("--rounds", type=int, nargs=2, default=[21, 5], help="of either table")
    parser.add_argument("--tiny", action="store_true", help="towers of one layer, to see that it runs")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args()
    settle()
    for chunk in args.chunks:
        print_equal_memory(TINY if args.tiny else IMAGE_ALONE, args.batch, chunk, args.rounds[0])
    for chunk in args.sweep_chunks:
        clip, fractions = TINY if args.tiny else Clip(), [0.25, 0.5, 0.75, 1]
        points = sweep(clip, args.sweep_batch, chunk, args.rounds[1], fractions)
        if chunk == args.sweep_chunks[0]:
            draw(points, f"CLIP, batch {args.sweep_batch:,}, chunks of {chunk}", args.figure)


if __name__ == "__main__":
    main()
