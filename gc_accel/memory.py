"""Peak memory of this process, for logs and memory tests."""

import sys

import torch


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far, in MiB: of the allocator on CUDA, else resident memory of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
