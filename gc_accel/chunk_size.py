"""How many samples the encoder sees at once: given, found by measuring, halved when memory runs out.

Peak memory is a straight line over the samples of a chunk, so the peaks of two small chunks say where it meets a
bound. Measured is a forward and a backward pass of each stream, which run one at a time, and afterwards everything
is as it was. The bound leaves room for what is not measured, and a step that runs out of memory nevertheless is
made again (`recovery.py`).
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import psutil
import torch

from gc_accel.chunking import Inputs, batch_size, slice_inputs, split_streams
from gc_accel.distributed import Replicas
from gc_accel.encoding import encode
from gc_accel.memory import LiveBytes
from gc_accel.recovery import StepStart

ChunkSize = int | Mapping[str, int] | Literal["auto"]
PROBE = 16  # samples to measure with; the smaller chunk is a quarter of them
FILL = 0.9  # of the memory that is there
CALLS_OF = 4  # chunks, in the first pass on an accelerator


class ChunkSizes:
    """Samples of a chunk and of a call of the first pass, by stream.

    Args:
        chunk_size: for all streams, by stream, or "auto".
        forward_chunk_size: of a call of the first pass; None: of one chunk, on an accelerator of some.
        memory: for "auto", see `fit_chunk_size`.
        streams: of the encoder.
        replicas: of the encoder.

    Raises:
        ValueError: for sizes below 1, or of other streams.
    """

    def __init__(
        self,
        chunk_size: ChunkSize,
        forward_chunk_size: int | None,
        memory: float | None,
        streams: Iterable[Any],
        replicas: Replicas,
    ) -> None:
        self.replicas, self.streams, self.memory = replicas, list(streams), memory
        self.is_auto = chunk_size == "auto"
        self.forward_chunk_size = forward_chunk_size
        self.chunks: dict[Any, int] = {}
        self.calls: dict[Any, int] = {}
        if not isinstance(chunk_size, str):
            self._set(
                chunk_size if isinstance(chunk_size, Mapping) else dict.fromkeys(self.streams, chunk_size)
            )
        elif not self.is_auto:
            raise ValueError(f'expected chunk_size to be a number of samples or "auto", got {chunk_size!r}')

    def settle(self, sample: Inputs) -> None:
        """Find the size of "auto" with some samples, unless that has been done."""
        if not self.chunks:
            found = fit_chunk_size(sample, self.replicas, self.memory)
            self._set(dict.fromkeys(self.streams, found))

    def halve(self) -> None:
        """Go on with half as many samples at once."""
        for sizes in (self.chunks, self.calls):
            sizes.update({stream: max(1, size // 2) for stream, size in sizes.items()})

    def __str__(self) -> str:
        sizes = (str(size) if name is None else f"{size} ({name})" for name, size in self.chunks.items())
        return ", ".join(sizes)

    def _set(self, sizes: Mapping[Any, int]) -> None:
        forward = self.forward_chunk_size
        if (
            set(sizes) != set(self.streams)
            or min(sizes.values()) < 1
            or (forward is not None and forward < 1)
        ):
            raise ValueError(
                f"expected chunks of at least 1 sample of {self.streams}, and such calls, got {dict(sizes)}, {forward}"
            )
        factor = 1 if self.replicas.device.type == "cpu" else CALLS_OF
        self.chunks = dict(sizes)
        self.calls = {name: forward or factor * size for name, size in sizes.items()}


def fit_chunk_size(
    sample: Inputs, replicas: Replicas, memory: float | None = None, *, reserved: float = 0
) -> int:
    """The largest chunk size, the same on every rank.

    Args:
        sample: nested inputs of at least 2 samples; `PROBE` of them are measured.
        replicas: of the encoder.
        memory: bytes, or up to 1 a fraction of the device's; None: most of what it has, on the CPU of what is
            free of the host's.
        reserved: bytes of it that something else will take, such as an optimizer that is yet to come.

    Raises:
        ValueError: parameters are sharded; one sample does not fit, or only a single one is given.
    """
    if replicas.sharded:
        raise ValueError('expected a number of samples for sharded parameters, got chunk_size="auto"')
    many = min(batch_size(sample), PROBE)
    if many < 2:
        raise ValueError(f"expected at least 2 samples to measure chunks with, got {many}")
    few = (many + 3) // 4
    low, high = (_peak(slice_inputs(sample, 0, count), replicas) for count in (few, many))
    found = largest_chunk((few, low), (many, high), _bound(memory, replicas.device) - reserved)
    return int(replicas.lowest([found])[0])


def largest_chunk(small: tuple[int, float], large: tuple[int, float], memory: float) -> int:
    """The largest chunk whose peak stays within `memory`.

    Args:
        small, large: a chunk size and the peak that was measured with it, in bytes, or whatever unit `memory` is in.
            Take them as large as is cheap: for a few samples, what the weights need can hide what the samples do.
        memory: bytes that may be used.

    Raises:
        ValueError: the peaks do not grow with the chunk; not even one sample fits.
    """
    (few, low), (many, high) = small, large
    if not 0 < few < many or high <= low:
        raise ValueError(
            f"expected a larger peak for a larger chunk, got {small} and {large}: measure larger ones"
        )
    per_sample = (high - low) / (many - few)
    chunk = int(few + (memory - low) // per_sample)
    if chunk < 1:
        raise ValueError(
            f"expected memory for a chunk of one sample, got {memory:,.0f} where it takes "
            f"{low - (few - 1) * per_sample:,.0f}: turn on gradient checkpointing, or freeze a part of the model"
        )
    return chunk


def _peak(chunk: Inputs, replicas: Replicas) -> int:
    """Bytes at most of the passes over a chunk, of the stream that takes most."""
    device, start = replicas.device, StepStart(replicas)
    peaks = []
    for name, part in split_streams(chunk, getattr(replicas.model, "streams", {None: ()}))[0].items():
        with _Peak(device) as peak, replicas.reducing(False):
            inputs = part if name is None else {name: part}
            encoded = encode(replicas.encoder, inputs, device=device, retain=True)
            outputs = [output for output in encoded.replay().values() if output.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
            del encoded, outputs
        start.restore()
        peaks.append(peak.bytes)
    return max(peaks)


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
        else:
            self.live.__exit__(*error)
            self.bytes = self.live.peak


def _bound(memory: float | None, device: torch.device) -> float:
    if memory is not None and memory > 1:
        return memory
    total = psutil.virtual_memory().available
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    return total * (FILL if memory is None else memory)
