"""The memory of a step: what a device has, what everything else takes, and what is left for activations.

    |  weights, gradients, optimizer, buckets, inputs, ...  |  activations: `memory_budget`  |  kept free  |
    0                                                                          fraction * memory     memory

A budget is what the activations of a step may take: the chunk that is encoded, and all graphs that are kept, in bytes.
Up to 1 it is the fraction of the device that a step may fill, and becomes such bytes here alone.
"""

import os

import psutil
import torch

FILL = 0.9  # of a device, unless a fraction says more: the rest is for gaps between tensors and workspaces of kernels
OPTIMIZER_COPIES = 2  # of each weight that trains: Adam makes them in its first step


def check_budget(budget: object, device: torch.device | None = None) -> None:
    """Raise ValueError for what is no number above 0, and for a fraction of a device that is not CUDA."""
    if budget is None:
        return
    if not (isinstance(budget, (int, float)) and budget > 0):
        raise ValueError(f"expected a memory_budget above 0, got {budget!r}")
    if device is not None and device.type != "cuda" and is_fraction(budget):
        raise ValueError(f"expected a memory_budget in bytes on {device.type}, got the fraction {budget}")


def is_fraction(budget: float | None) -> bool:
    """Whether a budget depends on what the device has; None is most of it."""
    return budget is None or budget <= 1


def activation_bytes(budget: float | None, memory: float, taken: float) -> float:
    """Bytes that the activations of a step may take.

    Args:
        budget: these bytes, of which there may be fewer; up to 1 a fraction of the memory to fill; None: `FILL`.
        memory: bytes of the device.
        taken: bytes of everything else.
    """
    if budget is None or budget > 1:
        room = FILL * memory - taken
        return room if budget is None else min(budget, room)
    return budget * memory - taken


def device_memory(device: torch.device, processes: int | None = None) -> int:
    """Bytes that this process may have of a device: all that others do not take; of the host its share in what is free.

    Args:
        processes: those that share the host; None: as the launcher says.

    Raises:
        ValueError: this machine has no such device.
    """
    if device.type == "cpu":
        processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return psutil.virtual_memory().available // processes
    backend = torch.get_device_module(device)
    if not backend.is_available():
        raise ValueError(
            f"expected the memory of a device that is not here, {device}, got None: pass its bytes"
        )
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type == "cuda":  # what the allocator keeps is ours
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return backend.get_device_properties(device).total_memory
