"""A similarity matrix in tiles: which tiles there are, what one holds, and where its gradient goes.

    logits s = scale * X Yᵀ           X: (R, D) rows (anchors), Y: (C, D) columns (candidates)

Sums run over tiles in a fixed order, in the inputs' own precision: every result is bitwise repeatable.

Shape letters: R rows and C columns of the matrix, r and c those of one tile, D dim.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gc_accel.losses.kernel.pairs import Pairs

DEFAULT_TILE_BUDGET = 256 * 2**20  # bytes
TILE_ROWS, TILE_COLUMNS = 512, 1024  # fastest on the CPUs measured (docs/log.md)

Place = tuple[slice, slice]  # the rows and the columns that a tile covers


def exact_sum(terms: Tensor) -> Tensor:
    """The sum of all terms `(...)`, 0-d, in float64 where the device has it: a loss may be a small difference."""
    return terms.sum(dtype=None if terms.device.type == "mps" else torch.float64)


def tiles(rows: int, columns: int, above_diagonal: bool = False) -> Iterator[Place]:
    """The places of the tiles that cover a matrix, or the part above its diagonal, row by row."""
    for top in range(0, rows, TILE_ROWS):
        for left in range(top if above_diagonal else 0, columns, TILE_COLUMNS):
            yield slice(top, min(top + TILE_ROWS, rows)), slice(left, min(left + TILE_COLUMNS, columns))


def logits_of(rows: Tensor, columns: Tensor, scale: Tensor, at: Place) -> Tensor:
    """The logits `(r, c)` of one tile, from rows `(R, D)`, columns `(C, D)` and scale `(1,)`."""
    return (rows[at[0]] * scale) @ columns[at[1]].T


class Logits(NamedTuple):
    """All logits, of which one tile exists at a time."""

    rows: Tensor  # (R, D)
    columns: Tensor  # (C, D)
    scale: Tensor  # (1,)
    pairs: Pairs | None = None  # which pairs count; None: all
    start: int | None = None  # row i belongs to column start + i; None: to no column

    @property
    def halved(self) -> bool:
        """Whether only the tiles above the diagonal are computed."""
        return self.pairs is not None and self.pairs.above_diagonal

    def places(self) -> Iterator[Place]:
        """Where the tiles are, in the order of computation."""
        return tiles(len(self.rows), len(self.columns), self.halved)

    def tile(self, at: Place) -> Tensor:
        """The logits `(r, c)` of one tile, minus infinity for pairs that do not count."""
        logits = logits_of(self.rows, self.columns, self.scale, at)
        mask = None if self.pairs is None else self.pairs.left_out(*at)
        return logits if mask is None else logits.masked_fill_(mask, -torch.inf)


def diagonal_of(tile: Tensor, at: Place, start: int) -> tuple[slice, Tensor]:
    """Where a tile `(r, c)` pairs row i with column start + i: those rows, and a view of their elements.

    columns      0    1    2    3    4      start = 2
    row 0                  x
    row 1                       x           empty for most tiles
    """
    i, j = at
    diagonal = tile.diagonal(i.start + start - j.start)
    first = max(i.start, j.start - start)
    return slice(first, first + len(diagonal)), diagonal


class RowStats:
    """Statistics of each row, from the tiles: its logit on the diagonal, and its nearest column.

    Of rows `(R, D)`, row i belongs to column start + i. `diagonal` `(R,)` has their logits, `nearest` `(R,)` the
    column of the largest logit of each row, which is in `highest` `(R,)`.
    """

    def __init__(self, rows: Tensor, start: int) -> None:
        self.start = start
        self.diagonal = rows.new_zeros(len(rows))
        self.highest = rows.new_full((len(rows),), -torch.inf)
        self.nearest = torch.zeros(len(rows), dtype=torch.long, device=rows.device)

    def add(self, at: Place, logits: Tensor) -> None:
        """Take in the logits `(r, c)` of one tile."""
        i, j = at
        rows, diagonal = diagonal_of(logits, at, self.start)
        self.diagonal[rows] = diagonal
        highest, columns = logits.max(1)
        is_higher = highest > self.highest[i]
        self.highest[i] = torch.where(is_higher, highest, self.highest[i])
        self.nearest[i] = torch.where(is_higher, columns + j.start, self.nearest[i])


def add_gradients(
    factors: tuple[Tensor, Tensor], gradients: tuple[Tensor | None, Tensor | None], at: Place, grad: Tensor
) -> None:
    """Add the gradient `(r, c)` of one tile's products to the gradients of its factors.

    The factors are rows `(R, D)` and columns `(C, D)`. Their gradients may share memory; None: not needed.
    """
    if gradients[0] is not None:
        gradients[0][at[0]].addmm_(grad, factors[1][at[1]])
    if gradients[1] is not None:
        gradients[1][at[1]].addmm_(grad.T, factors[0][at[0]])


class Gradients:
    """Gradients of rows, columns, scale and bias, summed up from the gradients of the tiles.

    Args:
        rows: `(R, D)`.
        columns: `(C, D)`.
        scale: `(1,)`.
        needed: for rows, columns, scale and bias, whether a gradient is needed.
    """

    def __init__(self, rows: Tensor, columns: Tensor, scale: Tensor, needed: tuple[bool, ...]) -> None:
        self.inputs, self.scale = (rows, columns), scale
        # The scale's gradient falls out of the product for the rows: sum(G * XYᵀ) = sum(GY * X).
        self.rows = torch.zeros_like(rows) if needed[0] or needed[2] else None
        self.columns = torch.zeros_like(columns) if needed[1] else None
        self.bias = torch.zeros_like(scale) if needed[3] else None
        self.needed = needed

    def add(self, at: Place, grad: Tensor) -> None:
        """Take in the gradient `(r, c)` of the logits of one tile."""
        add_gradients(self.inputs, (self.rows, self.columns), at, grad)
        if self.bias is not None:
            self.bias += grad.sum()

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Scale the sums, once, and hand over the gradients in the order of `needed`, None where not needed."""
        scale = None
        if self.rows is not None:
            parts = zip(self.rows.split(TILE_ROWS), self.inputs[0].split(TILE_ROWS), strict=True)
            scale = sum((grad * rows).sum() for grad, rows in parts).reshape_as(self.scale)
            self.rows *= self.scale
        if self.columns is not None:
            self.columns *= self.scale
        rows = self.rows if self.needed[0] else None
        return rows, self.columns, scale if self.needed[2] else None, self.bias
