"""The data-parallel copies of an encoder: one reduction per step, and the one factor that goes with it.

The scaling rule (it stands here and nowhere else). Let L be the loss of the *global* batch, x_r whatever
rank r hands to the loss (its representations, its copy of each global such as the logit scale), and theta
the parameters, equal on all ranks. A loss leaves dL/dx_r on rank r, the contributions of other ranks'
negatives included, and each rank's backward pass turns that into g_r = dL/dx_r . dx_r/dtheta. The chain
rule wants their sum,

    rank          0      1     ...    W-1
    local        g_0    g_1    ...   g_{W-1}          dL/dtheta = g_0 + g_1 + ... + g_{W-1}

and DDP, FSDP and ZeRO leave their mean. Hence W * dL/dx_r has to go into the encoder: one factor, the same
for representations and globals (`Replicas.scaled`).

How each backend reduces what was added up, once: see `reduction`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from gc_accel.distributed.agreement import Agreement, PeerOutOfMemory
from gc_accel.distributed.collectives import lowest, world_size
from gc_accel.distributed.reduction import OfDDP, OfDeepSpeed, OfFSDP, Reduction
from gc_accel.state.rng import device_in_use

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class Replicas:
    """The data-parallel copies of one encoder: where they compute, when they reduce, what scales them.

    Args:
        encoder: a callable, a module, a module wrapped in DDP, or what `accelerator.prepare` returned.
        accelerator: the one that prepared the encoder, if any.
        reduce_every: after how many chunks of the second pass sharded gradients are reduced; None: at its end alone.

    Raises:
        ValueError: the encoder is not the one that was prepared, or wrapped in a way that cannot be exact; a number
            of chunks below 1, or with DeepSpeed.
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        accelerator: Accelerator | None,
        reduce_every: int | None = None,
    ) -> None:
        self.encoder: Any = encoder
        self.model: Any = encoder  # without what wraps it
        if isinstance(encoder, nn.Module):
            self.model = extract_model_from_parallel(encoder, keep_torch_compile=False)
        _check(encoder, self.model, accelerator)
        self.accelerator: Any = accelerator
        self.parameters = list(self.model.parameters()) if isinstance(self.model, nn.Module) else []
        is_ddp = isinstance(encoder, DistributedDataParallel)
        self.group: Any = encoder.process_group if isinstance(encoder, DistributedDataParallel) else None
        if accelerator is not None:
            self.world_size, self.device = accelerator.num_processes, accelerator.device
        else:
            self.world_size = world_size(self.group) if is_ddp else 1
            self.device = next((each.device for each in self.parameters), device_in_use())
        sharding = accelerator is not None and accelerator.distributed_type in SHARDING
        self.sharded = sharding and self.world_size > 1
        self.agreement = Agreement(self.device, self.group, self.world_size)
        self.reduction = _reduction_of(encoder, accelerator)
        if reduce_every is not None and (reduce_every < 1 or self.reduction.steps):
            raise ValueError(
                "expected reduce_every of at least 1 chunk, and None with DeepSpeed, which reduces all chunks of an "
                f"optimizer step at once, got {reduce_every}"
            )
        self.reduce_every = reduce_every
        self.is_reducing = False  # or has reduced: there is no way back

    def follow(self) -> None:
        """Go where the weights are now: a trainer may have moved or replaced them since."""
        if isinstance(self.model, nn.Module):
            self.parameters = list(self.model.parameters())
        if self.accelerator is None and self.parameters:
            self.device = self.parameters[0].device

    def lowest(self, numbers: Sequence[float]) -> list[float]:
        """Of each number the lowest that a rank hands in."""
        return lowest(numbers, self.device, self.group) if self.world_size > 1 else list(numbers)

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag whether a rank hands it in set."""
        if self.world_size == 1:
            return list(flags)
        flagged = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(flagged, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in flagged.tolist()]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient goes into the encoder: times the world size (see the scaling rule above), and
        times the weight of its batch."""
        return self._weighted(loss * self.world_size)

    def unscaled(self, grad: Tensor) -> Tensor:
        """A gradient as ranks have reduced it without the weight of its batch: that of the loss of the global batch."""
        return grad / self._weighted(torch.ones((), dtype=grad.dtype, device=grad.device))

    def _weighted(self, value: Tensor) -> Tensor:
        """One over the number of accumulated batches, times the scale of the gradient scaler."""
        if self.accelerator is None:
            return value
        value = value / self.accelerator.gradient_accumulation_steps
        return self.accelerator.scaler.scale(value) if self.accelerator.scaler is not None else value

    def adding_up(self) -> AbstractContextManager[Any]:
        """A block whose forward and backward passes reduce nothing over ranks."""
        return self.reduction.adding_up()

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Push cached gradients through the graph of one call (or of several at once), if it has any."""
        if outputs:
            self.reduction.backward(outputs, grads)

    def reduce(self) -> None:
        """Reduce what all batches of an optimizer step have added up, with the last of them.

        DeepSpeed's optimizer steps here, as accelerate has it step in a backward pass, and `optimizer.step()` does
        nothing afterwards.
        """
        self.agreement.check()  # all ranks go on, or none
        if self.accelerator is None or self.accelerator.sync_gradients:
            self.is_reducing = self.world_size > 1 or self.reduction.steps
            with torch.enable_grad():
                self.reduction.reduce(self.any_rank)

    def as_output(self, output: Any) -> Any:
        """Tensors whose backward pass will be reduced as that of any other output of the encoder."""
        return self.reduction.as_output(output)

    @contextmanager
    def of_group(self, group: dist.ProcessGroup) -> Iterator[None]:
        """A block in which these ranks have the copies, whoever reduces their gradients."""
        before = self.group, self.world_size, self.agreement
        self.group, self.world_size = group, world_size(group)
        self.agreement = Agreement(self.device, group, self.world_size)
        try:
            yield
        finally:
            self.group, self.world_size, self.agreement = before

    def pushed(self, number: int) -> None:
        """After so many chunks of a second pass: reduce what they have added up, if it takes the memory of all weights.

        Whole gradients of sharded weights are there until they are reduced.
        """
        if self.reduce_every is not None and self.reduction.keeps_weights and number % self.reduce_every == 0:
            with torch.enable_grad():
                self.reduction.reduce(self.any_rank)

    @property
    def is_lost(self) -> bool:
        """Whether ranks cannot get out of a step together, in which one has run out of memory."""
        return self.sharded or self.is_reducing

    def leave_step(self, error: Exception) -> None:
        """Get out of a step that can be made again, with all ranks."""
        if not isinstance(error, PeerOutOfMemory):
            self.agreement.report()
        self.reduction.give_up()


def _check(encoder: Any, model: Any, accelerator: Accelerator | None) -> None:
    """Refuse an encoder that is wrapped in a way that cannot be exact."""
    if isinstance(encoder, DistributedDataParallel) and encoder.static_graph:
        raise ValueError(
            "expected DistributedDataParallel without static_graph, got static_graph=True: a step calls "
            "it in several ways. Use find_unused_parameters=True instead"
        )
    if isinstance(encoder, FSDPModule) and accelerator is None:
        raise ValueError("expected the accelerator that prepared the sharded encoder, got None: pass it")
    prepared = [model]
    if accelerator is not None and accelerator.num_processes > 1:
        prepared = accelerator._models
    if not any(each is encoder or each is model for each in prepared):
        raise ValueError(
            "expected the encoder that accelerator.prepare returned, got another: its gradients would never "
            "be reduced over ranks"
        )


def refuse_hidden_ddp(module: nn.Module) -> None:
    """Refuse `DistributedDataParallel` behind a function.

    Raises:
        ValueError: a module that a function calls is wrapped in it.
    """
    if isinstance(module, DistributedDataParallel):
        raise ValueError(
            "expected DistributedDataParallel as the encoder, got a function around it: its ranks would not be "
            "told when to reduce. Pass it, or accelerator.prepare's module, itself"
        )


def _reduction_of(encoder: Any, accelerator: Any) -> Reduction:
    if accelerator is not None and accelerator.distributed_type == DistributedType.DEEPSPEED:
        return OfDeepSpeed(encoder)
    if isinstance(encoder, FSDPModule):
        return OfFSDP(encoder)
    return OfDDP([encoder]) if isinstance(encoder, DistributedDataParallel) else Reduction()
