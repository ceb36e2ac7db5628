"""The two passes over the chunks of a batch: what every step is made of.

    calls     what is encoded, in which order, and which graphs are kept       (the schedule)
    encode    the first pass of one call                                       representations, as leaves
    push      the second pass of one chunk: encode it again, with a graph, and push its cached gradient through

Both passes add gradients up on this rank; `Replicas.reduce` follows once per step.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from gc_accel.contracts import streams_of
from gc_accel.distributed import Replicas
from gc_accel.distributed.replicas import refuse_hidden_ddp
from gc_accel.engine.alignment import align, without_rows
from gc_accel.engine.batch_norm import BatchNorms
from gc_accel.engine.checks import check_rows
from gc_accel.engine.encoding import Encoded, encode
from gc_accel.engine.joining import JoinedCalls
from gc_accel.engine.schedule import Call, Chunk, in_chunks, keeping_graphs
from gc_accel.inputs.nested import Inputs, call, concatenate
from gc_accel.memory.chunk_sizes import ChunkSizes
from gc_accel.memory.retention import Retention
from gc_accel.state.graph import leaves_and_nodes
from gc_accel.state.modules import first_called, meeting
from gc_accel.state.rng import CPU, device_in_use
from gc_accel.state.snapshot import Snapshot


class Passes:
    """What both passes need to know.

    Args:
        encoder: any callable from a chunk to representations, prepared or not.
        replicas, batch_norms, chunk_sizes, joined, retention: of the encoder.
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
        *,
        in_one_call: bool = False,
    ) -> None:
        self.encoder, self.replicas, self.batch_norms = encoder, replicas, batch_norms
        self.chunk_sizes, self.joined, self.retention = chunk_sizes, joined, retention
        self.in_one_call, self.streams = in_one_call, streams_of(replicas.model)
        self.is_function = not isinstance(replicas.model, nn.Module)
        self.knows_device = not self.is_function or replicas.accelerator is not None

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
        self.snapshot = snapshot
        self.counts = Counter[Any]()  # chunks, by stream that trains
        self.streams = streams_of(self.replicas.model)  # what is frozen may have changed
        if self.in_one_call:
            self.streams = self.streams.as_one()
        if not self.is_function and not self.replicas.sharded:
            snapshot.note(self.replicas.model)
        self.batch_norms.begin_step()

    def of_this_step(self) -> "Passes":
        """These, whichever step begins before they are done."""
        passes = copy(self)
        passes.batch_norms = copy(self.batch_norms)
        return passes

    def calls(self, batches: Iterable[Inputs], *, keep_graphs: bool = True) -> Iterator[Call]:
        """The calls of the first pass, in their order, as batches are read.

        Args:
            batches: with the inputs of all streams.
            keep_graphs: whether some may be kept.

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
        streams = self.streams
        with self.calling(call):
            encoded = self.joined.encode(self.encoder, call, streams, self.replicas.device)
            encoded = encoded or [self.encode_chunk(chunk, call.keeps_graph) for chunk in call.chunks]
        pairs = zip(encoded, call.chunks, strict=True)
        encoded = [each if chunk.counts else without_rows(each) for each, chunk in pairs]
        if call.stream not in streams.frozen:
            self.counts[call.stream] += len(encoded)
        for name, leaf in [pair for each in encoded for pair in each.leaves.items()]:
            leaf.requires_grad_(call.stream not in streams.frozen or name in streams.global_names)
        return encoded

    def encode_chunk(self, chunk: Chunk, keep_graph: bool) -> Encoded:
        """First pass of one chunk."""
        fn = self.retention.metered(chunk.stream, chunk.size, self.encoder)
        inputs = self.streams.arguments(chunk.stream, chunk.inputs)
        encoded = encode(fn, inputs, device=self.replicas.device, retain=keep_graph)
        check_rows(encoded.leaves, chunk.size, self.streams.global_names)
        return encoded

    def push(self, encoded: Encoded) -> None:
        """Second pass of a chunk: its cached gradients, through its graph, into the weights."""
        outputs, grads = self._again(encoded)
        with self.replicas.adding_up():
            self.replicas.backward(outputs, grads)

    def pull(self, encoded: Encoded, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Second pass of a chunk: the gradient that it leaves for each weight.

        Raises:
            ValueError: there are weights that are not among these.
        """
        outputs, grads = self._again(encoded)
        others = set(_leaves(outputs)) - set(weights)
        # A module may mark what it has computed as a leaf, as some do where they checkpoint.
        if others := {each for each in others if self.is_function or isinstance(each, nn.Parameter)}:
            raise ValueError(
                "expected an encoder whose weights belong to modules that it has called in cache(batch), got others, "
                f"of shapes {[tuple(each.shape) for each in others]}: have such a module hold them"
            )
        return (
            torch.autograd.grad(outputs, weights, grads, allow_unused=True)
            if outputs
            else [None] * len(weights)
        )

    def weights(self) -> list[Tensor]:
        """Those of the encoder that train; of a function those of the modules that it has called in this step."""
        weights = self.snapshot.grads if self.is_function else self.replicas.parameters
        return [each for each in weights if each.requires_grad]

    @property
    def modules(self) -> Iterable[nn.Module]:
        """Those of the encoder; of a function those that it has called in this step."""
        return self.snapshot.modules if self.is_function else self.replicas.model.modules()

    def with_extras(self, batches: Iterable[Inputs], loss_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the loss, with the inputs that feed no stream."""
        extras = [self.streams.extras(batch) for batch in batches]
        joined = {key: concatenate([each[key] for each in extras]) for key in extras[0]}
        if twice := loss_kwargs.keys() & joined:
            raise ValueError(f"expected {sorted(twice)} in the chunks or by keyword, got both")
        return {**loss_kwargs, **send_to_device(joined, self.replicas.device)}

    def _again(self, encoded: Encoded) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of a chunk with a graph, and the gradients that are cached for them."""
        cached = {name: leaf.grad for name, leaf in encoded.leaves.items() if leaf.grad is not None}
        if not cached:
            return [], []
        with self.replicas.adding_up(), self.batch_norms.second_pass():
            replayed = encoded.replay()
        outputs = {name: replayed[name] for name in cached if replayed[name].requires_grad}
        self.note_weights(outputs.values())
        return list(outputs.values()), [cached[name] for name in outputs]

    def note_weights(self, outputs: Iterable[Tensor]) -> None:
        """Of a function, note the gradients that a backward pass of its outputs will change."""
        if self.is_function:
            self.snapshot.note_gradients(_leaves(outputs))

    @contextmanager
    def calling(self, first: Call) -> Iterator[None]:
        """A block that adds gradients up, and in which the modules behind a function are met before they compute."""
        if not self.knows_device and device_in_use() != CPU:
            inputs = self.streams.arguments(first.stream, first.inputs)
            module = first_called(partial(call, self.encoder, inputs))
            self.replicas.device = next(module.parameters()).device if module else device_in_use()
            self.knows_device = True
        with self.replicas.adding_up(), meeting(self._meet) if self.is_function else nullcontext():
            yield

    def _meet(self, module: nn.Module) -> None:
        if module not in self.snapshot.modules:
            refuse_hidden_ddp(module)
            self.batch_norms.meet(module)
            self.snapshot.note(module)


def _leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """What outputs depend on."""
    return [leaf for output in outputs for leaf in leaves_and_nodes(output)[0]]
