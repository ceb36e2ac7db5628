"""In place of `grad_cache.loss`: cross-entropy of each query over all candidates (Gao et al. 2021, equation 1).

    x: (N, D) queries, y: (M, D) candidates, M = N (1 + h), the positive of a query before its h hard negatives

    L = mean_i [ LSE_j x_i.y_j - x_i.y_t(i) ],  t(i) = i (1 + h)

Neither side is normalised. The N x M logits are computed in tiles (`gc_accel/losses/kernel/streaming.py`), in float32
or better, so memory is linear in the batch.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gc_accel.distributed import RankedBatch, world_size
from gc_accel.losses.checks import full_precision
from gc_accel.losses.kernel.pairs import Pairs
from gc_accel.losses.kernel.streaming import logsumexp_over_pairs

IGNORED = -100  # the target of a query that does not count, as in torch's cross-entropy

Reduction = Literal["mean", "sum", "none"]


class SimpleContrastiveLoss:
    """The loss of the queries and candidates that it is given; on several ranks, those of one rank.

    Args:
        n_hard_negatives: h, how many candidates follow the positive of each query and belong to it.
    """

    def __init__(self, n_hard_negatives: int = 0) -> None:
        self.target_per_qry = n_hard_negatives + 1

    def __call__(
        self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """The loss, 0-d, or `(N,)` for the reduction "none".

        Args:
            x: `(N, D)`.
            y: `(M, D)`; M is N (1 + h) unless there is a target.
            target: `(N,)`, which candidate each query belongs to, -100 for a query that does not count; or
                `(N, M)` probabilities, which take the memory of all logits.
            reduction: over queries.

        Raises:
            ValueError: for lengths that do not fit, or another reduction.
        """
        if target is None:
            target = self._targets(len(x), len(y), x.device)
        if target.is_floating_point():
            return F.cross_entropy(x @ y.T, target, reduction=reduction)
        return reduced(by_query(x, y, target), reduction, (target != IGNORED).sum())

    def _targets(self, queries: int, candidates: int, device: torch.device) -> Tensor:
        if queries * self.target_per_qry != candidates:
            raise ValueError(
                f"expected {self.target_per_qry} candidates for each of {queries} queries, got {candidates}: set "
                "n_hard_negatives, or give a target"
            )
        return torch.arange(queries, device=device) * self.target_per_qry


class DistributedContrastiveLoss(SimpleContrastiveLoss):
    """The loss of the global batch: the queries of each rank over the candidates of all ranks.

    It brings the factor W of the scaling rule (`gc_accel/distributed/replicas.py`) along, because models are reduced by
    DistributedDataParallel, which takes the mean over W ranks: the gradient is that of one process with the whole
    batch, in `GradCache`, under the decorators and without a cache. The published class gives 1/W of it.
    `gc_accel.GradientCache` does both by itself, gathering and scaling: give it `SimpleContrastiveLoss`.

    Args:
        n_hard_negatives: h, as above.
        average_over_ranks: 1/W of the gradient, as published, for a learning rate that was tuned to it.

    Raises:
        ValueError: if no process group is initialised.
    """

    def __init__(self, n_hard_negatives: int = 0, *, average_over_ranks: bool = False) -> None:
        super().__init__(n_hard_negatives)
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "expected an initialised process group, got none: call init_process_group first, or use "
                "SimpleContrastiveLoss"
            )
        self.average_over_ranks = average_over_ranks

    def __call__(
        self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """The loss of the global batch, 0-d, equal on all ranks.

        Args:
            x: `(N, D)`, of this rank; ranks may differ in N.
            y: `(M, D)`, of this rank.
            target: `(sum of N,)`, for the queries of all ranks in rank order, equal on all: which candidate of
                all ranks each belongs to.
            reduction: "mean" or "sum".

        Raises:
            ValueError: for lengths that do not fit, or another reduction.
        """
        if reduction == "none":
            raise ValueError('expected reduction "mean" or "sum" over ranks, got "none"')
        queries, candidates = RankedBatch(len(x), x.device), RankedBatch(len(y), y.device)
        if target is None:
            target = self._targets(queries.total, candidates.total, x.device)
        if target.shape != (queries.total,):
            raise ValueError(
                f"expected a target for each of the {queries.total} queries of all ranks, got shape "
                f"{tuple(target.shape)}"
            )
        rows = by_query(x, candidates.gather(y), target[queries.own])
        loss = queries.sum(reduced(rows, reduction, (target != IGNORED).sum()))
        factor = 1 if self.average_over_ranks else world_size()
        return loss.detach() + factor * (loss - loss.detach())  # the value of L, the gradient of W L


class ContrastiveLossWithQueryClosure(SimpleContrastiveLoss):
    """`SimpleContrastiveLoss` whose queries may come from a function, called with a graph, outside the cache."""

    def __call__(  # type: ignore[override]
        self,
        *reps: Tensor,
        query_closure: Callable[[], Tensor] | None = None,
        target: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """The loss of queries and candidates, or of `query_closure()` and candidates.

        Raises:
            ValueError: unless there are two tensors, or one and a closure.
        """
        if len(reps) != (2 if query_closure is None else 1):
            raise ValueError(
                f"expected queries and candidates, or candidates and a query_closure, got {len(reps)} tensors and "
                f"{'no' if query_closure is None else 'a'} closure"
            )
        x, y = reps if query_closure is None else (query_closure(), *reps)
        return super().__call__(x, y, target=target, reduction=reduction)


def by_query(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """LSE_j x_i.y_j - x_i.y_t(i) of each query `(N,)`, zero where it does not count."""
    x, y = full_precision(x, y)
    all_pairs = Pairs(target, torch.arange(len(y), device=y.device), equal_ids="in")
    counts = target != IGNORED
    positive = (x * y.index_select(0, target.where(counts, 0))).sum(1)
    return (logsumexp_over_pairs(x, y, x.new_ones(1), all_pairs) - positive).where(counts, 0)


def reduced(rows: Tensor, reduction: Reduction, counted: Tensor) -> Tensor:
    """Rows as they are, summed, or summed and divided by `counted`."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction == "mean":
        return rows.sum() / counted
    raise ValueError(f'expected reduction "mean", "sum" or "none", got {reduction!r}')
