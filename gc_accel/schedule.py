"""The order of the first pass: what is cut into which chunks, which of them keep their graph, which share a call.

The chunks depend on their sizes alone, so neither graphs that are kept nor calls that are shared change a result.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gc_accel.chunking import Inputs, batch_size, slice_inputs, split_streams


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples `start` to `stop` of the inputs of one stream."""

    whole: Inputs
    start: int
    stop: int

    @property
    def inputs(self) -> Inputs:
        return slice_inputs(self.whole, self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, size: int) -> Iterator["Rows"]:
        """Consecutive parts of at most `size` samples."""
        for start in range(self.start, self.stop, size):
            yield Rows(self.whole, start, min(start + size, self.stop))


class Turn(NamedTuple):
    """A chunk of one stream whose turn it is to be encoded."""

    stream: Any  # None where the encoder declares none
    rows: Rows
    counts: bool = True  # not for a chunk that is repeated to keep sharded ranks in step

    def precedes(self, other: "Turn") -> bool:
        """Whether the other is the next chunk of the same inputs."""
        return self.rows.whole is other.rows.whole and self.rows.stop == other.rows.start


class Block(NamedTuple):
    """Adjacent chunks of one stream for one call, or a single one whose graph is to be retained."""

    turns: list[Turn]
    retain: bool

    @property
    def inputs(self) -> Inputs:
        """Those of all its chunks."""
        first, last = self.turns[0].rows, self.turns[-1].rows
        return replace(first, stop=last.stop).inputs


class FirstPass:
    """What becomes of each chunk in the first pass.

    Args:
        chunk_sizes: by stream, samples of a chunk.
        call_sizes: by stream, samples of a call without a graph.
        limits: by stream, how many samples may retain their graph.
        nominal: whether a chunk counts as a full one, so that ranks with unequal chunks decide alike.
    """

    def __init__(
        self,
        chunk_sizes: Mapping[Any, int],
        call_sizes: Mapping[Any, int],
        limits: Mapping[Any, float],
        *,
        nominal: bool,
    ) -> None:
        self.chunk_sizes, self.call_sizes, self.limits = chunk_sizes, call_sizes, limits
        self.nominal = nominal
        self.samples = Counter[Any]()  # of each stream, so far

    def turns(
        self,
        chunks: Iterable[Inputs],
        streams: Mapping[Any, Iterable[str]],
        trained: Sequence[Any],
        joint: dict[Any, Rows],
        extras: Mapping[str, list[Any]],
    ) -> Iterator[Turn]:
        """Cut chunks to size, stream by stream, as they are read.

        Args:
            chunks: with the inputs of all streams.
            streams: names, and the input keys of each.
            trained: those that train.
            joint: gets the rows of the joint call, by stream: the head of the first chunk.
            extras: gets the inputs that feed no stream, in the order of the chunks.
        """
        smallest = min(self.chunk_sizes[name] for name in trained)
        for chunk in chunks:
            size, (parts, unfed) = batch_size(chunk), split_streams(chunk, streams)
            head = 0 if joint else min(size, smallest if len(trained) == 1 else (smallest + 1) // 2)
            if not joint:
                joint |= {name: Rows(parts[name], 0, head) for name in trained}
            for name, part in parts.items():
                rest = Rows(part, head if name in trained else 0, size)
                yield from (Turn(name, rows) for rows in rest.cut(self.chunk_sizes[name]))
            for key, value in unfed.items():
                extras[key].append(value)

    def blocks(self, turns: Iterable[Turn]) -> Iterator[Block]:
        """Join adjacent chunks of one stream that keep no graph, as long as another one has room in a call."""
        block: list[Turn] = []
        for turn, retain in self._look_ahead(turns):
            if block and (retain or not block[-1].precedes(turn)):
                yield Block(block, False)
                block = []
            block.append(turn)
            room = self.call_sizes[turn.stream] - sum(len(each.rows) for each in block)
            if retain or room < self.chunk_sizes[turn.stream]:
                yield Block(block, retain)
                block = []
        if block:
            yield Block(block, False)

    def has_room(self, joint: Mapping[Any, Rows], streams: Iterable[Any]) -> bool:
        """Whether the graphs of these streams may all be retained, that of the joint call too."""
        for stream, rows in joint.items():
            self.samples[stream] += self._size(Turn(stream, rows))
        return all(self.samples[stream] <= self.limits[stream] for stream in streams)

    def _look_ahead(self, turns: Iterable[Turn]) -> Iterator[tuple[Turn, bool]]:
        """Say of each turn whether to retain its graph: of the last ones of a stream, up to its limit.

        A chunk waits until that is known. Where there is no limit, and where nothing is retained, none does.
        """
        held = deque[tuple[Turn, int]]()

        def fits(turn: Turn, before: int) -> bool:
            return self.samples[turn.stream] - before <= self.limits[turn.stream]

        for turn in turns:
            held.append((turn, self.samples[turn.stream]))
            self.samples[turn.stream] += self._size(turn)
            while held and (math.isinf(self.limits[held[0][0].stream]) or not fits(*held[0])):
                first = held.popleft()
                yield first[0], fits(*first)
        yield from ((turn, fits(turn, before)) for turn, before in held)

    def _size(self, turn: Turn) -> int:
        return self.chunk_sizes[turn.stream] if self.nominal else len(turn.rows)
