"""The modules that an encoder computes with, when it is a function around them.

Their BatchNorm layers are looked for, and their device is where chunks go. `lambda x: model(x)` hides both from whoever
calls it.
"""

import dis
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn


def modules_of(fn: Callable[..., Any]) -> list[nn.Module]:
    """The callable itself, if it is a module, or those that it shows to hold.

    A function shows the variables of its closure, the globals that it reads, its defaults, and of objects among them
    the attributes that its code names; a bound method and an instance with `__call__` likewise; a `partial` what it
    binds. Looked into are containers, and functions in a closure. What is hidden deeper is not found.
    """
    found, seen = dict[nn.Module, None](), set[int]()

    def look(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[value] = None
            return
        for part in _parts(value):
            look(part)

    look(fn)
    return list(found)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """A block in which a module is in training or in eval mode; every part of it afterwards in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield value.__func__
        yield from _named(value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        held = [*_closure(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        yield from held
        for each in held:
            yield from _named(each, value)
        for each in _globals(value):
            # Functions among the globals are libraries as a rule, whose own globals lead everywhere.
            yield from (each,) if isinstance(each, nn.Module) else _named(each, value)
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(call := vars(type(value)).get("__call__"), FunctionType):
        yield call
        yield from _named(value, call)


def _closure(fn: FunctionType) -> Iterator[Any]:
    for cell in fn.__closure__ or ():
        with suppress(ValueError):  # of a variable that has no value yet
            yield cell.cell_contents


def _globals(fn: FunctionType) -> Iterator[Any]:
    names = {each.argval for each in dis.get_instructions(fn) if each.opname == "LOAD_GLOBAL"}
    return (fn.__globals__[name] for name in names if name in fn.__globals__)


def _named(value: Any, fn: Callable[..., Any]) -> Iterator[Any]:
    """Attributes of an object that the code of a function names; an object that is not a module itself."""
    if isinstance(value, nn.Module):
        yield value
    elif not isinstance(value, (type, ModuleType)) and isinstance(fn, FunctionType):
        own = getattr(value, "__dict__", {})
        yield from (own[name] for name in fn.__code__.co_names if name in own)
