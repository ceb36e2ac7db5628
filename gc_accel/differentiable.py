"""The second pass as a backward pass: a cached loss that any trainer can hold.

    loss = cache(batch)    first pass  ->  representations  ->  loss
    loss.backward()        their gradient  ->  second pass  ->  the gradient of the weights

To autograd the representations are one function of the weights. So the gradient of each weight arrives once per
backward pass, and whoever listens to weights (DDP around the encoder, or around a trainer's module that holds it) reduces
it like that of any other step. FSDP2 keeps the weights of a forward pass to itself: there the second pass leaves its
gradients with the backend, and they are reduced as in `GradientCache.step`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gc_accel.contracts import AccumulatedLoss
from gc_accel.distributed import Replicas
from gc_accel.distributed.reduction import OfDDP
from gc_accel.engine.encoding import Encoded
from gc_accel.memory.recovery import is_out_of_memory, no_way_back
from gc_accel.passes import Passes
from gc_accel.state.modules import Modes


class SecondPass:
    """The second pass over the calls of one batch, still to be made.

    Args:
        passes: of the cache.
        encoded: what its first pass has left.
        end_step: to be called when gradients are there.
    """

    def __init__(self, passes: Passes, encoded: Sequence[Encoded], end_step: Callable[[], None]) -> None:
        self.passes, self.encoded, self.end_step = passes, encoded, end_step
        self.weights = [] if passes.replicas.sharded else passes.modules.weights()
        self.modes = Modes(passes.replicas.model)
        self.leaves = [leaf for each in encoded for leaf in each.leaves.values()]
        self.is_done = False

    def calls(self) -> list[Encoded]:
        """The representations again, as functions of the weights."""
        anchor = torch.zeros((), requires_grad=True)  # where no weight is known
        outputs = iter(self.passes.replicas.as_output(_SecondPass.apply(self, anchor, *self.weights)))
        return [each._replace(leaves={name: next(outputs) for name in each.leaves}) for each in self.encoded]

    def gradients(self, cached: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Make it: from the gradient of each representation to that of each weight.

        Raises:
            ValueError: it is made a second time, or with `create_graph`.
            RuntimeError: memory has run out.
        """
        if self.is_done or torch.is_grad_enabled():
            raise ValueError(
                "expected one backward pass of a cached loss, without create_graph, got another: its graphs are gone. "
                "Call cache(batch) again"
            )
        self.is_done = True
        for leaf, grad in zip(self.leaves, cached, strict=True):
            leaf.grad = grad
        found = list[Tensor | None]([None] * len(self.weights))
        try:
            with self.modes.restored(), torch.enable_grad():
                for each in sorted(self.encoded, key=lambda each: not each.keeps_graph):
                    if self.passes.replicas.sharded:
                        self.passes.push(each)
                    else:
                        found = [
                            _sum(*pair)
                            for pair in zip(found, self.passes.pull(each, self.weights), strict=True)
                        ]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise no_way_back("in the backward pass of cache(batch)", str(self.passes.chunk_sizes)) from error
        if self.passes.replicas.sharded:
            self.passes.replicas.reduce()
        self.end_step()
        return found


class _SecondPass(torch.autograd.Function):
    """Representations as a function of the weights, whose backward pass is the second pass."""

    @staticmethod
    def forward(ctx: Any, second_pass: SecondPass, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.second_pass = second_pass
        ctx.set_materialize_grads(False)
        outputs = tuple(leaf.detach() for leaf in second_pass.leaves)
        pairs = zip(outputs, second_pass.leaves, strict=True)
        ctx.mark_non_differentiable(*(output for output, leaf in pairs if not leaf.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.second_pass.gradients(grads)


def times(loss: Tensor, factor: float) -> Tensor:
    """The same number, of whose gradient there is so many times as much."""
    return loss.detach() + factor * (loss - loss.detach())


@contextmanager
def within_ddp(replicas: Replicas) -> Iterator[None]:
    """A block in which the ranks are those of the DDP in whose forward pass it runs, if it does.

    Some trainers wrap a module of their own, whose training step calls the cache.
    """
    outer = DistributedDataParallel._active_ddp_module
    if outer is None or outer is replicas.encoder:
        yield
        return
    with replicas.of_group(outer.process_group):
        yield


def check_differentiable(loss_fn: Any, replicas: Replicas, pending: SecondPass | None) -> None:
    """Raise ValueError for what has no second pass to be made by a backward pass.

    That is DeepSpeed, whose engine calls `backward` by itself; a loss that accumulates; and with DDP a second loss before
    the first has had its backward pass, as one of them alone would be reduced.
    """
    if isinstance(loss_fn, AccumulatedLoss):
        name = type(loss_fn).__name__
        raise ValueError(
            f"expected a loss over all pairs in cache(batch), got {name}: call forward_backward(batch)"
        )
    if replicas.reduction.steps:
        raise ValueError(
            "expected an encoder that DeepSpeed has not prepared in cache(batch), as its engine calls backward by itself: "
            "call loss = cache.forward_backward(batch) instead of cache(batch) and backward"
        )
    if isinstance(replicas.reduction, OfDDP) and pending is not None and not pending.is_done:
        raise ValueError(
            "expected loss.backward() before the next cache(batch) under DistributedDataParallel, got a second loss: one "
            "of them alone would be reduced. Take them one by one, or both in one batch"
        )


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total.add_(grad)
