"""A step that runs out of memory is taken back and made again with half the chunk.

Gradients, buffers and random states go back to where the step began, on all ranks (`distributed/agreement.py`), so
the new step equals one that began with the smaller chunk. Chunks that were read are kept by the step anyway.

It cannot be taken back once ranks reduce gradients, from the synced call of a process among several on, nor where
parameters are sharded and every call is a collective one, nor in the second pass of an encoder that is a function,
whose weights nobody knows for sure. There the error says what to set. Memory that runs out while a chunk is read is not
the step's: a generator does not go on after an error, and what is left of the batch would be trained on without a word.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers.utils import logging

from gc_accel.distributed import Replicas
from gc_accel.inputs.nested import Inputs
from gc_accel.losses.stateful.accumulated import StatefulLoss
from gc_accel.state.modules import modules_of
from gc_accel.state.rng import RngState

if TYPE_CHECKING:
    from gc_accel.gradient_cache import GradientCache
    from gc_accel.memory.chunk_sizes import ChunkSizes

OUT_OF_MEMORY = (  # in errors of other classes
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)
logger = logging.get_logger(__name__)


class Reread:
    """Chunks that can be read again from the first, and are loaded once."""

    def __init__(self, chunks: Iterable[Inputs]) -> None:
        self.read: list[Inputs] = []
        self.rest = iter(chunks)
        self.is_reading = False  # or has failed to

    def __iter__(self) -> Iterator[Inputs]:
        yield from self.read
        while True:
            self.is_reading = True
            chunk = next(self.rest, None)
            self.is_reading = False
            if chunk is None:
                return
            self.read.append(chunk)
            yield chunk


class StepStart:
    """Gradients, buffers and random states at the start of a step, to be put back.

    Args:
        replicas: of the encoder. Of a sharded one nothing is noted, as there is no way back.
        parameters, buffers: of the loss, that a step changes.
    """

    def __init__(
        self, replicas: Replicas, parameters: Iterable[Tensor] = (), buffers: Iterable[Tensor] = ()
    ) -> None:
        own = ((), ()) if replicas.sharded else (replicas.parameters, replicas.buffers)
        self.rng = RngState.current(replicas.device)
        self.buffers = [(buffer, buffer.clone()) for buffer in (*own[1], *buffers)]
        # A copy, because a gradient that accumulates is added to in place.
        self.grads = [(each, each.grad, _copy(each.grad)) for each in (*own[0], *parameters)]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        self.rng.restore()
        for buffer, copy in self.buffers:
            buffer.copy_(copy)
        for parameter, grad, before in self.grads:
            parameter.grad = grad
            if grad is not None and before is not None:
                grad.copy_(before)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of a device or of the host has run out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in OUT_OF_MEMORY)


def with_recovery(cache: "GradientCache", chunks: Iterable[Inputs], loss_kwargs: Mapping[str, Any]) -> Tensor:
    """Make the step of a gradient cache, as often as it takes; its chunk sizes stay what they have become.

    Raises:
        RuntimeError: memory has run out where a step cannot be taken back, or with chunks of one sample.
    """
    reread, start = Reread(chunks), StepStart(cache.replicas, *state_of(cache.loss_fn))
    for first in itertools.islice(reread, not cache.chunk_sizes):  # "auto" measures with the first chunk
        cache.sizes.settle(first)
    while True:
        try:
            cache.replicas.is_pushing = cache.replicas.is_syncing = False
            return cache.step(reread, loss_kwargs)
        except (RuntimeError, MemoryError) as error:
            if reread.is_reading or not is_out_of_memory(error):
                raise
            if cache.replicas.is_pushing and not isinstance(cache.model, nn.Module):
                where = (
                    "in the second pass of a function, whose weights are not known (pass the module itself)"
                )
                raise _advice(where, cache.sizes) from error
            if cache.replicas.is_lost(error):
                raise _advice("where ranks depend on each other's calls", cache.sizes) from error
            if max(cache.chunk_sizes.values()) == 1:
                raise _advice("with chunks of one sample", cache.sizes) from error
        # Outside of the handler, because the error holds on to the tensors of the step.
        start.restore()
        clear_device_cache(garbage_collection=True)
        cache.retention.give_up()
        cache.sizes.halve()
        logger.warning("Out of memory: this step is made again in chunks of %s.", cache.sizes)


def state_of(loss: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of a loss, whose gradients a step adds to, and the buffers that its forward may move.

    A `StatefulLoss` moves its own at the end of a step, and a queue of 65,536 rows is not worth a copy.
    """
    modules = modules_of(loss)
    buffers = (
        [] if isinstance(loss, StatefulLoss) else [each for module in modules for each in module.buffers()]
    )
    parameters = (each for module in modules for each in module.parameters())
    return [each for each in parameters if each.requires_grad], buffers


def _advice(where: str, sizes: "ChunkSizes") -> RuntimeError:
    return RuntimeError(
        f"out of memory {where}, so the step cannot be made again with smaller chunks: set a smaller chunk_size "
        f"(now {sizes}), retain=0, gradient checkpointing, or a tile_budget of 0 for the loss"
    )


def _copy(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.clone()
