"""Alignment and uniformity on the hypersphere (Wang and Isola 2020, arXiv 2005.10242, section 4)."""

import math

import torch
from torch import Tensor

from gc_accel.distributed import RankedBatch
from gc_accel.losses import statistics
from gc_accel.losses.base import Group, TiledLoss, open_views
from gc_accel.losses.checks import check_above_zero
from gc_accel.losses.kernel.pairs import Pairs
from gc_accel.losses.kernel.streaming import logsumexp_over_pairs
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET


class AlignUniformLoss(TiledLoss):
    """Views x_i, y_i of a sample close together, views of different samples spread evenly:

        L = mean_i ||x_i - y_i||^a  +  w/2 · [ U(x) + U(y) ],  U(z) = log mean_{i<j} exp(-t ||z_i - z_j||²)

    The mean over pairs is one log-sum-exp, the squared distance a product of rows that are two longer:
    -||x - y||²/2 = (x, -||x||²/2, 1)·(y, 1, -||y||²/2).

    Args:
        alpha: a, above 0.
        t: above 0; the paper's 2, lightly has 1.
        uniformity: w.
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.

    `statistics` has `positive_similarity` and `negative_similarity` of the latest call, as in NT-Xent.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        t: float = 2.0,
        *,
        uniformity: float = 1.0,
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__(process_group=process_group, tile_budget=tile_budget)
        check_above_zero("alpha and t", alpha, t)
        self.alpha, self.t, self.uniformity = alpha, t, uniformity

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, 2, D)`, L2-normalised, of this rank.
            labels: not looked at, so that a labelled data set can be used as it is.

        Raises:
            ValueError: for another shape, and for a global batch of a single sample.
        """
        views, batch = open_views(self, views, at_most=2)
        candidates = batch.gather(views)
        self.statistics = statistics.of_samples(candidates)
        distance = torch.linalg.vector_norm(views[:, 0] - views[:, 1], dim=1)
        alignment = distance.pow(self.alpha).sum() / batch.total
        uniform = (self._uniform(batch, views[:, v], candidates[:, v]) for v in (0, 1))
        # Every rank has the same U, so it takes its share of it.
        return batch.sum(alignment + self.uniformity / 2 * sum(uniform) / len(batch.sizes))

    def _uniform(self, batch: RankedBatch, rows: Tensor, columns: Tensor) -> Tensor:
        """U of one view, 0-d and the same on all ranks, from rows `(B, D)` of this rank and columns of all."""
        ids = torch.arange(batch.total, device=rows.device)
        pairs = Pairs(ids[batch.own], ids, above_diagonal=len(rows) == len(columns))
        left = torch.cat((rows, _half_square(rows), torch.ones_like(rows[:, :1])), 1)
        right = torch.cat((columns, torch.ones_like(columns[:, :1]), _half_square(columns)), 1)
        scale = rows.new_full((1,), 2 * self.t)
        by_row = logsumexp_over_pairs(left, right, scale, pairs, tile_budget=self.tile_budget)
        whole = batch.logsumexp(by_row.logsumexp(0, keepdim=True))  # has each pair twice
        return whole.squeeze(0) - math.log(batch.total * (batch.total - 1))


def _half_square(rows: Tensor) -> Tensor:
    return -rows.square().sum(1, keepdim=True) / 2
