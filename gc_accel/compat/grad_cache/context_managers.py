"""In place of `grad_cache.context_managers`, for subclasses that encode by themselves."""

from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor

from gc_accel.state.rng import RngState


class RandContext:
    """The random states of the CPU and of the devices of some tensors; a block under it draws from them.

    The block may be entered any number of times. Afterwards the generators stand where they stood before it.

    Args:
        tensors: any, on the devices that will draw.
    """

    def __init__(self, *tensors: Tensor) -> None:
        devices = {tensor.device for tensor in tensors} | {torch.device("cpu")}
        self.states = [RngState.current(device) for device in devices]
        self.block = ExitStack()

    def __enter__(self) -> None:
        for state in self.states:
            self.block.enter_context(state.replayed())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.block.close()
