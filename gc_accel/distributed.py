"""Ranks: gathering with a gradient, one reduction per step, and the one factor between the two.

The scaling rule (it stands here and nowhere else). Let L be the loss of the *global* batch, x_r whatever
rank r hands to the loss (its representations, its copy of each global such as the logit scale), and theta
the parameters, equal on all ranks. A loss leaves dL/dx_r on rank r, the contributions of other ranks'
negatives included, and each rank's backward pass turns that into g_r = dL/dx_r . dx_r/dtheta. The chain
rule wants their sum,

    rank          0      1     ...    W-1
    local        g_0    g_1    ...   g_{W-1}          dL/dtheta = g_0 + g_1 + ... + g_{W-1}

and DDP, FSDP and ZeRO leave their mean. Hence W * dL/dx_r has to go into the encoder: one factor, the same
for representations and globals (`Replicas.scaled`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gc_accel.chunking import call, unnamed


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in `group` (`None`: the default group; 1 where none is initialised)."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class _AllGather(torch.autograd.Function):
    """Rows of all ranks in rank order; the gradient of a row is summed over ranks, back on its owner."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        longest = max(sizes)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(longest * len(sizes), *rows.shape[1:])
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
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=ctx.group)
        return own[: ctx.sizes[dist.get_rank(ctx.group)]], None, None


class _SumOverRanks(torch.autograd.Function):
    """Sum of a rank's share over all ranks; the share's derivative is one."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = share.clone()
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
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        total = (partial - highest).exp()
        dist.all_reduce(total, group=group)
        total = total.log_().add_(highest)
        ctx.save_for_backward(partial, total)
        ctx.group = group
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        partial, total = ctx.saved_tensors
        grad = grads[0].clone()
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
            dist.all_gather_into_tensor(counts, torch.tensor([rows], device=device), group=group)
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
    """


class Replicas:
    """The data-parallel copies of one encoder: where they compute, when they reduce, what scales them.

    Args:
        encoder: a callable, a module, a module wrapped in DDP, or what `accelerator.prepare` returned.
        accelerator: the one that prepared the encoder, if any.
    """

    def __init__(self, encoder: Callable[..., Any], accelerator: Accelerator | None) -> None:
        if isinstance(encoder, DistributedDataParallel) and encoder.static_graph:
            raise ValueError(
                "expected DistributedDataParallel without static_graph, got static_graph=True: a step calls "
                "it in several ways. Use find_unused_parameters=True instead"
            )
        self.encoder = encoder
        self.model: Any = encoder  # without what wraps it
        if isinstance(encoder, nn.Module):
            self.model = extract_model_from_parallel(encoder, keep_torch_compile=False)
        prepared = [self.model]
        if accelerator is not None and accelerator.num_processes > 1:
            prepared = accelerator._models
        if not any(each is encoder or each is self.model for each in prepared):
            raise ValueError(
                "expected the encoder that accelerator.prepare returned, got another: its gradients would never "
                "be reduced over ranks"
            )
        self.accelerator = accelerator
        self.group = encoder.process_group if isinstance(encoder, DistributedDataParallel) else None
        if accelerator is not None:
            self.world_size = accelerator.num_processes
            self.device = accelerator.device
        else:
            self.world_size = world_size(self.group) if isinstance(encoder, DistributedDataParallel) else 1
            parameters = encoder.parameters() if isinstance(encoder, nn.Module) else iter(())
            self.device = next((p.device for p in parameters), torch.device("cpu"))

    def global_loss(
        self,
        loss_fn: Callable[..., Tensor],
        reps: Mapping[Any, Tensor],
        shared: Mapping[Any, Tensor],
        extras: Mapping[str, Any],
    ) -> Tensor:
        """Loss of the global batch, from a `GlobalLoss` or from a loss written for one process.

        With the latter every rank gathers the representations and computes the whole loss, of which it
        backpropagates 1/W, so that the shares of all ranks add up to it.

        Args:
            reps: representations of this rank, `(B, ...)`.
            shared: globals, equal on all ranks, not gathered.
            extras: keyword arguments of the loss; tensors among them are per-sample, and gathered.
        """
        if self.world_size == 1 or isinstance(loss_fn, GlobalLoss):
            return call(partial(loss_fn, **extras), unnamed({**reps, **shared}))
        batch = RankedBatch(len(next(iter(reps.values()))), self.device, self.group)
        reps = {name: batch.gather(value) for name, value in reps.items()}
        extras = {k: batch.gather(v) if isinstance(v, Tensor) and v.ndim else v for k, v in extras.items()}
        return batch.sum(call(partial(loss_fn, **extras), unnamed({**reps, **shared})) / self.world_size)

    def reducing(self, sync: bool) -> AbstractContextManager[Any]:
        """A block whose forward and backward reduce gradients over ranks if `sync`, and add them up if not.

        Nothing is reduced either while the accelerator accumulates several batches.
        """
        if self.accelerator is not None:
            last = sync and self.accelerator.sync_gradients
            return nullcontext() if last else self.accelerator.no_sync(self.encoder)
        if isinstance(self.encoder, DistributedDataParallel) and not sync:
            return self.encoder.no_sync()
        return nullcontext()

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient goes into the encoder: times the world size (see the scaling rule above),
        over the number of accumulated batches, times the scale of the gradient scaler."""
        loss = loss * self.world_size
        if self.accelerator is None:
            return loss
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:  # which divides by itself
            loss = loss / self.accelerator.gradient_accumulation_steps
        return self.accelerator.scaler.scale(loss) if self.accelerator.scaler is not None else loss

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor], *, sync: bool) -> None:
        """Push cached gradients through the graph of one call (or of several at once)."""
        if self.accelerator is None or self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            torch.autograd.backward(list(outputs), list(grads))
            return
        # DeepSpeed wants a scalar, and steps the optimizer with every backward pass that syncs.
        outer = self.accelerator.sync_gradients
        self.accelerator.gradient_state._set_sync_gradients(sync and outer)
        try:
            self.accelerator.backward(
                sum((out * grad).sum() for out, grad in zip(outputs, grads, strict=True))
            )
        finally:
            self.accelerator.gradient_state._set_sync_gradients(outer)
