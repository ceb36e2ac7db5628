"""Chunks as the batch that they are the pieces of."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gc_accel.inputs.nested import Inputs
from gc_accel.inputs.packing import Packed


def join(chunks: Sequence[Inputs], path: str = "batch") -> tuple[Inputs, list[str]]:
    """The whole batch, and the paths of the inputs that had to be padded.

    Per-sample tensors are joined along their first dimension. Those of different widths, such as captions that
    each chunk pads to its own longest, are padded with zeros, which is what an attention mask wants; lists
    are joined end to end; what belongs to the whole batch is taken from the first chunk.
    """
    first = chunks[0]
    if isinstance(first, Tensor) and first.ndim:
        return _join_tensors(chunks, path)
    if isinstance(first, Packed):
        return Packed.join(chunks), []
    if isinstance(first, Mapping):
        parts = {key: join([chunk[key] for chunk in chunks], f"{path}[{key!r}]") for key in first}
        return {key: part for key, (part, _) in parts.items()}, [
            p for _, found in parts.values() for p in found
        ]
    if isinstance(first, (list, tuple)):
        if not any(isinstance(value, (Tensor, Mapping, Packed)) for value in first):
            return [value for chunk in chunks for value in chunk], []
        columns = [join(column, f"{path}[{i}]") for i, column in enumerate(zip(*chunks, strict=True))]
        return type(first)(part for part, _ in columns), [p for _, found in columns for p in found]
    return first, []


def _join_tensors(tensors: Sequence[Tensor], path: str) -> tuple[Tensor, list[str]]:
    shapes = {tensor.shape[1:] for tensor in tensors}
    widest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(widest, tensor.shape[1:], strict=True)]
        # `pad` counts from the last dimension, before and after each.
        padded.append(pad(tensor, [n for size in reversed(missing) for n in (0, size)]))
    return torch.cat(padded), [path] if len(shapes) > 1 else []
