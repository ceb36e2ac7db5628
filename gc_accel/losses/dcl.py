"""Decoupled contrastive learning (Yeh et al. 2021, arXiv 2110.06848, equation 6): no positive below the line."""

import torch
from torch import Tensor

from gc_accel.distributed import RankedBatch
from gc_accel.losses import statistics
from gc_accel.losses.base import Group, TiledLoss, open_views
from gc_accel.losses.checks import check_above_zero
from gc_accel.losses.kernel.pairs import Pairs
from gc_accel.losses.kernel.streaming import logsumexp_over_pairs
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET


class DCLLoss(TiledLoss):
    """NT-Xent without the sample's own views in the denominator, so that it may become negative:

        L = 1/2B sum_i [ LSE_{n of other samples} z_i.z_n/T - z_i.z_p(i)/T ],  p(i) the other view

    With more than two views the second term is the mean over the others of the sample.

    Args:
        temperature: T, above 0.
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.

    `statistics` has `positive_similarity` and `negative_similarity` of the latest call, as in NT-Xent.
    """

    most_views: int | None = None

    def __init__(
        self, temperature: float = 0.1, *, process_group: Group = None, tile_budget: int = DEFAULT_TILE_BUDGET
    ) -> None:
        super().__init__(temperature, process_group=process_group, tile_budget=tile_budget)

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, V, D)`, L2-normalised, V at least 2, of this rank.
            labels: not looked at, so that a labelled data set can be used as it is.

        Raises:
            ValueError: for another shape, and for a global batch of a single sample.
        """
        views, batch = open_views(self, views, at_most=self.most_views)
        candidates, count = batch.gather(views), views.shape[1]
        samples = torch.arange(batch.total, device=views.device)
        row_ids, ids = (x.repeat_interleave(count) for x in (samples[batch.own], samples))
        pairs = Pairs(row_ids, ids, above_diagonal=len(row_ids) == len(ids), run=count)
        scale = views.new_full((1,), 1 / self.temperature)
        rows, columns = views.flatten(0, 1), candidates.flatten(0, 1)
        repulsion = logsumexp_over_pairs(rows, columns, scale, pairs, tile_budget=self.tile_budget)
        siblings = (views.sum(1, keepdim=True) - views) / (count - 1)
        attraction = scale * (views * siblings).sum(2)
        self.statistics = statistics.of_samples(candidates)
        terms = repulsion.view_as(attraction) - self._weights(batch, views) * attraction
        return batch.sum(terms.sum() / len(ids))

    def _weights(self, batch: RankedBatch, views: Tensor) -> Tensor | float:
        """How much the positives of each sample count, `(B, 1)`, for views `(B, V, D)` of this rank."""
        return 1.0


class DCLWLoss(DCLLoss):
    """DCL whose positives weigh more the further apart they are, 1 on average over the batch:

        w_i = 2 - B · softmax_i(z_i.z_p(i)/sigma)

    Args:
        temperature, process_group, tile_budget: as in `DCLLoss`.
        sigma: above 0, how soon the weights level out.
        detach_weight: take the weights as constants, as lightly does. The authors' code does not.
    """

    most_views = 2

    def __init__(
        self,
        temperature: float = 0.1,
        sigma: float = 0.5,
        *,
        detach_weight: bool = False,
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__(temperature, process_group=process_group, tile_budget=tile_budget)
        check_above_zero("sigma", sigma)
        self.sigma, self.detach_weight = sigma, detach_weight

    def _weights(self, batch: RankedBatch, views: Tensor) -> Tensor:
        similarity = (views[:, 0] * views[:, 1]).sum(1, keepdim=True) / self.sigma
        total = batch.logsumexp(similarity.logsumexp(0))  # softmax over the samples of all ranks
        weights = 2 - batch.total * (similarity - total).exp()
        return weights.detach() if self.detach_weight else weights
