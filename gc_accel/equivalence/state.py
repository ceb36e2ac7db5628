"""What a step may change, noted before it and put back after it.

Weights, gradients, buffers, what modules keep in plain attributes, and the generators. A module's attributes
are noted one level deep: a value that is bound anew and a tensor that is written to are seen and undone, an
entry that is added to a list in place is not.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gc_accel.state.rng import RngState

BOOKKEEPING = vars(nn.Module()).keys() - {"training"}  # torch's own; the same dicts at any time
PLAIN = (bool, int, float, str, torch.Size, torch.dtype, torch.device)  # of which equal ones are the same


class State:
    """State of some modules and of the generators of a device.

    Args:
        modules: with their names; further ones may be noted later.
        device: the one whose generators count.
        weights: whether parameters are noted too, which takes a copy of them.
    """

    def __init__(
        self, modules: Iterable[tuple[str, nn.Module]], device: torch.device, *, weights: bool = True
    ) -> None:
        self.rng = RngState.current(device)
        self.weights = weights
        self.names: dict[nn.Module, str] = {}
        self.slots: dict[nn.Module, dict[str, Any]] = {}
        self.copies: dict[Tensor, Tensor] = {}
        self.grads: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}  # the tensor itself, and a copy
        for name, module in modules:
            self.note(name, module)

    def note(self, name: str, module: nn.Module) -> None:
        """Note a module, without its children, unless it is noted already."""
        if module in self.slots:
            return
        self.names[module], self.slots[module] = name, self._slots_of(module)
        for value in self.slots[module].values():
            if isinstance(value, Tensor):
                self.copies[value] = value.detach().clone()

    def parameter_names(self) -> dict[Tensor, str]:
        """Names of the parameters of all modules that are noted."""
        return {
            parameter: f"{name}.{key}"
            for module, name in self.names.items()
            for key, parameter in module.named_parameters(recurse=False)
        }

    def take_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Leave these parameters without a gradient until the state is put back."""
        for parameter in parameters:
            if parameter not in self.grads:
                grad = parameter.grad
                # The copy is for gradients that are views of buckets, which the next reduction writes to.
                self.grads[parameter] = (grad, None if grad is None else grad.clone())
            parameter.grad = None

    def changed(self) -> list[str]:
        """Names of buffers, attributes and weights that are not what was noted."""
        found = []
        for module, noted in self.slots.items():
            now = self._slots_of(module)
            path = f"{self.names[module]}." if self.names[module] else ""
            found += [f"{path}{key}" for key in noted.keys() | now if self._moved(noted, now, key)]
        return sorted(found)

    @torch.no_grad()
    def rewind(self) -> None:
        """Put back everything but the gradients, of which there are none afterwards."""
        for module, noted in self.slots.items():
            now = self._slots_of(module)
            for key in now.keys() - noted.keys():
                delattr(module, key)
            for key, value in noted.items():
                if key not in now or now[key] is not value:
                    setattr(module, key, value)
        for value, copy in self.copies.items():
            if not torch.equal(value, copy):
                value.copy_(copy)
        self.take_gradients(list(self.grads))
        self.rng.restore()

    @contextmanager
    def kept(self) -> Iterator["State"]:
        """A block after which everything stands as it was noted, gradients included, whatever is raised."""
        try:
            yield self
        finally:
            self.rewind()
            for parameter, (grad, copy) in self.grads.items():
                if grad is not None and copy is not None:
                    grad.copy_(copy)
                parameter.grad = grad

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block in which every module is noted when it is first called, before it computes."""
        handle = register_module_forward_pre_hook(
            lambda module, _: self.note(f"{type(module).__name__} {len(self.names)}", module)
        )
        try:
            yield
        finally:
            handle.remove()

    def _slots_of(self, module: nn.Module) -> dict[str, Any]:
        own = {key: value for key, value in vars(module).items() if key not in BOOKKEEPING}
        return own | module._buffers | (module._parameters if self.weights else {})

    def _moved(self, noted: dict[str, Any], now: dict[str, Any], key: str) -> bool:
        if key not in noted or key not in now:
            return True
        before, after = noted[key], now[key]
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            return not torch.equal(self.copies[before], after)
        return before is not after and not (isinstance(before, PLAIN) and before == after)
