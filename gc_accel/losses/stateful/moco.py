"""MoCo, momentum contrast: v2 with a queue (arXiv 1911.05722, 2003.04297), v3 without (arXiv 2104.02057).

Shape letters: N samples of the global batch, B of this rank, C of a chunk, Q rows of the queue, D dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gc_accel.distributed import RankedBatch
from gc_accel.losses.base import Group
from gc_accel.losses.checks import check_above_zero, check_views
from gc_accel.losses.kernel.streaming import logsumexp_over_pairs
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET
from gc_accel.losses.stateful.accumulated import AccumulatedLoss, Reps
from gc_accel.losses.stateful.momentum import MomentumEncoder
from gc_accel.losses.stateful.queue import Queue


class Keys(NamedTuple):
    """The keys with which the queries of a batch are compared, by the view of the key."""

    positives: Tensor  # (B, 2, D)
    candidates: Tensor  # (N or Q, 2, D)


class MoCoLoss(AccumulatedLoss):
    """Each query picks the key of its own sample's other view:

        v3    L = 2T/N sum_i [ c(q1_i, k2) + c(q2_i, k1) ],   c(q_i, k) = LSE_{n of the batch} q_i.k_n/T - q_i.k_i/T
        v2    L = 1/2N sum_i [ c(q1_i, k2) + c(q2_i, k1) ],   with LSE over k_i and the queue instead

    Keys k are `views` of the momentum encoder, queries q the encoder's `predictions` if it has a predictor, as
    v3 wants, else its `views`, as v2 does. The keys of the whole global batch make v3 regime B; with a queue it
    is C. v2 as published has the first of the two terms alone; here both views are encoded anyway.

    Args:
        temperature: T, above 0.
        queue_size: Q, in keys: 65,536 in v2, which pushes both keys of each sample; 0 is v3.
        dim: D, for the queue.
        teacher: the momentum encoder.
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.
    """

    targets_from = "teacher"

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        queue_size: int = 0,
        dim: int = 128,
        teacher: MomentumEncoder | None = None,
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__(teacher=teacher, process_group=process_group)
        check_above_zero("a temperature", temperature)
        self.temperature, self.tile_budget = temperature, tile_budget
        self.regime = "C" if queue_size else "B"
        self.queue = Queue(queue_size, dim) if queue_size else None

    def targets(self, reps: Reps, batch: RankedBatch) -> Keys:
        keys = reps["views"]
        check_views(keys, at_least=2, at_most=2)
        if self.queue is None:
            return Keys(keys, batch.gather(keys))
        self.queue.check(keys[:, 0])
        return Keys(keys, self.queue.rows.to(keys)[:, None].expand(-1, 2, -1))

    def per_sample(self, reps: Reps, targets: Keys, rows: slice) -> Tensor:
        queries = reps.get("predictions", reps["views"])
        positives, candidates = targets.positives[rows], targets.candidates
        views = ((0, 1), (1, 0))  # of a query and of its key
        terms = [self._cross_entropy(queries[:, q], positives[:, k], candidates[:, k]) for q, k in views]
        return torch.stack(terms).sum(0) * (2 * self.temperature if self.queue is None else 0.5)

    def update(self, reps: Reps) -> None:
        if self.queue is not None:
            self.queue.push(self.everywhere(reps["views"]).flatten(0, 1))

    def _cross_entropy(self, queries: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
        """The cross-entropy `(C,)` of each query `(C, D)`, from its positive `(C, D)` and candidates `(N or Q, D)`."""
        scale = queries.new_full((1,), 1 / self.temperature)
        total = logsumexp_over_pairs(queries, candidates, scale, None, tile_budget=self.tile_budget)
        positive = scale * (queries * positives).sum(1)
        return (total if self.queue is None else torch.logaddexp(total, positive)) - positive
