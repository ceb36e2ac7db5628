"""Chunks joined to the batch that they were cut from."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Size, Tensor
from torch.nn.functional import pad

from gc_accel.inputs.nested import concatenate
from gc_accel.inputs.walk import Inputs, leaves, map_samples


def join(chunks: Sequence[Inputs]) -> tuple[Inputs, list[str]]:
    """The whole batch, and the paths of the inputs that had to be padded.

    Per-sample values are joined as by `concatenate`. Tensors of different widths, such as captions that each chunk
    pads to its own longest, are padded with zeros, which is what an attention mask wants.
    """
    shapes = defaultdict[str, set[Size]](set)
    for chunk in chunks:
        for path, value in leaves(chunk):
            if isinstance(value, Tensor):
                shapes[path].add(value.shape[1:])
    batch = map_samples(lambda *values: concatenate(_padded(values)), *chunks)
    return batch, [path for path, widths in shapes.items() if len(widths) > 1]


def _padded(values: Sequence[Any]) -> Sequence[Any]:
    """Tensors `(C, ...)` as wide as the widest of them; other values as they are."""
    if not isinstance(values[0], Tensor):
        return values
    widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in values), strict=True)]
    padded = []
    for tensor in values:
        missing = [wide - size for wide, size in zip(widest, tensor.shape[1:], strict=True)]
        # `pad` counts from the last dimension, before and after each.
        padded.append(pad(tensor, [n for size in reversed(missing) for n in (0, size)]))
    return padded
