"""Two ways to sum exponentials of tiles of logits without overflow, by row and by column.

`FixedShift` subtracts one number from all logits. A single exponential per element then serves its row, its
column and the backward pass. It is exact where norms bound the logits, |s| <= |scale| * max ||x|| * max ||y||,
narrowly enough, or where the sums turn out to be large enough that nothing of weight was lost to underflow.
`RunningMaxima` subtracts the largest logit of each row and, again, of each column: always exact, and slower.

Both turn the logits of a tile into `terms`, which is what may be kept of it for the backward pass, `add` those
up to `totals`, and `pull` the gradient of the totals back to the logits of a tile. A sum over no pair at all is
minus infinity, with gradient zero.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gc_accel.losses.kernel.tiling import Place

Pull = Callable[[Place, Tensor], Tensor]
Totals = tuple[Tensor, Tensor | None]


class FixedShift:
    """Sums of exp(s - shift).

    Args:
        rows: `(R, D)`, of which and of `columns` `(C, D)` and `scale` `(1,)` the logits are made.
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
        if self.shift:
            logits -= self.shift
        return logits.exp_()

    def add(self, at: Place, terms: Tensor) -> None:
        self.rows[at[0]] += terms.sum(1)
        if self.columns is not None:
            self.columns[at[1]] += terms.sum(0)

    def is_exact(self) -> bool:
        """Whether no sum lost anything; NaN and infinity are not exact either."""
        if -self.bound - self.shift > math.log(self.smallest):
            return True
        sums = (self.rows,) if self.columns is None else (self.rows, self.columns)
        return all(bool(each.min() >= self.smallest) and bool(each.max().isfinite()) for each in sums)

    def totals(self) -> Totals:
        by_column = None if self.columns is None else self.columns.log() + self.shift
        return self.rows.log() + self.shift, by_column

    def pull(self, row_grad: Tensor, column_grad: Tensor | None) -> Pull:
        by_row = torch.where(self.rows > 0, row_grad / self.rows, 0)[:, None]
        if column_grad is None or self.columns is None:
            return lambda at, terms: terms * by_row[at[0]]
        by_column = torch.where(self.columns > 0, column_grad / self.columns, 0)
        return lambda at, terms: (by_row[at[0]] + by_column[at[1]]).mul_(terms)


class RunningMaxima:
    """Log-sum-exps, tile after tile, each with the maximum of its own row or column."""

    def __init__(self, rows: Tensor, columns: Tensor, *, halved: bool, both: bool) -> None:
        self.rows = rows.new_full((len(rows),), -torch.inf)
        self.columns = None
        if halved:
            self.columns = self.rows
        elif both:
            self.columns = columns.new_full((len(columns),), -torch.inf)

    def terms(self, logits: Tensor) -> Tensor:
        return logits

    def add(self, at: Place, logits: Tensor) -> None:
        i, j = at
        self.rows[i] = torch.logaddexp(self.rows[i], logits.logsumexp(1))
        if self.columns is not None:
            self.columns[j] = torch.logaddexp(self.columns[j], logits.logsumexp(0))

    def totals(self) -> Totals:
        # Copies: an output of a function that its own context holds would keep both alive for ever.
        return self.rows.clone(), None if self.columns is None else self.columns.clone()

    def pull(self, row_grad: Tensor, column_grad: Tensor | None) -> Pull:
        rows, columns = _never_empty(self.rows)[:, None], self.columns

        def of_tile(at: Place, logits: Tensor) -> Tensor:
            i, j = at
            grad = (logits - rows[i]).exp_().mul_(row_grad[i, None])
            if column_grad is not None and columns is not None:
                grad += (logits - _never_empty(columns[j])).exp_().mul_(column_grad[j])
            return grad

        return of_tile


def _never_empty(totals: Tensor) -> Tensor:
    """Infinity for sums over no pair, so that exp(logits - total) is zero there rather than NaN."""
    return totals.masked_fill(totals == -torch.inf, torch.inf)
