"""What a forward may change in modules, put back before every step of a check and after the last.

Beside what every step notes (`gc_accel/state/snapshot.py`) these are weights and what modules keep in plain attributes.
A module's attributes are noted one level deep: a value that is bound anew and a tensor that is written to are seen and
undone, an entry that is added to a list in place is not.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gc_accel.state.modules import meeting
from gc_accel.state.snapshot import Snapshot

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
        self.snapshot, self.weights = Snapshot(device), weights
        self.names: dict[nn.Module, str] = {}
        self.attributes: dict[nn.Module, dict[str, Any]] = {}
        for name, module in modules:
            self.note(name, module)

    def note(self, name: str, module: nn.Module) -> None:
        """Note a module, without its children, unless it is noted already."""
        if module not in self.attributes:
            self.names[module], self.attributes[module] = name, self._attributes_of(module)
            values = self.attributes[module].values()
            self.snapshot.note_values(value for value in values if isinstance(value, Tensor))

    def watching(self) -> AbstractContextManager[None]:
        """A block in which every module is noted, with its children, when it is first called, before it computes."""

        def meet(module: nn.Module) -> None:
            if module not in self.attributes:
                for name, part in module.named_modules(prefix=f"{type(module).__name__} {len(self.names)}"):
                    self.note(name, part)

        return meeting(meet)

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
            self.snapshot.note_gradients([parameter])
            parameter.grad = None

    def changed(self) -> list[str]:
        """Names of buffers, attributes and weights that are not what was noted."""
        names = []
        for module, noted in self.attributes.items():
            now = self._attributes_of(module)
            path = f"{self.names[module]}." if self.names[module] else ""
            names += [f"{path}{key}" for key in noted.keys() | now if self._is_changed(noted, now, key)]
        return sorted(names)

    def has_drawn(self) -> bool:
        """Whether random numbers were drawn."""
        return not self.snapshot.rng.is_current()

    def rewind(self) -> None:
        """Put back everything but the gradients, of which there are none afterwards."""
        self._restore()
        self.take_gradients(list(self.snapshot.grads))

    @contextmanager
    def kept(self) -> Iterator["State"]:
        """A block after which everything stands as it was noted, gradients included, whatever is raised."""
        try:
            yield self
        finally:
            self._restore()

    def _restore(self) -> None:
        for module, noted in self.attributes.items():
            now = self._attributes_of(module)
            for key in now.keys() - noted.keys():
                delattr(module, key)
            for key, value in noted.items():
                if key not in now or now[key] is not value:
                    setattr(module, key, value)
        self.snapshot.restore()

    def _attributes_of(self, module: nn.Module) -> dict[str, Any]:
        plain = {key: value for key, value in vars(module).items() if key not in BOOKKEEPING}
        return plain | module._buffers | (module._parameters if self.weights else {})

    def _is_changed(self, noted: dict[str, Any], now: dict[str, Any], key: str) -> bool:
        if key not in noted or key not in now:
            return True
        before, after = noted[key], now[key]
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            return not torch.equal(self.snapshot.values[before], after)
        return before is not after and not (isinstance(before, PLAIN) and before == after)
