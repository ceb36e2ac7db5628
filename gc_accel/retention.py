"""How many samples keep the graph of their first pass, and so need no second forward.

With k of n chunks retained a step costs 1 + (n - k) / 3n direct steps, if a backward pass costs two forward
passes: 4/3 where none is retained, 1 where all are. One retained chunk costs no memory, as the second pass
needs one graph at a time anyway. With "auto" the first step retains that one and counts the bytes that autograd
saves for a sample of each stream; from then on there are as many as a budget of bytes allows, of the costliest
stream first.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from gc_accel.chunking import batch_size
from gc_accel.distributed import Replicas
from gc_accel.memory import SavedBytes, peak_memory_mib

FILL = 0.9  # of the memory of a device
Retain = int | Literal["all", "auto"]


class Retention:
    """What is retained, by stream, in samples.

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
        if retain not in ("all", "auto") and (isinstance(retain, str) or retain < 0):
            raise ValueError(
                f'expected retain to be "all", "auto" or a number of chunks from 0, got {retain!r}'
            )
        if retain == "auto" and memory_budget is None and device.type != "cuda":
            raise ValueError(f'expected a memory_budget in bytes along with retain="auto" on {device.type}')
        if memory_budget is not None and memory_budget <= 0:
            raise ValueError(f"expected a memory_budget above 0, got {memory_budget}")
        if memory_budget is not None and memory_budget <= 1 and device.type != "cuda":
            raise ValueError(
                f"expected a memory_budget in bytes on {device.type}, got the fraction {memory_budget}"
            )
        self.retain, self.memory_budget = retain, memory_budget
        self.replicas = replicas
        self.largest: dict[Any, tuple[int, int]] = {}  # graph of a stream: its bytes, its samples
        self.automatic: dict[Any, float] | None = None  # the limits that "auto" has come to

    def limits(
        self, trained: Sequence[Any], streams: Iterable[Any], chunk_sizes: Mapping[Any, int]
    ) -> dict[Any, float]:
        """By stream, the samples whose graph is retained; a frozen one has no graph to be kept.

        Args:
            trained: streams that train, the costliest first.
            streams: all of them.
            chunk_sizes: by stream.
        """
        without_limit = dict.fromkeys(streams, math.inf)
        if self.retain == "all":
            return without_limit
        if self.automatic is not None:
            return without_limit | self.automatic
        costliest, *others = trained
        count = 1 if self.retain == "auto" else int(self.retain)
        return without_limit | {costliest: count * chunk_sizes[costliest]} | dict.fromkeys(others, 0)

    def metered(self, streams: Iterable[Any], fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself; with "auto", until it has decided, one that counts the bytes of its graph."""
        stream, *others = streams
        if self.retain != "auto" or self.automatic is not None or others:
            return fn

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return fn(*args, **kwargs)
            inputs: list[
                Tensor
            ] = []  # which on the CPU are part of the batch, whether a graph keeps them or not
            recursively_apply(inputs.append, [list(args), kwargs])
            saved = SavedBytes(besides=[*self.replicas.parameters, *inputs])
            with saved:
                outputs = fn(*args, **kwargs)
            found = saved.total, batch_size([list(args), kwargs])
            self.largest[stream] = max(found, self.largest.get(stream, found))
            return outputs

        return counted

    def decide(self, samples: Mapping[Any, int]) -> None:
        """At the end of a step: from the bytes of a sample to limits for the steps that follow.

        Args:
            samples: of each stream that trains, the costliest first, in the step that ends.
        """
        if self.retain != "auto" or self.automatic is not None:
            return
        left, limits = self._budget(), []
        for stream, count in samples.items():
            size, per_graph = self.largest.get(stream, (0, 1))  # none, if all of it was in the joint call
            limits.append(min(count, left * per_graph // size) if size else 0)
            left -= limits[-1] * size / per_graph
        agreed = zip(samples.items(), self.replicas.lowest(limits), strict=True)
        self.automatic = {name: math.inf if limit >= count else limit for (name, count), limit in agreed}

    def give_up(self) -> None:
        """Retain one chunk at most from now on, because memory has run out."""
        self.retain = 0 if self.retain == 0 else 1
        self.automatic = None

    def _budget(self) -> float:
        budget = FILL if self.memory_budget is None else self.memory_budget
        if budget > 1:
            return budget
        total = torch.cuda.get_device_properties(self.replicas.device).total_memory
        return max(0, budget * total - peak_memory_mib(self.replicas.device) * 2**20)
