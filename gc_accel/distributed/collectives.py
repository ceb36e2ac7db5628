"""What ranks exchange about a batch: rows, sums and log-sum-exps, each with its gradient.

The gradient of what a rank gets from others goes back to where it came from:

    forward     all-gather          sum                       log-sum-exp
    backward    reduce-scatter      the rank's own share      all-reduce, weighted by the rank's own part

A loss built of these returns the same number on every rank and leaves on each the derivative of that number
with respect to what this rank handed in. How those become gradients of weights: see `replicas`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gc_accel.distributed.agreement import current_check

_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in `group` (`None`: the default group; 1 where none is initialised, and within `alone`)."""
    together = dist.is_available() and dist.is_initialized() and not _is_alone.get()
    return dist.get_world_size(group) if together else 1


@contextmanager
def alone() -> Iterator[None]:
    """A block in which losses take the world to be this process: what they are called with is the whole batch."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def lowest(
    numbers: Sequence[float], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[float]:
    """Of each number the lowest that a rank hands in."""
    if world_size(group) == 1:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    return found.tolist()


class _AllGather(torch.autograd.Function):
    """Rows of all ranks in rank order; the gradient of a row is summed over ranks, back on its owner."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        longest = max(sizes)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(longest * len(sizes), *rows.shape[1:])
        ctx.check = current_check()
        ctx.check()
        dist.all_gather_into_tensor(gathered, padded, group=group)
        if min(sizes) == longest:
            return gathered
        return torch.cat([part[:size] for part, size in zip(gathered.split(longest), sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        longest = max(ctx.sizes)
        padded = grad.new_zeros(len(ctx.sizes), longest, *grad.shape[1:])
        for slot, part in zip(padded, grad.split(ctx.sizes), strict=True):
            slot[: len(part)] = part
        own = grad.new_empty(longest, *grad.shape[1:])
        ctx.check()
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=ctx.group)
        return own[: ctx.sizes[dist.get_rank(ctx.group)]], None, None


class _SumOverRanks(torch.autograd.Function):
    """Sum of a rank's share over all ranks; the share's derivative is one."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = share.clone()
        current_check()()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _LogSumExpOverRanks(torch.autograd.Function):
    """log sum_r exp(partial_r), elementwise; every rank may use any element of the result."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        highest = partial.clone()
        ctx.check = current_check()
        ctx.check()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        total = (partial - highest).exp()
        ctx.check()
        dist.all_reduce(total, group=group)
        total = total.log_().add_(highest)
        ctx.save_for_backward(partial, total)
        ctx.group = group
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        partial, total = ctx.saved_tensors
        grad = grads[0].clone()
        ctx.check()
        dist.all_reduce(grad, group=ctx.group)
        return grad * (partial - total).exp(), None


class RankedBatch:
    """The global batch as one rank sees it: which rows are its own, and how to reach the others.

    With a single rank every method hands its argument back.

    Args:
        rows: number of samples on this rank; ranks may differ.
        group: the ranks whose samples make up the global batch.
    """

    def __init__(self, rows: int, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.sizes = [rows]
        self.start = 0
        if world_size(group) > 1:
            counts = torch.empty(world_size(group), dtype=torch.long, device=device)
            own = torch.tensor([rows], device=device)
            current_check()()
            dist.all_gather_into_tensor(counts, own, group=group)
            self.sizes = counts.tolist()
            self.start = sum(self.sizes[: dist.get_rank(group)])
        self.total = sum(self.sizes)
        self.own = slice(self.start, self.start + rows)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks `(sum of sizes, ...)`, in rank order, differentiable."""
        return _AllGather.apply(rows, self.sizes, self.group) if len(self.sizes) > 1 else rows

    def logsumexp(self, partial: Tensor) -> Tensor:
        """Combine log-sum-exps that each rank took over its own rows, differentiable."""
        return _LogSumExpOverRanks.apply(partial, self.group) if len(self.sizes) > 1 else partial

    def sum(self, share: Tensor) -> Tensor:
        """Sum the shares of a loss over ranks; each rank's backward pass starts from its own share."""
        return _SumOverRanks.apply(share, self.group) if len(self.sizes) > 1 else share


class GlobalLoss(nn.Module):
    """A loss that reaches over ranks by itself.

    It takes one rank's representations, returns the loss of the global batch on every rank, and leaves on
    each rank the derivative of that loss with respect to what this rank handed in.

    Attributes:
        regime: where samples meet, and so how much of a cache an exact step needs (`losses/accumulated.py`).
    """

    regime: Literal["A", "B", "C"] = "A"
