"""How many samples keep the graph of their first pass, and so need no second forward.

With k of n chunks retained a step costs 1 + (n - k) / 3n direct steps, if a backward pass costs two forward
passes: 4/3 where none is retained, 1 where all are. One retained chunk costs no memory, as the second pass
needs one graph at a time anyway. With "auto" the first step retains that one and counts the bytes that autograd
saves for a sample of each stream; from then on there are as many as a budget of bytes allows, of the costliest
stream first, and one at least.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from gc_accel.distributed import Replicas
from gc_accel.inputs.nested import Inputs, batch_size
from gc_accel.memory.meters import SavedBytes, peak_memory_mib

FILL = 0.9  # of the memory of a device
OPTIMIZER_COPIES = 2  # of the weights, as Adam makes them after the first step
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

    @property
    def counts_chunks(self) -> bool:
        """Whether limits stand for a number of chunks, however many samples these have."""
        return self.retain != "auto"

    def limits(
        self, trained: Sequence[Any], streams: Iterable[Any], chunk_sizes: Mapping[Any, int]
    ) -> dict[Any, float]:
        """By stream, the samples whose graph is retained.

        Args:
            trained: streams that train, the costliest first.
            streams: all of them.
            chunk_sizes: by stream.
        """
        without_limit = dict.fromkeys(streams, math.inf)
        if self.retain == "all":
            return without_limit
        costliest, *others = trained
        if self.automatic is not None:
            at_least = max(self.automatic[costliest], chunk_sizes[costliest])
            return without_limit | self.automatic | {costliest: at_least}
        count = 1 if self.retain == "auto" else int(self.retain)
        return without_limit | {costliest: count * chunk_sizes[costliest]} | dict.fromkeys(others, 0)

    def metered(self, parts: Mapping[Any, Inputs], fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself; with "auto", until it has decided, one that counts the bytes of its graph.

        Args:
            parts: by stream, what it will be called with.
        """
        stream, part = next(iter(parts.items()))
        if self.retain != "auto" or self.automatic is not None or len(parts) > 1:
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
            found = saved.total / batch_size(part)
            self.per_sample[stream] = max(found, self.per_sample.get(stream, 0))
            return outputs

        return counted

    def decide(self, samples: Mapping[Any, int]) -> None:
        """At the end of a step: from the bytes of a sample to limits for the steps that follow.

        Args:
            samples: of each stream that trains, the costliest first, in the step that ends.
        """
        if self.retain != "auto" or self.automatic is not None:
            return
        sizes = [self.per_sample.get(stream, 0) for stream in samples]
        if not self.replicas.lowest([min(sizes, default=0)])[0]:  # some stream was in the joint call alone
            return
        left, limits = self._budget(), list[float]()
        for size, count in zip(sizes, samples.values(), strict=True):
            limits.append(min(count, left // size))
            left -= limits[-1] * size
        if limits == list(samples.values()):  # room for all of it, and as much more in a larger batch
            needed = sum(size * count for size, count in zip(sizes, samples.values(), strict=True))
            limits = [limit * (needed + left) // needed for limit in limits]
        self.automatic = dict(zip(samples, self.replicas.lowest(limits), strict=True))

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
