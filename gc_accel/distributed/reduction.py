"""How gradients that were added up without it are reduced over ranks, once.

Both passes run without a reduction. Afterwards one call touches every parameter that some rank has a gradient of, each
by a zero of its own, and so makes the backend reduce what has been added up. It encodes nothing: no random state, no
running statistics and no hook of the user's see it, and it takes no memory.

    DDP             one forward and backward pass of a stand-in for its module, whose output is that zero
    FSDP2           what its root does at the end of a backward pass, with no backward pass before it
    ZeRO-0, 1       a backward pass of that zero at DeepSpeed's accumulation boundary
    ZeRO-2, 3       the end of `coalesce_grad_reduction`, which spans all batches of an optimizer step

Ranks may have gradients of different parameters (an expert that one rank alone has used), so they agree on them first:
what any rank has, all of them reduce.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

AnyRank = Callable[[Sequence[bool]], list[bool]]  # of each flag whether some rank has it


class Reduction:
    """That of one process, and the interface of the others: nothing to do.

    Attributes:
        steps: whether the optimizer steps along.
        keeps_weights: whether those that a forward pass computes with are not the module's own.
    """

    steps = False
    keeps_weights = False

    def adding_up(self) -> AbstractContextManager[Any]:
        """A block whose forward and backward passes add gradients up on this rank alone."""
        return nullcontext()

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Push gradients through the graph of one call, and add up what comes out."""
        torch.autograd.backward(list(outputs), list(grads))

    def reduce(self, any_rank: AnyRank) -> None:
        """Reduce everything that has been added up; all ranks at once."""

    def as_output(self, output: Any) -> Any:
        """Tensors whose backward pass will be reduced as that of any other output of the encoder."""
        return output

    def forget(self) -> None:
        """Drop what this rank has added up and keeps to itself, beside the gradients of the weights."""

    def give_up(self) -> None:
        """Make the next step like the first one, after one that all ranks have left."""


class OfDDP(Reduction):
    """Every `DistributedDataParallel` that an encoder reaches."""

    def __init__(self, modules: Sequence[DistributedDataParallel]) -> None:
        self.modules = modules

    @contextmanager
    def adding_up(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(module.no_sync())
            yield

    def reduce(self, any_rank: AnyRank) -> None:
        for module in self.modules:
            if not module.require_backward_grad_sync:  # in the user's own no_sync, which adds up batches
                continue
            trained = [each for each in module.module.parameters() if each.requires_grad]
            present = any_rank([each.grad is not None for each in trained])
            # DDP finds out by itself what is not touched, or takes everything to be.
            touched = [each for each, has in zip(trained, present, strict=True) if has]
            if touched:
                output_of(module, zero_of(touched if module.find_unused_parameters else trained)).backward()
            for each, has in zip(trained, present, strict=True):
                if not has:
                    each.grad = None
            # A collective call, which DDP would make in the first forward pass with a graph of the next step. Ranks
            # come there at different moments, if they keep other graphs or run out of memory before.
            module.reducer._rebuild_buckets()

    def as_output(self, output: Any) -> Any:
        for module in self.modules:
            output = output_of(module, output)
        return output

    def give_up(self) -> None:
        for module in self.modules:
            # The first forward of a step broadcasts buffers: again on all ranks, or on none.
            module.require_forward_param_sync = True


class OfFSDP(Reduction):
    """The root that `fully_shard` made of an encoder."""

    keeps_weights = True

    def __init__(self, root: FSDPModule) -> None:
        self.root = root

    @contextmanager
    def adding_up(self) -> Iterator[None]:
        self.root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.root.set_requires_gradient_sync(True)

    def reduce(self, any_rank: AnyRank) -> None:
        root = self.root._get_fsdp_state()
        parameters = [each for group in _groups_of(root) for each in group.fsdp_params]
        present = [_gradient_of(each) is not None for each in parameters]
        for each, here, somewhere in zip(parameters, present, any_rank(present), strict=True):
            if somewhere and not here:
                whole = each._unsharded_param
                each.unsharded_accumulated_grad = torch.zeros(
                    whole.shape, dtype=each.reduce_dtype or whole.dtype, device=whole.device
                )
        start = torch.zeros((), requires_grad=True)
        end = start * 1
        end.register_hook(
            lambda _: Variable._execution_engine.queue_callback(root._root_post_backward_final_callback)
        )
        end.backward()

    def forget(self) -> None:
        for group in _groups_of(self.root._get_fsdp_state()):
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if (unsharded := getattr(parameter, "_unsharded_param", None)) is not None:
                    unsharded.grad = None


class OfDeepSpeed(Reduction):
    """An engine of DeepSpeed, of any stage, whose optimizer steps when gradients are reduced."""

    steps = True

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.coalesces = engine.zero_optimization_stage() >= 2
        self.coalescing: ExitStack | None = None

    def adding_up(self) -> AbstractContextManager[Any]:
        # Over all batches of an optimizer step: a second block would overwrite what the first has reduced.
        if self.coalesces and self.coalescing is None:
            self.coalescing = ExitStack()
            self.coalescing.enter_context(self.engine.coalesce_grad_reduction())
        return nullcontext()

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        # DeepSpeed wants a scalar, whose derivative with respect to the outputs is their gradient.
        dot = sum((out * grad).sum() for out, grad in zip(outputs, grads, strict=True))
        self._backward(dot, boundary=False)

    def reduce(self, any_rank: AnyRank) -> None:
        trained = [each for each in self.engine.module.parameters() if each.requires_grad]
        here = [_accumulated(self.engine, each) is not None for each in trained]
        somewhere = any_rank(here)
        touched = [each for each, has in zip(trained, somewhere, strict=True) if has]
        if self.coalescing is not None:
            missing = [not a and b for a, b in zip(here, somewhere, strict=True)]
            self._add_zeros(
                [each for each, is_missing in zip(trained, any_rank(missing), strict=True) if is_missing]
            )
            self.coalescing.close()
            self.coalescing = None
        elif touched:
            self._backward(zero_of(touched), boundary=True)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()

    def forget(self) -> None:
        for parameter in self.engine.module.parameters():
            parameter.grad = None

    def _backward(self, scalar: Any, *, boundary: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(boundary)
        self.engine.backward(scalar, scale_wrt_gas=False)  # `Replicas.scaled` has divided already

    def _add_zeros(self, parameters: list[nn.Parameter]) -> None:
        """Give parameters that lack a gradient one of zeros; all ranks name the same ones, as they may be sharded."""
        if not parameters:
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
            for each in parameters:
                if _accumulated(self.engine, each) is None:
                    each.grad = torch.zeros_like(each)


class _Zero(torch.autograd.Function):
    """Zero, as a function of parameters whose gradient is zero too, whatever they hold."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        # One number each, that is read as often as needed.
        return tuple(each.new_zeros(()).expand(each.shape) for each in ctx.parameters)


def zero_of(parameters: Sequence[Tensor]) -> Tensor:
    """A 0-d zero with a graph that reaches these parameters, and leaves a gradient of zero in each."""
    return _Zero.apply(*parameters)


class _StandIn(nn.Module):
    """A module whose forward returns what it was made with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> Any:
        return self.output


def output_of(module: DistributedDataParallel, output: Any) -> Any:
    """Tensors as if the wrapped module had returned them, so that DDP reduces in their backward pass."""
    wrapped = module.module
    module.module = _StandIn(output)
    try:
        return module()
    finally:
        module.module = wrapped


def _groups_of(state: Any) -> Iterator[Any]:
    """All groups of parameters below the root of FSDP2, whose fields differ among versions of torch."""
    for each in state._state_ctx.all_states:
        groups = getattr(each, "_fsdp_param_groups", None)
        yield from ([each._fsdp_param_group] if each._fsdp_param_group else []) if groups is None else groups


def _gradient_of(parameter: Any) -> Tensor | None:
    """What FSDP2 has added up of one parameter."""
    if parameter.unsharded_accumulated_grad is not None:
        return parameter.unsharded_accumulated_grad
    unsharded = getattr(parameter, "_unsharded_param", None)  # from its first forward pass on
    return None if unsharded is None else unsharded.grad


def _accumulated(engine: Any, parameter: nn.Parameter) -> Tensor | None:
    """What DeepSpeed has added up of one parameter."""
    noted = getattr(engine.optimizer, "get_gradient_for_reduction", None)
    return parameter.grad if noted is None else noted(parameter)
