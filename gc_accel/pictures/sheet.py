"""A sheet of images, each beside its true caption and the captions it retrieved.

Text is wrapped by its width as drawn and the sheet grows with its longest cell, so that no line is cut off or
runs into another, whatever the captions.

    +-------+  the true caption, bold
    | image |  v the first retrieved caption, green as it is the true one
    |       |  x the second, red, which goes on
    +-------+    in a second line

Lengths are in inches, from the upper left corner.
"""

import os
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from torch import Tensor

from gc_accel.pictures.png import DPI, save_png

COLUMNS, IMAGE, TEXT, MARK, GAP, LINE = 3, 1.3, 2.6, 0.16, 0.16, 0.17
RIGHT, WRONG, INK = "#1a7f37", "#c62828", "#222222"
PLAIN = FontProperties(family="DejaVu Sans", size=8)
BOLD = FontProperties(family="DejaVu Sans", size=8, weight="bold")
KEY = "bold: the true caption; below it the captions retrieved, best first, ✓ right, ✗ wrong"


class Line(NamedTuple):
    """One line of text as it will be drawn, `indent` to the right of its cell's left edge."""

    text: str
    font: FontProperties
    colour: str = INK
    indent: float = 0.0
    mark: str = ""


def retrieval_sheet(
    images: Sequence[Tensor],
    captions: Sequence[str],
    retrieved: Sequence[Sequence[str]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> None:
    """Draws each image with its true caption and those it retrieved, right ones green, wrong ones red.

    Args:
        images: uint8 `(3, H, W)` each; sizes may differ. Small ones are enlarged without smoothing.
        captions: the true caption of each image.
        retrieved: for each image the captions it retrieved, best first.
        path: of the PNG; its folder is made.
        title: above the sheet.

    Raises:
        ValueError: if the three lengths differ, there is no image, or one is not uint8 `(3, H, W)`.
    """
    _check(images, captions, retrieved)
    renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()
    cells = [_cell(renderer, *pair) for pair in zip(captions, retrieved, strict=True)]
    columns = min(COLUMNS, len(cells))
    width = columns * (IMAGE + TEXT + 2 * GAP) + GAP
    header = [] if title is None else _wrapped(renderer, Line(title, BOLD), width - 2 * GAP)
    header += _wrapped(renderer, Line(KEY, PLAIN), width - 2 * GAP)
    grid = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(IMAGE, LINE * max(map(len, row))) + GAP for row in grid]
    top = 2 * GAP + LINE * len(header)
    figure = Figure(figsize=(width, top + sum(heights)), dpi=DPI)
    _draw_lines(figure, header, GAP, GAP)
    for i, (image, cell) in enumerate(zip(images, cells, strict=True)):
        row, column = divmod(i, columns)
        x, y = GAP + column * (IMAGE + TEXT + 2 * GAP), top + sum(heights[:row])
        _draw_image(figure, image, x, y)
        _draw_lines(figure, cell, x + IMAGE + GAP, y)
    save_png(figure, path)


def _cell(renderer: RendererAgg, caption: str, retrieved: Sequence[str]) -> list[Line]:
    lines = _wrapped(renderer, Line(caption, BOLD), TEXT)
    for text in retrieved:
        right = text == caption
        colour, mark = (RIGHT, "✓") if right else (WRONG, "✗")
        lines += _wrapped(renderer, Line(text, PLAIN, colour, MARK, mark), TEXT)
    return lines


def _wrapped(renderer: RendererAgg, line: Line, width: float) -> list[Line]:
    """The line cut into as few as fit into `width`; the mark stands before the first only."""

    limit = (width - line.indent) * DPI

    def measure(text: str) -> float:
        return renderer.get_text_width_height_descent(text, line.font, False)[0]

    # The longest wrap in characters that fits in inches, tried downwards from above the average line.
    longest = int(1.5 * len(line.text) * limit / max(measure(line.text), 1)) + 1
    wraps = (textwrap.wrap(line.text, size) for size in range(longest, 0, -1))
    texts = next((texts for texts in wraps if all(measure(text) <= limit for text in texts)), list(line.text))
    return [
        line._replace(text=text, mark=line.mark if i == 0 else "") for i, text in enumerate(texts or [""])
    ]


def _draw_lines(figure: Figure, lines: Sequence[Line], x: float, y: float) -> None:
    width, height = figure.get_size_inches()
    for i, line in enumerate(lines):
        for text, left in ((line.mark, x), (line.text, x + line.indent)):
            # parse_math off: a caption with two dollar signs is no formula.
            figure.text(
                left / width,
                1 - (y + i * LINE) / height,
                text,
                color=line.colour,
                fontproperties=line.font,
                va="top",
                parse_math=False,
            )


def _draw_image(figure: Figure, image: Tensor, x: float, y: float) -> None:
    width, height = figure.get_size_inches()
    axes = figure.add_axes((x / width, 1 - (y + IMAGE) / height, IMAGE / width, IMAGE / height))
    axes.set_axis_off()
    axes.set_anchor("NW")
    small = max(image.shape[1:]) <= IMAGE * DPI
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest" if small else "antialiased")


def _check(images: Sequence[Tensor], captions: Sequence[str], retrieved: Sequence[Sequence[str]]) -> None:
    if not len(images) == len(captions) == len(retrieved) or not images:
        raise ValueError(
            f"expected as many images as captions and lists of retrieved captions, and one at least, got "
            f"{len(images)}, {len(captions)} and {len(retrieved)}: pass one of each per image"
        )
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"expected images as uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}: undo the "
                "normalisation before drawing"
            )
