"""Random number states: note them before a chunk's first pass, bring them back for its second.

Dropout draws its masks from the generator of the CPU or of the device that computes, so both passes over
a chunk see the same masks only if they start from the same states. Generators that torch does not own
(Python's `random`, NumPy) are left alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

CPU = torch.device("cpu")


def device_in_use() -> torch.device:
    """Where a function computes that has no tensors to tell by: the current CUDA device if CUDA is in use."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else CPU


@dataclass(frozen=True)
class RngState:
    """State of the CPU's generator and, on an accelerator, of the device's."""

    device: torch.device
    states: tuple[Tensor, ...]

    @classmethod
    def current(cls, device: torch.device) -> "RngState":
        """The state that the next draw on the CPU or on `device` starts from."""
        states = [torch.get_rng_state()]
        if device.type == "mps":
            states.append(torch.mps.get_rng_state())
        elif device.type != "cpu":
            states.append(torch.get_device_module(device).get_rng_state(device))
        return cls(device, tuple(states))

    def restore(self) -> None:
        """Make the next draw start from this state."""
        torch.set_rng_state(self.states[0])
        if self.device.type == "mps":
            torch.mps.set_rng_state(self.states[1])
        elif self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(self.states[1], self.device)

    def is_current(self) -> bool:
        """Whether nothing was drawn since this state was noted."""
        now = RngState.current(self.device)
        return all(torch.equal(a, b) for a, b in zip(self.states, now.states, strict=True))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run a block from this state, then continue from where the generators stood before it."""
        before = RngState.current(self.device)
        self.restore()
        try:
            yield
        finally:
            before.restore()
