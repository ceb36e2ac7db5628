"""The order of the first pass: what is cut into which chunks, which of them keep their graph, which share a call.

The chunks depend on their sizes alone, so neither graphs that are kept nor calls that are shared change a result.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gc_accel.inputs.nested import Inputs, batch_size, slice_inputs, split_streams


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
    def rows(self) -> Rows:
        """Those of all its chunks."""
        first, last = self.turns[0].rows, self.turns[-1].rows
        return replace(first, stop=last.stop)


class FirstPass:
    """What becomes of each chunk in the first pass.

    Args:
        chunk_sizes: by stream, samples of a chunk.
        call_sizes: by stream, samples of a call without a graph.
        limits: by stream, how many samples may retain their graph.
        nominal: whether a chunk counts as a full one: where chunks are to be counted, not samples.
        in_step: whether ranks with unequal chunks have to decide alike, turn by turn, so that nothing else counts.
    """

    def __init__(
        self,
        chunk_sizes: Mapping[Any, int],
        call_sizes: Mapping[Any, int],
        limits: Mapping[Any, float],
        *,
        nominal: bool = False,
        in_step: bool = False,
    ) -> None:
        self.chunk_sizes, self.call_sizes, self.limits = chunk_sizes, call_sizes, limits
        self.nominal, self.in_step = nominal or in_step, in_step
        self.rest: dict[Any, Rows] = {}  # of the first chunk, by stream, without the head
        self.samples, self.kept = Counter[Any](), Counter[Any]()  # of each stream, so far

    def turns(
        self,
        chunks: Iterable[Inputs],
        streams: Mapping[Any, Iterable[str]],
        trained: Sequence[Any],
        joint: dict[Any, Rows],
        extras: Mapping[str, list[Any]],
    ) -> Iterator[Turn]:
        """Cut chunks to size, stream by stream, as they are read; what the joint call leaves of the first comes last.

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
            if not size:
                continue
            done = dict.fromkeys(parts, 0)
            if not joint:
                head = min(size, smallest if len(trained) == 1 else (smallest + 1) // 2)
                done |= {name: min(size, self.chunk_sizes[name]) for name in trained}
                joint |= {name: Rows(parts[name], 0, head) for name in trained}
                self.rest = {name: Rows(parts[name], head, done[name]) for name in trained}
            for name, part in parts.items():
                yield from (
                    Turn(name, rows) for rows in Rows(part, done[name], size).cut(self.chunk_sizes[name])
                )
            for key, value in unfed.items():
                extras[key].append(value)
        yield from (Turn(name, rows) for name, rows in self.rest.items() if len(rows))

    def is_rest(self, turn: Turn) -> bool:
        """Whether its rows come before those of all other turns, though it is taken last."""
        return turn.rows is self.rest.get(turn.stream)

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
        """Say of each turn whether to retain its graph: of the first ones and, where there is a limit, of the last.

        The first ones are known as they come. Room for one chunk is left to the last, whose graph takes no memory
        on top of what a chunk without one is encoded in; chunks wait until it is known which that is.
        """
        held = deque[tuple[Turn, int]]()

        def fits(turn: Turn, before: int) -> bool:
            """Whether there is room for all of the stream from this turn on."""
            return self.samples[turn.stream] - before <= self._room(turn.stream)

        def decided() -> list[tuple[Turn, bool]]:
            found = [(turn, fits(turn, before)) for turn, before in held]
            held.clear()
            for turn, retain in found:
                self.kept[turn.stream] += retain * self._size(turn)
            return found

        for turn in turns:
            stream, size = turn.stream, self._size(turn)
            is_rest = self.is_rest(turn) and not self.in_step
            if is_rest:
                yield from decided()
            last = 0 if is_rest else self.chunk_sizes[stream]
            self.samples[stream] += size
            if not held and size <= self._room(stream) - last:
                self.kept[stream] += size
                yield turn, True
                continue
            held.append((turn, self.samples[stream] - size))
            while held and not fits(*held[0]):
                yield held.popleft()[0], False
        yield from decided()

    def _room(self, stream: Any) -> float:
        """Samples that may still retain their graph."""
        return self.limits[stream] - self.kept[stream]

    def _size(self, turn: Turn) -> int:
        return self.chunk_sizes[turn.stream] if self.nominal else len(turn.rows)
