"""The schedule of the first pass: what is cut into which chunks, which of them keep their graph.

    cut             a batch into the chunks of one stream
    in_chunks       all batches into the chunks of all streams, in the order of the samples
    keeping_graphs  of each stream the first chunks and the last one keep the graph of their first pass

All of them go by sizes alone, so the planner calls the same functions as a step. A chunk is what the encoder sees at
once, whatever shares a call or keeps a graph, so neither changes a result. Graphs are counted in chunks.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from gc_accel.contracts import Streams
from gc_accel.inputs.nested import Inputs, batch_size, slice_inputs


class Chunk(NamedTuple):
    """Samples `start` to `stop` of the inputs of one stream."""

    stream: Any  # None where the encoder declares none
    whole: Inputs
    start: int
    stop: int
    counts: bool = True  # not for a chunk that is repeated to keep sharded ranks in step

    @property
    def inputs(self) -> Inputs:
        return slice_inputs(self.whole, self.start, self.stop)

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.stop - self.start

    def precedes(self, other: "Chunk") -> bool:
        """Whether the other is the next chunk of the same inputs."""
        return self.whole is other.whole and self.stop == other.start and other.counts


class Call(NamedTuple):
    """One call of the encoder in the first pass: a chunk, or several adjacent ones of a stream that keep no graph."""

    chunks: list[Chunk]
    keeps_graph: bool = False

    @property
    def stream(self) -> Any:
        return self.chunks[0].stream

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(chunk.size for chunk in self.chunks)

    @property
    def inputs(self) -> Inputs:
        """Those of all its chunks."""
        return slice_inputs(self.chunks[0].whole, self.chunks[0].start, self.chunks[-1].stop)


def cut(stream: Any, inputs: Inputs, samples: int, chunk_size: int) -> Iterator[Chunk]:
    """Consecutive chunks of one stream; the last one may be smaller."""
    for start in range(0, samples, chunk_size):
        yield Chunk(stream, inputs, start, min(start + chunk_size, samples))


def in_chunks(batches: Iterable[Inputs], streams: Streams, chunk_sizes: Mapping[Any, int]) -> Iterator[Chunk]:
    """The chunks of all streams, batch by batch as these are read, and within one stream by stream."""
    for batch in batches:
        samples = batch_size(batch)
        for stream, inputs in streams.split(batch).items() if samples else ():
            yield from cut(stream, inputs, samples, chunk_sizes[stream])


def keeping_graphs(chunks: Iterable[Chunk], limits: Mapping[Any, float]) -> Iterator[Call]:
    """Calls of one chunk each, in the same order, of which some keep their graph.

    Of each stream these are the first ones, which are known as they come, and the last. Its graph takes no memory on
    top of what a chunk without one is encoded in, so the one place that is always worth having goes to it. A chunk
    waits until it is known whether it is the last.

    Args:
        limits: by stream, how many chunks may keep their graph.
    """
    waiting = deque[
        list[Any]
    ]()  # pairs of a chunk and whether it keeps its graph, None while that is not known
    latest, kept = dict[Any, list[Any]](), Counter[Any]()
    for chunk in chunks:
        if chunk.stream in latest:
            latest.pop(chunk.stream)[1] = False
        keeps: bool | None = False
        if kept[chunk.stream] + 1 < limits[chunk.stream]:
            keeps = True
            kept[chunk.stream] += 1
        elif limits[chunk.stream]:
            keeps = None
        waiting.append([chunk, keeps])
        if keeps is None:
            latest[chunk.stream] = waiting[-1]
        while waiting and waiting[0][1] is not None:
            first, keeps = waiting.popleft()
            yield Call([first], keeps)
    for chunk, keeps in waiting:
        yield Call([chunk], keeps is not False)
