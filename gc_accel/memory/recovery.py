"""A step that runs out of memory is taken back and made again with half the chunk.

Gradients, buffers and random states go back to where the step began, on all ranks (`distributed/agreement.py`), so the
new step equals one that began with the smaller chunk. Chunks that were read are kept by the step anyway.

A step cannot be taken back once ranks reduce gradients, nor where parameters are sharded and every call is a
collective one. There the error says what to set. Memory that runs out while a chunk is read is not the step's: a
generator does not go on after an error, and what is left of the batch would be trained on without a word.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from gc_accel.inputs.nested import Inputs

T = TypeVar("T")
OUT_OF_MEMORY = (  # in errors of other classes
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


class Reread:
    """Chunks that can be read again from the first, and are loaded once."""

    def __init__(self, chunks: Iterable[Inputs]) -> None:
        self.loaded: list[Inputs] = []
        self.rest = iter(chunks)
        self.is_reading = False  # stays True where reading has failed

    def __iter__(self) -> Iterator[Inputs]:
        yield from self.loaded
        while True:
            self.is_reading = True
            chunk = next(self.rest, None)
            self.is_reading = False
            if chunk is None:
                return
            self.loaded.append(chunk)
            yield chunk


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of a device or of the host has run out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in OUT_OF_MEMORY)


def retry(
    step: Callable[[Reread], T],
    chunks: Reread,
    undo: Callable[[Exception], None],
    shrink: Callable[[], None],
) -> T:
    """Make a step, as often as it takes.

    Args:
        step: of chunks that it may read again.
        chunks: of the batch.
        undo: puts back what a step that has run out of memory has changed, or raises an error that says why it cannot.
        shrink: makes the next attempt take less.
    """
    while True:
        try:
            return step(chunks)
        except (RuntimeError, MemoryError) as error:
            if chunks.is_reading or not is_out_of_memory(error):
                raise
            undo(error)
        # Outside of the handler, because the error holds on to the tensors of the step.
        clear_device_cache(garbage_collection=True)
        shrink()


def no_way_back(where: str, chunk_sizes: str) -> RuntimeError:
    """The error of a step that cannot be made again."""
    return RuntimeError(
        f"out of memory {where}, so the step cannot be made again with smaller chunks: set a smaller chunk_size "
        f"(now {chunk_sizes}), retain=0, gradient checkpointing, or a tile_budget of 0 for the loss"
    )
