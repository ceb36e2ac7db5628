"""Streaming over a similarity matrix: B x B logits, a tile at a time.

    logits s = scale * X Yᵀ + bias           X: (R, D) rows (anchors), Y: (C, D) columns (candidates)

No more than one tile exists at once, but for those that fit the budget: they are kept for the backward pass
instead of computed again. So memory is O((R + C) D) plus the budget, forward and backward. Sums run over
tiles in a fixed order, in the inputs' own precision, which makes every result bitwise repeatable.

Products of R C D multiply-adds: log-sum-exp of one or both directions 4 (3 where all tiles are kept), sigmoid
3. Rows that are their own candidates need the tiles above the diagonal alone, so about half of that: each
feeds the sums of its rows and, transposed, those of its columns.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gc_accel.losses.pairs import Pairs

DEFAULT_TILE_BUDGET = 256 * 2**20  # bytes
TILE_ROWS, TILE_COLUMNS = 512, 1024  # fastest on the CPUs measured (docs/log.md)


def logsumexp_both_ways(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    tile_budget: int = DEFAULT_TILE_BUDGET,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits along each row `(R,)` and along each column `(C,)`, from one pass over tiles.

    Args:
        rows: `(R, D)`.
        columns: `(C, D)`.
        scale: `(1,)`, multiplies the products.
        bias: `(1,)` or None, is added to them.
        tile_budget: bytes of tiles to keep for the backward pass.
    """
    kept = tile_budget if torch.is_grad_enabled() else 0
    with torch.autocast(rows.device.type, enabled=False):
        return _LogSumExp.apply(rows, columns, scale, bias, None, kept)


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
    kept = tile_budget if torch.is_grad_enabled() else 0
    with torch.autocast(rows.device.type, enabled=False):
        return _LogSumExp.apply(rows, columns, scale, None, pairs, kept)[0]


def sigmoid_cross_entropy(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, row_ids: Tensor, column_ids: Tensor
) -> Tensor:
    """Sum over all pairs of -log sigmoid(±logit), + where the ids are equal; 0-d.

    The gradient is had along with the value, so the backward pass computes no product.

    Args:
        rows, columns, scale, bias: as in `logsumexp_both_ways`.
        row_ids: `(R,)` integers, column_ids: `(C,)`.
    """
    wanted = torch.is_grad_enabled()
    with torch.autocast(rows.device.type, enabled=False):
        return _SigmoidCrossEntropy.apply(rows, columns, scale, bias, row_ids, column_ids, wanted)


def tiles(rows: int, columns: int, above_diagonal: bool = False) -> Iterator[tuple[slice, slice]]:
    """Row and column ranges of the tiles that cover a matrix, or what is above its diagonal, row by row."""
    for top in range(0, rows, TILE_ROWS):
        for left in range(top if above_diagonal else 0, columns, TILE_COLUMNS):
            yield slice(top, min(top + TILE_ROWS, rows)), slice(left, min(left + TILE_COLUMNS, columns))


def _logits(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    at: tuple[slice, slice],
    pairs: Pairs | None = None,
) -> Tensor:
    """Logits of one tile, minus infinity for pairs that do not count."""
    logits = (rows[at[0]] * scale) @ columns[at[1]].T
    if bias is not None:
        logits += bias
    mask = None if pairs is None else pairs.left_out(*at)
    return logits if mask is None else logits.masked_fill_(mask, -torch.inf)


def _softmax(logits: Tensor, total: Tensor) -> Tensor:
    """exp(logits - total), and zero rather than NaN for a sum over no pair at all."""
    return (logits - total.masked_fill(total == -torch.inf, torch.inf)).exp_()


class _Gradients:
    """Gradients of rows, columns, scale and bias, summed up tile by tile from the gradient of the logits."""

    def __init__(self, rows: Tensor, columns: Tensor, scale: Tensor, needed: tuple[bool, ...]) -> None:
        self.inputs, self.scale = (rows, columns), scale
        # The scale's gradient falls out of the product for the rows: sum(G * XYᵀ) = sum(GY * X).
        self.rows = torch.zeros_like(rows) if needed[0] or needed[2] else None
        self.columns = torch.zeros_like(columns) if needed[1] else None
        self.bias = torch.zeros_like(scale) if needed[3] else None
        self.needed = needed

    def add(self, at: tuple[slice, slice], grad: Tensor) -> None:
        rows, columns = self.inputs
        if self.rows is not None:
            self.rows[at[0]].addmm_(grad, columns[at[1]])
        if self.columns is not None:
            self.columns[at[1]].addmm_(grad.T, rows[at[0]])
        if self.bias is not None:
            self.bias += grad.sum()

    def result(self) -> tuple[Tensor | None, ...]:
        scale = None
        if self.rows is not None:
            scale = (self.rows * self.inputs[0]).sum().reshape_as(self.scale) if self.needed[2] else None
            self.rows *= self.scale
        if self.columns is not None:
            self.columns *= self.scale
        return self.rows if self.needed[0] else None, self.columns, scale, self.bias


class _LogSumExp(torch.autograd.Function):
    """By row and by column over all pairs, or by row over those of `pairs`.

    Above the diagonal, what sums up by row and by column belongs to the same rows: one tensor serves as both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        pairs: Pairs | None,
        tile_budget: int,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.pairs, ctx.halved = pairs, pairs is not None and pairs.above_diagonal
        by_row = rows.new_full((len(rows),), -torch.inf)
        by_column = by_row if ctx.halved else None
        if pairs is None:
            by_column = columns.new_full((len(columns),), -torch.inf)
        ctx.kept = {}
        for at in tiles(len(rows), len(columns), ctx.halved):
            i, j = at
            logits = _logits(rows, columns, scale, bias, at, pairs)
            by_row[i] = torch.logaddexp(by_row[i], logits.logsumexp(1))
            if by_column is not None:
                by_column[j] = torch.logaddexp(by_column[j], logits.logsumexp(0))
            tile_budget -= logits.nbytes
            if tile_budget >= 0 and any(ctx.needs_input_grad):
                ctx.kept[i.start, j.start] = logits
        ctx.save_for_backward(rows, columns, scale, bias, by_row, by_column)
        return by_row, None if ctx.halved else by_column

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor, column_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, columns, scale, bias, by_row, by_column = ctx.saved_tensors
        if ctx.halved:
            column_grad = row_grad
        gradients = _Gradients(rows, columns, scale, ctx.needs_input_grad)
        for at in tiles(len(rows), len(columns), ctx.halved):
            i, j = at
            logits = ctx.kept.get((i.start, j.start))
            if logits is None:
                logits = _logits(rows, columns, scale, bias, at, ctx.pairs)
            grad = _softmax(logits, by_row[i, None]).mul_(row_grad[i, None])
            if column_grad is not None:
                grad += _softmax(logits, by_column[j]).mul_(column_grad[j])
            gradients.add(at, grad)
        return *gradients.result(), None, None


class _SigmoidCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        row_ids: Tensor,
        column_ids: Tensor,
        wanted: bool,
    ) -> Tensor:
        gradients = _Gradients(rows, columns, scale, ctx.needs_input_grad) if wanted else None
        total = rows.new_zeros((), dtype=torch.float64 if rows.device.type != "mps" else None)
        for at in tiles(len(rows), len(columns)):
            i, j = at
            logits = _logits(rows, columns, scale, bias, at)
            positive = row_ids[i, None] == column_ids[j]
            # -log sigmoid(y s) = softplus(-y s), whose derivative is sigmoid(s) - [y = 1]
            total += F.softplus(torch.where(positive, -logits, logits)).sum()
            if gradients is not None:
                gradients.add(at, logits.sigmoid_().sub_(positive.to(logits.dtype)))
        ctx.gradients = None if gradients is None else gradients.result()
        return total.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if each is None else each * grad for each in ctx.gradients), None, None, None
