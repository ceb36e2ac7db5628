"""Which pairs of a similarity matrix a sum is over, said by integers: no mask is larger than a tile."""

from typing import NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """The pairs of an anchor and a candidate that are two different rows and, given classes, of one class.

    Args:
        row_ids: `(R,)`, which row of the global batch each anchor is.
        column_ids: `(C,)`, likewise for the candidates.
        row_classes: `(R,)`, or None: pairs of all classes.
        column_classes: `(C,)`, or None.
        above_diagonal: anchors and candidates are the same rows, in ascending order, and a pair is named
            once, by the element of the matrix above the diagonal, for both of its rows.
    """

    row_ids: Tensor
    column_ids: Tensor
    row_classes: Tensor | None = None
    column_classes: Tensor | None = None
    above_diagonal: bool = False

    def left_out(self, i: slice, j: slice) -> Tensor | None:
        """A mask over the tile of rows i and columns j, or None where all of it counts."""
        mask = None
        if not self.above_diagonal:
            mask = self.row_ids[i, None] == self.column_ids[j]
        elif j.start < i.stop:  # the diagonal cuts through this tile
            mask = self.row_ids[i, None] >= self.column_ids[j]
        if self.row_classes is not None and self.column_classes is not None:
            strangers = self.row_classes[i, None] != self.column_classes[j]
            mask = strangers if mask is None else mask | strangers
        return mask
