"""Memory: the peak of this process and of a block, what the graph of a computation keeps, which tensors are alive."""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gc_accel.inputs.walk import Inputs, flatten


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far, in MiB: of the allocator on CUDA, else resident memory of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def tensors_in(inputs: Inputs) -> Iterator[Tensor]:
    """All tensors of nested inputs."""
    return (value for value in flatten(inputs) if isinstance(value, Tensor))


class SavedBytes(saved_tensors_hooks):
    """A block in which the bytes that autograd saves for backward passes are counted.

    Memory that several tensors share counts once. What a custom function keeps as attributes is not seen, as
    it is not saved by autograd.

    Args:
        besides: tensors whose memory does not count, such as parameters.
    """

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        self.besides = {tensor.untyped_storage().data_ptr() for tensor in besides}
        self.sizes: dict[int, int] = {}
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.besides:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that were made in its context and are still alive, whether they hold values or not.

    A dispatch mode sees the result of every operation, forward and backward. Each new storage is counted once, with
    all views of it, until nothing refers to it any more. On fake tensors, which have shapes but no values, that is
    the memory of a step that nobody has to run: autograd keeps and frees them as it would real ones. Not seen is
    what an operation uses inside and has freed when it returns, such as a convolution's workspace.

    Args:
        known: tensors that were there before, whose views do not count.

    Attributes:
        now: bytes alive.
        peak: the largest `now` so far, or since `restart`.

    Example:
        >>> with LiveBytes(model.parameters()) as live:
        ...     model(inputs).sum().backward()
        >>> live.peak
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        # By identity of the storage, of which torch hands out one and the same Python object while it is alive.
        self.counted = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.now

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.counted:
            return
        self.counted.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, nbytes: int) -> None:
        self.now -= nbytes


class PeakBytes:
    """A block whose peak beyond what was there before is measured: by the allocator on CUDA, else by `LiveBytes`."""

    def __init__(self, device: torch.device, known: Iterable[Tensor]) -> None:
        self.device, self.known, self.total = device, known, 0

    def __enter__(self) -> "PeakBytes":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.live = LiveBytes(self.known).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.total = torch.cuda.max_memory_allocated(self.device) - self.before
            torch.cuda.reset_peak_memory_stats(self.device)  # the run's own peak is yet to come
        else:
            self.live.__exit__(*error)
            self.total = self.live.peak
