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
        self.values: dict[Tensor, Tensor] = {}  # tensors that a step may write to, and their copies
        self.buffers: dict[nn.Module, dict[str, Tensor]] = {}  # which a step may replace by others
        self.grads: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}  # the gradient itself, and a copy
        self.modules = set[nn.Module]()  # met since the beginning, or since everything was put back

    def note(self, module: nn.Module, *, buffers: bool = True) -> None:
        """Note the gradients of a module, and its buffers."""
        if module in self.modules:
            return
        self.modules.update(module.modules())
        self.note_gradients(module.parameters())
        for part in module.modules() if buffers else ():
            if part not in self.buffers:
                self.buffers[part] = dict(part.named_buffers(recurse=False))
                self.note_values(self.buffers[part].values())

    def note_values(self, tensors: Iterable[Tensor]) -> None:
        """Note what some tensors hold."""
        self.values |= {each: each.detach().clone() for each in tensors if each not in self.values}

    def note_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Note gradients alone."""
        for parameter in parameters:
            if parameter not in self.grads:
                grad = parameter.grad
                # A copy, because a gradient that accumulates is added to in place.
                self.grads[parameter] = grad, None if grad is None else grad.clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; whoever goes on from here meets modules anew."""
        self.rng.restore()
        self.modules.clear()
        for module, buffers in self.buffers.items():
            for name, buffer in buffers.items():
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
        for tensor, value in self.values.items():
            if not torch.equal(tensor, value):  # an expanded buffer, for one, cannot be written to
                tensor.copy_(value)
        for parameter, (grad, copy) in self.grads.items():
            parameter.grad = grad
            if grad is not None and copy is not None:
                grad.copy_(copy)
