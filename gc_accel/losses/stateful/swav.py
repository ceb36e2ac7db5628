"""SwAV, swapping assignments between views (Caron et al. 2020, arXiv 2006.09882, equations 1 to 5).

Shape letters: B samples of this rank, C of a chunk, V views, A views with codes, K prototypes, Q rows of the
queue, D dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gc_accel.distributed import RankedBatch
from gc_accel.losses.base import Group
from gc_accel.losses.checks import check_views
from gc_accel.losses.stateful.accumulated import AccumulatedLoss, Reps, output_of
from gc_accel.losses.stateful.queue import Queue


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    batch: RankedBatch,
    *,
    queued: Tensor | None = None,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    """Codes `(B, K)`: exp(scores / epsilon), with its columns and rows scaled in turn to share out evenly.

    Over all samples of the global batch every prototype gets the same mass, and every sample has a mass of 1
    to give. In logarithms, since exp(1 / 0.05) = 5e8 is far beyond half precision.

    Args:
        scores: `(B, K)`, of this rank.
        batch: the ranks.
        queued: `(Q, K)`, of earlier samples that take their share, equal on all ranks.
        epsilon: the lower, the harder the codes.
        iterations: of both scalings.
    """
    logits, waiting = scores / epsilon, None if queued is None else queued / epsilon
    for _ in range(iterations):
        mass = batch.logsumexp(logits.logsumexp(0))
        if waiting is not None:
            mass = torch.logaddexp(mass, waiting.logsumexp(0))
            waiting = (waiting - mass).log_softmax(1)
        logits = (logits - mass).log_softmax(1)
    return logits.exp()


class SwAVLoss(AccumulatedLoss):
    """Each view predicts the code of the others, its assignment to prototypes c by their scores s = z.c:

        L = 1/N sum_i 1/A sum_{a <= A} 1/(V-1) sum_{v != a} CE(code_a_i, softmax(s_v_i / T))

    s are the encoder's `scores` (`VisionEncoder(prototypes=...)`). Codes are taken over the global batch and
    have no gradient, so this is regime B; they come from the encoder itself, which therefore runs twice.

    Args:
        temperature: T, above 0.
        epsilon: of the codes.
        iterations: of Sinkhorn's algorithm.
        assigned: A, how many views, from the first, have codes: those of full resolution.
        queue_size: samples of earlier batches that take part in the codes, once there are so many. For batches
            of fewer samples than there are prototypes; 3,840 in the paper.
        dim: D, for the queue.
        prototypes: of the encoder, `encoder.further["scores"]`, for the queue.
        process_group: ranks whose batches make up the global batch; None is the default group.

    Raises:
        ValueError: for other values, and for a queue without prototypes.
    """

    regime = "B"
    targets_from = "encoder"

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        epsilon: float = 0.05,
        iterations: int = 3,
        assigned: int = 2,
        queue_size: int = 0,
        dim: int = 128,
        prototypes: Callable[[Tensor], Tensor] | None = None,
        process_group: Group = None,
    ) -> None:
        super().__init__(process_group=process_group)
        if temperature <= 0 or epsilon <= 0 or iterations < 1 or assigned < 1:
            raise ValueError(
                "expected temperature and epsilon above 0, iterations and assigned from 1, got "
                f"{temperature}, {epsilon}, {iterations} and {assigned}"
            )
        if queue_size and prototypes is None:
            raise ValueError('expected prototypes for the queue, got none: pass encoder.further["scores"]')
        self.temperature, self.epsilon = temperature, epsilon
        self.iterations, self.assigned = iterations, assigned
        self.queue = Queue(queue_size, assigned, dim) if queue_size else None
        self.prototypes: list[Any] = [prototypes]  # in a list: the encoder owns them

    def targets(self, reps: Reps, batch: RankedBatch) -> Tensor:
        """Codes `(B, A, K)`."""
        scores = self._scores(reps)
        queued = None
        if self.queue is not None and self.queue.is_full:  # by the prototypes as they are now, (Q, A, K)
            queued = self.prototypes[0](self.queue.rows).to(scores)
        assign = partial(sinkhorn, batch=batch, epsilon=self.epsilon, iterations=self.iterations)
        codes = [
            assign(scores[:, view], queued=None if queued is None else queued[:, view])
            for view in range(self.assigned)
        ]
        return torch.stack(codes, 1)

    def per_sample(self, reps: Reps, targets: Tensor, rows: slice) -> Tensor:
        log_shares = (self._scores(reps) / self.temperature).log_softmax(2)  # (C, V, K)
        entropies = -torch.einsum("cak,cvk->cav", targets[rows], log_shares)
        is_same_view = torch.eye(*entropies.shape[1:], dtype=torch.bool, device=entropies.device)
        return entropies.masked_fill(is_same_view, 0).sum(2).mean(1) / (log_shares.shape[1] - 1)

    def update(self, reps: Reps) -> None:
        if self.queue is not None:
            self.queue.push(self.everywhere(reps["views"][:, : self.assigned]))

    def _scores(self, reps: Reps) -> Tensor:
        """The checked scores `(B, V, K)` among the outputs of the encoder."""
        scores = output_of(reps, "scores", "prototypes")
        check_views(scores, at_least=max(2, self.assigned))
        return scores
