"""Memory of this process: its peak, and what the graph of a computation keeps."""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far, in MiB: of the allocator on CUDA, else resident memory of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


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
