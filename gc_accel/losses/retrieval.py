"""The loss of dense retrieval: each question picks its passage out of all passages of the global batch.

DPR's loss (Karpukhin et al. 2020, arXiv 2004.04906, equation 2, with the in-batch negatives of its section
3.2), that of Gao et al. 2021 (arXiv 2101.06983), for whom gradient caching was made.

Shape letters: B questions of this rank, P passages of each, N passages of the global batch, D dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gc_accel.losses.base import Group, TiledLoss, open_batch
from gc_accel.losses.kernel.pairs import Pairs
from gc_accel.losses.kernel.streaming import logsumexp_over_pairs
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET


class RetrievalLoss(TiledLoss):
    """Mean cross-entropy of each question's positive among the passages of all questions of all ranks.

        L = 1/B sum_i [ LSE_{n in N(i)} q_i.p_n/T - q_i.p_i/T ]

    p_i is the first passage of question i, its others are hard negatives. N(i) are all passages, or, given ids,
    p_i and those with another id: the same passage under another question is no negative.

    On several ranks each takes its own questions against all passages: one gather of the passages, one
    reduce-scatter of their gradients.

    Args:
        temperature: T, above 0. Fixed, so that an encoder of transformers is all that has to be saved.
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__(temperature, process_group=process_group, tile_budget=tile_budget)

    def forward(self, query: Tensor, passage: Tensor, passage_ids: Tensor | None = None) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            query: `(B, D)`, L2-normalised, of this rank.
            passage: `(B, P, D)`, likewise; of each question the positive first, then P - 1 hard negatives. P
                is the same on all ranks.
            passage_ids: `(B, P)` integers, equal for equal passages, also over ranks.

        Raises:
            ValueError: if shapes do not pair up.
        """
        _check(query, passage, passage_ids)
        query, passage, batch = open_batch(self, query, passage)
        passages = batch.gather(passage).flatten(0, 1)
        if passage_ids is None:  # every passage is one of its own
            passage_ids = torch.arange(len(passages), device=query.device).view(-1, passage.shape[1])
            positive_ids, ids = passage_ids[batch.own, 0], passage_ids.flatten()
        else:
            positive_ids, ids = passage_ids[:, 0], batch.gather(passage_ids).flatten()
        scale = query.new_full((1,), 1 / self.temperature)
        pairs = Pairs(positive_ids, ids)  # all passages that are not the positive
        negatives = logsumexp_over_pairs(query, passages, scale, pairs, tile_budget=self.tile_budget)
        positive = scale * (query * passage[:, 0]).sum(1)
        # LSE(positive, negatives) - positive; 0, with no gradient, where there is no negative at all
        return batch.sum(F.softplus(negatives - positive).sum() / batch.total)


def _check(query: Tensor, passage: Tensor, passage_ids: Tensor | None) -> None:
    """Raise ValueError for other shapes than `RetrievalLoss.forward` takes."""
    if query.ndim != 2 or passage.ndim != 3 or passage.shape[::2] != query.shape:
        raise ValueError(
            f"expected query (B, D) and passage (B, P, D), got {tuple(query.shape)} and {tuple(passage.shape)}: "
            "stack a question's passages along dimension 1, the positive first"
        )
    if passage_ids is not None and passage_ids.shape != passage.shape[:2]:
        raise ValueError(
            f"expected an id per passage, shape {tuple(passage.shape[:2])}, got {tuple(passage_ids.shape)}"
        )
