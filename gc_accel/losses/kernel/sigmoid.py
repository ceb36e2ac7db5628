"""The streaming sum of binary cross-entropies: every pair of a similarity matrix as a decision of its own.

The derivative of a term is a sigmoid of its own logit, so the gradient is had along with the value: 3 products
of R C D multiply-adds forward, none backward, and no tile is ever kept.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gc_accel.losses.kernel.eager import with_gradients
from gc_accel.losses.kernel.tiling import Gradients, Own, Place, logits_of, own_pairs, tiles


class Positives(NamedTuple):
    """Which pairs belong together: row i and column start + i or, given labels, all of one label."""

    start: int
    row_labels: Tensor | None = None
    column_labels: Tensor | None = None

    def negated(self, tile: Tensor, at: Place) -> Tensor:
        """The tile, with the sign of its positives changed."""
        if self.row_labels is None or self.column_labels is None:
            own_pairs(tile, at, self.start)[1].neg_()
            return tile
        return torch.where(self.row_labels[at[0], None] == self.column_labels[at[1]], -tile, tile)


def sigmoid_cross_entropy(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, positives: Positives, own: Own
) -> Tensor:
    """Sum over all pairs of -log sigmoid(s) for positives, of -log sigmoid(-s) for the others; 0-d.

    Args:
        rows: `(R, D)`.
        columns: `(C, D)`.
        scale: `(1,)`, multiplies the products.
        bias: `(1,)` or None, is added to them.
        positives: which pairs belong together.
        own: takes note of the logits, without the bias.
    """

    def compute(
        inputs: tuple[Any, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        rows, columns, scale, bias = inputs
        gradients = Gradients(rows, columns, scale, needed)
        total = rows.new_zeros((), dtype=torch.float64 if rows.device.type != "mps" else None)
        for at in tiles(len(rows), len(columns)):
            logits = logits_of(rows, columns, scale, at)
            own.note(at, logits)
            if bias is not None:
                logits += bias
            # -log sigmoid(x) = softplus(-x), and softplus has the derivative sigmoid. Beyond the threshold
            # softplus is x itself, by default too early for float64.
            against = positives.negated(logits, at)
            total += F.softplus(against, threshold=40).sum()
            if any(needed):
                gradients.add(at, positives.negated(against.sigmoid_(), at))
        return total.to(rows.dtype), gradients.result()

    return with_gradients(compute, rows, columns, scale, bias)
