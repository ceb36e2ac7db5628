"""The streaming log-sum-exp, over which all softmax losses are declared: B x B logits, a tile at a time.

    logits s = scale * X Yᵀ           X: (R, D) rows (anchors), Y: (C, D) columns (candidates)

No more than one tile exists at once, but for those that fit the budget: they are kept for the backward pass
instead of computed again. So memory is O((R + C) D) plus the budget, forward and backward.

Products of R C D multiply-adds: 4 for one or both directions, 3 where all tiles are kept. Rows that are their
own candidates need the tiles above the diagonal alone, half of that: each feeds the sums of its rows and,
transposed, those of its columns. The largest logit of each row costs no further product.

Shape letters: R rows and C columns of the matrix, r and c those of one tile, D dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gc_accel.losses.kernel.eager import Gradient
from gc_accel.losses.kernel.exponentials import FixedShift, Pullback, RunningMaxima
from gc_accel.losses.kernel.pairs import Pairs
from gc_accel.losses.kernel.tiling import (
    DEFAULT_TILE_BUDGET,
    Gradients,
    Logits,
    Place,
    RowStats,
    add_gradients,
    diagonal_of,
    exact_sum,
)

Kept = dict[tuple[int, int], Tensor]  # the terms (r, c) of tiles, by their first row and column
Sums = FixedShift | RunningMaxima
Add = Callable[[Place, Tensor], None]


class BothWays(NamedTuple):
    """Sums over a matrix of logits in which row i belongs to column start + i."""

    by_row: Tensor  # (R,) log-sum-exp of each row
    by_column: Tensor  # (C,) and of each column
    diagonal: Tensor  # (R,) the logit of each row with the column that belongs to it
    nearest: Tensor  # (R,) the column of the largest logit of each row, without a gradient


def logsumexp_both_ways(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    *,
    start: int = 0,
    pairs: Pairs | None = None,
    tile_budget: int = DEFAULT_TILE_BUDGET,
) -> BothWays:
    """Sums by row and by column from one pass over the tiles.

    Args:
        rows: `(R, D)`.
        columns: `(C, D)`, with C at least start + R.
        scale: `(1,)`, multiplies the products.
        start: the column that belongs to the first row.
        pairs: which pairs count, those of the diagonal among them; None: all.
        tile_budget: bytes of tiles to keep for the backward pass.
    """
    return BothWays(*_apply(Logits(rows, columns, scale, pairs, start), tile_budget))


def logsumexp_over_pairs(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    pairs: Pairs | None,
    *,
    tile_budget: int = DEFAULT_TILE_BUDGET,
) -> Tensor:
    """Log-sum-exp of the logits of each row `(R,)` over its pairs, minus infinity for a row without any.

    Args:
        rows, columns, scale, tile_budget: as in `logsumexp_both_ways`.
        pairs: which pairs count, None: all; those above the diagonal count for the rows of both.
    """
    return _apply(Logits(rows, columns, scale, pairs), tile_budget)[0]


def sum_of_logsumexps(
    logits: Logits, weights: Tensor, gradients: tuple[Gradient, Gradient], tile_budget: int
) -> Tensor:
    """sum_i w_i LSE_i over the rows, 0-d, and its gradient, which is computed as soon as the sums are there.

    For use in `with_gradients`: tiles are kept no longer than the call.

    Args:
        logits: without a `start`.
        weights: `(R,)`; where it is zero a row need not have any pair.
        gradients: of rows `(R, D)` and of columns `(C, D)`, are added to, and may share memory; None: not needed.
        tile_budget: bytes of tiles to keep for the gradient.
    """
    needed = any(gradient is not None for gradient in gradients)
    sums, kept, _ = _forward_pass(logits, tile_budget if needed else 0)
    if needed:
        scaled = weights * logits.scale
        pullback = sums.pullback(scaled, scaled if logits.halved else None)
        _backward_pass(logits, sums, kept, pullback, partial(add_gradients, logits[:2], gradients))
    return exact_sum(torch.where(weights == 0, 0, weights * sums.totals()[0]))


def _apply(logits: Logits, tile_budget: int) -> tuple[Tensor, ...]:
    kept = tile_budget if torch.is_grad_enabled() else 0
    with torch.autocast(logits.rows.device.type, enabled=False):
        return _LogSumExp.apply(kept, *logits)


class _LogSumExp(torch.autograd.Function):
    """By row over all of `pairs` and, where rows belong to columns (`start`), by column.

    Above the diagonal, the sums by row and by column belong to the same rows.
    """

    @staticmethod
    def forward(ctx: Any, tile_budget: int, *of_logits: Any) -> tuple[Tensor | None, ...]:
        logits = Logits(*of_logits)
        ctx.sums, kept, stats = _forward_pass(logits, tile_budget if any(ctx.needs_input_grad) else 0)
        ctx.kept_at, ctx.pairs, ctx.start = list(kept), logits.pairs, logits.start
        # Not as an attribute: kept tiles shall go with the backward pass, not with the loss.
        ctx.save_for_backward(*logits[:3], *kept.values())
        by_row, by_column = ctx.sums.totals()
        if stats is None:
            return (by_row,)
        ctx.mark_non_differentiable(stats.nearest)
        return by_row, by_column, stats.diagonal, stats.nearest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, *terms = ctx.saved_tensors
        kept = dict(zip(ctx.kept_at, terms, strict=True))
        logits = Logits(rows, columns, scale, ctx.pairs, ctx.start)
        column_grad, diagonal_grad = others[:2] if others else (row_grad if logits.halved else None, None)
        pullback = ctx.sums.pullback(row_grad, column_grad)
        gradients = Gradients(rows, columns, scale, (*ctx.needs_input_grad[1:4], False))
        with torch.autocast(rows.device.type, enabled=False):
            _backward_pass(logits, ctx.sums, kept, pullback, gradients.add, diagonal_grad)
            return None, *gradients.finish()[:3], None, None


def _forward_pass(logits: Logits, budget: int) -> tuple[Sums, Kept, RowStats | None]:
    """The sums with one shift or, where that would lose something, with running maxima; the rest as `_sum_tiles`."""
    rows, columns, scale = logits[:3]
    directions = {"halved": logits.halved, "both": logits.start is not None}
    shifted = FixedShift(rows, columns, scale, **directions)
    rest = _sum_tiles(shifted, logits, budget)
    if shifted.is_exact():
        return shifted, *rest
    del rest  # before the second pass fills the budget again
    maxima = RunningMaxima(rows, columns, **directions)
    return maxima, *_sum_tiles(maxima, logits, budget)


def _sum_tiles(sums: Sums, logits: Logits, budget: int) -> tuple[Kept, RowStats | None]:
    """Add all tiles to `sums`; returns those that fit the budget, in bytes, and statistics of the rows."""
    kept: Kept = {}
    stats = None if logits.start is None else RowStats(logits.rows, logits.start)
    for at in logits.places():
        tile = logits.tile(at)
        if stats is not None:
            stats.add(at, tile)
        terms = sums.terms(tile)
        sums.add(at, terms)
        budget -= terms.nbytes
        if budget >= 0:
            kept[at[0].start, at[1].start] = terms
    return kept, stats


def _backward_pass(
    logits: Logits, sums: Sums, kept: Kept, pullback: Pullback, add: Add, diagonal_grad: Tensor | None = None
) -> None:
    """Hand the gradient `(r, c)` of the logits of each tile to `add`; that of the diagonal `(R,)` is part of it."""
    for at in logits.places():
        terms = kept.get((at[0].start, at[1].start))
        if terms is None:
            terms = sums.terms(logits.tile(at))
        grad = pullback(at, terms)
        if diagonal_grad is not None and logits.start is not None:
            rows, diagonal = diagonal_of(grad, at, logits.start)
            diagonal += diagonal_grad[rows]
        add(at, grad)
