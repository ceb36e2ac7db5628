"""Several ways to take the same training steps, beside one another: curves, gaps, gradients, scores.

per loss:   loss curves | gap to the direct curve | gradient errors at step 0 | scores of every seed
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gc_accel.pictures.png import save_png

Runs = Sequence[Mapping[str, Any]]
STYLES: dict[str, dict[str, Any]] = {  # of equal curves the thin ones lie upon the thick ones
    "direct": {"color": "#9aa0a6", "linewidth": 5},
    "cached": {"color": "#1a7f37", "linewidth": 1.6},
    "accumulated": {"color": "#f2a33a", "linewidth": 4},
    "diagonal": {"color": "#b3261e", "linewidth": 1.4, "linestyle": "--"},
}
LAST = 20  # steps that the losses at the end are the mean of
LEAST = 1e-17  # where zero is drawn on a logarithmic axis
DOUBLE, SINGLE = "float64", "float32"


def ways_figure(runs: Runs, path: str | os.PathLike[str]) -> None:
    """Draws one row of four panels per loss, as a PNG.

    Args:
        runs: with `dtype`, `loss`, `way`, `seed`, `curve`, `gradient_errors` (by parameter), `retrieval` and
            `probe`, for each of the ways direct, cached, accumulated and diagonal.
        path: of the file; its folder is made.
    """
    losses = list(dict.fromkeys(run["loss"] for run in runs))
    figure = Figure(figsize=(17, 4.2 * len(losses)), layout="constrained")
    rows = figure.subplots(len(losses), 4, squeeze=False)
    for row, loss in zip(rows, losses, strict=True):
        own = [run for run in runs if run["loss"] == loss]
        for axes, draw in zip(row, (_curves, _gaps, _gradients, _scores), strict=True):
            draw(axes, own)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{loss} loss of the whole batch")
    save_png(figure, path)


def ways_table(runs: Runs) -> str:
    """The same as a table in markdown: the largest difference from direct training with the same seed, and scores.

    Args:
        runs: as for the figure, and `distance`, how far the final weights are from those of direct training.
    """
    head = "loss | precision | way | gradient, step 0 | loss curve | final weights | last losses | R@1 | linear probe"
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    for loss, dtype, way in dict.fromkeys((run["loss"], run["dtype"], run["way"]) for run in runs):
        kind = [run for run in runs if run["loss"] == loss]
        own = [run for run in kind if (run["dtype"], run["way"]) == (dtype, way)]
        gap = np.abs(curves(kind, dtype, way) - curves(kind, dtype, "direct")).max()
        gradient = max(error for run in own for error in run["gradient_errors"].values())
        off = [gradient, gap, max(run["distance"] for run in own)]
        last = curves(kind, dtype, way)[:, -LAST:].mean(1)
        cells = [loss, dtype, way, *("" if way == "direct" else f"{value:.1e}" for value in off)]
        cells.append(f"{last.min():.2f} to {last.max():.2f}")
        for score in ("retrieval", "probe"):
            values = [100 * run[score] for run in own]
            cells.append(f"{min(values):.1f} to {max(values):.1f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curves(runs: Runs, dtype: str, way: str) -> np.ndarray:
    """Loss of every seed at every step, `(seeds, steps)`."""
    return np.array([run["curve"] for run in runs if (run["dtype"], run["way"]) == (dtype, way)])


def _curves(axes: Axes, runs: Runs) -> None:
    direct = curves(runs, SINGLE, "direct")
    steps = np.arange(direct.shape[1])
    axes.fill_between(steps, direct.min(0), direct.max(0), color="#9aa0a6", alpha=0.25, linewidth=0)
    for way, style in STYLES.items():
        axes.plot(steps, curves(runs, SINGLE, way).mean(0), label=way, **style)
    axes.set(xlabel="step", title=f"{SINGLE}: mean over seeds; band: direct, all seeds")
    axes.legend(frameon=False)


def _gaps(axes: Axes, runs: Runs) -> None:
    direct = curves(runs, DOUBLE, "direct")
    spread = np.maximum(direct.max(0) - direct.min(0), LEAST)
    axes.plot(spread, color="#9aa0a6", linewidth=1, label="direct, between seeds")
    for dtype, way in ((DOUBLE, "accumulated"), (DOUBLE, "diagonal"), (SINGLE, "cached"), (DOUBLE, "cached")):
        gap = np.abs(curves(runs, dtype, way) - curves(runs, dtype, "direct")).max(0)
        style = STYLES[way] | ({"linestyle": ":"} if dtype == SINGLE else {})
        axes.plot(np.maximum(gap, LEAST), label=f"{way}, {dtype}", **style)
    axes.set(xlabel="step", yscale="log", ylim=(LEAST, 30), title="largest gap to direct, same seed")
    axes.legend(frameon=False, fontsize="small", loc="center right")  # between the two precisions


def _gradients(axes: Axes, runs: Runs) -> None:
    for dtype, way in ((DOUBLE, "accumulated"), (DOUBLE, "diagonal"), (SINGLE, "cached"), (DOUBLE, "cached")):
        run = next(run for run in runs if (run["dtype"], run["way"]) == (dtype, way))
        errors = sorted(run["gradient_errors"].values(), reverse=True)
        style = STYLES[way] | ({"linestyle": ":"} if dtype == SINGLE else {})
        axes.plot(np.maximum(errors, LEAST), label=f"{way}, {dtype}", **style)
    axes.set(xlabel="parameter, the worst first", yscale="log", ylim=(LEAST, 30))
    axes.set_title("relative error of each gradient, step 0")


def _scores(axes: Axes, runs: Runs) -> None:
    for score, marker in (("probe", "o"), ("retrieval", "s")):
        for dtype, shift in ((DOUBLE, -0.12), (SINGLE, 0.12)):
            for place, (way, style) in enumerate(STYLES.items()):
                own = [run[score] for run in runs if (run["dtype"], run["way"]) == (dtype, way)]
                face = "none" if dtype == DOUBLE else style["color"]
                x = place + shift + np.linspace(-0.06, 0.06, len(own))
                axes.scatter(x, own, marker=marker, facecolors=face, edgecolors=style["color"], s=42)
        axes.scatter(
            [], [], marker=marker, color="#555555", label="linear probe" if score == "probe" else "R@1"
        )
    axes.set_xticks(range(len(STYLES)), list(STYLES))
    axes.set(ylim=(0, None), title="every seed; hollow float64, filled float32")
    axes.legend(frameon=False, fontsize="small")
