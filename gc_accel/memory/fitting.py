"""The largest chunk that fits, by measuring.

Measured is a forward and a backward pass of each stream, which run one at a time, with a gradient on every weight.
The peak is that of the moment which takes most, and each moment takes a straight line over the samples, of a slope
and an intercept of 0 or more: here the new gradients of the weights, there activations, which few samples hide.

    bytes |           /          a line through two peaks lies below those of more samples: no more than it says fit
    bound |----------/---        a line between two peaks lies above those in between: as many as it says fit
          |_________/            k times the samples take k times the peak at most: so far is it safe to go
          |___________________
                 samples
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from gc_accel.contracts import streams_of
from gc_accel.distributed import Replicas
from gc_accel.distributed.collectives import lowest
from gc_accel.engine.encoding import encode
from gc_accel.engine.joining import JoinedCalls
from gc_accel.inputs.nested import Inputs, batch_size, select
from gc_accel.memory.meters import LiveBytes
from gc_accel.memory.recovery import is_out_of_memory
from gc_accel.state.modules import meeting
from gc_accel.state.snapshot import Snapshot

FEW = 4  # samples to begin measuring with
FILL = 0.9  # of the memory that is there
WORTH = 1.05  # times the samples are worth another measurement
ADAM = 2  # copies of the weights that train, which come with the first step of the optimizer


def fit_chunk_size(
    sample: Inputs,
    replicas: Replicas,
    memory: float | None = None,
    *,
    most: int | None = None,
    forward_chunk_size: int | None = None,
    world_size: int | None = None,
) -> int:
    """The largest chunk size that leaves room for Adam and for the buckets of a reduction, the same on every rank.

    To be called on all ranks. Afterwards everything is as it was.

    Args:
        sample: nested inputs, which are repeated to measure more of them.
        replicas: of the encoder.
        memory: bytes, on the CPU beside those of weights and inputs; on CUDA also, up to 1, a fraction of what is
            free. None: most of what is free, on the CPU of this process's share in it.
        most: samples of a chunk; None: of `sample`.
        forward_chunk_size: samples of a call without a graph, see `samples_of_a_call`.
        world_size: processes that will train; None: those that `replicas` know of.

    Raises:
        ValueError: parameters are sharded; one sample does not fit on some rank; a fraction, but not of CUDA's memory.
    """
    if replicas.sharded:
        raise ValueError('expected a number of samples for sharded parameters, got chunk_size="auto"')
    world_size = replicas.world_size if world_size is None else world_size
    limit, start = most or batch_size(sample), _noted(replicas, sample)
    trained = sum(each.nbytes for each in start.grads if each.requires_grad)
    reserved = (ADAM + (world_size > 1)) * trained
    bound = _bound(memory, replicas.device)
    joined = JoinedCalls(replicas.model, forward_chunk_size, replicas.device)

    def peak(count: int) -> float:
        together = min(joined.samples(count), limit)
        calls = {True: count} | ({False: together} if together > count else {})
        return _peak(sample, calls, replicas, start)

    found = largest_chunk(peak, bound - reserved, limit)
    if world_size > 1:  # a rank on which nothing fits hands in 0, and all of them raise
        found = int(lowest([found], replicas.device, replicas.group)[0])
    if found < 1:
        raise ValueError(
            f"expected memory for a chunk of one sample on every rank, got {bound:,.0f} bytes on this one, "
            f"{reserved:,.0f} of them for the optimizer: turn on gradient checkpointing, or freeze a part of the model"
        )
    return found


def largest_chunk(peak: Callable[[int], float], memory: float, most: int) -> int:
    """About the largest chunk whose peak stays within `memory`, one that was measured; 0 if there is none.

    Args:
        peak: from a number of samples to bytes, infinite where they cannot be measured. It should be what the
            sketch above says; chunks of more than `memory / FILL` are then not tried.
        memory: bytes that may be used.
        most: the largest chunk to try.
    """
    fits, over = list[tuple[int, float]](), None
    size = min(FEW, most)
    while True:
        found = peak(size)
        if found <= memory:
            fits.append((size, found))
        else:
            over = size, found
        largest = fits[-1][0] if fits else 0
        size = _next(fits, over, memory, most)
        if size <= largest or (largest and size < min(WORTH * largest, most)):
            return largest


def _next(fits: list[tuple[int, float]], over: tuple[int, float] | None, memory: float, most: int) -> int:
    """The chunk to measure next, from those that fit, growing, and the smallest that does not."""
    if over is not None and (not fits or over[1] == math.inf):
        return ((fits[-1][0] if fits else 0) + over[0]) // 2
    count, low = fits[-1]
    if over is not None:
        return count + int((memory - low) / (over[1] - low) * (over[0] - count))
    size = min(most, math.ceil(count * min(2, max(memory / max(low, 1), 1 / FILL))))
    if len(fits) > 1 and low > fits[-2][1]:
        per_sample = (low - fits[-2][1]) / (count - fits[-2][0])
        size = min(size, count + int((memory - low) / per_sample))
    return size


def _peak(sample: Inputs, calls: Mapping[bool, int], replicas: Replicas, start: Snapshot) -> float:
    """Bytes at most, in the stream that takes most, of a call with a graph and one without, of so many samples.

    Infinite if they are more than there are. The model is called without what wraps it, which might talk to other
    ranks.
    """
    peaks, size = list[float](), batch_size(sample)
    try:
        for graph, count in calls.items():
            for part in _parts(select(sample, [row % size for row in range(count)]), replicas):
                with _Peak(replicas.device) as peak, replicas.adding_up():
                    _run(part, replicas, start.grads, graph)
                start.restore()
                peaks.append(peak.bytes)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        peaks = [math.inf]
    finally:
        start.restore()
    if math.inf in peaks:  # outside of the handler, because the error holds on to tensors
        clear_device_cache(garbage_collection=True)
    return max(peaks)


def _parts(inputs: Inputs, replicas: Replicas) -> list[Inputs]:
    """What the encoder is called with, stream by stream."""
    streams = streams_of(replicas.model)
    return [streams.arguments(name, part) for name, part in streams.split(inputs).items()]


def _noted(replicas: Replicas, sample: Inputs) -> Snapshot:
    """Weights and buffers of the encoder; those of a function are met when it is called."""
    snapshot = Snapshot(replicas.device)
    if isinstance(replicas.model, nn.Module):
        snapshot.note(replicas.model)
        return snapshot
    with torch.no_grad(), meeting(snapshot.note):
        encode(replicas.model, select(sample, [0]), device=replicas.device)
    snapshot.restore()
    return snapshot


def _run(inputs: Inputs, replicas: Replicas, weights: Iterable[Tensor], graph: bool) -> None:
    """One call beside the gradients of all weights, which are there in the second pass; with a graph backward too."""
    for each in weights:
        each.grad = torch.zeros_like(each) if each.requires_grad else None
    encoded = encode(replicas.model, inputs, device=replicas.device, retain=graph)
    outputs = [output for output in encoded.replay().values() if output.requires_grad] if graph else []
    if outputs:
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])


class _Peak:
    """A block whose peak memory is measured: by the allocator on CUDA, by the tensors alive elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.live, self.bytes = device, LiveBytes(), 0

    def __enter__(self) -> "_Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)  # the run's own peak is yet to come
        else:
            self.live.__exit__(*error)
            self.bytes = self.live.peak


def _bound(memory: float | None, device: torch.device) -> float:
    if memory is not None and (memory <= 0 or (memory <= 1 and device.type != "cuda")):
        raise ValueError(
            f"expected bytes, or on CUDA a fraction of its memory, got {memory} on {device.type}"
        )
    if memory is not None and memory > 1:
        return memory
    if device.type == "cuda":  # what others have is not ours, what the allocator keeps is
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free * (FILL if memory is None else memory)
