"""Draws docs/figures/architecture.png from the imports of the package: python docs/figures/architecture.py

A room is a folder, or a file at the top. It stands right below the lowest room that imports from it, so every arrow
points downwards. Where rooms import from each other in a circle there is no such place, and the script says so.
An arrow is left out where a longer way down leads to the same room.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

PACKAGE = Path(__file__).resolve().parents[2] / "gc_accel"
INK, GREY, LIGHT, STEP, PATH = "#222222", "#9aa5b4", "#eef1f5", "#d7e3f4", "#d9822b"
WIDTH, HEIGHT, ROW = 2.66, 0.72, 1.12
FAR = 2  # layers; a longer arrow goes down beside the rooms, and into the side of one
TOP = "__init__"
LEGEND = (
    ("blue: what a step is made of; the number in a corner counts lines", "#3b5f8f"),
    ("arrows: imports, but where a longer way down leads to the same room", "#5b6675"),
    ("orange: the way of one chunk through a step", "#8a4a0c"),
)


class Room(NamedTuple):
    """How a room is drawn: where from left to right, and what it is for."""

    x: float
    words: str


BETWEEN = {  # where an arrow goes down between the rooms of the layer that it crosses
    ("compat", "losses"): (2.3, 8.5, 10.0),
    ("planning", "losses"): (13.2, 12.22, 12.0),
}


class Stop(NamedTuple):
    """A place on the way of a chunk."""

    room: str
    x: float
    what: str
    where: str


ROOMS = {
    TOP: Room(5.9, "the public API"),
    "programs": Room(11.0, "what the examples run"),
    "compat": Room(1.3, "published APIs, old names"),
    "training": Room(7.4, "the Trainer"),
    "planning": Room(14.2, "what a step will take"),
    "data": Room(2.3, "sets, loaders, views"),
    "equivalence": Room(5.9, "cached step = direct step?"),
    "encoders": Room(10.6, "any model as an encoder"),
    "evaluation": Room(13.85, "retrieval, probes"),
    "gradient_cache": Room(5.9, "THE algorithm: one step"),
    "losses": Room(11.0, "tiles, losses, oracles"),
    "pictures": Room(3.0, "plots"),
    "accumulation": Room(3.0, "the cheaper step"),
    "differentiable": Room(5.9, "loss = cache(batch)"),
    "passes": Room(5.9, "encode a call, push a chunk"),
    "memory": Room(5.9, "sizes, kept graphs, retries"),
    "engine": Room(5.9, "schedule, encode, replay"),
    "inputs": Room(5.9, "nested inputs, cut and joined"),
    "contracts": Room(5.9, "encoder and loss declare"),
    "distributed": Room(5.9, "ranks, scaling rule, reduction"),
    "state": Room(5.9, "random states, snapshots"),
}
WAY = (
    Stop("inputs", 7.75, "samples of a batch", "inputs/nested.py"),
    Stop("engine", 7.75, "cut; keeps its graph or not", "engine/schedule.py"),
    Stop("passes", 7.75, "encode: representations", "passes.py"),
    Stop("losses", 12.95, "loss: their gradients", "engine/loss_of_batch.py"),
    Stop("passes", 12.95, "push: into the weights", "passes.py"),
    Stop("distributed", 12.95, "reduce, once a step", "distributed/reduction.py"),
)


def room_of(path: Path) -> str:
    """The folder of a file below the package, or the file itself at the top."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def rooms_imported(path: Path) -> Iterator[str]:
    """Rooms that a file imports from, wherever in it, for type checkers alone too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"expected absolute imports, got a relative one in {path}")
            names = [f"{node.module}.{each.name}" for each in node.names]
        for package, *parts in (name.split(".") for name in names):
            if package == PACKAGE.name:
                yield parts[0] if parts and parts[0] in ROOMS else TOP


def imports_of(files: list[Path]) -> dict[str, set[str]]:
    """Of each room the others that it imports from."""
    found = {room_of(path): set[str]() for path in files}
    for path in files:
        found[room_of(path)].update(rooms_imported(path))
    return {room: others - {room} for room, others in found.items()}


def below(room: str, imports: Mapping[str, set[str]], way: tuple[str, ...] = ()) -> set[str]:
    """All rooms that can be reached from one.

    Raises:
        ValueError: rooms import from each other in a circle.
    """
    if room in way:
        circle = " -> ".join((*way[way.index(room) :], room))
        raise ValueError(f"expected imports that point downwards only, got a circle: {circle}")
    reached = (below(each, imports, (*way, room)) for each in imports[room])
    return imports[room].union(*reached)


def layers_of(imports: Mapping[str, set[str]]) -> dict[str, int]:
    """The layer of each room, from 0 at the bottom: right below the lowest that imports from it."""
    importers = defaultdict[str, set[str]](set)
    for room, others in imports.items():
        for each in others:
            importers[each].add(room)
    depths = dict[str, int]()

    def depth(room: str) -> int:
        if room not in depths:
            depths[room] = max((depth(each) + 1 for each in importers[room]), default=0)
        return depths[room]

    lowest = max(depth(room) for room in imports)
    return {room: lowest - depths[room] for room in imports}


def needed(imports: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Imports to which no longer way leads."""
    for room, others in imports.items():
        indirect = set[str]().union(*(below(each, imports) for each in others))
        yield from ((room, each) for each in sorted(others - indirect))


def draw_room(axes: Axes, room: str, y: float, files: list[Path], *, is_of_step: bool) -> None:
    x, words = ROOMS[room]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    name = f"{room}.py" if (PACKAGE / f"{room}.py").exists() else f"{room}/"
    axes.add_patch(
        FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0.02",
            facecolor=STEP if is_of_step else LIGHT,
            edgecolor=INK,
            linewidth=0.7,
            zorder=3,
        )
    )
    left, right = x - WIDTH / 2 + 0.08, x + WIDTH / 2 - 0.08
    count = f"{lines:,}" if len(files) == 1 else f"{len(files)} files, {lines:,}"
    axes.text(left, y + 0.15, name, fontsize=9.5, fontweight="bold", color=INK, va="center", zorder=4)
    axes.text(right, y + 0.15, count, fontsize=7, color="#5b6675", va="center", ha="right", zorder=4)
    axes.text(left, y - 0.18, words, fontsize=8.2, color=INK, va="center", zorder=4)


def draw_import(axes: Axes, room: str, other: str, heights: Mapping[str, float]) -> None:
    style = {"arrowstyle": "-|>,head_length=0.35,head_width=0.16", "color": GREY, "linewidth": 0.8}
    (start, _), (end, _) = ROOMS[room], ROOMS[other]
    top, bottom = heights[room] - HEIGHT / 2, heights[other] + HEIGHT / 2 + 0.03
    if (room, other) in BETWEEN:
        start, between, end = BETWEEN[room, other]
        low = bottom + 0.3
        axes.plot(
            (start, start, between, between),
            (top, top - 0.13, top - 0.13, low),
            color=GREY,
            linewidth=0.8,
            zorder=1,
        )
        axes.annotate("", (end, bottom), (between, low + 0.02), arrowprops={**style, "shrinkA": 0}, zorder=1)
    elif heights[room] - heights[other] > FAR * ROW:
        side = 1 if start > end else -1
        start += side * (1.18 if start != ROOMS["losses"].x else 0)
        style["connectionstyle"] = "angle,angleA=-90,angleB=0,rad=6"
        axes.annotate(
            "", (end + side * (WIDTH / 2 + 0.04), heights[other]), (start, top), arrowprops=style, zorder=1
        )
    else:
        shift = (end - start) * 0.12
        axes.annotate("", (end - shift, bottom), (start + shift, top), arrowprops=style, zorder=1)


def draw_way(axes: Axes, heights: Mapping[str, float]) -> None:
    """The stops of a chunk, with a line from each to the next."""
    places = [(stop.x, heights[stop.room]) for stop in WAY]
    for start, end in pairwise(places):
        bend = "angle,angleA=90,angleB=180,rad=10" if start[0] != end[0] else "arc3"
        style = {"arrowstyle": "->", "color": PATH, "linewidth": 2, "connectionstyle": bend}
        axes.annotate("", end, start, arrowprops={**style, "shrinkA": 9, "shrinkB": 9}, zorder=2)
    for number, (stop, (x, y)) in enumerate(zip(WAY, places, strict=True), start=1):
        axes.plot((ROOMS[stop.room].x, x), (y, y), color=PATH, linewidth=1, linestyle=":", zorder=1)
        axes.add_patch(Circle((x, y), 0.19, facecolor=PATH, edgecolor="white", zorder=5))
        axes.text(x, y - 0.01, str(number), color="white", fontsize=9, fontweight="bold", **CENTRE, zorder=6)
        for text, up, size in ((stop.what, 0.12, 8.6), (stop.where, -0.16, 7.4)):
            axes.text(
                x + 0.3, y + up, text, fontsize=size, color="#8a4a0c", va="center", zorder=4, bbox=PAPER
            )


CENTRE = {"ha": "center", "va": "center"}
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def main() -> None:
    by_room = defaultdict[str, list[Path]](list)
    for path in sorted(PACKAGE.rglob("*.py")):
        by_room[room_of(path)].append(path)
    if by_room.keys() != ROOMS.keys():
        differing = by_room.keys() ^ ROOMS.keys()
        raise ValueError(f"expected a place in ROOMS for each room and no other, differing are {differing}")
    imports = imports_of([path for files in by_room.values() for path in files])
    reached = {room: below(room, imports) for room in imports}
    of_step = reached["gradient_cache"] | {"gradient_cache"}
    layers = layers_of(imports)
    heights = {room: layer * ROW for room, layer in layers.items()}
    figure = Figure(figsize=(12, 10.6), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.2, 15.75)
    axes.set_ylim(-0.6, max(heights.values()) + 0.9)
    axes.axis("off")
    for room, each in needed(imports):
        draw_import(axes, room, each, heights)
    for room, files in by_room.items():
        draw_room(axes, room, heights[room], files, is_of_step=room in of_step)
    draw_way(axes, heights)
    for number, (words, colour) in enumerate(LEGEND):
        axes.text(8.0, 0.3 - 0.3 * number, words, fontsize=8.6, color=colour)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
