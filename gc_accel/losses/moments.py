"""Second moments of a global batch, for losses over statistics instead of pairs.

On several ranks the statistics are reduced, never the loss: a sum over the samples of all ranks goes through
`RankedBatch.sum`, every rank computes the same function f of it, and

    dL/dx_i = f'(S) · dS/dx_i        on the rank of x_i, whole, without another reduction.

That holds for f(S) alone. Where a statistic flows into a rank's *rows* (as a standard deviation does, by which
they are divided), its gradient has a share on every rank: `gathered_sum` adds those up. A mean is different
again: second moments about the mean do not change with it to first order, so it may be a constant.

A sum of squares over a D x D moment is one over a matrix of all pairs of rows, too:

    ||AᵀB||² = sum_kl (sum_i a_ik b_il)² = sum_ij (a_i.a_j)(b_i.b_j)

The former is computed where there are at least D rows, the latter, in tiles, where there are fewer.
"""

from typing import Any

import torch
from torch import Tensor

from gc_accel.distributed import RankedBatch
from gc_accel.losses.kernel.eager import with_gradients
from gc_accel.losses.kernel.tiling import tiles


def centred(rows: Tensor, batch: RankedBatch) -> Tensor:
    """Rows `(B, ..., D)` of a rank less their mean over the global batch, which is taken as a constant."""
    return rows - batch.sum(rows.detach().sum(0)) / batch.total


def gathered_sum(share: Tensor, batch: RankedBatch) -> Tensor:
    """The sum over ranks of `(...)`, which each rank may use in any way: gradients are summed over ranks, too."""
    return RankedBatch(1, share.device, batch.group).gather(share[None]).sum(0)


def squared_cross_moment(a: Tensor, b: Tensor, batch: RankedBatch) -> Tensor:
    """||sum_i a_i b_iᵀ||² over the global batch, 0-d, from rows `(B, ..., D)` and `(B, ..., D)` of a rank."""
    if _has_more_rows(a, batch):
        return batch.sum(_moment(a, b)).square().sum()
    return _sum_of_products(a, batch.gather(a), b, batch.gather(b), batch)


def squared_similarities(a: Tensor, b: Tensor, batch: RankedBatch) -> Tensor:
    """sum_ij (a_i.b_j)² over the global batch, 0-d, from a rank's rows `(B, D)`; it is <AᵀA, BᵀB>."""
    if _has_more_rows(a, batch):
        return (batch.sum(_moment(a, a)) * batch.sum(_moment(b, b))).sum()
    columns = batch.gather(b)
    return _sum_of_products(a, columns, a, columns, batch)


def _has_more_rows(rows: Tensor, batch: RankedBatch) -> bool:
    """Whether the global batch has at least as many rows as dimensions."""
    return batch.total * rows[0].numel() >= rows.shape[-1] ** 2


def _moment(a: Tensor, b: Tensor) -> Tensor:
    """sum_i a_i b_iᵀ `(D, D)` over the rows of this rank."""
    with torch.autocast(a.device.type, enabled=False):
        return a.flatten(0, -2).T @ b.flatten(0, -2)


def _sum_of_products(a: Tensor, c: Tensor, b: Tensor, d: Tensor, batch: RankedBatch) -> Tensor:
    """sum_ij (a_i.c_j)(b_i.d_j), 0-d, over rows `(B, ..., D)` a and b of all ranks, with c and d of all, in tiles."""

    def compute(inputs: tuple[Any, ...], needed: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        a, c, b, d = inputs
        total, gradients = a.new_zeros(()), tuple(torch.zeros_like(x) for x in inputs)
        for i, j in tiles(len(a), len(c)):
            left, right = a[i] @ c[j].T, b[i] @ d[j].T
            total += (left * right).sum()
            if any(needed):
                gradients[0][i].addmm_(right, c[j])
                gradients[1][j].addmm_(right.T, a[i])
                gradients[2][i].addmm_(left, d[j])
                gradients[3][j].addmm_(left.T, b[i])
        return total, gradients

    return batch.sum(with_gradients(compute, *(x.flatten(0, -2) for x in (a, c, b, d))))
