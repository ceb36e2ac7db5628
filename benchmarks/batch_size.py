"""What the batch size is worth: batch 64 against batch 1,024 at the same number of samples seen.

    python benchmarks/batch_size.py            # all runs, one after the other, then the table and the plot

The plot has each batch size at the best of its learning rates. Runs that are already in the output folder are
not repeated. Data set, model and schedule are those of examples/clip_train.py.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

EXAMPLE = Path(__file__).parents[1] / "examples" / "clip_train.py"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "batch_size.png"
BOTH = ("eval_image_to_text_r1", "eval_text_to_image_r1")


def run(folder: Path, batch_size: int, learning_rate: float, seed: int) -> list[dict]:
    """The log of one training run."""
    output = folder / f"batch{batch_size}_lr{learning_rate:g}_seed{seed}"
    state = output / "trainer_state.json"
    if not state.exists():
        options = {
            "output_dir": output,
            "seed": seed,
            "per_device_train_batch_size": batch_size,
            "chunk_size": min(batch_size, 128),
            "learning_rate": learning_rate,
            "save_strategy": "no",
        }
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        command = [sys.executable, str(EXAMPLE), *flags]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=environment)
    return json.loads(state.read_text())["log_history"]


def evaluations(log: list[dict]) -> list[dict]:
    return [entry for entry in log if BOTH[0] in entry]


def mean_r1(log: list[dict]) -> float:
    """R@1 of both directions, averaged, at the end."""
    return sum(evaluations(log)[-1][name] for name in BOTH) / 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = ["64:5e-4", "64:1e-3", "64:2e-3", "1024:3e-3", "1024:4e-3", "1024:6e-3", "1024:8e-3"]
    parser.add_argument("--runs", nargs="+", default=runs, help="batch size:learning rate")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/batch_size"))
    args = parser.parse_args()

    logs: dict[tuple[int, float], list[dict]] = {}
    for each in args.runs:
        size, rate = int(each.partition(":")[0]), float(each.partition(":")[2])
        logs[size, rate] = run(args.output_dir, size, rate, args.seed)
    print("| batch | learning rate | image to text R@1 | text to image R@1 |\n|---|---|---|---|")
    for (size, rate), log in logs.items():
        scores = " | ".join(f"{100 * evaluations(log)[-1][name]:.1f} %" for name in BOTH)
        print(f"| {size:,} | {rate:g} | {scores} |")

    figure = Figure(figsize=(6, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for size in sorted({size for size, _ in logs}):
        rate = max((r for s, r in logs if s == size), key=lambda rate: mean_r1(logs[size, rate]))
        entries = evaluations(logs[size, rate])
        seen = [entry["step"] * size / 1000 for entry in entries]
        scores = [50 * sum(entry[name] for name in BOTH) for entry in entries]
        axes.plot(seen, scores, marker="o", label=f"batch {size:,}, learning rate {rate:g}")
    axes.set_xlabel("thousand samples seen")
    axes.set_ylabel("R@1 over 1,000 captions, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE)
    print(f"Plot: {FIGURE}")


if __name__ == "__main__":
    main()
