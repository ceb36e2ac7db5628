"""Which method for small batches: the built-in scans, the same amount of work for each, several seeds.

    python benchmarks/small_batches.py            # all runs, then the table and the plot of docs/small-batches.md

Work is counted in passes of a sample through the encoder, a backward pass for two forward passes. A step that keeps
the graph of every chunk, as plain training does, takes 3 of them, a cached one 4 but for the chunk that is retained,
and a momentum encoder adds 1. Each method gets the epochs that its share of the same work pays for. The learning rate
goes with the root of the batch, from 2e-3 at 128. Runs that are already in the output folder are not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
EXAMPLE, FIGURE = ROOT / "examples" / "vision_train.py", ROOT / "docs" / "figures" / "small_batches.png"
SCANS, LABELS = 1437, 10  # to train on; labels per class that the linear probe knows
SMALL, LARGE, CHUNK = 32, 256, 32
DIRECT, TEACHER = 3.0, 1.0  # passes of a sample
PROBE, RAW = "eval_few_labels_mean_backbone", "eval_few_labels_mean_raw"


class Way(NamedTuple):
    """A method as it would be run by someone whose memory holds `CHUNK` samples."""

    loss: str
    batch: int = SMALL
    accumulated: int = 1  # batches per optimizer step
    passes: float = DIRECT


# Cached: the first pass of all samples, and the second of all but the chunk that is retained.
CACHED = DIRECT + 1 - CHUNK / LARGE
WAYS = {
    "SimCLR, batch of 32": Way("simclr"),
    "SimCLR, 8 batches of 32 accumulated": Way("simclr", accumulated=LARGE // SMALL),
    "SimCLR, cached batch of 256": Way("simclr", LARGE, passes=CACHED),
    "DCL, batch of 32": Way("dcl"),
    "SwAV, batch of 32": Way("swav", passes=DIRECT + 1),
    "NNCLR, batch of 32": Way("nnclr"),
    "MoCo v3, batch of 32": Way("moco", passes=DIRECT + TEACHER),
    "BYOL, batch of 32": Way("byol", passes=DIRECT + TEACHER),
    "SimSiam, batch of 32": Way("simsiam"),
    "Barlow Twins, batch of 32": Way("barlow"),
    "VICReg, batch of 32": Way("vicreg"),
    "spectral, batch of 32": Way("spectral"),
}


def run(folder: Path, name: str, seed: int, work: float) -> dict[str, float]:
    """The results of one training."""
    way = WAYS[name]
    output = folder / f"{name.replace(' ', '_').replace(',', '')}_{seed}_{work:g}"
    if not (output / "all_results.json").exists():
        samples_per_step = way.batch * way.accumulated
        options = {
            "output_dir": output,
            "loss": way.loss,
            "seed": seed,
            "per_device_train_batch_size": way.batch,
            "gradient_accumulation_steps": way.accumulated,
            "chunk_size": CHUNK,
            "retain": 1 if way.batch > CHUNK else "all",
            "max_steps": round(work * SCANS / way.passes / samples_per_step),
            "learning_rate": 2e-3 * (samples_per_step / 128) ** 0.5,
            "probe_labels_per_class": LABELS,
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
        }
        flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, str(EXAMPLE), *flags], check=True, env=environment)
    return json.loads((output / "all_results.json").read_text())


def plot(scores: dict[str, list[float]], raw: float) -> None:
    """The score of every seed, method by method."""
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = sorted(scores, key=lambda name: mean(scores[name]))
    for place, name in enumerate(names):
        color = "#1a7f37" if "cached" in name else "#3b6ea5"
        axes.plot(scores[name], [place] * len(scores[name]), "o", color=color, alpha=0.5)
        axes.plot(mean(scores[name]), place, "|", color=color, markersize=16)
    axes.axvline(raw, color="#b3261e", linestyle="--", label="raw pixels")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"linear probe on {LABELS} labels per class, % of unseen scans")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE)
    print(f"Plot: {FIGURE}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=float, default=24.0, help="passes of every scan, per run")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/small_batches"))
    args = parser.parse_args()

    found = {name: [run(args.output_dir, name, seed, args.work) for seed in args.seeds] for name in args.ways}
    scores = {name: [100 * each[PROBE] for each in results] for name, results in found.items()}
    raw = 100 * mean(each[RAW] for results in found.values() for each in results)
    print("| method | linear probe, mean | of seeds | samples seen |\n|---|---|---|---|")
    for name in sorted(scores, key=lambda name: -mean(scores[name])):
        seeds = ", ".join(f"{score:.1f}" for score in scores[name])
        print(
            f"| {name} | {mean(scores[name]):.1f} % | {seeds} | {args.work * SCANS / WAYS[name].passes:,.0f} |"
        )
    print(f"| raw pixels | {raw:.1f} % | | |")
    plot(scores, raw)


if __name__ == "__main__":
    main()
