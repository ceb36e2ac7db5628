"""The largest chunk that fits, by measuring.

Measured is a forward and a backward pass of each stream, which run one at a time, with a gradient on every weight. What
counts is what they make, their activations, beside weights, gradients and inputs. The peak is that of the moment which
takes most, and each moment takes a straight line over the samples, of a slope and an intercept of 0 or more: here the
gradient that a backward pass makes of one weight, there activations, which few samples hide.

    bytes |           /          a line through two peaks lies below those of more samples: no more than it says fit
   budget |----------/---        a line between two peaks lies above those in between: as many as it says fit
          |_________/            k times the samples take k times the peak at most: so far is it safe to go
          |___________________
                 samples
"""

import math
from collections.abc import Callable

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from gc_accel.contracts import streams_of
from gc_accel.distributed import Replicas
from gc_accel.distributed.collectives import lowest
from gc_accel.engine.encoding import encode
from gc_accel.engine.joining import JoinedCalls
from gc_accel.engine.transfer import to_device
from gc_accel.inputs.nested import Inputs, batch_size, select
from gc_accel.memory.budget import (
    FILL,
    OPTIMIZER_COPIES,
    activation_bytes,
    check_budget,
    device_memory,
    is_fraction,
)
from gc_accel.memory.meters import PeakBytes, tensors_in
from gc_accel.memory.recovery import is_out_of_memory
from gc_accel.state.modules import meeting
from gc_accel.state.snapshot import Snapshot

FEW = 4  # samples to begin measuring with
WORTH = 1.05  # times the samples are worth another measurement


def fit_chunk_size(
    sample: Inputs,
    replicas: Replicas,
    memory_budget: float | None = None,
    *,
    most: int | None = None,
    forward_chunk_size: int | None = None,
    world_size: int | None = None,
) -> int:
    """The largest chunk size whose activations stay within a budget, the same on every rank.

    To be called on all ranks. Afterwards everything is as it was.

    Args:
        sample: nested inputs, which are repeated to measure more of them.
        replicas: of the encoder.
        memory_budget: what activations may take, see `budget.py`; fractions on CUDA alone.
        most: samples of a chunk; None: of `sample`.
        forward_chunk_size: samples of a call without a graph, see `samples_of_a_call`.
        world_size: processes that will train; None: those that `replicas` know of.

    Raises:
        ValueError: parameters are sharded; one sample does not fit on some rank; see `check_budget`.
    """
    if replicas.sharded:
        raise ValueError('expected a number of samples for sharded parameters, got chunk_size="auto"')
    check_budget(memory_budget, replicas.device)
    world_size = replicas.world_size if world_size is None else world_size
    measured = _Calls(sample, replicas, most or batch_size(sample), forward_chunk_size)
    room = measured.room(memory_budget, world_size)
    chunk_size = largest_chunk(measured.peak, room, measured.most)
    if world_size > 1:  # a rank on which nothing fits hands in 0, and all of them raise
        chunk_size = int(lowest([chunk_size], replicas.device, replicas.group)[0])
    if chunk_size < 1:
        raise ValueError(
            f"expected memory for a chunk of one sample on every rank, got {room:,.0f} bytes for its activations on "
            "this one: turn on gradient checkpointing, or freeze a part of the model"
        )
    return chunk_size


def largest_chunk(peak: Callable[[int], float], memory: float, most: int) -> int:
    """About the largest chunk whose peak stays within `memory`, one that was measured; 0 if there is none.

    Args:
        peak: from a number of samples to bytes, infinite where they cannot be measured. It should be what the
            sketch above says; chunks of more than `memory / FILL` are then not tried.
        memory: bytes that may be used.
        most: the largest chunk to try.
    """
    fitting, too_large = list[tuple[int, float]](), None
    size = min(FEW, most)
    while True:
        measured = size, peak(size)
        if measured[1] <= memory:
            fitting.append(measured)
        else:
            too_large = measured
        largest = fitting[-1][0] if fitting else 0
        size = _next(fitting, too_large, memory, most)
        if size <= largest or (largest and size < min(WORTH * largest, most)):
            return largest


def _next(
    fitting: list[tuple[int, float]], too_large: tuple[int, float] | None, memory: float, most: int
) -> int:
    """The chunk to measure next, from those that fit, growing, and the smallest that does not."""
    if too_large is not None and (not fitting or too_large[1] == math.inf):
        return ((fitting[-1][0] if fitting else 0) + too_large[0]) // 2
    count, low = fitting[-1]
    if too_large is not None:
        return count + int((memory - low) / (too_large[1] - low) * (too_large[0] - count))
    size = min(most, math.ceil(count * min(2, max(memory / max(low, 1), 1 / FILL))))
    if len(fitting) > 1 and low > fitting[-2][1]:
        per_sample = (low - fitting[-2][1]) / (count - fitting[-2][0])
        size = min(size, count + int((memory - low) / per_sample))
    return size


class _Calls:
    """Calls of an encoder, with as many samples as it takes, to be measured.

    The model is called without what wraps it, which might talk to other ranks.

    Args:
        sample: what is repeated.
        most: samples of a call.
    """

    def __init__(self, sample: Inputs, replicas: Replicas, most: int, forward_chunk_size: int | None) -> None:
        self.sample, self.replicas, self.most = sample, replicas, most
        self.joined = JoinedCalls(replicas.model, forward_chunk_size, replicas.device)
        self.start = _noted(replicas, sample)
        self.trained = [weight for weight in self.start.grads if weight.requires_grad]
        self.input_bytes = 0  # of a sample, where room for them is not set aside

    def room(self, memory_budget: float | None, world_size: int) -> float:
        """Bytes for activations, beside what there is, and what the first steps will add to it."""
        device, trained = self.replicas.device, sum(weight.nbytes for weight in self.trained)
        taken = (1 + OPTIMIZER_COPIES + (world_size > 1)) * trained  # gradients, and buckets to reduce them
        if device.type == "cuda":
            taken += torch.cuda.memory_allocated(device)
            if is_fraction(memory_budget):
                inputs = sum(tensor.nbytes for tensor in tensors_in(self.sample))
                self.input_bytes = inputs // batch_size(self.sample)
        return activation_bytes(memory_budget, device_memory(device), taken)

    def peak(self, chunk_size: int) -> float:
        """Bytes at most of the calls that chunks of a size make; infinite if there are not as many."""
        peaks, together = list[float](), min(self.joined.samples(chunk_size), self.most)
        try:
            peaks.append(self._peak(chunk_size, with_graph=True))
            if together > chunk_size:
                peaks.append(self._peak(together, with_graph=False))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            peaks.append(math.inf)
        finally:
            self.start.restore()
        if math.inf in peaks:  # outside of the handler, because the error holds on to tensors
            clear_device_cache(garbage_collection=True)
        return max(peaks)

    def _peak(self, count: int, *, with_graph: bool) -> float:
        """The same of one call, in the stream that takes most."""
        peaks, streams, size = list[int](), streams_of(self.replicas.model), batch_size(self.sample)
        samples = select(self.sample, [row % size for row in range(count)])
        for stream, part in streams.split(samples).items():
            inputs = to_device(streams.arguments(stream, part), self.replicas.device)
            with self.replicas.adding_up():
                peaks.append(self._peak_of_call(inputs, with_graph=with_graph))
            self.start.restore()
        return max(peaks) + count * self.input_bytes

    def _peak_of_call(self, inputs: Inputs, *, with_graph: bool) -> int:
        """Of a call, beside the gradients of all weights, as in the second pass; with a graph its backward pass too."""
        for weight in self.trained:
            weight.grad = torch.zeros_like(weight)
        known = [*self.start.grads, *self.start.values, *tensors_in(inputs)]
        known += [weight.grad for weight in self.trained if weight.grad is not None]
        device = self.replicas.device
        with PeakBytes(device, known) as peak:
            encoded = encode(self.replicas.model, inputs, device=device, retain=with_graph)
            outputs = encoded.replay().values() if with_graph else ()
            reached = [output for output in outputs if output.requires_grad]
            if reached:
                torch.autograd.backward(reached, [torch.zeros_like(output) for output in reached])
        return peak.total


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
