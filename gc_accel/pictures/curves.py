"""The curves of a training, from the log that `transformers.Trainer` keeps."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gc_accel.pictures.png import save_png

NAMES = {"loss": "training", "eval_loss": "evaluation"}


def training_curve(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws loss, evaluation scores, learning rate and logit scale over the optimizer steps, as a PNG.

    Args:
        log_history: that of `transformers.TrainerState`, whose entries have a `step` and any of `loss`,
            `eval_loss`, `learning_rate`, `logit_scale`, `grad_norm`, `eval_*_r1`, `eval_*zero_shot_top1` and
            `eval_*knn*`. The gradient norm is drawn where there is no logit scale; a panel without data is
            left out.
        path: of the file; its folder is made.

    Raises:
        ValueError: if no entry has anything to draw.

    Example:
        >>> training_curve(trainer.state.log_history, "out/training.png")
    """
    keys = {key for entry in log_history for key in entry}
    scale = "logit_scale" if "logit_scale" in keys else "grad_norm"
    panels = {
        "loss": [key for key in NAMES if key in keys],
        "R@1, accuracy": sorted(key for key in keys if _is_score(key)),
        "learning rate": [key for key in ("learning_rate",) if key in keys],
        {"logit_scale": "logit scale", "grad_norm": "gradient norm"}[scale]: [scale] if scale in keys else [],
    }
    panels = {label: lines for label, lines in panels.items() if lines}
    if not panels:
        raise ValueError(
            f"expected log entries with a loss, a learning rate or scores, got {len(log_history)} entries "
            f"with the keys {sorted(keys)}: pass trainer.state.log_history of a training that logged"
        )
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    shared: Axes | None = None
    for i, (label, lines) in enumerate(panels.items()):
        shared = figure.add_subplot(rows, columns, i + 1, sharex=shared)
        _draw_panel(shared, label, lines, log_history)
    save_png(figure, path)


def _is_score(key: str) -> bool:
    return key.startswith("eval_") and (key.endswith(("_r1", "zero_shot_top1")) or "knn" in key)


def _draw_panel(
    axes: Axes, label: str, keys: Sequence[str], log_history: Sequence[Mapping[str, Any]]
) -> None:
    for key in keys:
        entries = [entry for entry in log_history if key in entry]
        steps, values = [entry["step"] for entry in entries], [entry[key] for entry in entries]
        # A few points want markers, or a single one would not be seen at all.
        axes.plot(steps, values, label=_name(key), marker="o" if len(steps) <= 25 else "", markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if label == "R@1, accuracy":
        axes.set_ylim(bottom=0)
    if len(keys) > 1 or _is_score(keys[0]):
        axes.legend(frameon=False, fontsize="small")


def _name(key: str) -> str:
    """The key in words: `eval_image_to_text_r1` becomes `image to text R@1`."""
    words = key.removeprefix("eval_").replace("_", " ")
    return NAMES.get(key, words.removesuffix(" r1") + " R@1" if words.endswith(" r1") else words)
