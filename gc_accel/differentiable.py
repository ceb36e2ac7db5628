"""The second pass as a backward pass: a cached loss that any trainer can hold.

    loss = cache(batch)    first pass  ->  representations  ->  loss
    loss.backward()        their gradient  ->  second pass  ->  the gradient of the weights

To autograd the representations are one function of the weights. So the gradient of each weight arrives once per
backward pass, and whoever listens to weights (DDP around the encoder, or around a trainer's module that holds it, and
hooks) sees it like that of any other step. FSDP2 keeps the weights of a forward pass to itself: there the second pass
leaves its gradients with the backend, and they are reduced as in `GradientCache.step`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.nn.parallel import DistributedDataParallel

from gc_accel.contracts import AccumulatedLoss
from gc_accel.distributed import Replicas
from gc_accel.distributed.reduction import OfDDP
from gc_accel.engine.encoding import Encoded
from gc_accel.engine.loss_of_batch import LossOfBatch, check_all_seen
from gc_accel.inputs.walk import Inputs, leaves
from gc_accel.memory.recovery import is_out_of_memory, no_way_back
from gc_accel.passes import Passes
from gc_accel.state.modules import Modes


class CachedLoss:
    """A step whose second pass is the backward pass of the loss that it returns.

    Args:
        passes, loss: of the cache.
        end_step: to be called with what was encoded when gradients are there.
    """

    def __init__(self, passes: Passes, loss: LossOfBatch, end_step: Callable[[list[Encoded]], None]) -> None:
        self.passes, self.loss, self.end_step = passes, loss, end_step
        # Of the latest one, while its loss is there.
        self.pending: Callable[[], SecondPass | None] = lambda: None

    def __call__(self, chunks: Iterable[Inputs], loss_kwargs: Mapping[str, Any]) -> Tensor:
        """The loss of the global batch, 0-d; without grad mode the number alone."""
        trains, replicas = torch.is_grad_enabled(), self.passes.replicas
        if trains:
            check_differentiable(self.loss.loss_fn, replicas, self.pending(), chunks)
        schedule = self.passes.calls(chunks, keep_graphs=trains)
        encoded = [chunk for call in schedule for chunk in self.passes.encode(call)]
        if not trains:
            return self.loss.of(encoded, chunks, loss_kwargs, graph=False)
        second_pass = SecondPass(self.passes, encoded, self.end_step)
        loss = times(self.loss.of(second_pass.calls(), chunks, loss_kwargs), replicas.world_size)
        loss.register_hook(second_pass.check)
        self.pending = ref(second_pass)
        return loss


class SecondPass:
    """The second pass over the calls of one batch, still to be made.

    Args:
        passes: of the cache.
        encoded: what its first pass has left.
        end_step: to be called with that when gradients are there.
    """

    def __init__(
        self, passes: Passes, encoded: list[Encoded], end_step: Callable[[list[Encoded]], None]
    ) -> None:
        self.passes, self.encoded, self.end_step = copy(passes), encoded, end_step
        # Whichever step begins before this one is done.
        self.passes.batch_norms, self.passes.guard = copy(passes.batch_norms), copy(passes.guard)
        self.is_pushed = passes.replicas.reduction.keeps_weights
        self.weights = [] if self.is_pushed else passes.modules.weights()
        self.versions = [each._version for each in self.weights]
        self.modes = Modes(passes.modules.called())
        self.leaves = [leaf for each in encoded for leaf in each.leaves.values()]
        self.is_done = False

    def calls(self) -> list[Encoded]:
        """The representations again, as functions of the weights."""
        anchor = torch.zeros((), requires_grad=True)  # where no weight is known
        outputs = iter(self.passes.replicas.as_output(_SecondPass.apply(self, anchor, *self.weights)))
        return [each._replace(leaves={name: next(outputs) for name in each.leaves}) for each in self.encoded]

    def check(self, grad: Tensor) -> None:
        """At the beginning of a backward pass: whether there is still one to be made.

        Raises:
            ValueError: it is made a second time, or with `create_graph`, or after an optimizer step.
        """
        if self.is_done or torch.is_grad_enabled():
            raise ValueError(
                "expected one backward pass of a cached loss, without create_graph, got another: its graphs are gone. "
                "Call cache(batch) again"
            )
        if self.versions != [each._version for each in self.weights]:
            raise ValueError(
                "expected the weights that cache(batch) has encoded with, got others: call loss.backward() before they "
                "change, as in optimizer.step()"
            )

    def gradients(self, cached: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Make it: from the gradient of each representation to that of each weight.

        Raises:
            ValueError: see `check_all_seen` and `Passes.pull`.
            RuntimeError: memory has run out.
        """
        encoded, self.encoded = self.encoded, []  # a loss that is kept, to be logged, keeps nothing else
        leaves, self.leaves = self.leaves, []
        self.is_done = True
        for leaf, grad in zip(leaves, cached, strict=True):
            leaf.grad = grad
        check_all_seen(encoded, self.passes.streams)
        found = list[Tensor | None]([None] * len(self.weights))
        try:
            with self.modes.restored(), without_hooks(self.weights), torch.enable_grad():
                for each in sorted(encoded, key=lambda each: not each.keeps_graph):
                    if self.is_pushed:
                        self.passes.push(each)
                        continue
                    for index, grad in enumerate(self.passes.pull(each, self.weights)):
                        found[index] = _sum(found[index], grad)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise no_way_back("in the backward pass of cache(batch)", str(self.passes.chunk_sizes)) from error
        self.passes.guard.check(self.passes.snapshot)
        if self.is_pushed:
            self.passes.replicas.reduce()
        self.end_step(encoded)
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

    Raises:
        ValueError: see `refuse_within_fsdp`.
    """
    refuse_within_fsdp(replicas.model)
    outer = DistributedDataParallel._active_ddp_module
    if outer is None or outer is replicas.encoder:
        yield
        return
    with replicas.of_group(outer.process_group):
        yield


def refuse_within_fsdp(model: Any) -> None:
    """Raise ValueError in the forward pass of an FSDP2 around a model, where ranks have to make the same calls."""
    inside = set(model.modules()) if isinstance(model, nn.Module) else set()
    around = [state() for module, state in _module_state_mapping.items() if module not in inside]
    if any(getattr(each, "_training_state", None) is TrainingState.FORWARD for each in around):
        raise ValueError(
            "expected no forward pass of FSDP2 around a gradient cache, got one: pass the module that it shards, and "
            "the accelerator that prepared it, to GradientCache, and call that outside of any forward pass"
        )


def refuse_forward_pass(model: Any) -> None:
    """Raise ValueError in the forward pass of FSDP2, or of DDP, which reduces in the backward pass that follows it."""
    refuse_within_fsdp(model)
    if DistributedDataParallel._active_ddp_module is not None:
        raise ValueError(
            "expected no forward pass of DistributedDataParallel around forward_backward, got one: it would reduce "
            "nothing. Have that forward pass return cache(batch), and call backward on it"
        )


def check_differentiable(
    loss_fn: Any, replicas: Replicas, pending: SecondPass | None, batches: Iterable[Inputs]
) -> None:
    """Raise ValueError for what has no second pass to be made by a backward pass.

    That is DeepSpeed, whose engine calls `backward` by itself; a loss that accumulates; with DDP a second loss before
    the first has had its backward pass, as one of them alone would be reduced; and inputs that something else has
    computed with a graph.
    """
    if isinstance(loss_fn, AccumulatedLoss):
        name = type(loss_fn).__name__
        raise ValueError(
            f"expected a loss over all pairs in cache(batch), got {name}: call forward_backward(batch)"
        )
    if replicas.reduction.steps:
        raise ValueError(
            "expected an encoder that DeepSpeed has not prepared in cache(batch), as its engine calls backward by "
            "itself: call loss = cache.forward_backward(batch) instead of cache(batch) and backward"
        )
    if isinstance(replicas.reduction, OfDDP) and pending is not None and not pending.is_done:
        raise ValueError(
            "expected loss.backward() before the next cache(batch) under DistributedDataParallel, got a second loss: "
            "one of them alone would be reduced. Take them one by one (del loss drops one), or both in one batch"
        )
    tensors = [value for batch in batches for _, value in leaves(batch)]
    if any(each.requires_grad for each in tensors if isinstance(each, Tensor)):
        raise ValueError(
            "expected inputs without a graph in cache(batch), got some that require a gradient: let the encoder "
            "compute them, or detach them"
        )


@contextmanager
def without_hooks(weights: Sequence[Tensor]) -> Iterator[None]:
    """A block in which no hook of a weight runs: the whole gradient is what they are for, not that of each chunk."""
    hooks = [(each._backward_hooks, dict(each._backward_hooks)) for each in weights if each._backward_hooks]
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, noted in hooks:
            registered.update(noted)


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total + grad  # not in place, as the gradient of a sum is one tensor for both of its terms
