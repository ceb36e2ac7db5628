"""Which method for small batches: the built-in scans, the same amount of work for each, several seeds.

    python benchmarks/small_batches.py            # all runs, then the table and the plot of docs/small-batches.md

Work is counted in passes of a sample through the encoder, a backward pass for two forward passes. A step that keeps
the graph of every chunk, as plain training does, takes 3 of them, a cached one 4 but for the chunk that is retained,
and a momentum encoder adds 1. Each method gets the epochs that its share of the same work pays for.

Each has its own learning rate: the best of some, in one run each that holds other scans out and starts from another
seed than the runs that are reported. Runs take turns on the cores, one core each. Those that are already in the output
folder are not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from typing import NamedTuple

from matplotlib.figure import Figure

from gc_accel.pictures.png import save_png

ROOT = Path(__file__).parents[1]
EXAMPLE, FIGURE = ROOT / "examples" / "vision_train.py", ROOT / "docs" / "figures" / "small_batches.png"
SCANS, LABELS = 1437, 10  # to train on; labels per class that the linear probe knows
SMALL, LARGE, CHUNK = 32, 256, 32
DIRECT, TEACHER = 3.0, 1.0  # passes of a sample
PROBE, RAW = "eval_few_labels_mean_backbone", "eval_few_labels_mean_raw"
RATES = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
TUNING = {"seed": 100, "split_seed": 1}  # reported are split 0 and seeds from 0


class Way(NamedTuple):
    """A method as it would be run by someone whose memory holds `CHUNK` samples."""

    loss: str
    batch: int = SMALL
    accumulated: int = 1  # batches per optimizer step
    passes: float = DIRECT

    @property
    def samples(self) -> int:
        """Of an optimizer step."""
        return self.batch * self.accumulated


class Run(NamedTuple):
    """A way with everything that is chosen for it."""

    name: str
    rate: float
    work: float
    seed: int
    split_seed: int = 0


# Cached: the first pass of all samples, and the second of all but the chunk that is retained.
CACHED = DIRECT + 1 - CHUNK / LARGE
WAYS = {
    "SimCLR, batch of 32": Way("simclr"),
    "SimCLR, 8 batches of 32 accumulated": Way("simclr", accumulated=LARGE // SMALL),
    "SimCLR, cached batch of 256": Way("simclr", LARGE, passes=CACHED),
    "DCL, batch of 32": Way("dcl"),
    "alignment and uniformity, batch of 32": Way("align_uniform"),
    "SwAV, batch of 32": Way("swav"),
    "NNCLR, batch of 32": Way("nnclr"),
    "MoCo v2, batch of 32": Way("moco_v2", passes=DIRECT + TEACHER),
    "MoCo v3, batch of 32": Way("moco", passes=DIRECT + TEACHER),
    "BYOL, batch of 32": Way("byol", passes=DIRECT + TEACHER),
    "SimSiam, batch of 32": Way("simsiam"),
    "Barlow Twins, batch of 32": Way("barlow"),
    "VICReg, batch of 32": Way("vicreg"),
    "SSL-HSIC, batch of 32": Way("hsic"),
    "spectral, batch of 32": Way("spectral"),
}


def steps(name: str, work: float) -> int:
    """Optimizer steps that the work pays for."""
    return round(work * SCANS / WAYS[name].passes / WAYS[name].samples)


def train(folder: Path, cores: SimpleQueue[int], run: Run) -> dict[str, float]:
    """The results of one training, on a core of its own."""
    way = WAYS[run.name]
    slug = run.name.replace(",", "").replace(" ", "_")
    output = folder / f"{slug}_rate{run.rate:g}_work{run.work:g}_seed{run.seed}_split{run.split_seed}"
    if not (output / "all_results.json").exists():
        options = {
            "output_dir": output,
            "loss": way.loss,
            "seed": run.seed,
            "split_seed": run.split_seed,
            "per_device_train_batch_size": way.batch,
            "gradient_accumulation_steps": way.accumulated,
            "chunk_size": CHUNK,
            "retain": 1 if way.batch > CHUNK else "all",
            "max_steps": steps(run.name, run.work),
            "learning_rate": run.rate,
            "probe_labels_per_class": LABELS,
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
        }
        flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        core = cores.get()
        process = subprocess.run(
            [sys.executable, str(EXAMPLE), *flags],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            preexec_fn=partial(os.sched_setaffinity, 0, {core}),
            capture_output=True,
            text=True,
        )
        cores.put(core)
        if process.returncode:
            raise RuntimeError(f"{run} failed:\n{process.stderr}")
    return json.loads((output / "all_results.json").read_text())


def train_all(folder: Path, runs: Iterable[Run]) -> dict[Run, dict[str, float]]:
    """The results of several, which take turns on the cores of this process."""
    cores = SimpleQueue[int]()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    runs = list(runs)
    with ThreadPoolExecutor(cores.qsize()) as pool:
        found = dict[Run, dict[str, float]]()
        for run, results in zip(runs, pool.map(partial(train, folder, cores), runs), strict=True):
            print(f"{run}: {100 * results[PROBE]:.1f} %", file=sys.stderr, flush=True)
            found[run] = results
    return found


def plot(scores: dict[str, list[float]], raw: float) -> None:
    """The score of every seed, method by method."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
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
    save_png(figure, FIGURE)
    print(f"Plot: {FIGURE}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=float, default=24.0, help="passes of every scan, per run")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/small_batches"))
    args = parser.parse_args()

    trials = [Run(name, rate, args.work, **TUNING) for name in args.ways for rate in args.rates]
    tried = train_all(args.output_dir, trials)
    rates = {
        name: max((run for run in trials if run.name == name), key=lambda run: tried[run][PROBE]).rate
        for name in args.ways
    }
    runs = [Run(name, rates[name], args.work, seed) for seed in args.seeds for name in args.ways]
    found = train_all(args.output_dir, runs)
    scores = {name: [100 * found[run][PROBE] for run in runs if run.name == name] for name in args.ways}
    raw = 100 * mean(results[RAW] for results in found.values())

    print("| method | linear probe, mean | of seeds | learning rate | samples seen | optimizer steps |")
    print("|---" * 6 + "|")
    for name in sorted(scores, key=lambda name: -mean(scores[name])):
        seeds, count = ", ".join(f"{score:.1f}" for score in scores[name]), steps(name, args.work)
        cells = f"{seeds} | {rates[name]:g} | {count * WAYS[name].samples:,} | {count}"
        print(f"| {name} | {mean(scores[name]):.1f} % | {cells} |")
    print(f"| raw pixels | {raw:.1f} % | | | | |")
    plot(scores, raw)


if __name__ == "__main__":
    main()
