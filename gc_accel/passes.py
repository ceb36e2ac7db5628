"""The two passes over the chunks of a batch: what every step is made of.

    calls     what is encoded, in which order, and which graphs are kept       (the schedule)
    encode    the first pass of one call                                       representations, as leaves
    push      the second pass of one chunk: encode it again, with a graph, and push its cached gradient through
    pull      the same, for who wants the gradients of the weights instead of having them added up

Both passes add gradients up on this rank; `Replicas.reduce` follows once per step.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gc_accel.contracts import streams_of
from gc_accel.distributed import Replicas
from gc_accel.engine.alignment import align, without_rows
from gc_accel.engine.batch_norm import BatchNorms
from gc_accel.engine.checks import check_rows
from gc_accel.engine.drift import Drift
from gc_accel.engine.encoder_modules import EncoderModules
from gc_accel.engine.encoding import Encoded, encode
from gc_accel.engine.joining import JoinedCalls
from gc_accel.engine.schedule import Call, Chunk, in_chunks, keeping_graphs
from gc_accel.inputs.nested import Inputs
from gc_accel.memory.chunk_sizes import ChunkSizes
from gc_accel.memory.retention import Retention
from gc_accel.state.snapshot import Snapshot


class Passes:
    """What both passes need to know.

    Args:
        encoder: any callable from a chunk to representations, prepared or not.
        replicas, batch_norms, chunk_sizes, joined, retention, guard: of the encoder.
        in_one_call: whether a chunk runs through all streams at once.
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        replicas: Replicas,
        batch_norms: BatchNorms,
        chunk_sizes: ChunkSizes,
        joined: JoinedCalls,
        retention: Retention,
        guard: Drift,
        *,
        in_one_call: bool = False,
    ) -> None:
        self.encoder, self.replicas, self.batch_norms = encoder, replicas, batch_norms
        self.chunk_sizes, self.joined, self.retention, self.guard = chunk_sizes, joined, retention, guard
        self.in_one_call, self.streams = in_one_call, streams_of(replicas.model)
        self.modules = EncoderModules(replicas, batch_norms)

    @property
    def sizes(self) -> dict[Any, int]:
        """Samples of a chunk, by stream."""
        sizes = self.chunk_sizes.by_stream
        return {None: min(sizes.values())} if self.in_one_call else sizes

    def begin_step(self, snapshot: Snapshot) -> None:
        """Note what a step will change, and look at the layers of the encoder.

        Raises:
            ValueError: see `BatchNorms`.
        """
        self.counts = Counter[Any]()  # chunks, by stream
        self.guard.begin_step()
        self.streams = streams_of(self.replicas.model)  # what is frozen may have changed
        if self.in_one_call:
            self.streams = self.streams.as_one()
        self.snapshot = snapshot
        self.modules.begin_step(snapshot)

    def calls(self, batches: Iterable[Inputs], *, keep_graphs: bool = True) -> Iterator[Call]:
        """The calls of the first pass, in their order, as batches are read; whether some may keep their graph.

        Raises:
            ValueError: there is no sample.
        """
        sizes = self.sizes
        chunks: Iterable[Chunk] = in_chunks(batches, self.streams, sizes)
        if self.replicas.sharded:
            chunks = align(chunks, self.streams.names, self.replicas.device)
        limits = self.retention.limits(self.streams) if keep_graphs else dict.fromkeys(self.streams.names, 0)
        calls = keeping_graphs(chunks, limits)
        first = None
        for each in self.joined.join(calls, sizes):
            first = first or each
            yield each
        if first is None:
            raise ValueError("expected a batch of at least one sample, got none")

    def encode(self, call: Call) -> list[Encoded]:
        """First pass of a call: of each of its chunks the representations, as leaves, and how to encode it again."""
        streams, encoded = self.streams, None
        if len(call.chunks) > 1:
            with self.replicas.adding_up(), self._met(call.chunks[0]):
                encoded = self.joined.encode(self.encoder, call, streams, self.replicas.device)
        encoded = encoded or [self.encode_chunk(chunk, call.keeps_graph) for chunk in call.chunks]
        pairs = zip(encoded, call.chunks, strict=True)
        encoded = [each if chunk.counts else without_rows(each) for each, chunk in pairs]
        start = self.counts[call.stream]
        encoded = [each._replace(place=(call.stream, start + at)) for at, each in enumerate(encoded)]
        self.counts[call.stream] += len(encoded)
        for name, leaf in [pair for each in encoded for pair in each.leaves.items()]:
            leaf.requires_grad_(call.stream not in streams.frozen or name in streams.global_names)
        return encoded

    def encode_chunk(self, chunk: Chunk, keep_graph: bool) -> Encoded:
        """First pass of one chunk."""
        fn = self.retention.metered(chunk.stream, chunk.size, self.encoder)
        inputs = self.streams.arguments(chunk.stream, chunk.inputs)
        with self.replicas.adding_up(), self._met(chunk):
            encoded = encode(fn, inputs, device=self.replicas.device, retain=keep_graph)
        check_rows(encoded.leaves, chunk.size, self.streams.global_names)
        return encoded

    def push(self, encoded: Encoded) -> None:
        """Second pass of a chunk: its cached gradients, through its graph, into the weights."""
        outputs, grads = self._again(encoded)
        self.modules.note_gradients(outputs)
        with self.replicas.adding_up():
            self.replicas.backward(outputs, grads)

    def pull(self, encoded: Encoded, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Second pass of a chunk: the gradient that it leaves for each weight.

        Raises:
            ValueError: there are weights that are not among these.
        """
        outputs, grads = self._again(encoded)
        self.modules.check_known(outputs, weights)
        if not outputs:
            return [None] * len(weights)
        return torch.autograd.grad(outputs, weights, grads, allow_unused=True)

    def decide_retention(self) -> None:
        """At the end of a step: how many graphs are kept from now on."""
        chunks = {name: self.counts[name] for name in self.streams.trained}
        self.retention.decide(chunks, self.sizes)

    def _again(self, encoded: Encoded) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of a chunk with a graph, and the gradients that are cached for them."""
        cached = {name: leaf.grad for name, leaf in encoded.leaves.items() if leaf.grad is not None}
        if not cached:
            return [], []
        with self.replicas.adding_up(), self.batch_norms.second_pass():
            outputs = encoded.replay()
        self.guard.note(encoded, outputs, self.streams.global_names)
        trained = [name for name in cached if outputs[name].requires_grad]
        return [outputs[name] for name in trained], [cached[name] for name in trained]

    def _met(self, chunk: Chunk) -> AbstractContextManager[None]:
        return self.modules.met(self.encoder, lambda: self.streams.arguments(chunk.stream, chunk.inputs))
