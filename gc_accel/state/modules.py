"""Modules as they are called, and the mode that they are in.

An encoder may be a function around modules. Which ones, it does not say, so they are met when they are called.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gc_accel.state.rng import RngState, device_in_use


@contextmanager
def meeting(meet: Callable[[nn.Module], None]) -> Iterator[None]:
    """A block in which every module is met right before it computes, each time it is called."""
    handle = register_module_forward_pre_hook(lambda module, _: meet(module))
    try:
        yield
    finally:
        handle.remove()


class _Met(Exception):
    """The first module of a call was reached."""


def first_called(fn: Callable[[], Any]) -> nn.Module | None:
    """The first module with weights that a function calls, which is left there and then; None if it calls none.

    Random numbers that it draws on the way do not count.
    """
    met = list[nn.Module]()

    def stop(module: nn.Module) -> None:
        if any(True for _ in module.parameters()):
            met.append(module)
            raise _Met

    with torch.no_grad(), RngState.current(device_in_use()).replayed(), meeting(stop):
        try:
            fn()
        except _Met:
            return met[0]
    return None


class Modes:
    """The modes of modules now, training or eval."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modes = {module: module.training for module in modules}

    def put_back(self) -> None:
        """Bring every part into the mode that it had."""
        for module, mode in self.modes.items():
            module.training = mode

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A block in which every part is in the mode that it had; afterwards in the one from before the block."""
        now = {module: module.training for module in self.modes}
        self.put_back()
        try:
            yield
        finally:
            for module, mode in now.items():
                module.training = mode


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """A block in which a module is in training or in eval mode; every part of it afterwards in the mode it had."""
    modes = Modes(model.modules())
    model.train(training)
    try:
        yield
    finally:
        modes.put_back()
