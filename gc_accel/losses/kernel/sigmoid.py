"""The streaming sum of binary cross-entropies: every pair of a similarity matrix is a decision of its own.

The derivative of a term is a sigmoid of its own logit, so the gradient is computed along with the value: 3
products of R C D multiply-adds forward, none backward, and no tile is ever kept.

Shape letters: R rows and C columns of the matrix, r and c those of one tile, D dim.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gc_accel.losses.kernel.eager import Gradient, with_gradients
from gc_accel.losses.kernel.tiling import (
    Gradients,
    Place,
    RowStats,
    diagonal_of,
    exact_sum,
    logits_of,
    tiles,
)


class Positives(NamedTuple):
    """Which pairs are positives: row i and column start + i or, given labels of rows, all pairs of one label."""

    start: int
    row_labels: Tensor | None = None  # (R,)
    column_labels: Tensor | None = None  # (C,)

    def negated(self, tile: Tensor, at: Place) -> Tensor:
        """The tile `(r, c)` with the sign of its positives changed, in place where there are no labels."""
        if self.row_labels is None or self.column_labels is None:
            diagonal_of(tile, at, self.start)[1].neg_()
            return tile
        return torch.where(self.row_labels[at[0], None] == self.column_labels[at[1]], -tile, tile)


def sigmoid_cross_entropy(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, positives: Positives, stats: RowStats
) -> Tensor:
    """Sum over all pairs of -log sigmoid(s) for positives, of -log sigmoid(-s) for the others; 0-d.

    Args:
        rows: `(R, D)`.
        columns: `(C, D)`.
        scale: `(1,)`, multiplies the products.
        bias: `(1,)` or None, is added to them.
        positives: which pairs are positives.
        stats: of the rows; takes in the logits, without the bias.
    """

    def compute(inputs: tuple[Any, ...], needed: tuple[bool, ...]) -> tuple[Tensor, tuple[Gradient, ...]]:
        rows, columns, scale, bias = inputs
        gradients, total = Gradients(rows, columns, scale, needed), exact_sum(rows.new_zeros(0))
        for at in tiles(len(rows), len(columns)):
            logits = logits_of(rows, columns, scale, at)
            stats.add(at, logits)
            if bias is not None:
                logits += bias
            # -log sigmoid(x) = softplus(-x), and softplus has the derivative sigmoid. Beyond the threshold
            # softplus is x itself, by default too early for float64.
            negated = positives.negated(logits, at)
            total += F.softplus(negated, threshold=40).sum()
            if any(needed):
                gradients.add(at, positives.negated(negated.sigmoid_(), at))
        return total.to(rows.dtype), gradients.finish()

    return with_gradients(compute, rows, columns, scale, bias)
