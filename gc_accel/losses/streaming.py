"""The streaming log-sum-exp, over which all softmax losses are declared: B x B logits, a tile at a time.

    logits s = scale * X Yᵀ           X: (R, D) rows (anchors), Y: (C, D) columns (candidates)

No more than one tile exists at once, but for those that fit the budget: they are kept for the backward pass
instead of computed again. So memory is O((R + C) D) plus the budget, forward and backward.

Products of R C D multiply-adds: 4 for one or both directions, 3 where all tiles are kept. Rows that are their
own candidates need the tiles above the diagonal alone, half of that: each feeds the sums of its rows and,
transposed, those of its columns. The largest logit of each row falls out on the way.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gc_accel.losses.exponentials import FixedShift, RunningMaxima
from gc_accel.losses.pairs import Pairs
from gc_accel.losses.tiling import DEFAULT_TILE_BUDGET, Gradients, Own, Place, logits_of, own_pairs, tiles

Kept = dict[tuple[int, int], Tensor]


class BothWays(NamedTuple):
    """Sums over a matrix of logits in which row i belongs to column start + i."""

    by_row: Tensor  # (R,) log-sum-exp of each row
    by_column: Tensor  # (C,) and of each column
    own: Tensor  # (R,) the logit of each row with its own column
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
        pairs: which pairs count, own ones among them; None: all.
        tile_budget: bytes of tiles to keep for the backward pass.
    """
    return BothWays(*_apply(rows, columns, scale, pairs, start, tile_budget))


def logsumexp_over_pairs(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    pairs: Pairs,
    *,
    tile_budget: int = DEFAULT_TILE_BUDGET,
) -> Tensor:
    """Log-sum-exp of the logits of each row `(R,)` over its pairs, minus infinity for a row without any.

    Args:
        rows, columns, scale, tile_budget: as in `logsumexp_both_ways`.
        pairs: which pairs count; those above the diagonal count for the rows of both.
    """
    return _apply(rows, columns, scale, pairs, None, tile_budget)[0]


def _apply(
    rows: Tensor, columns: Tensor, scale: Tensor, pairs: Pairs | None, start: int | None, tile_budget: int
) -> tuple[Tensor, ...]:
    kept = tile_budget if torch.is_grad_enabled() else 0
    with torch.autocast(rows.device.type, enabled=False):
        return _LogSumExp.apply(rows, columns, scale, pairs, start, kept)


class _LogSumExp(torch.autograd.Function):
    """By row over all of `pairs` and, where rows have a column of their own (`start`), by column.

    Above the diagonal, what sums up by row and by column belongs to the same rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        pairs: Pairs | None,
        start: int | None,
        tile_budget: int,
    ) -> tuple[Tensor | None, ...]:
        ctx.pairs, ctx.start = pairs, start
        ctx.halved = pairs is not None and pairs.above_diagonal
        budget = tile_budget if any(ctx.needs_input_grad) else 0
        directions = {"halved": ctx.halved, "both": start is not None}
        sums: FixedShift | RunningMaxima = FixedShift(rows, columns, scale, **directions)
        kept, own = _sum_up(sums, rows, columns, scale, pairs, start, budget)
        if isinstance(sums, FixedShift) and not sums.is_exact():
            kept = {}  # before the second pass fills the budget again
            sums = RunningMaxima(rows, columns, **directions)
            kept, own = _sum_up(sums, rows, columns, scale, pairs, start, budget)
        ctx.sums, ctx.kept_at = sums, list(kept)
        # Not as an attribute: kept tiles shall go with the backward pass, not with the loss.
        ctx.save_for_backward(rows, columns, scale, *kept.values())
        by_row, by_column = sums.totals()
        if own is None:
            return (by_row,)
        ctx.mark_non_differentiable(own.nearest)
        return by_row, by_column, own.logits, own.nearest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, *tensors = ctx.saved_tensors
        kept = dict(zip(ctx.kept_at, tensors, strict=True))
        column_grad, own_grad = others[:2] if others else (row_grad if ctx.halved else None, None)
        pull = ctx.sums.pull(row_grad, column_grad)
        gradients = Gradients(rows, columns, scale, (*ctx.needs_input_grad[:3], False))
        with torch.autocast(rows.device.type, enabled=False):
            for at in tiles(len(rows), len(columns), ctx.halved):
                terms = kept.get((at[0].start, at[1].start))
                if terms is None:
                    terms = ctx.sums.terms(_counted(logits_of(rows, columns, scale, at), ctx.pairs, at))
                grad = pull(at, terms)
                if own_grad is not None:
                    which, own = own_pairs(grad, at, ctx.start)
                    own += own_grad[which]
                gradients.add(at, grad)
            return *gradients.result()[:3], None, None, None


def _sum_up(
    sums: FixedShift | RunningMaxima,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    pairs: Pairs | None,
    start: int | None,
    budget: int,
) -> tuple[Kept, Own | None]:
    """One pass over the tiles; what it kept of them, and what it noted of rows that have their own column."""
    kept: Kept = {}
    own = None if start is None else Own(rows, start)
    for at in tiles(len(rows), len(columns), pairs is not None and pairs.above_diagonal):
        logits = _counted(logits_of(rows, columns, scale, at), pairs, at)
        if own is not None:
            own.note(at, logits)
        terms = sums.terms(logits)
        sums.add(at, terms)
        budget -= terms.nbytes
        if budget >= 0:
            kept[at[0].start, at[1].start] = terms
    return kept, own


def _counted(logits: Tensor, pairs: Pairs | None, at: Place) -> Tensor:
    """Minus infinity for pairs that do not count."""
    mask = None if pairs is None else pairs.left_out(*at)
    return logits if mask is None else logits.masked_fill_(mask, -torch.inf)
