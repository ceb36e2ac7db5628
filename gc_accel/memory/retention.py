"""How many chunks keep the graph of their first pass, and so need no second forward.

With k of n graphs kept a step costs 1 + (n - k) / 3n direct steps, if a backward pass costs two forward passes: 4/3
where none is kept, 1 where all are. One graph costs no memory, as the second pass needs one at a time anyway. With
"auto" the first step keeps that one and counts the bytes that autograd saves for a sample of each stream; from then on
as many are kept as a budget allows (`budget.py`), of the costliest stream first, and one at least.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from gc_accel.contracts import Streams
from gc_accel.distributed import Replicas
from gc_accel.memory.budget import OPTIMIZER_COPIES, activation_bytes, check_budget, device_memory
from gc_accel.memory.meters import SavedBytes

Retain = int | Literal["all", "auto"]


def check_retain(retain: object) -> None:
    """Refuse what is no number of chunks.

    Raises:
        ValueError: neither a whole number from 0, nor "all", nor "auto".
    """
    if retain not in ("all", "auto") and not (type(retain) is int and retain >= 0):
        raise ValueError(f'expected retain to be "all", "auto" or a number of chunks from 0, got {retain!r}')


def graphs_kept(retain: Retain, streams: Streams) -> dict[Any, float]:
    """By stream, how many chunks keep their graph; none of a frozen stream, and with "auto" one to begin with."""
    if retain == "all":
        return {name: math.inf if name in streams.trained else 0 for name in streams.names}
    limits = dict.fromkeys(streams.names, 0.0)
    limits.update(dict.fromkeys(streams.trained[:1], 1 if retain == "auto" else retain))
    return limits


class Retention:
    """Graphs that are kept, by stream, in chunks.

    Args:
        retain: how many chunks of the costliest stream, "all" chunks of all streams, or "auto".
        memory_budget: with "auto": what activations may take, see `budget.py`.
        replicas: of the encoder.

    Raises:
        ValueError: for other values; "auto" without a budget on a device of unknown memory, or a fraction of one.
    """

    def __init__(self, retain: Retain, memory_budget: float | None, replicas: Replicas) -> None:
        check_retain(retain)
        check_budget(memory_budget, replicas.device)
        on_cuda = replicas.device.type == "cuda"
        if retain == "auto" and memory_budget is None and not on_cuda:
            raise ValueError(
                f'expected a memory_budget in bytes along with retain="auto" on {replicas.device.type}'
            )
        self.retain, self.memory_budget, self.replicas, self.on_cuda = (
            retain,
            memory_budget,
            replicas,
            on_cuda,
        )
        self.per_sample: dict[Any, float] = {}  # bytes of a graph, by stream
        self.automatic: dict[Any, float] | None = None  # the limits that "auto" has come to

    def limits(self, streams: Streams) -> dict[Any, float]:
        """By stream, how many chunks keep their graph."""
        limits = graphs_kept(self.retain, streams)
        if self.automatic is not None:
            limits |= {name: max(limits[name], self.automatic[name]) for name in streams.trained}
        return limits

    def metered(self, stream: Any, size: int, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself; with "auto", until it has decided, one that counts the bytes of its graph.

        Args:
            stream, size: of the chunk that the function will be called with.
        """
        if self.retain != "auto" or self.automatic is not None:
            return fn

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return fn(*args, **kwargs)
            inputs: list[Tensor] = []  # a part of the batch, whether a graph keeps them or not
            recursively_apply(inputs.append, [list(args), kwargs])
            saved = SavedBytes(besides=[*self.replicas.parameters, *inputs])
            with saved:
                outputs = fn(*args, **kwargs)
            self.per_sample[stream] = max(saved.total / size, self.per_sample.get(stream, 0))
            return outputs

        return counted

    def decide(self, chunks: Mapping[Any, int], chunk_sizes: Mapping[Any, int]) -> None:
        """At the end of a step: from the bytes of a sample to limits for the steps that follow.

        Args:
            chunks: how many there were, of each stream that trains, the costliest first.
            chunk_sizes: by stream.
        """
        if self.retain != "auto" or self.automatic is not None:
            return
        graphs = {name: self.per_sample.get(name, 0) * chunk_sizes[name] for name in chunks}
        if not self.replicas.lowest([min(graphs.values(), default=0)])[0]:  # some stream has no graph
            return
        left, limits = self._room(max(graphs.values())), dict[Any, float]()
        for name, graph in graphs.items():
            limits[name] = max(0, min(chunks[name], left // graph))
            left -= limits[name] * graph
        if limits == chunks:  # all of them fit, and as many more in a larger batch
            needed = sum(graphs[name] * count for name, count in chunks.items())
            limits = {name: limit * (needed + left) // needed for name, limit in limits.items()}
        self.automatic = dict(zip(limits, self.replicas.lowest(list(limits.values())), strict=True))

    def give_up(self) -> None:
        """Keep one graph at most from now on, because memory has run out."""
        self.retain = 0 if self.retain == 0 else 1
        self.automatic = None

    def _room(self, graph: float) -> float:
        """Bytes for graphs, among them that of the chunk at work, which the first step has had room for too.

        Beside its graph, a backward pass makes the gradient of one weight at a time.
        """
        weights = [weight.nbytes for weight in self.replicas.parameters if weight.requires_grad]
        memory, taken = math.inf, 0.0
        if self.on_cuda:
            memory = device_memory(self.replicas.device)
            taken = torch.cuda.max_memory_allocated(self.replicas.device) - graph
            taken += OPTIMIZER_COPIES * sum(weights)
        return activation_bytes(self.memory_budget, memory, taken) - max(weights, default=0)
