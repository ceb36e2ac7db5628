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

How each backend reduces once, although the second pass has many calls:

    DDP, FSDP2      all calls but the last are made inside no-sync; the last one reduces what has added up
    ZeRO-0, 1       the last call alone is at DeepSpeed's accumulation boundary, where it reduces
    ZeRO-2, 3       reduce in every backward pass, but for `coalesce_grad_reduction`, which does so at its end
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from gc_accel.distributed.agreement import Agreement, PeerOutOfMemory
from gc_accel.distributed.alignment import align
from gc_accel.distributed.collectives import GlobalLoss, RankedBatch, lowest, world_size
from gc_accel.engine.schedule import Rows, Turn
from gc_accel.inputs.nested import call, unnamed
from gc_accel.state.modules import modules_of
from gc_accel.state.rng import device_in_use

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class Replicas:
    """The data-parallel copies of one encoder: where they compute, when they reduce, what scales them.

    Args:
        encoder: a callable, a module, a module wrapped in DDP, or what `accelerator.prepare` returned.
        accelerator: the one that prepared the encoder, if any.

    Raises:
        ValueError: the encoder is not the one that was prepared, or wrapped in a way that cannot be exact.
    """

    def __init__(self, encoder: Callable[..., Any], accelerator: Accelerator | None) -> None:
        if isinstance(encoder, DistributedDataParallel) and encoder.static_graph:
            raise ValueError(
                "expected DistributedDataParallel without static_graph, got static_graph=True: a step calls "
                "it in several ways. Use find_unused_parameters=True instead"
            )
        if isinstance(encoder, FSDPModule) and accelerator is None:
            raise ValueError("expected the accelerator that prepared the sharded encoder, got None: pass it")
        self.encoder: Any = encoder
        self.model: Any = encoder  # without what wraps it
        if isinstance(encoder, nn.Module):
            self.model = extract_model_from_parallel(encoder, keep_torch_compile=False)
        self.modules = modules_of(self.model)
        self.parameters = [each for module in self.modules for each in module.parameters()]
        self.buffers = [each for module in self.modules for each in module.buffers()]
        if any(isinstance(module, DistributedDataParallel) for module in self.modules):
            raise ValueError(
                "expected DistributedDataParallel as the encoder, got a function around it: its ranks would not be "
                "told when to reduce. Pass it, or accelerator.prepare's module, itself"
            )
        prepared = [self.model]
        if accelerator is not None and accelerator.num_processes > 1:
            prepared = accelerator._models
        if not any(each is encoder or each is self.model for each in prepared):
            raise ValueError(
                "expected the encoder that accelerator.prepare returned, got another: its gradients would never "
                "be reduced over ranks"
            )
        self.accelerator: Any = accelerator
        self.group = encoder.process_group if isinstance(encoder, DistributedDataParallel) else None
        if accelerator is not None:
            self.world_size = accelerator.num_processes
            self.device = accelerator.device
        else:
            self.world_size = world_size(self.group) if isinstance(encoder, DistributedDataParallel) else 1
            self.device = next((each.device for each in self.parameters), device_in_use())
        sharding = accelerator is not None and accelerator.distributed_type in SHARDING
        self.sharded = sharding and self.world_size > 1
        self.agreement = Agreement(self.device, self.group, self.world_size)
        self.is_pushing = False  # in the second pass, or after it
        self.is_syncing = False  # in the call in which ranks reduce, or after it: there is no way back

    def aligned(
        self, turns: Iterable[Turn], first: Mapping[Any, Rows], streams: Iterable[Any]
    ) -> Iterable[Turn]:
        """Turns, among them those that keep sharded ranks in step, whose rows do not count."""
        return align(turns, first, list(streams), self.device) if self.sharded else turns

    def lowest(self, numbers: Sequence[float]) -> list[float]:
        """Of each number the lowest that a rank hands in."""
        return lowest(numbers, self.device, self.group) if self.world_size > 1 else list(numbers)

    def is_lost(self, error: Exception) -> bool:
        """Whether ranks cannot get out of a step together, in which one has run out of memory.

        If they can, all of them know of it afterwards.
        """
        if self.sharded or self.is_syncing:
            return True
        if not isinstance(error, PeerOutOfMemory):
            self.agreement.report()
        if isinstance(self.encoder, DistributedDataParallel):
            # The first forward of a step broadcasts buffers: again on all ranks, or on none.
            self.encoder.require_forward_param_sync = True
        return False

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

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient goes into the encoder: times the world size (see the scaling rule above),
        over the number of accumulated batches, times the scale of the gradient scaler."""
        loss = loss * self.world_size
        if self.accelerator is None:
            return loss
        loss = loss / self.accelerator.gradient_accumulation_steps
        return self.accelerator.scaler.scale(loss) if self.accelerator.scaler is not None else loss

    def reducing(self, sync: bool) -> AbstractContextManager[Any]:
        """A block whose forward and backward reduce gradients over ranks if `sync`, and add them up if not.

        Nothing is reduced either while the accelerator accumulates several batches.
        """
        if self._by_deepspeed:
            return nullcontext()  # which goes by its boundary: see `backward`
        if self.accelerator is not None:
            last = sync and self.accelerator.sync_gradients
            return nullcontext() if last else self.accelerator.no_sync(self.encoder)
        if isinstance(self.encoder, DistributedDataParallel) and not sync:
            return self.encoder.no_sync()
        return nullcontext()

    def begin_syncing(self) -> None:
        """To be called before the one call of a step that reduces: all ranks go on to it, or none."""
        self.agreement.check()
        self.is_syncing = self.world_size > 1

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor], *, sync: bool) -> None:
        """Push cached gradients through the graph of one call (or of several at once), if it has any."""
        if not outputs:
            return
        if not self._by_deepspeed:
            torch.autograd.backward(list(outputs), list(grads))
            return
        # DeepSpeed wants a scalar, whose derivative with respect to the outputs is their cached gradient.
        dot = sum((out * grad).sum() for out, grad in zip(outputs, grads, strict=True))
        self.encoder.set_gradient_accumulation_boundary(sync and self.accelerator.sync_gradients)
        self.encoder.backward(dot, scale_wrt_gas=False)  # `scaled` has divided already

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """All backward passes of a batch. DeepSpeed's optimizer steps at its end, as accelerate has it step
        with every backward pass that syncs, and `optimizer.step()` does nothing afterwards."""
        self.is_pushing = True
        if not self._by_deepspeed:
            yield
            return
        with self.encoder.coalesce_grad_reduction() if self._coalesces else nullcontext():
            yield
        if self.accelerator.sync_gradients:
            self.encoder.set_gradient_accumulation_boundary(True)
            self.encoder.step()

    @property
    def is_alone(self) -> bool:
        """Whether no call reduces anything, so that it does not matter which of them comes last."""
        wrapped = isinstance(self.encoder, (DistributedDataParallel, FSDPModule)) or self._by_deepspeed
        return self.world_size == 1 and not wrapped

    @property
    def _by_deepspeed(self) -> bool:
        return self.accelerator is not None and self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def _coalesces(self) -> bool:
        """Whether ZeRO can wait with the reduction: a second batch before the step would overwrite the first."""
        partitioned = self.encoder.zero_optimization_stage() >= 2
        return partitioned and self.accelerator.gradient_accumulation_steps == 1
