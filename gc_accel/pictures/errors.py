"""The error of each parameter's gradient on a logarithmic axis, beside what is allowed."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from gc_accel.pictures.png import save_png

SHOWN = 24  # parameters that are named
LEAST = 1e-18  # where an error of zero is drawn
EQUAL, DIFFERENT = "#1a7f37", "#c62828"
CHARACTERS = 118  # of a line of text below the chart


def error_chart(
    errors: Mapping[str, float],
    path: str | os.PathLike[str],
    *,
    tolerance: float,
    title: str,
    notes: Sequence[str] = (),
) -> None:
    """Draws the largest errors by name, green within the tolerance and red beyond it, as a PNG.

    Args:
        errors: of each parameter, the largest first; NaN is drawn at the right end. May be empty.
        path: of the file; its folder is made.
        tolerance: positive; drawn as a line.
        title: above the chart.
        notes: sentences below it.
    """
    names = list(errors)[:SHOWN]
    drawn = [min(max(errors[name], LEAST), 1e3) if math.isfinite(errors[name]) else 1e3 for name in names]
    lines = [line for note in notes for line in textwrap.wrap(note, CHARACTERS, subsequent_indent="   ")]
    more = [f"and {len(errors) - SHOWN} more with smaller errors"] if len(errors) > SHOWN else []
    below = 0.17 * len([*lines, *more]) + 0.1
    figure = Figure(figsize=(9, 1.5 + 0.24 * max(len(names), 2) + below), layout="constrained")
    axes = figure.add_subplot()
    colours = [EQUAL if errors[name] <= tolerance else DIFFERENT for name in names]
    rows = list(range(len(names)))
    axes.hlines(rows, LEAST, drawn, color=colours, alpha=0.4)
    axes.scatter(drawn, rows, color=colours, s=28, zorder=3)
    axes.axvline(tolerance, color="#222222", linestyle="--", linewidth=1)
    axes.text(tolerance, 1.0, f" allowed {tolerance:.0e}", transform=axes.get_xaxis_transform(), va="bottom")
    axes.set_yticks(rows, names, fontsize=8, parse_math=False)
    axes.set_ylim(max(len(names), 2) - 0.5, -0.5)
    axes.set(xscale="log", xlim=(LEAST, 1e3), xlabel="relative error of the gradient")
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    if below_text := "\n".join([*more, *lines]):
        figure.supxlabel(below_text, fontsize=8, x=0.01, ha="left", parse_math=False)
    save_png(figure, path)
