"""One step of the cache, added up from what its calls cost, which the engine's own schedule makes.

    first pass     call by call, beside the graphs that are kept so far
    loss           these graphs, all representations, their gradients, the loss's workspace
    second pass    chunk by chunk, those whose graph was kept first, and gradients of the weights

The reduction over ranks encodes nothing and takes no memory but its buckets. Parameters that are sharded are not
planned. On the CPU, host and device are the same memory: the inputs of the whole batch, which wait for the second pass,
count there. An accelerator holds those of the chunks that it works on and of the graphs.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch

from gc_accel.engine.joining import JoinedCalls
from gc_accel.engine.schedule import Call, cut, keeping_graphs
from gc_accel.memory.retention import Retain, graphs_kept
from gc_accel.planning.dry_run import DryRun
from gc_accel.planning.loss import loss_cost, ring_all_reduce

BytesByPart = dict[str, dict[str, int]]  # by stage and by part

FIRST, LOSS, SECOND = "first pass", "loss", "second pass"
CHUNK = "a chunk being encoded"


class PassCost(NamedTuple):
    """What the calls of both passes take: bytes, beyond weights and inputs."""

    graphs: int  # all that are kept
    first: int  # at most in the first pass
    second: int  # at most in the second pass, with the gradients that it makes
    activations: int  # at most in both, without gradients
    kept: Counter[Any]  # samples whose graph is kept, by stream
    call: int  # samples of the largest call


class StepCost:
    """A step with a batch of `batch_size` samples on each of some devices, at any chunk size.

    Args:
        encoder: the dry run of the encoder.
        optimizer_copies: tensors of a weight's size that the optimizer keeps of each weight that trains.
        device: where the step will run.
        forward_chunk_size: samples of a call of the first pass, as the cache has it.
    """

    def __init__(
        self,
        encoder: DryRun,
        batch_size: int,
        devices: int,
        optimizer_copies: int,
        device: torch.device,
        forward_chunk_size: int | None = None,
    ) -> None:
        self.encoder, self.batch_size, self.devices = encoder, batch_size, devices
        self.streams, self.on_host = encoder.streams, device.type == "cpu"
        self.joined = JoinedCalls(encoder.model, forward_chunk_size, device)
        self.work = {name: encoder.work(name) for name in self.streams.names}
        shapes = {key: shape for work in self.work.values() for key, shape in work.shapes.items()}
        self.loss = loss_cost(shapes, batch_size, devices)
        weights = [*encoder.model.parameters(), *encoder.model.buffers()]
        self.gradients = sum(weight.nbytes for weight in weights if weight.requires_grad)
        self.weights = {
            "weights": sum(weight.nbytes for weight in weights),
            "optimizer state": optimizer_copies * self.gradients,
            "buckets of the reduction": self.gradients if devices > 1 else 0,
        }
        self.remembered: dict[tuple[int, Retain], PassCost] = {}

    def calls(self, chunk_size: int, retain: Retain) -> list[Call]:
        """Those of the first pass, in their order, without inputs."""
        names = self.streams.names
        chunks = (chunk for name in names for chunk in cut(name, None, self.batch_size, chunk_size))
        calls = keeping_graphs(chunks, graphs_kept(retain, self.streams))
        return list(self.joined.join(calls, dict.fromkeys(names, chunk_size)))

    def memory(self, chunk_size: int, retain: Retain) -> BytesByPart:
        """Bytes of one device by stage and part."""
        cost, reps = self._passes(chunk_size, retain), self.loss.representations
        constant = self.weights | {"inputs": self._inputs(cost)}
        graphs = {"retained graphs": cost.graphs}
        made = max(cost.second - self.gradients, 0)
        return {
            FIRST: constant | {"representations": reps} | graphs | {CHUNK: cost.first - cost.graphs},
            LOSS: constant | {"representations": 2 * reps} | graphs | {"loss": self.loss.workspace},
            SECOND: constant | {"representations": 2 * reps, "gradients": self.gradients, CHUNK: made},
        }

    def peak(self, chunk_size: int, retain: Retain) -> int:
        """Bytes of one device at most."""
        return max(sum(parts.values()) for parts in self.memory(chunk_size, retain).values())

    def activations(self, chunk_size: int, retain: Retain) -> int:
        """Bytes at most of the chunk that is encoded and all graphs that are kept, which a budget is for."""
        return self._passes(chunk_size, retain).activations

    def besides(self, chunk_size: int, retain: Retain) -> int:
        """Bytes of everything else in both passes, where gradients are there to be added to."""
        inputs = self._inputs(self._passes(chunk_size, retain))
        return sum(self.weights.values()) + self.gradients + inputs + 2 * self.loss.representations

    def flops(self, chunk_size: int, retain: Retain) -> dict[str, float]:
        """FLOPs of one device by stage."""
        kept, batch, trained = self._passes(chunk_size, retain).kept, self.batch_size, self.streams.trained
        again = {name: (batch - kept[name]) * self.work[name].forward for name in trained}
        return {
            FIRST: batch * sum(work.forward for work in self.work.values()),
            LOSS: self.loss.flops,
            SECOND: sum(again[name] + batch * self.work[name].backward for name in trained),
        }

    def sent(self) -> dict[str, int]:
        """Bytes that one device sends in a step, by what they are."""
        return self.loss.sent | {"gradients": ring_all_reduce(self.gradients, self.devices)}

    def _passes(self, chunk_size: int, retain: Retain) -> PassCost:
        """What both passes take, found once for the same arguments."""
        key = chunk_size, retain
        if key not in self.remembered:
            calls = self.calls(chunk_size, retain)
            first, graphs = self._first(calls)
            second, activations = self._second(calls, graphs)
            kept = Counter[Any]()
            for call in calls:
                kept[call.stream] += call.size if call.keeps_graph else 0
            largest = max(call.size for call in calls)
            self.remembered[key] = PassCost(graphs, first, second, max(first, activations), kept, largest)
        return self.remembered[key]

    def _first(self, calls: list[Call]) -> tuple[int, int]:
        """Bytes at most in the first pass, and those of all graphs when it is over."""
        peak = graphs = 0
        for call in calls:
            samples = {call.stream: call.size}
            if call.keeps_graph:
                cost = self.encoder.cost(samples)
                peak, graphs = max(peak, graphs + cost.building), graphs + cost.graph
            else:
                peak = max(peak, graphs + self.encoder.forward(samples))
        return peak, graphs

    def _second(self, calls: list[Call], graphs: int) -> tuple[int, int]:
        """Bytes at most in the second pass: with the gradients that it makes, and beside gradients that were there."""
        peak = activations = 0
        made = dict[Any, int]()  # gradients, by the stream whose first chunk makes them
        trained = [call for call in calls if call.stream in self.streams.trained]
        trained = trained or [Call(calls[0].chunks[:1])]  # for what all chunks share
        for call in sorted(trained, key=lambda call: not call.keeps_graph):
            for chunk in call.chunks:
                cost = self.encoder.cost({chunk.stream: chunk.size})
                graphs -= cost.graph if call.keeps_graph else 0
                forward = 0 if call.keeps_graph else cost.building
                backward = cost.backward if chunk.stream in made else cost.fresh
                peak = max(peak, graphs + sum(made.values()) + max(forward, backward))
                activations = max(activations, graphs + max(forward, cost.backward))
                made.setdefault(chunk.stream, cost.gradients)
        return peak, activations

    def _inputs(self, cost: PassCost) -> int:
        """Bytes of inputs on the device."""
        at_work = self.batch_size if self.on_host else cost.call + sum(cost.kept.values())
        return min(at_work, self.batch_size) * self.encoder.sample_bytes
