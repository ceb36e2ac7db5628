"""A similarity matrix in tiles: which there are, what one holds, and how a gradient leaves it.

    logits s = scale * X Yᵀ           X: (R, D) rows (anchors), Y: (C, D) columns (candidates)

Sums run over tiles in a fixed order, in the inputs' own precision: every result is bitwise repeatable.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gc_accel.losses.kernel.pairs import Pairs

DEFAULT_TILE_BUDGET = 256 * 2**20  # bytes
TILE_ROWS, TILE_COLUMNS = 512, 1024  # fastest on the CPUs measured (docs/log.md)

Place = tuple[slice, slice]  # rows and columns of a tile


def exact_sum(terms: Tensor) -> Tensor:
    """The sum of all, 0-d, in float64 where there is one: a loss may be a small difference of large sums."""
    return terms.sum(dtype=None if terms.device.type == "mps" else torch.float64)


def tiles(rows: int, columns: int, above_diagonal: bool = False) -> Iterator[Place]:
    """Row and column ranges of the tiles that cover a matrix, or what is above its diagonal, row by row."""
    for top in range(0, rows, TILE_ROWS):
        for left in range(top if above_diagonal else 0, columns, TILE_COLUMNS):
            yield slice(top, min(top + TILE_ROWS, rows)), slice(left, min(left + TILE_COLUMNS, columns))


def logits_of(rows: Tensor, columns: Tensor, scale: Tensor, at: Place) -> Tensor:
    """The logits of one tile."""
    return (rows[at[0]] * scale) @ columns[at[1]].T


class Logits(NamedTuple):
    """All logits, of which a tile exists at a time: those of rows and columns, for the `pairs` that count.

    Row i may have a column of its own, `start` + i.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    pairs: Pairs | None = None
    start: int | None = None

    @property
    def halved(self) -> bool:
        return self.pairs is not None and self.pairs.above_diagonal

    def places(self) -> Iterator[Place]:
        return tiles(len(self.rows), len(self.columns), self.halved)

    def tile(self, at: Place) -> Tensor:
        """One of them, minus infinity for pairs that do not count."""
        logits = logits_of(self.rows, self.columns, self.scale, at)
        mask = None if self.pairs is None else self.pairs.left_out(*at)
        return logits if mask is None else logits.masked_fill_(mask, -torch.inf)


def own_pairs(tile: Tensor, at: Place, start: int) -> tuple[slice, Tensor]:
    """The elements of a tile that pair row i with column start + i: which rows those are, and a view of them.

    columns      0    1    2    3    4      start = 2
    row 0                  x
    row 1                       x           empty for most tiles
    """
    i, j = at
    found = tile.diagonal(i.start + start - j.start)
    first = max(i.start, j.start - start)
    return slice(first, first + len(found)), found


class Own:
    """What is noted of each row on the way: the logit of its own column, and which column is nearest.

    Args:
        rows: `(R, D)`, row i with a column of its own, start + i.
        start: the column of the first row.
    """

    def __init__(self, rows: Tensor, start: int) -> None:
        self.start = start
        self.logits = rows.new_zeros(len(rows))
        self.highest = rows.new_full((len(rows),), -torch.inf)
        self.nearest = torch.zeros(len(rows), dtype=torch.long, device=rows.device)

    def note(self, at: Place, logits: Tensor) -> None:
        """Note what there is of it in one tile."""
        i, j = at
        which, own = own_pairs(logits, at, self.start)
        self.logits[which] = own
        highest, where = logits.max(1)
        nearer = highest > self.highest[i]
        self.highest[i] = torch.where(nearer, highest, self.highest[i])
        self.nearest[i] = torch.where(nearer, where + j.start, self.nearest[i])


def push(
    factors: tuple[Tensor, Tensor], gradients: tuple[Tensor | None, Tensor | None], at: Place, grad: Tensor
) -> None:
    """Add the gradient of one tile's products to those of rows and columns, which may share memory."""
    if gradients[0] is not None:
        gradients[0][at[0]].addmm_(grad, factors[1][at[1]])
    if gradients[1] is not None:
        gradients[1][at[1]].addmm_(grad.T, factors[0][at[0]])


class Gradients:
    """Gradients of rows, columns, scale and bias, summed up tile by tile from the gradient of the logits.

    Args:
        rows: `(R, D)`.
        columns: `(C, D)`.
        scale: `(1,)`.
        needed: for rows, columns, scale and bias, which of them are wanted.
    """

    def __init__(self, rows: Tensor, columns: Tensor, scale: Tensor, needed: tuple[bool, ...]) -> None:
        self.inputs, self.scale = (rows, columns), scale
        # The scale's gradient falls out of the product for the rows: sum(G * XYᵀ) = sum(GY * X).
        self.rows = torch.zeros_like(rows) if needed[0] or needed[2] else None
        self.columns = torch.zeros_like(columns) if needed[1] else None
        self.bias = torch.zeros_like(scale) if needed[3] else None
        self.needed = needed

    def add(self, at: Place, grad: Tensor) -> None:
        """Push the gradient of one tile's logits into all of them."""
        push(self.inputs, (self.rows, self.columns), at, grad)
        if self.bias is not None:
            self.bias += grad.sum()

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of rows, columns, scale and bias, None for those that are not needed."""
        scale = None
        if self.rows is not None:
            blocks = (each.split(TILE_ROWS) for each in (self.rows, self.inputs[0]))
            scale = sum((grad * rows).sum() for grad, rows in zip(*blocks, strict=True)).reshape_as(
                self.scale
            )
            self.rows *= self.scale
        if self.columns is not None:
            self.columns *= self.scale
        return (
            self.rows if self.needed[0] else None,
            self.columns,
            scale if self.needed[2] else None,
            self.bias,
        )
