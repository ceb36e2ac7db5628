"""The modules that an encoder computes with, when it is a function around them.

Their weights are what a step adds gradients to, and takes them back from when memory runs out; their BatchNorm
layers are looked for; their device is where chunks go. `lambda x: model(x)` hides all of that from whoever calls it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn


def modules_of(fn: Callable[..., Any]) -> list[nn.Module]:
    """The callable itself, if it is a module, or those that it shows to hold.

    A function shows the variables of its closure, the global names that it uses, and its defaults; a bound method its
    object's attributes; a `partial` what it binds. Looked into are containers, and functions in a closure.
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


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield value.__func__
        yield value.__self__ if isinstance(value.__self__, nn.Module) else vars(value.__self__)
    elif isinstance(value, FunctionType):
        names = inspect.getclosurevars(value)
        yield from names.nonlocals.values()
        # Functions among the globals are libraries as a rule, whose own globals lead everywhere.
        yield from (each for each in names.globals.values() if isinstance(each, nn.Module))
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
