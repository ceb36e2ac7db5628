"""Which pairs of a similarity matrix a sum is over, said by integers: no mask is larger than a tile."""

from typing import Literal, NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """The pairs of an anchor and a candidate that count.

    Args:
        row_ids: `(R,)`, which row of the global batch each anchor is.
        column_ids: `(C,)`, likewise for the candidates.
        row_classes: `(R,)`, or None: classes do not matter.
        column_classes: `(C,)`, or None.
        classes: whether a pair counts if both are of the "same" class, or if they are of "other" classes.
        own: what becomes of a pair of equal ids: it is "out", as where anchors are candidates themselves, or
            "in" whatever its classes, as an image with its own text.
        above_diagonal: anchors and candidates are the same rows, in ascending order of ids, and a pair is
            named once, by the element of the matrix above the diagonal, for both of its rows.
        run: above the diagonal, how many rows in succession may share an id.
    """

    row_ids: Tensor
    column_ids: Tensor
    row_classes: Tensor | None = None
    column_classes: Tensor | None = None
    classes: Literal["same", "other"] = "same"
    own: Literal["out", "in"] = "out"
    above_diagonal: bool = False
    run: int = 1

    def left_out(self, i: slice, j: slice) -> Tensor | None:
        """A mask over the tile of rows i and columns j, or None where all of it counts."""
        mask = None
        if self.above_diagonal:
            if j.start < i.stop + self.run - 1:  # the diagonal cuts through this tile
                mask = self.row_ids[i, None] >= self.column_ids[j]
        elif self.own == "out":
            mask = self.row_ids[i, None] == self.column_ids[j]
        if self.row_classes is not None and self.column_classes is not None:
            rows, columns = self.row_classes[i, None], self.column_classes[j]
            wrong = rows == columns if self.classes == "other" else rows != columns
            mask = wrong if mask is None else mask | wrong
            if self.own == "in":
                mask &= self.row_ids[i, None] != self.column_ids[j]
        return mask
