"""Nested inputs as chunks: measure, cut, join, call.

What is per sample in them, and what belongs to the whole batch and goes into every chunk, `walk` says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gc_accel.inputs.packing import Packed
from gc_accel.inputs.walk import Inputs, is_sequence_of_inputs, leaves, map_samples


def batch_size(inputs: Inputs) -> int:
    """Number of samples in nested inputs.

    Raises:
        ValueError: there is no per-sample value, or two of them differ in length.
    """
    lengths = {
        path: len(value.counts if isinstance(value, Packed) else value) for path, value in leaves(inputs)
    }
    if not lengths:
        raise ValueError(
            f"expected inputs that hold a tensor or a list of samples, got {type(inputs).__name__} without"
        )
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{path} has {length}" for path, length in lengths.items())
        raise ValueError(
            f"expected the same number of samples in every input, got: {listed}. Pair them up first, or mark "
            "those of which a sample has several rows (gc_accel.inputs.packing.pack)"
        )
    return next(iter(lengths.values()))


def slice_inputs(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Samples `start` to `stop` of nested inputs, as views, in the same structure."""
    return map_samples(lambda v: v.cut(start, stop) if isinstance(v, Packed) else v[start:stop], inputs)


def select(inputs: Inputs, indices: Sequence[int]) -> Inputs:
    """Some samples of nested inputs, in the order given, as copies, in the same structure."""

    def selected(value: Any) -> Any:
        if isinstance(value, Packed):
            return value.select(indices)
        return value[list(indices)] if isinstance(value, Tensor) else [value[index] for index in indices]

    return map_samples(selected, inputs)


def split(inputs: Inputs, chunk_size: int) -> Iterator[Inputs]:
    """Consecutive chunks of at most `chunk_size` samples; the last one may be smaller."""
    size = batch_size(inputs)
    for start in range(0, size, chunk_size):
        yield slice_inputs(inputs, start, min(start + chunk_size, size))


def concatenate(parts: Sequence[Inputs]) -> Inputs:
    """Parts of one structure end to end, in sample order; whole-batch values are those of the first part.

    Tensors are joined along their first dimension.
    """

    def joined(*values: Any) -> Any:
        if isinstance(values[0], Packed):
            return Packed.join(values)
        return torch.cat(values) if isinstance(values[0], Tensor) else [v for value in values for v in value]

    return map_samples(joined, *parts)


def unpacked(inputs: Inputs) -> Inputs:
    """Nested inputs with plain tensors for packed ones; a mapping loses those without rows, as from a processor."""
    return map_samples(
        lambda value: value.rows if isinstance(value, Packed) else value,
        inputs,
        drop=lambda value: isinstance(value, Packed) and not len(value.rows),
    )


def call(fn: Callable[..., Any], inputs: Inputs) -> Any:
    """Call `fn` in the way that the structure of its inputs asks for.

    A mapping goes in by keyword, a list or tuple of inputs by position, a tuple of a list and a mapping by
    both, anything else, such as a list of captions, as the single argument. Packed inputs go in as tensors.
    """
    inputs = unpacked(inputs)
    if isinstance(inputs, Mapping):
        return fn(**inputs)
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], list):
        return fn(*inputs[0], **inputs[1])
    if is_sequence_of_inputs(inputs):
        return fn(*inputs)
    return fn(inputs)


def named(outputs: Any) -> dict[Any, Tensor]:
    """What an encoder returned as a flat mapping: by its own names, by position, a lone tensor by `None`.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(outputs, Tensor):
        return {None: outputs}
    by_name = dict(enumerate(outputs)) if isinstance(outputs, (list, tuple)) else outputs
    if not isinstance(by_name, Mapping) or not all(isinstance(rep, Tensor) for rep in by_name.values()):
        raise ValueError(
            "expected an encoder that returns a tensor, or a tuple or mapping of tensors, got "
            f"{type(outputs).__name__}: have it return representations alone"
        )
    return dict(by_name)


def unnamed(outputs: Mapping[Any, Tensor]) -> Any:
    """The reverse of `named`: the structure that a loss is called with."""
    if None in outputs:
        return outputs[None]
    if all(isinstance(name, int) for name in outputs):
        return tuple(outputs[position] for position in sorted(outputs))
    return outputs
