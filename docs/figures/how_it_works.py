"""Draws docs/figures/how_it_works.png: python docs/figures/how_it_works.py"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

INK, LIGHT, GRAPH, CACHED = "#222222", "#e8eef7", "#f6c28b", "#8fbf9f"
CHUNKS = 4


def box(
    axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.5, height: float = 0.62
) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0.04", facecolor=colour, edgecolor=INK, linewidth=0.8
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 0.9})


def main() -> None:
    figure = Figure(figsize=(10, 4.2), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(-0.2, 13.4)
    axes.set_ylim(-0.9, 5.2)
    axes.axis("off")
    rows = [3.6 - 1.05 * i for i in range(CHUNKS)]
    for title, x in (
        ("1  encode, no graph", 0.9),
        ("2  loss over all pairs", 5.65),
        ("3  encode again, with graph", 10.6),
    ):
        axes.text(x, 4.75, title, fontsize=11, fontweight="bold", color=INK, ha="center" if x > 2 else "left")
    for i, y in enumerate(rows):
        box(axes, 0, y, f"chunk {i + 1}", LIGHT)
        box(axes, 2.1, y, f"z{i + 1}", CACHED, width=0.8)
        arrow(axes, (1.6, y + 0.31), (2.0, y + 0.31))
        arrow(axes, (3.0, y + 0.31), (4.1, y + 0.31))
        arrow(axes, (7.3, y + 0.31), (8.0, y + 0.31))
        box(axes, 8.15, y, f"∂L/∂z{i + 1}", CACHED, width=0.9)
        arrow(axes, (9.15, y + 0.31), (9.65, y + 0.31))
        last = i == CHUNKS - 1
        box(
            axes,
            9.8,
            y,
            f"chunk {i + 1}" + (", graph kept" if last else ""),
            GRAPH,
            width=2.0 if last else 1.5,
        )
    for i in range(CHUNKS):
        for j in range(CHUNKS):
            corner = (4.2 + j * 0.75, rows[i] - 0.2)
            axes.add_patch(Rectangle(corner, 0.75, 1.05, facecolor=LIGHT, edgecolor=INK, linewidth=0.6))
            axes.text(
                corner[0] + 0.375, rows[i] + 0.32, f"z{i + 1}·z{j + 1}", ha="center", va="center", fontsize=8
            )
    axes.text(5.7, -0.3, "all 16 blocks count; computed in tiles", ha="center", fontsize=9, color=INK)
    axes.text(12.7, 2.2, "∂L/∂θ\nof the\nwhole\nbatch", ha="center", va="center", fontsize=10, color=INK)
    for y in rows:
        arrow(axes, (11.9 if y == rows[-1] else 11.4, y + 0.31), (12.25, 2.25))
    axes.text(
        6.6,
        -0.55,
        "orange: the only graphs, one at a time       green: of batch size, but only D numbers a sample",
        ha="center",
        fontsize=9,
        color=INK,
    )
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
