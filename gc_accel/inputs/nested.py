"""Nested inputs as chunks: measure, slice, join, call.

An encoder's inputs are a tensor, a list of inputs, a mapping (`dict`, `BatchEncoding`, `UserDict`) or a
tuple of a list and a mapping. Every tensor in them has the batch as its first dimension; a list of plain
values, such as captions, holds one value per sample; of a `Packed` value, such as the patches of images of any
size, a sample has several rows or none. Anything else (`None`, a flag, a 0-d tensor) belongs to the whole batch
and goes into every chunk.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gc_accel.inputs.packing import Packed, unpacked

Inputs = Any
INPUTS = 64  # by position, at most: a longer list is one of samples


def batch_size(inputs: Inputs) -> int:
    """Number of samples in nested inputs.

    Raises:
        ValueError: if there is no per-sample value, or two of them differ in length.
    """
    lengths = dict(_lengths(inputs, "batch"))
    if not lengths:
        raise ValueError(
            f"expected inputs that hold a tensor or a list of samples, got {type(inputs).__name__} without"
        )
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{path} has {length}" for path, length in lengths.items())
        raise ValueError(
            f"expected the same number of samples in every input, got: {found}. Pair them up first, or mark "
            "those of which a sample has several rows (gc_accel.inputs.packing.pack)"
        )
    return next(iter(lengths.values()))


def slice_inputs(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Samples `start` to `stop` of nested inputs, as views, in the same structure."""
    if isinstance(inputs, Tensor):
        return inputs[start:stop] if inputs.ndim else inputs
    if isinstance(inputs, Packed):
        return inputs.cut(start, stop)
    if isinstance(inputs, Mapping):
        return {key: slice_inputs(value, start, stop) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        if _is_container(inputs):
            return type(inputs)(slice_inputs(value, start, stop) for value in inputs)
        return inputs[start:stop]
    return inputs


def select(inputs: Inputs, indices: Sequence[int]) -> Inputs:
    """Some samples of nested inputs, in the order given, as copies, in the same structure."""
    if isinstance(inputs, Tensor):
        return inputs[list(indices)] if inputs.ndim else inputs
    if isinstance(inputs, Packed):
        return inputs.select(indices)
    if isinstance(inputs, Mapping):
        return {key: select(value, indices) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        if _is_container(inputs):
            return type(inputs)(select(value, indices) for value in inputs)
        return [inputs[index] for index in indices]
    return inputs


def split(inputs: Inputs, chunk_size: int) -> Iterator[Inputs]:
    """Consecutive chunks of at most `chunk_size` samples; the last one may be smaller."""
    size = batch_size(inputs)
    for start in range(0, size, chunk_size):
        yield slice_inputs(inputs, start, min(start + chunk_size, size))


def split_streams(
    chunk: Inputs, streams: Mapping[Any, Iterable[str]]
) -> tuple[dict[Any, Inputs], dict[str, Any]]:
    """The inputs of each stream, and what feeds none; `{None: ...}` is a single stream of any inputs.

    Raises:
        ValueError: if a stream has no input.
    """
    if None in streams:
        return {None: chunk}, {}
    parts = {name: {key: chunk[key] for key in keys if key in chunk} for name, keys in streams.items()}
    for name, part in parts.items():
        if not part:
            raise ValueError(f"expected an input of {name!r} among {list(streams[name])}, got {list(chunk)}")
    fed = {key for part in parts.values() for key in part}
    return parts, {key: value for key, value in chunk.items() if key not in fed}


def concatenate(parts: Sequence[Inputs]) -> Inputs:
    """Join per-sample values, tensors along their first dimension and lists end to end; keep any other value."""
    if isinstance(parts[0], Tensor) and parts[0].ndim:
        return torch.cat(list(parts))
    if isinstance(parts[0], Packed):
        return Packed.join(parts)
    if isinstance(parts[0], (list, tuple)):
        return [value for part in parts for value in part]
    return parts[0]


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
    if isinstance(inputs, (list, tuple)) and _is_container(inputs):
        return fn(*inputs)
    return fn(inputs)


def named(outputs: Any) -> dict[Any, Tensor]:
    """What an encoder returned as a flat mapping: by its own names, by position, a lone tensor by `None`.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(outputs, Tensor):
        return {None: outputs}
    found = dict(enumerate(outputs)) if isinstance(outputs, (list, tuple)) else outputs
    if not isinstance(found, Mapping) or not all(isinstance(output, Tensor) for output in found.values()):
        raise ValueError(
            "expected an encoder that returns a tensor, or a tuple or mapping of tensors, got "
            f"{type(outputs).__name__}: have it return representations alone"
        )
    return dict(found)


def unnamed(outputs: Mapping[Any, Tensor]) -> Any:
    """The reverse of `named`: the structure that a loss is called with."""
    if None in outputs:
        return outputs[None]
    if all(isinstance(name, int) for name in outputs):
        return tuple(outputs[position] for position in sorted(outputs))
    return outputs


def _is_container(values: Sequence[Any]) -> bool:
    # Not all of them: a slice of a list of captions would take as long as the whole batch has captions.
    return any(isinstance(value, (Tensor, Mapping, Packed)) for value in values[:INPUTS])


def _lengths(inputs: Inputs, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(inputs, Tensor):
        if inputs.ndim:
            yield path, len(inputs)
    elif isinstance(inputs, Packed):
        yield path, len(inputs.counts)
    elif isinstance(inputs, Mapping):
        for key, value in inputs.items():
            yield from _lengths(value, f"{path}[{key!r}]")
    elif isinstance(inputs, (list, tuple)):
        if _is_container(inputs):
            for index, value in enumerate(inputs):
                yield from _lengths(value, f"{path}[{index}]")
        elif inputs:
            yield path, len(inputs)
