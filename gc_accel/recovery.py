"""A step that runs out of memory is taken back and made again with half the chunk.

Gradients, buffers and random states go back to where the step began, on all ranks (`distributed/agreement.py`), so
the new step equals one that began with the smaller chunk. Chunks that were read are kept by the step anyway.

It cannot be taken back while ranks reduce gradients, in the synced call of a process among several, nor where
parameters are sharded and every call is a collective one. There the error says what to set.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from transformers.utils import logging

from gc_accel.chunking import Inputs
from gc_accel.distributed import Replicas
from gc_accel.rng import RngState

if TYPE_CHECKING:
    from gc_accel.chunk_size import ChunkSizes
    from gc_accel.gradient_cache import GradientCache

logger = logging.get_logger(__name__)


class Reread:
    """Chunks that can be read again from the first, and are loaded once."""

    def __init__(self, chunks: Iterable[Inputs]) -> None:
        self.read: list[Inputs] = []
        self.rest = iter(chunks)

    def __iter__(self) -> Iterator[Inputs]:
        yield from self.read
        for chunk in self.rest:
            self.read.append(chunk)
            yield chunk


class StepStart:
    """Gradients, buffers and random states at the start of a step, to be put back."""

    def __init__(self, replicas: Replicas) -> None:
        self.rng = RngState.current(replicas.device)
        self.buffers = [(buffer, buffer.clone()) for buffer in replicas.buffers]
        # A copy, because a gradient that accumulates is added to in place.
        self.grads = [(each, each.grad, _copy(each.grad)) for each in replicas.parameters]

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
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def with_recovery(cache: "GradientCache", chunks: Iterable[Inputs], loss_kwargs: Mapping[str, Any]) -> Tensor:
    """Make the step of a gradient cache, as often as it takes; its chunk sizes stay what they have become.

    Raises:
        RuntimeError: memory has run out where a step cannot be taken back, or with chunks of one sample.
    """
    reread, start = Reread(chunks), StepStart(cache.replicas)
    for first in itertools.islice(reread, not cache.chunk_sizes):  # "auto" measures with the first chunk
        cache.sizes.settle(first)
    while True:
        try:
            return cache.step(reread, loss_kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
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


def _advice(where: str, sizes: "ChunkSizes") -> RuntimeError:
    return RuntimeError(
        f"out of memory {where}, so the step cannot be made again with smaller chunks: set a smaller chunk_size "
        f"(now {sizes}), retain=0, gradient checkpointing, or a tile_budget of 0 for the loss"
    )


def _copy(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.clone()
