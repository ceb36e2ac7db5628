"""How many samples the encoder sees at once: given, measured (`fitting.py`), halved when memory runs out."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal

from gc_accel.contracts import streams_of
from gc_accel.distributed import Replicas
from gc_accel.inputs.nested import Inputs
from gc_accel.memory.fitting import fit_chunk_size

ChunkSize = int | Mapping[str, int] | Literal["auto"]


class ChunkSizes:
    """Samples of a chunk, by stream.

    Args:
        chunk_size: for all streams, by stream, or "auto".
        forward_chunk_size: of a call of the first pass; None: see `engine/joining.py`.
        memory_budget: for "auto": what activations may take, see `budget.py`.
        replicas: of the encoder.

    Raises:
        ValueError: for sizes that are no whole numbers from 1, or of other streams.
    """

    def __init__(
        self,
        chunk_size: ChunkSize,
        forward_chunk_size: int | None,
        memory_budget: float | None,
        replicas: Replicas,
    ) -> None:
        self.replicas, self.memory_budget = replicas, memory_budget
        self.streams = streams_of(replicas.model).names
        self.forward_chunk_size = forward_chunk_size
        self.by_stream: dict[Any, int] = {}
        if not isinstance(chunk_size, str):
            sizes = chunk_size if isinstance(chunk_size, Mapping) else dict.fromkeys(self.streams, chunk_size)
            self._set(sizes)
        elif chunk_size == "auto":
            self._check(dict.fromkeys(self.streams, 1))
        else:
            raise ValueError(f'expected chunk_size to be a number of samples or "auto", got {chunk_size!r}')

    def settle(self, sample: Inputs) -> None:
        """Find the size of "auto" with some samples, unless that has been done."""
        if not self.by_stream:
            options = {"forward_chunk_size": self.forward_chunk_size}
            size = fit_chunk_size(sample, self.replicas, self.memory_budget, **options)
            self._set(dict.fromkeys(self.streams, size))

    def halve(self) -> None:
        """Go on with half as many samples at once."""
        self.by_stream.update({stream: max(1, size // 2) for stream, size in self.by_stream.items()})

    def __str__(self) -> str:
        sizes = (str(size) if name is None else f"{size} ({name})" for name, size in self.by_stream.items())
        return ", ".join(sizes)

    def _set(self, sizes: Mapping[Any, int]) -> None:
        self._check(sizes)
        self.by_stream = dict(sizes)

    def _check(self, sizes: Mapping[Any, int]) -> None:
        forward = self.forward_chunk_size
        given = [*sizes.values(), *([] if forward is None else [forward])]
        if set(sizes) != set(self.streams) or not all(map(_is_size, given)):
            raise ValueError(
                f"expected chunks of {self.streams}, and calls, of a whole number of samples from 1, got "
                f"chunk_size={dict(sizes)}, forward_chunk_size={forward!r}"
            )


def _is_size(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0
