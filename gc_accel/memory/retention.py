"""How many chunks keep the graph of their first pass, and so need no second forward.

With k of n graphs kept a step costs 1 + (n - k) / 3n direct steps, if a backward pass costs two forward passes: 4/3
where none is kept, 1 where all are. One graph costs no memory, as the second pass needs one at a time anyway. With "auto"
the first step keeps that one and counts the bytes that autograd saves for a sample of each stream; from then on there
are as many as a budget of bytes allows, of the costliest stream first, and one at least.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from gc_accel.contracts import Streams
from gc_accel.distributed import Replicas
from gc_accel.memory.meters import SavedBytes, peak_memory_mib

FILL = 0.9  # of the memory of a device
OPTIMIZER_COPIES = 2  # of the weights, as Adam makes them after the first step
Retain = int | Literal["all", "auto"]


class Retention:
    """Graphs that are kept, by stream, in chunks.

    Args:
        retain: how many chunks of the costliest stream, "all" chunks of all streams, or "auto".
        memory_budget: with "auto": bytes for the graphs that are retained; or, up to 1, a fraction of the
            device's memory, of which they get what the first step has left; None: most of that.
        replicas: of the encoder.

    Raises:
        ValueError: for other values, "auto" without a budget, a fraction of a device of unknown memory.
    """

    def __init__(
        self,
        retain: Retain,
        memory_budget: float | None,
        replicas: Replicas,
    ) -> None:
        device = replicas.device
        if retain not in ("all", "auto") and (type(retain) is not int or retain < 0):
            raise ValueError(
                f'expected retain to be "all", "auto" or a number of chunks from 0, got {retain!r}'
            )
        if retain == "auto" and memory_budget is None and device.type != "cuda":
            raise ValueError(f'expected a memory_budget in bytes along with retain="auto" on {device.type}')
        if memory_budget is not None and not (isinstance(memory_budget, (int, float)) and memory_budget > 0):
            raise ValueError(f"expected a memory_budget above 0, in bytes, got {memory_budget!r}")
        if memory_budget is not None and memory_budget <= 1 and device.type != "cuda":
            raise ValueError(
                f"expected a memory_budget in bytes on {device.type}, got the fraction {memory_budget}"
            )
        self.retain, self.memory_budget = retain, memory_budget
        self.replicas = replicas
        self.per_sample: dict[Any, float] = {}  # bytes of a stream's graph
        self.automatic: dict[Any, float] | None = None  # the limits that "auto" has come to

    def limits(self, streams: Streams) -> dict[Any, float]:
        """By stream, how many chunks keep their graph; none of a frozen stream, which has no graph."""
        if self.retain == "all":
            return {name: 0 if name in streams.frozen else math.inf for name in streams.names}
        limits = dict.fromkeys(streams.names, 0.0)
        if not streams.trained:
            return limits
        if self.automatic is not None:
            limits |= {name: self.automatic[name] for name in streams.trained}
        costliest = streams.trained[0]
        return limits | {costliest: max(limits[costliest], 1 if self.retain == "auto" else int(self.retain))}

    def metered(self, stream: Any, size: int, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself; with "auto", until it has decided, one that counts the bytes of its graph.

        Args:
            stream, size: of the chunk that it will be called with.
        """
        if self.retain != "auto" or self.automatic is not None:
            return fn

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return fn(*args, **kwargs)
            inputs = list[
                Tensor
            ]()  # which on the CPU are part of the batch, whether a graph keeps them or not
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
        sizes = [self.per_sample.get(name, 0) * chunk_sizes[name] for name in chunks]
        if not self.replicas.lowest([min(sizes, default=0)])[0]:  # nothing of some stream trains
            return
        left, limits = self._budget(), list[float]()
        for size, count in zip(sizes, chunks.values(), strict=True):
            limits.append(min(count, left // size))
            left -= limits[-1] * size
        if limits == list(chunks.values()):  # room for all of it, and as much more in a larger batch
            needed = sum(size * count for size, count in zip(sizes, chunks.values(), strict=True))
            limits = [limit * (needed + left) // needed for limit in limits]
        self.automatic = dict(zip(chunks, self.replicas.lowest(limits), strict=True))

    def give_up(self) -> None:
        """Retain one chunk at most from now on, because memory has run out."""
        self.retain = 0 if self.retain == 0 else 1
        self.automatic = None

    def _budget(self) -> float:
        budget = FILL if self.memory_budget is None else self.memory_budget
        if budget > 1:
            return budget
        total = torch.cuda.get_device_properties(self.replicas.device).total_memory
        later = OPTIMIZER_COPIES * sum(each.nbytes for each in self.replicas.parameters if each.requires_grad)
        return max(0, budget * total - peak_memory_mib(self.replicas.device) * 2**20 - later)
