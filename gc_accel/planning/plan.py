"""A plan of a step, before it is run: memory, FLOPs, communication, and which chunk and retain to take."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import psutil
import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from gc_accel.inputs.nested import Inputs
from gc_accel.memory.fitting import largest_chunk
from gc_accel.planning.dry_run import DryRun
from gc_accel.planning.step import Parts, Retain, Step
from gc_accel.planning.table import table

FILL = 0.9  # of the memory: the rest is for gaps between tensors, workspaces of kernels, the device's own
TOLERANCE = 0.02  # more FLOPs than the least are worth a larger chunk
SIZES = 4  # how many chunk sizes, from the largest that fits, to compare


@dataclass(frozen=True)
class Plan:
    """What one step costs, on each of some devices. `print(plan)` shows it as a table.

    Args:
        batch_size: samples of one device.
        devices: number of processes, each with all weights.
        memory: bytes that one device has.
        chunk_size, retain: of this plan.
        bytes: by stage and by part.
        flops: by stage.
        sent: bytes that a device sends to others in a step, by what they are.
        suggested_chunk_size: the one to take, a power of two or the batch; 0 if not even one sample fits.
        suggested_retain: the one to take with it.
        suggested_peak: bytes at most with both.
    """

    batch_size: int
    devices: int
    memory: int
    chunk_size: int
    retain: Retain
    bytes: Parts
    flops: dict[str, float]
    sent: dict[str, int]
    suggested_chunk_size: int
    suggested_retain: Retain
    suggested_peak: int

    @property
    def peak(self) -> int:
        """Bytes of one device at most."""
        return max(sum(parts.values()) for parts in self.bytes.values())

    @property
    def shares(self) -> dict[str, float]:
        """Share of each stage in the FLOPs, and so, where these decide, in the time."""
        return {stage: flops / sum(self.flops.values()) for stage, flops in self.flops.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything, for a file."""
        return asdict(self) | {"peak": self.peak, "shares": self.shares}

    def __str__(self) -> str:
        return table(self)


def plan(
    model: nn.Module,
    sample: Inputs,
    batch_size: int,
    devices: int = 1,
    memory: int | None = None,
    *,
    chunk_size: int | Literal["auto"] | None = None,
    retain: Retain | Literal["auto"] | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    optimizer_copies: int = 2,
    memory_budget: float | None = None,
    forward_chunk_size: int | None = None,
) -> Plan:
    """What a step of `GradientCache` will cost. Nothing is computed: a model of any size takes seconds.

    Args:
        model: an encoder as the cache takes it, with its weights or made under `torch.device("meta")`, and with
            gradient checkpointing if the step will have it.
        sample: a chunk as the collator gives it, of any number of samples.
        batch_size: samples of the contrastive batch on one device.
        devices: number of processes, each with all weights.
        memory: bytes of one device; None: what the accelerator has, or what is free of the host's.
        chunk_size: None: the suggested one. "auto": about the largest that fits, as the cache measures it.
        retain: None or "auto": as many graphs as fit; with "auto" one at least, as the cache has it.
        autocast: dtype of mixed precision, such as `torch.bfloat16`.
        device: where the step will run; None: where the weights are, the CPU for those on "meta". For one that
            this machine does not have, such as "cuda", the CPU stands in, whose fused attention keeps as much.
        optimizer_copies: tensors of a weight's size that the optimizer keeps of it: 2 for Adam.
        memory_budget: of the cache: bytes for graphs that are retained, where their number is not given, and for a
            chunk, where its size is not; or, up to 1, the fraction of `memory` to fill.
        forward_chunk_size: of the cache: samples of a call of the first pass.

    Raises:
        ValueError: sizes or memory below 1, a budget of 0, another `retain`; an encoder whose shapes depend on values;
            None for the memory of a device that this machine does not have.

    Example:
        >>> print(plan(encoder, collator([dataset[0]]), batch_size=4096, memory=24 * 2**30))
    """
    if min(batch_size, devices, chunk_size if isinstance(chunk_size, int) else 1) < 1:
        raise ValueError(
            f"expected sizes of at least 1, got a batch of {batch_size} on {devices} devices in chunks of {chunk_size}"
        )
    if memory is not None and memory < 1:
        raise ValueError(f"expected memory in bytes, at least 1, got {memory}")
    if not (retain in (None, "all", "auto") or (isinstance(retain, int) and retain >= 0)):
        raise ValueError(f'expected retain to be "all", "auto" or a number of chunks from 0, got {retain!r}')
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"expected a memory_budget above 0, got {memory_budget}")
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    place = _device_of(model) if device is None else torch.device(device)
    stand_in = place if torch.get_device_module(place).is_available() else torch.device("cpu")
    encoder = DryRun(model, sample, stand_in, autocast)
    step = Step(
        encoder,
        batch_size,
        devices,
        optimizer_copies,
        on_host=place.type == "cpu",
        forward_chunk_size=forward_chunk_size,
    )
    memory = _memory_of(place, devices) if memory is None else memory
    room = _room(memory, memory_budget, for_chunk=not isinstance(chunk_size, int))
    best_size, best_retain = suggest(step, room)
    best_peak = step.peak(best_size or 1, best_retain)
    if chunk_size == "auto":
        chunk_size = largest_chunk(lambda size: room.taken(step, size, 0), room.total, batch_size)
    size = chunk_size or best_size or 1
    kept = most_retained(step, size, room) if retain is None or retain == "auto" else retain
    if retain == "auto":
        kept = kept or 1  # the cache always keeps one, which costs nothing
    return Plan(
        batch_size,
        devices,
        memory,
        size,
        kept,
        step.memory(size, kept),
        step.flops(size, kept),
        step.sent(),
        best_size,
        best_retain,
        best_peak,
    )


class Room(NamedTuple):
    """Bytes that a step may take: of a device, for retained graphs, for a chunk (`Step.peak_of_chunk`)."""

    total: float
    graphs: float = math.inf
    chunk: float = math.inf

    def taken(self, step: Step, chunk_size: int, retain: Retain) -> float:
        """What a step takes, as a part of `total`: of whichever it takes the largest part."""
        return max(
            step.peak(chunk_size, retain),
            self.total * step.retained(chunk_size, retain) / self.graphs,
            self.total * step.peak_of_chunk(chunk_size) / self.chunk,
        )

    def has(self, step: Step, chunk_size: int, retain: Retain) -> bool:
        """Whether a step fits."""
        return self.taken(step, chunk_size, retain) <= self.total


def suggest(step: Step, room: Room) -> tuple[int, Retain]:
    """The chunk and the number of retained graphs to take; a chunk of 0 if none fits.

    Retained graphs spare their chunks a second forward, and many small ones fill memory better than one large;
    large chunks keep the device busy. So the largest chunk with about the fewest FLOPs is taken.
    """
    fitting = list(takewhile(lambda size: room.has(step, size, 0), _sizes(step.batch_size)))
    options = [(size, most_retained(step, size, room)) for size in fitting[-SIZES:]]
    if not options:
        return 0, 0
    flops = {option: sum(step.flops(*option).values()) for option in options}
    least = min(flops.values())
    return max(option for option in options if flops[option] <= (1 + TOLERANCE) * least)


def most_retained(step: Step, chunk_size: int, room: Room) -> Retain:
    """The largest number of graphs that fit, or "all"."""
    if room.has(step, chunk_size, "all"):
        return "all"
    low, high = 0, -(-step.batch_size // chunk_size)  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if room.has(step, chunk_size, middle) else (low, middle)
    return low


def _room(memory: int, budget: float | None, *, for_chunk: bool) -> Room:
    """Of a device with a `memory_budget`, which may be one for the chunk."""
    if budget is None:
        return Room(FILL * memory)
    return (
        Room(budget * memory)
        if budget <= 1
        else Room(FILL * memory, budget, budget if for_chunk else math.inf)
    )


def _sizes(batch_size: int) -> Iterator[int]:
    """Powers of two below the batch, and the batch."""
    size = 1
    while size < batch_size:
        yield size
        size *= 2
    yield batch_size


def _device_of(model: nn.Module) -> torch.device:
    weight = next(model.parameters(), torch.empty(0))
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


def _memory_of(device: torch.device, devices: int) -> int:
    """Bytes of an accelerator, or the share of one process in what the host has free."""
    if device.type == "cpu":
        return psutil.virtual_memory().available // devices
    if not torch.get_device_module(device).is_available():
        raise ValueError(
            f"expected the memory of a device that is not here, {device}, got None: pass its bytes"
        )
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return torch.get_device_module(device).get_device_properties(device).total_memory
