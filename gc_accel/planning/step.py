"""One step of the cache, added up from what its calls cost (see `gc_accel/gradient_cache.py` for the schedule).

    first pass     every chunk without a graph, but for `retain` of them, the first ones and the last, whose graphs stay
    loss           these graphs, all representations, their gradients, the loss's workspace
    second pass    one graph at a time, gradients of the weights

On the CPU, host and device are the same memory: the inputs of the whole batch, which wait for the second pass,
count there. An accelerator holds those of the chunks that it works on, and encodes several chunks in one call where
no graph is kept.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from gc_accel.engine.joining import CHUNKS
from gc_accel.planning.dry_run import DryRun
from gc_accel.planning.loss import loss_cost, ring_all_reduce

Retain = int | Literal["all"]
Parts = dict[str, dict[str, int]]  # bytes by stage and by part

FIRST, LOSS, SECOND = "first pass", "loss", "second pass"
CHUNK = "a chunk being encoded"


@dataclass(frozen=True)
class Calls:
    """Which calls of the encoder a step makes.

    Args:
        joint: samples of each stream in the joint call.
        chunks: of each stream, the samples of its other calls, in their order: what the joint call leaves of the first
            chunk comes last.
        retained: those of these whose graph is kept: some of the first, and the last, whose graph takes no more memory
            than the second pass takes anyway.
        everything: all graphs are, that of the joint call too; it is encoded again where ranks reduce.
    """

    joint: dict[Any, int]
    chunks: dict[Any, list[int]]
    retained: dict[Any, list[int]]
    everything: bool


class Step:
    """A step with a batch of `batch_size` samples on each of some devices, at any chunk size.

    Args:
        encoder: the dry run of the encoder.
        optimizer_copies: tensors of a weight's size that the optimizer keeps of each weight that trains.
        on_host: whether the device is the CPU.
        forward_chunk_size: samples of a call of the first pass; None: of some chunks (`chunks_per_call`).
    """

    def __init__(
        self,
        encoder: DryRun,
        batch_size: int,
        devices: int,
        optimizer_copies: int,
        *,
        on_host: bool,
        forward_chunk_size: int | None = None,
    ) -> None:
        self.encoder, self.batch_size, self.devices = encoder, batch_size, devices
        self.on_host, self.chunks_per_call = on_host, 1 if on_host else CHUNKS
        self.forward_chunk_size = forward_chunk_size
        frozen = getattr(encoder.model, "frozen_streams", ())
        self.trained = [name for name in encoder.streams if name not in frozen] or list(encoder.streams)
        self.work = {name: encoder.work(name) for name in encoder.streams}
        shapes = {key: shape for work in self.work.values() for key, shape in work.shapes.items()}
        self.loss = loss_cost(shapes, batch_size, devices)
        weights = [*encoder.model.parameters(), *encoder.model.buffers()]
        self.gradients = sum(each.nbytes for each in weights if each.requires_grad)
        self.weights = {
            "weights": sum(each.nbytes for each in weights),
            "optimizer state": optimizer_copies * self.gradients,
            "buckets of the reduction": self.gradients if devices > 1 else 0,
        }

    def calls(self, chunk_size: int, retain: Retain) -> Calls:
        """The schedule, as the cache makes it."""
        head = min(self.batch_size, chunk_size if len(self.trained) == 1 else (chunk_size + 1) // 2)
        joint, chunks = dict.fromkeys(self.trained, head), {}
        for name in self.encoder.streams:
            pieces = [min(chunk_size, self.batch_size - at) for at in range(0, self.batch_size, chunk_size)]
            if name in joint:
                pieces = [*pieces[1:], pieces[0] - head]
            chunks[name] = [piece for piece in pieces if piece]
        costliest, alone = self.trained[0], self.devices == 1
        if retain == "all":
            return Calls(joint, chunks, chunks, alone)
        retained = {name: list[int]() for name in chunks}
        rest = len(self.trained) > 1 and head < min(chunk_size, self.batch_size)
        retained[costliest] = first_and_last(chunks[costliest], retain, rest=rest)
        room = retain > len(chunks[costliest])  # for the joint call too, which of a single stream is a chunk
        return Calls(joint, chunks, retained, alone and room and len(self.trained) == 1)

    def memory(self, chunk_size: int, retain: Retain) -> Parts:
        """Bytes of one device by stage and part."""
        calls = self.calls(chunk_size, retain)
        graphs, reps = self._graphs(calls), self.loss.representations
        constant = self.weights | {"inputs": self._inputs(chunk_size, calls)}
        second = max(self._second(calls), self.gradients)
        return {
            FIRST: constant
            | {"representations": reps, "retained graphs": graphs, CHUNK: self._first(calls) - graphs},
            LOSS: constant
            | {"representations": 2 * reps, "retained graphs": graphs, "loss": self.loss.workspace},
            SECOND: constant
            | {"representations": 2 * reps, "gradients": self.gradients, CHUNK: second - self.gradients},
        }

    def peak(self, chunk_size: int, retain: Retain) -> int:
        """Bytes of one device at most."""
        return max(sum(parts.values()) for parts in self.memory(chunk_size, retain).values())

    def retained(self, chunk_size: int, retain: Retain) -> int:
        """Bytes of all graphs that are retained."""
        return self._graphs(self.calls(chunk_size, retain))

    def peak_of_chunk(self, chunk_size: int) -> int:
        """What `chunk_fitting` holds against a budget: beside weights on the host, without the batch."""
        besides = {"inputs", "representations", *(["weights"] if self.on_host else [])}
        stages = self.memory(chunk_size, 0)
        return max(
            sum(nbytes for part, nbytes in stages[stage].items() if part not in besides)
            for stage in (FIRST, SECOND)
        )

    def flops(self, chunk_size: int, retain: Retain) -> dict[str, float]:
        """FLOPs of one device by stage."""
        calls, batch = self.calls(chunk_size, retain), self.batch_size
        again = {name: 0 if calls.everything else batch - sum(calls.retained[name]) for name in self.trained}
        return {
            FIRST: batch * sum(work.forward for work in self.work.values()),
            LOSS: self.loss.flops,
            SECOND: sum(
                again[s] * self.work[s].forward + batch * self.work[s].backward for s in self.trained
            ),
        }

    def sent(self) -> dict[str, int]:
        """Bytes that one device sends in a step, by what they are."""
        return self.loss.sent | {"gradients": ring_all_reduce(self.gradients, self.devices)}

    def _together(self, chunk_size: int) -> int:
        """Samples of a call of the first pass: whole chunks."""
        given = (self.forward_chunk_size or 0) // chunk_size
        return chunk_size * max(1, given if self.forward_chunk_size else self.chunks_per_call)

    def _graphs(self, calls: Calls) -> int:
        """Bytes of all retained graphs."""
        graphs = self.encoder.cost(calls.joint).graph if calls.everything else 0
        for name, sizes in calls.retained.items():
            for size, count in Counter(sizes).items():
                graphs += count * self.encoder.cost({name: size}).graph
        return graphs

    def _first(self, calls: Calls) -> int:
        """Bytes of graphs and of the chunk at work, at most, in the first pass."""
        graphs = self._graphs(calls)
        if calls.everything:
            joint = self.encoder.cost(calls.joint)
            return graphs - joint.graph + joint.building
        peaks = [graphs + self.encoder.forward(calls.joint)]
        for name, sizes in calls.chunks.items():
            kept, before = calls.retained[name], graphs
            if kept:
                last = self.encoder.cost({name: kept[-1]})
                before -= last.graph
                peaks.append(before + last.building)
            if without := [*(Counter(sizes) - Counter(kept)).elements()]:
                together = min(self._together(max(without)), sum(without))
                peaks.append(before + self.encoder.forward({name: together}))
                peaks.append(graphs + self.encoder.forward({name: sizes[-1]}))  # when all graphs are there
        return max(peaks)

    def _second(self, calls: Calls) -> int:
        """Bytes of graphs and gradients, at most, in the second pass."""
        joint, left, made = self.encoder.cost(calls.joint), self._graphs(calls), 0
        peaks = list[int]()
        for (
            name
        ) in self.trained:  # retained graphs go first; of each stream the first one makes the gradients
            for at, size in enumerate(calls.retained[name]):
                cost = self.encoder.cost({name: size})
                left -= cost.graph
                peaks.append(left + made + (cost.backward if at else cost.fresh))
                made += 0 if at else cost.gradients
        chunks = {(name, size) for name in self.trained for size in calls.chunks[name]}
        if not chunks:  # the joint call is the only one, and makes the gradients
            return max(joint.fresh, 0 if calls.everything else joint.building)
        if calls.everything:
            return max([*peaks, made + joint.backward])
        again = [self.encoder.cost({name: size}).replay for name, size in chunks]
        return max([*peaks, *(self.gradients + replay for replay in (joint.replay, *again))])

    def _inputs(self, chunk_size: int, calls: Calls) -> int:
        """Bytes of inputs on the device."""
        graphs = sum(map(sum, calls.retained.values()))
        at_work = self.batch_size if self.on_host else self._together(chunk_size) + graphs
        return min(at_work, self.batch_size) * self.encoder.sample_bytes


def first_and_last(sizes: list[int], count: int, *, rest: bool) -> list[int]:
    """So many of some chunks, in their order: the last one, and before it the first ones.

    Args:
        rest: whether a part of a chunk comes after the last, which is retained when all others are.
    """
    whole = sizes[: len(sizes) - rest]
    if count >= len(whole):
        return sizes if count > len(whole) else whole
    return [*whole[: count - 1], whole[-1]] if count else []
