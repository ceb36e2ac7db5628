"""A plan of a step, before it is run: memory, FLOPs, communication, and which chunk and retain to take."""

import math
from collections.abc import Iterator
from itertools import takewhile
from typing import Literal, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from gc_accel.inputs.nested import Inputs
from gc_accel.memory.budget import (
    OPTIMIZER_COPIES,
    activation_bytes,
    check_budget,
    device_memory,
    is_fraction,
)
from gc_accel.memory.fitting import largest_chunk
from gc_accel.memory.retention import Retain, check_retain
from gc_accel.planning.dry_run import DryRun
from gc_accel.planning.report import Plan
from gc_accel.planning.step import StepCost

TOLERANCE = 0.02  # more FLOPs than the least are worth a larger chunk
SIZES = 4  # how many chunk sizes, from the largest that fits, to compare


def plan(
    model: nn.Module,
    sample: Inputs,
    batch_size: int,
    devices: int = 1,
    memory: int | None = None,
    *,
    chunk_size: int | Literal["auto"] | None = None,
    retain: Retain | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    optimizer_copies: int = OPTIMIZER_COPIES,
    memory_budget: float | None = None,
    forward_chunk_size: int | None = None,
) -> Plan:
    """What a step of `GradientCache` will cost. Nothing is computed: a model of any size takes seconds.

    Args:
        model: as the cache takes it, with weights or made under `torch.device("meta")`, checkpointing as in the step.
        sample: a chunk as the collator gives it, of any number of samples.
        batch_size: samples of the contrastive batch on one device.
        devices: number of processes, each with all weights.
        memory: bytes of one device; None: what this process may have of the device that is here.
        chunk_size: None: the suggested one. "auto": about the largest that fits, as the cache measures it.
        retain: None or "auto": as many graphs as fit; with "auto" one at least, as the cache has it.
        autocast: dtype of mixed precision, such as `torch.bfloat16`.
        device: where the step will run; None: where the weights are. The CPU stands in for one that is not here.
        optimizer_copies: tensors of a weight's size that the optimizer keeps of it: 2 for Adam.
        memory_budget, forward_chunk_size: of the cache; a budget up to 1 is a fraction of `memory`.

    Raises:
        ValueError: sizes, memory, budget or `retain` that are none; an encoder whose shapes depend on values; no memory
            given for a device that is not here.

    Example: `print(plan(encoder, collator([dataset[0]]), batch_size=4096, memory=24 * 2**30))`
    """
    _check_sizes(batch_size, devices, chunk_size, memory)
    check_retain(0 if retain is None else retain)
    check_budget(memory_budget)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    place = _device_of(model) if device is None else torch.device(device)
    run = DryRun(model, sample, _stand_in(place), autocast)
    step = StepCost(run, batch_size, devices, optimizer_copies, place, forward_chunk_size)
    return _plan(step, Room(memory or device_memory(place, devices), memory_budget), chunk_size, retain)


class Room(NamedTuple):
    """Where a step has to fit: bytes of a device, and what activations may take of it (`memory/budget.py`)."""

    memory: int
    budget: float | None = None

    def share(self, step: StepCost, chunk_size: int, retain: Retain) -> float:
        """What a step takes of what it may take: 1 at most if it fits."""
        filled = activation_bytes(self.budget if is_fraction(self.budget) else None, self.memory, 0)
        limit = activation_bytes(self.budget, self.memory, step.besides(chunk_size, retain))
        shares = [step.peak(chunk_size, retain) / filled]
        shares.append(step.activations(chunk_size, retain) / limit if limit > 0 else math.inf)
        return max(shares)

    def has(self, step: StepCost, chunk_size: int, retain: Retain) -> bool:
        """Whether a step fits."""
        return self.share(step, chunk_size, retain) <= 1


def _plan(
    step: StepCost, room: Room, chunk_size: int | Literal["auto"] | None, retain: Retain | None
) -> Plan:
    """The plan of a step with what is given, and what fits for the rest."""
    suggested = suggest(step, room)
    size = suggested[0] if chunk_size is None else chunk_size
    if size == "auto":
        size = largest_chunk(
            lambda size: room.memory * room.share(step, size, 0), room.memory, step.batch_size
        )
    size = size or 1
    if retain is None:
        retain = most_retained(step, size, room)
    elif retain == "auto":
        retain = most_retained(step, size, room) or 1  # the cache always keeps one, which costs nothing
    costs = step.memory(size, retain), step.flops(size, retain), step.sent()
    suggestion = *suggested, step.peak(suggested[0] or 1, suggested[1])
    return Plan(step.batch_size, step.devices, room.memory, size, retain, *costs, *suggestion)


def suggest(step: StepCost, room: Room) -> tuple[int, Retain]:
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


def most_retained(step: StepCost, chunk_size: int, room: Room) -> Retain:
    """The largest number of graphs that fit, or "all"."""
    if room.has(step, chunk_size, "all"):
        return "all"
    chunks = -(-step.batch_size // chunk_size)
    low, high = 0, chunks + (len(step.streams.trained) > 1)  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if room.has(step, chunk_size, middle) else (low, middle)
    return low


def _check_sizes(batch_size: int, devices: int, chunk_size: object, memory: int | None) -> None:
    if min(batch_size, devices, chunk_size if isinstance(chunk_size, int) else 1) < 1:
        raise ValueError(
            f"expected sizes of at least 1, got a batch of {batch_size} on {devices} devices in chunks of {chunk_size}"
        )
    if memory is not None and memory < 1:
        raise ValueError(f"expected memory in bytes, at least 1, got {memory}")


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


def _stand_in(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one that is not here, whose fused attention keeps as much."""
    return device if torch.get_device_module(device).is_available() else torch.device("cpu")
