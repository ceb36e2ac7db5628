"""Two ways to sum exponentials of tiles of logits without overflow, by row and by column.

`FixedShift` subtracts one number from all logits. A single exponential per element then serves its row, its
column and the backward pass. It is exact where norms bound the logits, |s| <= |scale| * max ||x|| * max ||y||,
narrowly enough, or where the sums turn out to be large enough that nothing of weight was lost to underflow.
`RunningMaxima` subtracts the largest logit of each row and, again, of each column: always exact, and slower.

Both turn the logits of a tile into `terms`, the part of it that may be kept for the backward pass, `add` those
up to `totals`, and have a `pullback` from the gradient of the totals to that of the logits of a tile. A sum over
no pair at all is minus infinity, with gradient zero.

Shape letters: R rows and C columns of the matrix, r and c those of one tile, D dim.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gc_accel.losses.kernel.tiling import Place

Pullback = Callable[[Place, Tensor], Tensor]  # from the place of a tile and its terms to its gradient, (r, c)
Totals = tuple[
    Tensor, Tensor | None
]  # log-sum-exps by row (R,) and, where they are summed up, by column (C,)


class FixedShift:
    """Sums of exp(s - shift).

    Args:
        rows: `(R, D)`.
        columns: `(C, D)`.
        scale: `(1,)`, multiplies the products.
        halved: rows and columns are the same rows, and tiles are above the diagonal.
        both: sum up by column, too.
    """

    def __init__(self, rows: Tensor, columns: Tensor, scale: Tensor, *, halved: bool, both: bool) -> None:
        limits = torch.finfo(rows.dtype)
        longest = torch.linalg.vector_norm(rows, dim=1).max() * torch.linalg.vector_norm(columns, dim=1).max()
        self.bound = float(scale.abs() * longest)
        # Half of the range of exp is for sums over many candidates, and for their reciprocals.
        self.shift = max(self.bound - math.log(limits.max) / 2, 0.0)
        # What underflows is below `tiny` per element: lost beside a sum that is larger by 1/eps.
        self.smallest = max(len(rows), len(columns)) * limits.tiny / limits.eps
        self.rows = rows.new_zeros(len(rows))
        self.columns = self.rows if halved else columns.new_zeros(len(columns)) if both else None

    def terms(self, logits: Tensor) -> Tensor:
        """The exponentials `(r, c)` of the logits of a tile, in their place."""
        if self.shift:
            logits -= self.shift
        return logits.exp_()

    def add(self, at: Place, terms: Tensor) -> None:
        """Take in the terms `(r, c)` of a tile."""
        self.rows[at[0]] += terms.sum(1)
        if self.columns is not None:
            self.columns[at[1]] += terms.sum(0)

    def is_exact(self) -> bool:
        """Whether no sum lost anything; NaN and infinity are not exact either."""
        if -self.bound - self.shift > math.log(self.smallest):
            return True
        sums = (self.rows,) if self.columns is None else (self.rows, self.columns)
        return all(bool(x.min() >= self.smallest) and bool(x.max().isfinite()) for x in sums)

    def totals(self) -> Totals:
        """The log-sum-exps, once all tiles are taken in."""
        by_column = None if self.columns is None else self.columns.log() + self.shift
        return self.rows.log() + self.shift, by_column

    def pullback(self, row_grad: Tensor, column_grad: Tensor | None) -> Pullback:
        """From the gradients of the totals, by row `(R,)` and by column `(C,)`."""
        by_row = torch.where(self.rows > 0, row_grad / self.rows, 0)[:, None]
        if column_grad is None or self.columns is None:
            return lambda at, terms: terms * by_row[at[0]]
        by_column = torch.where(self.columns > 0, column_grad / self.columns, 0)
        return lambda at, terms: (by_row[at[0]] + by_column[at[1]]).mul_(terms)


class RunningMaxima:
    """Log-sum-exps, tile after tile, each with the maximum of its own row or column; methods as of `FixedShift`."""

    def __init__(self, rows: Tensor, columns: Tensor, *, halved: bool, both: bool) -> None:
        self.rows = rows.new_full((len(rows),), -torch.inf)
        by_column = columns.new_full((len(columns),), -torch.inf) if both and not halved else None
        self.columns = self.rows if halved else by_column

    def terms(self, logits: Tensor) -> Tensor:
        return logits

    def add(self, at: Place, logits: Tensor) -> None:
        i, j = at
        self.rows[i] = torch.logaddexp(self.rows[i], logits.logsumexp(1))
        if self.columns is not None:
            self.columns[j] = torch.logaddexp(self.columns[j], logits.logsumexp(0))

    def totals(self) -> Totals:
        # Copies: an output of a function that its own context refers to would keep both alive for ever.
        return self.rows.clone(), None if self.columns is None else self.columns.clone()

    def pullback(self, row_grad: Tensor, column_grad: Tensor | None) -> Pullback:
        rows, columns = _never_empty(self.rows)[:, None], self.columns

        def gradient_of(at: Place, logits: Tensor) -> Tensor:
            i, j = at
            grad = (logits - rows[i]).exp_().mul_(row_grad[i, None])
            if column_grad is not None and columns is not None:
                grad += (logits - _never_empty(columns[j])).exp_().mul_(column_grad[j])
            return grad

        return gradient_of


def _never_empty(totals: Tensor) -> Tensor:
    """The totals, with infinity for sums over no pair, so that exp(logits - total) is zero there, not NaN."""
    return totals.masked_fill(totals == -torch.inf, torch.inf)
