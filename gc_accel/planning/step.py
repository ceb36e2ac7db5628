"""One step of the cache, added up from what its calls cost (see `gc_accel/gradient_cache.py` for the schedule).

    first pass     every chunk without a graph, the graphs of the last `retain` stay
    loss           these graphs, all representations, their gradients, the loss's workspace
    second pass    one graph at a time, gradients of the weights

On the CPU, host and device are the same memory: the inputs of the whole batch, which wait for the second pass,
count there. An accelerator holds those of the chunks that it works on, and encodes several chunks in one call where
no graph is kept.
"""

from dataclasses import dataclass
from typing import Any, Literal

from gc_accel.planning.dry_run import DryRun
from gc_accel.planning.loss import loss_cost, ring_all_reduce

Retain = int | Literal["all"]
Parts = dict[str, dict[str, int]]  # bytes by stage and by part

FIRST, LOSS, SECOND = "first pass", "loss", "second pass"
CHUNK = "a chunk being encoded"
CHUNKS_PER_CALL = 4  # without a graph, on an accelerator, as in gc_accel/chunk_size.py


@dataclass(frozen=True)
class Calls:
    """Which calls of the encoder a step makes.

    Args:
        joint: samples of each stream in the joint call.
        chunks: for each stream, the sizes of its other calls, and how often each occurs.
        everything: every graph is retained.
        retained: graphs of the costliest stream that are, if not everything is.
    """

    joint: dict[Any, int]
    chunks: dict[Any, dict[int, int]]
    everything: bool
    retained: int


class Step:
    """A step with a batch of `batch_size` samples on each of some devices, at any chunk size.

    Args:
        encoder: the dry run of the encoder.
        optimizer_copies: tensors of a weight's size that the optimizer keeps of each weight that trains.
        on_host: whether the device is the CPU.
    """

    def __init__(
        self, encoder: DryRun, batch_size: int, devices: int, optimizer_copies: int, *, on_host: bool
    ) -> None:
        self.encoder, self.batch_size, self.devices = encoder, batch_size, devices
        self.on_host, self.chunks_per_call = on_host, 1 if on_host else CHUNKS_PER_CALL
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
        chunks = {}
        for name in self.encoder.streams:
            full, rest = divmod(self.batch_size - (head if name in self.trained else 0), chunk_size)
            chunks[name] = {size: count for size, count in ((chunk_size, full), (rest, 1)) if size and count}
        number = {name: sum(counts.values()) for name, counts in chunks.items()}
        costliest = self.trained[0]
        others = sum(number.values()) - number[costliest]
        everything = retain == "all" or (retain > number[costliest] and not others)
        retained = number[costliest] if retain == "all" else min(retain, number[costliest])
        return Calls(dict.fromkeys(self.trained, head), chunks, everything, retained)

    def memory(self, chunk_size: int, retain: Retain) -> Parts:
        """Bytes of one device by stage and part."""
        calls = self.calls(chunk_size, retain)
        graphs = self._graphs(calls)
        reps = self.loss.representations
        constant = self.weights | {"inputs": self._inputs(chunk_size, calls.retained)}
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

    def flops(self, chunk_size: int, retain: Retain) -> dict[str, float]:
        """FLOPs of one device by stage."""
        calls, batch = self.calls(chunk_size, retain), self.batch_size
        kept = dict.fromkeys(self.encoder.streams, batch if calls.everything else 0)
        if not calls.everything:
            kept[self.trained[0]] = min(calls.retained * chunk_size, batch)
        again = sum((batch - kept[s]) * self.work[s].forward for s in self.trained)
        return {
            FIRST: batch * sum(work.forward for work in self.work.values()),
            LOSS: self.loss.flops,
            SECOND: again + batch * sum(self.work[s].backward for s in self.trained),
        }

    def sent(self) -> dict[str, int]:
        """Bytes that one device sends in a step, by what they are."""
        return self.loss.sent | {"gradients": ring_all_reduce(self.gradients, self.devices)}

    def _first(self, calls: Calls) -> int:
        """Bytes of graphs and of the chunk at work, at most, in the first pass."""
        joint, graphs, costliest = self.encoder.cost(calls.joint), self._graphs(calls), self.trained[0]
        if calls.everything:
            return graphs - joint.graph + joint.building
        peaks = [graphs + joint.forward]
        for name, counts in calls.chunks.items():
            is_retained = name == costliest and calls.retained > 0
            together = min(self.chunks_per_call, sum(counts.values()) - calls.retained * is_retained)
            for size in counts:
                if is_retained:
                    cost = self.encoder.cost({name: size})
                    peaks.append(graphs - cost.graph + cost.building)
                if together:
                    without = self.encoder.cost({name: size * together}).forward
                    peaks.append(without + (0 if is_retained else graphs))
        return max(peaks)

    def _graphs(self, calls: Calls) -> int:
        """Bytes of all retained graphs."""
        if not calls.everything:
            (size,) = list(calls.chunks[self.trained[0]])[:1] or [0]
            return calls.retained * self.encoder.cost({self.trained[0]: size}).graph if size else 0
        graphs = self.encoder.cost(calls.joint).graph
        for name, counts in calls.chunks.items():
            graphs += sum(count * self.encoder.cost({name: size}).graph for size, count in counts.items())
        return graphs

    def _second(self, calls: Calls) -> int:
        """Bytes of graphs and gradients, at most, in the second pass."""
        joint, graphs, made = self.encoder.cost(calls.joint), self._graphs(calls), self.gradients
        others = {name: [self.encoder.cost({name: n}) for n in calls.chunks[name]] for name in self.trained}
        if calls.everything:  # in one backward pass, the latest call first: it makes the gradients
            later = max((cost.backward - cost.graph for costs in others.values() for cost in costs), default=0)
            return max(graphs + joint.fresh - joint.graph, graphs - joint.graph + made + later)
        peaks = [made + joint.backward, *(made + cost.backward for costs in others.values() for cost in costs)]
        for cost in others[self.trained[0]] if calls.retained else ():
            peaks.append(graphs + cost.fresh - cost.graph)  # the first one makes the gradients
            peaks.append(graphs - cost.graph * min(calls.retained, 2) + made + cost.backward)
        return max(peaks)

    def _inputs(self, chunk_size: int, retained: int) -> int:
        """Bytes of inputs on the device."""
        samples = self.batch_size if self.on_host else (self.chunks_per_call + retained) * chunk_size
        return min(samples, self.batch_size) * self.encoder.sample_bytes
