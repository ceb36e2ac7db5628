"""Which pairs of a similarity matrix a sum is over, said by integers: no mask is larger than a tile.

Shape letters: R rows (anchors) and C columns (candidates) of the matrix, r and c those of one tile.
"""

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
        equal_ids: whether a pair of equal ids is "out", as where anchors are candidates themselves, or "in"
            whatever its classes, as an image with its own text.
        above_diagonal: anchors and candidates are the same rows, in ascending order of ids, and a pair is
            named once, by the element of the matrix above the diagonal, for both of its rows.
        run: above the diagonal, how many rows in succession may share an id.
    """

    row_ids: Tensor
    column_ids: Tensor
    row_classes: Tensor | None = None
    column_classes: Tensor | None = None
    classes: Literal["same", "other"] = "same"
    equal_ids: Literal["out", "in"] = "out"
    above_diagonal: bool = False
    run: int = 1

    def left_out(self, i: slice, j: slice) -> Tensor | None:
        """Which pairs `(r, c)` of the tile of rows i and columns j do not count, or None where all count."""
        mask = None
        if self.above_diagonal:
            if j.start < i.stop + self.run - 1:  # the diagonal cuts through this tile
                mask = self.row_ids[i, None] >= self.column_ids[j]
        elif self.equal_ids == "out":
            mask = self.row_ids[i, None] == self.column_ids[j]
        if self.row_classes is not None and self.column_classes is not None:
            rows, columns = self.row_classes[i, None], self.column_classes[j]
            wrong = rows == columns if self.classes == "other" else rows != columns
            mask = wrong if mask is None else mask | wrong
            if self.equal_ids == "in":
                mask &= self.row_ids[i, None] != self.column_ids[j]
        return mask
