"""NNCLR, nearest-neighbour contrastive learning (Dwibedi et al. 2021, arXiv 2104.14548, equation 2)."""

from torch import Tensor

from gc_accel.losses.base import Group, open_views
from gc_accel.losses.checks import check_above_zero, check_views, full_precision
from gc_accel.losses.kernel.streaming import logsumexp_over_pairs
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET
from gc_accel.losses.stateful.accumulated import Reps, StatefulLoss, output_of
from gc_accel.losses.stateful.queue import Queue


class NNCLRLoss(StatefulLoss):
    """The nearest neighbour of one view, among earlier samples, picks the prediction from the other view:

        L = 1/2N sum_i [ c(n1_i, p2) + c(n2_i, p1) ],   c(n_i, p) = LSE_{j of the batch} n_i.p_j/T - n_i.p_i/T

    n are the rows of the queue nearest to z, the encoder's `views`, and p its `predictions`. Their gradient
    couples all samples, so this is regime A. lightly's variant contrasts neighbours with each other and
    predictions with each other too, as NT-Xent does: another loss.

    Args:
        temperature: T, above 0.
        queue_size: of the support set, 98,304 in the paper. It takes in the first view of every sample.
        dim: D of the representations.
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        queue_size: int = 65_536,
        dim: int = 128,
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__(process_group=process_group)
        check_above_zero("a temperature", temperature)
        self.temperature, self.tile_budget = temperature, tile_budget
        self.queue = Queue(queue_size, dim)

    def forward(
        self, views: Tensor, predictions: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, 2, D)`, L2-normalised, of this rank.
            predictions: `(B, 2, D)`, likewise; an encoder without a predictor has none.
            labels: not looked at, so that a labelled data set can be used as it is.

        Raises:
            ValueError: for other shapes, without predictions, and for a global batch of a single sample.
        """
        reps = {"views": views} | ({} if predictions is None else {"predictions": predictions})
        predictions = output_of(reps, "predictions", "predictor")
        check_views(predictions, at_least=2, at_most=2)
        views, batch = open_views(self, views, at_most=2)
        (predictions,) = full_precision(predictions)
        neighbours = self.queue.nearest(views.detach().flatten(0, 1)).view_as(views)
        candidates = batch.gather(predictions)
        scale = views.new_full((1,), 1 / self.temperature)
        share = views.sum() * 0  # views have a gradient, of zero, where the engine would miss one
        for view in (0, 1):
            anchors, other = neighbours[:, view], 1 - view
            total = logsumexp_over_pairs(
                anchors, candidates[:, other], scale, None, tile_budget=self.tile_budget
            )
            share = share + (total - scale * (anchors * predictions[:, other]).sum(1)).sum()
        return batch.sum(share / (2 * batch.total))

    def update(self, reps: Reps) -> None:
        self.queue.push(self.everywhere(reps["views"][:, 0]))
