"""Chunks on their way from the host to the device that computes.

On CUDA they are copied on a stream of their own. The host launches the copy of a chunk while the chunk before it
still computes, and waits until the one before that is done, so that two chunks are on the device at most:

    copies       chunk 1 | chunk 2 |           chunk 3 | ...
    computation            chunk 1 ........... chunk 2 ...........

Other devices get a plain copy, and on the CPU nothing is copied at all.
"""

from functools import cache

import torch
from accelerate.utils import recursively_apply, send_to_device

from gc_accel.inputs.nested import Inputs


def to_device(chunk: Inputs, device: torch.device) -> Inputs:
    """Nested inputs on the device, ready for what is launched next on its current stream."""
    if device.type == "cpu":
        return chunk
    if device.type == "cuda":
        return _copies(device).send(chunk)
    return send_to_device(chunk, device, non_blocking=True)


class _CopyStream:
    """The stream of one device on which chunks travel."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.launched: torch.cuda.Event | None = None  # where the computation stood at the latest copy

    def send(self, chunk: Inputs) -> Inputs:
        computing = torch.cuda.current_stream(self.device)
        before, self.launched = self.launched, computing.record_event()
        if before is not None:
            before.synchronize()
        with torch.cuda.stream(self.stream):
            copy = send_to_device(chunk, self.device, non_blocking=True)
        computing.wait_stream(self.stream)
        # The allocator must not give the memory away before the computation has read it.
        recursively_apply(lambda tensor: tensor.record_stream(computing), copy)
        return copy


@cache
def _copies(device: torch.device) -> _CopyStream:
    return _CopyStream(device)
