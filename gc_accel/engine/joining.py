"""Calls of the first pass that several chunks share: they keep an accelerator busy, and change no result.

A call without a graph takes less memory than the graph of one chunk, so several chunks fit into it. Each is replayed on
its own in the second pass. Where the encoder draws random numbers, a chunk has to draw its own, and nothing is joined.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gc_accel.contracts import Streams
from gc_accel.engine.encoding import Encoded, encode_together
from gc_accel.engine.schedule import Call

CHUNKS = 4  # of a call, on an accelerator
CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")  # of transformers; of timm and open_clip


def samples_of_a_call(
    chunk_size: int, forward_chunk_size: int | None, *, on_host: bool, checkpoints: bool = False
) -> int:
    """Samples of a call of the first pass: whole chunks.

    Args:
        chunk_size: samples of a chunk.
        forward_chunk_size: what is asked for; None: one chunk on the host and where activations are checkpointed, of
            which a call without a graph takes as much memory, else some.
        on_host: whether the CPU computes.
        checkpoints: whether the encoder checkpoints its activations.
    """
    if forward_chunk_size is None:
        return chunk_size * (1 if on_host or checkpoints else CHUNKS)
    return chunk_size * max(1, forward_chunk_size // chunk_size)


def checkpoints_activations(encoder: Callable[..., Any]) -> bool:
    """Whether a module says that it does."""
    modules = encoder.modules() if isinstance(encoder, nn.Module) else ()
    return any(getattr(module, name, False) for module in modules for name in CHECKPOINTING)


class JoinedCalls:
    """What is joined in the steps of one cache.

    Args:
        encoder: not wrapped.
        forward_chunk_size: samples of a call, see `samples_of_a_call`.
        device: the one that computes.
    """

    def __init__(
        self, encoder: Callable[..., Any], forward_chunk_size: int | None, device: torch.device
    ) -> None:
        self.encoder, self.forward_chunk_size, self.on_host = (
            encoder,
            forward_chunk_size,
            device.type == "cpu",
        )
        self.apart = set[Any]()  # streams whose chunks draw random numbers

    def samples(self, chunk_size: int) -> int:
        """Samples of a call."""
        checkpoints = checkpoints_activations(self.encoder)
        return samples_of_a_call(
            chunk_size, self.forward_chunk_size, on_host=self.on_host, checkpoints=checkpoints
        )

    def halve(self) -> None:
        """Go on with half as many samples in a call."""
        if self.forward_chunk_size is not None:
            self.forward_chunk_size = max(1, self.forward_chunk_size // 2)

    def join(self, calls: Iterable[Call], chunk_sizes: Mapping[Any, int]) -> Iterator[Call]:
        """Join adjacent chunks of one stream that keep no graph, as long as another one has room in the call."""
        limits = {stream: self.samples(size) for stream, size in chunk_sizes.items()}
        joined = Call([])
        for call in calls:
            if joined.chunks and (call.keeps_graph or not joined.chunks[-1].precedes(call.chunks[0])):
                yield joined
                joined = Call([])
            if call.keeps_graph:
                yield call
                continue
            joined.chunks.extend(call.chunks)
            is_full = joined.size + chunk_sizes[call.stream] > limits[call.stream]
            if is_full or call.stream in self.apart:
                yield joined
                joined = Call([])
        if joined.chunks:
            yield joined

    def encode(
        self, fn: Callable[..., Any], call: Call, streams: Streams, device: torch.device
    ) -> list[Encoded] | None:
        """First pass of a call of several chunks; None where each has to draw its own random numbers."""
        whole = streams.arguments(call.stream, call.inputs)
        chunks = [streams.arguments(call.stream, chunk.inputs) for chunk in call.chunks]
        encoded = encode_together(fn, whole, chunks, device=device, shared=streams.global_names)
        if encoded is None:
            self.apart.add(call.stream)
        return encoded
