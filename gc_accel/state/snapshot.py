"""What a step changes, noted before it does, to be put back if the step cannot be finished.

Gradients, buffers and the states of the random generators. What a step will change is not known at its beginning where
the encoder is a function, so it is noted piece by piece, each before the first change.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gc_accel.state.rng import RngState


class Snapshot:
    """State of the generators now, and of tensors as they are noted.

    Args:
        device: the one that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rng = RngState.current(device)
        self.buffers: dict[Tensor, Tensor] = {}
        self.grads: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}  # the gradient itself, and a copy
        self.modules = set[nn.Module]()

    def note(self, module: nn.Module, *, buffers: bool = True) -> None:
        """Note the gradients of a module, and its buffers."""
        if module in self.modules:
            return
        self.modules.update(module.modules())
        self.note_gradients(module.parameters())
        if buffers:
            self.buffers |= {each: each.clone() for each in module.buffers() if each not in self.buffers}

    def note_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Note gradients alone."""
        for parameter in parameters:
            if parameter not in self.grads:
                grad = parameter.grad
                # A copy, because a gradient that accumulates is added to in place.
                self.grads[parameter] = grad, None if grad is None else grad.clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        self.rng.restore()
        for buffer, copy in self.buffers.items():
            buffer.copy_(copy)
        for parameter, (grad, copy) in self.grads.items():
            parameter.grad = grad
            if grad is not None and copy is not None:
                grad.copy_(copy)
